"""What `tools/bench/peers-loader` installs, and how it measures one reader in a process of its own."""

import importlib.metadata
import time
from pathlib import Path
from typing import Any

from _peers_text import TEXT
from _peers_tokens import LATER, TOKENS

__all__ = ["NAMED", "PINS", "PINS_ALONE", "READERS", "measure"]

NAMED = ("mosaicml-streaming", "litdata", "webdataset", "grain", "datasets", "pylance")

PINS = (
    "torch==2.13.0", "numpy==2.4.6", "grain==0.2.18", "array_record==0.8.6", "datasets==5.2.0", "pylance==14.0.2",
    "transformers==5.24.0", "boto3", "msgspec", "orjson", "xxhash", "pyarrow", "typing-extensions", "fsspec", "tokenizers",
    "click", "rich", "zstandard", "pillow", "requests",
)  # fmt: skip
"""Where no version is named, it is that of constraints.txt."""

PINS_ALONE = (
    "mosaicml-streaming==0.13.0", "litdata==0.2.76", "lightning-utilities==0.15.3", "webdataset==1.0.2", "braceexpand==0.1.7",
    "catalogue==2.0.10", "brotli==1.2.1", "python-snappy==0.7.3", "cramjam==2.14.0", "zstd==1.5.7.2",
)  # fmt: skip
"""Installed without what they ask for: mosaicml-streaming wants numpy < 2.2, transformers < 5 and five cloud libraries."""


READERS = {"tokens": TOKENS, "rows": TEXT}


def measure(name: str, folder: Path, *, seconds: float) -> dict[str, Any]:
    """Read one epoch, or for `seconds` of CPU time; return times for one million units, and what the process took."""
    kind = "rows" if (folder / "text.bin").exists() else "tokens"
    _, package, read = READERS[kind][name]
    begin = read(folder)
    imports, before = time.process_time(), own_memory()
    if name.endswith(LATER):
        for _ in begin():  # A whole epoch before the one that is measured.
            pass
    started = time.process_time(), time.perf_counter()
    batches = begin()
    units = next(batches)
    first = time.process_time() - started[0]
    peak = own_memory()
    for number, found in enumerate(batches):
        units += found
        if number % 64 == 0:
            peak = max(peak, own_memory())
            if time.process_time() - started[0] > seconds:
                break
    cpu_s, wall_s = time.process_time() - started[0], time.perf_counter() - started[1]
    return {
        "cpu_s": cpu_s / units * 1e6,
        "wall_s": wall_s / units * 1e6,
        "import_s": imports,
        "first_s": first,
        "memory_mb": (max(peak, own_memory()) - before) / 1e6,
        "version": importlib.metadata.version(package) if package else "",
    }


def own_memory() -> int:
    """Return the bytes of this process that are no mapped files: the page cache is everybody's."""
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return sum(int(line.split()[1]) * 1024 for line in status if line.startswith(("RssAnon:", "RssShmem:")))

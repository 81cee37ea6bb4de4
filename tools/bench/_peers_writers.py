"""What `tools/bench/peers-loader` writes: the same tokens, or the same text, in each format by the format's own writer."""

import importlib.machinery
import sys
import types
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["BATCH", "SEQ", "WRITERS", "mosaicml", "write"]

BATCH = 32
SEQ = 2048
SHARD_TOKENS = 32_000_000
CHARACTERS = 4_000


def write(name: str, folder: Path, *, megabytes: int) -> None:
    """Write the source, or from it the format `name`; with `megabytes` below 0, text."""
    if name == "source":
        (text_source if megabytes < 0 else token_source)(folder, abs(megabytes))
    elif name != "flat":
        WRITERS["rows" if megabytes < 0 else "tokens"][name](folder, folder / name)


def token_source(folder: Path, megabytes: int) -> None:
    """Write our dataset and `tokens.bin`, which hold the same tokens."""
    from datastore.testing.examples import make_dataset

    shards = max(1, megabytes * 10**6 // (2 * SHARD_TOKENS))
    made = make_dataset(folder / "datastore", [[1_000] * (SHARD_TOKENS // 1_000)] * shards)
    with (folder / "tokens.bin").open("wb") as file:
        for shard in range(shards):
            made.token_shard(shard)[0].tofile(file)


def text_source(folder: Path, megabytes: int) -> None:
    """Write `text.bin` and where each row of it starts."""
    generator = np.random.default_rng(0)
    lengths = generator.integers(CHARACTERS // 2, CHARACTERS * 3 // 2, megabytes * 10**6 // CHARACTERS)
    starts = np.concatenate(([0], np.cumsum(lengths)))
    starts.tofile(folder / "starts.bin")
    generator.integers(97, 123, int(starts[-1]), dtype=np.uint8).tofile(folder / "text.bin")


def samples(folder: Path) -> np.ndarray[Any, Any]:
    """Return the tokens in samples, as the others store them: [N, 2049]."""
    tokens = np.memmap(folder / "tokens.bin", np.uint16, "r")
    count = len(tokens) // (SEQ + 1)
    return tokens[: count * (SEQ + 1)].reshape(count, SEQ + 1)


def texts(folder: Path) -> Iterator[str]:
    """Yield the rows of text."""
    raw, starts = (folder / "text.bin").read_bytes(), np.fromfile(folder / "starts.bin", np.int64).tolist()
    for first, last in pairwise(starts):
        yield raw[first:last].decode("ascii")


def arrow_text(folder: Path) -> Any:
    """Return the rows as a table of Arrow."""
    import pyarrow as pa

    starts = np.fromfile(folder / "starts.bin", np.int64)
    buffers = [None, pa.py_buffer(starts), pa.py_buffer((folder / "text.bin").read_bytes())]
    return pa.table({"text": pa.LargeStringArray.from_buffers(len(starts) - 1, *buffers[1:])})


def arrow_samples(folder: Path, *, variable: bool) -> Iterator[Any]:
    """Yield the samples as batches of Arrow, in lists of one length, or of any (as tokenized text has them)."""
    import pyarrow as pa

    found = samples(folder)
    for first in range(0, len(found), 8_192):
        part = np.ascontiguousarray(found[first : first + 8_192])
        if variable:
            offsets = np.arange(0, part.size + 1, SEQ + 1, dtype=np.int32)
            lists = pa.ListArray.from_arrays(offsets, pa.array(part.ravel().astype(np.int32)))
        else:
            lists = pa.FixedSizeListArray.from_arrays(pa.array(part.ravel()), SEQ + 1)
        yield pa.record_batch({"input_ids": lists})


def write_mds(folder: Path, to: Path) -> None:
    streaming = mosaicml()
    with streaming.MDSWriter(out=str(to), columns={"tokens": f"ndarray:uint16:{SEQ + 1}"}) as out:
        for sample in samples(folder):
            out.write({"tokens": np.asarray(sample)})


def write_mds_text(folder: Path, to: Path) -> None:
    with mosaicml().MDSWriter(out=str(to), columns={"text": "str"}) as out:
        for text in texts(folder):
            out.write({"text": text})


def write_litdata(folder: Path, to: Path) -> None:
    import torch
    from litdata.streaming.cache import Cache
    from litdata.streaming.item_loader import TokensLoader

    cache = Cache(str(to), chunk_bytes="64MB", item_loader=TokensLoader(block_size=SEQ + 1))
    for index, sample in enumerate(samples(folder)):
        cache[index] = torch.from_numpy(np.array(sample))
    cache.done()
    cache.merge()


def write_litdata_text(folder: Path, to: Path) -> None:
    from litdata.streaming.cache import Cache

    cache = Cache(str(to), chunk_bytes="64MB")
    for index, text in enumerate(texts(folder)):
        cache[index] = text
    cache.done()
    cache.merge()


def write_webdataset(folder: Path, to: Path) -> None:
    import webdataset as wds

    to.mkdir()
    with wds.ShardWriter(str(to / "%05d.tar"), maxsize=64e6, maxcount=10**9, verbose=0) as out:
        for index, sample in enumerate(samples(folder)):
            out.write({"__key__": f"{index:08d}", "npy": np.asarray(sample)})


def write_webdataset_text(folder: Path, to: Path) -> None:
    import webdataset as wds

    to.mkdir()
    with wds.ShardWriter(str(to / "%05d.tar"), maxsize=64e6, maxcount=10**9, verbose=0) as out:
        for index, text in enumerate(texts(folder)):
            out.write({"__key__": f"{index:08d}", "txt": text})


def write_array_records(to: Path, rows: Iterator[bytes]) -> None:
    from array_record.python.array_record_module import ArrayRecordWriter

    to.mkdir()
    out = ArrayRecordWriter(str(to / "data.array_record"), "group_size:1,uncompressed")
    for row in rows:
        out.write(row)
    out.close()


def write_grain(folder: Path, to: Path) -> None:
    write_array_records(to, (sample.tobytes() for sample in samples(folder)))


def write_grain_text(folder: Path, to: Path) -> None:
    write_array_records(to, (text.encode() for text in texts(folder)))


def write_hf(folder: Path, to: Path) -> None:
    import datasets
    import pyarrow as pa

    table = pa.Table.from_batches(arrow_samples(folder, variable=True))
    datasets.Dataset(table).save_to_disk(str(to))


def write_hf_text(folder: Path, to: Path) -> None:
    import datasets

    datasets.Dataset(arrow_text(folder)).save_to_disk(str(to))


def write_lance(folder: Path, to: Path) -> None:
    import lance
    import pyarrow as pa

    batches = list(arrow_samples(folder, variable=False))
    lance.write_dataset(pa.Table.from_batches(batches), str(to))


def write_lance_text(folder: Path, to: Path) -> None:
    import lance

    lance.write_dataset(arrow_text(folder), str(to))


def write_ours_text(folder: Path, to: Path) -> None:
    import datastore as ds

    with ds.record_writer(str(to), schema={"text": "large_string"}) as out:
        out.write(arrow_text(folder))


def mosaicml() -> Any:
    """Return `streaming`. It imports torchvision for its image classes, which nothing here uses."""
    import transformers.feature_extraction_utils  # noqa: F401 - it looks for torchvision, too, and first

    for name in ("", ".datasets", ".transforms", ".transforms.functional"):
        stub = types.ModuleType(f"torchvision{name}")
        stub.__spec__ = importlib.machinery.ModuleSpec(stub.__name__, None)
        sys.modules[stub.__name__] = stub
    sys.modules["torchvision.datasets"].VisionDataset = object  # type: ignore[attr-defined]
    sys.modules["torchvision.transforms.functional"].to_tensor = None  # type: ignore[attr-defined]
    import streaming

    return streaming


WRITERS: dict[str, dict[str, Callable[[Path, Path], None]]] = {
    "tokens": {
        "datastore": lambda _folder, _to: None,  # It is the source.
        "mds": write_mds, "litdata": write_litdata, "webdataset": write_webdataset, "grain": write_grain, "hf": write_hf,
        "lance": write_lance,
    },
    "rows": {
        "datastore": write_ours_text, "mds": write_mds_text, "litdata": write_litdata_text, "webdataset": write_webdataset_text,
        "grain": write_grain_text, "hf": write_hf_text, "lance": write_lance_text,
    },
}  # fmt: skip

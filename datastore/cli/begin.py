"""The commands to begin with: a machine, what an error means, settings to start from, completion, a page to look at.

`doctor` says facts first, then one line for each thing that will hurt. It writes to storage only if a URL is given, and
removes what it wrote.
"""

import os
import platform
import shutil
import sys
import time
import uuid
from contextlib import suppress
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import click

from datastore.cli.output import fields, json_option, say, say_json, table
from datastore.cli.redundancy import tell_health
from datastore.cli.shell import example

__all__ = ["COMMANDS"]

_REQUIRED = ("numpy", "pyarrow", "fsspec", "msgspec", "orjson", "tokenizers", "xxhash", "zstandard")

_EXTRAS = {
    "torch": ("torch",),
    "s3": ("s3fs",),
    "hf": ("transformers", "datasets"),
    "track": ("tensorboard",),
    "wandb": ("wandb",),
    "fp8": ("torchao",),
    "compress": ("compressed-tensors", "gguf", "peft"),
    "orbax": ("tensorstore",),
    "plot": ("matplotlib",),
    "sql": ("duckdb",),
    "fast": ("gigatoken", "fastokens"),
    "chat": ("jinja2",),
    "images": ("pillow",),
    "audio": ("soundfile",),
    "code": ("pathspec",),
    "warc": ("resiliparse", "brotli"),
    "quality": ("rensa", "fasttext-predict"),
    "unigram": ("sentencepiece",),
    "ray": ("ray",),
    "ui": ("starlette", "uvicorn", "jinja2"),
}
"""The optional extras and the packages that each brings."""

_PROBE_BYTES = 32 * 2**20


@dataclass(frozen=True, slots=True)
class StorageProbe:
    """What one URL can do, measured with one object of 32 MiB."""

    url: str
    exclusive: bool
    write_mb_per_s: float
    read_mb_per_s: float


@click.command(
    short_help="Check this machine, a storage, or what a lost disk would cost.",
    epilog=example("datastore doctor", "datastore doctor --url data/", "datastore doctor data/code"),
)
@click.argument("dataset", required=False)
@click.option("--url", help="Also write, read and remove a probe of 32 MiB there, and test put-if-absent.")
@json_option
def doctor(*, dataset: str | None, url: str | None, as_json: bool) -> None:
    """Show versions, cores, memory, disk, devices and extras; with --url test a storage, too.

    With the URL of a DATASET, show instead what would be gone if one of its disks were lost.
    """
    if dataset is not None:
        from datastore.dataset.durability.health import health

        found = health(dataset)
        say_json(found) if as_json else tell_health(found)
        return
    packages = {name: _version(name) for name in _REQUIRED}
    extras = {extra: {name: _version(name) for name in names} for extra, names in _EXTRAS.items()}
    machine = _machine()
    device = _device() if extras["torch"]["torch"] else {}
    probe = _probe(url) if url else None
    advice = _advice(machine, extras, probe)
    if as_json:
        facts = {"packages": packages, "extras": extras, "machine": machine, "device": device}
        say_json(facts | {"storage": asdict(probe) if probe else None, "advice": advice})
        return
    fields(_shown(machine) | device)
    say()
    table(("package", "version", "extra"), _package_rows(packages, extras))
    if probe:
        say()
        fields(
            {
                "storage": probe.url,
                "put-if-absent": "yes" if probe.exclusive else "no: one writer at a time",
                "write": f"{probe.write_mb_per_s:,.0f} MB/s",
                "read": f"{probe.read_mb_per_s:,.0f} MB/s",
            }
        )
    say()
    for line in advice or ["Nothing to complain about."]:
        say(line)


@click.command(
    short_help="Say what an error code means, and what to do.",
    epilog=example("datastore explain corrupt", "datastore explain"),
)
@click.argument("code", required=False)
@json_option
def explain(*, code: str | None, as_json: bool) -> None:
    """Say what CODE means, how it comes about, and what to do; without it, list all codes.

    An error of a command is one line, `error[CODE]: what is wrong (values). What to do.` The reasons for which an ingest
    rejects a record or leaves a file out, such as invalid_json, are explained likewise.
    """
    from datastore.reasons import LEFT_OUT, REJECTED
    from datastore.troubleshooting import DOCS_URL, EXPLANATIONS
    from datastore.troubleshooting import explain as find

    reasons = REJECTED | LEFT_OUT
    if code is None or code in reasons:
        found = [{"code": code, "means": reasons[code]}] if code else [asdict(each) for each in EXPLANATIONS]
        rows = [{"code": each["code"], "means": each["means"]} for each in found]
        say_json(rows) if as_json else table(("code", "means"), [list(each.values()) for each in rows])
        return
    told = find(code)
    if as_json:
        cases = [{"comes_about": case, "what_to_do": way_out} for case, way_out in told.cases]
        say_json(asdict(told) | {"cases": cases})
        return
    fields({"code": told.code, "exit code": told.status} | ({"in Python": f"ds.{told.error}"} if told.error else {}))
    say(f"\n{told.means}")
    for case, way_out in told.cases:
        say(f"\n- {case}\n  {way_out}")
    say()
    for page in told.pages:
        say(f"{DOCS_URL}/{page}")


def _package_rows(
    packages: dict[str, str | None], extras: dict[str, dict[str, str | None]]
) -> list[tuple[str, str, str]]:
    rows = [(name, version or "missing", "") for name, version in packages.items()]
    for extra, versions in extras.items():
        rows.extend((name, version or "not installed", extra) for name, version in versions.items())
    return rows


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _shown(machine: dict[str, Any]) -> dict[str, object]:
    """Return `machine` as people read it."""
    from datastore.units import format_bytes

    return {
        "datastore": machine["datastore"],
        "python": f"{machine['python']} ({machine['executable']})",
        "system": machine["system"],
        "cores": machine["cores"],
        "memory": format_bytes(machine["memory_bytes"]),
        "disk free": f"{format_bytes(machine['disk_free_bytes'])} at {machine['folder']}",
    }


def _machine() -> dict[str, Any]:
    from datastore.host import cores, memory_bytes

    folder = Path.cwd()
    return {
        "datastore": _version("llm-datastore") or "not installed",
        "python": platform.python_version(),
        "executable": sys.executable,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cores": cores(),
        "memory_bytes": memory_bytes(),
        "folder": str(folder),
        "disk_free_bytes": shutil.disk_usage(folder).free,
    }


def _device() -> dict[str, object]:
    import torch

    if not torch.cuda.is_available():
        fast = any(flag in _cpu_flags() for flag in ("amx_bf16", "avx512_bf16"))
        return {"device": "cpu", "bf16": "native" if fast else "emulated, slower than float32"}
    names = sorted({torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())})
    native = "native" if torch.cuda.is_bf16_supported() else "not supported"
    return {"device": f"{torch.cuda.device_count()} x {', '.join(names)}", "bf16": native}


def _cpu_flags() -> frozenset[str]:
    """Return the processor's features as Linux lists them; empty elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.partition(":")[2] for line in lines if line.startswith("flags")), "").split())


def _probe(url: str) -> StorageProbe:
    from datastore.storage.base import probe_exclusive
    from datastore.storage.resolve import open_storage

    storage = open_storage(url)
    key = f"doctor-probe-{uuid.uuid4().hex}"
    body = os.urandom(_PROBE_BYTES)
    try:
        started = time.perf_counter()
        storage.put(key, body)
        written = time.perf_counter()
        storage.get(key)
        finished = time.perf_counter()
    finally:
        storage.delete(key)
    megabytes = _PROBE_BYTES / 1e6
    return StorageProbe(
        url=storage.url,
        exclusive=probe_exclusive(storage),
        write_mb_per_s=round(megabytes / (written - started), 1),
        read_mb_per_s=round(megabytes / (finished - written), 1),
    )


def _advice(
    machine: dict[str, object], extras: dict[str, dict[str, str | None]], probe: StorageProbe | None
) -> list[str]:
    lines = [
        f"The extra '{extra}' is not installed: pip install 'llm-datastore[{extra}]' brings {', '.join(versions)}."
        for extra, versions in extras.items()
        if None in versions.values()
    ]
    if machine["cores"] == 1:
        lines.append("There is one core: ingest and loader threads will wait for each other.")
    if probe and not probe.exclusive:
        lines.append("This storage has no put-if-absent: let only one process at a time write to a dataset there.")
    return lines


@click.command(
    short_help="Write a settings file to start from.",
    epilog=example("datastore init recipe --data data/code --to first.toml"),
)
@click.argument("kind", metavar="recipe|ingest", type=click.Choice(["recipe", "ingest"]))
@click.option(
    "--to", metavar="FILE", type=click.Path(dir_okay=False, path_type=Path), help="The file.  [default: KIND.toml]"
)
@click.option("--data", metavar="URL", default="data", help="The dataset to train on.")
@click.option("--force", is_flag=True, help="Write over a file that is there.")
def init(*, kind: str, to: Path | None, data: str, force: bool) -> None:
    """Write a TOML file with every setting, each below what it means: of a training run (recipe), or of an ingest.

    What is commented out is as it would be without the line.
    """
    from datastore.config import commented
    from datastore.errors import ConfigError
    from datastore.ingestion.settings import IngestSettings
    from datastore.training.settings import Settings

    to = to or Path(f"{kind}.toml")
    if kind == "recipe":
        text = commented(Settings, {"data.url": data} | _BEGUN_WITH)
        use = f"datastore train {to} --to runs/first"
    else:
        text = commented(IngestSettings, {})
        use = f"datastore ingest SOURCE --to {data} --config {to}"
    try:
        with to.open("w" if force else "x", encoding="utf-8") as file:
            file.write(f"# {use}\n\n{text}")
    except FileExistsError:
        raise ConfigError(
            "there is such a file already", file=str(to), hint="Name another one by `to`, or give `force`."
        ) from None
    except OSError as error:
        raise ConfigError(
            f"the file cannot be written: {error.strerror}", file=str(to), hint="Name another one: `to`."
        ) from None
    say(f"wrote {to}; use it by: {use}")


_BEGUN_WITH = {
    "data.seq_len": 512,
    "data.global_batch": 16,
    "model.layers": 4,
    "model.width": 256,
    "model.heads": 4,
    "optim.lr": 1e-3,
    "optim.warmup": 50,
    "train.steps": 500,
    "checkpoint.every": 100,
    "eval.every": 100,
}
"""What one changes first, as suits a first try without a GPU."""


@click.command(
    short_help="Print what makes a shell complete commands.",
    epilog=example("datastore completion bash"),
)
@click.argument("shell", metavar="bash|zsh|fish", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, *, shell: str) -> None:
    """Print a script for bash, zsh or fish; once it is read, the tab key completes commands, options and paths.

    For bash and zsh put `eval "$(datastore completion bash)"` into ~/.bashrc or ~/.zshrc; for fish, the output into
    ~/.config/fish/completions/datastore.fish.
    """
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    say(found(context.find_root().command, {}, "datastore", "_DATASTORE_COMPLETE").source())


@click.command(short_help="Look at datasets and runs in a browser.", epilog=example("datastore ui data runs"))
@click.argument("urls", nargs=-1, metavar="[URL...]")
@click.option(
    "--host", default="127.0.0.1", help="Where to listen; others than this machine can see it only if you name another."
)
@click.option("--port", type=click.IntRange(min=0, max=65_535), default=0, help="The port; 0: one that is free.")
@click.option("--open/--no-open", "browser", default=True, help="Open a browser.")
def ui(*, urls: tuple[str, ...], host: str, port: int, browser: bool) -> None:
    """Serve a page with the datasets and runs at each URL, or up to three folders below it, until Ctrl-C; only looks.

    Without a URL it is the folder that you are in. Whoever has the address, which holds a token, can see what the page shows.
    """
    from datastore.ui.server import serve

    def ready(address: str) -> None:
        say(address)
        say("Ctrl-C ends it")
        sys.stdout.flush()
        if browser:
            import webbrowser

            webbrowser.open(address)

    with suppress(KeyboardInterrupt):  # That is how it ends.
        serve(urls or (".",), host=host, port=port, ready=ready)


COMMANDS = (init, completion, ui, doctor, explain)

"""Checkpoints of others as files: read into a step of ours, and written from one.

    torch         one file of `torch.save` (.pt, .pth, .bin, .ckpt), or such files with an index, as Hugging Face writes them
    safetensors   one file, or several with an index
    dcp           a folder of `torch.distributed.checkpoint`

and, to read alone, a folder of Orbax (`orbax.py`).

Files of the first and the last kind are pickles, which may run code when they are opened. Nothing does here: of `torch.save` only
tensors and plain values are taken (`weights_only`), and of DCP's table of contents only the classes that it is made of.
"""

import io
import json
import pickle
import re
import struct
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import ReadItem
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict
from torch.distributed.checkpoint.state_dict_saver import save
from typing_extensions import override

from datastore.checkpoint.checkpointer import Checkpointer
from datastore.checkpoint.exchange.orbax import is_orbax, read_orbax
from datastore.checkpoint.format.manifest import StepCommit
from datastore.checkpoint.format.tree import specs, unpack
from datastore.checkpoint.keeping import Keep
from datastore.checkpoint.loading.reader import Reader, transfers_of
from datastore.checkpoint.steps import StepLog
from datastore.checkpoint.tensors import DTYPES
from datastore.errors import ConfigError, CorruptError, FormatError, MissingError
from datastore.storage.base import Storage

__all__ = ["FileFormat", "import_files", "read_files", "read_items", "write_files"]

FileFormat = Literal["torch", "safetensors", "dcp"]

_TORCH = {".pt", ".pth", ".bin", ".ckpt"}

_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")

_THREADS = 2


def read_files(source: Path) -> dict[str, Any]:
    """Return the state that lies at `source`: a file, or a folder.

    Takes the memory of the state.

    Raises:
        MissingError: there is nothing.
        FormatError: it is no checkpoint that is known here, or holds an object that is no plain value.
        CorruptError: it is damaged.
    """
    if not source.exists():
        raise MissingError("no such file or folder", path=str(source), hint="Check the path.")
    try:
        return _state_at(source)
    except (pickle.UnpicklingError, CheckpointException) as error:
        raise FormatError(
            f"it holds what is no tensor and no plain value: {_foreign(error)}",
            path=str(source),
            hint="Open it with torch.load where you trust it, and save what is plain, such as its state_dict().",
        ) from None
    except (OSError, EOFError, RuntimeError, ValueError, struct.error) as error:
        raise CorruptError(
            f"it cannot be read: {_first_line(error)}", path=str(source), hint="Restore it from a copy."
        ) from None


def _state_at(source: Path) -> dict[str, Any]:
    if source.is_file():
        return _file(source)
    if (source / ".metadata").is_file():
        return _dcp_folder(source)
    if is_orbax(source):
        return read_orbax(source)
    index = next((source / name for name in _INDICES if (source / name).is_file()), None)
    if index is not None:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    else:
        names = sorted(path.name for path in source.iterdir() if path.suffix == ".safetensors")
        names = names or sorted(path.name for path in source.iterdir() if path.suffix in _TORCH)
    if not names:
        raise _unknown(source)
    state: dict[str, Any] = {}
    for name in names:
        found = _file(source / name)
        twice = next(iter(found.keys() & state.keys()), None)
        if twice is not None:
            hint = "They are no shards of one state: name one of the files."
            raise FormatError(
                "two files of the folder have the same key", path=str(source / name), key=twice, hint=hint
            )
        state.update(found)
    return state


def _unknown(source: Path) -> FormatError:
    hint = "Name a file of torch.save or safetensors, or a folder of Hugging Face, of torch.distributed.checkpoint, or of Orbax."
    if (source / "steps").is_dir():
        hint = "It is a run already: `datastore checkpoint fork` begins another one with a step of it, `replicate` copies it."
    return FormatError("not a checkpoint that is known here", path=str(source), hint=hint)


def _file(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError  # noqa: PLC0415 - only who has such files needs it
        from safetensors.torch import load_file  # noqa: PLC0415 - as above

        try:
            return dict(load_file(path))
        except SafetensorError as error:
            raise CorruptError(f"it cannot be read: {error}", path=str(path), hint="Restore it from a copy.") from None
    _check_saved_by_torch(path)
    state = torch.load(path, map_location="cpu", weights_only=True)
    if not isinstance(state, Mapping):
        hint = "Save a dict of tensors with torch.save."
        raise FormatError("the file holds no state_dict", path=str(path), type=type(state).__name__, hint=hint)
    found: dict[str, Any] = _plain_dicts(state)
    return found


def _check_saved_by_torch(path: Path) -> None:
    """Raise `FormatError` for what torch's unpickler fails on in any way it likes: other files, and programs."""
    with path.open("rb") as file:
        if file.read(1) not in (b"P", b"\x80", b""):  # A zip archive, a pickle, or nothing at all.
            raise _unknown(path)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                hint = "Save torch.jit.load(path).state_dict() with torch.save."
                raise FormatError("it is a program of TorchScript", path=str(path), hint=hint)


def _plain_dicts(value: Any) -> Any:
    """Return `value` with plain dicts in the place of ordered ones."""
    return {key: _plain_dicts(inner) for key, inner in value.items()} if isinstance(value, Mapping) else value


def _dcp_folder(source: Path) -> dict[str, Any]:
    state: dict[str, Any] = {}
    planner = _SafePlanner()  # type: ignore[no-untyped-call]
    _load_state_dict(state, storage_reader=_SafeReader(source), planner=planner, no_dist=True)
    return state


class _SafeReader(FileSystemReader):
    """DCP's reader, which opens its table of contents as any pickle: here only with the classes that it is made of."""

    @override
    def read_metadata(self, *_: Any) -> Metadata:
        found = _Contents(io.BytesIO((Path(self.path) / ".metadata").read_bytes())).load()
        if not isinstance(found, Metadata):
            raise pickle.UnpicklingError("the table of contents is something else")
        return found


class _Contents(pickle.Unpickler):
    @override
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _KNOWN:
            raise pickle.UnpicklingError(f"{module}.{name} does not belong there")
        return super().find_class(module, name)


_METADATA = "torch.distributed.checkpoint.metadata"

_KNOWN = {
    *(
        (_METADATA, name)
        for name in (
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        )
    ),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.distributed.checkpoint.filesystem", "_StoragePrefix"),
    ("torch.serialization", "_get_layout"),
    ("torch", "Size"),
    *(("torch", str(dtype).removeprefix("torch.")) for dtype in DTYPES.values()),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("collections", "OrderedDict"),
}


class _SafePlanner(_EmptyStateDictLoadPlanner):
    """Takes everything that is there; of what is no tensor only plain values, where DCP runs any pickle."""

    @override
    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        found = torch.load(value, weights_only=True)
        if self.flatten_state_dict:
            set_element(self.original_state_dict, self.mappings[read_item.dest_index.fqn], found)
        else:
            self.state_dict[read_item.dest_index.fqn] = found


def import_files(source: Path, run: Storage, *, step: int, item: str = "model") -> StepCommit:
    """Save what lies at `source` as `step` of `run`, and return its commit.

    A state of maps alone, such as `{"model": ..., "optim": ...}`, becomes an item for each; any other one the item `item`.

    Raises:
        MissingError, FormatError, CorruptError: as `read_files`.
        ConfigError: something in it cannot be stored; the message has its path.
        ConflictError: the run has other steps: continue from its newest, or name another one.
    """
    state = read_files(source)
    items = state if state and all(isinstance(value, dict) for value in state.values()) else {item: state}
    with Checkpointer(run, keep=Keep(last=2**31)) as checkpointer:
        return checkpointer.save(step, items, blocking=True).committed()


def read_items(storage: Storage, step: int) -> dict[str, Any]:
    """Return the state of `step` as plain trees with whole tensors, verified, by item; what each rank has of its own is left out.

    Takes the memory of the state.

    Raises:
        MissingError: there is no such step.
        CorruptError: it is damaged.
    """
    whole = StepLog(storage).read_whole(step)
    items = {name: skeleton for name, skeleton in whole.commit.items.items() if "@" not in name}
    tensors = {
        name: torch.empty(spec.shape, dtype=DTYPES[spec.dtype])
        for item, skeleton in items.items()
        for name, spec in specs(skeleton, name=item)
    }
    reader = Reader(storage, transfers_of(tensors, whole.parts), threads=_THREADS)
    reader.deliver()
    return {item: unpack(skeleton, name=item, tensors=tensors) for item, skeleton in items.items()}


def write_files(state: Mapping[str, Any], to: Path, *, format: FileFormat) -> None:  # noqa: A002 - what it is
    """Write `state` to the file, or for `dcp` the folder, `to`, which must not exist.

    Raises:
        ConfigError: `to` exists; or `safetensors`, which holds tensors alone, is to hold something else.
    """
    if to.exists():
        raise ConfigError("it exists already", path=str(to), hint="Name another place, or remove it.")
    to.parent.mkdir(parents=True, exist_ok=True)
    draft = to.with_name(f"{to.name}.unfinished")
    if format == "dcp":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # That there is one process is meant.
            save(dict(state), checkpoint_id=draft, no_dist=True)
    elif format == "torch":
        torch.save(dict(state), draft)
    else:
        from safetensors.torch import save_file  # noqa: PLC0415 - as above

        save_file(_tensors_alone(state), draft, metadata={"format": "pt"})
    draft.rename(to)


def _tensors_alone(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for name, value in _leaves(state, ""):
        if not isinstance(value, torch.Tensor):
            hint = "Name an item that has nothing else, such as `model`, or write another format."
            raise ConfigError("safetensors holds tensors alone", path=name, type=type(value).__name__, hint=hint)
        found[name] = value.contiguous()
    return found


def _leaves(value: Any, name: str) -> Any:
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _leaves(inner, f"{name}.{index}")
    else:
        yield name, value


def _foreign(error: BaseException) -> str:
    """Return the class that is not taken, if the error of torch tells it."""
    found = re.search(r"GLOBAL (\S+) was not", str(error))
    return found[1] if found else _first_line(error)


def _first_line(error: BaseException) -> str:
    lines = (str(error) or type(error).__name__).splitlines()
    return lines[0] if not isinstance(error, CheckpointException) else lines[-1]

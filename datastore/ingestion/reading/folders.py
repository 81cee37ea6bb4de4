"""Folders that another library wrote: an index says which files there hold rows, and in which order.

An index is known by what it says, not by its name alone: many a folder of source code has an `index.json`. Megatron's pairs have no
common index; each `.idx` is one.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import orjson

from datastore.dataset.journal import SourceFormat
from datastore.interop.formats import FORMATS
from datastore.storage.base import Stat, Storage
from datastore.storage.resolve import open_storage
from datastore.storage.urls import join_url

__all__ = ["ForeignFolder", "foreign_folders", "is_megatron_index"]

_INDEX_BYTES = 2**28
"""What is longer is no index, but a file of data that happens to be called so."""

_MEGATRON = b"MMIDIDX\0\0"


class ForeignFolder(NamedTuple):
    """A folder that another library wrote."""

    below: str
    """Its path below the source, with a slash at the end; "" for the source itself."""

    format: SourceFormat
    files: tuple[str, ...]
    """The keys of its files in the source, in their order."""

    @property
    def indices(self) -> tuple[str, ...]:
        """The keys that say something of these files."""
        return tuple(f"{self.below}{name}" for name in ("index.json", "state.json", "dataset_info.json"))


def foreign_folders(url: str, stats: Sequence[Stat]) -> Iterator[ForeignFolder]:
    """Yield such folders in the source at `url`, whose files are `stats`.

    Raises:
        ConfigError: one cannot be read as it is: it has several datasets, or is a selection of another.
        CorruptError: an index is damaged.
    """
    storage = open_storage(url)
    for stat in stats:
        below, _, name = stat.key.rpartition("/")
        if name not in {"index.json", "state.json", "dataset_dict.json"} or stat.size_bytes > _INDEX_BYTES:
            continue
        kind = _kind_of_index(name, storage.get(stat.key))
        if kind is None:
            continue
        folder = f"{below}/" if below else ""
        keys = FORMATS[kind].files(open_storage(join_url(url, below)) if below else storage)
        yield ForeignFolder(folder, kind, tuple(f"{folder}{key}" for key in keys))


def is_megatron_index(storage: Storage, key: str) -> bool:
    """Return whether the file `key` is the index of one of Megatron's pairs."""
    return storage.get_ranges(key, [(0, min(len(_MEGATRON), storage.stat(key).size_bytes))])[0] == _MEGATRON


def _kind_of_index(name: str, raw: bytes) -> SourceFormat | None:
    try:
        index = orjson.loads(raw)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(index, dict):
        return None
    if name == "index.json":
        if isinstance(index.get("shards"), list) and "version" in index:
            return "mds"
        return "litdata" if isinstance(index.get("chunks"), list) and "config" in index else None
    return "hf" if isinstance(index.get("_data_files" if name == "state.json" else "splits"), list) else None

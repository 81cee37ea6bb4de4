"""What every foreign format has: a way to write rows, a way to read them, or both."""

import posixpath
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import orjson
import pyarrow as pa

from datastore.errors import ConfigError, CorruptError, MissingError
from datastore.interop.folders import Folder
from datastore.storage.base import Storage, check_key

__all__ = ["Exporter", "Format", "Rows", "Span", "below", "numbered", "read_json", "whole_files"]

Span = tuple[int, int]
"""A byte range of a file: what begins in it belongs to it."""

Rows = tuple[int, pa.Table]
"""Rows, and which row of its file the first of them is."""


class Exporter(Protocol):
    """Writes rows into a folder, several files of about `shard_bytes`."""

    def __init__(self, folder: Folder, schema: pa.Schema, *, shard_bytes: int) -> None: ...

    def write(self, rows: pa.Table) -> None:
        """Add rows.

        Raises:
            ConfigError: the format cannot hold one of them.
        """
        ...

    def close(self) -> None:
        """Write what is left, and at last that without which the folder is not complete."""
        ...


@dataclass(frozen=True, slots=True)
class Format:
    """How one format is read. All functions take the storage of the source's folder, and keys in it."""

    files: Callable[[Storage], list[str]]
    """The files that hold rows, in their order. Raises ConfigError where there are none."""

    schema: Callable[[Storage, str], pa.Schema]
    """The columns of a file. It reads no more than it must."""

    read: Callable[[Storage, str, Span], Iterator[Rows]]
    """The rows that begin in a byte range of a file, in order, some megabytes at a time.

    Raises CorruptError for a damaged file, and ConfigError for what is not supported or not safe to read.
    """

    can_be_cut: bool = False
    """Whether a file can be read in several ranges."""


def numbered(tables: Iterable[pa.Table]) -> Iterator[Rows]:
    """Yield `tables`, which are a file from its first row on, with the number of each one's first row."""
    first = 0
    for table in tables:
        yield first, table
        first += table.num_rows


def whole_files(*suffixes: str) -> Callable[[Storage], list[str]]:
    """Return a `Format.files` for a folder of files with one of these suffixes, sorted by name."""

    def files(storage: Storage) -> list[str]:
        keys = [stat.key for stat in storage.list() if stat.key.endswith(suffixes) and "/." not in f"/{stat.key}"]
        if not keys:
            raise ConfigError(
                f"there is no {' or '.join(suffixes)} file", source=storage.url, hint="Name their folder."
            )
        return keys

    return files


def read_json(storage: Storage, key: str, *, what: str) -> dict[str, Any]:
    """Return the JSON object in the file `key`, without which the folder is not `what`.

    Raises:
        ConfigError: there is no such file.
        CorruptError: it holds something else.
    """
    try:
        found = orjson.loads(storage.get(key))
    except MissingError:
        raise ConfigError(
            f"the source is no {what} folder: it has no {key}", source=storage.url, hint="Name the folder that has it."
        ) from None
    except orjson.JSONDecodeError as error:
        raise CorruptError(f"not JSON: {error}", where=key, hint="Restore this file from a copy.") from None
    if not isinstance(found, dict):
        raise CorruptError("not a JSON object", where=key, hint="Restore this file from a copy.")
    return found


def below(index: str, name: object) -> str:
    """Return the key of the file that the document `index` names, relative to its folder.

    Raises:
        CorruptError: it is no plain relative path; a source may not lead out of its folder.
    """
    if not isinstance(name, str) or not name:
        raise CorruptError("a file has no name", where=index, hint="Restore this file from a copy.")
    try:
        return check_key(posixpath.join(posixpath.dirname(index), name))
    except ConfigError:
        raise CorruptError(
            "a file outside of its folder is named", where=index, file=name, hint="Do not trust this source."
        ) from None

"""A folder of files as a source of rows: Parquet, or a dataset that Hugging Face `datasets` saved.

Each file is a shard, and each row group or record batch a batch of it. Columns come in the order of the first file and as the widest
of the types that the files have; dictionaries are their values.
"""

import os
import threading
import warnings
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from datastore.digest import digest_bytes
from datastore.errors import ConfigError, CorruptError
from datastore.formats.common import common_schema
from datastore.formats.fitting import check_rows
from datastore.formats.huggingface import keep_features
from datastore.formats.schema import check_names, decode_schema, encode_schema, no_rows, without_views
from datastore.interop.columnar import HF, PARQUET
from datastore.loader.rows.files.index import FileEntry, FileIndex, IndexCost, Kept, changes, made_index, name_of_index
from datastore.loader.rows.files.parquet import Footer, read_footer, read_group, rows_of_nothing
from datastore.loader.rows.files.streams import read_contents, read_schema, read_stream_batch
from datastore.storage.base import Stat, Storage, StorageLike
from datastore.storage.resolve import open_storage
from datastore.threads import in_parallel
from datastore.units import format_bytes

__all__ = ["FileRows", "open_files"]

_FOOTERS = 256
"""Files whose footer is kept in memory, by each process."""

_LARGE_BYTES = 256 * 2**20
"""A batch that takes more memory is worth a warning."""

_READERS = 2


@dataclass(frozen=True, slots=True)
class FileShards:
    """All files, in order, as columns."""

    documents: npt.NDArray[np.int64]
    size_bytes: npt.NDArray[np.int64]
    uid64: npt.NDArray[np.uint64]


class FileRows:
    """The rows of files that others wrote, as they were when they were indexed. `RowLoader` takes it as it takes a dataset."""

    kind = "records"
    version = 1
    deletions = ()

    def __init__(self, storage: Storage, index: FileIndex, *, cost: IndexCost, kept: Kept | None) -> None:
        self.storage = storage
        self.index = index
        self.indexed = cost
        """How many files had to be looked into, and how long that took."""
        self._kept = kept
        self._lock = threading.Lock()
        self._footers: OrderedDict[int, Footer] = OrderedDict()
        self._stored = [decode_schema(raw, where=index.url) for raw in index.schemas]
        self.schema = _common(self._stored, index)
        """The columns of every row."""

    def __repr__(self) -> str:
        return f"FileRows({self.url!r}, files={len(self.index.files)})"

    def __reduce__(self) -> tuple[Any, ...]:
        """Pickle the place and the index: another process opens the files with credentials of its own."""
        return _again, (self.url, self.index)

    @property
    def url(self) -> str:
        """Where the folder is, without credentials."""
        return self.storage.url

    @cached_property
    def uuid(self) -> str:
        """Names the rows, by the names, sizes and footers of the files."""
        return name_of_index(self.index)

    @cached_property
    def segments(self) -> FileShards:
        """All files, in order, as columns."""
        files = self.index.files
        names = (int.from_bytes(digest_bytes(file.path.encode())[:8], "big") for file in files)
        return FileShards(
            np.array([sum(file.rows) for file in files], np.int64),
            np.array([sum(file.memory_bytes) for file in files], np.int64),
            np.fromiter(names, np.uint64, len(files)),
        )

    @cached_property
    def batch_bytes(self) -> int:
        """About what a row group or record batch takes in memory; the mean over all rows."""
        pairs = [pair for file in self.index.files for pair in zip(file.rows, file.memory_bytes, strict=True)]
        rows = sum(count for count, _ in pairs)
        return max(1, sum(count * size for count, size in pairs) // max(1, rows))

    def live_rows(self, index: int) -> None:
        """Return None: no row of file `index` is deleted."""
        del index

    def batch_rows(self, shard: int) -> Sequence[int]:
        """Return how many rows each row group or record batch of file `shard` has."""
        return self.index.files[shard].rows

    def read_batch(self, shard: int, batch: int, *, columns: Sequence[str] | None = None) -> pa.RecordBatch:
        """Return row group or record batch `batch` of file `shard`; with `columns` only those.

        Raises:
            CorruptError: the file is another than when it was indexed; or it is damaged, as far as that can be seen.
            ConfigError: a value does not fit the type that the column has in other files.
            MissingError, StorageError: it cannot be read.
        """
        file = self.index.files[shard]
        wanted = self.schema if columns is None else pa.schema([self.schema.field(name) for name in columns])
        if not wanted.names:
            return rows_of_nothing(file.rows[batch])
        if self.storage.local_path(file.path) is not None:
            _require_unchanged(file, self.storage.stat(file.path))
        if file.starts:
            span, schema = (file.starts[batch], file.stops[batch]), self._stored[file.schema]
            found = read_stream_batch(self.storage, file.path, span, schema=schema, columns=columns)
        else:
            footer = self._footer(shard)
            found = read_group(self.storage, file.path, batch, footer=footer, columns=columns)
        if found.schema.equals(wanted):
            return pa.RecordBatch.from_arrays(
                found.columns, schema=wanted
            )  # What is said of columns is that of all files.
        try:
            fitted = check_rows(pa.Table.from_batches([found]), wanted).combine_chunks().to_batches()
        except ConfigError as error:
            values: dict[str, Any] = {"file": file.path} | error.values
            raise ConfigError(f"a file does not fit the others: {error.fact}", hint=error.hint, **values) from None
        return fitted[0] if fitted else no_rows(wanted)

    def record_shard(self, index: int) -> pa.Table:
        """Return all rows of file `index`."""
        batches = [self.read_batch(index, batch) for batch in range(len(self.batch_rows(index)))]
        return pa.Table.from_batches(batches, schema=self.schema)

    def iter_batches(self, *, columns: Sequence[str] | None = None, deleted: bool = False) -> Iterator[pa.RecordBatch]:
        """Yield the rows of all files in order, a few batches in memory at a time; with `columns` only those. None is `deleted`."""
        del deleted  # There are none.
        places = ((shard, batch) for shard, file in enumerate(self.index.files) for batch in range(len(file.rows)))
        return in_parallel(lambda place: self.read_batch(*place, columns=columns), places, threads=_READERS)

    def changed_since(self, uuid: str) -> list[str]:
        """Return what has changed since the folder was `uuid`, file by file; nothing if that is not known here."""
        before = self._kept.named(uuid) if self._kept is not None and uuid != self.uuid else None
        return changes(before, self.index) if before is not None else []

    def _footer(self, shard: int) -> Footer:
        with self._lock:
            footer = self._footers.get(shard)
            if footer is not None:
                self._footers.move_to_end(shard)
                return footer
        file = self.index.files[shard]
        stat = self.storage.stat(file.path)
        footer = read_footer(self.storage, file.path, size_bytes=stat.size_bytes)
        if (stat.size_bytes, footer.digest) != (file.size_bytes, file.digest):
            raise _changed(file)
        with self._lock:
            self._footers[shard] = footer
            if len(self._footers) > _FOOTERS:
                self._footers.popitem(last=False)
        return footer


def open_files(url: StorageLike, *, index: str | os.PathLike[str] | None = None) -> FileRows:
    """Return the rows of all Parquet files below `url`, or of the dataset that `datasets.Dataset.save_to_disk` wrote there.

    The files are looked into once: a footer each, or the header of each record batch. What is found is kept below the folder
    `index` (by default `~/.cache/datastore/files`), and read anew of files whose size or time has changed.

    Raises:
        ConfigError: there is no such file, or several datasets; the files have different columns.
        CorruptError: one of them is no Parquet file or Arrow stream.
        MissingError, StorageError: one cannot be read.
    """
    storage = url if isinstance(url, Storage) else open_storage(url)
    kept = Kept(storage.url, None if index is None else os.fspath(index))
    stats = {stat.key: stat for stat in storage.list()}
    saved = "state.json" in stats or "dataset_dict.json" in stats
    keys = (HF if saved else PARQUET).files(storage)
    note = digest_bytes(storage.get("state.json")).hex() if saved else ""
    before = kept.newest()
    found, cost = made_index(
        storage,
        [stats[key] if key in stats else storage.stat(key) for key in keys],
        kept=before,
        read=lambda stat: (_stream_entry if saved else _parquet_entry)(storage, stat),
        note=note,
    )
    rows = FileRows(storage, found, cost=cost, kept=kept)
    _warn_of_large_batches(found)
    _warn_of_folders_that_are_columns(rows)
    if before is None or (before.files, before.note) != (found.files, found.note):
        kept.keep(found)
    return rows


def _again(url: str, index: FileIndex) -> FileRows:
    return FileRows(open_storage(url), index, cost=IndexCost(0, 0.0), kept=None)


def _parquet_entry(storage: Storage, stat: Stat) -> tuple[FileEntry, bytes]:
    footer = read_footer(storage, stat.key, size_bytes=stat.size_bytes)
    groups = list(footer.groups())
    entry = FileEntry(
        path=stat.key,
        size_bytes=stat.size_bytes,
        modified=stat.modified,
        digest=footer.digest,
        rows=tuple(rows for rows, _ in groups),
        memory_bytes=tuple(size for _, size in groups),
    )
    return entry, encode_schema(_described(footer.schema, stat.key))


def _stream_entry(storage: Storage, stat: Stat) -> tuple[FileEntry, bytes]:
    contents = read_contents(storage, stat.key, size_bytes=stat.size_bytes)
    starts, stops, rows = zip(*contents.batches, strict=True) if contents.batches else ((), (), ())
    entry = FileEntry(
        path=stat.key,
        size_bytes=stat.size_bytes,
        modified=stat.modified,
        digest=contents.digest,
        rows=rows,
        memory_bytes=tuple(stop - start for start, stop in zip(starts, stops, strict=True)),
        starts=starts,
        stops=stops,
    )
    return entry, encode_schema(_described(read_schema(storage, stat.key, contents.schema), stat.key))


def _described(schema: pa.Schema, key: str) -> pa.Schema:
    """Return the schema of a file with what it says of its columns, and nothing of the file as a whole."""
    try:
        check_names(schema)
    except CorruptError as error:
        raise CorruptError(error.fact, where=key, hint=error.hint) from None
    return keep_features(schema)


def _common(stored: Sequence[pa.Schema], index: FileIndex) -> pa.Schema:
    """Return the schema that the rows of all files have in common.

    Raises:
        ConfigError: a file has other columns, or a column of another kind; the message names it.
    """
    schema = common_schema(_plain(without_views(each)) for each in stored)
    for number, each in enumerate(stored):
        try:
            check_rows(pa.Table.from_batches([no_rows(each)]), schema)
        except ConfigError as error:
            file = next(file.path for file in index.files if file.schema == number)
            values: dict[str, Any] = {"file": file} | error.values
            raise ConfigError(
                f"the files do not have the same columns: {error.fact}",
                hint="Write them alike, or put those that differ into a folder of their own.",
                **values,
            ) from None
    return schema


def _plain(schema: pa.Schema) -> pa.Schema:
    """Return `schema` with values instead of dictionaries: each row group has a dictionary of its own."""
    return pa.schema(
        [field.with_type(field.type.value_type) if pa.types.is_dictionary(field.type) else field for field in schema]
    )


def _require_unchanged(file: FileEntry, stat: Stat) -> None:
    if (stat.size_bytes, stat.modified) != (file.size_bytes, file.modified):
        raise _changed(file)


def _changed(file: FileEntry) -> CorruptError:
    return CorruptError(
        "a file has changed since it was indexed",
        file=file.path,
        indexed_bytes=file.size_bytes,
        hint="Put it back; or open the files again and start a new run.",
    )


def _warn_of_folders_that_are_columns(rows: FileRows) -> None:
    parts = {part.partition("=")[0] for file in rows.index.files for part in file.path.split("/")[:-1] if "=" in part}
    lost = sorted(parts - set(rows.schema.names))
    if lost:
        warnings.warn(
            f"the folders of {rows.url} are named by columns that are not in the files, and are not read: {', '.join(lost)}. "
            "Write them into the files if they are needed.",
            RuntimeWarning,
            stacklevel=3,
        )


def _warn_of_large_batches(index: FileIndex) -> None:
    size_bytes, path = max(((size, file.path) for file in index.files for size in file.memory_bytes), default=(0, ""))
    if size_bytes > _LARGE_BYTES:
        warnings.warn(
            f"a row group of {path} takes {format_bytes(size_bytes)} in memory, or more, and is read as a whole: a loader keeps "
            "several, and reads them again and again if memory_bytes does not hold them. Write the files with row groups of some "
            "megabytes, or ingest them (datastore.import_dataset).",
            RuntimeWarning,
            stacklevel=3,
        )

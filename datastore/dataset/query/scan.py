"""The files of a version as one `pyarrow.dataset.Dataset`: scanned by others, lazily, on any storage."""

from collections.abc import Iterable
from typing import Any, cast

import pyarrow as pa
import pyarrow.dataset
import pyarrow.fs

from datastore.dataset.query.readable import Part, Readable
from datastore.dataset.shards.info import ShardInfo
from datastore.errors import ConfigError
from datastore.formats.documents import DOCUMENTS_SCHEMA
from datastore.storage.as_fsspec import ReadOnlyFileSystem
from datastore.storage.base import Storage

__all__ = ["scan_files", "scan_shards"]


def scan_shards(dataset: Readable, part: Part, *, ignore_deletions: bool) -> pyarrow.dataset.Dataset:
    """Return what `Dataset.arrow_dataset` promises."""
    if part not in {"rows", "documents"}:
        raise ConfigError("no such part", part=part, hint="Ask for rows or documents.")
    if dataset.deletions and not ignore_deletions:
        raise ConfigError(
            "a scan of files would show deleted rows",
            url=dataset.url,
            deleted=dataset.deletions.documents,
            hint="Use to_batches() or sql(), compact the dataset first, or pass ignore_deletions=True.",
        )
    older = dataset.older_shards()
    if older:
        raise ConfigError(
            "a scan of files would show the columns of an older schema",
            url=dataset.url,
            shards=len(older),
            hint="Use to_batches() or sql(), or compact the dataset first.",
        )
    return scan_files(dataset, part, dataset.segments)


def scan_files(dataset: Readable, part: Part, shards: Iterable[ShardInfo]) -> pyarrow.dataset.Dataset:
    """Return the files of `shards` as one dataset, deleted rows included. No file is opened before it is scanned.

    Raises:
        ConfigError: records have no documents.
    """
    by_format: dict[str, list[str]] = {}
    if part == "documents":
        if dataset.kind == "records":
            raise ConfigError("records have no documents", url=dataset.url, hint="Ask for rows.")
        schema = DOCUMENTS_SCHEMA
        by_format["parquet"] = [shard.docs_path for shard in shards]
    else:
        # Tokens may be narrower in some shards; the scanner widens them.
        schema = dataset.schema if dataset.kind == "records" else dataset.token_schema
        for shard in shards:
            by_format.setdefault(shard.layout.format, []).append(shard.path)
    parts = [_scan(dataset.storage, keys, kind, schema) for kind, keys in by_format.items() if keys]
    if not parts:
        return pyarrow.dataset.dataset(pa.Table.from_batches([], schema))
    return parts[0] if len(parts) == 1 else pyarrow.dataset.dataset(cast("Any", parts))


def _scan(storage: Storage, keys: list[str], kind: str, schema: pa.Schema) -> pyarrow.dataset.Dataset:
    files: Any = pyarrow.dataset.IpcFileFormat() if kind == "arrow" else pyarrow.dataset.ParquetFileFormat()
    local = [storage.local_path(key) for key in keys]
    if all(local):
        # Not mapped: a file that is cut or cannot be read would end the process by SIGBUS.
        system: Any = pyarrow.fs.LocalFileSystem()
        return pyarrow.dataset.FileSystemDataset.from_paths(
            [str(path) for path in local], schema=schema, format=files, filesystem=system
        )
    handler: Any = pyarrow.fs.FSSpecHandler
    system = pyarrow.fs.PyFileSystem(handler(ReadOnlyFileSystem(storage)))
    return pyarrow.dataset.FileSystemDataset.from_paths(keys, schema=schema, format=files, filesystem=system)

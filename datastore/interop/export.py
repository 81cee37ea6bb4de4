"""`export`: a version of a dataset in the format of another library, shard by shard, without its deleted rows.

One shard of the dataset and one file of the export are in memory at a time. What there is appears at the end, as a
whole (`Folder` in `base.py` says how).
"""

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import pyarrow as pa

from datastore.dataset.snapshot import Dataset
from datastore.errors import ConfigError
from datastore.interop.base import Exporter, Folder
from datastore.interop.columnar import HfExporter, JsonLinesExporter, ParquetExporter
from datastore.interop.litdata import LitDataExporter
from datastore.interop.mds import MdsExporter
from datastore.interop.megatron import MegatronExporter
from datastore.interop.webdataset import WebDatasetExporter

__all__ = ["ExportFormat", "ExportReport", "export"]

ExportFormat = Literal["parquet", "hf", "mds", "litdata", "megatron", "webdataset", "jsonl"]

_EXPORTERS: dict[str, tuple[type[Exporter], int]] = {
    "parquet": (ParquetExporter, 256 * 2**20),
    "hf": (HfExporter, 256 * 2**20),
    "mds": (MdsExporter, 64 * 2**20),
    "litdata": (LitDataExporter, 64 * 2**20),
    "megatron": (MegatronExporter, 64 * 2**30),
    "webdataset": (WebDatasetExporter, 256 * 2**20),
    "jsonl": (JsonLinesExporter, 256 * 2**20),
}
"""Who writes a format, and about how large its files are if nobody says."""


@dataclass(frozen=True, slots=True)
class ExportReport:
    """What an export wrote."""

    to: str
    format: ExportFormat
    version: int
    """Of the dataset."""

    documents: int
    tokens: int
    files: int
    bytes: int
    seconds: float


def export(
    dataset: Dataset,
    to: str | os.PathLike[str],
    *,
    format: ExportFormat,  # noqa: A002 - what it is
    columns: Sequence[str] | None = None,
    shard_bytes: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> ExportReport:
    """Write the rows of `dataset` that are not deleted as `format` to the folder `to`, which must not exist, or hold this export.

    Of documents all columns are written, `tokens` holding the tokens; or those of `columns`. A file has about
    `shard_bytes`; 0 stands for what suits the format. `progress` gets the shards done and all shards.

    Raises:
        ConfigError: the target holds something else, or the format cannot hold what there is; nothing is left behind.
        MissingError, CorruptError: a file of the dataset is gone or damaged.
        StorageError: the target cannot be written.
    """
    to = os.fspath(to)
    started = time.monotonic()
    if format not in get_args(ExportFormat):
        raise ConfigError("no such format", format=format, hint=f"Name one of {', '.join(get_args(ExportFormat))}.")
    if shard_bytes < 0:
        raise ConfigError("a file cannot have that size", shard_bytes=shard_bytes, hint="Give 1 MiB or more.")
    kind, usual_bytes = _EXPORTERS[format]
    names = _names(dataset.row_schema, columns)
    shards = len(dataset.segments)
    documents = tokens = 0
    with Folder(to) as folder:
        schema = pa.schema([dataset.row_schema.field(name) for name in names])
        exporter = kind(folder, schema, shard_bytes=shard_bytes or usual_bytes)
        for index in range(shards):
            rows = dataset.rows(index)
            documents += rows.num_rows
            tokens += _tokens(rows) if dataset.kind == "tokens" else 0
            exporter.write(rows.select(names))
            if progress is not None:
                progress(index + 1, shards)
        exporter.close()
    return ExportReport(
        to=folder.url,
        format=format,
        version=dataset.version,
        documents=documents,
        tokens=tokens,
        files=folder.files,
        bytes=folder.bytes,
        seconds=time.monotonic() - started,
    )


def _names(schema: pa.Schema, columns: Sequence[str] | None) -> list[str]:
    unknown = sorted(set(columns or ()) - set(schema.names))
    if unknown:
        raise ConfigError("no such column", columns=unknown, hint=f"There are: {', '.join(schema.names)}.")
    return [name for name in schema.names if columns is None or name in columns]


def _tokens(rows: pa.Table) -> int:
    chunks: Any = rows.column("tokens").chunks
    return sum(len(chunk.flatten()) for chunk in chunks)

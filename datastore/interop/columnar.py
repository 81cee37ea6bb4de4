"""The formats that hold columns already: Parquet, Arrow, the Arrow folders of Hugging Face `datasets`; and JSON lines.

Rows pass through as Arrow, so every type survives (in JSON lines: as far as JSON has it; bytes become base64).

Source: https://huggingface.co/docs/datasets/about_arrow (a saved folder is Arrow streams beside `state.json`)
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from typing_extensions import override

from datastore.errors import ConfigError, CorruptError, MissingError
from datastore.formats.arrow import types_within
from datastore.formats.huggingface import check_hf_types, keep_features, with_features
from datastore.formats.schema import check_names, without_views
from datastore.interop.base import (
    Exporter,
    Folder,
    Format,
    Rows,
    Span,
    below,
    damaged,
    numbered,
    read_json,
    whole_files,
)
from datastore.interop.cells import json_rows
from datastore.storage.as_fsspec import ReadOnlyFileSystem
from datastore.storage.base import Storage

__all__ = ["ARROW", "HF", "PARQUET", "HfExporter", "JsonLinesExporter", "ParquetExporter"]

_STATE = "state.json"
_INFO = "dataset_info.json"
_BATCH_ROWS = 8192
_GROUP_BYTES = 16 * 2**20
_ARROW_MAGIC = b"ARROW1"


class _Tables(Exporter):
    """Collects rows until they are a file."""

    @override
    def __init__(self, folder: Folder, schema: pa.Schema, *, shard_bytes: int) -> None:
        self._folder = folder
        self._schema = with_features(schema)
        self._check(self._schema)
        self._shard_bytes = shard_bytes
        self._parts: list[pa.Table] = []
        self._bytes = 0
        self._files: list[str] = []

    @override
    def write(self, rows: pa.Table) -> None:
        step = max(1, rows.num_rows * self._shard_bytes // max(1, rows.nbytes))
        for start in range(0, rows.num_rows, step):
            part = rows.slice(start, step)
            if self._bytes and self._bytes + part.nbytes > self._shard_bytes:
                self._flush()
            self._parts.append(part)
            self._bytes += part.nbytes

    @override
    def close(self) -> None:
        if self._parts or not self._files:
            self._flush()
        self._folder.mark()

    def _flush(self) -> None:
        parts = [pa.Table.from_arrays(part.columns, schema=self._schema) for part in self._parts]
        table = pa.concat_tables(parts) if parts else pa.Table.from_batches([], schema=self._schema)
        self._files.append(self._store(len(self._files), table))
        self._parts, self._bytes = [], 0

    def _check(self, schema: pa.Schema) -> None:
        """Refuse, before anything is written, columns of types that the format does not have."""

    def _store(self, number: int, table: pa.Table) -> str:
        """Store `table` as file `number`, and return its name."""
        raise NotImplementedError


class ParquetExporter(_Tables):
    """Writes `part-00000.parquet` and so on, compressed with zstd."""

    @override
    def _check(self, schema: pa.Schema) -> None:
        for field in schema:
            try:
                _try_parquet(field)
            except (pa.ArrowException, OSError, ValueError) as error:
                raise ConfigError(
                    f"Parquet has no such type: {str(error).splitlines()[0]}",
                    column=field.name,
                    type=str(field.type),
                    hint="Leave out the column, or cast it to another type.",
                ) from None

    @override
    def _store(self, number: int, table: pa.Table) -> str:
        sink = pa.BufferOutputStream()
        rows = max(1, table.num_rows * _GROUP_BYTES // max(1, table.nbytes))
        pq.write_table(table, sink, compression="zstd", row_group_size=rows, write_page_checksum=True)
        name = f"part-{number:05}.parquet"
        self._folder.put(name, sink.getvalue())
        return name


class HfExporter(_Tables):
    """Writes what `datasets.load_from_disk` opens."""

    @override
    def _check(self, schema: pa.Schema) -> None:
        check_hf_types(schema)

    @override
    def _store(self, number: int, table: pa.Table) -> str:
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=1000)
        name = f"data-{number:05}.arrow"
        self._folder.put(name, sink.getvalue())
        return name

    @override
    def close(self) -> None:
        if self._parts or not self._files:
            self._flush()
        self._folder.put(_INFO, b"{}")
        state: dict[str, Any] = {
            "_data_files": [{"filename": name} for name in self._files],
            "_fingerprint": "datastore",
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": None,
        }
        self._folder.put(_STATE, orjson.dumps(state))


class JsonLinesExporter(_Tables):
    """Writes `part-00000.jsonl` and so on, one object per row."""

    @override
    def _store(self, number: int, table: pa.Table) -> str:
        name = f"part-{number:05}.jsonl"
        with self._folder.open(name) as file:
            for batch in table.to_batches(max_chunksize=_BATCH_ROWS):
                file.write(b"".join(row + b"\n" for row in json_rows(pa.Table.from_batches([batch]))))
        return name


def _try_parquet(field: "pa.Field[Any]") -> None:
    """Write and read a row without a value; raise what pyarrow raises."""
    if any(pa.types.is_fixed_size_list(kind) and not kind.list_size for kind in types_within(field.type)):
        raise ValueError("lists of no items cannot be read back")  # pyarrow 26.0.1 writes them without complaint.
    sink = pa.BufferOutputStream()
    column = pa.chunked_array([pa.nulls(1, field.type)])
    pq.write_table(pa.Table.from_arrays([column], schema=pa.schema([field.with_nullable(True)])), sink)
    pq.read_table(pa.BufferReader(sink.getvalue()))


def _open(storage: Storage, key: str) -> Any:
    return ReadOnlyFileSystem(storage).open(key)


def _parquet_schema(storage: Storage, key: str) -> pa.Schema:
    try:
        schema = keep_features(pq.read_schema(_open(storage, key)))
        check_names(schema)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(error, key, "Parquet") from None
    return without_views(schema)  # Parquet has none; a writer's own type of column is said beside it.


def _read_parquet(storage: Storage, key: str, span: Span) -> Iterator[Rows]:
    """Yield the row groups that begin in `span`."""
    first = 0
    try:
        with pq.ParquetFile(_open(storage, key), page_checksum_verification=True) as file:
            check_names(file.schema_arrow)
            for index in range(file.metadata.num_row_groups):
                group = file.metadata.row_group(index)
                if span[0] <= _start(group) < span[1]:
                    parts = file.iter_batches(_BATCH_ROWS, row_groups=[index], use_threads=False)
                    for start, table in numbered(pa.Table.from_batches([_valid(part)]) for part in parts):
                        yield first + start, table
                first += group.num_rows
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(error, key, "Parquet") from None


def _start(group: Any) -> int:
    if not group.num_columns:
        return 0
    first = group.column(0)
    return int(first.dictionary_page_offset or first.data_page_offset)


def _hf_files(storage: Storage) -> list[str]:
    keys = {stat.key for stat in storage.list()}
    if "dataset_dict.json" in keys:
        splits = read_json(storage, "dataset_dict.json", what="datasets").get("splits")
        raise ConfigError(
            "the source holds several datasets", source=storage.url, splits=splits, hint="Name the folder of one split."
        )
    state = read_json(storage, _STATE, what="saved datasets")
    files = state.get("_data_files")
    if not isinstance(files, list) or state.get("_indices_data_files"):
        raise ConfigError(
            "the saved dataset is a selection of another", source=storage.url, hint="Save it with flatten_indices()."
        )
    return [below(_STATE, each.get("filename") if isinstance(each, dict) else None) for each in files]


def _hf_schema(storage: Storage, key: str) -> pa.Schema:
    try:
        with _open(storage, key) as file, pa.ipc.open_stream(file) as reader:
            schema = keep_features(reader.schema, _hf_features(storage))
            check_names(schema)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(error, key, "an Arrow stream") from None
    return without_views(schema)


def _hf_features(storage: Storage) -> dict[str, Any]:
    """Return the features that a saved dataset states beside its files; they count for more than those in the files."""
    try:
        features = read_json(storage, _INFO, what="saved datasets").get("features")
    except (MissingError, ConfigError, CorruptError):
        return {}
    return features if isinstance(features, dict) else {}


def _read_hf(storage: Storage, key: str, _span: Span) -> Iterator[Rows]:
    try:
        with _open(storage, key) as file, pa.ipc.open_stream(file) as reader:
            yield from numbered(pa.Table.from_batches([_valid(batch)]) for batch in reader)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(error, key, "an Arrow stream") from None


@contextmanager
def _arrow_batches(storage: Storage, key: str) -> Iterator[tuple[pa.Schema, Iterator[pa.RecordBatch]]]:
    """Yield the schema and the batches of an Arrow file, which Feather is, or an Arrow stream: both are called `.arrow`."""
    head = storage.get_ranges(key, [(0, min(len(_ARROW_MAGIC), storage.stat(key).size_bytes))])[0]
    with _open(storage, key) as file:
        if head == _ARROW_MAGIC:
            with pa.ipc.open_file(file) as whole:
                yield whole.schema, (whole.get_batch(index) for index in range(whole.num_record_batches))
        else:
            with pa.ipc.open_stream(file) as stream:
                yield stream.schema, iter(stream)


def _arrow_schema(storage: Storage, key: str) -> pa.Schema:
    try:
        with _arrow_batches(storage, key) as (found, _):
            schema = keep_features(found)
            check_names(schema)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(error, key, "an Arrow file or stream") from None
    return without_views(schema)


def _read_arrow(storage: Storage, key: str, _span: Span) -> Iterator[Rows]:
    try:
        with _arrow_batches(storage, key) as (_, batches):
            yield from numbered(pa.Table.from_batches([_valid(batch)]) for batch in batches)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(error, key, "an Arrow file or stream") from None


def _valid(batch: pa.RecordBatch) -> pa.RecordBatch:
    batch.validate(full=True)
    check_names(batch.schema)
    return batch


PARQUET = Format(files=whole_files(".parquet"), schema=_parquet_schema, read=_read_parquet, can_be_cut=True)
HF = Format(files=_hf_files, schema=_hf_schema, read=_read_hf)
ARROW = Format(files=whole_files(".arrow", ".feather"), schema=_arrow_schema, read=_read_arrow)

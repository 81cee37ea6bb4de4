"""Sources that are no files, as files: rows from a program, and the standard input.

They are written to a folder for temporary use, for an ingest reads what it plans, in several processes. The file is called after the
digest of its bytes and has no time, so the same rows are the same source and are known at a second ingest.
"""

import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import IO, Any, TypeAlias

import orjson
import pyarrow as pa
import xxhash

from datastore.errors import ConfigError

__all__ = ["Sources", "spooled", "spooled_stream"]

Sources: TypeAlias = "str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Iterable[Mapping[str, Any]] | Any"
"""Names of sources, or rows; `Any` stands for the datasets of a library that need not be installed."""

_COPY_BYTES = 2**20

_BATCH_ROWS = 1000

_MEDIA_ROWS = 64
"""Rows at a time, where each may bring a file of some MB."""

_OPTIONS = (
    orjson.OPT_APPEND_NEWLINE
    | orjson.OPT_SERIALIZE_NUMPY
    | orjson.OPT_PASSTHROUGH_DATETIME
    | orjson.OPT_PASSTHROUGH_DATACLASS
)


@contextmanager
def spooled(sources: Sources) -> Iterator[Sequence[str]]:
    """Yield the names of `sources`; of rows, that of the file in which they are as long as the context lasts.

    Raises:
        ConfigError: there is a row that is no dict, or has a value that JSON has not.
    """
    if isinstance(sources, str | os.PathLike):
        yield [os.fspath(sources)]
        return
    if hasattr(sources, "with_format") and hasattr(sources, "features"):
        with _kept("rows", ".arrow", lambda file: _write_tables(sources, file)) as path:
            yield [path]
        return
    rows = iter(sources)
    first = next(rows, None)
    if first is None or isinstance(first, str | os.PathLike):
        yield [os.fspath(name) for name in chain([] if first is None else [first], rows)]
        return
    with _kept("rows", ".jsonl", lambda file: _write_rows(chain([first], rows), file)) as path:
        yield [path]


@contextmanager
def spooled_stream(stream: IO[bytes]) -> Iterator[str]:
    """Yield the name of a file with all bytes of `stream`."""

    def copy(file: IO[bytes]) -> None:
        while chunk := stream.read(_COPY_BYTES):
            file.write(chunk)

    with _kept("stdin", "", copy) as path:
        yield path


@contextmanager
def _kept(name: str, suffix: str, write: Any) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="datastore-") as folder:
        draft = Path(folder, "draft")
        with draft.open("wb") as file:
            write(file)
        digest = xxhash.xxh3_128()
        with draft.open("rb") as file:
            while chunk := file.read(_COPY_BYTES):
                digest.update(chunk)
        path = draft.rename(Path(folder, f"{name}-{digest.hexdigest()[:16]}{suffix}"))
        os.utime(path, (0, 0))
        yield str(path)


def _write_tables(dataset: Any, sink: Any) -> None:
    """Write a dataset of Hugging Face with the types that it has, and what it says of its columns.

    Of images and sounds in files it has the paths alone: their bytes are put in.
    """
    features = dataset.features
    media = [] if features is None else [name for name in features if _is_media(features[name])]
    rows = _MEDIA_ROWS if media else _BATCH_ROWS
    tables: Iterator[pa.Table] = iter(dataset.with_format("arrow").iter(batch_size=rows))
    if media:
        tables = (_with_bytes(table, features, media) for table in tables)
    first = next(tables, None)
    if first is None and features is None:
        return
    schema = features.arrow_schema if features is not None else first.schema if first is not None else pa.schema([])
    with pa.ipc.new_stream(sink, schema) as out:
        for table in chain([] if first is None else [first], tables):
            try:
                out.write_table(table.cast(schema))
            except (pa.ArrowException, ValueError) as error:
                raise ConfigError(
                    f"the rows have not all the same columns: {str(error).splitlines()[0]}",
                    columns=schema.names,
                    hint="Say the types of the columns: `dataset.cast(features)`.",
                ) from None


def _is_media(feature: Any) -> bool:
    """Return whether a column of Hugging Face has values that may lie in files of their own."""
    if hasattr(feature, "embed_storage"):
        return True
    inner = getattr(feature, "feature", None)  # Of lists.
    parts = feature.values() if isinstance(feature, dict) else feature if isinstance(feature, list) else [inner]
    return any(part is not None and _is_media(part) for part in parts)


def _with_bytes(table: pa.Table, features: Any, names: Sequence[str]) -> pa.Table:
    """Return `table` with the bytes of its images and sounds.

    Raises:
        ConfigError: a file is gone.
    """
    from datasets.table import embed_array_storage  # noqa: PLC0415 - whoever has such a dataset has the library

    for name in names:
        index = table.schema.get_field_index(name)
        try:
            chunks = [embed_array_storage(chunk, features[name]) for chunk in table.column(index).chunks]
        except (OSError, pa.ArrowException) as error:
            raise ConfigError(
                f"a file of the dataset cannot be read: {error}",
                column=name,
                hint="Bring the files back, or drop the column.",
            ) from None
        column = pa.chunked_array(chunks, features.arrow_schema.field(index).type)
        table = table.set_column(index, features.arrow_schema.field(index), column)
    return table


def _write_rows(rows: Iterable[Any], file: IO[bytes]) -> None:
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise ConfigError(
                "a row is no dict", row=number, type=type(row).__name__, hint="Give dicts, or names of files."
            )
        try:
            file.write(orjson.dumps(row if type(row) is dict else dict(row), option=_OPTIONS))
        except TypeError as error:  # JSONEncodeError is one.
            raise _unfit(str(error), number) from None
        if not all(map(_is_finite, row.values())):
            raise _unfit("JSON has neither NaN nor infinity", number)


def _is_finite(value: Any) -> bool:
    """Return whether there is no float in `value` that JSON would make null."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, dict):
        return all(map(_is_finite, value.values()))
    return all(map(_is_finite, value)) if isinstance(value, list | tuple) else True


def _unfit(reason: str, number: int) -> ConfigError:
    return ConfigError(
        f"a row cannot be taken over as it is: {reason}",
        row=number,
        hint="Change the value; or write rows with other types by `ds.record_writer`, or as Parquet.",
    )

"""LitData: `index.json` and chunks of packed samples.

Written: tokens as for `TokensLoader`, one array per document (`no_header_numpy`), read there in blocks of any size;
records as for the default loader, a flat dictionary of leaves. Read: both, uncompressed or zstd per file; pickles are
refused, for reading them runs their code.

Source: https://github.com/Lightning-AI/litdata (`streaming/writer.py` describes a chunk, `serializers.py` the leaves)
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.types as kinds
from typing_extensions import override

from datastore.errors import ConfigError, CorruptError
from datastore.formats.schema import check_names
from datastore.interop.base import Exporter, Folder, Format, Rows, Span, below, read_json
from datastore.interop.cells import Cell, from_cells, is_binary, is_text, json_cells, number_of, to_cells
from datastore.interop.packed import MAX_FILE_BYTES, PackedFile, SampleShards, pack, pack_cells, unpack_cells
from datastore.storage.base import Storage

__all__ = ["LITDATA", "LitDataExporter"]

_INDEX = "index.json"
_NUMPY = ("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "float16", "float32", "float64")
"""The number that a leaf's format gives to each NumPy type is its place in here."""

_TORCH = {
    **dict.fromkeys((0, 1), "float32"),
    **dict.fromkeys((2, 3), "float64"),
    **dict.fromkeys((8, 9), "float16"),
    **dict.fromkeys((13, 14), "int16"),
    **dict.fromkeys((15, 16), "int32"),
    **dict.fromkeys((17, 18), "int64"),
    11: "uint8",
    12: "int8",
    20: "uint16",
}
_LEAVES: dict[str, pa.DataType] = {
    **dict.fromkeys(("str", "text", "json"), pa.string()),
    **dict.fromkeys(("bytes", "jpeg", "image", "video", "audio", "file", "pdf"), pa.binary()),
    "int": pa.int64(),
    "float": pa.float64(),
    "bool": pa.bool_(),
}
_FOOTER = b"LDARW01\0"
_LEAF_SPEC: dict[str, Any] = {"type": None, "context": None, "children_spec": []}


class LitDataExporter(SampleShards, Exporter):
    """Writes LitData: tokens alone if there is a column of them, for its loader of tokens knows no other columns."""

    @override
    def __init__(self, folder: Folder, schema: pa.Schema, *, shard_bytes: int) -> None:
        super().__init__(shard_bytes)
        self._folder = folder
        self._limit = shard_bytes
        self._chunks: list[dict[str, Any]] = []
        number = number_of(schema.field("tokens").type) if "tokens" in schema.names else None
        self._token_bytes = number.itemsize if number is not None else 0
        self._names = ["tokens"] if self._token_bytes else schema.names
        self._leaves = [_leaf(schema.field(name).type) for name in self._names]

    @override
    def write(self, rows: pa.Table) -> None:
        columns = [
            json_cells(rows.column(name), name=name)
            if leaf == "json"
            else to_cells(_plain(rows.column(name)), name=name, where="LitData")
            for name, leaf in zip(self._names, self._leaves, strict=True)
        ]
        self.add(columns[0] if self._token_bytes else pack_cells(columns, [False] * len(columns)))

    @override
    def close(self) -> None:
        self.flush()
        spec: dict[str, Any] = _LEAF_SPEC
        if not self._token_bytes:
            context = orjson.dumps(self._names).decode()
            spec = {"type": "builtins.dict", "context": context, "children_spec": [_LEAF_SPEC] * len(self._names)}
        config = {
            "chunk_bytes": self._limit,
            "chunk_size": None,
            "compression": None,
            "data_format": self._leaves,
            "data_spec": orjson.dumps([1, spec]).decode(),
            "encryption": None,
            "item_loader": "TokensLoader" if self._token_bytes else "PyTreeLoader",
        }
        index = {"chunks": self._chunks, "config": config}
        self._folder.put(_INDEX, orjson.dumps(index, option=orjson.OPT_SORT_KEYS))

    @override
    def _store(self, number: int, samples: Sequence[Cell]) -> None:
        chunks = pack(samples)
        name = f"chunk-0-{number}.bin"
        self._folder.put(name, *chunks)
        tokens = sum(map(len, samples)) // self._token_bytes if self._token_bytes else None
        size = sum(memoryview(chunk).nbytes for chunk in chunks)
        self._chunks.append({"chunk_bytes": size, "chunk_size": len(samples), "dim": tokens, "filename": name})


def _leaf(kind: pa.DataType) -> str:
    number = number_of(kind)
    if kinds.is_uint64(kind):
        return "json"  # Its whole numbers are int64.
    if kinds.is_integer(kind) or kinds.is_floating(kind):
        return "int" if kinds.is_integer(kind) else "float"
    if number is not None:
        return f"no_header_numpy:{_NUMPY.index(number.name)}"
    if kinds.is_boolean(kind):
        return "bool"
    return "str" if is_text(kind) else "bytes" if is_binary(kind) else "json"


def _plain(column: "pa.ChunkedArray[Any]") -> "pa.ChunkedArray[Any]":
    """Return whole numbers as int64 and others as float64: LitData knows no other scalars."""
    if kinds.is_integer(column.type):
        return column.cast(pa.int64())
    return column.cast(pa.float64()) if kinds.is_floating(column.type) else column


def _index(storage: Storage) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    index = read_json(storage, _INDEX, what="LitData")
    chunks, config = index.get("chunks"), index.get("config")
    if not isinstance(chunks, list) or not isinstance(config, dict) or not all(isinstance(c, dict) for c in chunks):
        raise CorruptError("not a LitData index", where=_INDEX, hint="Restore this file from a copy.")
    if config.get("encryption") or config.get("compression_level"):
        raise ConfigError(
            "encrypted chunks, and chunks that are compressed in parts, cannot be read",
            source=storage.url,
            hint="Write the source again with compression_level='chunk' or without.",
        )
    return chunks, config


def _files(storage: Storage) -> list[str]:
    return [below(_INDEX, chunk.get("filename")) for chunk in _index(storage)[0]]


def _schema(storage: Storage, key: str) -> pa.Schema:
    packed, config = _open(storage, key)
    rows = _footer(packed)
    return rows.schema if rows is not None else _columns(config)


def _columns(config: dict[str, Any]) -> pa.Schema:
    leaves = config.get("data_format")
    try:
        _, spec = orjson.loads(config["data_spec"])
        names = list(_names(spec, ""))
    except (KeyError, TypeError, ValueError):
        raise CorruptError("not a LitData index: its data_spec", where=_INDEX) from None
    if not isinstance(leaves, list) or len(leaves) != len(names) or len(set(names)) != len(names):
        raise CorruptError("not a LitData index: its leaves are not those of its data_spec", where=_INDEX)
    return pa.schema([(name or "tokens", _type(name, str(leaf))) for name, leaf in zip(names, leaves, strict=True)])


def _names(spec: dict[str, Any], prefix: str) -> Iterator[str]:
    """Yield the name of each leaf: keys and places on the way to it, joined by dots; empty if it is the sample."""
    if spec["type"] is None:
        yield prefix
        return
    children = spec["children_spec"]
    keys = orjson.loads(spec["context"]) if spec["context"] else None
    for place, child in enumerate(children):
        key = str(keys[place] if isinstance(keys, list) else place)
        yield from _names(child, f"{prefix}.{key}" if prefix else key)


def _type(name: str, leaf: str) -> pa.DataType:
    base, _, rest = leaf.partition(":")
    if base in {"no_header_numpy", "no_header_tensor"} and rest.isdecimal():
        table = dict(enumerate(_NUMPY)) if base == "no_header_numpy" else _TORCH
        if int(rest) in table:
            return pa.list_(pa.from_numpy_dtype(np.dtype(table[int(rest)])))
    if base in {"pickle", "graph"}:
        raise ConfigError(
            "a column of pickles is not read: that would run the code in them",
            column=name,
            hint="Write the source again with values of plain types.",
        )
    if base not in _LEAVES:
        raise ConfigError(
            "this kind of value cannot be imported",
            column=name,
            kind=leaf,
            hint="Numbers, text, bytes, images and one-dimensional arrays can; write the source again.",
        )
    return _LEAVES[base]


def _open(storage: Storage, key: str) -> tuple[PackedFile, dict[str, Any]]:
    """Return a chunk, and the configuration of all of them."""
    chunks, config = _index(storage)
    chunk = next((each for each in chunks if each.get("filename") == key), {})
    codec = str(config.get("compression") or "").partition(":")[0]
    size = chunk.get("chunk_bytes")
    packed = PackedFile(storage, key, codec=codec, raw_bytes=size if isinstance(size, int) else MAX_FILE_BYTES)
    if packed.samples != chunk.get("chunk_size"):
        raise packed.damaged("it has another number of samples than its index says")
    return packed, config


def _footer(packed: PackedFile) -> pa.Table | None:
    r"""Return the rows as the Arrow file that may follow the samples; these are then empty in newer versions.

    An Arrow file | uint32 its size | "LDARW01\0"
    """
    end = packed.size_bytes - len(_FOOTER) - 4
    if end < packed.offsets[-1] or packed.read(end + 4, packed.size_bytes) != _FOOTER:
        return None
    start = end - int.from_bytes(packed.read(end, end + 4), "little")
    if start < packed.offsets[-1]:
        raise packed.damaged("its rows lie outside")
    try:
        with pa.ipc.open_file(pa.py_buffer(packed.read(start, end))) as reader:
            rows = reader.read_all()
            rows.validate(full=True)
            check_names(rows.schema)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise packed.damaged(str(error)) from None
    if rows.num_rows != packed.samples:
        raise packed.damaged("it has another number of rows than samples")
    return rows.replace_schema_metadata()


def _read(storage: Storage, key: str, _span: Span) -> Iterator[Rows]:
    packed, config = _open(storage, key)
    rows = _footer(packed)
    if rows is not None:
        yield 0, rows
        return
    schema = _columns(config)
    tokens_alone = config.get("item_loader") == "TokensLoader"
    for first, samples in packed.pieces():
        columns = [samples] if tokens_alone else unpack_cells(packed, samples, [None] * len(schema))
        arrays = [from_cells(cells, field.type, where=key) for cells, field in zip(columns, schema, strict=True)]
        yield first, pa.table(arrays, schema=schema)


LITDATA = Format(files=_files, schema=_schema, read=_read)

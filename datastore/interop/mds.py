"""MDS, the format of MosaicML Streaming: `index.json` and shards of packed samples, each shard with its own header.

Written: uncompressed, tokens as `ndarray:uint16` or `ndarray:uint32`, text as `str`, numbers as themselves, anything
nested as `json`. Read: these, with zstd, gz or bz2; a column of pickles is refused, for reading it runs its code.

Source: https://docs.mosaicml.com/projects/streaming/en/stable/preparing_datasets/dataset_format.html (version 2)
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.types as kinds
from typing_extensions import override

from datastore.errors import ConfigError, CorruptError
from datastore.interop.base import Exporter, Folder, Format, Rows, Span, below, read_json
from datastore.interop.cells import Cell, from_cells, is_binary, is_text, number_of, to_cells
from datastore.interop.packed import MAX_FILE_BYTES, PackedFile, SampleShards, pack, pack_cells, unpack_cells
from datastore.storage.base import Storage

__all__ = ["MDS", "MdsExporter"]

_INDEX = "index.json"
_LIST_OF_SHAPES = ("<u1", "<u2", "<u4", "<u8")
_SCALARS: dict[str, pa.DataType] = {
    **{f"{sign}int{bits}": getattr(pa, f"{sign}int{bits}")() for sign in ("", "u") for bits in (8, 16, 32, 64)},
    **{f"float{bits}": getattr(pa, f"float{bits}")() for bits in (16, 32, 64)},
    "int": pa.int64(),
}
_BYTES: dict[str, pa.DataType] = {
    **dict.fromkeys(("str", "json", "str_int", "str_float", "str_decimal"), pa.string()),
    **dict.fromkeys(("bytes", "jpeg", "png"), pa.binary()),
}


class MdsExporter(SampleShards, Exporter):
    """Writes MDS."""

    @override
    def __init__(self, folder: Folder, schema: pa.Schema, *, shard_bytes: int) -> None:
        super().__init__(shard_bytes)
        self._folder = folder
        self._names = sorted(schema.names)
        self._encodings = [_encoding(schema.field(name).type) for name in self._names]
        self._sizes = [_size(encoding) for encoding in self._encodings]
        self._limit = shard_bytes
        self._shards: list[dict[str, Any]] = []

    @override
    def write(self, rows: pa.Table) -> None:
        columns = []
        for name, encoding in zip(self._names, self._encodings, strict=True):
            cells = to_cells(rows.column(name), name=name, where="MDS")
            columns.append(_with_shapes(cells, encoding) if encoding.startswith("ndarray") else cells)
        self.add(pack_cells(columns, [size is not None for size in self._sizes]))

    @override
    def close(self) -> None:
        self.flush()
        self._folder.put(_INDEX, _json({"shards": self._shards, "version": 2}))

    @override
    def _store(self, number: int, samples: Sequence[Cell]) -> None:
        facts = {
            "column_encodings": self._encodings,
            "column_names": self._names,
            "column_sizes": self._sizes,
            "compression": None,
            "format": "mds",
            "hashes": [],
            "size_limit": self._limit,
            "version": 2,
        }
        chunks = pack(samples, header=_json(facts))
        name = f"shard.{number:05}.mds"
        self._folder.put(name, *chunks)
        size = sum(memoryview(chunk).nbytes for chunk in chunks)
        raw = {"basename": name, "bytes": size, "hashes": {}}
        self._shards.append({**facts, "raw_data": raw, "samples": len(samples), "zip_data": None})


def _json(value: object) -> bytes:
    return orjson.dumps(value, option=orjson.OPT_SORT_KEYS)


def _encoding(kind: pa.DataType) -> str:
    number = number_of(kind)
    if number is not None and not (kinds.is_integer(kind) or kinds.is_floating(kind)):
        return f"ndarray:{number.name}"
    if number is not None:
        return "int" if kinds.is_int64(kind) else number.name
    if kinds.is_boolean(kind):
        return "uint8"
    return "str" if is_text(kind) else "bytes" if is_binary(kind) else "json"


def _size(encoding: str) -> int | None:
    kind = _SCALARS.get(encoding)
    return kind.bit_width // 8 if kind is not None else None


def _with_shapes(cells: Sequence[Cell], encoding: str) -> list[bytes]:
    """Put before each array its number of dimensions, 1, and its length in the narrowest unsigned type."""
    itemsize = np.dtype(encoding.partition(":")[2]).itemsize
    made = []
    for cell in cells:
        length = len(cell) // itemsize
        code = (length > 0xFF) + (length > 0xFFFF) + (length > 0xFFFF_FFFF)
        made.append(bytes((1 << 2 | code,)) + np.array(length, _LIST_OF_SHAPES[code]).tobytes() + bytes(cell))
    return made


def _files(storage: Storage) -> list[str]:
    return [_name_of(shard) for shard in _shards(storage)]


def _shards(storage: Storage) -> list[dict[str, Any]]:
    index = read_json(storage, _INDEX, what="MDS")
    shards = index.get("shards")
    if index.get("version") != 2 or not isinstance(shards, list) or not all(isinstance(s, dict) for s in shards):
        raise CorruptError("not an MDS index of version 2", where=_INDEX, hint="Restore this file from a copy.")
    return shards


def _name_of(shard: dict[str, Any]) -> str:
    data = shard.get("zip_data") or shard.get("raw_data")
    return below(_INDEX, data.get("basename") if isinstance(data, dict) else None)


def _open(storage: Storage, key: str) -> tuple[PackedFile, dict[str, str], list[int | None]]:
    """Return a shard with the encodings and fixed sizes of its columns."""
    shard = next((each for each in _shards(storage) if _name_of(each) == key), {})
    codec = str(shard.get("compression") or "").partition(":")[0]
    raw = shard.get("raw_data") or {}
    size = raw.get("bytes") if isinstance(raw, dict) else None
    if codec and (not isinstance(size, int) or not 0 < size <= MAX_FILE_BYTES):
        raise CorruptError("a compressed file has no size", where=_INDEX, file=key)
    packed = PackedFile(storage, key, codec=codec, raw_bytes=size if isinstance(size, int) else MAX_FILE_BYTES)
    try:
        facts = orjson.loads(packed.header())
        encodings = dict(zip(facts["column_names"], facts["column_encodings"], strict=True))
        sizes = list(facts["column_sizes"])
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        raise packed.damaged("its header is no description of columns") from None
    if len(sizes) != len(encodings) or not all(size is None or (type(size) is int and size > 0) for size in sizes):
        raise packed.damaged("its header gives no sizes")
    if packed.samples != shard.get("samples"):
        raise packed.damaged("it has another number of samples than its index says")
    return packed, {str(name): str(encoding) for name, encoding in encodings.items()}, sizes


def _schema(storage: Storage, key: str) -> pa.Schema:
    _, encodings, _ = _open(storage, key)
    return pa.schema([(name, _type(name, encoding)) for name, encoding in encodings.items()])


def _type(name: str, encoding: str) -> pa.DataType:
    base, _, rest = encoding.partition(":")
    if base == "pkl":
        raise ConfigError(
            "a column of pickles is not read: that would run the code in them",
            column=name,
            hint="Write the source again with another encoding for it.",
        )
    if base == "ndarray" and rest.count(",") == 0:
        dtype = rest.partition(":")[0]
        if dtype in _SCALARS:
            return pa.list_(_SCALARS[dtype])
    found: pa.DataType | None = _SCALARS.get(encoding) or _BYTES.get(encoding)
    if found is None:
        raise ConfigError(
            "this encoding cannot be imported",
            column=name,
            encoding=encoding,
            hint="Numbers, text, bytes, json, jpeg, png and one-dimensional ndarray:TYPE can; write the source again.",
        )
    return found


def _read(storage: Storage, key: str, _span: Span) -> Iterator[Rows]:
    packed, encodings, sizes = _open(storage, key)
    schema = pa.schema([(name, _type(name, encoding)) for name, encoding in encodings.items()])
    for first, samples in packed.pieces():
        columns = unpack_cells(packed, samples, sizes)
        arrays = []
        for cells, encoding, field in zip(columns, encodings.values(), schema, strict=True):
            shaped = encoding.startswith("ndarray") and encoding.count(":") < 2
            values: Sequence[Cell] = [_without_shape(packed, cell) for cell in cells] if shaped else cells
            arrays.append(from_cells(values, field.type, where=key))
        yield first, pa.table(arrays, schema=schema)


def _without_shape(packed: PackedFile, cell: memoryview) -> memoryview:
    code = cell[0] if len(cell) else 0
    width = 1 << (code % 4)
    if code >> 2 != 1 or len(cell) < 1 + width:
        raise packed.damaged("an array has not one dimension")
    return cell[1 + width :]


MDS = Format(files=_files, schema=_schema, read=_read)

"""WebDataset: plain tar files; the members of one sample have one name, up to its first dot, and one suffix each.

Written: a column of text as `<column>.txt`, bytes as `<column>.bin` or with the suffix of their media type, tokens and
other lists of numbers as `<column>.npy`, and all other columns in one `json`. Read: these, and what others write: `txt`
is text, `cls` a number, `npy` a list of numbers, `json` the text of it, and everything else bytes. Nothing is ever
unpacked to disk, so the names in a tar lead nowhere.

Source: https://github.com/webdataset/webdataset (its README and `tariterators.py` define the grouping)
"""

import re
import tarfile
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from typing_extensions import override

from datastore.errors import ConfigError, CorruptError
from datastore.formats.arrow import array_of
from datastore.interop.base import Exporter, Folder, Format, Rows, Span, numbered, whole_files
from datastore.interop.cells import from_cells, is_binary, is_text, json_rows, number_of, to_cells
from datastore.storage.base import Storage

__all__ = ["WEBDATASET", "WebDatasetExporter"]

_BLOCK_BYTES = 512
_SAMPLED = 256
"""Samples at the beginning of a file that decide which columns there are."""

_BATCH_BYTES = 8 * 2**20
_MAX_MEMBER_BYTES = 2**30
_TEXT = {"txt", "text", "transcript", "json"}
_INTEGERS = {"cls", "cls2", "class", "count", "index", "inx", "id"}
_NPY = re.compile(
    rb"\{'descr': '([<>|](?:[iu][1248]|f[248]))', 'fortran_order': (?:False|True), 'shape': \((\d+),\), \}\s*"
)
_SUFFIXES = {"image/jpeg": "jpg", "image/png": "png", "image/webp": "webp", "audio/flac": "flac", "audio/wav": "wav"}


class WebDatasetExporter(Exporter):
    """Writes `shard-000000.tar` and so on."""

    @override
    def __init__(self, folder: Folder, schema: pa.Schema, *, shard_bytes: int) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._suffixes = {field.name: suffix for field in schema if (suffix := _suffix(field))}
        self._others = [name for name in schema.names if name not in self._suffixes]
        self._files = 0
        self._samples = 0
        self._parts: list[bytes] = []
        self._bytes = 0

    @override
    def write(self, rows: pa.Table) -> None:
        cells = {name: to_cells(rows.column(name), name=name, where="WebDataset") for name in self._suffixes}
        types = {name: rows.schema.field(name).type for name in self._suffixes}
        others = json_rows(rows.select(self._others)) if self._others else []
        for row in range(rows.num_rows):
            key = f"{self._samples:012}"
            for name, suffix in self._suffixes.items():
                data = bytes(cells[name][row])
                self._add(f"{key}.{suffix}", _npy(data, types[name]) if suffix.endswith("npy") else data)
            if others:
                self._add(f"{key}.json", others[row])
            self._samples += 1
            if self._bytes >= self._shard_bytes:
                self._flush()

    @override
    def close(self) -> None:
        self._flush()
        self._folder.mark()

    def _add(self, name: str, data: bytes) -> None:
        self._parts += (_head(name, len(data)), data, bytes(-len(data) % _BLOCK_BYTES))
        self._bytes += _BLOCK_BYTES + len(data)

    def _flush(self) -> None:
        if self._parts:
            with self._folder.open(f"shard-{self._files:06}.tar") as file:
                file.writelines(self._parts)
                file.write(bytes(2 * _BLOCK_BYTES))
            self._files += 1
            self._parts, self._bytes = [], 0


def _head(name: str, size_bytes: int) -> bytes:
    """Return the head of a member. tarfile takes 40 us for it, more than its sample takes otherwise (2026-11-25)."""
    raw = name.encode()
    if len(raw) > 100 or size_bytes >= 8**11:
        member = tarfile.TarInfo(name)
        member.size, member.mode = size_bytes, 0o444
        return member.tobuf(tarfile.PAX_FORMAT)
    owner = b"0000000\0" * 2
    facts = b"0000444\0" + owner + b"%011o\0" % size_bytes + b"00000000000\0"
    head = raw.ljust(100, b"\0") + facts + b" " * 8 + b"0" + bytes(100) + b"ustar\x0000" + bytes(247)
    return head[:148] + b"%06o\0 " % sum(head) + head[156:]


def _suffix(field: "pa.Field[Any]") -> str:
    """Return the suffix under which a column is a member of its own, or an empty one if it goes into the JSON."""
    # The short columns of our documents would be hundreds of bytes of tar each.
    if is_text(field.type):
        return "" if field.name in {"id", "source"} else f"{field.name}.txt"
    if is_binary(field.type):
        media = ((field.metadata or {}).get(b"media_type") or b"").decode()
        return "" if field.name == "digest" else f"{field.name}.{_SUFFIXES.get(media, 'bin')}"
    is_list = number_of(field.type) is not None and field.type.num_fields
    return f"{field.name}.npy" if is_list else ""


def _npy(data: bytes, kind: Any) -> bytes:
    number = number_of(kind.value_type)
    assert number is not None, "only lists of numbers come here"
    count = len(data) // number.itemsize
    facts = b"{'descr': '%s', 'fortran_order': False, 'shape': (%d,), }" % (
        number.newbyteorder("<").str.encode(),
        count,
    )
    facts = facts.ljust(-(-(len(facts) + 11) // 64) * 64 - 11) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(facts).to_bytes(2, "little") + facts + data


_PACKED = {".tar.gz": "gz", ".tgz": "gz", ".tar.bz2": "bz2", ".tar.xz": "xz"}
"""Compressed tars, by what their names end in, and how `tarfile` calls that."""


class _Sample(NamedTuple):
    """The members of one sample by suffix."""

    key: str
    members: dict[str, bytes]


def _mode(key: str) -> Any:
    return next((f"r|{codec}" for ending, codec in _PACKED.items() if key.endswith(ending)), "r|")


def _samples(storage: Storage, key: str) -> Iterator[_Sample]:
    """Yield the samples of a tar, one after the other."""
    stream: Any = _Chunks(storage, key)
    current = _Sample("", {})
    try:
        with tarfile.open(fileobj=stream, mode=_mode(key)) as tar:
            for member in tar:
                prefix, dot, suffix = member.name.rpartition("/")[2].partition(".")
                if not member.isfile() or not prefix or not dot or member.name.startswith("__"):
                    continue
                name, suffix = member.name[: len(member.name) - len(suffix) - 1], suffix.lower()
                if name != current.key or suffix in current.members:
                    if current.members:
                        yield current
                    current = _Sample(name, {})
                current.members[suffix] = _content(tar, member, key)
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        if isinstance(error, ConfigError | CorruptError):
            raise
        raise CorruptError(f"not a tar file: {error}", where=key, hint="Restore this file from a copy.") from None
    if current.members:
        yield current


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo, key: str) -> bytes:
    if member.size > _MAX_MEMBER_BYTES:
        raise ConfigError(
            "a member is too large", file=key, member=member.name, bytes=member.size, hint="Leave it out."
        )
    file = tar.extractfile(member)
    data = file.read() if file is not None else b""
    if len(data) != member.size:
        raise CorruptError("a tar file ends within a member", where=key, member=member.name)
    return data


class _Chunks:
    """What tarfile needs of a file to read it as a stream."""

    def __init__(self, storage: Storage, key: str) -> None:
        self._storage = storage
        self._key = key
        self._size = storage.stat(key).size_bytes
        self._at = 0
        self._ahead = b""

    def read(self, size: int) -> bytes:
        """Return the next `size` bytes, fewer at the end."""
        while len(self._ahead) < size and self._at < self._size:
            stop = min(self._size, self._at + max(size, 4 * 2**20))
            self._ahead += self._storage.get_ranges(self._key, [(self._at, stop)])[0]
            self._at = stop
        data, self._ahead = self._ahead[:size], self._ahead[size:]
        return data


def _schema(storage: Storage, key: str) -> pa.Schema:
    suffixes: dict[str, bytes] = {}
    for number, sample in enumerate(_samples(storage, key)):
        for suffix, data in sample.members.items():
            suffixes.setdefault(suffix, data)
        if number + 1 == _SAMPLED:
            break
    if not suffixes:  # An empty part, which says nothing of the others.
        return pa.schema([])
    fields: list[Any] = [pa.field("__key__", pa.string(), nullable=False)]
    fields += [pa.field(suffix, _type(suffix, data)) for suffix, data in sorted(suffixes.items())]
    return pa.schema(_plain_names(fields))


def _plain_names(fields: list[Any]) -> list[Any]:
    """Call `tokens.npy` after its column where no other has that name; the suffix is kept as metadata."""
    short = [field.name.rpartition(".")[0] or field.name for field in fields]
    return [
        field.with_name(name if short.count(name) == 1 else field.name).with_metadata({"suffix": field.name})
        for field, name in zip(fields, short, strict=True)
    ]


def _type(suffix: str, data: bytes) -> pa.DataType:
    last = suffix.rpartition(".")[2]
    if last in _TEXT:
        return pa.string()
    if last in _INTEGERS:
        return pa.int64()
    if last in {"pkl", "pickle", "pth", "pyd"}:
        raise ConfigError(
            "a column of pickles is not read: that would run the code in them",
            column=suffix,
            hint="Write the source again with another suffix for it.",
        )
    if last == "npy":
        array = _array(data)
        if array is not None:
            return pa.list_(pa.from_numpy_dtype(array.dtype))
    return pa.binary()


def _array(data: bytes) -> "npt.NDArray[Any] | None":
    """Return the list of numbers in a `.npy`; None for any other array, and for what is none.

    NumPy's own reader evaluates the header, and believes the size in it.
    """
    start = 12 if data[6:7] == b"\x02" else 10
    stop = start + int.from_bytes(data[8:start], "little")
    found = _NPY.fullmatch(data[start:stop]) if data[:6] == b"\x93NUMPY" else None
    dtype = np.dtype(found[1].decode()) if found else np.dtype("u1")
    if found is None or int(found[2]) * dtype.itemsize != len(data) - stop:
        return None
    return np.frombuffer(data, dtype, offset=stop).astype(dtype.newbyteorder("="), copy=False)


def _read(storage: Storage, key: str, _span: Span) -> Iterator[Rows]:
    return numbered(_tables(storage, key))


def _tables(storage: Storage, key: str) -> Iterator[pa.Table]:
    schema = _schema(storage, key)
    batch: list[_Sample] = []
    size = 0
    for sample in _samples(storage, key):
        batch.append(sample)
        size += sum(map(len, sample.members.values()))
        if size >= _BATCH_BYTES:
            yield _table(batch, schema, key)
            batch, size = [], 0
    if batch:
        yield _table(batch, schema, key)


def _table(batch: list[_Sample], schema: pa.Schema, key: str) -> pa.Table:
    suffixes = [(field.metadata or {})[b"suffix"].decode() for field in schema]
    unknown = set().union(*(sample.members for sample in batch)) - set(suffixes)
    if unknown:
        raise ConfigError(
            "a sample has a member that the first ones have not",
            file=key,
            suffixes=sorted(unknown),
            known=suffixes[1:],
            hint="Sort the tars by what their samples hold, and import each kind by itself.",
        )
    arrays = [_column([sample.key for sample in batch] if suffix == "__key__" else
                      [sample.members.get(suffix) for sample in batch], field, key)
              for suffix, field in zip(suffixes, schema, strict=True)]  # fmt: skip
    return pa.table(arrays, schema=schema)


def _column(values: list[Any], field: "pa.Field[Any]", key: str) -> "pa.Array[Any]":
    if field.name == "__key__":
        return array_of(values, pa.string())
    present = [value for value in values if value is not None]
    kind: Any = field.type
    if pa.types.is_int64(kind):
        try:
            return pa.array([None if value is None else int(value) for value in values], kind)
        except ValueError as error:
            raise CorruptError(f"not a whole number: {error}", where=key) from None
    if pa.types.is_list(kind):
        arrays = [_array(value) for value in present]
        wanted = number_of(kind)
        fitting = [array for array in arrays if array is not None and array.dtype == wanted]
        if len(fitting) != len(arrays):
            raise CorruptError("an array has another type or shape than the first", where=key, column=field.name)
        present = [array.tobytes() for array in fitting]
    made = from_cells(present, kind, where=key)
    if len(present) == len(values):
        return made
    places = np.cumsum([value is not None for value in values]) - 1
    return made.take(pa.array(places, mask=np.array([value is None for value in values])))


WEBDATASET = Format(files=whole_files(".tar", *_PACKED), schema=_schema, read=_read)

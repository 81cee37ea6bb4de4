"""Reads a dataset as docs/format.md says, with nothing but pyarrow and the standard library.

It checks sizes and the chain of sha256. Digests are XXH3, which neither has: the page allows that to no other reader.
"""

import base64
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pyarrow as pa
import pyarrow.parquet as pq

KNOWN = {"placement", "deletions", "layout", "evolution", "references", "packed"}
NUMBER, NEXT_NUMBER = b"PARQUET:field_id", b"datastore:next_field_id"
Document = dict[str, Any]


class Reader:
    """Opens the dataset in the folder `root`."""

    def __init__(self, root: Path) -> None:
        self.places = [root]
        self.info = self.document("datastore.json")
        placement = self.info.get("placement") or {"roots": [{"url": root}]}
        self.places = [Path(place["url"]) for place in placement["roots"]]

    def file(self, key: str, *, elsewhere: bool = False) -> Path:
        """Return the path of a key, in the first place that has it."""
        if elsewhere and (key.startswith("/") or "://" in key):
            return Path(urlparse(key).path)
        if any(part in {"", ".", ".."} for part in key.split("/")):
            raise ValueError(f"{key} leads out of the dataset")
        return next((place / key for place in self.places if (place / key).is_file()), self.places[0] / key)

    def document(self, key: str) -> Document:
        found: Document = json.loads(self.file(key).read_bytes())
        unknown = set(found.get("features", [])) - KNOWN
        if found["format"] != 1 or unknown:
            raise ValueError(f"{key} has format {found['format']}, with {sorted(unknown)}")
        return found

    def newest(self) -> int:
        low, step = self.document("_log/_last")["version"] if self.file("_log/_last").is_file() else 0, 1
        if low:
            self.file(version_key(low)).stat()  # It is an error if that version is gone.
        while self.file(version_key(low + step)).is_file():
            low, step = low + step, 2 * step
        high = low + step
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.file(version_key(middle)).is_file() else (low, middle)
        return low

    def commit(self, version: int) -> Document:
        found = self.document(version_key(version))
        parent = hashlib.sha256(self.file(version_key(version - 1)).read_bytes()).hexdigest() if version > 1 else ""
        if (found["version"], found["parent_sha256"]) != (version, parent):
            raise ValueError(f"version {version} is another one, or was not built on what is there")
        oldest = self.document(version_key(self.newest())).get("min_version", 1)
        if version < max(oldest, self.info.get("oldest_version", 1)):
            raise ValueError(f"version {version} has expired")
        return found

    def tagged(self, name: str) -> Document:
        tag = self.document(f"refs/tags/{name}.json")
        raw = self.file(version_key(tag["version"])).read_bytes()
        if hashlib.sha256(raw).hexdigest() != tag["commit_sha256"]:
            raise ValueError(f"{name} names another version than is there")
        return self.commit(tag["version"])

    def table(self, key: str, size_bytes: int) -> pa.Table:
        """Return the rows of an Arrow file, whose size is checked."""
        raw = self.file(key).read_bytes()
        if len(raw) != size_bytes:
            raise ValueError(f"{key} has {len(raw)} bytes, not {size_bytes}")
        if raw[:4] == b"\x28\xb5\x2f\xfd":
            raw = pa.input_stream(pa.py_buffer(raw), compression="zstd").read(65_536)
        return pa.ipc.open_file(raw).read_all()

    def shards(self, commit: Document) -> list[Document]:
        """Return the shards of a version, in order, each with its layout and its deleted rows."""
        deleted: dict[bytes, set[int]] = {}
        for ref in commit.get("deletions", []):
            for row in self.table(f"deletions/{ref['digest']}.arrow", ref["file_bytes"]).to_pylist():
                deleted.setdefault(row["uid"], set()).update(row["rows"])
        tables = [self.table(f"_segments/{ref['digest']}.arrow", ref["file_bytes"]) for ref in commit["segments"]]
        shards: list[Document] = [row for table in tables for row in table.to_pylist()]
        for shard in shards:
            shard["layout"] = json.loads(shard.get("layout") or "{}")
            shard["deleted"] = deleted.get(shard["uid"], set())
        return shards

    def documents(self, commit: Document) -> Iterator[Document]:
        """Yield the documents of a version that are not deleted, with their tokens and what lies beside those."""
        elsewhere = "references" in commit.get("features", [])
        for shard in self.shards(commit):
            raw = pa.py_buffer(self.file(shard["path"], elsewhere=elsewhere).read_bytes())
            docs = pq.read_table(self.file(shard["docs_path"], elsewhere=elsewhere)).to_pylist()
            offsets = flat(raw, shard["offsets_dtype"], shard["documents"] + 1, shard["offsets_start"]).to_pylist()
            streams = {"tokens": flat(raw, shard["dtype"], shard["tokens"], shard["values_start"])}
            for column in shard["layout"].get("columns", []):
                width = column.get("width", 1)
                values = flat(raw, column["dtype"], shard["tokens"] * width, column["values_start"])
                streams[column["name"]] = values if width == 1 else pa.FixedSizeListArray.from_arrays(values, width)
            if not len(docs) == shard["documents"] == len(offsets) - 1 or offsets[-1] != shard["tokens"]:
                raise ValueError(f"{shard['path']} and its documents do not go together")
            for row, document in enumerate(docs):
                start, stop = offsets[row : row + 2]
                if row not in shard["deleted"]:
                    yield document | {name: each[start:stop].to_pylist() for name, each in streams.items()}

    def records(self, commit: Document) -> pa.Table:
        """Return the rows of a version that are not deleted."""
        schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(commit["record_schema"])))
        tables = [schema.empty_table()]
        for shard in self.shards(commit):
            path = self.file(shard["path"], elsewhere="references" in commit.get("features", []))
            arrow = shard["layout"].get("format", "arrow") == "arrow"
            stored = pa.ipc.open_file(path.read_bytes()).read_all() if arrow else pq.ParquetFile(path).read()
            rows = as_schema(stored, schema, numbered=bool(shard["layout"].get("schema_id")))
            tables.append(rows.take([row for row in range(rows.num_rows) if row not in shard["deleted"]]))
        return pa.concat_tables(tables)


def version_key(version: int) -> str:
    return f"_log/{version:020}.json"


def flat(raw: pa.Buffer, dtype: str, count: int, start: int) -> Any:
    """Return `count` numbers of a file from a position on."""
    kind = getattr(pa, dtype)()
    return pa.Array.from_buffers(kind, count, [None, raw.slice(start, count * kind.bit_width // 8)])


def numbers(schema: pa.Schema, *, known: bool) -> list[int]:
    return [int((field.metadata or {})[NUMBER]) if known else place for place, field in enumerate(schema, start=1)]


def as_schema(table: pa.Table, schema: pa.Schema, *, numbered: bool) -> pa.Table:
    """Return the rows of a shard as those of a version's schema."""
    names = dict(zip(numbers(table.schema, known=numbered), table.column_names, strict=True))
    columns = []
    for number, field in zip(numbers(schema, known=NEXT_NUMBER in (schema.metadata or {})), schema, strict=True):
        default = json.loads((field.metadata or {}).get(b"datastore:default", b"null"))
        found = table.column(names[number]) if number in names else pa.array([default] * table.num_rows)
        columns.append(found.cast(field.type))
    return pa.table(columns, schema=schema)

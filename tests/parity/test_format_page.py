"""A second reader, written from docs/format.md alone: it finds what the package finds, in any dataset.

It uses nothing of the package; only the comparison does.
"""

import base64
import hashlib
import json
import random
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import xxhash

from datastore.store.dataset import open_dataset
from datastore.store.evolve import evolve
from datastore.store.records import writer
from datastore.store.tags import set_tag
from datastore.testing.datasets import make_dataset

GOLDEN = Path(__file__).parents[2] / "schemas" / "golden" / "v1"


def cut(values: np.ndarray, offsets: np.ndarray) -> list[list[int]]:
    return [values[start:stop].tolist() for start, stop in pairwise(offsets)]


class Reader:
    """Opens a dataset as the page says."""

    def __init__(self, root: Path) -> None:
        self.root = root
        assert self.document("datastore.json")["features"] == []

    def document(self, key: str) -> dict[str, Any]:
        raw = (self.root / key).read_bytes()
        found: dict[str, Any] = json.loads(raw)
        assert found["format"] == 1
        blank = re.sub(rb'"digest": "[0-9a-f]{32}"', b'"digest": ""', raw, count=1)
        assert xxhash.xxh3_128_hexdigest(blank) == found["digest"]
        return found

    def exists(self, version: int) -> bool:
        return (self.root / f"_log/{version:020}.json").exists()

    def newest(self) -> int:
        low, step = self.document("_log/_last")["version"], 1
        assert self.exists(low)
        while self.exists(low + step):
            low, step = low + step, 2 * step
        high = low + step
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.exists(middle) else (low, middle)
        return int(low)

    def commit(self, version: int) -> dict[str, Any]:
        found = self.document(f"_log/{version:020}.json")
        assert found["version"] == version
        if version > 1:
            parent = (self.root / f"_log/{version - 1:020}.json").read_bytes()
            assert hashlib.sha256(parent).hexdigest() == found["parent_sha256"]
        return found

    def shards(self, version: int) -> Iterator[dict[str, Any]]:
        for segment in self.commit(version)["segments"]:
            raw = (self.root / f"_segments/{segment['digest']}.arrow").read_bytes()
            assert xxhash.xxh3_128_hexdigest(raw) == segment["digest"]
            table = pa.ipc.open_file(raw).read_all()
            assert (len(raw), table.num_rows) == (segment["file_bytes"], segment["shards"])
            yield from table.to_pylist()

    def tokens(self, shard: dict[str, Any]) -> list[list[int]]:
        """Return the documents of a shard from its two buffers, without parsing the file."""
        raw = (self.root / shard["path"]).read_bytes()
        blocks = [raw[start : start + shard["block_bytes"]] for start in range(0, len(raw), shard["block_bytes"])]
        assert b"".join(map(xxhash.xxh3_128_digest, blocks)) == shard["block_digests"]
        assert (len(raw), xxhash.xxh3_128_digest(raw)) == (shard["size_bytes"], shard["digest"])
        values = np.frombuffer(raw, shard["dtype"], shard["tokens"], shard["values_start"])
        offsets = np.frombuffer(raw, shard["offsets_dtype"], shard["documents"] + 1, shard["offsets_start"])
        return cut(values, offsets)

    def documents(self, shard: dict[str, Any]) -> list[dict[str, Any]]:
        raw = (self.root / shard["docs_path"]).read_bytes()
        assert (len(raw), xxhash.xxh3_128_digest(raw)) == (shard["docs_bytes"], shard["docs_digest"])
        found: list[dict[str, Any]] = pq.read_table(pa.BufferReader(raw)).to_pylist()
        return found


def same(root: Path) -> None:
    reader = Reader(root)
    assert reader.newest() == open_dataset(root).version
    for version in range(1, reader.newest() + 1):
        dataset = open_dataset(root, version=version)
        shards = list(reader.shards(version))
        assert [shard["uid"].hex() for shard in shards] == [shard.uid for shard in dataset.segments]
        assert dataset.segments.uid64.tolist() == [int.from_bytes(shard["uid"][:8], "big") for shard in shards]
        for index, shard in enumerate(shards):
            values, offsets = dataset.token_shard(index)
            assert reader.tokens(shard) == cut(values, offsets)
            assert reader.documents(shard) == dataset.documents(index).to_pylist()


def test_the_golden_store() -> None:
    same(GOLDEN / "tokens")


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_a_dataset_of_many_versions(tmp_path: Path, dtype: str) -> None:
    for index in range(12):
        make_dataset(tmp_path, [[index + 1, 0, 500], [7] * index], dtype=dtype, name=str(index))
    same(tmp_path)


def test_a_shard_of_several_blocks(tmp_path: Path) -> None:
    make_dataset(tmp_path, [[1_000_000] * 3])
    same(tmp_path)


def test_a_hint_that_lags(tmp_path: Path) -> None:
    make_dataset(tmp_path, [[1]], name="a")
    hint = (tmp_path / "_log/_last").read_bytes()
    for name in "bcdefg":
        make_dataset(tmp_path, [[1]], name=name)
    (tmp_path / "_log/_last").write_bytes(hint)
    assert Reader(tmp_path).newest() == 7


def test_a_tag(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path, [[1]])
    set_tag(dataset.storage, "v1", dataset.commit)
    tag = Reader(tmp_path).document("refs/tags/v1.json")
    raw = (tmp_path / f"_log/{tag['version']:020}.json").read_bytes()
    assert hashlib.sha256(raw).hexdigest() == tag["commit_sha256"]


def test_records(tmp_path: Path) -> None:
    with writer(tmp_path / "set") as out:
        out.write({"text": "ä", "n": index} for index in range(10))
    reader = Reader(tmp_path / "set")
    schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(reader.commit(1)["record_schema"])))
    shards = [pa.ipc.open_file(reader.root / shard["path"]).read_all() for shard in reader.shards(1)]
    assert pa.concat_tables(shards).cast(schema).to_pylist() == list(open_dataset(tmp_path / "set").iter_records())


@pytest.mark.parametrize("kind", ["arrow", "parquet"])
def test_one_batch_of_records_from_its_bytes_and_the_frame(tmp_path: Path, kind: Any) -> None:
    with writer(tmp_path / "set", format=kind) as out:
        out.write({"text": random.Random(index).randbytes(1000).hex(), "n": index} for index in range(5000))
    reader = Reader(tmp_path / "set")
    (shard,) = reader.shards(1)
    assert "layout" in reader.commit(1)["features"]
    layout = json.loads(shard["layout"])
    raw = (reader.root / shard["path"]).read_bytes()
    edges = [0, *(edge for start, stop, _, _ in layout["batches"] for edge in (start, stop)), len(raw)]
    frame = b"".join(raw[start:stop] for start, stop in zip(edges[::2], edges[1::2], strict=True))
    assert xxhash.xxh3_128_digest(frame) == base64.b64decode(layout["frame_digest"])
    assert sum(rows for _, _, rows, _ in layout["batches"]) == shard["documents"] == 5000
    for index, (start, stop, rows, digest) in enumerate(layout["batches"]):
        assert xxhash.xxh3_128_digest(raw[start:stop]) == base64.b64decode(digest)
        image = bytearray(len(raw))
        for low, high in [*zip(edges[::2], edges[1::2], strict=True), (start, stop)]:
            image[low:high] = raw[low:high]
        if kind == "arrow":
            found = pa.Table.from_batches([pa.ipc.open_file(pa.py_buffer(image)).get_batch(index)])
        else:
            found = pq.ParquetFile(pa.BufferReader(pa.py_buffer(image))).read_row_group(index)
        assert found.num_rows == rows
        assert found.equals(pa.Table.from_batches([open_dataset(tmp_path / "set").read_batch(0, index)]))


def test_records_whose_schema_has_changed(tmp_path: Path) -> None:
    root = tmp_path / "set"
    with writer(root, schema={"a": "int32", "b": "string"}) as out:
        out.write({"a": 1, "b": "x"})
    evolve(root, drop=["b"], rename={"a": "c"}, widen={"c": "int64"}, add={"b": "string"}, defaults={"b": "y"})
    with writer(root, format="parquet") as out:
        out.write({"c": 2, "b": "z"})
    evolve(root, add={"d": "list<int8>"}, rename={"b": "a"})
    reader = Reader(root)
    commit = reader.commit(4)
    schema = pa.ipc.read_schema(pa.py_buffer(base64.b64decode(commit["record_schema"])))

    def numbers(of: pa.Schema) -> list[int]:
        named = [(field.metadata or {}).get(b"PARQUET:field_id") for field in of]
        return [int(number) for number in named] if all(named) else list(range(1, len(of) + 1))  # type: ignore[arg-type]

    rows = []
    for shard in reader.shards(4):
        path = reader.root / shard["path"]
        table = pq.read_table(path) if path.suffix == ".parquet" else pa.ipc.open_file(path).read_all()
        columns = dict(zip(numbers(table.schema), table.columns, strict=True))
        arrays = []
        for number, field in zip(numbers(schema), schema, strict=True):
            default = json.loads((field.metadata or {}).get(b"datastore:default", b"null"))
            missing = pa.array([default] * table.num_rows, field.type)
            arrays.append(columns[number].cast(field.type) if number in columns else missing)
        rows += pa.table(arrays, schema=schema).to_pylist()
    assert commit["features"] == ["evolution", "layout"]
    assert rows == list(open_dataset(root).iter_records())
    assert rows == [{"c": 1, "a": "y", "d": None}, {"c": 2, "a": "z", "d": None}]

"""Rows gathered from memory or from a file are those that were written: columns of any type, nulls, empty values, any order."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import datastore as ds
from datastore.dataset.snapshot import Dataset
from datastore.errors import CorruptError
from datastore.formats.plain import python_rows
from datastore.loader.cache.files import Copier
from datastore.loader.rows import mapped
from datastore.loader.rows.gather import gathered, held
from datastore.loader.rows.loader import RowLoader
from datastore.loader.settings import LoaderSettings

COLUMNS: dict[str, tuple[pa.DataType, Any]] = {
    "text": (pa.string(), st.text(max_size=9)),
    "large": (pa.large_string(), st.text(max_size=9)),
    "raw": (pa.binary(), st.binary(max_size=9)),
    "number": (pa.int64(), st.integers(-(2**63), 2**63 - 1)),
    "small": (pa.uint8(), st.integers(0, 255)),
    "real": (pa.float32(), st.floats(width=32, allow_nan=False)),
    "money": (pa.decimal128(9, 2), st.decimals(-1000, 1000, places=2)),
    "fixed": (pa.binary(3), st.binary(min_size=3, max_size=3)),
    "sure": (pa.bool_(), st.booleans()),
    "tags": (pa.list_(pa.string()), st.lists(st.text(max_size=3), max_size=3)),
    "turn": (pa.struct({"role": pa.string()}), st.fixed_dictionaries({"role": st.text(max_size=3)})),
}


@st.composite
def batches(draw: st.DrawFn) -> list[pa.RecordBatch]:
    """Batches of the same columns, some of them slices of larger ones."""
    names = draw(st.lists(st.sampled_from(sorted(COLUMNS)), min_size=1, unique=True))
    made = []
    for _ in range(draw(st.integers(1, 3))):
        rows = draw(st.integers(1, 6))
        columns = {
            name: pa.array(draw(st.lists(st.none() | COLUMNS[name][1], min_size=rows, max_size=rows)), COLUMNS[name][0])
            for name in names
        }
        whole = pa.record_batch(columns)
        start = draw(st.integers(0, rows - 1))
        made.append(whole.slice(start, draw(st.integers(1, rows - start))))
    return made


@given(parts=batches(), data=st.data())
def test_rows_gathered_are_those_that_slices_give(parts: list[pa.RecordBatch], data: st.DataObject) -> None:
    places = [(part, row) for part in range(len(parts)) for row in range(parts[part].num_rows)]
    chosen = data.draw(st.lists(st.sampled_from(places), max_size=80))
    sources = [held(part) for part in parts]
    found = gathered([sources[part] for part, _ in chosen], [row for _, row in chosen], parts[0].schema)
    assert found is not None
    found.validate(full=True)
    assert found.schema == parts[0].schema
    assert found.to_pylist() == [parts[part].slice(row, 1).to_pylist()[0] for part, row in chosen]


@pytest.fixture(scope="module")
def long_rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[Dataset, pa.Table]:
    """Rows of some 3,000 bytes, every type among them, in two shards of several batches."""
    rng = np.random.default_rng(0)
    rows = pa.table(
        {
            "number": range(3_000),
            "text": [None if n % 7 == 0 else chr(97 + n % 26) * int(rng.integers(0, 5_000)) for n in range(3_000)],
            "image": pa.array([rng.bytes(int(rng.integers(0, 900))) for _ in range(3_000)], pa.binary()),
            "turns": [[{"role": "user", "at": [n] * (n % 3)}] * (n % 4) for n in range(3_000)],
            "sure": pa.array([None if n % 5 == 0 else bool(n % 2) for n in range(3_000)]),
        }
    )
    url = str(tmp_path_factory.mktemp("long") / "rows")
    for start in (0, 1_500):
        with ds.record_writer(url, schema=rows.schema) as out:
            out.write(rows.slice(start, 1_500))
    return ds.open(url), rows


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_rows_read_from_a_file_are_those_that_were_written(
    long_rows: tuple[Dataset, pa.Table], data: st.DataObject
) -> None:
    dataset, rows = long_rows
    names = data.draw(st.lists(st.sampled_from(rows.column_names), unique=True))
    loader = RowLoader(
        dataset,
        global_batch=data.draw(st.sampled_from([1, 7, 500, 2_000])),
        seed=data.draw(st.integers(0, 9)),
        options=LoaderSettings(epochs=1, columns=tuple(names), threads=data.draw(st.sampled_from([0, 2]))),
    )
    wanted = python_rows(rows.select(names or rows.column_names))
    for batch in loader:
        assert batch.data.to_pylist() == [wanted[number] for number in batch.numbers.tolist()]


def test_long_rows_stay_in_the_file(long_rows: tuple[Dataset, pa.Table], monkeypatch: pytest.MonkeyPatch) -> None:
    def resident(*columns: str) -> float:
        loader = RowLoader(long_rows[0], global_batch=64, options=LoaderSettings(epochs=1, threads=0, columns=columns))
        for _ in loader:
            pass
        assert loader.stats()["fills"] == sum(len(shard.layout.batches) for shard in long_rows[0].segments)
        return loader.stats()["resident_bytes"]

    size_bytes = int(long_rows[0].segments.size_bytes.sum())
    assert resident() < size_bytes // 10
    assert resident("number", "text") < size_bytes // 50
    monkeypatch.setattr(mapped, "_MAPS", 0)
    assert resident() > size_bytes // 2


def test_a_file_that_was_cut_is_damage_and_ends_no_process(tmp_path: Path) -> None:
    url = str(tmp_path / "rows")
    with ds.record_writer(url, schema={"text": "string"}) as out:
        for number in range(3_000):
            out.write({"text": chr(97 + number % 26) * 2_000})
    dataset = ds.open(url)
    loader = RowLoader(dataset, global_batch=100, options=LoaderSettings(threads=0))
    for _ in range(30):  # An epoch: all of it was checked.
        next(loader)
    path = Path(url) / dataset.segments.shard(0).path
    whole = path.read_bytes()
    with path.open("r+b") as file:
        file.truncate(4096)
    for _ in range(2):
        with pytest.raises(CorruptError, match=path.name):
            next(loader)
        assert loader.cursor == 3_000
    path.write_bytes(whole)
    assert next(loader).data.num_rows == 100


def test_pieces_of_growing_size_are_joined_by_one_copier() -> None:
    copier = Copier()
    for size in (1, 10, 5_000, 100_000, 3 * 2**20, 7):
        pieces = [memoryview(bytes([number]) * size) for number in range(3)]
        found = copier.join(pieces)
        assert found is not None
        assert found.tobytes() == b"".join(pieces)
        begin = np.array([np.frombuffer(piece, np.uint8).ctypes.data for piece in pieces])
        found = copier.copy(begin, np.array([size] * 3))
        assert found is not None
        assert found.tobytes() == b"".join(pieces)


def test_thousands_of_places_are_copied_at_once_and_a_place_that_is_not_there_ends_nothing() -> None:
    copier, generator = Copier(), np.random.default_rng(0)
    data = generator.integers(0, 256, 3 * 2**20, np.uint8)
    starts, sizes = generator.integers(0, 2**21, 5_000), generator.integers(1, 2_000, 5_000)
    found = copier.copy(data.ctypes.data + starts, sizes)
    assert found is not None
    assert np.array_equal(found, np.concatenate([data[at : at + size] for at, size in zip(starts, sizes, strict=True)]))
    assert copier.copy(np.array([8]), np.array([100])) is None
    cut = copier.copy(np.array([data.ctypes.data, 8]), np.array([100, 100]))
    assert cut is None or np.array_equal(cut, data[:100])
    none = copier.copy(starts[:0], sizes[:0])
    assert none is not None
    assert not len(none)

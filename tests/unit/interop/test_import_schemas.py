"""The files of a folder have one schema in common: none of them decides for the others."""

import io
import tarfile
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datastore.dataset.snapshot import open_dataset
from datastore.errors import ConfigError
from datastore.formats.common import common_schema
from datastore.formats.fitting import check_rows
from datastore.formats.schema import with_wide_indices, without_views
from datastore.ingestion.importing import import_dataset
from datastore.ingestion.ingest import ingest
from datastore.ingestion.settings import IngestSettings
from datastore.ingestion.writers.records import record_writer

SMALL = pa.dictionary(pa.int8(), pa.string())


def imported(folder: Path, *tables: pa.Table) -> pa.Table:
    (folder / "in").mkdir()
    for number, table in enumerate(tables):
        pq.write_table(table, folder / "in" / f"{number}.parquet")
    import_dataset(str(folder / "in"), str(folder / "set"), format="parquet", settings=IngestSettings(workers=1))
    return open_dataset(folder / "set").to_arrow()


def categories(first: int) -> pa.Array:
    return pa.array([f"{first + i}" for i in range(100)]).dictionary_encode().cast(SMALL)


def test_categories_of_two_frames_become_one_column_of_categories(tmp_path: Path) -> None:
    frames = [
        pd.DataFrame({"c": pd.Categorical([f"{first + i}" for i in range(100)]), "i": range(100)}) for first in (0, 90)
    ]
    found = imported(tmp_path, *(pa.Table.from_pandas(frame) for frame in frames))
    assert found.schema.field("c").type.index_type == pa.int32()
    assert found.to_pandas()["c"].dtype == "category"
    assert found.column("c").to_pylist() == [value for frame in frames for value in frame["c"]]
    assert len(open_dataset(tmp_path / "set").segments) == 1


def test_the_order_of_categories_and_those_that_no_row_has_stay(tmp_path: Path) -> None:
    sizes = pd.Categorical(["large", "small"], categories=["small", "medium", "large"], ordered=True)
    with record_writer(tmp_path / "set") as out:
        out.write(pa.Table.from_pandas(pd.DataFrame({"size": sizes})))
    found = open_dataset(tmp_path / "set").to_pandas()["size"]
    assert found.cat.ordered
    assert list(found.cat.categories) == ["small", "medium", "large"]


def test_small_indices_that_a_schema_asks_for_stay_and_rows_go_into_as_many_shards_as_it_takes(tmp_path: Path) -> None:
    with record_writer(tmp_path / "set", schema=pa.schema([("c", SMALL)])) as out:
        for first in (0, 100, 200):
            out.write(pa.table({"c": categories(first)}))
    found = open_dataset(tmp_path / "set")
    assert (found.schema.field("c").type, len(found.segments)) == (SMALL, 3)
    tables = [pa.table({"c": categories(first)}) for first in (300, 400)]
    rows = imported(tmp_path, *tables)  # An append.
    assert (rows.schema.field("c").type, len(open_dataset(tmp_path / "set").segments)) == (SMALL, 5)
    assert rows.column("c").to_pylist() == [f"{i}" for i in range(500)]


@pytest.mark.parametrize("order", [1, -1])
def test_the_rows_of_all_files_are_imported_whichever_comes_first(tmp_path: Path, order: int) -> None:
    strict = pa.schema([pa.field("a", pa.int8(), nullable=False), pa.field("b", pa.null()), pa.field("c", pa.string())])
    loose = pa.schema([("a", pa.int64()), ("b", pa.string()), ("c", SMALL)])
    tables = [
        pa.table([[1], pa.nulls(1), ["x"]], schema=strict),
        pa.table([[None, 2**40], ["y", None], pa.array(["z", None]).dictionary_encode().cast(SMALL)], schema=loose),
    ][::order]
    found = imported(tmp_path, *tables)
    assert found.schema == pa.schema([("a", pa.int64()), ("b", pa.string()), ("c", pa.string())])
    assert found.to_pylist() == [row for table in tables for row in table.to_pylist()]


def tar(*members: tuple[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as made:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            made.addfile(member, io.BytesIO(data))
    return file.getvalue()


EMPTY_AND_FULL = {
    "csv": (b"", b"a\n1\n"),
    "webdataset": (tar(), tar(("0.txt", b"1"))),
}


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("kind", ["csv", "webdataset"])
def test_an_empty_part_is_no_obstacle_wherever_it_stands(tmp_path: Path, kind: Any, order: int) -> None:
    (tmp_path / "in").mkdir()
    for number, raw in enumerate(EMPTY_AND_FULL[kind][::order]):
        (tmp_path / "in" / f"{number}.{'tar' if kind == 'webdataset' else kind}").write_bytes(raw)
    import_dataset(str(tmp_path / "in"), str(tmp_path / "set"), format=kind, settings=IngestSettings(workers=1))
    assert open_dataset(tmp_path / "set").to_arrow().columns[-1].to_pylist() == ["1"]


def test_lines_without_anything_say_nothing_of_the_columns(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "0.jsonl").write_bytes(b"\n\n")
    (tmp_path / "in" / "1.jsonl").write_bytes(b'{"a": 1}\n')
    ingest([str(tmp_path / "in")], str(tmp_path / "set"), settings=IngestSettings(workers=1, take="rows"))
    assert open_dataset(tmp_path / "set").to_arrow().to_pylist() == [{"a": 1}]


@pytest.mark.parametrize("kind", ["csv", "webdataset"])
def test_a_source_of_empty_parts_is_refused_as_that(tmp_path: Path, kind: Any) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / ("0.tar" if kind == "webdataset" else "0.csv")).write_bytes(EMPTY_AND_FULL[kind][0])
    with pytest.raises(ConfigError, match="the source is empty"):
        import_dataset(str(tmp_path / "in"), str(tmp_path / "set"), format=kind, settings=IngestSettings(workers=1))


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize(
    ("one", "other", "common"),
    [
        (pa.field("a", pa.int64(), nullable=False), pa.field("a", pa.int64()), pa.field("a", pa.int64())),
        (pa.field("a", pa.null()), pa.field("a", pa.string(), nullable=False), pa.field("a", pa.string())),
        (pa.field("a", pa.int8()), pa.field("a", pa.int32()), pa.field("a", pa.int32())),
        (pa.field("a", pa.string()), pa.field("a", pa.large_string()), pa.field("a", pa.large_string())),
        (pa.field("a", SMALL), pa.field("a", pa.string()), pa.field("a", pa.string())),
        (
            pa.field("a", pa.list_(pa.field("x", pa.int8(), nullable=False))),
            pa.field("a", pa.large_list(pa.field("x", pa.int16()))),
            pa.field("a", pa.large_list(pa.field("x", pa.int16()))),
        ),
        (
            pa.field("a", pa.struct([("x", pa.null()), ("y", pa.float32())])),
            pa.field("a", pa.struct([("x", pa.list_(pa.null())), ("y", pa.float64())])),
            pa.field("a", pa.struct([("x", pa.list_(pa.null())), ("y", pa.float64())])),
        ),
        (
            pa.field("a", pa.map_(pa.string(), pa.int8())),
            pa.field("a", pa.map_(pa.string(), pa.int16())),
            pa.field("a", pa.map_(pa.string(), pa.int16())),
        ),
        (pa.field("a", pa.int64()), pa.field("a", pa.string()), None),
    ],
)
def test_a_type_is_as_wide_as_the_widest(one: pa.Field, other: pa.Field, common: pa.Field | None, first: int) -> None:
    pair = [pa.schema([one]), pa.schema([other])]
    found = common_schema(pair if first == 0 else pair[::-1])
    assert found.field(0).equals(common if common is not None else (one, other)[first])


NUMBERS = st.sampled_from([pa.int8(), pa.int64(), pa.uint16(), pa.float32(), pa.float64(), pa.null()])
KINDS = st.recursive(
    st.one_of(NUMBERS, st.sampled_from([pa.string(), pa.large_string(), SMALL])),
    lambda inner: st.one_of(
        inner.map(pa.list_), inner.map(pa.large_list), inner.map(lambda kind: pa.struct([("x", kind)]))
    ),
    max_leaves=3,
)


@given(KINDS, KINDS)
def test_rows_of_the_first_schema_fit_what_it_has_in_common_with_another(one: pa.DataType, other: pa.DataType) -> None:
    first = pa.schema([("a", one)])
    common = common_schema([first, pa.schema([("a", other)])])
    assert common_schema([common, first]).equals(common)
    assert check_rows(pa.table([pa.nulls(2, one)], schema=first), common).num_rows == 2


def test_run_ends_are_read_as_values_and_few_categories_as_of_many() -> None:
    small, wide = (pa.dictionary(index, pa.string(), ordered=True) for index in (pa.uint8(), pa.int32()))
    given = pa.schema([("r", pa.run_end_encoded(pa.int32(), pa.string_view())), ("d", pa.list_(small))])
    assert without_views(given) == pa.schema([("r", pa.string()), ("d", pa.list_(small))])
    assert with_wide_indices(pa.schema([("d", pa.list_(small))])) == pa.schema([("d", pa.list_(wide))])

"""Types and meanings through export and import: each comes back equal, by the library of the format, or is refused by name.

`datasets` and pyarrow read what is written; nothing is left behind where something is refused.
"""

import datetime as dt
import decimal
import json
import subprocess
import sys
import textwrap
import uuid
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import datastore as ds
from datastore.errors import ConfigError

datasets.disable_progress_bars()

UUID = uuid.UUID(int=7)


def extension(kind: Any, values: list[Any]) -> Any:
    return pa.ExtensionArray.from_storage(kind, pa.array(values, kind.storage_type))


COLUMNS: dict[str, Any] = {
    "null": pa.nulls(2),
    "float16": pa.array([1.5, None], pa.float16()),
    "uint64": pa.array([2**64 - 1, None], pa.uint64()),
    "decimal32": pa.array([decimal.Decimal("1.50"), None], pa.decimal32(5, 2)),
    "decimal64": pa.array([decimal.Decimal("1.50"), None], pa.decimal64(15, 2)),
    "decimal128": pa.array([decimal.Decimal("1.50"), None], pa.decimal128(20, 2)),
    "decimal256": pa.array([decimal.Decimal("1.50"), None], pa.decimal256(50, 2)),
    "decimal with a negative scale": pa.array([decimal.Decimal("1E2"), None], pa.decimal128(5, -2)),
    "large string": pa.array(["a", None], pa.large_string()),
    "fixed binary": pa.array([b"ab", None], pa.binary(2)),
    "seconds": pa.array([1, None], pa.timestamp("s")),
    "nanoseconds": pa.array([1, None], pa.timestamp("ns")),
    "zone": pa.array([1, None], pa.timestamp("us", "Europe/Berlin")),
    "time": pa.array([1000, None], pa.time64("ns")),
    "duration": pa.array([1, None], pa.duration("s")),
    "interval": pa.array([(1, 2, 3), None], pa.month_day_nano_interval()),
    "list": pa.array([[1], None], pa.list_(pa.int16())),
    "large list": pa.array([[1], None], pa.large_list(pa.int64())),
    "fixed list": pa.array([[1, 2], [3, 4]], pa.list_(pa.int64(), 2)),
    "list of no items": pa.array([[], []], pa.list_(pa.int64(), 0)),
    "struct": pa.array([{"a": 1}, None]),
    "struct of no fields": pa.array([{}, None], pa.struct([])),
    "map": pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int64())),
    "list of maps": pa.array([[[("a", 1)]], None], pa.list_(pa.map_(pa.string(), pa.int64()))),
    "dictionary": pa.array(["a", None]).cast(pa.dictionary(pa.int8(), pa.string())),
    "list of dictionaries": pa.array([["a"], None], pa.list_(pa.dictionary(pa.int32(), pa.string()))),
    "uuid": extension(pa.uuid(), [UUID.bytes, None]),
    "uuid in a struct": pa.StructArray.from_arrays([extension(pa.uuid(), [UUID.bytes] * 2)], ["u"]),
    "json": extension(pa.json_(), ['{"a":1}', None]),
    "bool8": extension(pa.bool8(), [1, None]),
    "tensor": extension(pa.fixed_shape_tensor(pa.float32(), [2]), [[1, 2], [3, 4]]),
}
NOT_IN_DATASETS = {
    "decimal32",
    "decimal64",
    "interval",
    "map",
    "list of maps",
    "uuid",
    "uuid in a struct",
    "bool8",
    "tensor",
}
NOT_IN_PARQUET = {
    "decimal with a negative scale",
    "interval",
    "list of no items",
    "struct of no fields",
}
NOT_IN_JSON = {"nanoseconds", "interval"}


def store(folder: Path, column: Any, name: str = "c") -> ds.Dataset:
    table = pa.table({"id": ["x", "y"], name: column})
    with ds.record_writer(str(folder / "data"), schema=table.schema) as out:
        out.write(table)
    return ds.open(folder / "data")


def values(table: Any) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = table.to_pylist()
    return found


@pytest.mark.parametrize("name", COLUMNS)
def test_a_type_comes_back_from_datasets_or_is_refused(tmp_path: Path, name: str) -> None:
    data = store(tmp_path, COLUMNS[name])
    to = tmp_path / "out"
    if name in NOT_IN_DATASETS:
        for act in (lambda: ds.export_dataset(data, str(to), format="hf"), data.to_hf):
            with pytest.raises(ConfigError, match=r"datasets has no such type \(column='c'"):
                act()
        assert not to.exists()
        return
    ds.export_dataset(data, str(to), format="hf")
    for found in (datasets.load_from_disk(str(to)), data.to_hf()):
        assert values(found.with_format("arrow")[:]) == values(data.to_arrow())


@pytest.mark.parametrize("name", COLUMNS)
def test_a_type_comes_back_from_parquet_or_is_refused(tmp_path: Path, name: str) -> None:
    data = store(tmp_path, COLUMNS[name])
    to = tmp_path / "out"
    if name in NOT_IN_PARQUET:
        with pytest.raises(ConfigError, match=r"Parquet has no such type: .* \(column='c'"):
            ds.export_dataset(data, str(to), format="parquet")
        assert not to.exists()
        return
    ds.export_dataset(data, str(to), format="parquet")
    assert values(pq.read_table(to / "part-00000.parquet")) == values(data.to_arrow())


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("form", ["jsonl", "litdata", "mds", "webdataset"])
def test_a_type_has_a_form_in_rows_or_is_refused_by_name(tmp_path: Path, name: str, form: Any) -> None:
    data = store(tmp_path, COLUMNS[name])
    to = tmp_path / "out"
    refused: ConfigError | None = None
    try:
        ds.export_dataset(data, str(to), format=form)
    except ConfigError as error:
        refused = error
    assert to.exists() == (refused is None)
    assert refused is None or (refused.values["column"] == "c" and refused.hint)
    assert form != "jsonl" or (refused is not None) == (name in NOT_IN_JSON)


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        (pa.array([1.0, float("nan")]), "NaN or infinity"),
        (pa.array([[{"a": float("inf")}], None]), "NaN or infinity"),
        (pa.array([10**15 * 500, None], pa.timestamp("us")), "out of range"),
        (pa.array([1, None], pa.timestamp("ns")), "lose data"),
        (pa.array([[1], None], pa.list_(pa.duration("ns"))), "lose data"),
        (pa.array([1, None], pa.time64("ns")), "lose data"),
    ],
)
def test_what_json_would_change_is_refused(tmp_path: Path, column: Any, reason: str) -> None:
    data = store(tmp_path, column)
    with pytest.raises(ConfigError, match=rf"no JSON form: .*{reason}.*column='c'"):
        ds.export_dataset(data, str(tmp_path / "out"), format="jsonl")
    assert not (tmp_path / "out").exists()


def test_nanoseconds_that_are_whole_microseconds_are_the_same_without_pandas(tmp_path: Path) -> None:
    moment, span = pa.array([1_000, None], pa.timestamp("ns")), pa.array([5_000, None], pa.duration("ns"))
    table = pa.table({"moment": moment, "span": span})
    with ds.record_writer(str(tmp_path / "data"), schema=table.schema) as out:
        out.write(table)
    program = """
        import sys
        if sys.argv[1] == "without":
            sys.modules["pandas"] = None
        import datastore as ds
        ds.export_dataset(ds.open("data"), "out-" + sys.argv[1], format="jsonl")
    """
    lines = []
    for how in ("with", "without"):
        subprocess.run([sys.executable, "-c", textwrap.dedent(program), how], cwd=tmp_path, check=True)
        lines.append((tmp_path / f"out-{how}" / "part-00000.jsonl").read_text().splitlines())
    assert lines[0] == lines[1]
    first = json.loads(lines[0][0])
    assert dt.datetime.fromisoformat(first["moment"]).microsecond == 1
    assert first["span"] == "0:00:00.000005"


# What a column means

FEATURES = datasets.Features(
    {
        "label": datasets.ClassLabel(names=["cat", "dog"]),
        "labels": datasets.List(datasets.ClassLabel(names=["red", "blue"])),
        "inner": {"kind": datasets.ClassLabel(names=["x", "y"])},
        "image": datasets.Image(),
        "matrix": datasets.Array2D((2, 3), "float32"),
        "number": datasets.Value("int64"),
    }
)


def saved(folder: Path, features: datasets.Features = FEATURES) -> datasets.Dataset:
    rows = {
        "label": [0, 1],
        "labels": [[1, 0], [1]],
        "inner": [{"kind": 1}, {"kind": 0}],
        "image": [{"bytes": b"\x89PNG", "path": None}] * 2,
        "matrix": [[[1.0, 2.0, 3.0]] * 2] * 2,
        "number": [5, 6],
    }
    made = datasets.Dataset.from_dict(rows, features=features)
    made.save_to_disk(str(folder / "saved"))
    made.to_parquet(str(folder / "file.parquet"))
    return made


@pytest.mark.parametrize("form", ["hf", "parquet"])
def test_features_of_datasets_come_through(tmp_path: Path, form: Any) -> None:
    source = saved(tmp_path)
    given = "saved" if form == "hf" else "file.parquet"
    ds.import_dataset(str(tmp_path / given), str(tmp_path / "data"), format=form)
    data = ds.open(tmp_path / "data")
    assert data.to_hf().features == FEATURES
    ds.export_dataset(data, str(tmp_path / "hf"), format="hf")
    ds.export_dataset(data, str(tmp_path / "parquet"), format="parquet")
    for back in (
        datasets.load_from_disk(str(tmp_path / "hf")),
        datasets.Dataset.from_parquet(str(tmp_path / "parquet" / "part-00000.parquet"), cache_dir=str(tmp_path / "c")),
        data.to_hf(),
    ):
        assert back.features == FEATURES
        assert back.with_format("arrow")[:].to_pylist() == source.with_format("arrow")[:].to_pylist()


def test_features_follow_a_column_through_evolve_compact_and_clone(tmp_path: Path) -> None:
    saved(tmp_path)
    url = str(tmp_path / "data")
    ds.import_dataset(str(tmp_path / "saved"), url, format="hf")
    ds.evolve(url, rename={"label": "species"}, drop=["labels"], add={"extra": "string"})
    ds.compact(url)
    ds.clone(url, str(tmp_path / "copy"))
    found = ds.open(tmp_path / "copy").to_hf().features
    assert found["species"] == FEATURES["label"]
    assert found["matrix"] == FEATURES["matrix"]
    assert set(found) == {*FEATURES, "species", "extra"} - {"label", "labels"}


def test_a_column_that_means_something_else_is_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    url = str(tmp_path / "data")
    ds.import_dataset(str(tmp_path / "saved"), url, format="hf")
    other = tmp_path / "other"
    other.mkdir()
    changed = datasets.Features({**FEATURES, "label": datasets.ClassLabel(names=["dog", "cat"])})
    second = saved(other, changed)
    with pytest.raises(ConfigError, match=r"means something else.*column='label'"):
        ds.import_dataset(str(other / "saved"), url, format="hf")
    with ds.record_writer(url) as out, pytest.raises(ConfigError, match=r"column='label'"):
        out.write(second.data.table)
    folder = tmp_path / "two"
    folder.mkdir()
    (tmp_path / "file.parquet").rename(folder / "a.parquet")
    (other / "file.parquet").rename(folder / "b.parquet")
    with pytest.raises(ConfigError, match=r"means something else"):
        ds.import_dataset(str(folder), str(tmp_path / "new"), format="parquet")
    assert ds.open(url).totals.documents == 2


def test_a_table_of_datasets_can_be_written_as_it_is(tmp_path: Path) -> None:
    made = saved(tmp_path)
    with ds.record_writer(str(tmp_path / "data")) as out:
        out.write(made.data.table)
    assert ds.open(tmp_path / "data").to_hf().features == FEATURES


def test_translations_keep_their_languages(tmp_path: Path) -> None:
    features = datasets.Features({"pair": datasets.Translation(["en", "fr"])})
    made = datasets.Dataset.from_dict({"pair": [{"en": "a", "fr": "b"}]}, features=features)
    made.save_to_disk(str(tmp_path / "saved"))
    ds.import_dataset(str(tmp_path / "saved"), str(tmp_path / "data"), format="hf")
    assert ds.open(tmp_path / "data").to_hf().features == features


def test_another_program_s_note_is_no_obstacle(tmp_path: Path) -> None:
    for number, note in enumerate((b"no json", b"[]", b'{"info": 3}', b'{"info": {"features": null}}')):
        table = pa.table({"a": [1]}).replace_schema_metadata({b"huggingface": note})
        with ds.record_writer(str(tmp_path / str(number))) as out:
            out.write(table)
        assert ds.open(tmp_path / str(number)).to_hf()[:] == {"a": [1]}


# What the libraries in memory make of a type


@pytest.mark.parametrize("name", COLUMNS)
@pytest.mark.parametrize("to", ["to_pandas", "to_polars"])
def test_a_frame_holds_a_type_or_the_column_is_named(tmp_path: Path, name: str, to: str) -> None:
    data = store(tmp_path, COLUMNS[name])
    try:
        frame = getattr(data, to)()
    except ConfigError as error:
        assert error.values["column"] == "c"  # noqa: PT017 - either is right
        assert len(getattr(data, to)(columns=["id"])) == 2
    else:
        assert len(frame) == 2


@pytest.mark.parametrize(
    ("column", "reason"),
    [
        (pa.array([10**15 * 500, None], pa.timestamp("us")), "out of range"),
        (pa.array([10**7, None], pa.date32()), "out of range"),
        (pa.array([1, None], pa.time64("ns")), "lose data"),
    ],
)
def test_a_value_that_python_has_no_form_of_is_named_and_stays_in_arrow(
    tmp_path: Path, column: Any, reason: str
) -> None:
    data = store(tmp_path, column)
    with pytest.raises(ConfigError, match=rf"no form in Python: .*{reason}.*column='c'"):
        list(data.iter_records())
    assert [row["id"] for row in data.iter_records(columns=["id"])] == ["x", "y"]
    assert pa.Table.from_batches(data.iter_batches()).column("c").combine_chunks().equals(column)

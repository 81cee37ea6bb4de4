"""The table of docs/types.md, made by doing what it says: `python tests/parity/type_table.py` prints it.

A cell is `yes` where all values come back equal, `no` where one line refuses the column by its name, and `type` where the
values are equal in another type. Anything else ends the program.
"""

import datetime as dt
import decimal
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

import datastore as ds

ONE = ds.IngestSettings(workers=1)
DAY = dt.date(2020, 2, 29)
MONEY = decimal.Decimal("1.50")


def _of(kind: Any, *values: Any) -> Any:
    if isinstance(kind, pa.BaseExtensionType):
        return pa.ExtensionArray.from_storage(kind, pa.array(values, kind.storage_type))
    return pa.array(values, kind)


TYPES: dict[str, Any] = {
    "integers, `float`, `double`, `bool`": _of(pa.int64(), 1, 2),
    "`uint64`": _of(pa.uint64(), 1, 2**64 - 1),
    "`float16`": _of(pa.float16(), 1.5, 2),
    "`decimal32`": _of(pa.decimal32(5, 2), MONEY, MONEY),
    "`decimal64`": _of(pa.decimal64(15, 2), MONEY, MONEY),
    "`decimal128`": _of(pa.decimal128(20, 2), MONEY, MONEY),
    "`decimal256`": _of(pa.decimal256(50, 2), MONEY, MONEY),
    "decimal with a negative scale": _of(pa.decimal128(5, -2), decimal.Decimal("1E2"), decimal.Decimal("2E2")),
    "`string`, `large_string`": _of(pa.large_string(), "a", "ä"),
    "`binary`, `large_binary`": _of(pa.large_binary(), b"a", b""),
    "`fixed_size_binary`": _of(pa.binary(2), b"ab", b"cd"),
    "`string_view`, `binary_view`": pa.array(["a", "b"], pa.string_view()),
    "`date32`, `date64`": _of(pa.date64(), DAY, DAY),
    "a date past 9999": pa.array([10**7, 0], pa.int32()).cast(pa.date32()),
    "`timestamp[s, ms, us]`, zones": _of(pa.timestamp("us", "Europe/Berlin"), 1, 2),
    "`timestamp[ns]`": _of(pa.timestamp("ns"), 1, 2),
    "a time past 9999": _of(pa.timestamp("s"), 10**12, 0),
    "`time32`, `time64[us]`": _of(pa.time32("s"), 1, 2),
    "`time64[ns]`": _of(pa.time64("ns"), 1, 2),
    "`duration[us]`": _of(pa.duration("us"), 1, 2),
    "`duration[ns]`": _of(pa.duration("ns"), 1, 2),
    "`month_day_nano_interval`": _of(pa.month_day_nano_interval(), (1, 2, 3), (4, 5, 6)),
    "`null`": pa.nulls(2),
    "`list`, `large_list`": _of(pa.large_list(pa.int64()), [1], [2, 3]),
    "`fixed_size_list`": _of(pa.list_(pa.float32(), 2), [1, 2], [3, 4]),
    "`list_view`, `large_list_view`": _of(pa.list_view(pa.int64()), [1], [2]),
    "`struct`": _of(pa.struct([("a", pa.int64()), ("b", pa.list_(pa.string()))]), {"a": 1, "b": ["x"]}, {"a": 2}),
    "`struct` of no fields": _of(pa.struct([]), {}, {}),
    "`map`": _of(pa.map_(pa.string(), pa.int64()), [("a", 1)], []),
    "`dictionary`, any indices": _of(pa.string(), "a", "b").cast(pa.dictionary(pa.int8(), pa.string())),
    "`dictionary` of numbers": _of(pa.dictionary(pa.int32(), pa.int64()), 1, 2),
    "list of `dictionary`": _of(pa.list_(pa.dictionary(pa.int32(), pa.string())), ["a"], []),
    "`run_end_encoded`": pa.RunEndEncodedArray.from_arrays(pa.array([1, 2], pa.int32()), pa.array(["a", "b"])),
    "unions": pa.UnionArray.from_sparse(pa.array([0, 0], pa.int8()), [pa.array([1, 2])]),
    "`arrow.uuid`": _of(pa.uuid(), b"0" * 16, b"1" * 16),
    "`arrow.json`": _of(pa.json_(), "{}", "[1]"),
    "`arrow.bool8`": _of(pa.bool8(), 1, 0),
    "`arrow.fixed_shape_tensor`": _of(pa.fixed_shape_tensor(pa.float32(), [2]), [1, 2], [3, 4]),
}
EXPORTS = ("parquet", "hf", "jsonl", "mds", "litdata", "webdataset")
COLUMNS = ("write", "as Parquet", "SQL", "delete", "evolve", "compact", "rows", *EXPORTS, "from parquet", "from hf")


def _cell(do: Callable[[], str | None]) -> str:
    try:
        return do() or "yes"
    except ds.ConfigError as error:
        refused = str(error)
    assert "\n" not in refused, refused
    return "no"


def _same(found: pa.Table, given: Any) -> str:
    column = found.column("c").combine_chunks()
    if column.type.equals(given.type):
        assert column.equals(given), (column, given)
        return "yes"
    wanted = given.dictionary_decode() if pa.types.is_dictionary(given.type) else given
    values = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    wanted = wanted.storage if isinstance(wanted.type, pa.BaseExtensionType) else wanted
    values = values.storage if isinstance(values.type, pa.BaseExtensionType) else values
    assert values.cast(wanted.type).equals(wanted), (column, given)
    return "type"


class _Column:
    """One column `c` in a dataset, and what can be done with it."""

    def __init__(self, folder: Path, array: Any) -> None:
        self.folder = folder
        self.array = array
        self.url = str(folder / "set")

    def cells(self) -> list[str]:
        """Return the cells, in the order of `COLUMNS`."""
        first = _cell(partial(self.write, self.url, "arrow"))
        if first == "no":
            return ["no", *["-"] * (len(COLUMNS) - 1)]
        parquet = _cell(partial(self.write, str(self.folder / "parquet-shards"), "parquet"))
        sql = _cell(self.sql)
        exports = [_cell(partial(self.export, form)) for form in EXPORTS]
        changes = [_cell(self.delete), _cell(self.evolve), _cell(self.compact), _cell(self.rows)]
        imports = [self.back(form) if cell == "yes" else "-" for form, cell in zip(EXPORTS[:2], exports, strict=False)]
        return [first, parquet, sql, *changes, *exports, *imports]

    def write(self, url: str, form: Any) -> str:
        table = pa.table({"i": [0, 1], "c": self.array})
        with ds.record_writer(url, schema=table.schema, format=form) as out:
            out.write(table)
        return _same(ds.open(url).to_arrow(), self.array)

    def sql(self) -> None:
        data = ds.open(self.url)
        assert data.sql("SELECT max(i) AS i FROM records").to_pylist() == [{"i": 1}]
        assert data.sql("SELECT c FROM records WHERE i < 2").num_rows == 2

    def export(self, form: Any) -> None:
        to, refused = self.folder / form, None
        columns = ["c"] if form != "webdataset" else None
        try:
            ds.export_dataset(ds.open(self.url), str(to), format=form, columns=columns)
        except ds.ConfigError as error:
            refused = error
        if refused is not None:
            assert "column='c'" in str(refused), refused
            assert not to.exists(), form
            raise refused

    def delete(self) -> str:
        ds.delete(self.url, where="i = 1")
        ds.delete(self.url, where=pc.field("i") == 1)
        return self._read(self.array.slice(0, 1))

    def evolve(self) -> str:
        ds.evolve(self.url, rename={"c": "d"}, add={"e": "int8"})
        ds.evolve(self.url, rename={"d": "c"})
        return self._read(self.array.slice(0, 1))

    def compact(self) -> str:
        assert ds.compact(self.url).dropped_documents == 1
        return self._read(self.array.slice(0, 1))

    def rows(self) -> None:
        assert len(list(ds.open(self.url).iter_records())) == 1

    def back(self, form: Any) -> str:
        to = self.folder / f"back-{form}"
        ds.import_dataset(str(self.folder / form), str(to), format=form, settings=ONE)
        return _same(ds.open(to).to_arrow(), self.array)

    def _read(self, wanted: Any) -> str:
        return _same(ds.open(self.url).to_arrow(), wanted)


def table_lines() -> list[str]:
    """Return the table, line by line."""
    lines = [f"| type | {' | '.join(COLUMNS)} |", "| --- " * (len(COLUMNS) + 1) + "|"]
    for name, array in TYPES.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                cells = _Column(Path(folder), array).cells()
            except Exception as error:
                raise AssertionError(f"{name}: {error}") from error
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


if __name__ == "__main__":
    if "--without-pandas" in sys.argv:
        sys.modules["pandas"] = None  # type: ignore[assignment]
    sys.stdout.write("\n".join([*table_lines(), ""]))

"""Arrow arrays as NumPy arrays and back, and that nothing brings pandas that does not need it."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datastore.formats.arrow import array_of, numbers_of, scalar_of
from datastore.formats.documents import DOCUMENTS_SCHEMA
from datastore.formats.schema import no_rows

TYPES = [pa.int8(), pa.uint16(), pa.int32(), pa.uint32(), pa.int64(), pa.float32(), pa.float64(), pa.bool_()]


@given(kind=st.sampled_from(TYPES), values=st.lists(st.integers(0, 100)), data=st.data())
def test_any_slice_is_what_pyarrow_makes_of_it(kind: pa.DataType, values: list[int], data: st.DataObject) -> None:
    array = pa.array([value % 2 == 0 for value in values] if kind == pa.bool_() else values, kind)
    start = data.draw(st.integers(0, len(values)))
    part = array.slice(start, data.draw(st.integers(0, len(values))))
    found, expected = numbers_of(part), part.to_numpy(zero_copy_only=False)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


def test_nulls_are_refused() -> None:
    with pytest.raises(pa.ArrowInvalid, match="1 of the values are null"):
        numbers_of(pa.array([1, None]))


VALUES = {
    pa.string(): st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    pa.binary(): st.binary(max_size=5),
    pa.binary(3): st.binary(min_size=3, max_size=3),
    pa.int8(): st.integers(-128, 127),
    pa.uint64(): st.integers(0, 2**64 - 1),
    pa.float64(): st.floats(allow_nan=False),
    pa.bool_(): st.booleans(),
}


@given(kind=st.sampled_from(list(VALUES)), lists=st.booleans(), data=st.data())
def test_values_become_the_array_that_pyarrow_makes_of_them(
    kind: pa.DataType, *, lists: bool, data: st.DataObject
) -> None:
    strategy = st.lists(VALUES[kind]) if lists else VALUES[kind]
    kind = pa.list_(pa.field("item", kind, nullable=False)) if lists else kind
    values: list[Any] = data.draw(st.lists(strategy))
    found = array_of(values, kind)
    found.validate(full=True)
    assert found.equals(pa.array(values, kind))
    assert [scalar_of(value, kind).as_py() for value in values] == values


@given(
    values=st.lists(st.integers(-(2**31), 2**31 - 1)), step=st.sampled_from([1, 2, -1]), kind=st.sampled_from(TYPES[:7])
)
def test_an_ndarray_becomes_the_array_that_pyarrow_makes_of_it(values: list[int], step: int, kind: pa.DataType) -> None:
    given = np.array(values, ">i4")[::step]
    assert array_of(given).equals(pa.array(given.astype(np.int32)))
    try:
        expected = pa.array(given.astype(np.int32)).cast(kind)
    except pa.ArrowInvalid:
        with pytest.raises(pa.ArrowInvalid):
            array_of(given, kind)
    else:
        assert array_of(given, kind).equals(expected)


def test_bytes_of_another_length_are_refused() -> None:
    with pytest.raises(pa.ArrowInvalid, match="another length than 16"):
        array_of([b"short"], pa.binary(16))


@pytest.mark.parametrize("schema", [DOCUMENTS_SCHEMA, pa.schema([("id", pa.uuid()), ("x", pa.list_(pa.float32()))])])
def test_no_rows_are_those_of_an_empty_table(schema: pa.Schema) -> None:
    assert pa.Table.from_batches([no_rows(schema)]).equals(schema.empty_table())


PROGRAM = """
import sys
from pathlib import Path

import numpy as np

import datastore as ds
from datastore.cli.main import cli

url, texts, copy = "set", "texts", "copy"
assert "pandas" not in sys.modules, "import datastore"
with ds.token_writer(url, vocab_size=100, columns={"loss_mask": "bool"}) as out:
    for number in range(9):
        out.write(np.arange(50 + number), id=f"d{number}", loss_mask=np.ones(50 + number, np.bool_))
Path("a.jsonl").write_text("".join('{"text": "a text of some words %d", "id": "d%d"}\\n' % (n, n) for n in range(9)))
with ds.Loader(ds.open(url), seq_len=8, global_batch=4, options=ds.LoaderSettings(columns=("loss_mask",))) as loader:
    batch = next(loader)
    batch.documents(), batch.fingerprint(), loader.state_dict()
assert "pandas" not in sys.modules, "Loader"
ingested = ["ingest", "a.jsonl", "--to", texts, "--workers", "1"]
for command in [
    *[[*command, of] for of in (url, texts) for command in (
        ["show"], ["ls"], ["ls", "--documents"], ["verify", "--deep"], ["log"], ["delete", "--id", "d3"],
        ["delete", "--source", "x*", "--where", "1 = 1"], ["ls", "--documents"], ["compact"], ["protect"], ["verify"],
        ["repair"], ["vacuum"],
    )],

    ["diff", f"{url}@1", f"{url}@2"], ["clone", url, copy], ["copy", url, f"{copy}-2"],
    ["export", url, "--to", "out", "--format", "mds", "--column", "tokens"],
    ["import", "out", "--to", "back", "--format", "mds"], ["purge", url, "--id", "d4"],
]:
    if command == ["show", texts]:
        cli(ingested, standalone_mode=False)
        assert "pandas" not in sys.modules, ingested
    cli(command, standalone_mode=False)
    assert "pandas" not in sys.modules, command
"""


def test_nothing_brings_pandas_that_does_not_need_it(tmp_path: Path) -> None:
    pytest.importorskip("pandas")
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, cwd=tmp_path)

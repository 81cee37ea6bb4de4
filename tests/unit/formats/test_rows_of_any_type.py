"""Rows are kept, joined and cut whatever their types: where pyarrow has no kernel for one, and where one file cannot hold them."""

from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datastore.errors import ConfigError
from datastore.formats.joining import cut_to_fit, keep_rows
from datastore.formats.records import decode_batch, decode_records, encode_parts, encode_records
from datastore.formats.schema import check_storable

SMALL = pa.dictionary(pa.int8(), pa.string())


def labels(first: int, count: int = 100) -> pa.Array:
    return pa.array([f"label {i}" for i in range(first, first + count)]).dictionary_encode().cast(SMALL)


def values(tables: list[pa.Table]) -> list[object]:
    return [value for table in tables for value in table.column("c").to_pylist()]


NESTINGS = {
    "plain": lambda array: array,
    "struct": lambda array: pa.StructArray.from_arrays([array], ["x"]),
    "list": lambda array: pa.ListArray.from_arrays(pa.array([0, len(array)], pa.int32()), array),
}


@pytest.mark.parametrize("nesting", sorted(NESTINGS))
def test_categories_that_one_index_cannot_number_are_cut_into_tables_that_each_can_be_stored(nesting: str) -> None:
    chunks = [NESTINGS[nesting](labels(first)) for first in (0, 20, 100, 110, 0)]
    table = pa.table({"c": pa.chunked_array(chunks)})
    parts = cut_to_fit(table)
    assert len(parts) == 3
    assert values([decode_records(encode_records(part).data) for part in parts]) == values([table])
    with pytest.raises(ConfigError, match="more values than its indices can number"):
        encode_records(table)


@given(st.lists(st.integers(0, 300), min_size=1, max_size=8))
def test_a_cut_keeps_all_rows_in_order_and_no_two_neighbours_fit_together(firsts: list[int]) -> None:
    table = pa.table({"c": pa.chunked_array([labels(first) for first in firsts])})
    parts = cut_to_fit(table)
    assert values(parts) == values([table])
    assert all(len(cut_to_fit(pa.concat_tables(pair))) == 2 for pair in pairwise(parts))
    assert all(len(cut_to_fit(part)) == 1 for part in parts)


def test_lists_with_more_items_than_one_array_numbers_are_stored_in_several_batches() -> None:
    one = pa.ListArray.from_arrays(pa.array([0, 2**30], pa.int32()), pa.nulls(2**30))
    table = pa.table({"c": pa.chunked_array([one] * 3)})
    encoded = encode_records(table)
    assert [batch.rows for batch in encoded.batches] == [1, 1, 1]
    assert len(decode_batch(encoded.data, 2, format="arrow").column(0)[0]) == 2**30


@given(st.lists(st.integers(0, 2_000), min_size=1, max_size=6), st.integers(1, 5_000))
def test_rows_that_come_in_parts_make_the_file_that_they_make_at_once(sizes: list[int], batch_bytes: int) -> None:
    schema = pa.schema([("a", pa.int64()), ("b", pa.string())])
    parts = [pa.table([np.arange(size), [str(i) for i in range(size)]], schema=schema) for size in sizes]
    whole = encode_records(pa.concat_tables(parts), format="parquet", batch_bytes=batch_bytes)
    streamed = encode_parts(parts, batch_bytes=batch_bytes)
    assert decode_records(streamed.data, format="parquet").equals(decode_records(whole.data, format="parquet"))
    assert [batch.rows for batch in streamed.batches] == [batch.rows for batch in whole.batches]


def test_parts_with_categories_of_their_own_get_row_groups_of_their_own() -> None:
    parts = [pa.table({"c": labels(first)}) for first in (0, 100, 200)]
    encoded = encode_parts(parts)
    assert [batch.rows for batch in encoded.batches] == [100, 100, 100]
    assert values([decode_records(encoded.data, format="parquet")]) == values(parts)


@pytest.mark.parametrize("whole", [True, False])
@given(live=st.lists(st.booleans(), min_size=5, max_size=5))
def test_rows_with_run_ends_are_kept_like_any_others(whole: bool, live: list[bool]) -> None:  # noqa: FBT001
    ends = pa.RunEndEncodedArray.from_arrays(pa.array([2, 4, 5], pa.int32()), pa.array(["a", "b", "c"]))
    table = pa.table({"i": range(5), "c": ends})
    rows = table if whole else table.to_batches()[0]
    kept = keep_rows(rows, np.array(live))
    assert type(kept) is type(rows)
    assert kept.to_pylist() == [row for row, lives in zip(table.to_pylist(), live, strict=True) if lives]


@pytest.mark.parametrize(
    "kind",
    [
        pa.dense_union([pa.field("a", pa.int8())]),
        pa.sparse_union([pa.field("a", pa.int8())]),
        pa.run_end_encoded(pa.int32(), pa.string()),
        pa.string_view(),
        pa.list_view(pa.int8()),
    ],
    ids=str,
)
@pytest.mark.parametrize("nested", [False, True])
def test_a_column_of_which_rows_cannot_be_taken_is_refused_by_its_name(kind: pa.DataType, nested: bool) -> None:  # noqa: FBT001
    with pytest.raises(ConfigError, match="column='odd"):
        check_storable(pa.schema([("odd", pa.list_(kind) if nested else kind)]))

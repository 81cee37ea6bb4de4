"""Laws of token shards."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from datastore.errors import CorruptError
from datastore.formats.tokens import COLUMN_DTYPES, decode_token_table, decode_tokens, encode_tokens

dtypes = st.sampled_from(["uint16", "uint32"])
lengths = st.lists(st.integers(0, 40), max_size=30)
types = st.dictionaries(
    st.sampled_from(["loss", "weight", "Logits_2", "_x"]),
    st.tuples(st.sampled_from(COLUMN_DTYPES), st.integers(1, 5)),
    max_size=3,
)


def shard_of(lengths: list[int], dtype: str, seed: int) -> tuple[np.ndarray, np.ndarray]:
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int64)
    generator = np.random.default_rng(seed)
    return generator.integers(0, np.iinfo(dtype).max, int(offsets[-1]), dtype=dtype, endpoint=True), offsets


@given(lengths, dtypes, st.integers(0, 2**32))
def test_what_is_read_is_what_was_written(lengths: list[int], dtype: str, seed: int) -> None:
    values, offsets = shard_of(lengths, dtype, seed)
    read, index = decode_tokens(encode_tokens(values, offsets).data)
    assert read.dtype == dtype
    assert np.array_equal(read, values)
    assert np.array_equal(index, offsets)


def columns_of(tokens: int, types: dict[str, tuple[str, int]]) -> dict[str, np.ndarray]:
    """Random bytes as values: every one that a type has, NaN among them."""
    generator = np.random.default_rng(tokens)
    columns = {}
    for name, (dtype, width) in types.items():
        raw = generator.bytes(tokens * width * np.dtype(dtype).itemsize)
        columns[name] = np.frombuffer(raw, dtype).reshape((tokens,) if width == 1 else (tokens, width))
    return columns


@given(lengths, dtypes, types)
def test_columns_are_read_as_they_were_written_and_lie_where_the_layout_says(
    lengths: list[int], dtype: str, types: dict[str, tuple[str, int]]
) -> None:
    values, offsets = shard_of(lengths, dtype, 1)
    columns = columns_of(values.size, types)
    shard = encode_tokens(values, offsets, columns=columns)
    table = decode_token_table(shard.data)
    assert np.array_equal(table.values, values)
    assert np.array_equal(table.offsets, offsets)
    assert list(table.columns) == [kind.name for kind, _ in shard.layout.columns] == sorted(columns)
    for kind, start in shard.layout.columns:
        wanted = columns[kind.name]
        assert (kind.dtype, kind.width) == types[kind.name]
        assert table.columns[kind.name].shape == wanted.shape
        assert table.columns[kind.name].tobytes() == wanted.tobytes()
        assert start % 64 == 0
        assert shard.data[start : start + wanted.nbytes] == wanted.tobytes()


@given(lengths, dtypes, types, st.data())
def test_a_damaged_shard_with_columns_never_does_worse_than_raise(
    lengths: list[int], dtype: str, types: dict[str, tuple[str, int]], data: st.DataObject
) -> None:
    values, offsets = shard_of(lengths, dtype, 1)
    raw = bytearray(encode_tokens(values, offsets, columns=columns_of(values.size, types)).data)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    try:
        table = decode_token_table(raw)
    except CorruptError:
        return
    assert all(len(column) == len(table.values) and column.nbytes <= len(raw) for column in table.columns.values())


@given(lengths, dtypes, st.data())
def test_a_damaged_shard_never_does_worse_than_raise(lengths: list[int], dtype: str, data: st.DataObject) -> None:
    # Digests find every flip before this decoder sees it; without them it may misread a token, but no more than that.
    values, offsets = shard_of(lengths, dtype, 1)
    raw = bytearray(encode_tokens(values, offsets).data)
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    raw = raw[: data.draw(st.integers(0, len(raw))) if data.draw(st.booleans()) else len(raw)]
    try:
        read, index = decode_tokens(raw)
    except CorruptError:
        return
    assert read.nbytes <= len(raw)
    assert index.size <= len(raw)
    assert index[0] == 0
    assert index[-1] == read.size

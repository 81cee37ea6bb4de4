"""Laws of token shards."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from datastore.errors import CorruptError
from datastore.formats.tokens import decode_tokens, encode_tokens

dtypes = st.sampled_from(["uint16", "uint32"])
lengths = st.lists(st.integers(0, 40), max_size=30)


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

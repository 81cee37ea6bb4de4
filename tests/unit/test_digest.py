"""Digests find every change, whatever way the bytes were cut."""

import hashlib

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from datastore.digest import DIGEST_BYTES, block_digests, check_digest, digest_bytes, digest_hex, sha256_hex
from datastore.errors import CorruptError


@given(st.lists(st.binary(max_size=50), max_size=6))
def test_chunks_have_the_digest_of_the_whole(chunks: list[bytes]) -> None:
    assert digest_bytes(*chunks) == digest_bytes(b"".join(chunks))


@given(st.binary(max_size=200), st.integers(1, 64))
def test_block_digests_are_those_of_the_blocks(data: bytes, block_bytes: int) -> None:
    blocks = [data[start : start + block_bytes] for start in range(0, len(data), block_bytes)]
    assert block_digests(data, block_bytes) == b"".join(digest_bytes(block) for block in blocks)


@given(st.binary(min_size=1, max_size=100), st.data())
def test_any_flipped_bit_is_found_and_the_bytes_are_named(data: bytes, draw: st.DataObject) -> None:
    position = draw.draw(st.integers(0, 8 * len(data) - 1))
    flipped = bytearray(data)
    flipped[position // 8] ^= 1 << position % 8
    with pytest.raises(CorruptError, match="shard 7"):
        check_digest(flipped, digest_bytes(data), where="shard 7")


@given(st.binary(max_size=100))
def test_right_bytes_pass_with_a_digest_in_either_form(data: bytes) -> None:
    check_digest(data, digest_bytes(data), where="here")
    check_digest(data, digest_hex(data), where="here")


@given(st.binary(max_size=40), st.binary(max_size=40))
def test_different_bytes_have_different_digests(one: bytes, other: bytes) -> None:
    assume(one != other)
    assert digest_bytes(one) != digest_bytes(other)


def test_the_digest_is_the_published_one() -> None:
    # https://github.com/Cyan4973/xxHash: XXH3_128bits of nothing, seed 0.
    assert digest_hex() == digest_hex(b"") == "99aa06d3014798d86001c324468d497f"
    assert len(digest_bytes(b"x")) == DIGEST_BYTES


def test_memoryviews_of_any_item_size_count_as_bytes() -> None:
    data = memoryview(bytes(range(64))).cast("I")
    assert digest_bytes(data) == digest_bytes(bytes(range(64)))
    assert block_digests(data, 16) == block_digests(bytes(range(64)), 16)


def test_sha256_is_the_standard_one() -> None:
    assert sha256_hex(b"abc") == hashlib.sha256(b"abc").hexdigest()

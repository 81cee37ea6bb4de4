"""Compressed streams: whole, in members, cut off, damaged, or built to explode."""

import bz2
import gzip
import lzma
import random

import pytest
import zstandard

from datastore.formats.decompression import open_stream
from datastore.ingestion.reading.streams import read_chunks
from datastore.storage.backends.memory import MemoryStorage

TEXT = b"".join(b"line %d of the text\n" % number for number in range(20_000))
PACK = {
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
    "zst": zstandard.ZstdCompressor(write_checksum=True).compress,
}

codecs = pytest.mark.parametrize("codec", ["gz", "zst", "bz2", "xz"])


def unpack(stored: bytes, codec: str, *, chunk: int = 1000, max_expansion: int = 200) -> tuple[bytes, str | None]:
    chunks = [stored[i : i + chunk] for i in range(0, len(stored), chunk)]
    stream = open_stream(chunks, codec=codec, max_expansion=max_expansion)  # type: ignore[arg-type]
    return b"".join(stream), stream.fault


@codecs
@pytest.mark.parametrize("chunk", [1, 17, 4096, 10**6])
def test_what_was_packed_comes_out_whatever_the_chunks(codec: str, chunk: int) -> None:
    short = TEXT[:3000] if chunk == 1 else TEXT
    assert unpack(PACK[codec](short), codec, chunk=chunk) == (short, None)


@codecs
def test_members_one_after_the_other_are_one_stream(codec: str) -> None:
    assert unpack(PACK[codec](b"one ") + PACK[codec](b"two"), codec) == (b"one two", None)


def test_zeros_after_a_gzip_member_are_padding() -> None:
    assert unpack(gzip.compress(b"one ") + bytes(100) + gzip.compress(b"two") + bytes(7), "gz") == (b"one two", None)


@codecs
def test_a_stream_that_is_cut_off_is_truncated_and_its_beginning_kept(codec: str) -> None:
    noise = random.Random(1).randbytes(2_000_000)  # bzip2 has blocks of 900,000 bytes
    found, fault = unpack(PACK[codec](noise)[:-1000], codec)
    assert fault == "truncated"
    assert noise.startswith(found)
    assert len(found) > 300_000


@codecs
def test_a_cut_at_any_byte_is_noticed(codec: str) -> None:
    stored = PACK[codec](b"a few words")
    for end in range(1, len(stored)):
        assert unpack(stored[:end], codec)[1] == "truncated", end


@codecs
def test_a_damaged_stream_is_corrupt(codec: str) -> None:
    stored = bytearray(PACK[codec](TEXT))
    stored[len(stored) // 2] ^= 0x40
    assert unpack(bytes(stored), codec)[1] == "corrupt_stream"


@codecs
def test_rubbish_after_the_stream_is_corrupt(codec: str) -> None:
    assert unpack(PACK[codec](b"text") + b"rubbish", codec) == (b"text", "corrupt_stream")


@codecs
def test_a_bomb_is_stopped_before_it_fills_the_memory(codec: str) -> None:
    found, fault = unpack(PACK[codec](bytes(300 * 2**20)), codec, chunk=2**20)
    assert fault == "bomb"
    assert len(found) < 130 * 2**20


@codecs
def test_a_small_file_may_expand_as_it_likes(codec: str) -> None:
    assert unpack(PACK[codec](bytes(2**20)), codec, max_expansion=1)[1] is None


def test_a_frame_that_wants_a_huge_window_is_refused() -> None:
    parameters = zstandard.ZstdCompressionParameters.from_level(3, window_log=28)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    stored = packer.compress(TEXT) + packer.flush()
    assert unpack(stored, "zst") == (b"", "corrupt_stream")


def test_chunks_of_a_file_begin_where_asked_and_end_with_it() -> None:
    storage = MemoryStorage("chunks")
    storage.put("f", b"0123456789")
    assert list(read_chunks(storage, "f", start=3, size_bytes=10, chunk_bytes=3)) == [b"345", b"678", b"9"]

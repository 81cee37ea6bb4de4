"""Laws of cutting: a second, obvious implementation (`bytes.split`) says what the records of a whole file are."""

import gzip
from itertools import pairwise

import hypothesis.strategies as st
import zstandard
from hypothesis import given, settings

from datastore.dataset.journal import SourceFile
from datastore.ingestion.reading.documents import Reject, TextRecord, read_part
from datastore.ingestion.reading.streams import can_be_cut, cut_evenly, lookback, split_records
from datastore.ingestion.settings import IngestSettings
from datastore.storage.backends.memory import MemoryStorage

SEPARATORS = st.sampled_from([b"\n", b"<|e|>", b"ab", b"\r\n"])
HUGE = 2**40
BOM = b"\xef\xbb\xbf"


def expected(data: bytes, separator: bytes) -> list[tuple[int, bytes]]:
    found, at = [], 0
    for part in data.split(separator):
        if part:
            found.append((at, part))
        at += len(part) + len(separator)
    return found


def chunked(data: bytes, size: int) -> list[bytes]:
    return [data[i : i + size] for i in range(0, len(data), size)]


@st.composite
def files(draw: st.DrawFn) -> tuple[bytes, bytes]:
    separator = draw(SEPARATORS)
    alphabet = st.sampled_from([separator, separator[:1], separator[-1:], b"x", b"xyz", b"yz" * 5])
    return b"".join(draw(st.lists(alphabet, max_size=60))), separator


@settings(max_examples=300, deadline=None)
@given(files(), st.integers(1, 50), st.lists(st.integers(0, 400), max_size=6))
def test_over_any_cuts_and_chunks_every_record_is_read_exactly_once(
    file: tuple[bytes, bytes], chunk: int, cuts: list[int]
) -> None:
    data, separator = file
    bounds = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
    found = []
    for start, stop in pairwise(bounds):
        chunks = chunked(data[lookback(start, separator) :], chunk)
        for piece in split_records(chunks, separator=separator, start=start, stop=stop, limit_bytes=HUGE):
            assert start <= piece.offset < stop
            assert piece.length == len(piece.data)
            found.append((piece.offset, piece.data))
    assert found == expected(data, separator)


@settings(max_examples=1000, deadline=None)
@given(files(), st.integers(1, 50), st.integers(1, 12))
def test_a_record_over_the_limit_keeps_its_place_and_length_and_loses_only_its_end(
    file: tuple[bytes, bytes], chunk: int, limit: int
) -> None:
    data, separator = file
    found = list(split_records(chunked(data, chunk), separator=separator, limit_bytes=limit))
    assert [(piece.offset, piece.length) for piece in found] == [
        (at, len(part)) for at, part in expected(data, separator)
    ]
    for piece in found:
        assert len(piece.data) == min(piece.length, limit)
        assert data.startswith(piece.data, piece.offset)


@given(files(), st.integers(1, 50))
def test_only_the_last_record_may_lack_a_separator_after_it(file: tuple[bytes, bytes], chunk: int) -> None:
    data, separator = file
    found = list(split_records(chunked(data, chunk), separator=separator, limit_bytes=HUGE))
    assert all(piece.ended for piece in found[:-1])
    if found:
        assert found[-1].ended == data.endswith(separator)


@given(st.binary(max_size=300), st.integers(1, 50))
def test_without_a_separator_everything_is_one_record(data: bytes, chunk: int) -> None:
    found = list(split_records(chunked(data, chunk), separator=b"", limit_bytes=HUGE))
    assert [(piece.offset, piece.data) for piece in found] == ([(0, data)] if data else [])


@given(st.integers(0, 10**12), st.integers(1, 200))
def test_ranges_cover_a_file_without_gap_or_overlap(size: int, parts: int) -> None:
    ranges = cut_evenly(size, size // parts + 1)
    assert ranges[0][0] == 0
    assert ranges[-1][1] == size
    assert all(before[1] == after[0] for before, after in pairwise(ranges))


@given(st.binary(min_size=1, max_size=4), st.binary(max_size=30), st.integers(0, 30))
def test_a_separator_that_can_be_cut_is_found_the_same_from_any_byte(separator: bytes, filler: bytes, at: int) -> None:
    data = filler + separator * 3 + filler
    from_start = [offset for offset, _ in expected(data, separator)]
    chunks = [data[lookback(at, separator) :]]
    if can_be_cut(separator):
        late = [p.offset for p in split_records(chunks, separator=separator, start=at, stop=HUGE, limit_bytes=HUGE)]
        assert late == [offset for offset in from_start if offset >= at or (at == 0)]


LINES = st.lists(
    st.one_of(
        st.text(max_size=20).map(lambda text: b'{"text": "' + text.encode("unicode_escape") + b'"}'),
        st.sampled_from(
            [b"", b"  ", b"{}", b'{"text": null}', b'{"text": "a\\ud800"}', b"\xff", b"[1]", b'{"text": "x", "id": 7}']
        ),
        st.binary(max_size=12),
        st.just(BOM),
    ),
    max_size=12,
)


@settings(max_examples=60, deadline=None)
@given(LINES, st.integers(1, 80), st.sampled_from(["", "gz", "zst"]))
def test_any_json_lines_cut_anywhere_give_the_documents_and_rejects_of_the_whole_file(
    lines: list[bytes], task_bytes: int, codec: str
) -> None:
    plain = b"\n".join(lines)
    if not plain:
        return
    pack = {"": bytes, "gz": gzip.compress, "zst": zstandard.ZstdCompressor().compress}[codec]
    stored = pack(plain)
    storage = MemoryStorage("split")
    storage.put("f", stored)
    file = SourceFile(
        path="f",
        size_bytes=len(stored),
        modified=storage.stat("f").modified,
        format="jsonl",
        codec=codec,  # type: ignore[arg-type]
        lone=True,
        fingerprint="0" * 32,
    )

    def read(start: int, stop: int) -> list[TextRecord | Reject | str]:
        return list(read_part(storage, "f", file=file, span=(start, stop), settings=IngestSettings()))

    whole = read(0, len(stored))
    if not codec:
        assert [found for span in cut_evenly(len(stored), task_bytes) for found in read(*span)] == whole
    assert [found.offset for found in whole if not isinstance(found, str)] == [
        offset for offset, line in expected(plain, b"\n") if (line if offset else line.removeprefix(BOM)).strip()
    ]


def test_the_beginning_of_a_separator_at_the_end_of_a_chunk_does_not_count_towards_the_limit() -> None:
    found = split_records([b"12345<|", b"e|>6"], separator=b"<|e|>", limit_bytes=6)
    assert [piece.data for piece in found] == [b"12345", b"6"]

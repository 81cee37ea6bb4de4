"""Bytes between a socket and the buffers of a caller: answers of HTTP without a copy, and ranges put together and apart.

`http.client` can read from a socket straight into a buffer; the layers above it (urllib3, botocore's stream) collect pieces and
join them, which costs as much processor time as the transfer itself. So both are asked for what lies below them.

The requests of one call are under way at once, on threads that all storages of a process share.
"""

import io
from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

from typing_extensions import Buffer

from datastore.threads import POOL_THREADS, all_at_once

__all__ = [
    "GAP_BYTES",
    "fill",
    "fill_from",
    "gather",
    "join",
    "merge_ranges",
    "ranges_at_once",
    "read_all",
    "slices",
    "total_bytes",
]

GAP_BYTES = 128 * 2**10
"""Ranges that lie closer are read as one: a request costs more than that many bytes."""


class _Source(Protocol):
    def read(self) -> bytes: ...
    def readinto(self, buffer: memoryview, /) -> int: ...


def read_all(answer: Mapping[str, Any]) -> bytes:
    """Return the whole body of an answer of botocore, and give its connection back.

    Raises:
        http.client.HTTPException: the body was cut short. And what sockets raise.
    """
    body = answer["Body"]
    try:
        data: bytes = _below(body).read()
    except BaseException:
        body.close()
        raise
    _release(body)
    return data


def fill(answer: Mapping[str, Any], view: memoryview) -> bool:
    """Fill `view` with the body of an answer of botocore; return whether there was as much. As `read_all`."""
    body = answer["Body"]
    try:
        whole = fill_from(_below(body), view)
    except BaseException:
        body.close()
        raise
    if whole:
        _release(body)
    else:
        body.close()
    return whole


def fill_from(source: _Source, view: memoryview) -> bool:
    """Fill `view` from `source`; return whether there was as much."""
    while view:
        count = source.readinto(view)
        if not count:
            return False
        view = view[count:]
    return True


def merge_ranges(ranges: Sequence[tuple[int, int]], *, gap_bytes: int) -> list[tuple[int, int]]:
    """Return ranges in ascending order that hold all of `ranges`; those less than `gap_bytes` apart become one.

    >>> merge_ranges([(8, 9), (0, 2), (3, 5), (4, 4)], gap_bytes=2)
    [(0, 5), (8, 9)]
    """
    merged: list[tuple[int, int]] = []
    for start, stop in sorted((start, stop) for start, stop in ranges if stop > start):
        if merged and start - merged[-1][1] < gap_bytes:
            merged[-1] = merged[-1][0], max(stop, merged[-1][1])
        else:
            merged.append((start, stop))
    return merged


def slices(
    ranges: Sequence[tuple[int, int]], merged: Sequence[tuple[int, int]], wholes: Sequence[memoryview]
) -> list[bytes]:
    """Return the bytes of each of `ranges`, cut from those of the `merged` ranges that hold them."""
    firsts = [first for first, _ in merged]
    found = []
    for start, stop in ranges:
        holds = bisect_right(firsts, start) - 1
        found.append(bytes(wholes[holds][start - firsts[holds] : stop - firsts[holds]]) if stop > start else b"")
    return found


def join(chunks: Sequence[Buffer]) -> bytes:
    """Return the chunks laid end to end; one that is bytes is not copied."""
    return chunks[0] if len(chunks) == 1 and isinstance(chunks[0], bytes) else b"".join(chunks)


def total_bytes(chunks: Sequence[Buffer]) -> int:
    """Return how long the chunks are, laid end to end."""
    return sum(memoryview(chunk).nbytes for chunk in chunks)


def gather(chunks: Sequence[Buffer], size_bytes: int) -> Iterator[bytes]:
    """Yield the chunks, laid end to end, in pieces of `size_bytes`; the last may be shorter."""
    piece = io.BytesIO()
    for chunk in chunks:
        rest = memoryview(chunk).cast("B")
        while rest:
            room = size_bytes - piece.tell()
            piece.write(rest[:room])
            rest = rest[room:]
            if piece.tell() == size_bytes:
                yield piece.getvalue()
                piece = io.BytesIO()
    if piece.tell():
        yield piece.getvalue()


def _below(body: Any) -> Any:
    """Return the answer of `http.client` below botocore's stream and urllib3's, or the stream itself if it has none."""
    return getattr(getattr(body, "_raw_stream", None), "_fp", None) or body


def _release(body: Any) -> None:
    release = getattr(getattr(body, "_raw_stream", None), "release_conn", None)
    if release is not None:
        release()


def ranges_at_once(read: Callable[[int, memoryview], None], ranges: Sequence[tuple[int, int]]) -> list[bytes]:
    """Return the bytes of each of `ranges`, in order; `read` fills a buffer from a position on, neighbours at one go."""
    asked = merge_ranges(ranges, gap_bytes=GAP_BYTES)
    wholes = [memoryview(bytearray(stop - start)) for start, stop in asked]
    tasks = [partial(read, start, whole) for (start, _), whole in zip(asked, wholes, strict=True)]
    all_at_once(tasks, most=POOL_THREADS)
    return slices(ranges, asked, wholes)

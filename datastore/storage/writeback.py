"""Bytes on their way to the disk while later ones are still being copied.

Left to itself the kernel collects a large file in memory and starts the disk when the flush is asked for: copying, then
waiting. Asked after each piece, both happen at once: 0.91 GB took 300 ms instead of 440 (two cores, ext4, a disk of 2 GB/s).
It is a hint and changes nothing about what is durable when: the flush at the end does that.

Source: sync_file_range(2).
"""

import ctypes
import os
import sys
from collections.abc import Iterable
from functools import cache
from typing import Protocol, cast

from typing_extensions import Buffer

__all__ = ["write_all"]

_PIECE_BYTES = 8 * 2**20
"""How much is copied between two hints."""

_SYNC_FILE_RANGE_WRITE = 2


def write_all(fd: int, chunks: Iterable[Buffer]) -> None:
    """Write the chunks, laid end to end, to the new file `fd`, and let the disk start on them early.

    Raises:
        OSError: what the kernel says.
    """
    start_disk = _sync_file_range()
    written = started = 0
    for chunk in chunks:
        rest = memoryview(chunk).cast("B")
        while rest:
            count = os.write(fd, rest[:_PIECE_BYTES])
            rest = rest[count:]
            written += count
            if written - started >= _PIECE_BYTES and start_disk is not None:
                start_disk(fd, started, written - started, _SYNC_FILE_RANGE_WRITE)
                started = written


class _Start(Protocol):
    def __call__(self, fd: int, offset: int, length: int, flags: int, /) -> int: ...


@cache
def _sync_file_range() -> _Start | None:
    """Return the C library's function, if this platform has it. What it answers does not matter."""
    if not sys.platform.startswith("linux"):
        return None
    function = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    return cast("_Start | None", function)

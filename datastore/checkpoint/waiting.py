"""Wait for another process through storage: ask again with growing pauses, and give up in finite time."""

import threading
import time
from collections.abc import Callable
from typing import TypeVar

__all__ = ["wait_until"]

T = TypeVar("T")

_FIRST_PAUSE_S = 0.002
_LONGEST_PAUSE_S = 1.0


def wait_until(ready: Callable[[], T | None], *, timeout_s: float) -> T | None:
    """Return the first value of `ready()` that is not None, or None if there was none for `timeout_s`.

    Asked at least once; the pauses double from 2 ms to 1 s, so an answer is seen at most twice as late as it came.
    """
    deadline = time.monotonic() + timeout_s
    pause = threading.Event()
    pause_s = _FIRST_PAUSE_S
    while True:
        value = ready()
        left = deadline - time.monotonic()
        if value is not None or left <= 0:
            return value
        pause.wait(min(pause_s, left))
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

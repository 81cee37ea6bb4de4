"""The first SIGTERM or SIGINT asks a run to stop; a second one ends the process at once.

After the first, the default action of both signals is back: so the second works also while the process is inside a
kernel or waits for a peer, where no Python handler would run. Nothing half-written is visible after that either.
"""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

__all__ = ["on_first_signal"]

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def on_first_signal(ask_to_stop: Callable[[], None]) -> Iterator[None]:
    """Call `ask_to_stop` at the first signal while the block runs; outside the main thread, do nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(_number: int, _frame: FrameType | None) -> None:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        ask_to_stop()

    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

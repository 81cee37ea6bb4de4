"""What a save returns: the promise that it will be staged, then committed, or that the reason why not will be heard.

An error is raised by whichever comes first: this handle, the next save, or `close`. It is raised there once; after
that a new save may try again. If none of them comes, because the program ends, it is at least logged.
"""

import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, wait
from logging import getLogger
from typing import Any

from datastore.checkpoint.format.manifest import StepCommit
from datastore.errors import WaitError

__all__ = ["Handle"]

_log = getLogger(__name__)


class Handle:
    """One save in flight. Thread-safe."""

    def __init__(self, step: int) -> None:
        self.step = step
        self._staged: Future[None] = Future()
        self._committed: Future[StepCommit] = Future()
        self._heard = threading.Event()
        weakref.finalize(self, _tell, step, self._committed, self._heard)

    def staged(self, *, timeout_s: float | None = None) -> None:
        """Wait until the state may change again: it has been copied.

        Raises:
            WaitError: it took longer than `timeout_s`; the save goes on.
            DatastoreError: the save failed.
        """
        self._wait(self._staged, timeout_s, "copied")

    def committed(self, *, timeout_s: float | None = None) -> StepCommit:
        """Wait until the step is durable on all ranks and can be restored; return its commit.

        Raises:
            WaitError: it took longer than `timeout_s`; the save goes on.
            DatastoreError: the save failed; the steps before it are intact.
        """
        self._wait(self._committed, timeout_s, "committed")
        return self._committed.result()

    @property
    def done(self) -> bool:
        """Whether the save has ended, well or not."""
        return self._committed.done()

    def wait_staged(self) -> None:
        """Wait as `staged` does; a failure is left for others to raise."""
        wait([self._staged])

    def raise_unheard(self) -> None:
        """Wait for the end; raise the error of a failed save unless it has been raised before."""
        wait([self._committed])
        if not self._heard.is_set():
            self._raise(self._committed)

    def run(self, work: Callable[[Callable[[], None]], StepCommit]) -> None:
        """Do `work`, which calls its argument when the state is staged; keep its result, or raise and keep its error."""
        try:
            commit = work(self._mark_staged)
        except BaseException as error:
            for future in (self._staged, self._committed):
                if not future.done():
                    future.set_exception(error)
            raise
        self._mark_staged()
        self._committed.set_result(commit)

    def run_here(self, work: Callable[[Callable[[], None]], StepCommit]) -> None:
        """Do `work` as `run` does, for a caller who hears of its error by this call."""
        self._heard.set()
        self.run(work)

    def _mark_staged(self) -> None:
        if not self._staged.done():
            self._staged.set_result(None)

    def _wait(self, future: Future[Any], timeout_s: float | None, what: str) -> None:
        futures: list[Future[Any]] = [future]
        wait(futures, timeout=timeout_s)
        if not future.done():
            hint = "Wait longer; the save goes on."
            raise WaitError(f"the step is not {what} yet", step=self.step, waited_s=timeout_s, hint=hint)
        self._raise(future)

    def _raise(self, future: Future[Any]) -> None:
        if future.exception() is not None:
            self._heard.set()
            future.result()


def _tell(step: int, committed: Future[StepCommit], heard: threading.Event) -> None:
    """Log the error of a save that has been forgotten."""
    error = committed.exception() if committed.done() else None
    if error is not None and not heard.is_set():
        _log.error("step %d was not saved: %s", step, error)

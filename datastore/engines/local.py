"""Processes of this machine.

They are fresh processes that import this package, not copies of the caller: nothing of the caller's threads, locks
or `__main__` gets into them, which is why it works from a notebook, too. They get a pipe and end when it ends, so a
caller that is killed leaves nobody behind, and Ctrl-C reaches the caller alone.

A worker process is `python -m datastore.engines.local FD`, where FD is its end of a pipe. It takes orders, and answers with steps and what it
made. It ends with the pipe, at once: whoever started it may be gone, and what is cut off is done again by the next run.
"""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from itertools import islice
from multiprocessing.connection import Connection, Pipe, wait
from queue import SimpleQueue

import msgspec
from typing_extensions import override

from datastore.engines.engine import Engine, Order, perform
from datastore.errors import ConfigError, DatastoreError, whole_number
from datastore.host import cores

__all__ = ["LocalEngine", "serve"]


class LocalEngine(Engine):
    """Does the work in `workers` processes of this machine; 0: in as many as there are cores."""

    def __init__(self, workers: int = 0) -> None:
        if whole_number(workers, name="workers") < 0:
            raise ConfigError(
                "not a number of processes", workers=workers, hint="Choose 1 or more; 0: one for each core."
            )
        self.workers = workers or cores()

    @override
    def map(self, work: Callable[[bytes], bytes], orders: Iterable[bytes]) -> Iterator[bytes]:
        """Yield what its processes answer, and steps as soon as they are told.

        They do orders of this package, as `work` does; so that is not sent to them.
        """
        left = iter(orders)
        crew: dict[object, _Worker] = {}
        try:
            for order in islice(left, self.workers):
                worker = _Worker()
                crew[worker.pipe] = worker
                worker.give(order)
            while busy := [worker.pipe for worker in crew.values() if worker.order is not None]:
                for pipe in wait(busy):
                    worker = crew[pipe]
                    answer, ended = worker.take()
                    if ended:
                        worker.give(next(left, None))
                    yield answer
        finally:
            for worker in crew.values():
                worker.stop()


class _Worker:
    """One process, and the order that it has."""

    def __init__(self) -> None:
        self.pipe, theirs = Pipe()
        self.order: bytes | None = None
        with theirs:
            self.process = subprocess.Popen(  # noqa: S603 - our own interpreter and module
                [sys.executable, "-m", "datastore.engines.local", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C in the terminal is for the process that can answer it.
            )

    def give(self, order: bytes | None) -> None:
        self.order = order
        if order is not None:
            with suppress(BrokenPipeError, ConnectionResetError):  # It died; reading its answer will tell.
                self.pipe.send_bytes(order)

    def take(self) -> tuple[bytes, bool]:
        """Return what it says, and whether that is the end of its order."""
        try:
            said = self.pipe.recv_bytes()
        except (EOFError, ConnectionResetError):
            raise self._died() from None
        return said[1:], said[:1] == _END

    def stop(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.wait()

    def _died(self) -> DatastoreError:
        code = self.process.wait()
        assert self.order is not None
        return DatastoreError(
            "a worker process died",
            how=signal.Signals(-code).name if code < 0 else f"exit {code}",
            **msgspec.msgpack.decode(self.order, type=Order).about,
            hint="Run the same command again; if it was out of memory, with fewer `workers` or smaller tasks or shards.",
        )


_STEP, _END = b"s", b"e"
"""What begins a message: whether it is a step, or the end of an order."""


def serve(pipe: Connection) -> None:
    """Do the orders that come through `pipe` until it ends."""
    waiting: SimpleQueue[bytes] = SimpleQueue()
    threading.Thread(target=_listen, args=(pipe, waiting), daemon=True).start()
    while True:
        order = msgspec.msgpack.decode(waiting.get(), type=Order)
        sys.path[:] = order.path or sys.path
        answer = perform(order, lambda step: pipe.send_bytes(_STEP + msgspec.msgpack.encode([step])))
        pipe.send_bytes(_END + msgspec.msgpack.encode([answer]))


def _listen(pipe: Connection, waiting: "SimpleQueue[bytes]") -> None:
    """Put what comes into `waiting`; end the process with the pipe, whatever it is doing."""
    try:
        while True:
            waiting.put(pipe.recv_bytes())
    except (EOFError, OSError):
        os._exit(0)


if __name__ == "__main__":
    # The classes of this module as others import it, not those of `__main__`.
    from datastore.engines.local import serve as imported_serve

    imported_serve(Connection(int(sys.argv[1])))

"""Several ranks on this machine: one process each, watched until all are done.

`Launch` says who a process is among the ranks. The command line makes it (from torchrun's variables) or `spawn` does; it is
never read from the environment below.

`spawn` is what `--processes N` means. The parent loads no torch; it hands each child its task on stdin, passes signals on,
relays what rank 0 reports, and when one rank fails it names that rank and ends the others. Children see the end of their
stdin when the parent dies, however it dies, and end too: no orphan trains on.

The parent binds the port on which the ranks meet and rank 0 inherits the socket, so no other program can take it between.

The first SIGTERM or SIGINT asks a run to stop; a second one ends the process at once, also while it is inside a kernel, where
no Python handler would run. Nothing half-written is visible after that either. One request may come as several signals:
systemd, Slurm and every kill of a cgroup send it to all processes, and launchers pass on what they get. So what follows
within a second is the same request, and a rank that somebody else started asks for no second one: its launcher, which dies
of that, has the last word.

One rank is `python -m datastore.training.launcher`, its task on stdin. What goes on the pipe named in the task:
`{"event": ...}` as often as it likes, then `{"result": ...}` or `{"error": ...}`.
"""

import importlib
import os
import selectors
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, NoReturn

import msgspec
import orjson

from datastore.document import Document
from datastore.errors import DatastoreError, WaitError, error_from_dict
from datastore.host import quieten

__all__ = [
    "LOST_PEER",
    "ChildOrder",
    "Launch",
    "LostPeerError",
    "leave",
    "main",
    "on_first_signal",
    "spawn",
]

LOST_PEER = 75
"""Exit status of a rank that failed only because another one did."""

_GRACE_S = 20.0
"""How long the other ranks have to end by themselves after one failed."""

_POLL_S = 0.2

_SAME_REQUEST_S = 1.0
"""Signals that come so soon after the first one are the same request, sent to a group and passed on."""


class LostPeerError(WaitError):
    """This rank can do nothing more because another one has gone; that one's end says why."""


class Launch(Document, frozen=True, kw_only=True):
    """Who this process is among the ranks, and where they meet."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    """Rank among the processes of this machine: which GPU it takes."""

    local_world: int = 1
    host: str = "127.0.0.1"
    port: int = 0
    listen_fd: int | None = None
    """A listening socket that rank 0 inherited, so that nobody else can take the port; None: rank 0 binds `port`."""

    agent_store: bool = False
    """Whether the launcher itself answers at host:port (torchrun does), rather than rank 0."""

    attempt: int = 0
    """How often the launcher has started the ranks again: one that answers itself still knows where those before could be found."""


class ChildOrder(msgspec.Struct, frozen=True, kw_only=True):
    """What the parent tells a child, as one line of JSON on its stdin."""

    target: str
    """`module:function`, called as `function(launch, arguments, report)`."""

    arguments: dict[str, Any]
    launch: Launch
    events_fd: int
    path: list[str]
    """The parent's `sys.path`: what it can import, its children can."""


@dataclass(slots=True)
class _Child:
    rank: int
    process: subprocess.Popen[bytes]
    events_fd: int
    pending: bytearray = field(default_factory=bytearray)
    result: Any = None
    done: bool = False
    """Whether it has said its result: what happens to it while it is torn down does not matter any more."""

    error: DatastoreError | None = None
    finished: bool = False
    """Whether it has closed its pipe: it is ending."""

    killed: bool = False
    """Whether the parent ended it."""


def spawn(
    target: str,
    arguments: Mapping[str, Any],
    *,
    processes: int,
    on_event: Callable[[dict[str, Any]], None] | None = None,
) -> list[Any]:
    """Run `target(launch, arguments, report)` in `processes` processes and return what each returned, by rank.

    Arguments, results and the events that rank 0 reports are JSON values.

    Raises:
        DatastoreError: what a rank raised; a WaitError that names the rank if it died without a word.
        KeyboardInterrupt: a signal came before the ranks could stop in order.
    """
    with socket.create_server(("127.0.0.1", 0), backlog=max(128, processes)) as server:
        children = [_start(target, arguments, rank=rank, world=processes, server=server) for rank in range(processes)]
    asked: list[bool] = []

    def ask_to_stop() -> None:
        asked.append(True)
        _signal_all(children, signal.SIGTERM)

    with on_first_signal(ask_to_stop):
        try:
            _watch(children, on_event or (lambda _event: None))
        finally:
            _end(children)
    if asked and any(child.process.returncode == -signal.SIGTERM for child in children):
        raise KeyboardInterrupt  # They were still starting: there was nothing to finish or to save.
    _raise_first(children)
    return [child.result for child in children]


def _start(target: str, arguments: Mapping[str, Any], *, rank: int, world: int, server: socket.socket) -> _Child:
    read_fd, write_fd = os.pipe()
    listen_fd = server.fileno() if rank == 0 else None
    launch = Launch(
        rank=rank,
        world=world,
        local_rank=rank,
        local_world=world,
        port=server.getsockname()[1],
        listen_fd=listen_fd,
    )
    task = ChildOrder(target=target, arguments=dict(arguments), launch=launch, events_fd=write_fd, path=sys.path)
    process = subprocess.Popen(
        [sys.executable, "-m", "datastore.training.launcher"],
        stdin=subprocess.PIPE,
        pass_fds=[fd for fd in (write_fd, listen_fd) if fd is not None],
        # Ctrl-C goes to the whole foreground group: children of their own session get it once, from the parent.
        start_new_session=True,
    )
    os.close(write_fd)
    assert process.stdin is not None
    try:
        process.stdin.write(msgspec.json.encode(task) + b"\n")
        process.stdin.flush()
    except BrokenPipeError:
        pass  # It died at once; `_watch` finds its exit status.
    return _Child(rank, process, read_fd)


def _watch(children: list[_Child], on_event: Callable[[dict[str, Any]], None]) -> None:
    """Relay events until all children have ended, or one has failed and the grace of the others is over."""
    deadline = float("inf")
    with selectors.DefaultSelector() as selector:
        for child in children:
            selector.register(child.events_fd, selectors.EVENT_READ, child)
        while selector.get_map() and time.monotonic() < deadline:
            for key, _ in selector.select(_POLL_S):
                if not _read(key.data, on_event):
                    key.data.finished = True
                    selector.unregister(key.fd)
            if deadline == float("inf") and any(_failed(child) for child in children):
                deadline = time.monotonic() + _GRACE_S


def _read(child: _Child, on_event: Callable[[dict[str, Any]], None]) -> bool:
    """Take in what the child wrote; return False at the end of its pipe."""
    data = os.read(child.events_fd, 1 << 16)
    child.pending += data
    *lines, rest = child.pending.split(b"\n")
    child.pending = bytearray(rest)
    for line in lines:
        message = orjson.loads(line)
        if "result" in message:
            child.result, child.done = message["result"], True
        elif "error" in message:
            child.error = error_from_dict(message["error"])
        elif child.rank == 0:
            on_event(message["event"])
    return bool(data)


def _failed(child: _Child) -> bool:
    return child.error is not None or (child.process.poll() not in {None, 0} and not child.done)


def _signal_all(children: list[_Child], number: int) -> None:
    for child in children:
        if child.process.poll() is None:
            child.process.send_signal(number)


def _end(children: list[_Child]) -> None:
    """Wait for children that have closed their pipe, end the others, close every pipe of ours."""
    for child in children:
        try:
            child.process.wait(_GRACE_S if child.finished else 0)
        except subprocess.TimeoutExpired:
            child.killed = True
            child.process.kill()
            child.process.wait()
        os.close(child.events_fd)
        if child.process.stdin is not None:
            child.process.stdin.close()


def _raise_first(children: list[_Child]) -> None:
    """Raise the failure that explains the others: what a rank said, else the death of one, else a lost peer."""
    for child in children:
        if child.error is not None:
            raise child.error
    failed = [child for child in children if child.process.returncode != 0 and not (child.done or child.killed)]
    for child in sorted(failed, key=lambda child: child.process.returncode == LOST_PEER):
        code = child.process.returncode
        raise WaitError(
            "a rank died" if code != LOST_PEER else "a rank lost its peers",
            rank=child.rank,
            cause=signal.Signals(-code).name if code < 0 else f"exit status {code}",
        )


_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def on_first_signal(ask_to_stop: Callable[[], None], *, last_word: bool = True) -> Iterator[None]:
    """Call `ask_to_stop` at the first signal while the block runs; outside the main thread, do nothing.

    A later signal ends the process, but for a rank without the `last_word`: that one ignores it, also behind the block.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    asked = threading.Event()

    def handle(_number: int, _frame: FrameType | None) -> None:
        if not asked.is_set():
            asked.set()
            ask_to_stop()

    before = {number: signal.signal(number, handle) for number in _SIGNALS}
    try:
        with _ended_by_a_second() if last_word else nullcontext():
            yield
    finally:
        ignored = asked.is_set() and not last_word
        for number, handler in before.items():
            signal.signal(number, signal.SIG_IGN if ignored else handler)


@contextmanager
def _ended_by_a_second() -> Iterator[None]:
    """While the block runs, end this process at a signal that is not the same request as the first one.

    Python writes the number of a signal to a pipe from within the handler in C, whatever its main thread is doing.
    """
    read_fd, write_fd = os.pipe()
    os.set_blocking(write_fd, False)
    before = signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
    thread = threading.Thread(target=_end_at_second, args=(read_fd,), daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.close(write_fd)
        thread.join()
        os.close(read_fd)


def _end_at_second(signals_fd: int) -> None:
    first: float | None = None
    while number := os.read(signals_fd, 1):
        if number[0] not in _SIGNALS:
            continue
        now = time.monotonic()
        if first is None:
            first = now
        elif now - first > _SAME_REQUEST_S:
            os._exit(128 + number[0])  # As a shell tells of a process that the signal has ended.


def main() -> int:
    """Run the task that stdin names; return the exit status."""
    task = msgspec.json.decode(_read_line(), type=ChildOrder)
    sys.path[:] = task.path
    quieten()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with os.fdopen(task.events_fd, "wb", buffering=0) as pipe:
        try:
            result = _call(task, lambda event: _write(pipe, {"event": event}))
        except LostPeerError:
            return LOST_PEER
        except DatastoreError as error:
            _write(pipe, {"error": error.as_dict()})
            return 1
        _write(pipe, {"result": result})
    return 0


def _read_line() -> bytes:
    """Read stdin up to a newline, without Python's buffer: a thread that waits on its lock would abort the exit."""
    line = bytearray()
    while not line.endswith(b"\n"):
        more = os.read(0, 1)
        if not more:
            sys.exit("this module is started by datastore.training.launcher")
        line += more
    return bytes(line)


def _call(task: ChildOrder, report: Any) -> Any:
    module, _, name = task.target.partition(":")
    function = getattr(importlib.import_module(module), name)
    return function(task.launch, task.arguments, report)


def _write(pipe: Any, message: dict[str, Any]) -> None:
    pipe.write(orjson.dumps(message, option=orjson.OPT_SERIALIZE_NUMPY) + b"\n")


def leave(status: int) -> NoReturn:
    """End this process, which was in a process group, without the end of the interpreter.

    That would take the group down and might wait for its threads for ever (see `connect`), or one of them still lets go of a tensor
    while the interpreter ends, which aborts the process though all is done (torch 2.13, gloo; pytorch issue 190489).
    """
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _end_with_parent() -> None:
    """End this process when its parent has closed our stdin or is gone: there is nobody left to report to."""
    while os.read(0, 1):
        pass
    os._exit(LOST_PEER)


if __name__ == "__main__":
    # The classes of this module as others import it, not those of `__main__`: `except` compares classes.
    from datastore.training.launcher import main as imported_main

    leave(imported_main())

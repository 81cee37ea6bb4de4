"""The ranks of one run: who they are, how they join and leave, how they agree.

`Ranks` is the only owner of the process group: one process needs none and gets none.
"""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, Store, TCPStore  # type: ignore[attr-defined]

from datastore.errors import WaitError
from datastore.training.launcher import Launch, LostPeerError

__all__ = ["Ranks", "connect", "was_connected"]

_MADE, _FAILED = "made ", "failed"

_LEAVE_S = 5.0
"""How long rank 0 waits for others to learn that it has failed."""

_POLL_S = 0.01


class Ranks:
    """This process and its peers. Every method must be called by all ranks, in the same order."""

    def __init__(self, launch: Launch, device: torch.device, store: Store | None) -> None:
        self.launch = launch
        self.rank, self.world = launch.rank, launch.world
        self.device = device
        self._store = store

    def share(self, name: str, make: Callable[[], str]) -> str:
        """Return on every rank what `make` returns on rank 0; `name` may be used once.

        If it raises there, the others leave without a word: rank 0 says what it is. It goes last, as the store goes with it,
        and torch logs the end of a store that somebody waits for with a page of C++ frames.

        Raises:
            LostPeerError: `make` raised on rank 0; there, what it raised.
        """
        if self._store is None:
            return make()
        key = f"share/{name}"
        if self.rank == 0:
            try:
                text = make()
            except BaseException:
                self._store.set(key, _FAILED)
                self._wait_for_leavers(key)
                raise
            self._store.set(key, _MADE + text)
            return text
        found = str(self._store.get(key).decode())
        if found == _FAILED:
            self._store.add(f"{key}/left", 1)
            raise LostPeerError("rank 0 could not go on", rank=self.rank, hint="See what it says.")
        return found.removeprefix(_MADE)

    def _wait_for_leavers(self, key: str) -> None:
        assert self._store is not None
        deadline = time.monotonic() + _LEAVE_S
        while self._store.add(f"{key}/left", 0) < self.world - 1 and time.monotonic() < deadline:
            threading.Event().wait(_POLL_S)

    def sum(self, values: Tensor) -> Callable[[], Tensor]:
        """Begin to add up `values` over all ranks, in place; the function returned waits for the sum (integers wrap)."""
        if self.world == 1:
            return lambda: values
        work = dist.all_reduce(values, async_op=True)

        def finish() -> Tensor:
            work.wait()
            return values

        return finish

    def least(self, value: int) -> int:
        """Return the least `value` of all ranks."""
        if self.world == 1:
            return value
        held = torch.tensor([value], dtype=torch.int64, device=self.device)
        dist.all_reduce(held, op=dist.ReduceOp.MIN)
        return int(held)


_GROUPS: list[object] = []
"""Groups of this process, kept until its end: DDP holds its group as well, and if it were the last to let go, torch would wait for
the group's threads with the interpreter locked, which those threads may be waiting for (torch 2.13, gloo)."""


@contextmanager
def connect(launch: Launch, *, device: torch.device, timeout_s: float) -> Iterator[Ranks]:
    """Yield the ranks once all have joined, over NCCL on GPUs and gloo elsewhere; leave the group at the end.

    Raises:
        WaitError: not all ranks came in time.
        LostPeerError: another rank died or was late while the block ran.
    """
    if launch.world == 1:
        yield Ranks(launch, device, None)
        return
    timeout = timedelta(seconds=timeout_s)
    try:
        store = TCPStore(
            launch.host,
            launch.port,
            launch.world,
            is_master=launch.rank == 0 and not launch.agent_store,
            timeout=timeout,
            wait_for_workers=False,
            master_listen_fd=launch.listen_fd,
        )
        dist.init_process_group(
            "nccl" if device.type == "cuda" else "gloo",
            store=PrefixStore(f"attempt {launch.attempt}", store),
            rank=launch.rank,
            world_size=launch.world,
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
    except dist.DistError as error:
        raise WaitError(
            "the ranks did not find each other",
            rank=launch.rank,
            world=launch.world,
            at=f"{launch.host}:{launch.port}",
            hint="Start all of them, and check that the address can be reached.",
        ) from error
    _GROUPS.append(dist.group.WORLD)
    try:
        yield Ranks(launch, device, PrefixStore(f"datastore {launch.attempt}", store))
    except RuntimeError as error:
        if not _is_lost_peer(error):
            raise
        raise LostPeerError(
            "another rank has gone", rank=launch.rank, hint="See what it says. All that was committed stands."
        ) from error
    finally:
        dist.destroy_process_group()


def was_connected() -> bool:
    """Whether this process has been in a process group: if so, it ends by `launcher.leave`."""
    return bool(_GROUPS)


def _is_lost_peer(error: RuntimeError) -> bool:
    """Gloo raises a plain RuntimeError when a peer has gone or is late; its text names the source file."""
    return isinstance(error, dist.DistError) or "gloo" in str(error).lower()

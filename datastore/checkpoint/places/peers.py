"""The ranks of a gloo group of one's own: what all say is gathered, one tells all, and bytes go from one to another.

Each call is made by all ranks, in the same order, by one thread at a time. A rank that has died makes the calls of the others fail: at once
where its connection breaks, after `timeout_s` where its machine is gone. Then the group is of no use any more. Who hears of it first
ends its own end of the group (`abort`), so that those who wait for it hear at once, too.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import AllgatherOptions, BroadcastOptions  # type: ignore[attr-defined]

from datastore.errors import ConfigError, WaitError

__all__ = ["Move", "Peers"]

_NEVER_SENT = 2**30
"""A tag that no move has."""

_SLICE_BYTES = 32 * 2**20
"""What is sent at once: `timeout_s` is for so many bytes, not for a part of any size."""


@dataclass(frozen=True, slots=True)
class Move:
    """Bytes that go to, or come from, another rank; `tag` tells them from others between the same two."""

    peer: int
    tag: int
    data: torch.Tensor
    """[N] of uint8, in the memory of this process."""


class Peers:
    """The ranks of `group`, which nobody else may use."""

    def __init__(self, group: Any, *, timeout_s: float) -> None:
        """Use `group`; nothing is sent.

        Raises:
            ConfigError: it is no gloo group, is that of the whole program, or has one rank only.
        """
        _check(group, timeout_s)
        self._group = group
        self._timeout = timedelta(seconds=timeout_s)
        self.rank: int = group.rank()
        self.world: int = group.size()

    def gather(self, data: bytes) -> list[bytes]:
        """Return the `data` of every rank, in rank order. All must have called this before any returns."""
        sizes = self._gather(torch.tensor([len(data)]))
        padded = torch.zeros(max(1, *(int(size) for size in sizes)), dtype=torch.uint8)
        padded[: len(data)] = torch.frombuffer(bytearray(data) or bytearray(1), dtype=torch.uint8)[: len(data)]
        found = self._gather(padded)
        return [each.numpy()[: int(size)].tobytes() for each, size in zip(found, sizes, strict=True)]

    def least(self, value: int) -> int:
        """Return the least `value` of all ranks. All must have called this before any returns."""
        return min(int(each) for each in self._gather(torch.tensor([value])))

    def _gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        found = [torch.empty_like(tensor) for _ in range(self.world)]
        options = AllgatherOptions()
        options.timeout = self._timeout
        with self._hearing("another rank"):
            self._group.allgather([found], [tensor], options).wait()
        return found

    def share(self, data: bytes, root: int) -> bytes:
        """Return the `data` of rank `root`."""
        size = torch.tensor([len(data)])
        self._broadcast(size, root)
        held = torch.empty(max(1, int(size)), dtype=torch.uint8)
        if self.rank == root:
            held.numpy()[: len(data)] = memoryview(data)
        self._broadcast(held, root)
        return held.numpy()[: int(size)].tobytes()

    def _broadcast(self, tensor: torch.Tensor, root: int) -> None:
        options = BroadcastOptions()
        options.rootRank, options.timeout = root, self._timeout
        with self._hearing(f"rank {root}"):
            self._group.broadcast([tensor], options).wait()

    def exchange(self, sends: Sequence[Move], receives: Sequence[Move]) -> None:
        """Carry out all moves; each has its other half, of the same size, at the other rank."""
        moves = [(False, move) for move in sends] + [(True, move) for move in receives]
        for start in range(0, max((len(move.data) for _, move in moves), default=0), _SLICE_BYTES):
            begun = [
                (self._begin(move, start, comes=comes), move.peer) for comes, move in moves if start < len(move.data)
            ]
            for work, peer in begun:
                with self._hearing(f"rank {peer}"):
                    work.wait(self._timeout)

    def _begin(self, move: Move, start: int, *, comes: bool) -> Any:
        begin = self._group.recv if comes else self._group.send
        with self._hearing(f"rank {move.peer}"):
            return begin([move.data[start : start + _SLICE_BYTES]], move.peer, move.tag)

    def abort(self) -> None:
        """End this rank's end of the group: what waits for it, here and elsewhere, fails at once."""
        # gloo's own `abort` does nothing (torch 2.13). What does is a receive that times out: it closes all connections of this rank.
        # From a rank that has gone it fails without that, so each is asked.
        for other in range(self.world):
            with suppress(RuntimeError):
                waste = torch.empty(1, dtype=torch.uint8)
                if other != self.rank:
                    self._group.recv([waste], other, _NEVER_SENT).wait(timedelta(milliseconds=1))

    @contextmanager
    def _hearing(self, whom: str) -> Iterator[None]:
        """Raise `WaitError` in place of what gloo says."""
        try:
            yield
        except RuntimeError as error:
            raise WaitError(
                f"{whom} has gone, or did not answer in time",
                rank=self.rank,
                timeout_s=self._timeout.total_seconds(),
                reason=str(error),
                hint="Make a new group of those that are left and of new ones, and call `restore(items, group=...)`.",
            ) from error


def _check(group: Any, timeout_s: float) -> None:
    hint = 'Make one that nothing else uses: dist.new_group(backend="gloo").'
    if timeout_s <= 0:
        raise ConfigError("no rank can answer in no time", timeout_s=timeout_s, hint="Set `timeout_s` above 0.")
    if not callable(getattr(group, "size", None)):
        raise ConfigError("not a process group", type=type(group).__name__, hint=hint)
    if dist.is_initialized() and group is dist.group.WORLD:
        raise ConfigError("this is the group of the whole program", hint=hint)
    backend = group.name()
    if backend != "gloo":
        raise ConfigError("copies go over gloo only", backend=backend, hint=hint)
    if group.size() < 2:
        raise ConfigError("there is no other rank that could keep a copy", world=group.size(), hint="Save to a disk.")

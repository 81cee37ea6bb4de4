"""The loop: batches become steps. It knows neither pruning nor distillation, and neither files nor signals.

    take the next batch; for each micro-batch: outputs, loss, hooks, backward
    hooks change gradients; clip; step; hooks see moved parameters
    once a step later, when it costs no waiting: what the step was like

The loss of a step is the mean over the global batch, whatever the number of ranks and micro-batches: a micro-batch counts
by its rows, and what a rank adds is scaled so that the mean over ranks is the mean over rows, also if ranks have unequal
numbers of them. Where a loss mask says which targets count, it is the mean over those: their number is summed over ranks
before the first forward pass, and a micro-batch counts by its own.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from datastore.digest import digest_bytes
from datastore.loader.batch import Batch
from datastore.training.distributed import Ranks
from datastore.training.hooks.base import Hook, RunState
from datastore.training.objectives import MicroBatch, Objective
from datastore.training.optim import set_learning_rate
from datastore.training.validation import autocast

__all__ = ["Outcome", "Watcher", "Work", "run_loop", "seed_step"]


@dataclass(frozen=True, slots=True)
class Work:
    """What the loop works with; none of it changes while it runs."""

    model: nn.Module
    """As distributed: calling it is what averages gradients."""

    objective: Objective
    hooks: Sequence[Hook]
    ranks: Ranks
    batches: Callable[[], Batch]
    rows: int
    """Samples in a global batch."""

    micro_rows: int
    precision: str
    clip: float
    rate: Callable[[int], float]
    """Learning rate of the step after so many."""

    guard: Callable[[], AbstractContextManager[None]]
    """Entered while parameters and the state of hooks move: a checkpoint may still be copying them."""

    seed: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step was like, over all ranks."""

    step: int
    cursor: int
    samples: int
    fingerprint: int
    """Below 2^64."""

    loss: float
    grad_norm: float
    lr: float
    seconds: float
    """From the end of the step before to the end of this one, on rank 0."""

    wait_seconds: float
    """Waiting for data, mean over ranks."""

    stop: bool
    """Whether any rank was asked to stop."""


class Watcher(Protocol):
    """What the loop tells, and asks."""

    def stopping(self) -> bool:
        """Whether this process was asked to stop."""
        ...

    def settled(self, outcome: Outcome) -> None:
        """Take note of a step; called in order, on every rank, a step late."""
        ...

    def due(self, step: int) -> bool:
        """Whether `pause` is wanted after `step`; every rank must answer alike."""
        ...

    def pause(self, run: RunState, *, last: bool) -> None:
        """Evaluate, save: all steps so far are settled."""
        ...


def run_loop(run: RunState, work: Work, watcher: Watcher) -> None:
    """Take steps until `run.steps`, or until some rank was asked to stop; end with a pause."""
    late: Callable[[], Outcome] | None = None
    stop = False
    clock = time.perf_counter()
    while run.step < run.steps and not stop:
        now = take_step(run, work, stopping=watcher.stopping(), since=clock)
        clock = time.perf_counter()
        if late is not None:
            stop = _settle(late, watcher)
        late = now
        last = stop or run.step == run.steps
        if last or watcher.due(run.step):
            stop = _settle(late, watcher) or stop
            late = None
            watcher.pause(run, last=stop or run.step == run.steps)
            clock = time.perf_counter()


def take_step(run: RunState, work: Work, *, stopping: bool, since: float) -> Callable[[], Outcome]:
    """Take one step; the function returned waits for its numbers."""
    started = time.perf_counter()
    batch = work.batches()
    waited = time.perf_counter() - started
    seed_step(work.seed, run.step, run.rank)
    loss = _backward(run, work, batch)
    rate = work.rate(run.step)
    set_learning_rate(run.optimizer, rate)
    with work.guard():
        for hook in work.hooks:
            hook.gradients(run)
        norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), work.clip or float("inf"))
        run.optimizer.step()
        run.optimizer.zero_grad(set_to_none=True)
        run.step += 1
        for hook in work.hooks:
            hook.updated(run)
    # Two small sums per step, looked at after the next one: `.item()` here would stall a GPU.
    valid = int(batch.valid.sum())
    exact = torch.tensor([_signed(batch.fingerprint()), valid, int(stopping)], dtype=torch.int64)
    inexact = torch.stack((loss.double(), torch.tensor(waited / run.world, dtype=torch.float64, device=loss.device)))
    sums = work.ranks.sum(exact.to(run.device)), work.ranks.sum(inexact)
    step, seconds = run.step, time.perf_counter() - since

    def finish() -> Outcome:
        fingerprint, samples, stops = sums[0]().tolist()
        mean, wait = sums[1]().tolist()
        return Outcome(
            step=step,
            cursor=batch.cursor,
            samples=samples,
            fingerprint=fingerprint % 2**64,
            loss=mean,
            grad_norm=float(norm),
            lr=rate,
            seconds=seconds,
            wait_seconds=wait,
            stop=bool(stops),
        )

    return finish


def seed_step(seed: int, step: int, rank: int) -> None:
    """Seed torch for the step after `step` steps: a resumed run draws what the undisturbed one would have drawn."""
    torch.manual_seed(int.from_bytes(digest_bytes(f"{seed}/{step}/{rank}".encode())[:8], "big"))


def _backward(run: RunState, work: Work, batch: Batch) -> Tensor:
    """Leave the gradient of the global mean in the parameters; return this rank's part of the mean."""
    total = torch.zeros((), device=run.device)
    pieces = _pieces(batch, run.device, rows=work.micro_rows)
    whole = _learned(batch, run.device, work.ranks)
    for number, micro in enumerate(pieces, start=1):
        counted = micro.learned
        rows = len(micro.tokens) / work.rows
        share = rows if whole is None or counted is None else (counted / whole).float()
        with work.ranks.accumulating(work.model, last=number == len(pieces)):
            with autocast(run.device, work.precision):
                outputs = work.objective.outputs(work.model, micro)
                loss = work.objective.loss(outputs, micro)
                for hook in work.hooks:
                    loss = hook.loss(loss, micro, outputs)
            (loss * (share * run.world)).backward()  # type: ignore[no-untyped-call]
        total += loss.detach() * share
    return total


def _pieces(batch: Batch, device: torch.device, *, rows: int) -> list[MicroBatch]:
    """Return the micro-batches of a batch. What is copied to the device are narrow token ids; they are widened there."""
    mask = batch.loss_mask
    tokens = torch.split(_to_device(torch.from_numpy(batch.tokens), device), rows)
    masks = torch.split(_to_device(torch.from_numpy(mask), device), rows) if mask is not None else [None] * len(tokens)
    return [MicroBatch(piece.long(), masked) for piece, masked in zip(tokens, masks, strict=True)]


def _learned(batch: Batch, device: torch.device, ranks: Ranks) -> Tensor | None:
    """Return how many targets of the global batch count, at least 1, as float64; None: all do."""
    mask = batch.loss_mask
    if mask is None:
        return None
    mine = torch.tensor(int(mask[:, 1:].sum()), dtype=torch.float64, device=device)
    return ranks.sum(mine)().clamp(min=1)


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def _settle(late: Callable[[], Outcome], watcher: Watcher) -> bool:
    outcome = late()
    watcher.settled(outcome)
    return outcome.stop


def _signed(value: int) -> int:
    """Return the int64 with the bits of an unsigned `value`."""
    return value - 2**64 if value >= 2**63 else value

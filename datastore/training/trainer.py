"""The loop: batches become steps. It knows neither pruning nor distillation, and neither files nor signals.

    take the next batch; for each micro-batch: outputs, loss, hooks, backward
    hooks change gradients; clip; step; hooks see moved parameters
    once a step later, when it costs no waiting: what the step was like

The loss of a step is the mean over the global batch, whatever the number of ranks and micro-batches: a micro-batch counts
by its rows, and what a rank adds is scaled so that the mean over ranks is the mean over rows, also if ranks have unequal
numbers of them. Where a loss mask says which targets count, it is the mean over those: their number is summed over ranks
before the first forward pass, and a micro-batch counts by its own.

The parts of a run, put together in the one order that works: model, hooks, device, ranks, optimizer, loader.

Hooks change the model before it is compiled and distributed, and see it again when the optimizer exists. The same seed gives
the same initial weights on any device, as they are drawn on the CPU.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import msgspec
import torch
from torch import Tensor, nn

from datastore.digest import digest_bytes
from datastore.errors import CorruptError
from datastore.loader.batch import Batch
from datastore.loader.loader import Loader
from datastore.loader.settings import Rank
from datastore.training.distributed import Ranks
from datastore.training.hooks.base import Hook, HookSet, RunState, make_hooks
from datastore.training.machine import Machine, autocast
from datastore.training.model import GPT, Block
from datastore.training.objectives import Causal, MicroBatch, Objective
from datastore.training.optim import learning_rate, make_optimizer, named_state, set_learning_rate
from datastore.training.run.data import Split
from datastore.training.run.folder import RunConfig
from datastore.training.settings import Settings

__all__ = ["Observer", "Parts", "StepOutcome", "Work", "assemble", "build_model", "run_loop", "seed_step"]


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
class StepOutcome:
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


class Observer(Protocol):
    """What the loop tells, and asks."""

    def stopping(self) -> bool:
        """Whether this process was asked to stop."""
        ...

    def settled(self, outcome: StepOutcome) -> None:
        """Take note of a step; called in order, on every rank, a step late."""
        ...

    def due(self, step: int) -> bool:
        """Whether `pause` is wanted after `step`; every rank must answer alike."""
        ...

    def pause(self, run: RunState, *, last: bool) -> None:
        """Evaluate, save: all steps so far are settled."""
        ...


def run_loop(run: RunState, work: Work, watcher: Observer) -> None:
    """Take steps until `run.steps`, or until some rank was asked to stop; end with a pause."""
    late: Callable[[], StepOutcome] | None = None
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


def take_step(run: RunState, work: Work, *, stopping: bool, since: float) -> Callable[[], StepOutcome]:
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

    def finish() -> StepOutcome:
        fingerprint, samples, stops = sums[0]().tolist()
        mean, wait = sums[1]().tolist()
        return StepOutcome(
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


def _settle(late: Callable[[], StepOutcome], watcher: Observer) -> bool:
    outcome = late()
    watcher.settled(outcome)
    return outcome.stop


def _signed(value: int) -> int:
    """Return the int64 with the bits of an unsigned `value`."""
    return value - 2**64 if value >= 2**63 else value


@dataclass(frozen=True, slots=True)
class Parts:
    """What a session works with."""

    settings: Settings
    machine: Machine
    run: RunState
    wrapped: nn.Module
    """The model as the loop calls it; `run.model` is what hooks and checkpoints see."""

    hooks: Mapping[str, Hook]
    objective: Objective
    loader: Loader
    vocab_size: int
    ranks: Ranks

    @property
    def micro_rows(self) -> int:
        """Samples per forward pass."""
        share = -(-self.settings.data.global_batch // self.ranks.world)
        return min(self.settings.train.micro_batch or share, share)

    def items(self) -> dict[str, Any]:
        """Return what a checkpoint holds, besides the record; tensors are the live ones."""
        return {
            "model": self.run.model,
            "optim": named_state(self.run.model, self.run.optimizer),
            "hooks": HookSet(self.hooks),
            "data": self.loader,
        }

    def work(self, guard: Callable[[], AbstractContextManager[None]]) -> Work:
        """Return what the loop needs."""
        optim, steps = self.settings.optim, self.settings.train
        return Work(
            model=self.wrapped,
            objective=self.objective,
            hooks=tuple(self.hooks.values()),
            ranks=self.ranks,
            batches=partial(_next_batch, self.loader, self.vocab_size),
            rows=self.settings.data.global_batch,
            micro_rows=self.micro_rows,
            precision=self.machine.precision,
            clip=optim.clip,
            rate=lambda step: learning_rate(optim, step, steps.steps),
            guard=guard,
            seed=steps.seed,
        )


def build_model(config: RunConfig) -> GPT:
    """Return the GPT of a run with its initial weights, on the CPU."""
    model = GPT(msgspec.structs.replace(config.settings.model, vocab_size=config.vocab_size))
    seed = digest_bytes(f"{config.settings.train.seed}/weights".encode())[:8]
    model.initialize(torch.Generator().manual_seed(int.from_bytes(seed, "big")))
    return model


def assemble(config: RunConfig, split: Split, ranks: Ranks, *, machine: Machine) -> Parts:
    """Return the parts of the run before its first step.

    Raises:
        ConfigError: a hook is unknown or wrongly set; the dataset has no sample.
    """
    settings = config.settings
    hooks = make_hooks(settings.hooks, where="settings")
    model: nn.Module = build_model(config)
    for hook in hooks.values():
        model = hook.model(model)
    model.to(ranks.device)
    if machine.compiled:
        for block in _blocks(model):
            block.compile()
    wrapped = ranks.distribute(model)
    objective = Causal()
    run = RunState(
        model=model,
        optimizer=make_optimizer(model, settings.optim),
        step=0,
        steps=settings.train.steps,
        rank=ranks.rank,
        world=ranks.world,
        device=ranks.device,
    )
    for hook in hooks.values():
        hook.start(run)
    loader = Loader(
        split.training,
        seq_len=settings.data.seq_len,
        global_batch=settings.data.global_batch,
        seed=settings.data.seed,
        rank=Rank(ranks.rank, ranks.world),
        options=settings.loader,
    )
    parts = Parts(settings, machine, run, wrapped, hooks, objective, loader, config.vocab_size, ranks)
    if ranks.world > 1 or machine.compiled:
        ranks.settle(wrapped, partial(_loss_of_zeros, parts))
    return parts


def _blocks(model: nn.Module) -> list[nn.Module]:
    """Return what is compiled, each by itself: the same code, so it is compiled once, and hooks keep their modules."""
    return [module for module in model.modules() if isinstance(module, Block)]


def _loss_of_zeros(parts: Parts) -> torch.Tensor:
    shape = (parts.micro_rows, parts.settings.data.seq_len + 1)
    batch = MicroBatch(torch.zeros(shape, dtype=torch.int64, device=parts.run.device))
    with autocast(parts.run.device, parts.machine.precision):
        return parts.objective.loss(parts.objective.outputs(parts.wrapped, batch), batch)


def _next_batch(loader: Loader, vocab_size: int) -> Batch:
    """Return the next batch; a token that the model has no embedding for would end a GPU's process without a word."""
    batch = next(loader)
    largest = int(batch.tokens.max())
    if largest >= vocab_size:
        raise CorruptError(
            "a token is outside of the vocabulary",
            token=largest,
            vocab_size=vocab_size,
            cursor=batch.cursor,
            hint="Set model.vocab_size, or ingest with a tokenizer.",
        )
    return batch

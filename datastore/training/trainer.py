"""The trainer of one rank: its parts put together in the one order that works, and the loop that makes steps of batches.

    build   model, hooks, device, compile, ranks, optimizer, hooks again, loader
    step    the next batch; for each piece of it: outputs, loss, hooks, backward, as the strategy has it
            hooks change gradients; clip; step; hooks see moved parameters
    run     steps, each looked at one step late, when it costs no waiting; pauses where the observer wants one

The loop knows neither pruning nor distillation, and neither files nor signals. The same seed gives the same initial weights
on any device, as they are drawn on the CPU.

The loss of a step is the mean over the global batch, whatever the number of ranks and micro-batches: a micro-batch counts
by its rows, and what a rank adds is scaled so that the mean over ranks is the mean over rows, also if ranks have unequal
numbers of them. Where a loss mask says which targets count, it is the mean over those: their number is summed over ranks
before the first forward pass, and a micro-batch counts by its own.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self, cast

import msgspec
import torch
from torch import Tensor

from datastore.errors import ConfigError, CorruptError
from datastore.loader.settings import Rank
from datastore.training.hooks.base import Hook, HookSet, RunState
from datastore.training.machine import Machine, seed_step, signed
from datastore.training.metrics import StepOutcome
from datastore.training.objectives.base import Context, HostRows, MicroBatch, Objective, Signed, rows_of
from datastore.training.objectives.catalog import make_objective
from datastore.training.optim import LossScale, Sentry, divide, learning_rate, set_learning_rate
from datastore.training.parallel.building import Beginning, build_with_hooks, calibration_of
from datastore.training.parallel.layout import check_model
from datastore.training.parallel.lesson import Lesson, Piece
from datastore.training.parallel.norm import local_part
from datastore.training.parallel.ranks import Ranks
from datastore.training.parallel.strategy import Strategy
from datastore.training.run.architecture import context_of
from datastore.training.run.feed import AnyFeed, FedBatch, open_feed, saved
from datastore.training.run.folder import RunConfig
from datastore.training.run.profile import part
from datastore.training.run.split import Split
from datastore.training.settings import Settings

__all__ = ["Observer", "StepOutcome", "Trainer"]


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

    def rewind(self) -> None:
        """Bring back the weights of the last good step: all steps so far are settled."""
        ...


@dataclass(slots=True, kw_only=True)
class Trainer:
    """One rank's model, optimizer, hooks and data, and the loop that moves them."""

    settings: Settings
    context: Context
    strategy: Strategy
    """How the ranks share the work."""

    machine: Machine
    state: RunState
    """What hooks and checkpoints see; `state.model` is this rank's part of the model."""

    hooks: Mapping[str, Hook]
    objective: Objective
    loader: AnyFeed
    scale: LossScale | None = None
    """Of a run in float16."""

    sentry: Sentry
    """What becomes of a step with a bad gradient."""

    guard: Callable[[], AbstractContextManager[None]] = nullcontext
    """Entered while parameters and the state of hooks move: a checkpoint may still be copying them."""

    @classmethod
    def build(
        cls,
        config: RunConfig,
        split: Split,
        strategy: Strategy,
        *,
        machine: Machine,
        beginning: Beginning,
    ) -> Self:
        """Return the trainer of the run before its first step, with the weights of `beginning`, or else those that its seed gives.

        Raises:
            ConfigError: a hook or the objective is unknown or wrongly set; the dataset has no sample; no loss reaches a parameter.
        """
        settings, layout = config.settings, strategy.layout
        shape = msgspec.structs.replace(settings.model, vocab_size=config.vocab_size)
        if not shape.use:
            check_model(shape, layout, seq_len=settings.data.seq_len)
        objective = make_objective(settings.objective)
        context = context_of(config)
        calibration = calibration_of(config, split, objective, strategy.ranks.device)
        built = (config, strategy, objective, calibration)
        state, hooks = build_with_hooks(*built, fit=machine.fit, beginning=beginning)
        rank = Rank(strategy.place.reader, layout.readers)
        loader = open_feed(split, settings, objective, context, rank=rank)
        trainer = cls(
            settings=settings,
            context=context,
            strategy=strategy,
            machine=machine,
            state=state,
            hooks=hooks,
            objective=objective,
            loader=loader,
            scale=LossScale() if machine.precision == "fp16" else None,
            sentry=Sentry(settings.faults, scaled=machine.precision == "fp16"),
        )
        trainer._refuse_short_data()
        trainer._refuse_unreached()
        if layout.world > 1 or machine.compiled:
            strategy.settle(state.model, trainer.lesson, trainer._zeros(trainer.micro_rows))
        return trainer

    @property
    def ranks(self) -> Ranks:
        """All ranks of the run."""
        return self.strategy.ranks

    @property
    def lesson(self) -> Lesson:
        """What is learned from some rows."""
        return Lesson(self.objective, self.hooks, self.state.device, self.machine.precision)

    @property
    def factor(self) -> float:
        """What the loss is multiplied by before it goes backward."""
        return 1.0 if self.scale is None else self.scale.factor.item()

    @property
    def micro_rows(self) -> int:
        """Samples per forward pass."""
        return self.strategy.micro_rows(self.settings.data.global_batch, self.settings.train.micro_batch)

    def items(self) -> dict[str, Any]:
        """Return what a checkpoint holds, besides the record; tensors are the live ones."""
        return {
            **self.strategy.items(self.state.model, self.state.optimizer),
            **({} if self.scale is None else {"scale": self.scale.state()}),
            **self.sentry.items(),
            "hooks": HookSet(self.hooks),
            **({} if self.objective.frozen is None else {"reference": self.objective.frozen}),
            **({} if not self.objective.signature else {"objective": Signed(self.objective.signature)}),
            "data": saved(self.loader),
        }

    def run(self, observer: Observer) -> None:
        """Take steps until `state.steps`, or until some rank was asked to stop; end with a pause."""
        state = self.state
        late: Callable[[], StepOutcome] | None = None
        stop = False
        clock = time.perf_counter()
        while state.step < state.steps and not stop:
            stopping = observer.stopping()
            with part("step"):
                now = self.step(stopping=stopping, since=clock)
            clock = time.perf_counter()
            if late is not None:
                stop = _settle(late, observer)
            late = now
            rewinding = self.sentry.verdict == "rewind"
            last = stop or state.step == state.steps
            if last or rewinding or observer.due(state.step):
                stop = _settle(late, observer) or stop
                late = None
                if rewinding:
                    observer.rewind()
            if late is None and (last or stop or observer.due(state.step)):
                observer.pause(state, last=stop or state.step == state.steps)
                clock = time.perf_counter()

    def step(self, *, stopping: bool, since: float) -> "Callable[[], StepOutcome]":
        """Take one step; the function returned waits for its numbers."""
        state = self.state
        started = time.perf_counter()
        with part("data"):
            batch = self._next_batch()
        waited = time.perf_counter() - started
        seed_step(self.settings.train.seed, state.step, self.strategy.place.reader)
        with self.guard() if self.strategy.keeps else nullcontext():
            loss = self.strategy.backward(self._pieces(batch), replace(self.lesson, scale=self.factor))
        rate = learning_rate(self.settings.optim, state.step, self.settings.train.steps)
        set_learning_rate(state.optimizer, rate)
        with self.guard(), part("optimizer"):
            norm = self._update()
        # Two small sums per step, looked at after the next one: `.item()` here would stall a GPU.
        read = [signed(batch.fingerprint()), int(batch.valid.sum())]
        counts = [*(read if self.strategy.place.speaks else [0, 0]), int(stopping)]
        exact = self.ranks.sum(torch.tensor(counts, dtype=torch.int64).to(state.device))
        mean_wait = torch.tensor(waited / state.world, dtype=torch.float64, device=loss.device)
        inexact = self.ranks.sum(torch.stack((loss.double(), mean_wait)))
        step, seconds = state.step, time.perf_counter() - since
        fault, cause = self.sentry.verdict, self.sentry.cause

        def finish() -> StepOutcome:
            fingerprint, samples, stops = exact().tolist()
            mean, wait = inexact().tolist()
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
                fault=fault,
                cause=cause,
            )

        return finish

    def _pieces(self, batch: FedBatch) -> list[Piece]:
        settings = self.settings
        with part("data"):
            rows = self.objective.prepare(batch, self.context)
        return self.strategy.pieces(rows, rows=self.micro_rows, global_batch=settings.data.global_batch)

    def _update(self) -> Tensor:
        """Move the parameters along their gradients; return the norm of those before clipping."""
        state = self.state
        if self.scale is not None:
            divide(state.model.parameters(), self.factor)
        for hook in self.hooks.values():
            hook.gradients(state)
        norm = self.strategy.clip(state.model, self.settings.optim.clip or float("inf"))
        if self.sentry.judge(norm):
            pass  # Neither weights nor moments take note of it.
        elif self.scale is None or self.scale.update(finite=bool(norm.isfinite())):
            state.optimizer.step()
        else:
            norm = torch.zeros_like(norm)  # Of what the parameters have moved along.
        state.optimizer.zero_grad(set_to_none=True)
        state.step += 1
        self.strategy.moved(state.model, state.step)
        for hook in self.hooks.values():
            hook.updated(state)
        return norm

    def _next_batch(self) -> FedBatch:
        """Return the next batch; a token that the model has no embedding for would end a GPU's process without a word."""
        batch = next(cast("Iterator[FedBatch]", self.loader))
        largest = int(batch.tokens.max(initial=0))
        if largest >= self.context.vocab_size:
            raise CorruptError(
                "a token is outside of the vocabulary",
                token=largest,
                vocab_size=self.context.vocab_size,
                cursor=batch.cursor,
                hint="Set model.vocab_size, or ingest with a tokenizer.",
            )
        return batch

    def _zeros(self, rows: int) -> MicroBatch:
        return self.strategy.seen(_moved(self.objective.blank(rows, self.context), self.state.device))

    def can_go_on(self) -> bool:
        """Return whether the weights give a finite loss and finite gradients: a step on one row of zeros, not taken."""
        loss, gradients = self._probe()
        finite = all(bool(local_part(one).isfinite().all()) for one in (loss, *gradients.values()) if one is not None)
        return bool(self.ranks.least(int(finite)))

    def _refuse_unreached(self) -> None:
        """Refuse parameters without a gradient: one process would leave them as they are, and several would wait for them."""
        unreached = [name for name, gradient in self._probe()[1].items() if gradient is None]
        if unreached:
            raise ConfigError(
                "the loss does not depend on a parameter",
                parameters=unreached[:8],
                hint="Freeze it (requires_grad = False), or use it in the objective or in a hook's loss.",
            )

    def _refuse_short_data(self) -> None:
        """Refuse more steps than a mixture whose sources all end has whole batches for."""
        end, settings = self.loader.end, self.settings
        if end is not None and settings.train.steps > end // settings.data.global_batch:
            raise ConfigError(
                "the sources end before the last step",
                steps=settings.train.steps,
                there_are=end // settings.data.global_batch,
                hint="Lower train.steps, or leave out the epochs of a source, which then goes on.",
            )

    def _probe(self) -> tuple[Tensor, dict[str, Tensor | None]]:
        """Return a loss and the gradients of this rank's part by parameter; nothing is changed."""
        rows = self._zeros(self.micro_rows if self.machine.compiled else 1)
        return self.strategy.probe(self.state.model, self.lesson, rows)


def _moved(rows: HostRows, device: torch.device) -> MicroBatch:
    moved = rows_of(rows, device)
    return replace(moved, tokens=moved.tokens.long())


def _settle(late: Callable[[], StepOutcome], observer: Observer) -> bool:
    observer.settled(outcome := late())
    return outcome.stop

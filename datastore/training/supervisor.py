"""The supervisor of a run, between its steps: the record of what was consumed, metrics, progress, evaluations, checkpoints.

A step is saved with everything that it needs to be gone on from, in one commit: weights, optimizer, hooks, the loader's
cursor, and the link to the record of how the weights came to be. Rank 0 writes what is the same on all ranks.

A save that fails is told as soon as that is known, and training goes on: the next save, or the one at the end, stores the
newest state, if what was in its way has gone. Only the last one ends the session. The price is that a disk which stays
full costs the steps since the last save that did not fail, as it would have anyway.

Weights that are not finite are not saved. A step whose weights are finite and lead to a loss that is not is only known
by the step after it: so it is on trial until then, and dropped if it does, for the one before it.
"""

import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from dataclasses import asdict, dataclass, replace
from logging import getLogger
from typing import Any

import msgspec
from typing_extensions import override

from datastore.checkpoint.checkpointer import Checkpointer
from datastore.checkpoint.items import PerRank
from datastore.checkpoint.saving.saver import Handle
from datastore.errors import ConfigError, ConflictError, DatastoreError
from datastore.storage.base import Storage
from datastore.storage.statistics import total_statistics
from datastore.training.hooks.base import RunState, numbers_of
from datastore.training.machine import device_memory, flops_per_token, peak_flops
from datastore.training.metrics import MetricsWriter, StepMeter, TrainingProgress
from datastore.training.parallel.norm import all_finite, tensors_of
from datastore.training.run.lock import RunLock
from datastore.training.run.profile import Profiler, part
from datastore.training.run.record import ConsumptionRecord, StepEntry
from datastore.training.run.split import ValidationSamples
from datastore.training.trainer import Observer, StepOutcome, Trainer
from datastore.training.validation import validation_loss

__all__ = ["Outputs", "Supervisor"]

_PROGRESS_S = 0.25

_LOGGER = getLogger(__name__)

_CACHE_NUMBERS = (
    *("hits", "misses", "hit_rate", "wait_s", "ahead", "fills", "filled_bytes", "resident_bytes", "evictions"),
    *("requests", "fetched_bytes", "disk_hits", "disk_hit_bytes", "disk_writes", "disk_evictions"),
)
"""What a line of metrics has of the loader's cache, that of rank 0: counts since the start, but `ahead` and `resident_bytes` are of now."""

_SENTRY = "sentry"
"""The item that a run has if `[faults]` has a policy, which may come and go."""

_FAULTS = {
    "skip": "step {step} moved nothing: its gradient was bad ({cause})",
    "rewind": "step {step} moved nothing and ends in a rewind: its gradient was bad ({cause})",
}

_ADVICE = "Resume with a lower optim.lr (`--set`), or look at the data with `datastore trace`."


@dataclass(frozen=True, slots=True)
class Outputs:
    """Where rank 0 writes; other ranks have none of it."""

    storage: Storage
    lock: RunLock
    metrics: MetricsWriter
    report: Callable[[TrainingProgress], None]
    trouble: Callable[[], str] = str
    """What is to be told of trackers."""


class Supervisor(Observer):
    """Keeps one run on one rank. Every rank has one; rank 0's has `outputs`."""

    def __init__(
        self,
        trainer: Trainer,
        *,
        session: str,
        checkpointer: Checkpointer,
        samples: Sequence[ValidationSamples],
        stop: threading.Event,
    ) -> None:
        self._trainer = trainer
        self._settings = trainer.settings
        self._session = session
        self._checkpointer = checkpointer
        self._samples = samples
        self._stop = stop
        self._record = ConsumptionRecord()
        self._items = trainer.items() | {"record": self._record}
        self._sample_tokens = trainer.objective.tokens_per_sample(self._settings.data.seq_len)
        self.meter = StepMeter(tokens_per_step=self._settings.data.global_batch * self._sample_tokens)
        self._line: dict[str, Any] = {}
        self._saving: Handle | None = None
        self._segments: list[tuple[str, bytes]] = []
        """Segments of the record that no committed step has brought to the storage yet."""

        self._reported = 0.0
        self._faults: Counter[str] = Counter()
        ours = trainer.objective.reads == "tokens" and not self._settings.model.use
        self._peak = peak_flops(trainer.state.device, trainer.machine.precision) if ours else None
        self._flops_per_token = flops_per_token(
            self._settings.model,
            parameters=trainer.strategy.parameters(trainer.state.model),
            seq_len=self._settings.data.seq_len,
        )
        self.outputs: Outputs | None = None
        self.profiler: Profiler | None = None
        self.last: StepOutcome | None = None
        self.validation_loss: float | None = None

    def restore(self) -> str:
        """Load the newest sound checkpoint, if there is one; return a note about it."""
        if self._trainer.ranks.least(self._checkpointer.latest() or 0) == 0:
            return ""
        shared, note, partial = self._restorable(self._checkpointer.steps()[-1])
        found = self._checkpointer.restore(shared, agree=self._trainer.ranks.least, partial=partial, fresh=True)
        if note:
            self._trainer.strategy.begin_anew()
        self._trainer.state.step = found.step
        self.validation_loss = found.metrics.get("validation_loss")
        return "; ".join(filter(None, (f"resumed at step {found.step}", note, *found.passed_over)))

    def _restorable(self, step: int) -> tuple[dict[str, Any], str, bool]:
        """Return the items to restore, what to tell if what each rank has of its own is not among them, and whether some are left."""
        report = self._checkpointer.inspect(step)
        names = {item.name for item in report.items}
        items = {name: item for name, item in self._items.items() if name != _SENTRY or name in names}
        left = _SENTRY in names and _SENTRY not in items
        saved = {name.partition("@")[0] for name in names if "@" in name}
        own = {name for name, item in self._items.items() if isinstance(item, PerRank)}
        before, now = report.summary.world, self._trainer.ranks.world
        if saved == own and (not own or before == now):
            return items, "", left
        shared = {name: item for name, item in items.items() if name not in own}
        told = f"what each of {before} ranks kept between steps for [sync] is left, {now} begin without it"
        return shared, told, True

    @override
    def stopping(self) -> bool:
        if self.profiler is not None:
            self.profiler.before(self._trainer.state.step + 1)
        return self._stop.is_set()

    @override
    def settled(self, outcome: StepOutcome) -> None:
        if not outcome.fault and not (math.isfinite(outcome.loss) and math.isfinite(outcome.grad_norm)):
            raise DatastoreError(
                f"the {'gradient' if math.isfinite(outcome.loss) else 'loss'} is not finite",
                step=outcome.step,
                loss=outcome.loss,
                grad_norm=outcome.grad_norm,
                hint=f"{self._drop_what_led_to(outcome.step)} {_ADVICE}",
            )
        if self._saving is not None and outcome.step > self._saving.step and not outcome.fault:
            self._checkpointer.approve()
        self._listen()
        self._record.add(
            StepEntry(
                step=outcome.step,
                cursor=outcome.cursor,
                samples=outcome.samples,
                fingerprint=f"{outcome.fingerprint:016x}",
                fault=outcome.fault,
                rewound_to=self._checkpointed() if outcome.fault == "rewind" else None,
            )
        )
        self.meter.add(seconds=outcome.seconds, waited=outcome.wait_seconds)
        if outcome.fault:
            self._faults[f"faults_{outcome.fault}"] += 1
            self.tell(_FAULTS[outcome.fault].format(step=outcome.step, cause=outcome.cause))
        else:
            self.last = outcome
        if self.outputs is not None:
            self._write_line()
            self._line = self._numbers(outcome)
            if time.monotonic() - self._reported > _PROGRESS_S:
                self.tell()

    @override
    def due(self, step: int) -> bool:
        return self._eval_due(step) or self._save_due(step)

    @override
    def pause(self, run: RunState, *, last: bool) -> None:
        finished = run.step == run.steps
        if finished or (self._eval_due(run.step) and not last):  # Who was asked to stop has no time for it.
            with part("evaluate"):
                self._evaluate(run.step)
        if self._save_due(run.step) or last:
            with part("save"):
                self._save(run.step, blocking=last, finished=finished)
        if last:
            self._write_line()
        self.tell()

    @override
    def rewind(self) -> None:
        good = self._checkpointed()
        if good == 0:
            raise DatastoreError(
                "there is no checkpoint to rewind to",
                step=self._trainer.state.step,
                hint='Lower optim.lr, save earlier (checkpoint.every), or set faults.non_finite = "skip".',
            )
        shared, note, _ = self._restorable(good)
        weights = {name: item for name, item in shared.items() if name not in {"data", "record", _SENTRY}}
        self._checkpointer.restore(weights, step=good, agree=self._trainer.ranks.least, partial=True)
        if note:
            self._trainer.strategy.begin_anew()
        self.tell(f"the weights are those of step {good} again")

    def _checkpointed(self) -> int:
        """Return the newest step that is stored, the same on every rank; 0: there is none."""
        if self._saving is not None:
            wait([self._saving.ended])
            self._listen()
        return self._trainer.ranks.least(self._checkpointer.latest() or 0)

    def tell(self, note: str = "") -> None:
        """Report where the run is, on rank 0."""
        if self.outputs is None:
            return
        self._reported = time.monotonic()
        progress = self.meter.progress(self._trainer.state.step, self._settings.train.steps)
        loss = self.last.loss if self.last is not None else None
        self.outputs.report(
            msgspec.structs.replace(progress, loss=loss, validation_loss=self.validation_loss, note=note)
        )

    def _eval_due(self, step: int) -> bool:
        every = self._settings.eval.every
        return bool(every) and step % every == 0

    def _save_due(self, step: int) -> bool:
        every = self._settings.checkpoint.every
        return bool(every) and step % every == 0

    def _evaluate(self, step: int) -> None:
        if not self._samples:
            return
        trainer = self._trainer
        found = validation_loss(
            trainer.state.model,
            self._samples,
            lesson=replace(trainer.lesson, hooks={}),
            strategy=trainer.strategy,
            rows=trainer.micro_rows,
        )
        if not math.isfinite(found.loss):
            raise DatastoreError("the validation loss is not finite", step=step, loss=found.loss, hint=self._unsaved())
        self.validation_loss = self._line["validation_loss"] = found.loss
        self._line |= {f"validation_loss/{name}": loss for name, loss in found.sources.items()}

    def _save(self, step: int, *, blocking: bool, finished: bool) -> None:
        state = self._trainer.state
        sound = bool(self._trainer.ranks.least(int(all_finite(tensors_of(state.model, state.optimizer)))))
        if not sound or not self._trainer.can_go_on():
            what = "the step has left weights whose loss is" if sound else "the weights or their moments are"
            raise DatastoreError(f"{what} not finite", step=step, hint=self._unsaved())
        if self._saving is not None:
            wait([self._saving.ended])
            self._listen()
        self._trainer.strategy.rest()
        segment = self._record.close_segment(self._session)
        metrics: Future[None] | None = None
        if self.outputs is not None:
            if self.outputs.lock.lost:
                raise ConflictError("another process has taken over this run", run=self.outputs.storage.url, step=step)
            self._segments += [segment] if segment is not None else []
            self._write_line()
            metrics = self.outputs.metrics.flush()
        started = time.perf_counter()
        numbers = {"loss": self.last.loss if self.last else None, "validation_loss": self.validation_loss}
        self._saving = self._checkpointer.save(
            step,
            self._items,
            metrics=numbers,
            blocking=blocking,
            first=lambda: self._store_segments(metrics),
            on_trial=not finished,
        )
        if self.outputs is not None:
            self.outputs.metrics.amend({"save_stall_s": time.perf_counter() - started})

    def _store_segments(self, metrics: Future[None] | None) -> None:
        """Store what the step that is being saved refers to, and wait until its metrics are stored, or have failed."""
        while self.outputs is not None and self._segments:
            self.outputs.storage.put(*self._segments[0])
            del self._segments[0]
        if metrics is not None:
            wait([metrics])

    def _listen(self) -> None:
        """Tell of a save, or of metrics, that have failed since this was called last.

        Raises:
            ConflictError, ConfigError: the save failed for a reason that stays.
        """
        error = self._saving.failure() if self._saving is not None else None
        if self._saving is not None and error is not None:
            step, self._saving = self._saving.step, None
            if isinstance(error, ConflictError | ConfigError):
                raise error
            self.tell(f"step {step} was not saved, a later one will be tried: {error}")
        if (lost := self._checkpointer.copy_failure()) is not None:
            self.tell(f"the second place lacks a checkpoint, the next one will bring it along: {lost}")
        if self.outputs is None:
            return
        if (trouble := self.outputs.metrics.trouble()) is not None:
            self.tell(f"metrics were not stored, they will be tried again: {trouble}")
        if left_out := self.outputs.trouble():
            self.tell(left_out)

    def _drop_what_led_to(self, step: int) -> str:
        """Drop the checkpoint of the step before `step`, if there is an older one; return what to go on from."""
        try:
            if self._saving is not None:
                wait([self._saving.ended])
                self._listen()
            steps = self._checkpointer.steps()
            if not steps or steps[-1] < step - 1:
                return self._newest()
            if len(steps) == 1:
                return f"The only checkpoint, that of step {steps[-1]}, leads to this step."
            self._checkpointer.rewind(steps[-2])
        except DatastoreError as error:
            _LOGGER.warning("the checkpoint before step %d could not be dropped: %s", step, error)
            return f"The checkpoint of step {step - 1} may lead to this step; see `datastore checkpoint rewind`."
        return f"The checkpoint of step {steps[-1]} led to this step and was dropped; the newest is that of step {steps[-2]}."

    def _newest(self) -> str:
        step = self._checkpointer.latest()
        return f"The newest checkpoint is that of step {step}." if step else "No step is saved: the run begins anew."

    def _unsaved(self) -> str:
        return f"This step is not saved. {self._newest()} {_ADVICE}"

    def _numbers(self, outcome: StepOutcome) -> dict[str, Any]:
        line: dict[str, Any] = {
            "step": outcome.step,
            "time": time.time(),
            "tokens": (outcome.cursor + outcome.samples) * self._sample_tokens,
            "loss": outcome.loss,
            "grad_norm": outcome.grad_norm,
            "lr": outcome.lr,
            "tokens_per_s": outcome.samples * self._sample_tokens / outcome.seconds,
            "data_wait": outcome.wait_seconds / outcome.seconds,
            "memory_bytes": device_memory(self._trainer.state.device),
        }
        if self._trainer.scale is not None:
            line["loss_scale"] = self._trainer.factor
        if self._peak is not None:
            line["mfu"] = line["tokens_per_s"] * self._flops_per_token / (self._peak * self._trainer.ranks.world)
        cache = self._trainer.loader.stats()
        line |= {f"cache_{key}": cache[key] for key in _CACHE_NUMBERS if key in cache}
        spent = total_statistics(self._trainer.loader.storage.statistics())
        line |= {f"storage_{name}": value for name, value in asdict(spent).items()}
        line |= self._trainer.strategy.metrics()
        line |= self._faults
        if outcome.fault:
            line["fault"] = outcome.cause
        line |= numbers_of(self._trainer.hooks, taken=line)
        return {
            key: value for key, value in line.items() if not (isinstance(value, float) and not math.isfinite(value))
        }

    def _write_line(self) -> None:
        if self.outputs is not None and self._line:
            self.outputs.metrics.write(self._line)
        self._line = {}

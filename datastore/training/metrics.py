"""Numbers about a run: a JSON line per step, also for those who follow it; progress, and the result.

Lines go to `metrics/<first step>-<number and name of the session>.jsonl`, which a thread replaces by a longer one every few seconds: object stores
cannot append. A killed session loses at most those seconds of lines, and its steps are taken again by the next session,
whose lines count (`read_metrics`). What cannot be stored now stays in memory and is tried again: metrics end no run.

The records of a running and of a finished run go to a progress line, to another process, or to `--json`.
"""

import time
from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal, Protocol, TypeAlias

import orjson

from datastore.document import Document
from datastore.errors import StorageError
from datastore.storage.base import Storage

__all__ = [
    "ALWAYS",
    "Fault",
    "Follower",
    "MetricsWriter",
    "Result",
    "StepMeter",
    "StepOutcome",
    "StepProfile",
    "TrainingProgress",
    "read_metrics",
    "session_number",
]

ALWAYS = ("loss", "grad_norm")
"""Numbers of every step; where one is missing, it was not finite: JSON has no word for that, so such numbers are left out."""

_FLUSH_S = 10.0

_RECENT_STEPS = 20
"""What a progress line is an average over."""


class Follower(Protocol):
    """Gets the record of each step, too."""

    def log(self, record: Mapping[str, Any]) -> None:
        """Take the record of a step."""
        ...

    def finish(self) -> None:
        """Take note that there are no more."""
        ...


class MetricsWriter:
    """Writes the metrics of one session; rank 0 has one. Not thread-safe."""

    def __init__(self, storage: Storage, *, session: str, first_step: int, followers: Sequence[Follower] = ()) -> None:
        self._storage = storage
        self._key = f"metrics/{first_step:010d}-{session}.jsonl"
        self._lines = bytearray()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="metrics")
        self._last = 0
        """Where the line of the last record begins."""

        self._trouble: StorageError | None = None
        self._flushing: Future[None] | None = None
        self._flushed = time.monotonic()
        self._followers = followers

    def write(self, record: Mapping[str, Any]) -> None:
        """Take the record of one step, which has "step" and numbers."""
        self._last = len(self._lines)
        self._lines += orjson.dumps(dict(record)) + b"\n"
        for follower in self._followers:
            follower.log(record)
        if time.monotonic() - self._flushed > _FLUSH_S:
            self.flush()

    def amend(self, numbers: Mapping[str, Any]) -> None:
        """Add `numbers` to the record that was written last."""
        if self._lines:
            record = orjson.loads(self._lines[self._last :])
            del self._lines[self._last :]
            self._lines += orjson.dumps(record | dict(numbers)) + b"\n"

    def flush(self) -> Future[None] | None:
        """Begin to store what was written so far; return what to wait for, if there is anything."""
        self._wait()
        self._flushed = time.monotonic()
        if self._lines:
            self._flushing = self._thread.submit(self._storage.put, self._key, bytes(self._lines))
        return self._flushing

    def trouble(self) -> StorageError | None:
        """Return why records could not be stored since this was asked last, or None; they will be tried again."""
        if self._flushing is not None and self._flushing.done():
            self._wait()
        found, self._trouble = self._trouble, None
        return found

    def close(self) -> None:
        """Store everything and end the thread.

        Raises:
            StorageError: the last records could not be stored.
        """
        try:
            self._trouble = None
            self.flush()
            self._trouble = None
            self._wait()
            if self._trouble is not None:
                raise self._trouble
        finally:
            self._thread.shutdown()
            for follower in self._followers:
                follower.finish()

    def _wait(self) -> None:
        if self._flushing is not None:
            flushing, self._flushing = self._flushing, None
            try:
                flushing.result()
            except StorageError as error:
                self._trouble = error


def read_metrics(storage: Storage) -> list[dict[str, Any]]:
    """Return one record per step, in order; of a step taken twice, what the later session wrote."""
    keys = sorted((found.key for found in storage.list("metrics")), key=session_number)
    steps: dict[int, dict[str, Any]] = {}
    for key in keys:
        records = [orjson.loads(line) for line in storage.get(key).splitlines()]
        if records:
            steps = {step: record for step, record in steps.items() if step < records[0]["step"]}
            steps |= {record["step"]: record for record in records}
    return [steps[step] for step in sorted(steps)]


def session_number(key: str) -> tuple[int, str]:
    """Return what sessions are ordered by: their number. The name, which begins with the time of some clock, decides for old ones."""
    _, *number, name = key.split("-")
    return int(number[0]) if number else 0, name


Fault: TypeAlias = Literal["", "skip", "rewind"]


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

    fault: Fault = ""
    """What became of a step whose gradient was not finite or far too large; empty: it was taken."""

    cause: str = ""
    """Which of both it was."""


class TrainingProgress(Document, frozen=True, kw_only=True):
    """A line about a run; sent a few times a second at most, and for every note."""

    step: int
    steps: int
    loss: float | None = None
    validation_loss: float | None = None
    """The last one measured."""

    tokens_per_s: float | None = None
    """Over the last few steps, all ranks together."""

    data_wait: float | None = None
    """Fraction of the time in which ranks waited for data, over the last few steps."""

    eta_s: float | None = None
    note: str = ""
    """Something that happened: resumed, saved, a damaged checkpoint passed over. Worth a line of its own."""


class StepProfile(Document, frozen=True, kw_only=True):
    """Where some steps of rank 0 went; seconds are means of a step."""

    first: int
    last: int
    step_s: float
    """Without evaluations and saves."""

    parts: dict[str, float]
    """Seconds of each part, evaluations and saves among them."""

    messages_s: float
    """How long messages between ranks were under way, beside the parts."""

    trace: str
    """The trace of rank 0, a key in the run folder."""


class Result(Document, frozen=True, kw_only=True):
    """How a session ended."""

    run: str
    step: int
    steps: int
    resumed_from: int
    """0: from the beginning."""

    stopped: bool
    """Whether a signal ended it before the last step; everything up to `step` is saved."""

    loss: float | None
    validation_loss: float | None
    tokens_per_s: float | None
    """Mean over the session's steps, without evaluations and saves."""

    data_wait: float | None
    """Fraction of that time in which ranks waited for data."""

    seconds: float
    """Of the whole session, from reading the settings to the last byte saved."""

    world: int
    parameters: int
    profile: StepProfile | None = None
    """Of the steps that `metrics.profile` names."""


class StepMeter:
    """Counts what steps cost and turns it into numbers: over the last few steps for a progress line, over all for the result."""

    def __init__(self, *, tokens_per_step: int) -> None:
        self._tokens_per_step = tokens_per_step
        self._recent: deque[tuple[float, float]] = deque(maxlen=_RECENT_STEPS)
        self._seconds = self._waited = 0.0
        self._steps = 0

    def add(self, *, seconds: float, waited: float) -> None:
        """Count a step that took `seconds`, for `waited` of which ranks waited for data."""
        self._recent.append((seconds, waited))
        self._seconds, self._waited, self._steps = self._seconds + seconds, self._waited + waited, self._steps + 1

    @property
    def tokens_per_s(self) -> float | None:
        """Mean over all steps; None before the first."""
        return self._steps * self._tokens_per_step / self._seconds if self._steps else None

    @property
    def data_wait(self) -> float | None:
        """Fraction of the time of all steps in which ranks waited for data; None before the first."""
        return self._waited / self._seconds if self._steps else None

    def progress(self, step: int, steps: int) -> TrainingProgress:
        """Return where a run of `steps` steps is after `step` of them, without losses and notes."""
        seconds, recent = sum(seconds for seconds, _ in self._recent), len(self._recent)
        if not recent:
            return TrainingProgress(step=step, steps=steps)
        return TrainingProgress(
            step=step,
            steps=steps,
            tokens_per_s=recent * self._tokens_per_step / seconds,
            data_wait=sum(wait for _, wait in self._recent) / seconds,
            eta_s=(steps - step) * seconds / recent,
        )

"""The proof that a run consumed its planned samples, each exactly once, read from its own record.

One process plans every step again from dataset, seed and settings, reads the tokens again, and compares: cursors follow
each other from 0, every step's fingerprint is that of the samples and tokens that were planned, and within an epoch no
sample comes twice. Neither the number of ranks nor the number of interruptions is known to it.
"""

from dataclasses import dataclass, field

import numpy as np

from datastore.loader.batch import Batch
from datastore.loader.loader import Loader
from datastore.train.record import StepEntry
from datastore.train.run import RunConfig, RunFolder, open_split
from datastore.train.trace import History, read_history

__all__ = ["Proof", "prove"]

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class Proof:
    """What was compared, and what differs."""

    steps: int
    samples: int
    """Consumed by all steps."""

    distinct: int
    """Different ones among them."""

    epoch_samples: int
    """Samples in one pass over the training data."""

    sessions: int
    """Sessions that took these steps."""

    worlds: list[int]
    """How many ranks each of them had."""

    problems: list[str] = field(default_factory=list)
    """Empty: every sample of the planned order was consumed exactly once."""

    @property
    def holds(self) -> bool:
        """Whether there is no problem."""
        return not self.problems


def prove(run: str) -> Proof:
    """Compare the record of `run` with its plan, up to its newest checkpoint. Reads all tokens of those steps again.

    Raises:
        MissingError: there is no run, or it has no checkpoint yet.
        CorruptError: the record or the dataset is damaged.
    """
    folder = RunFolder.open(run)
    config = folder.config()
    history = read_history(folder)
    sessions = list(dict.fromkeys(session for session, _ in history.steps))
    with _loader_of(config, history) as loader:
        count = _Count(loader.samples_per_epoch)
        problems = [problem for _, entry in history.steps for problem in _compare(entry, loader, count)]
        return Proof(
            steps=len(history.steps),
            samples=count.samples,
            distinct=int(count.ever.sum()),
            epoch_samples=loader.samples_per_epoch,
            sessions=len(sessions),
            worlds=[folder.session(session).world for session in sessions],
            problems=problems[:_SHOWN],
        )


class _Count:
    """Which samples came, in this epoch and ever. Memory: two bytes for each sample of an epoch."""

    def __init__(self, epoch_samples: int) -> None:
        self.samples = 0
        self.ever = np.zeros(epoch_samples, np.bool_)
        self._epoch = -1
        self._seen = np.zeros(epoch_samples, np.bool_)

    def add(self, batch: Batch) -> int:
        """Count the samples of `batch`; return how many of them had come before in their epoch."""
        again = 0
        epochs = batch.positions // len(self.ever)
        for epoch in np.unique(epochs):
            if epoch != self._epoch:
                self._epoch = int(epoch)
                self._seen[:] = False
            samples = batch.samples[epochs == epoch]
            again += len(samples) - len(np.unique(samples[~self._seen[samples]]))
            self._seen[samples] = True
            self.ever[samples] = True
        self.samples += len(batch.samples)
        return again


def _loader_of(config: RunConfig, history: History) -> Loader:
    """Return a loader of all samples of each step, at the first."""
    data = config.settings.data
    loader = Loader(
        open_split(config).training,
        seq_len=data.seq_len,
        global_batch=data.global_batch,
        seed=data.seed,
        options=config.settings.loader,
    )
    loader.load_state_dict(history.loader | {"cursor": 0})
    return loader


def _compare(entry: StepEntry, loader: Loader, count: _Count) -> list[str]:
    """Return what is wrong with one step."""
    batch = next(loader)
    planned = StepEntry(
        step=entry.step,
        cursor=batch.cursor,
        samples=len(batch.samples),
        fingerprint=f"{batch.fingerprint():016x}",
    )
    again = count.add(batch)
    problems = [f"step {entry.step} has samples that came before in this epoch: {again}"] if again else []
    if entry != planned:
        problems.append(f"step {entry.step} was planned as {planned}, and recorded as {entry}")
    return problems

"""What one step of a run consumed, down to file and byte offset: computed again, not looked up.

The record says at which position a step began; order and dataset say the rest. Nothing was logged per sample.
"""

from contextlib import closing
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from datastore.checkpoint.checkpointer import Checkpointer
from datastore.errors import ConfigError, MissingError
from datastore.loader.loader import Loader
from datastore.loader.place import Place
from datastore.loader.trace import SampleOrigin, locate
from datastore.train.record import Record, StepEntry, read_segments
from datastore.train.run import RunConfig, RunFolder, open_split
from datastore.train.split import Split

I64 = npt.NDArray[np.int64]

__all__ = ["StepTrace", "read_record", "trace"]


@dataclass(frozen=True, slots=True)
class StepTrace:
    """The samples of one step, of one rank or of all."""

    step: int
    cursor: int
    world: int
    """Ranks that took this step."""

    session: str
    rank: int | None
    positions: list[int]
    """Place of each sample in the order, in the order in which the rank saw them (sorted, if of all ranks)."""

    samples: list[SampleOrigin]
    fingerprint: str
    """As recorded; only of the whole step."""


def read_record(folder: RunFolder) -> list[tuple[str, StepEntry]]:
    """Return every step that led to the newest checkpoint, in order, with the session that took it.

    Raises:
        MissingError: the run has no checkpoint yet.
        CorruptError: the record or every checkpoint is damaged.
    """
    record = Record()
    checkpointer = Checkpointer(folder.storage)
    try:
        if checkpointer.latest() is None:
            raise MissingError(
                "the run has no checkpoint yet", url=folder.url, hint="Let it train until the first one."
            )
        checkpointer.restore({"record": record}, partial=True)
    finally:
        checkpointer.close()
    return [
        (key.removesuffix(".jsonl").rpartition("-")[2], entry)
        for key, entries in read_segments(folder.storage, record.last)
        for entry in entries
    ]


def trace(run: str, step: int, *, rank: int | None = None) -> StepTrace:
    """Return what `step` (1 is the first) consumed, on `rank` or on all ranks.

    Raises:
        MissingError: there is no run, or no checkpoint knows of that step (yet).
        ConfigError: `rank` did not take part in it.
    """
    folder = RunFolder.open(run)
    config = folder.config()
    record = read_record(folder)
    if not 1 <= step <= len(record):
        raise MissingError(
            "no checkpoint knows of this step", step=step, last=len(record), hint="Name a step between 1 and the last."
        )
    name, entry = record[step - 1]
    world = folder.session(name).world
    if rank is not None and not 0 <= rank < world:
        raise ConfigError("no such rank took this step", rank=rank, world=world, hint=f"Name one below {world}.")
    split = open_split(config)
    place = Place(rank, world) if rank is not None else Place()
    positions, samples = _planned(config, split, entry, place)
    if rank is None:
        order = np.argsort(positions)
        positions, samples = positions[order], samples[order]
    origins = locate(split.training, seq_len=config.settings.data.seq_len, samples=samples)
    return StepTrace(
        step=step,
        cursor=entry.cursor,
        world=world,
        session=name,
        rank=rank,
        positions=positions.tolist(),
        samples=list(origins),
        fingerprint=entry.fingerprint,
    )


def _planned(config: RunConfig, split: Split, entry: StepEntry, place: Place) -> tuple[I64, I64]:
    """Return positions and samples of the step, in the order in which `place` sees them."""
    data = config.settings.data
    loader = Loader(
        split.training,
        seq_len=data.seq_len,
        global_batch=entry.samples,
        seed=data.seed,
        place=place,
        options=config.settings.loader,
    )
    with closing(loader):
        loader.load_state_dict(loader.state_dict() | {"cursor": entry.cursor})
        plan = loader.plan(1)[0]
        return plan.positions, plan.samples

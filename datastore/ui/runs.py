"""Runs as their pages show them: how each stands, its checkpoints, its numbers, and what two runs do not share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from datastore.checkpoint.inspect import StepSummary, newest_steps
from datastore.checkpoint.steps import StepLog
from datastore.errors import DatastoreError
from datastore.training.run.changes import flatten
from datastore.training.run.folder import RunFolder, RunSession
from datastore.training.run.history import differing, ending_of, side_by_side
from datastore.training.run.lock import writer_of
from datastore.ui.places import Run

__all__ = ["Standing", "checkpoints_of", "differences", "lines", "sessions_of", "standing"]

_STEPS = 50
"""Checkpoints that are listed."""


@dataclass(frozen=True, slots=True)
class Standing:
    """A run, as it stands."""

    run: Run
    created: str
    step: int
    steps: int
    """That it is to take; 0: unknown, the run is damaged."""

    saved: int
    """The newest step that is stored; 0: none."""

    numbers: dict[str, float]
    """Of its last step."""

    writer: str | None
    data: dict[str, str]
    problem: str = ""

    @property
    def state(self) -> str:
        """What one wants to know first."""
        if self.problem:
            return "damaged"
        if self.writer is not None:
            return "going on"
        return ending_of(self.step, steps=self.steps, saved=self.saved)


def standing(run: Run) -> Standing:
    """Return how a run stands; of one that is damaged, why it cannot be read."""
    try:
        run.series.refresh()
        folder = RunFolder.open(run.url)
        config, writer = folder.config(), writer_of(folder.storage)
        saved = StepLog(folder.storage).newest() or 0
    except DatastoreError as error:
        return Standing(run, "", 0, 0, 0, {}, None, {}, problem=str(error))
    numbers = run.series.last()
    data = config.settings.data
    named = {"data": data.url} if data.url else {name: source.url for name, source in data.sources.items()}
    step, steps = int(numbers.get("step", 0)), config.settings.train.steps
    return Standing(run, config.created, step, steps, saved, numbers, writer, named)


def settings_of(run: Run) -> dict[str, Any]:
    """Return the settings of a run, by TOML path.

    Raises:
        DatastoreError: they cannot be read.
    """
    return flatten(RunFolder.open(run.url).config().settings)


def sessions_of(run: Run) -> list[RunSession]:
    """Return the sessions of a run, newest first.

    Raises:
        DatastoreError: one cannot be read.
    """
    return list(reversed(RunFolder.open(run.url).sessions()))


def checkpoints_of(run: Run) -> tuple[list[StepSummary], int]:
    """Return the newest checkpoints of a run, newest first, and how many there are.

    Raises:
        StorageError: the storage failed.
    """
    return newest_steps(run.storage, _STEPS)


def lines(runs: Sequence[Run], name: str, *, against: str, span: tuple[float, float] | None) -> dict[str, Any]:
    """Return one number of some runs, thinned, as the page draws it.

    Raises:
        StorageError: the storage failed.
    """
    shown = []
    for run in runs:
        run.series.refresh()
        line = run.series.line(name, against=against, span=span)
        shown.append(
            {
                "run": run.number,
                "label": run.name,
                "version": run.series.version,
                "x": line.x,
                "y": line.y,
                "marks": line.marks,
                "marked": line.marked,
                "again": line.taken_again,
            }
        )
    return {"name": name, "against": against, "lines": shown}


def differences(runs: Sequence[Run]) -> tuple[dict[str, list[Any]], list[tuple[int, list[float | None]]]]:
    """Return the settings in which some runs differ, and their losses at steps that all have taken.

    Raises:
        DatastoreError: the settings of one cannot be read.
    """
    for run in runs:
        run.series.refresh()
    return differing([settings_of(run) for run in runs]), side_by_side([run.series.values("loss") for run in runs])

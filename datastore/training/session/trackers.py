"""Trackers: where the numbers of a run go besides its own folder, such as TensorBoard or Weights & Biases.

One class with three methods, named in `[[metrics.trackers]]`: one of ours, an entry point in `datastore.trackers`, or `module:Class`.

    start     the run is about to take steps: this session, from which step on
    log       the record of a step, in order, each once in a session
    finish    the session ends

A tracker is a guest: each has a thread of its own, so none makes a step wait, and one that fails is told once and left out from there
on. Only a setting that is wrong, or a package that is not there, is an error, before the first step. The numbers in the run folder
are the record; a tracker that was left out has gaps.
"""

import queue
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Literal

from typing_extensions import override

from datastore.config import find_class
from datastore.digest import digest_bytes
from datastore.document import Document, SettingsDocument, convert
from datastore.errors import ConfigError, DatastoreError, DependencyError

__all__ = [
    "TensorBoard",
    "TrackedRun",
    "Tracker",
    "Trackers",
    "WeightsAndBiases",
    "WeightsAndBiasesSettings",
    "make_trackers",
]

_MOST_WAITING = 10_000
"""Records that wait for a tracker; one that is so late is left out."""

_FINISH_S = 60.0
"""How long the end of a session waits for a tracker."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrackedRun:
    """What a tracker is told of a run."""

    url: str
    created: str
    """When the run began; the same in each of its sessions."""

    first_step: int
    """The first one that this session takes: an earlier session may have told of it, and of later ones, already."""

    settings: Mapping[str, Any]
    folder: Path | None
    """Where the run lies, if that is on this machine."""

    @property
    def name(self) -> str:
        """What a person calls it."""
        return self.url.rstrip("/").rsplit("/", 1)[-1]


class Tracker:
    """Does nothing; inherit and override."""

    Settings: ClassVar[type[Document]] = Document
    """The keys of its table besides `use`; an instance is the one argument of the constructor."""

    def __init__(self, settings: Document) -> None:
        self.settings = settings

    def start(self, run: TrackedRun) -> None:
        """Begin, or go on, as this session of the run does."""

    def log(self, step: int, record: Mapping[str, Any]) -> None:
        """Take the numbers of a step, and texts; none of the numbers is infinite or NaN."""

    def finish(self) -> None:
        """Bring everything to where it belongs."""


class TensorBoard(Tracker):
    """Event files in `tensorboard/` of the run folder."""

    @override
    def start(self, run: TrackedRun) -> None:
        if run.folder is None:
            raise ConfigError(
                "TensorBoard writes to local folders only",
                run=run.url,
                hint="Leave out this tracker, or let the run lie in a folder.",
            )
        board = _imported("torch.utils.tensorboard", "track")
        # purge_step hides what a killed session had written of the steps that are taken again.
        self._writer = board.SummaryWriter(log_dir=str(run.folder / "tensorboard"), purge_step=run.first_step)

    @override
    def log(self, step: int, record: Mapping[str, Any]) -> None:
        for name, value in record.items():
            if isinstance(value, int | float):
                self._writer.add_scalar(name, value, step)

    @override
    def finish(self) -> None:
        self._writer.close()


class WeightsAndBiasesSettings(SettingsDocument, frozen=True, kw_only=True):
    """The table of the tracker `wandb`."""

    project: str = "datastore"
    """The project there."""

    entity: str = ""
    """The user or team; empty: the one that is logged in."""

    mode: Literal["online", "offline", "shared", "disabled"] = "online"
    """offline keeps everything in `wandb/` of the run folder, for `wandb sync`."""


class WeightsAndBiases(Tracker):
    """A run at Weights & Biases, the same one in each session.

    Its own step only counts records: of a step that it has had already it drops the numbers, and a session that takes steps again
    would lose them. So ours is a number of each record, and the axis of all others.
    """

    Settings = WeightsAndBiasesSettings
    settings: WeightsAndBiasesSettings

    @override
    def start(self, run: TrackedRun) -> None:
        wandb = _imported("wandb", "wandb")
        self._run = wandb.init(
            project=self.settings.project,
            entity=self.settings.entity or None,
            id=digest_bytes(f"{run.url} {run.created}".encode()).hex()[:16],
            name=run.name,
            dir=None if run.folder is None else str(run.folder),
            config=dict(run.settings),
            resume="allow",
            mode=self.settings.mode,
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    @override
    def log(self, step: int, record: Mapping[str, Any]) -> None:
        self._run.log({**record, "step": step})

    @override
    def finish(self) -> None:
        self._run.finish()


_HERE = "datastore.training.session.trackers"
_OURS = {"tensorboard": f"{_HERE}:TensorBoard", "wandb": f"{_HERE}:WeightsAndBiases"}


def _imported(module: str, extra: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        raise DependencyError(
            f"{module} is not installed", hint=f"Run: pip install 'llm-datastore[{extra}]', or leave out the tracker."
        ) from None


def make_trackers(tables: Sequence[Mapping[str, Any]]) -> dict[str, Tracker]:
    """Return a tracker for each `[[metrics.trackers]]` table, by its name there.

    Raises:
        ConfigError: an unknown tracker, or a setting that it does not know.
        DependencyError: its module cannot be imported.
    """
    found = {}
    for table in tables:
        kind = find_class(table["use"], base=Tracker, ours=_OURS, group="datastore.trackers")
        own = {key: value for key, value in table.items() if key != "use"}
        found[str(table["use"])] = kind(convert(kind.Settings, own, where=f"metrics.trackers, {table['use']}"))
    return found


class _Guest:
    """A tracker with a thread, and why it was left out, if it was."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self.name, self.tracker = name, tracker
        self.failure = ""
        self._records: queue.Queue[Mapping[str, Any] | None] = queue.Queue(_MOST_WAITING)
        self._thread = threading.Thread(target=self._follow, name=f"tracker {name}", daemon=True)

    def __enter__(self) -> None:
        """Begin with what the tracker does."""

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool:
        """Keep what went wrong, and go on; what is wrong about our settings is an error."""
        if error is None or isinstance(error, DatastoreError) or not isinstance(error, Exception):
            return False
        self.failure = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no reason given'}"
        return True

    def start(self, run: TrackedRun) -> None:
        with self:
            self.tracker.start(run)
            self._thread.start()

    def _follow(self) -> None:
        with self:
            while (record := self._records.get()) is not None:
                self.tracker.log(record["step"], {key: value for key, value in record.items() if key != "step"})
            self.tracker.finish()

    def log(self, record: Mapping[str, Any]) -> None:
        if not self.failure and self._records.full():
            self.failure = f"it is {_MOST_WAITING:,} records late"
        elif not self.failure:
            self._records.put(record)

    def finish(self) -> None:
        if not self.failure and self._thread.is_alive():
            self._records.put(None)
            self._thread.join(_FINISH_S)
            if self._thread.is_alive():
                self.failure = f"it did not end within {_FINISH_S:.0f} s"


class Trackers:
    """The trackers of one session; rank 0 has them."""

    def __init__(self, trackers: Mapping[str, Tracker], run: TrackedRun) -> None:
        self._guests = [_Guest(name, one) for name, one in trackers.items()]
        self._told: set[str] = set()
        for guest in self._guests:
            guest.start(run)

    def log(self, record: Mapping[str, Any]) -> None:
        """Hand each tracker the record of a step; nobody waits for them."""
        for guest in self._guests:
            guest.log(record)

    def finish(self) -> None:
        """Let each tracker end; one that does not, in its time, is left."""
        for guest in self._guests:
            guest.finish()

    def trouble(self) -> str:
        """Return which trackers were left out since this was asked last, and why; empty: none."""
        new = [guest for guest in self._guests if guest.failure and guest.name not in self._told]
        self._told |= {guest.name for guest in new}
        return "; ".join(f"the tracker {guest.name} is left out from here on: {guest.failure}" for guest in new)

"""Runs as people look back on them: a summary of each, what differs between some, their numbers as pictures.

Only documents and metrics of a run are read, never a checkpoint, and nothing is locked: it works while a run goes on. Steps that were taken
twice count as the later session took them, so a line that went back after a crash is drawn once.

Complexity: O(steps) to read the metrics of a run; a picture has some 2,000 points a line, however many steps there are.
"""

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from datastore.checkpoint.steps import StepLog
from datastore.dataset.snapshot import split_reference
from datastore.display import figure_class, save_figure, short_names
from datastore.errors import ConfigError, DatastoreError, MissingError
from datastore.storage.resolve import places_below
from datastore.training.metrics import read_metrics
from datastore.training.run.changes import flatten
from datastore.training.run.folder import CONFIG_KEY, RunFolder, is_run
from datastore.training.run.lock import writer_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Difference",
    "RunSummary",
    "compare",
    "differing",
    "ending_of",
    "numbers_of",
    "plot",
    "runs_below",
    "side_by_side",
    "summary_of",
]

_DEPTH = 3
"""How many folders below the one that is named runs are looked for."""

_RECENT = 20
"""Steps that a rate is the mean of."""

_POINTS = 1_000
"""Of each of these parts of a line the least and the largest value are drawn, so that no spike is lost."""

_FEW = 50
"""Points that are marked one by one."""

_AXES = ("step", "tokens", "hours")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSummary:
    """A run, as it stands."""

    url: str
    created: str
    """UTC, ISO 8601."""

    sessions: int
    step: int
    """Steps taken, as far as the metrics are stored; 0: none."""

    steps: int
    """Steps that it is to take."""

    saved: int
    """The newest step that is stored, from which it would go on; 0: none."""

    tokens: int
    loss: float | None
    validation_loss: float | None
    """The last one measured."""

    tokens_per_s: float | None
    """Mean of the last 20 steps."""

    world: int
    """Ranks of the last session; 0: there was none."""

    data: dict[str, str]
    """Each dataset as URL@version, by name; that of a single one is "data"."""

    writer: str | None
    """Who writes to it now, as far as is known; None: nobody."""

    problem: str = ""
    """Why it cannot be read."""


@dataclass(frozen=True, slots=True)
class Difference:
    """What several runs do not share."""

    runs: list[str]
    settings: dict[str, list[Any]]
    """Of each setting that differs, by its TOML path, what each run has."""

    losses: list[tuple[int, list[float | None]]] = field(default_factory=list)
    """The loss of each at steps that all of them have taken: up to ten, evenly spread, the last of them included."""


def runs_below(url: str) -> list[str]:
    """Return the URLs of the runs at or up to three folders below `url`, sorted.

    Local folders are walked, and those of a run are not entered; elsewhere every key below `url` is listed.
    """
    return [place for place, _ in places_below(url, {CONFIG_KEY: is_run}, depth=_DEPTH)]


def summary_of(url: str) -> RunSummary:
    """Return how the run at `url` stands; one that is damaged has a `problem`.

    Raises:
        MissingError: there is no run.
    """
    folder = RunFolder.open(url)
    try:
        config, sessions, metrics = folder.config(), folder.sessions(), read_metrics(folder.storage)
        writer, saved = writer_of(folder.storage), StepLog(folder.storage).newest() or 0
    except MissingError:
        raise
    except (DatastoreError, ValueError) as error:
        empty: dict[str, Any] = dict.fromkeys(("loss", "validation_loss", "tokens_per_s", "writer"))
        counts: dict[str, Any] = dict.fromkeys(("sessions", "step", "steps", "saved", "tokens", "world"), 0)
        return RunSummary(url=folder.url, created="", data={}, problem=str(error), **counts, **empty)
    last = metrics[-1] if metrics else {}
    rates = [record["tokens_per_s"] for record in metrics[-_RECENT:] if record.get("tokens_per_s")]
    refs = dict(config.sources) if config.dataset is None else {"data": config.dataset}
    versions = sessions[-1].data if sessions else None
    read = {} if versions is None else {"data": versions.training} | dict(versions.sources)
    urls = {name: source.url for name, source in config.settings.data.sources.items()} | {
        "data": config.settings.data.url
    }
    return RunSummary(
        url=folder.url,
        created=config.created,
        sessions=len(sessions),
        step=int(last.get("step", 0)),
        steps=config.settings.train.steps,
        saved=saved,
        tokens=int(last.get("tokens", 0)),
        loss=last.get("loss"),
        validation_loss=next(
            (record["validation_loss"] for record in reversed(metrics) if record.get("validation_loss") is not None),
            None,
        ),
        tokens_per_s=mean(rates) if rates else None,
        world=sessions[-1].world if sessions else 0,
        data={
            name: f"{split_reference(urls[name])[0]}@{read.get(name) or ref.version}"
            for name, ref in sorted(refs.items())
        },
        writer=writer,
    )


def ending_of(step: int, *, steps: int, saved: int) -> str:
    """Return how a run of `steps` steps stands that nobody writes to, after `step`: it is finished when its last one is saved."""
    if saved >= steps:
        return "finished"
    if saved == step:
        return "stopped"
    return f"stopped, saved up to step {saved:,}" if saved else "stopped, no step is saved"


def compare(urls: Sequence[str]) -> Difference:
    """Return which settings of some runs differ, and their losses at the same steps.

    Raises:
        ConfigError: there are fewer than two.
        MissingError: there is no run at one of them.
    """
    if len(urls) < 2:
        raise ConfigError("there is nothing to compare", runs=list(urls), hint="Name two runs or more.")
    folders = [RunFolder.open(url) for url in urls]
    settings = [flatten(folder.config().settings) for folder in folders]
    losses = [{record["step"]: record.get("loss") for record in read_metrics(folder.storage)} for folder in folders]
    return Difference([folder.url for folder in folders], differing(settings), side_by_side(losses))


def differing(settings: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """Return the settings that differ, by their TOML path, each with what every one of several runs has; None: it has none."""
    found = {
        key: [each.get(key) for each in settings] for key in dict.fromkeys(key for each in settings for key in each)
    }
    return {key: values for key, values in found.items() if any(value != values[0] for value in values)}


def side_by_side(losses: Sequence[Mapping[int, float | None]]) -> list[tuple[int, list[float | None]]]:
    """Return the losses of several runs, each by step, at up to ten steps that all have, the last of them included."""
    shared = sorted(set.intersection(*map(set, losses)))
    chosen = sorted({shared[len(shared) * part // 10 - 1] for part in range(1, 11)} if shared else ())
    return [(step, [each[step] for each in losses]) for step in chosen]


def numbers_of(url: str) -> dict[str, list[tuple[int, float]]]:
    """Return every number that the metrics of a run have, by name: pairs of a step and a value, in order.

    Raises:
        MissingError: there is no run.
    """
    folder = RunFolder.open(url)
    folder.config()
    found: dict[str, list[tuple[int, float]]] = {}
    for record in read_metrics(folder.storage):
        for name, value in record.items():
            if name != "step" and isinstance(value, int | float):
                found.setdefault(name, []).append((record["step"], float(value)))
    return found


def plot(
    runs: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    path: str | Path | None = None,
    *,
    numbers: Sequence[str] = ("loss", "validation_loss", "tokens_per_s", "lr"),
    against: str = "step",
) -> "Figure":
    """Draw numbers of one or several runs, a panel for each number and a line for each run.

    Args:
        runs: URLs of runs.
        path: Where to save the picture, `.png`, `.svg` or `.pdf`; None: nowhere.
        numbers: Names as in the metrics; what no run has is left out. `validation_loss` is drawn with the loss, dashed, if both are asked for.
        against: `step`, `tokens`, or `hours` since the first step.

    Returns:
        The figure, for a notebook to show or to go on with.

    Raises:
        ConfigError: no run has any of the numbers; a number or axis is unknown; or the picture cannot be saved.
        MissingError: there is no run at one of the URLs.
        DependencyError: matplotlib is not installed.
    """
    new_figure = figure_class()
    if against not in _AXES:
        raise ConfigError("no such axis", against=against, hint=f"One of {', '.join(_AXES)}.")
    urls = [os.fspath(run) for run in ([runs] if isinstance(runs, str | os.PathLike) else runs)]
    found = [numbers_of(url) for url in urls]
    known = {name for each in found for name in each}
    drawn = [name for name in numbers if name in known]
    if not drawn:
        raise ConfigError("there is nothing to draw", numbers=list(numbers), known=sorted(known), hint="Name others.")
    panels = [name for name in drawn if name != "validation_loss" or "loss" not in drawn]
    figure = new_figure(figsize=(8, 2.6 * len(panels) + 0.6), layout="constrained")
    axes = figure.subplots(len(panels), sharex=True, squeeze=False)[:, 0]
    for axis, panel in zip(axes, panels, strict=True):
        for number, (label, each) in enumerate(zip(short_names(urls), found, strict=True)):
            color = f"C{number}"
            _draw(axis, each, panel, against, label=label, color=color)
            if panel == "loss" and "validation_loss" in drawn:
                _draw(axis, each, "validation_loss", against, label=f"{label}, validation", color=color, linestyle="--")
        axis.set_title(panel, loc="left")
        axis.grid(alpha=0.3)
    axes[0].legend()
    axes[-1].set_xlabel(against)
    if path is not None:
        save_figure(figure, path)
    return figure


def _draw(axis: Any, numbers: dict[str, list[tuple[int, float]]], name: str, against: str, **style: Any) -> None:
    points = numbers.get(name, [])
    places = _places(numbers, against)
    shown = _thinned([(places[step], value) for step, value in points if step in places])
    if shown:
        marker = "." if len(shown) <= _FEW else None
        axis.plot(*zip(*shown, strict=True), marker=marker, linewidth=1, **style)


def _places(numbers: dict[str, list[tuple[int, float]]], against: str) -> dict[int, float]:
    """Return where on the axis each step lies."""
    if against == "step":
        return {step: float(step) for values in numbers.values() for step, _ in values}
    values = numbers.get("time" if against == "hours" else "tokens", [])
    if against == "tokens" or not values:
        return dict(values)
    return {step: (value - values[0][1]) / 3600 for step, value in values}


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return `points`, or of many only the least and the largest of each stretch; what is no number stays, as a gap."""
    size = -(-len(points) // _POINTS)
    if size <= 2:
        return points
    kept = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        numbers = [point for point in part if math.isfinite(point[1])]
        ends = (
            {min(numbers, key=lambda point: point[1]), max(numbers, key=lambda point: point[1])} if numbers else set()
        )
        kept += sorted(ends | ({part[0]} if len(numbers) < len(part) and not numbers else set()))
    return kept

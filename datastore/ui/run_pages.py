"""The pages of runs, and the first page: each from an address to a template and what it shows."""

from typing import Any

from datastore.checkpoint.inspect import inspect_step, verify_step
from datastore.dataset.snapshot import Dataset
from datastore.errors import ConfigError, DatastoreError
from datastore.ui import runs as of
from datastore.ui.dataset_pages import Path, Query, Shown, whole_number
from datastore.ui.places import Places, Run
from datastore.ui.series import AXES

__all__ = ["checkpoint", "compare", "home", "line_data", "one", "overview", "step"]

_FIRST = ("loss", "validation_loss", "tokens_per_s", "data_wait", "memory_bytes", "lr", "grad_norm", "sparsity")
"""The numbers that are offered first."""

_DRAWN = ("loss", "tokens_per_s", "data_wait", "memory_bytes")
"""Those that the page of one run draws."""

_SAMPLES = 8


def home(places: Places, _: Path, __: Query) -> Shown:
    """The datasets and runs that there are."""
    places.look()
    datasets: list[tuple[int, Dataset | None, str]] = []
    for number in range(len(places.datasets)):
        try:
            datasets.append((number, places.dataset(number), ""))
        except DatastoreError as error:
            datasets.append((number, None, str(error)))
    return "home.html", {"datasets": datasets, "runs": [of.standing(run) for run in places.runs]}


def overview(places: Places, _: Path, query: Query) -> Shown:
    """Numbers of several runs in one plot."""
    places.look()
    chosen = _chosen(places, query) or places.runs[:8]
    for run in chosen:
        run.series.refresh()
    return "runs.html", {
        "runs": [of.standing(run) for run in places.runs],
        "chosen": {run.number for run in chosen},
        "names": _names(chosen),
        "name": query.get("name", "loss"),
        "against": query.get("against", "step"),
        "axes": AXES,
    }


def one(places: Places, path: Path, _: Query) -> Shown:
    """One run: its numbers, checkpoints and sessions."""
    run = places.run(path["run"])
    stands = of.standing(run)
    names = _names([run])
    checkpoints, total = of.checkpoints_of(run)
    try:
        sessions = of.sessions_of(run)
    except DatastoreError:
        sessions = []
    return "run.html", {
        "stands": stands,
        "drawn": [name for name in _DRAWN if name in names] or names[:4],
        "others": [name for name in names if name not in _DRAWN],
        "checkpoints": checkpoints,
        "total": total,
        "sessions": sessions,
        "settings": {} if stands.problem else of.settings_of(run),
    }


def step(places: Places, path: Path, query: Query) -> Shown:
    """What one step saw."""
    from datastore.training.run.audit import trace  # noqa: PLC0415 - it takes longer to load than a page to show

    run = places.run(path["run"])
    shown = whole_number(query, "samples", _SAMPLES)
    found = trace(run.url, path["step"], limit=shown)
    run.series.refresh()
    return "step.html", {"run": run, "found": found, "numbers": run.series.at(path["step"])}


def checkpoint(places: Places, path: Path, query: Query) -> Shown:
    """One checkpoint; all of it is read and checked only if that is asked for."""
    run = places.run(path["run"])
    found = inspect_step(run.storage, path["step"])
    verified = verify_step(run.storage, path["step"]) if query.get("verify") else None
    return "checkpoint.html", {"run": run, "found": found, "verified": verified}


def compare(places: Places, _: Path, query: Query) -> Shown:
    """What some runs do not share."""
    chosen = _chosen(places, query)
    if len(chosen) < 2:
        raise ConfigError("one run has nothing to be compared with", hint="Choose two runs or more.")
    settings, losses = of.differences(chosen)
    return "compare.html", {"runs": chosen, "settings": settings, "losses": losses}


def line_data(places: Places, _: Path, query: Query) -> dict[str, Any]:
    """One number of some runs, as the script of the page draws it."""
    against = query.get("against", "step")
    if against not in AXES:
        raise ConfigError("no such axis", against=against, hint=f"One of {', '.join(AXES)}.")
    span = None
    if "from" in query and "to" in query:
        try:
            span = (float(query["from"]), float(query["to"]))
        except ValueError:
            raise ConfigError("not a stretch of the axis", **query, hint="Give numbers as `from` and `to`.") from None
    return of.lines(_chosen(places, query), query.get("name", "loss"), against=against, span=span)


def _chosen(places: Places, query: Query) -> list[Run]:
    given = [part for part in query.get("runs", "").split(",") if part]
    if not all(part.isdecimal() for part in given):
        raise ConfigError("not numbers of runs", runs=query.get("runs"), hint="Choose runs on the page.")
    return [places.run(int(part)) for part in given]


def _names(runs: list[Run]) -> list[str]:
    known = {name for run in runs for name in run.series.names()} - {"time", "tokens"}
    first = [name for name in _FIRST if name in known]
    return [*first, *sorted(known - set(first))]

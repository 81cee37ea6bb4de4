"""Start a run, or go on with one: in this process, in several on this machine, or as one of many that torchrun started.

    result = train(settings, "runs/first", processes=2, on_progress=print)
    result = resume("runs/first")
    needs = dry_run(settings, "runs/first", processes=2)

Nothing here loads torch: with `processes` above 1 only the ranks need it.
"""

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from datastore.config import read_table, settings_from
from datastore.document import Document, convert
from datastore.errors import ConfigError, WaitError
from datastore.training.launcher import Launch, spawn
from datastore.training.metrics import Result, TrainingProgress
from datastore.training.parallel.layout import layout_of
from datastore.training.session.request import SessionRequest
from datastore.training.settings import Settings

if TYPE_CHECKING:
    from datastore.training.session.rehearsal import Needs

__all__ = ["Compressed", "compress", "dry_run", "fork", "resume", "train"]

_NO_STEPS = {
    "train": {"steps": 1},
    "optim": {"lr": 1e-30, "warmup": 0},
    "checkpoint": {"every": 0},
    "eval": {"every": 0},
}
"""Of a recipe without steps: one in which no weight moves, so that hooks act and there is a checkpoint."""


class Compressed(Document, frozen=True, kw_only=True):
    """What became of a finished model."""

    run: str
    """The run that holds it: to go on with, to export."""

    steps: int
    """Steps of recovery."""

    loss_before: float
    """Of the model as it was, on what the run holds out."""

    loss: float
    seconds: float


_HERE = Launch()


def train(
    settings: Settings,
    run: str | os.PathLike[str],
    *,
    processes: int = 1,
    launch: Launch = _HERE,
    on_progress: Callable[[TrainingProgress], None] | None = None,
    take_over: bool = False,
) -> Result:
    """Train as `settings` say until the last step or a signal, write to the folder or URL `run`, and return how it ended.

    If the run is there already, with the same settings, it goes on from its newest checkpoint. The first SIGTERM or SIGINT
    finishes the step, saves and returns with `stopped`; a second one ends the process at once. `launch` says which rank this
    process is (torchrun); `processes` starts so many ranks on this machine instead. `on_progress` is told of each step, on
    rank 0. `take_over` writes to a run whose other writer is surely gone.

    Raises:
        ConfigError: a setting is wrong, or does not fit the dataset.
        MissingError: the dataset is not there.
        ResumeError: the run was started with other settings or another dataset; the message names the keys.
        ConflictError: another process writes to the run.
        CorruptError: data or every checkpoint is damaged.
        WaitError: a rank died or did not answer in time.
        StorageError: the run or the dataset cannot be read or written.
    """
    run = os.fspath(run)
    request = SessionRequest(run=run, settings=settings, fresh=True, take_over=take_over)
    return _run(request, processes=processes, launch=launch, on_progress=on_progress)


def dry_run(settings: Settings, run: str | os.PathLike[str], *, processes: int = 1, launch: Launch = _HERE) -> "Needs":
    """Return what `train` would need of memory, disk and time; nothing is written, and no step is taken.

    `settings`, `run`, `processes` and `launch` are as for `train`.

    Raises:
        ConfigError: the run cannot fit into memory; or as `train`.
        DatastoreError: as `train`.
    """
    from datastore.training.session.rehearsal import rehearse  # noqa: PLC0415 - loads torch

    settings = convert(Settings, msgspec.to_builtins(settings), where="the settings")
    return rehearse(settings, os.fspath(run), launch=launch, processes=processes)


def resume(
    run: str | os.PathLike[str],
    *,
    overrides: Sequence[str] = (),
    processes: int = 1,
    launch: Launch = _HERE,
    on_progress: Callable[[TrainingProgress], None] | None = None,
    take_over: bool = False,
) -> Result:
    """Go on with `run` from its newest checkpoint; `overrides` such as `train.steps=400` change what may change.

    `processes`, `launch`, `on_progress` and `take_over` are as for `train`; the number of ranks may be another one than before.

    Raises:
        MissingError: there is no run.
        DatastoreError: as `train`.
    """
    run = os.fspath(run)
    from datastore.training.run.folder import RunFolder  # noqa: PLC0415 - loads pyarrow

    before = RunFolder.open(run).config().settings
    settings = settings_from(Settings, msgspec.to_builtins(before), overrides=overrides, where=run)
    request = SessionRequest(run=run, settings=settings, fresh=False, take_over=take_over)
    return _run(request, processes=processes, launch=launch, on_progress=on_progress)


def fork(
    run: str | os.PathLike[str],
    to: str | os.PathLike[str],
    *,
    overrides: Sequence[str] = (),
    processes: int = 1,
    launch: Launch = _HERE,
    on_progress: Callable[[TrainingProgress], None] | None = None,
) -> Result:
    """Train another run, `to`, that begins with the weights of `run`: `RUN@STEP`, or `RUN` for its newest checkpoint.

    Its settings are those of `run`, changed by `overrides`. Schedule and order begin anew, and so does the optimizer unless
    they say `optim.init=true`. `processes`, `launch` and `on_progress` are as for `train`.

    Raises:
        MissingError: there is no run, or no such step.
        DatastoreError: as `train`.
    """
    run, to = os.fspath(run), os.fspath(to)
    from datastore.dataset.snapshot import split_reference  # noqa: PLC0415 - loads pyarrow
    from datastore.training.run.folder import RunFolder  # noqa: PLC0415 - so does this

    settings = msgspec.to_builtins(RunFolder.open(split_reference(run)[0]).config().settings)
    settings["model"] = {"init": run}  # The shape comes with the weights.
    settings["optim"]["init"] = False
    return train(
        settings_from(Settings, settings, overrides=overrides, where=run),
        to,
        processes=processes,
        launch=launch,
        on_progress=on_progress,
    )


def compress(
    source: str | os.PathLike[str],
    to: str | os.PathLike[str],
    *,
    recipe: str | os.PathLike[str],
    data: str | os.PathLike[str] = "",
    processes: int = 1,
    on_progress: Callable[[TrainingProgress], None] | None = None,
) -> Compressed:
    """Make the run `to`, which begins with the finished model `source` and does with it what the TOML file `recipe` says.

    A recipe holds tables of a run's settings, `[[hooks]]` as a rule; without `train.steps` no weight is trained. `source` is a run
    (`RUN`, `RUN@STEP`), whose other settings are taken over, or a folder that `transformers` opens, which needs `data`. `processes` and
    `on_progress` are as for `train`.

    Raises:
        MissingError: there is no model, no recipe, no dataset.
        DatastoreError: as `train`.
    """
    from datastore.training.export.inference import evaluate  # noqa: PLC0415 - loads torch

    source, to, data = os.fspath(source), os.fspath(to), os.fspath(data)
    table = _inherited(source)
    wanted = read_table(recipe)
    steps = wanted.get("train", {}).get("steps", 0)
    parts = [wanted] if steps else [wanted, _NO_STEPS]
    for part in parts:
        for name, value in part.items():
            table[name] = {**table.get(name, {}), **value} if isinstance(value, dict) else value
    if data:
        kept = {
            key: value for key, value in table.get("data", {}).items() if key not in {"sources", "stages", "validation"}
        }
        table["data"] = {**kept, "url": data}
    if not table.get("data"):
        raise ConfigError("a folder does not say which data to look at", source=source, hint="Name a dataset: `data`.")
    table["model"] = {**wanted.get("model", {}), **_begun_with(source)}
    result = train(settings_from(Settings, table, where=str(recipe)), to, processes=processes, on_progress=on_progress)
    place, step = _placed(source)
    before = evaluate(place, run=to, step=step)
    return Compressed(run=to, steps=steps, loss_before=before.loss, loss=evaluate(to).loss, seconds=result.seconds)


def _inherited(source: str) -> dict[str, Any]:
    """Return the settings of the run that `source` names, without its hooks; none of a folder."""
    from datastore.training.run.folder import RunFolder, is_run  # noqa: PLC0415 - loads pyarrow

    folder = RunFolder.open(_placed(source)[0])
    if not is_run(folder.storage):
        return {}
    table: dict[str, Any] = msgspec.to_builtins(folder.config().settings)
    table["optim"]["init"] = False
    return {name: value for name, value in table.items() if name not in {"hooks", "parallel", "sync"}}


def _begun_with(source: str) -> dict[str, str]:
    """Return the settings of a model that begins as `source`: one that our GPT is not stays a model of `transformers`."""
    from datastore.training.export.huggingface import is_foreign  # noqa: PLC0415 - loads torch
    from datastore.training.run.folder import RunFolder, is_run  # noqa: PLC0415 - loads pyarrow

    place = _placed(source)[0]
    storage = RunFolder.open(place).storage
    return {"use": f"hf:{place}"} if not is_run(storage) and is_foreign(storage) else {"init": source}


def _placed(source: str) -> tuple[str, int | None]:
    """Return the place of a model, `RUN`, `RUN@STEP` or a folder, and the step."""
    from datastore.dataset.snapshot import split_reference  # noqa: PLC0415 - loads pyarrow

    place, name = split_reference(source)
    return place, int(name) if name.isdecimal() else None


def work(launch: Launch, arguments: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Be one rank: what `spawn` calls in each process. Takes and returns JSON values."""
    from datastore.training.session.session import run_session  # noqa: PLC0415 - loads torch

    request = convert(SessionRequest, arguments, where="the launcher")
    result = run_session(request, launch, lambda progress: report(msgspec.to_builtins(progress)))
    return msgspec.to_builtins(result)  # type: ignore[no-any-return]


def _run(
    request: SessionRequest, *, processes: int, launch: Launch, on_progress: Callable[[TrainingProgress], None] | None
) -> Result:
    tell = on_progress or (lambda _progress: None)
    # Settings made in Python were never checked: msgspec checks what it decodes only.
    request = convert(SessionRequest, msgspec.to_builtins(request), where="the settings")
    if processes != 1 and launch.world > 1:
        raise ConfigError(
            "ranks were started from outside, and processes are asked for",
            world=launch.world,
            processes=processes,
            hint="Use torchrun or --processes, not both.",
        )
    layout_of(request.settings, max(launch.world, processes) if processes > 0 else processes)
    if processes == 1:
        from datastore.training.session.session import run_session  # noqa: PLC0415 - loads torch

        return run_session(request, launch, tell)
    return _spawned(request, processes=processes, tell=tell)


def _spawned(request: SessionRequest, *, processes: int, tell: Callable[[TrainingProgress], None]) -> Result:
    """Run `processes` ranks, and start all of them again, as often as the settings allow, if one has died."""
    last = TrainingProgress(step=0, steps=request.settings.train.steps)

    def relay(event: dict[str, Any]) -> None:
        nonlocal last
        last = msgspec.convert(event, TrainingProgress)
        tell(last)

    restarts = request.settings.faults.restarts
    for left in range(restarts, -1, -1):
        try:
            results = spawn(f"{__name__}:work", msgspec.to_builtins(request), processes=processes, on_event=relay)
        except WaitError as error:
            if not left:
                error.hint = f"{error.hint} {_way_on(request.run)}".lstrip()
                raise
            note = f"{error.fact} ({_named(error)}): started again, {left - 1} of {restarts} restarts left"
            tell(msgspec.structs.replace(last, note=note))
        else:
            return msgspec.convert(results[0], Result)
    raise AssertionError("the last try returns or raises")


def _way_on(run: str) -> str:
    """Return what to do about a run that has ended by itself."""
    from datastore.checkpoint.steps import StepLog  # noqa: PLC0415 - seldom needed
    from datastore.training.run.folder import RunFolder  # noqa: PLC0415 - loads pyarrow

    newest = StepLog(RunFolder.open(run).storage).newest()
    if newest is None:
        return "No checkpoint had been saved: train it again."
    return f"All that was saved stands: `datastore resume {run}` goes on from step {newest}."


def _named(error: WaitError) -> str:
    return ", ".join(f"{key}={value}" for key, value in error.values.items())

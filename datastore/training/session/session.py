"""One rank's part in a run: join the others, restore, take steps, leave.

Everything here happens once. What happens in each step is in `trainer.py`, what happens between some of them in
`supervisor.py`.
"""

import platform
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from functools import partial
from importlib.metadata import version
from typing import Any

import msgspec

from datastore.checkpoint.checkpointer import Checkpointer
from datastore.checkpoint.keeping import Keep
from datastore.checkpoint.places.two import TwoPlaces
from datastore.checkpoint.steps import CheckpointerSettings
from datastore.document import decode, encode
from datastore.errors import ResumeError
from datastore.host import utc_now
from datastore.loader.settings import Rank
from datastore.training.export.initial import foreign_state, initial_state, teacher, with_shape
from datastore.training.hooks.base import RunState, training_hooks
from datastore.training.launcher import Launch, on_first_signal
from datastore.training.machine import device_name, pick_device, use_machine
from datastore.training.metrics import MetricsWriter, Result, TrainingProgress
from datastore.training.parallel.building import Beginning
from datastore.training.parallel.choose import choose
from datastore.training.parallel.layout import layout_of
from datastore.training.parallel.ranks import Ranks, connect
from datastore.training.run.data import Versions
from datastore.training.run.feed import held_out
from datastore.training.run.folder import (
    CONFIG_KEY,
    RunConfig,
    RunFolder,
    RunSession,
    decode_config,
    encode_config,
    is_run,
    new_session,
    open_split,
    own_versions,
    versions_to_read,
)
from datastore.training.run.lock import RunLock
from datastore.training.run.profile import Profiler, window_of
from datastore.training.run.split import Split, ValidationSamples
from datastore.training.session.request import SessionRequest
from datastore.training.session.trackers import TrackedRun, Trackers, make_trackers
from datastore.training.settings import CheckpointSettings, MetricsSettings, Settings
from datastore.training.supervisor import Outputs, Supervisor
from datastore.training.trainer import Trainer

__all__ = ["run_session"]


def run_session(request: SessionRequest, launch: Launch, report: Callable[[TrainingProgress], None]) -> Result:
    """Take this rank's part in a run until its last step or a signal; return how it ended, the same on every rank.

    Raises:
        DatastoreError: see `start.train`.
    """
    started = time.monotonic()
    layout_of(request.settings, launch.world)
    stop = threading.Event()
    with ExitStack() as stack:
        stack.enter_context(on_first_signal(stop.set, last_word=launch.world == 1))
        device = pick_device(request.settings.train.device, launch)
        ranks = stack.enter_context(connect(launch, device=device, timeout_s=request.settings.train.timeout_s))
        name = ranks.share("session", new_session)
        folder = RunFolder.open(request.run)
        lock = RunLock(folder.storage, session=name, take_over=request.take_over)
        config = decode_config(
            ranks.share("config", lambda: encode_config(_config_under(stack.enter_context(lock), request, folder)))
        )
        layout = layout_of(config.settings, ranks.world)
        machine = use_machine(config.settings.train, ranks, layout, threads=folder.threads_before(ranks.world))
        versions = _agree_on_versions(config, ranks)
        split = open_split(config, versions)
        strategy = choose(layout, ranks, config.settings.sync)
        # Not kept: what a run begins with is as large as the whole model, and more.
        trainer = Trainer.build(
            config, split, strategy, machine=machine, beginning=_beginning(config, folder, split, ranks)
        )
        stack.callback(trainer.loader.close)
        checkpointer = stack.enter_context(_open_checkpointer(config.settings, folder, ranks, session=name))
        supervisor = Supervisor(
            trainer, session=name, checkpointer=checkpointer, samples=_samples(split, trainer), stop=stop
        )
        trainer.guard = checkpointer.guard
        if config.settings.metrics.profile:
            supervisor.profiler = Profiler(window_of(config.settings.metrics.profile), folder.storage, rank=ranks.rank)
        notes = [supervisor.restore(), _deletions_note(config, split, versions)]
        resumed_from = trainer.state.step
        _check_steps_are_left(trainer.state, run=request.run)
        if ranks.rank == 0:
            changed = folder.changes(config) if resumed_from else {}
            notes.append(_changes_note(changed))
            number = 1 + max((session.number for session in folder.sessions()), default=0)
            folder.store(config)  # Not before: what does not work must not be in the way of what does.
            session = _session(name, trainer, versions)
            folder.add_session(msgspec.structs.replace(session, number=number, changed=changed))
            trackers = Trackers(
                make_trackers(tables_of(config.settings.metrics)), _tracked(config, folder, resumed_from)
            )
            metrics = MetricsWriter(
                folder.storage,
                session=f"{number:06d}-{name}",
                first_step=resumed_from + 1,
                followers=[trackers],
            )
            stack.callback(metrics.close)
            supervisor.outputs = Outputs(folder.storage, lock, metrics, report, trackers.trouble)
        supervisor.tell("; ".join(filter(None, notes)))
        if trainer.state.step < trainer.state.steps:
            trainer.run(supervisor)
            if supervisor.profiler is not None:
                supervisor.profiler.close(trainer.state.step)
    return Result(
        run=folder.url,
        step=trainer.state.step,
        steps=trainer.state.steps,
        resumed_from=resumed_from,
        stopped=trainer.state.step < trainer.state.steps,
        loss=supervisor.last.loss if supervisor.last else None,
        validation_loss=supervisor.validation_loss,
        tokens_per_s=supervisor.meter.tokens_per_s,
        data_wait=supervisor.meter.data_wait,
        seconds=time.monotonic() - started,
        world=ranks.world,
        parameters=trainer.strategy.parameters(trainer.state.model),
        profile=supervisor.profiler.found if supervisor.profiler is not None else None,
    )


def _check_steps_are_left(state: RunState, *, run: str) -> None:
    if state.step > state.steps:
        raise ResumeError(
            "the run has taken more steps than it is to have",
            step=state.step,
            train_steps=state.steps,
            hint=f"To go on, ask for more. For what was there at an earlier step, see `datastore checkpoint ls {run}`: "
            f"`datastore fork {run}@STEP` begins another run with it, `datastore checkpoint rewind` drops what came later.",
        )


def _config_under(_lock: RunLock, request: SessionRequest, folder: RunFolder) -> RunConfig:
    """Return what rank 0 finds in the run folder, or will put there."""
    settings = request.settings
    settings = with_shape(settings, before=folder.config().settings if is_run(folder.storage) else None)
    if request.fresh:
        return folder.begin(settings, kept=training_hooks)
    return folder.again(settings, kept=training_hooks)


def _beginning(config: RunConfig, folder: RunFolder, split: Split, ranks: Ranks) -> Beginning:
    """Return what `model.init` names; no weights, if there is none, or the run has a checkpoint of its own."""
    init = config.settings.model.init or config.settings.model.use
    weights, moments = None, None
    if init and ranks.share("begun", lambda: "yes" if folder.has_checkpoint() else "no") == "no":
        if config.architecture:
            weights = foreign_state(config, split)
        else:
            weights, moments = initial_state(config, split, ranks.device)
    return Beginning(weights, moments, partial(teacher, datasets=split.datasets))


def _agree_on_versions(config: RunConfig, ranks: Ranks) -> Versions:
    """Return which versions of the datasets all ranks read: those that rank 0 finds."""
    text = ranks.share("versions", lambda: encode(versions_to_read(config)).decode())
    return decode(Versions, text.encode(), where="rank 0")


def _deletions_note(config: RunConfig, split: Split, versions: Versions) -> str:
    """Return what to tell of documents that were deleted since the run began."""
    own = own_versions(config)
    if versions == own:
        return ""
    deleted = sum(dataset.totals.deleted_documents for dataset in split.datasets)
    newer = [
        f"version {version} of {name}" for name, version in versions.sources.items() if version != own.sources[name]
    ]
    read = ", ".join(newer) or f"version {versions.training} of the dataset"
    return f"reads {read}, in which {deleted:,} documents are deleted: they are masked"


def _changes_note(changed: Mapping[str, tuple[Any, Any]]) -> str:
    """Return what to tell of changed settings: those on which the model depends that comes out."""
    return "; ".join(
        f"from here on {key} = {after} (before: {before})"
        for key, (before, after) in changed.items()
        if key.startswith(("hooks", "optim.", "data.sources", "data.stages", "data.temperature"))
    )


def keep_of(settings: CheckpointSettings) -> Keep:
    """Return which checkpoints are kept."""
    best = "validation_loss" if settings.keep_best else ""
    return Keep(last=settings.keep, every=settings.keep_every, best=best, best_count=max(1, settings.keep_best))


def _open_checkpointer(settings: Settings, folder: RunFolder, ranks: Ranks, *, session: str) -> Checkpointer:
    chosen, keep = settings.checkpoint, keep_of(settings.checkpoint)
    two = TwoPlaces(folder.storage, chosen.replica, keep=keep, codec=chosen.replica_codec)
    return Checkpointer(
        two if chosen.replica else folder.storage,
        keep=keep,
        rank=ranks.rank,
        world=ranks.world,
        session=session,
        options=CheckpointerSettings(wait_s=settings.train.timeout_s, codec=chosen.codec),
    )


def _samples(split: Split, trainer: Trainer) -> list[ValidationSamples]:
    settings = trainer.settings
    if not settings.eval.every:
        return []
    rank = Rank(trainer.strategy.place.reader, trainer.strategy.layout.readers)
    return held_out(split, settings, trainer.objective, trainer.context, count=settings.eval.samples, rank=rank)


def _session(name: str, trainer: Trainer, versions: Versions) -> RunSession:
    return RunSession(
        session=name,
        started=utc_now(),
        from_step=trainer.state.step,
        world=trainer.ranks.world,
        host=socket.gethostname(),
        device=device_name(trainer.state.device),
        precision=trainer.machine.precision,
        compiled=trainer.machine.compiled,
        threads=trainer.machine.threads,
        versions={
            "datastore": version("llm-datastore"),
            "python": platform.python_version(),
            "torch": version("torch"),
        },
        data=versions,
        loader=trainer.loader.state_dict() if versions.sources else {},
    )


def tables_of(settings: MetricsSettings) -> tuple[dict[str, Any], ...]:
    """Return the tables of the trackers that a run wants."""
    return (*([{"use": "tensorboard"}] if settings.tensorboard else []), *settings.trackers)


def _tracked(config: RunConfig, folder: RunFolder, resumed_from: int) -> TrackedRun:
    file = folder.storage.local_path(CONFIG_KEY)
    return TrackedRun(
        url=folder.url,
        created=config.created,
        first_step=resumed_from + 1,
        settings=msgspec.to_builtins(config.settings),
        folder=None if file is None else file.parent,
    )

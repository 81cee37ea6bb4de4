"""One rank's work on a run: join the others, restore, take steps, leave.

Everything here happens once. What happens in each step is in `loop.py`, what happens between some of them in `keeper.py`.
"""

import platform
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path

from datastore.checkpoint.checkpointer import Checkpointer
from datastore.checkpoint.steps import CheckpointerSettings, Keep
from datastore.document import Document, decode, encode
from datastore.errors import ConfigError
from datastore.host import utc_now
from datastore.loader.settings import Rank
from datastore.training.distributed import Ranks, connect
from datastore.training.launcher import Launch, on_first_signal
from datastore.training.machine import device_name, pick_device, use_machine
from datastore.training.metrics import MetricsWriter, Result, TrainingProgress
from datastore.training.model import parameter_count
from datastore.training.run.data import Split, ValidationSamples, Versions
from datastore.training.run.folder import (
    CONFIG_KEY,
    RunConfig,
    RunFolder,
    RunSession,
    decode_config,
    encode_config,
    new_session,
    open_split,
    versions_to_read,
)
from datastore.training.run.lock import RunLock
from datastore.training.settings import Settings, check_world
from datastore.training.supervisor import Outputs, Supervisor
from datastore.training.trainer import Parts, assemble, run_loop

__all__ = ["SessionRequest", "run_session"]


class SessionRequest(Document, frozen=True, kw_only=True):
    """What to do; the same on every rank."""

    run: str
    """URL of the run folder."""

    settings: Settings
    fresh: bool
    """Whether the run may be new; if not, it must exist."""

    take_over: bool = False
    """Whether to take the lock of a process of another machine, which is known to be gone."""


def run_session(task: SessionRequest, launch: Launch, report: Callable[[TrainingProgress], None]) -> Result:
    """Take this rank's part in a run until its last step or a signal; return how it ended, the same on every rank.

    Raises:
        DatastoreError: see `trainer.train`.
    """
    started = time.monotonic()
    check_world(task.settings, launch.world)
    stop = threading.Event()
    with ExitStack() as stack:
        stack.enter_context(on_first_signal(stop.set))
        device = pick_device(task.settings.train.device, launch)
        ranks = stack.enter_context(connect(launch, device=device, timeout_s=task.settings.train.timeout_s))
        name = ranks.share("session", new_session())
        folder = RunFolder.open(task.run)
        lock = RunLock(folder.storage, session=name, take_over=task.take_over)
        if ranks.rank == 0:
            stack.enter_context(lock)
        config = _agree_on_config(task, folder, ranks)
        machine = use_machine(config.settings.train, ranks, threads=folder.threads_before(ranks.world))
        versions = _agree_on_versions(config, ranks)
        split = open_split(config, versions)
        parts = assemble(config, split, ranks, machine=machine)
        stack.callback(parts.loader.close)
        checkpointer = stack.enter_context(_open_checkpointer(config.settings, folder, ranks, session=name))
        keeper = Supervisor(parts, session=name, checkpointer=checkpointer, samples=_samples(split, parts), stop=stop)
        note = "; ".join(filter(None, (keeper.restore(), _deletions_note(config, split, versions))))
        resumed_from = parts.run.step
        if ranks.rank == 0:
            folder.store(config)  # Not before: what does not work must not be in the way of what does.
            folder.add_session(_session(name, parts, versions))
            metrics = MetricsWriter(
                folder.storage, session=name, first_step=resumed_from + 1, tensorboard=_board(config.settings, folder)
            )
            stack.callback(metrics.close)
            keeper.outputs = Outputs(folder.storage, lock, metrics, report)
        keeper.tell(note)
        if parts.run.step < parts.run.steps:
            run_loop(parts.run, parts.work(checkpointer.guard), keeper)
    return Result(
        run=folder.url,
        step=parts.run.step,
        steps=parts.run.steps,
        resumed_from=resumed_from,
        stopped=parts.run.step < parts.run.steps,
        loss=keeper.last.loss if keeper.last else None,
        validation_loss=keeper.validation_loss,
        tokens_per_s=keeper.tokens_per_s,
        data_wait=keeper.data_wait,
        seconds=time.monotonic() - started,
        world=ranks.world,
        parameters=parameter_count(parts.run.model),
    )


def _agree_on_config(task: SessionRequest, folder: RunFolder, ranks: Ranks) -> RunConfig:
    """Return what rank 0 finds in the run folder, or will put there."""
    text = ""
    if ranks.rank == 0:
        text = encode_config(folder.begin(task.settings) if task.fresh else folder.again(task.settings))
    return decode_config(ranks.share("config", text))


def _agree_on_versions(config: RunConfig, ranks: Ranks) -> Versions:
    """Return which versions of the datasets all ranks read: those that rank 0 finds."""
    text = encode(versions_to_read(config)).decode() if ranks.rank == 0 else ""
    return decode(Versions, ranks.share("versions", text).encode(), where="rank 0")


def _deletions_note(config: RunConfig, split: Split, versions: Versions) -> str:
    """Return what to tell of documents that were deleted since the run began."""
    if versions.training == config.dataset.version:
        return ""
    deleted = split.training.totals.deleted_documents
    return (
        f"reads version {versions.training} of the dataset, in which {deleted:,} documents are deleted: they are masked"
    )


def _open_checkpointer(settings: Settings, folder: RunFolder, ranks: Ranks, *, session: str) -> Checkpointer:
    return Checkpointer(
        folder.storage,
        keep=Keep(last=settings.checkpoint.keep),
        rank=ranks.rank,
        world=ranks.world,
        session=session,
        options=CheckpointerSettings(wait_s=settings.train.timeout_s),
    )


def _samples(split: Split, parts: Parts) -> ValidationSamples | None:
    settings = parts.settings
    if not settings.eval.every:
        return None
    rank = Rank(parts.ranks.rank, parts.ranks.world)
    return split.samples(settings.eval.samples, seq_len=settings.data.seq_len, rank=rank, options=settings.loader)


def _session(name: str, parts: Parts, versions: Versions) -> RunSession:
    return RunSession(
        session=name,
        started=utc_now(),
        from_step=parts.run.step,
        world=parts.ranks.world,
        host=socket.gethostname(),
        device=device_name(parts.run.device),
        precision=parts.machine.precision,
        compiled=parts.machine.compiled,
        threads=parts.machine.threads,
        versions={
            "datastore": version("datastore"),
            "python": platform.python_version(),
            "torch": version("torch"),
        },
        data=versions,
    )


def _board(settings: Settings, folder: RunFolder) -> Path | None:
    """Return where TensorBoard's files go: it can only write to a local folder."""
    if not settings.metrics.tensorboard:
        return None
    config = folder.storage.local_path(CONFIG_KEY)
    if config is None:
        raise ConfigError(
            "TensorBoard writes to local folders only", run=folder.url, hint="Set metrics.tensorboard = false."
        )
    return config.parent / "tensorboard"

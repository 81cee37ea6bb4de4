"""A rehearsal of a run: what it would need of memory, disk and time, found without writing, and without holding the model.

Memory is that of the rank which has most, in the two moments that count: when the model is made whole, before ranks take it apart, and
in a step. Its passes run on tensors without numbers, on all layers; what a rank of a pipeline, or of `tensor`, has is taken to be its share.

Times are the least that they can be: of reading, at the rate at which one block was just read; of computing, at the rate of one
large product of matrices. What a device's library takes for itself is not counted.
"""

import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from datastore.dataset.snapshot import Dataset
from datastore.document import Document
from datastore.errors import ConfigError
from datastore.host import available_bytes, memory_bytes, resident_bytes
from datastore.training.export.initial import with_shape
from datastore.training.hooks.base import make_hooks, training_hooks
from datastore.training.launcher import Launch
from datastore.training.machine import flops_per_token, peak_flops, pick_device, precision_of
from datastore.training.objectives.catalog import make_objective
from datastore.training.parallel.building import check_hooks
from datastore.training.parallel.choose import differs
from datastore.training.parallel.layout import Layout, check_model, layout_of
from datastore.training.parallel.lesson import autocast
from datastore.training.parallel.passes import bytes_of
from datastore.training.run.folder import RunFolder, is_run, open_split
from datastore.training.run.split import Split
from datastore.training.session.imagination import Imagined, imagine
from datastore.training.settings import Settings
from datastore.units import format_bytes

__all__ = ["Memory", "Needs", "rehearse"]

_SAMPLE_BYTES = 2**21
"""How much is read to find out how fast that is."""

_FIRST_STEP_BYTES = 80 * 10**6
"""What the first step of a process loads and keeps: libraries' code, and their buffers (torch 2.13, six models and layouts, 70 to 90 MB)."""

_SIDE, _TRY_S = 1024, 0.2
"""Of the matrices that are multiplied to find out how fast that is, and for how long."""


class Memory(Document, frozen=True, kw_only=True):
    """The memory of one rank, the one that has most."""

    process_bytes: int
    """Python, torch and what else is loaded; on a GPU none of the device's."""

    weights_bytes: int
    """Of the rank's part, and of a reference that the objective keeps."""

    gathered_bytes: int
    """Weights of other ranks that are here for a block's own passes."""

    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int
    """Beyond weights and gradients, at the height of a step."""

    save_bytes: int
    """A copy of the rank's share of a checkpoint that is being written."""

    hook_bytes: int
    """What hooks keep: averages, masks, a teacher."""

    loader_bytes: int
    """Blocks of data that do not lie on this machine."""

    start_bytes: int
    """When the model is made, whole on each rank; weights and moments that it begins with beside it."""

    peak_bytes: int
    """The larger one of all of the step, and of process and start."""


class Needs(Document, frozen=True, kw_only=True):
    """What a run would need."""

    run: str
    ranks: int
    ranks_here: int
    device: str
    precision: str
    parameters: int
    """Trained ones, of the whole model."""

    parameters_per_rank: int
    memory: Memory
    memory_here_bytes: int
    """What the device, or this machine, has."""

    tokens_per_step: int
    tokens: int
    steps: int
    epochs: float
    data_bytes: int
    """Read in all, by all ranks, if nothing is read twice."""

    checkpoint_bytes: int
    """Of one step."""

    checkpoints_bytes: int
    """Of all that are kept at once, and one that is being written."""

    disk_free_bytes: int | None
    """None: the run is not on a disk of this machine."""

    data_s: float
    """Reading all of it by one thread, one block after the other."""

    compute_s: float
    """At the rate of one large product of matrices, all ranks of this machine together."""

    notes: tuple[str, ...] = ()


def rehearse(settings: Settings, run: str, *, launch: Launch, processes: int) -> Needs:
    """Return what the run would need on `processes` ranks, or on those of the launcher.

    Raises:
        ConfigError: it cannot fit into memory; or a setting is wrong, or does not fit the dataset.
        MissingError, ResumeError, StorageError: as `start.train`.
    """
    layout = layout_of(settings, max(launch.world, processes))
    check_hooks(make_hooks(settings.hooks, where="settings"), layout, differs=differs(settings.sync))
    here = max(launch.local_world, processes)
    folder = RunFolder.open(run)
    settings = with_shape(settings, before=folder.config().settings if is_run(folder.storage) else None)
    config = folder.begin(settings, kept=training_hooks)
    if not settings.model.use:
        shape = msgspec.structs.replace(settings.model, vocab_size=config.vocab_size)
        check_model(shape, layout, seq_len=settings.data.seq_len)
    device = pick_device(settings.train.device, launch)
    precision = precision_of(settings.train, device)
    split = open_split(config)
    process = 0 if device.type == "cuda" else resident_bytes() + _FIRST_STEP_BYTES
    model = imagine(config, split, layout, precision=precision)
    memory = _memory(model, settings, layout, process=process, loader=_loader_bytes(split, settings))
    there = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else memory_bytes()
    _refuse(memory, there, ranks=1 if device.type == "cuda" else here)
    sample = make_objective(settings.objective).tokens_per_sample(settings.data.seq_len)
    work = _work(split, settings, tokens_per_sample=sample)
    checkpoint = model.weights_bytes + bytes_of(model.moments) + bytes_of(model.hook_state)
    fixed = model.weights_bytes - model.trained_bytes  # Stored once, as they do not change.
    rate = _compute_rate(device, precision) * layout.world / (1 if device.type == "cuda" else here)
    flops = flops_per_token(settings.model, parameters=model.parameters, seq_len=min(sample, settings.data.seq_len))
    needs = Needs(
        run=folder.url,
        ranks=layout.world,
        ranks_here=here,
        device=device.type,
        precision=precision,
        parameters=model.parameters,
        parameters_per_rank=-(-model.parameters // (layout.world // layout.copies)),
        memory=memory,
        memory_here_bytes=there,
        tokens_per_step=settings.data.global_batch * sample,
        tokens=work.tokens,
        steps=settings.train.steps,
        epochs=work.epochs,
        data_bytes=work.data_bytes,
        checkpoint_bytes=checkpoint,
        checkpoints_bytes=fixed + (checkpoint - fixed) * _checkpoints(settings),
        disk_free_bytes=_disk_free(folder),
        data_s=work.data_bytes / _read_rate(split.datasets[0]),
        compute_s=work.tokens * flops / rate,
    )
    return msgspec.structs.replace(needs, notes=(*model.untried, *_notes(needs)))


def _memory(model: Imagined, settings: Settings, layout: Layout, *, process: int, loader: int) -> Memory:
    """Return the memory of the rank that has most."""
    cut = layout.tensor * layout.pipeline
    weights, trained = (bytes_of(one, over=layout.shard * cut) for one in (model.weights, model.trained))
    gathered, peak = 0, max(0, model.peak_bytes - model.trained_bytes)
    if layout.shard > 1:
        # Weights of some blocks, and their gradients; those of all blocks, if several passes add to them.
        gathered = (model.gathered_bytes + (model.gathered_bytes if model.passes == 1 else model.trained_bytes)) // cut
        peak = model.peak_bytes
    optimizer, state = (bytes_of(one, over=layout.shard * cut) for one in (model.moments, model.hook_state))
    copies = 2 if settings.model.use or settings.model.init else 1
    saves = 0 < settings.checkpoint.every < settings.train.steps
    memory = Memory(
        process_bytes=process,
        weights_bytes=weights,
        gathered_bytes=gathered,
        gradient_bytes=trained,
        optimizer_bytes=optimizer,
        activation_bytes=(peak // layout.context + model.others_bytes) // layout.tensor,
        save_bytes=(weights + optimizer + state) // layout.copies if saves else 0,
        hook_bytes=state + model.hook_bytes,
        loader_bytes=loader,
        start_bytes=copies * model.weights_bytes + (bytes_of(model.moments) if settings.optim.init else 0),
        peak_bytes=0,
    )
    step = weights + gathered + trained + optimizer + memory.activation_bytes + memory.save_bytes + memory.hook_bytes
    step += loader
    return msgspec.structs.replace(memory, peak_bytes=process + max(step, memory.start_bytes))


def _refuse(memory: Memory, there: int, *, ranks: int) -> None:
    if memory.peak_bytes * ranks <= there:
        return
    sizes = {name: getattr(memory, f"{name}_bytes") for name in _PARTS}
    largest = max(sizes, key=lambda name: sizes[name])
    raise ConfigError(
        "the run does not fit into memory",
        needed=format_bytes(memory.peak_bytes * ranks),
        there_is=format_bytes(there),
        **({"ranks": ranks} if ranks > 1 else {}),
        most_of_it=f"{largest}, {format_bytes(sizes[largest])}",
        hint=_ADVICE.get(
            largest, "Share the parameters between ranks on more machines (parallel.shard), or make the model smaller."
        ),
    )


_PARTS = ("weights", "gathered", "gradient", "optimizer", "activation", "hook", "save", "start")

_ADVICE = {
    "activation": "Lower train.micro_batch, or set train.recompute = true.",
    "hook": "Leave out a hook, or let it keep less: a smaller teacher, or its columns (`datastore teach`).",
    "start": "Each rank makes the whole model once: start fewer ranks on this machine, or make the model smaller.",
    "save": "Set checkpoint.every = 0: only saves in the background need a copy.",
}


@dataclass(frozen=True, slots=True)
class _Work:
    tokens: int
    epochs: float
    data_bytes: int


def _work(split: Split, settings: Settings, *, tokens_per_sample: int) -> _Work:
    """Return how much is read: of records, the part that their rows are of the dataset."""
    data, totals = settings.data, [one.totals for one in split.datasets]
    samples = settings.train.steps * data.global_batch
    tokens = sum(one.tokens for one in totals) * (1 - data.holdout)
    whole = max(1.0, tokens / data.seq_len if split.rows is None else split.rows.kept)
    stored = sum(one.size_bytes for one in totals)
    return _Work(samples * tokens_per_sample, samples / whole, round(stored * samples / whole))


def _checkpoints(settings: Settings) -> int:
    """Return how many steps are stored at once, with one that is being written."""
    every, steps = settings.checkpoint.every, settings.train.steps
    saved = -(-steps // every) if every else 1
    return min(saved, settings.checkpoint.keep + 1 + settings.checkpoint.keep_best)


def _loader_bytes(split: Split, settings: Settings) -> int:
    """Return what the loader keeps of data that lie elsewhere."""
    far = sum(
        one.totals.size_bytes for one in split.datasets if one.storage.local_path(one.segments.shard(0).path) is None
    )
    return min(far, settings.loader.memory_bytes)


def _read_rate(dataset: Dataset) -> float:
    """Return how many bytes a second the first block of the dataset came with."""
    path = dataset.segments.shard(0).path
    size = min(_SAMPLE_BYTES, int(dataset.segments.size_bytes[0]))
    started = time.perf_counter()
    dataset.storage.get_ranges(path, [(0, size)])
    return max(1, size) / max(time.perf_counter() - started, 1e-9)


def _compute_rate(device: torch.device, precision: str) -> float:
    """Return how many operations a second this machine does in one large product; of a GPU, what its maker says, if that is known."""
    known = peak_flops(device, precision)
    if known is not None:
        return known
    one = torch.ones(_SIDE, _SIDE, device=device)
    with autocast(device, precision):
        one @ one
        started, done = time.perf_counter(), 0
        while time.perf_counter() - started < _TRY_S:
            done += int((one @ one)[0, 0].item() > 0)
    return done * 2 * _SIDE**3 / (time.perf_counter() - started)


def _disk_free(folder: RunFolder) -> int | None:
    """Return what is free where the run will lie; None if that is no disk of this machine."""
    if "://" in folder.url:
        return None
    path = Path(folder.url)
    return shutil.disk_usage(next(one for one in (path, *path.parents) if one.exists())).free


def _notes(needs: Needs) -> Iterator[str]:
    free = available_bytes()
    wanted = needs.memory.peak_bytes * needs.ranks_here
    if needs.device == "cpu" and free is not None and wanted > free:
        yield f"only {format_bytes(free)} of memory are free now, {format_bytes(wanted)} are needed"
    if needs.disk_free_bytes is not None and needs.checkpoints_bytes > needs.disk_free_bytes:
        yield f"the checkpoints take {format_bytes(needs.checkpoints_bytes)}, and {format_bytes(needs.disk_free_bytes)} are free"

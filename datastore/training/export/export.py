"""A model out of a run: restored from one checkpoint, passed through the hooks' `export`, written as a Hugging Face folder.

`open_model` is how everything that uses a trained model gets it, from a run or from such a folder.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from datastore.checkpoint.checkpointer import Checkpointer
from datastore.checkpoint.loading.restore import Restored
from datastore.document import Document
from datastore.errors import ConfigError, ConflictError, MissingError
from datastore.storage.base import Storage
from datastore.storage.resolve import open_storage
from datastore.training.export.huggingface import HuggingFaceModel, read_folder, write_folder
from datastore.training.hooks.base import Hook, HookSet, RunState, leaving
from datastore.training.hooks.bottleneck import refuse_unmerged
from datastore.training.hooks.calibration import Calibration
from datastore.training.hooks.quantize import Quantize
from datastore.training.hooks.quantizing.settings import QuantizeSettings
from datastore.training.models.gpt import GPT
from datastore.training.objectives.base import HostRows, Objective
from datastore.training.objectives.catalog import make_objective
from datastore.training.parallel.building import build_with_hooks
from datastore.training.parallel.whole import alone
from datastore.training.run.architecture import context_of
from datastore.training.run.feed import calibration_rows
from datastore.training.run.folder import RunConfig, RunFolder, is_run, open_split
from datastore.units import Progress

__all__ = [
    "QUANTIZATIONS",
    "Exported",
    "RestoredRun",
    "empty_folder",
    "export",
    "model_of",
    "open_model",
    "restored",
]

QUANTIZATIONS = {"int8": QuantizeSettings(bits=8), "int4": QuantizeSettings(bits=4, group=32)}
"""What `quantize` can say."""

_STAGES = 2
"""Of an export: the model is read, and written."""


class Exported(Document, frozen=True, kw_only=True):
    """What an export wrote."""

    url: str
    step: int
    files: dict[str, int]
    """Size of each in bytes."""

    passed_over: tuple[str, ...] = ()
    """Newer steps that are damaged, each with its reason."""

    @property
    def size_bytes(self) -> int:
        """Size of all files."""
        return sum(self.files.values())


def export(
    run: str | os.PathLike[str],
    to: str | os.PathLike[str],
    *,
    step: int | None = None,
    quantize: str | None = None,
    replace: bool = False,
    progress: Progress | None = None,
) -> Exported:
    """Write the model of `run` at `step` (None: its newest sound checkpoint) to the folder `to`.

    `quantize` ("int8", "int4") comes after what the run's own hooks do, and in the place of those that quantize. A folder
    that holds a model is left alone unless `replace`. `progress` is told of its two stages: the model is read, and written.

    Raises:
        MissingError: there is no run, or no such step.
        ConflictError: the folder holds something.
        ConfigError: an unknown quantization, or one that does not fit the model.
        CorruptError: the checkpoint or the tokenizer is damaged.
    """
    run, to = os.fspath(run), os.fspath(to)
    if quantize is not None and quantize not in QUANTIZATIONS:
        raise ConfigError("unknown quantization", quantize=quantize, known=sorted(QUANTIZATIONS))
    target = empty_folder(to, replace=replace)
    loaded = model_of(restored(RunFolder.open(run), step=step), instead=QUANTIZATIONS[quantize] if quantize else None)
    refuse_unmerged(loaded.model)
    assert loaded.step is not None
    if progress is not None:
        progress(1, _STAGES)
    target.delete("config.json")  # Until the new one is there, the folder is not a model.
    files = write_folder(target, loaded)
    if progress is not None:
        progress(_STAGES, _STAGES)
    return Exported(url=target.url, step=loaded.step, files=files, passed_over=loaded.passed_over)


def open_model(source: str, *, step: int | None = None) -> HuggingFaceModel:
    """Return the model of a run (at `step`, or its newest sound checkpoint) or of a Hugging Face folder.

    Raises:
        MissingError: there is neither.
        ConfigError: `step` of a folder, which has none; or a model that is not ours.
    """
    storage = open_storage(source)
    if is_run(storage):
        return model_of(restored(RunFolder(storage), step=step))
    if step is not None:
        raise ConfigError("a model folder has no steps", source=source, hint="Name a run, or leave out `step`.")
    try:
        return read_folder(storage)
    except MissingError as error:
        raise MissingError(
            "there is no run and no model folder",
            url=storage.url,
            missing=str(error.values.get("key", "")),
            hint="Name a run that `datastore train` made, or a folder that `datastore checkpoint export` wrote.",
        ) from None


def empty_folder(to: str, *, replace: bool) -> Storage:
    """Return the folder `to`, which holds nothing, unless it may be replaced.

    Raises:
        ConflictError: it holds something.
    """
    target = open_storage(to)
    occupied = next((found.key for found in target.list()), None)
    if occupied is not None and not replace:
        raise ConflictError(
            "the folder is not empty",
            url=target.url,
            found=occupied,
            hint="Name another one, or overwrite it: `replace`.",
        )
    return target


@dataclass(frozen=True, slots=True)
class RestoredRun:
    """A run as it was at a step, before its hooks export the model: they may need their own state for that."""

    config: RunConfig
    state: RunState
    hooks: Mapping[str, Hook]
    objective: Objective
    found: Restored


def restored(folder: RunFolder, *, step: int | None) -> RestoredRun:
    """Return a run at `step` (None: its newest sound checkpoint), in one process.

    Raises:
        MissingError: there is no such run or step.
        CorruptError: it is damaged.
    """
    config = folder.config()
    objective = make_objective(config.settings.objective)
    state, hooks = build_with_hooks(config, alone(), objective)
    items: dict[str, Any] = {"model": state.model, "hooks": HookSet(hooks)}
    if objective.frozen is not None:
        items["reference"] = objective.frozen
    found = _restore(folder.storage, items, step=step)
    state.calibration = _calibration(config, objective)
    return RestoredRun(config, state, hooks, objective, found)


def model_of(run: RestoredRun, *, instead: QuantizeSettings | None = None) -> HuggingFaceModel:
    """Return the model of `run` after all hooks have exported it.

    `instead` quantizes in the place of the hooks that would: what they have rounded cannot be rounded otherwise.
    """
    model = run.state.model
    exporting = leaving(run.hooks)
    if instead is not None:
        quantize = Quantize(instead)
        quantize.start(run.state)
        exporting = [hook for hook in exporting if not isinstance(hook, Quantize)] + [quantize]
    for hook in exporting:
        model = hook.export(model)
    if isinstance(run.state.model, GPT) and not isinstance(model, GPT):
        raise ConfigError("a hook's export is not a GPT any more", found=type(model).__name__)
    return HuggingFaceModel(
        model,
        run.config.settings.data.seq_len,
        _tokenizer(run.config),
        run.config.end_of_text,
        objective=run.objective,
        step=run.found.step,
        passed_over=run.found.passed_over,
    )


def _calibration(config: RunConfig, objective: Objective) -> Calibration:
    """Return the rows that hooks may look at; nothing is read before one does."""

    @cache
    def read(count: int) -> HostRows:
        return calibration_rows(open_split(config), config.settings, objective, context_of(config), count=count)

    return Calibration(read, objective, torch.device("cpu"))


def _restore(storage: Storage, items: dict[str, Any], *, step: int | None) -> Restored:
    with Checkpointer(storage) as checkpointer:
        if checkpointer.latest() is None:
            raise MissingError(
                "the run has no checkpoint yet", url=storage.url, hint="Let it train until the first one."
            )
        return checkpointer.restore(items, step="latest" if step is None else step, partial=True, fresh=True)


def _tokenizer(config: RunConfig) -> bytes | None:
    return next((raw for one in open_split(config).datasets if (raw := one.tokenizer()) is not None), None)

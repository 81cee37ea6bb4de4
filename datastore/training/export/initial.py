"""The beginning of a run that has the model of another run, or of a Hugging Face folder.

    [model]
    init = "runs/base@8000"

    [optim]
    init = true      # its moments, too: of a run of ours only

The shape of the model comes with it, and its vocabulary. The schedule and the order begin anew, and without `optim.init` the optimizer:
it is another run. Each rank reads the whole of it, and what rank 0 has read counts.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from datastore.checkpoint.checkpointer import Checkpointer
from datastore.checkpoint.inspect import inspect_step
from datastore.checkpoint.steps import StepLog
from datastore.dataset.snapshot import Dataset, split_reference
from datastore.errors import ConfigError, MissingError
from datastore.storage.resolve import open_storage
from datastore.training.export.export import open_model
from datastore.training.export.huggingface import HuggingFaceModel, shape_of_folder
from datastore.training.hooks.base import Hook, Moments, make_hooks
from datastore.training.hooks.bottleneck import refuse_unmerged
from datastore.training.models.huggingface import FOREIGN
from datastore.training.objectives.catalog import make_objective
from datastore.training.parallel.building import calibration_of, refuse_other_parameters
from datastore.training.run.architecture import foreign_weights
from datastore.training.run.folder import RunConfig, RunFolder, is_run
from datastore.training.run.split import Split
from datastore.training.settings import ModelSettings, Settings

__all__ = ["foreign_state", "initial_state", "teacher", "with_shape"]

_DEFAULTS = ModelSettings()


def with_shape(settings: Settings, *, before: Settings | None = None) -> Settings:
    """Return `settings` with the shape of the model that `model.init` names; `before` are those that the run has already.

    Raises:
        MissingError: there is no such model.
        ConfigError: `settings` ask for another shape.
    """
    given = settings.model
    hooks = make_hooks(settings.hooks, where="settings")
    if not given.init:
        _refuse_cuts(hooks)
        if settings.optim.init:
            raise ConfigError(
                "`optim.init` takes the moments of the run that `model.init` names, and none is named",
                hint="Name a run as `model.init`, or leave out `optim.init`.",
            )
        return settings
    if before is not None and before.model.init == given.init:
        shape = before.model  # Which is what it was then, whether the model is still there or not.
    else:
        shape = msgspec.structs.replace(_shape_of(given.init), init=given.init)
        for hook in hooks.values():
            shape = hook.shape(shape)
        if settings.optim.init:
            refuse_without_moments(settings)
    differ = {
        f"model.{name}": (getattr(given, name), getattr(shape, name))
        for name in ModelSettings.__struct_fields__
        if getattr(given, name) not in (getattr(_DEFAULTS, name), getattr(shape, name)) and name != "init"
    }
    if differ:
        raise ConfigError(
            "the model to begin with has another shape",
            init=given.init,
            **{key: f"asked for {asked}, it has {has}" for key, (asked, has) in differ.items()},
            hint="Leave these settings out: the shape is that of the model.",
        )
    return msgspec.structs.replace(settings, model=shape)


def _refuse_cuts(hooks: Mapping[str, Hook]) -> None:
    cutting = [name for name, hook in hooks.items() if type(hook).initial is not Hook.initial]
    if cutting:
        raise ConfigError(
            "these hooks cut weights to begin with, and there are none",
            hooks=cutting,
            hint="Name a run or a folder as model.init.",
        )


def initial_state(config: RunConfig, split: Split, device: torch.device) -> tuple[Mapping[str, Tensor], Moments | None]:
    """Return the weights that a run begins with, in float32, and with `optim.init` their moments, after its hooks have cut them.

    Raises:
        MissingError: there is no such model.
        ConfigError: it is quantized, or was trained on other tokens; it has no moments of this optimizer; or a hook cannot cut it.
        CorruptError: it is damaged.
    """
    settings = config.settings
    found = _opened(settings.model.init, split.datasets)
    weights = _weights_of(found.model, init=settings.model.init)
    moments = _moments_of(settings, found) if settings.optim.init else None
    cutting = [
        hook for hook in make_hooks(settings.hooks, where="settings").values() if type(hook).initial is not Hook.initial
    ]
    if not cutting:
        return weights, moments
    objective = make_objective(settings.objective)
    model = objective.model(_shape_of(settings.model.init))
    model.load_state_dict(weights)
    model.to(device)
    calibration = calibration_of(config, split, objective, device)
    for hook in cutting:
        model = hook.initial(model, calibration)
        moments = None if moments is None else hook.moments(moments)
    return {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}, moments


def foreign_state(config: RunConfig, split: Split) -> Mapping[str, Tensor] | None:
    """Return the weights in the folder that `model.use` names; None if it has none.

    Raises:
        ConfigError: they were trained on other tokens, or no model of `transformers` fits the objective.
    """
    weights, use = foreign_weights(config), config.settings.model.use
    if weights is not None:
        try:
            tokenizer = open_storage(use.removeprefix(FOREIGN)).get("tokenizer.json")
        except MissingError:
            return weights
        _refuse_other_tokens(tokenizer, init=use, datasets=split.datasets)
    return weights


def _weights_of(model: nn.Module, *, init: str) -> Mapping[str, Tensor]:
    """Return the weights of `model`, in float32."""
    refuse_unmerged(model)
    weights = model.state_dict()
    if any(not tensor.is_floating_point() for tensor in weights.values()):
        raise ConfigError(
            "a quantized model is no model to begin with",
            init=init,
            hint="Name a run whose hooks do not quantize, or a folder of float weights.",
        )
    return {name: tensor.float() for name, tensor in weights.items()}


def _moments_of(settings: Settings, found: HuggingFaceModel) -> Moments:
    """Return the moments of the step that a model was `found` in, whole, on the CPU."""
    source, _ = _named(settings.model.init)
    assert found.step is not None
    refuse_without_moments(settings, step=found.step)
    moments: dict[str, dict[str, Tensor]] = {}
    with Checkpointer(open_storage(source)) as checkpointer:
        checkpointer.restore({"optim": moments}, step=found.step, partial=True, fresh=True)
    refuse_other_parameters(moments, found.model)
    return moments


def refuse_without_moments(settings: Settings, *, step: int | None = None) -> None:
    """Refuse `optim.init` where `model.init` has no state of this optimizer in `step`, or its newest one.

    Raises:
        ConfigError: it is a folder, another optimizer's, or without.
    """
    init, optim = settings.model.init, settings.optim
    source, named = _named(init)
    storage = open_storage(source)
    if not is_run(storage):
        raise ConfigError(
            "a model folder has no moments", init=init, hint="Leave out `optim.init`, or name a run as `model.init`."
        )
    theirs = RunFolder(storage).config().settings.optim.use
    if theirs != optim.use:
        raise ConfigError(
            "the model to begin with has the moments of another optimizer",
            init=init,
            it_has=theirs,
            asked_for=optim.use,
            hint=f'Set `optim.use = "{theirs}"`, or leave out `optim.init`.',
        )
    step = step or named or max(StepLog(storage).steps(), default=None)
    if step is None:
        return  # `open_model` says so.
    saved = {item.name: item for item in inspect_step(storage, step).items}
    if "optim" not in saved or not saved["optim"].tensors:
        raise ConfigError(
            "the step to begin with has no moments",
            init=init,
            step=step,
            optimizer=theirs,
            has=sorted(saved),
            hint="Leave out `optim.init`, or name a step that has the item optim (`datastore checkpoint show`).",
        )


def teacher(name: str, *, datasets: Sequence[Dataset]) -> nn.Module:
    """Return the model that `name` says, as it would be exported, to teach a run on `datasets`.

    Raises:
        MissingError: there is no such model.
        ConfigError: it was trained on other tokens.
        CorruptError: it is damaged.
    """
    return _opened(name, datasets).model


def _opened(init: str, datasets: Sequence[Dataset]) -> HuggingFaceModel:
    source, step = _named(init)
    found = open_model(source, step=step)
    _refuse_other_tokens(found.tokenizer, init=init, datasets=datasets)
    return found


def _refuse_other_tokens(tokenizer: bytes | None, *, init: str, datasets: Sequence[Dataset]) -> None:
    ours = next((raw for dataset in datasets if (raw := dataset.tokenizer()) is not None), None)
    if ours is not None and tokenizer is not None and _vocabulary(ours) != _vocabulary(tokenizer):
        raise ConfigError(
            "the model was trained with another tokenizer",
            init=init,
            url=datasets[0].url,
            hint="Ingest the text with the tokenizer of the model.",
        )


def _shape_of(init: str) -> ModelSettings:
    source, step = _named(init)
    storage = open_storage(source)
    if is_run(storage):
        config = RunFolder(storage).config()
        if config.settings.model.use:
            raise ConfigError(
                "a run that trains a model of transformers is not begun with",
                init=init,
                model=config.settings.model.use,
                hint='Export it (`datastore checkpoint export`), and name the folder: model.use = "hf:FOLDER".',
            )
        return msgspec.structs.replace(config.settings.model, vocab_size=config.vocab_size)
    if step is not None:
        raise ConfigError("a model folder has no steps", init=init, hint="Name a run, or leave out the step.")
    try:
        return shape_of_folder(storage)
    except MissingError:
        raise MissingError(
            "there is no run and no model folder",
            init=init,
            hint="Name a run that `datastore train` made, or a folder with a config.json and weights.",
        ) from None


def _named(init: str) -> tuple[str, int | None]:
    """Return the place that `init` names, and the step."""
    source, name = split_reference(init.removeprefix("hf:"))
    if not name:
        return source, None
    if not name.isdecimal() or int(name) < 1:
        raise ConfigError("not a step", init=init, hint="Write RUN@8000, or the name of the run alone.")
    return source, int(name)


def _vocabulary(tokenizer: bytes) -> dict[str, Any]:
    """Return which token has which id; a post-processor does not matter."""
    return Tokenizer.from_str(json.dumps(json.loads(tokenizer))).get_vocab()

"""The weights that a run begins with, if they are those of another run or of a Hugging Face folder.

    [model]
    init = "runs/base@8000"

The shape of the model comes with them, and its vocabulary. The optimizer, the schedule and the order begin anew: it is another run.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from tokenizers import Tokenizer
from torch import Tensor

from datastore.dataset.snapshot import Dataset, split_reference
from datastore.errors import ConfigError, MissingError
from datastore.storage.resolve import open_storage
from datastore.training.export.export import open_model
from datastore.training.export.huggingface import shape_of_folder
from datastore.training.run.folder import RunFolder, is_run
from datastore.training.settings import ModelSettings, Settings

__all__ = ["initial_weights", "with_shape"]

_DEFAULTS = ModelSettings()


def with_shape(settings: Settings, *, before: Settings | None = None) -> Settings:
    """Return `settings` with the shape of the model that `model.init` names; `before` are those that the run has already.

    Raises:
        MissingError: there is no such model.
        ConfigError: `settings` ask for another shape.
    """
    given = settings.model
    if not given.init:
        return settings
    if before is not None and before.model.init == given.init:
        shape = before.model  # Which is what it was then, whether the model is still there or not.
    else:
        shape = msgspec.structs.replace(_shape_of(given.init), init=given.init)
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


def initial_weights(init: str, datasets: Sequence[Dataset]) -> Mapping[str, Tensor]:
    """Return the weights of the model that `init` names, in float32, for a run on `datasets`.

    Raises:
        MissingError: there is no such model.
        ConfigError: it is quantized, or was trained on other tokens.
        CorruptError: it is damaged.
    """
    source, step = _named(init)
    found = open_model(source, step=step)
    weights = found.model.state_dict()
    if any(not tensor.is_floating_point() for tensor in weights.values()):
        raise ConfigError(
            "a quantized model is no model to begin with", init=init, hint="Name a run, or a folder of float weights."
        )
    ours = next((raw for dataset in datasets if (raw := dataset.tokenizer()) is not None), None)
    if ours is not None and found.tokenizer is not None and _vocabulary(ours) != _vocabulary(found.tokenizer):
        raise ConfigError(
            "the model was trained with another tokenizer",
            init=init,
            url=datasets[0].url,
            hint="Ingest the text with the tokenizer of the model.",
        )
    return {name: tensor.float() for name, tensor in weights.items()}


def _shape_of(init: str) -> ModelSettings:
    source, step = _named(init)
    storage = open_storage(source)
    if is_run(storage):
        config = RunFolder(storage).config()
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

"""The model of a run: ours, as its objective wants it, or the one of `transformers` whose config the run keeps.

The same seed gives the same initial weights on any device, as they are drawn on the CPU.
"""

from collections.abc import Mapping
from typing import Any

import msgspec
import torch
from torch import Tensor, nn

from datastore.digest import digest_bytes
from datastore.errors import ConfigError
from datastore.training.models.gpt import Block
from datastore.training.models.huggingface import blocks_of, build, positions_of, weights_in
from datastore.training.objectives.base import Context, Form, Objective
from datastore.training.objectives.catalog import make_objective
from datastore.training.run.folder import RunConfig

__all__ = ["build_model", "context_of", "foreign_weights", "recompute"]


def context_of(config: RunConfig) -> Context:
    """Return what objectives may know of a run."""
    settings = config.settings
    return Context(seed=settings.train.seed, seq_len=settings.data.seq_len, vocab_size=config.vocab_size)


def _weights_seed(config: RunConfig) -> int:
    """Return the seed of the initial weights."""
    seed = digest_bytes(f"{config.settings.train.seed}/weights".encode())[:8]
    return int.from_bytes(seed, "big")


def build_model(config: RunConfig, objective: Objective) -> nn.Module:
    """Return the model of a run with its initial weights, on the CPU: what the objective wants, or that of the config.

    Raises:
        ConfigError: no model of `transformers` fits the objective, or it has fewer places than `data.seq_len`.
    """
    if config.architecture:
        options = _foreign_options(config, objective)
        found = build(config.architecture, form=_form_of(objective), options=options, seed=_weights_seed(config))
        _refuse_long_texts(found, config.settings.data.seq_len)
        return found
    model = objective.model(msgspec.structs.replace(config.settings.model, vocab_size=config.vocab_size))
    initialize = getattr(model, "initialize", None)
    if initialize is not None:
        initialize(torch.Generator().manual_seed(_weights_seed(config)))
    return model


def _refuse_long_texts(model: nn.Module, seq_len: int) -> None:
    """Refuse texts that are longer than a model has places for: it would look behind the end of its table."""
    places = positions_of(model)
    if places is not None and seq_len > places:
        raise ConfigError(
            "the model has fewer places than a sample has tokens",
            seq_len=seq_len,
            places=places,
            hint=f"Set `data.seq_len={places}`, or make a model with more in its config.json (max_position_embeddings, n_positions).",
        )


def _form_of(objective: Objective) -> Form:
    """Return which kind of model of `transformers` the objective is for.

    Raises:
        ConfigError: none.
    """
    if objective.form is None:
        raise ConfigError(
            "the objective has a model of its own", objective=type(objective).__name__, hint="Leave out model.use."
        )
    return objective.form


def _foreign_options(config: RunConfig, objective: Objective) -> dict[str, Any]:
    """Return what the run changes in the config of a model of `transformers`."""
    options: dict[str, Any] = {"vocab_size": config.vocab_size}
    if objective.classes:
        options |= {"num_labels": objective.classes, "pad_token_id": getattr(objective.settings, "pad_token", 0)}
    return options


def foreign_weights(config: RunConfig) -> Mapping[str, Tensor] | None:
    """Return the weights in the folder that `model.use` names; None if it has none.

    Raises:
        ConfigError: no model of `transformers` fits the objective.
    """
    objective = make_objective(config.settings.objective)
    options, seed = _foreign_options(config, objective), _weights_seed(config)
    return weights_in(config.settings.model.use, form=_form_of(objective), options=options, seed=seed)


def recompute(model: nn.Module) -> None:
    """Let each block keep its input only, and compute the rest again in the backward pass."""
    enable = getattr(model, "gradient_checkpointing_enable", None)
    if enable is not None:
        enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for block in blocks_of(model):
        if isinstance(block, Block):
            block.recompute = True

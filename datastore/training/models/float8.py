"""Linear layers that multiply in fp8, as torchao has them: eight bits for each number, with a scale for each matrix or each row.

Only the linear layers of blocks are changed: the output layer is where rounding costs most, and embeddings multiply nothing. Weights stay
float32, under the same names: inputs, weights and gradients are rounded for each product, and what lies between two layers is bfloat16.
So a checkpoint does not tell in which precision it was made.

Source: P. Micikevicius et al., "FP8 Formats for Deep Learning", arXiv:2209.05433; torchao's `float8`.
"""

import logging
from dataclasses import replace
from importlib import import_module
from typing import Any

import torch
from torch import nn

from datastore.errors import ConfigError, DependencyError
from datastore.training.models.huggingface import blocks_of

__all__ = ["FLOAT8", "check_float8", "use_float8"]

FLOAT8 = ("fp8", "fp8_emulated")
"""Precisions that are meant here."""

_MULTIPLE = 16
"""What the sizes of a matrix must be a multiple of, for the kernels."""

_FIRST = (8, 9)
"""The first CUDA capability with products in fp8: Ada, Hopper."""


def check_float8(precision: str, device: torch.device) -> None:
    """Raise unless `device` multiplies as `precision` says, if that is one of fp8.

    Raises:
        ConfigError: it cannot.
        DependencyError: torchao is not installed.
    """
    if precision not in FLOAT8:
        return
    _torchao()
    if precision == "fp8" and not (device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FIRST):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
        raise ConfigError(
            "this device does not multiply in fp8",
            device=name,
            hint='Set train.precision = "bf16"; `train.precision=fp8_emulated` tries out on any device what fp8 does to a loss.',
        )


def use_float8(model: nn.Module, *, precision: str, recipe: str) -> None:
    """Let the linear layers of the blocks of `model` multiply in fp8, in place; parameters and their names stay.

    Layers that a hook has put in the place of linear ones, adapters, and those whose sizes are no multiples of 16 stay as they are.

    Raises:
        ConfigError: no layer is left.
        DependencyError: torchao is not installed.
    """
    float8 = _torchao()
    config = replace(float8.Float8LinearConfig.from_recipe_name(recipe), emulate=precision == "fp8_emulated")
    blocks = blocks_of(model)
    for block in blocks:
        float8.convert_to_float8_training(block, config=config, module_filter_fn=_fits)
    if not any(isinstance(one, float8.float8_linear.Float8Linear) for block in blocks for one in block.modules()):
        raise ConfigError(
            "no layer of this model can multiply in fp8",
            model=type(model).__name__,
            hint="Choose widths that are multiples of 16, leave out hooks that replace layers, or another train.precision.",
        )


def _fits(module: nn.Module, name: str) -> bool:
    sizes = getattr(module, "in_features", 1), getattr(module, "out_features", 1)
    return type(module) is nn.Linear and not any(size % _MULTIPLE for size in sizes) and "lora_" not in name


def _torchao() -> Any:
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)  # It tells of each kernel that this machine cannot load, of which none is needed.
    try:
        return import_module("torchao.float8")
    except ModuleNotFoundError as error:
        raise DependencyError(
            "fp8 needs an extra", missing=error.name, hint="Install it: pip install 'llm-datastore[fp8]'."
        ) from None
    finally:
        logging.disable(before)

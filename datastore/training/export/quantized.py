"""The words of `config.json` about quantized layers, in the words of compressed-tensors: written from a model, and read again.

Layers that are quantized alike are a group. Its targets are every `Linear`, if there is one group and no embedding in it, or the names
of its layers; `ignore` names the linear layers that stay as they are.
With `dequantize` transformers makes real weights of all layers at once, as it must for some, see `hooks/quantizing/holding.py`.
"""

from collections.abc import Mapping
from re import match
from typing import Any

import msgspec
from torch import nn

from datastore.errors import ConfigError
from datastore.training.hooks.quantizing.holding import is_table, needs_real_weights, refuse_for_folder
from datastore.training.hooks.quantizing.layers import Packed, blank_packed, replace_module
from datastore.training.hooks.quantizing.settings import Scheme, matrices_of

__all__ = ["quantization_config", "replace_quantized", "schemes_of"]


def schemes_of(model: nn.Module) -> dict[str, Scheme]:
    """Return the scheme of each quantized layer of `model`."""
    return {name: one.scheme for name, one in model.named_modules() if isinstance(one, Packed)}


def quantization_config(model: nn.Module) -> dict[str, Any] | None:
    """Return the `quantization_config` of a model; None: nothing in it is quantized."""
    schemes = schemes_of(model)
    if not schemes:
        return None
    alike: dict[Scheme, list[str]] = {}
    for name, scheme in schemes.items():
        alike.setdefault(scheme, []).append(name)
    layers = {name: model.get_submodule(name) for name in schemes}
    every = len(alike) == 1 and not any(is_table(one) for one in layers.values())
    plain = [name for name, one in model.named_modules() if isinstance(one, nn.Linear)]
    refuse_for_folder(layers, schemes, kinds=alike)
    at_once = {"dequantize": True} if needs_real_weights(layers, schemes) else {}
    return {
        "quant_method": "compressed-tensors",
        **at_once,
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            f"group_{number}": {
                "targets": ["Linear"] if every else names,
                "format": "pack-quantized",
                **_arguments(scheme),
            }
            for number, (scheme, names) in enumerate(alike.items())
        },
        "ignore": sorted({"lm_head", *plain} - set(schemes)),
    }


def _arguments(scheme: Scheme) -> dict[str, Any]:
    inputs = {
        "num_bits": 8,
        "type": "int",
        "symmetric": True,
        "strategy": "token",
        "group_size": None,
        "dynamic": True,
    }
    return {
        "weights": {
            "num_bits": scheme.bits,
            "type": "int",
            "symmetric": scheme.symmetric,
            "strategy": "group" if scheme.group else "channel",
            "group_size": scheme.group or None,
            "dynamic": False,
        },
        "input_activations": inputs if scheme.activations else None,
        "output_activations": None,
    }


def replace_quantized(model: nn.Module, config: Mapping[str, Any], *, where: str) -> None:
    """Put packed layers, to be filled, in the place of those that `config` says are quantized.

    Raises:
        ConfigError: it is a quantization that is not read here.
    """
    try:
        groups = [(group["targets"], _scheme(group)) for group in config["config_groups"].values()]
        ignored = list(config.get("ignore") or ())
    except (KeyError, TypeError, AttributeError, msgspec.ValidationError):
        raise ConfigError(
            "not a quantization that is read here", url=where, hint="See docs/compression-formats.md."
        ) from None
    if config.get("format") != "pack-quantized":
        raise ConfigError("not a quantization that is read here", url=where, format=config.get("format"))
    for name, layer in matrices_of(model).items():
        kind = "Linear" if isinstance(layer, nn.Linear) else "Embedding"
        if any(_names(pattern, name, kind) for pattern in ignored):
            continue
        scheme = next((one for targets, one in groups if any(_names(target, name, kind) for target in targets)), None)
        if scheme is not None:
            replace_module(model, name, blank_packed(layer, scheme))


def _scheme(group: Mapping[str, Any]) -> Scheme:
    weights, inputs = group["weights"], group.get("input_activations")
    known = {"type": "int", "num_bits": 8, "dynamic": True, "strategy": "token", "symmetric": True}
    if inputs is not None and any(inputs.get(key) != value for key, value in known.items()):
        raise KeyError("input_activations")
    return msgspec.convert(
        {
            "bits": weights["num_bits"],
            "group": weights["group_size"] or 0,
            "symmetric": weights.get("symmetric", True),
            "activations": 0 if inputs is None else 8,
        },
        Scheme,
    )


def _names(pattern: str, name: str, kind: str) -> bool:
    """Whether a target of compressed-tensors means the layer `name`: its name, `re:` and an expression, or its class."""
    if pattern.startswith("re:"):
        return match(pattern.removeprefix("re:"), name) is not None
    return pattern in {name, kind}

"""The items of a checkpoint: something with state, its name in the checkpoint, and its skeleton without tensors.

The state of an optimizer does not say what its parameters are, and its tensors need not look like them: factored,
flattened, of 8 bits, or of float32 beside weights of bfloat16. So dtype and shape of each parameter are saved with it,
under the key `PARAMETERS`: a restore compares parameters with parameters, and then takes the state as it is.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import torch

from datastore.checkpoint.format.tree import PackedTree, pack
from datastore.checkpoint.format.wrapped import Wrappers
from datastore.checkpoint.tensors import describe, spec_text
from datastore.digest import digest_hex
from datastore.errors import ConfigError

__all__ = ["PARAMETERS", "PerRank", "check_items", "item_digests", "item_key", "pack_item", "plain_name", "unwrapped"]

PARAMETERS = "datastore.parameters"
"""Where the state of an optimizer says what its parameters are, in the order of its groups."""

_ITEM_NAME = re.compile(r"[A-Za-z0-9_.-]+")

_WRAPPER = "_orig_mod"


@dataclass(frozen=True, slots=True)
class PerRank:
    """An item of which each rank has its own, such as the state of a random generator; restored in the same world only."""

    state: Any
    """What any item may be: an object with `state_dict` and `load_state_dict`, or a tree of tensors and plain values."""


def check_items(items: Any) -> None:
    """Raise `ConfigError` unless `items` is a mapping: of names to what has a state."""
    if not isinstance(items, Mapping):
        hint = 'Name each thing that is to be saved: {"model": model, "optim": optimizer}.'
        raise ConfigError("items are not a dict", type=type(items).__name__, hint=hint)


def item_key(name: str, item: Any, rank: int) -> str:
    """Return the name that `item` is stored under.

    Raises:
        ConfigError: not a name.
    """
    if not isinstance(name, str) or not _ITEM_NAME.fullmatch(name) or name == "__metadata__":
        hint = "Use letters, digits, '.', '_' and '-'."
        raise ConfigError("not a name for an item of a checkpoint", name=name, hint=hint)
    return f"{name}@{rank}" if isinstance(item, PerRank) else name


def pack_item(name: str, item: Any, rank: int, *, wrappers: Wrappers | None = None) -> PackedTree[torch.Tensor]:
    """Return the state of one item as a skeleton and tensors; those that are made of others are noted in `wrappers`.

    Raises:
        ConfigError: it has no state, or a leaf of it cannot be stored.
    """
    key = item_key(name, item, rank)
    state = _state_of(key, item.state if isinstance(item, PerRank) else item)
    return pack(state, name=key, describe=describe, expand=(wrappers or Wrappers()).take_apart)


def _state_of(name: str, item: Any) -> dict[str, Any]:
    if isinstance(item, dict):
        return item
    if isinstance(item, torch.nn.Module):
        return _module_state(name, unwrapped(item))
    if callable(getattr(item, "state_dict", None)) and callable(getattr(item, "load_state_dict", None)):
        state = item.state_dict()
        if isinstance(state, dict):
            return _with_parameters(state, item) if isinstance(item, torch.optim.Optimizer) else state
        raise ConfigError("state_dict() did not return a dict", item=name, type=type(state).__name__)
    hint = "Pass a dict, or an object with state_dict() and load_state_dict()."
    if isinstance(item, list | tuple):
        hint = f"Give each of them a name of its own, such as {name}_0 and {name}_1."
    elif callable(getattr(item, "get_state", None)):
        hint = 'Pass {"state": generator.get_state()}, and set that after the restore.'
    raise ConfigError("this item has no state to save", item=name, type=type(item).__name__, hint=hint)


def _with_parameters(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    found = [spec_text(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    return {**state, PARAMETERS: found}


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """Return the module inside `torch.compile`, `DistributedDataParallel` and `DataParallel`."""
    while True:
        inner = getattr(module, _WRAPPER, None)
        if not isinstance(inner, torch.nn.Module) and type(module).__name__ in {
            "DistributedDataParallel",
            "DataParallel",
        }:
            inner = getattr(module, "module", None)
        if not isinstance(inner, torch.nn.Module):
            return module
        module = inner


def _module_state(name: str, module: torch.nn.Module) -> dict[str, Any]:
    state = module.state_dict()
    plain = {plain_name(key): value for key, value in state.items()}
    if len(plain) < len(state):
        raise ConfigError("two tensors have one name", item=name, hint=f"Rename what is called {_WRAPPER!r}.")
    return plain


def plain_name(key: str) -> str:
    """Return a parameter's name without the level that `torch.compile` puts around compiled submodules."""
    return ".".join(part for part in key.split(".") if part != _WRAPPER)


def item_digests(items: Mapping[str, Any]) -> dict[str, str]:
    """Return a digest of each skeleton: equal on two ranks exactly if their values and tensor shapes are."""
    return {name: digest_hex(msgspec.json.encode(skeleton, order="deterministic")) for name, skeleton in items.items()}

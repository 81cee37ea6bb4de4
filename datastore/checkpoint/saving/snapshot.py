"""What one save will hold, fixed at the moment of the call: plain values copied, tensors referred to.

Items are named objects with `state_dict()` or nested dicts. A module is looked at through `torch.compile` and
`DistributedDataParallel`, so a checkpoint does not tell how it was wrapped. Tensors that share their memory (tied
weights) are stored once. Nothing is copied here: it takes milliseconds whatever the size of the model.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import msgspec
import torch

from datastore.checkpoint.format.tree import Packed, TensorSpec, pack, specs
from datastore.checkpoint.plan import owners
from datastore.checkpoint.tensors import Piece, describe, local_piece, memory_key
from datastore.digest import digest_hex
from datastore.errors import ConfigError
from datastore.formats.safetensors import ITEM_BYTES

__all__ = ["Captured", "PerRank", "Snapshot", "capture", "item_digests", "item_key", "pack_item", "unwrapped"]

_ITEM_NAME = re.compile(r"[A-Za-z0-9_.-]+")
_WRAPPER = "_orig_mod"


@dataclass(frozen=True, slots=True)
class PerRank:
    """An item of which each rank has its own, such as the state of a random generator; restored in the same world only."""

    state: Any


@dataclass(frozen=True, slots=True)
class Captured:
    """One piece of one tensor that this rank will write, and the further names of the same memory."""

    name: str
    spec: TensorSpec
    piece: Piece
    aliases: tuple[str, ...]

    @property
    def size_bytes(self) -> int:
        """Bytes of the piece."""
        return self.piece.box.elements * ITEM_BYTES[self.spec.dtype]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """Everything that one rank contributes to one save."""

    items: dict[str, Any]
    own_items: dict[str, Any]
    pieces: tuple[Captured, ...]

    @property
    def specs(self) -> dict[str, TensorSpec]:
        """Each tensor of the items that all ranks share, and of the rank's own."""
        both = {**self.items, **self.own_items}
        return {name: spec for item in both for name, spec in specs(both[item], name=item)}


def capture(items: Mapping[str, Any], *, rank: int, world: int) -> Snapshot:
    """Return what `rank` of `world` saves of `items`.

    Raises:
        ConfigError: an item or a leaf of it cannot be stored; the message has its path.
    """
    packed = {item_key(name, item, rank): pack_item(name, item, rank) for name, item in items.items()}
    own = {item_key(name, item, rank) for name, item in items.items() if isinstance(item, PerRank)}
    tensors = {name: tensor for item in packed.values() for name, tensor in item.tensors.items()}
    private = {name for item in own for name in packed[item].tensors}
    return Snapshot(
        items={name: item.skeleton for name, item in packed.items() if name not in own},
        own_items={name: packed[name].skeleton for name in sorted(own)},
        pieces=_pieces_of(tensors, private=private, rank=rank, world=world),
    )


def _pieces_of(
    tensors: Mapping[str, torch.Tensor], *, private: set[str], rank: int, world: int
) -> tuple[Captured, ...]:
    names: dict[tuple[object, ...], list[str]] = {}
    pieces = {name: local_piece(tensor, name) for name, tensor in tensors.items()}
    for name, piece in pieces.items():
        key = memory_key(piece.tensor) if piece.box.elements else (name,)
        names.setdefault((*key, piece.box, name in private), []).append(name)
    found = []
    for same in names.values():
        spec = describe(tensors[same[0]], same[0])
        assert spec is not None
        found.append(Captured(same[0], spec, pieces[same[0]], tuple(same[1:])))
    shared = {item.name: item.size_bytes for item in found if item.piece.replicated and item.name not in private}
    owner = owners(shared, world=world)
    mine = (item for item in found if owner.get(item.name, rank) == rank and item.piece.first)
    return tuple(item for item in mine if item.piece.box.elements or not prod(item.spec.shape))


def item_key(name: str, item: Any, rank: int) -> str:
    """Return the name that `item` is stored under.

    Raises:
        ConfigError: not a name.
    """
    if not isinstance(name, str) or not _ITEM_NAME.fullmatch(name) or name == "__metadata__":
        hint = "Use letters, digits, '.', '_' and '-'."
        raise ConfigError("not a name for an item of a checkpoint", name=name, hint=hint)
    return f"{name}@{rank}" if isinstance(item, PerRank) else name


def pack_item(name: str, item: Any, rank: int) -> Packed[torch.Tensor]:
    """Return the state of one item as a skeleton and tensors.

    Raises:
        ConfigError: it has no state, or a leaf of it cannot be stored.
    """
    key = item_key(name, item, rank)
    return pack(_state_of(key, item.state if isinstance(item, PerRank) else item), name=key, describe=describe)


def _state_of(name: str, item: Any) -> dict[str, Any]:
    if isinstance(item, dict):
        return item
    if isinstance(item, torch.nn.Module):
        return _module_state(name, unwrapped(item))
    if callable(getattr(item, "state_dict", None)) and callable(getattr(item, "load_state_dict", None)):
        state = item.state_dict()
        if isinstance(state, dict):
            return state
        raise ConfigError("state_dict() did not return a dict", item=name, type=type(state).__name__)
    hint = "Pass a dict, or an object with state_dict() and load_state_dict()."
    raise ConfigError("this item has no state to save", item=name, type=type(item).__name__, hint=hint)


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
    plain = {_plain_name(key): value for key, value in state.items()}
    if len(plain) < len(state):
        raise ConfigError("two tensors have one name", item=name, hint=f"Rename what is called {_WRAPPER!r}.")
    return plain


def _plain_name(key: str) -> str:
    """Return a parameter's name without the level that `torch.compile` puts around compiled submodules."""
    return ".".join(part for part in key.split(".") if part != _WRAPPER)


def item_digests(items: Mapping[str, Any]) -> dict[str, str]:
    """Return a digest of each skeleton: equal on two ranks exactly if their values and tensor shapes are."""
    return {name: digest_hex(msgspec.json.encode(skeleton, order="deterministic")) for name, skeleton in items.items()}

"""State as torch.distributed.checkpoint (DCP) flattens it, and as a checkpoint of ours holds it; and which step its users mean.

DCP names each leaf by its path, the keys joined by dots, and makes a text of every key. A checkpoint of ours has items, which are
maps. So what lies in a map under a key of the state becomes the item of that name; what lies at the top itself, or in a list there,
goes to the item `_root`.
"""

import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from datastore.checkpoint.format.tree import TensorSpec, child_name, pack, specs, unpack
from datastore.checkpoint.items import item_key
from datastore.checkpoint.tensors import DTYPES
from datastore.errors import ConfigError
from datastore.storage.base import Storage
from datastore.storage.resolve import open_storage

__all__ = ["ROOT", "Leaf", "Path", "StepPlace", "item_trees", "leaves_of", "tensor_name"]

ROOT = "_root"
"""The item of what lies at the top of the state."""

Path = tuple[str | int, ...]

_STEP = re.compile(r"(?:.*[^0-9])?([0-9]+)")


@dataclass(frozen=True, slots=True)
class Leaf:
    """A leaf of the state of a checkpoint: a tensor, by its name in the parts, or a plain value."""

    path: Path
    tensor: str = ""
    spec: TensorSpec | None = None
    value: Any = None


def tensor_name(path: Path) -> str:
    """Return what the tensor at `path` of the state is called in a part.

    Raises:
        ConfigError: a key of the state cannot be the name of an item.
    """
    item, rest = _place(path)
    name = item_key(item, {}, 0)
    for key in rest:
        name = child_name(name, key)
    return name


def item_trees(leaves: Iterable[tuple[Path, Any]]) -> dict[str, Any]:
    """Return the skeletons of the items that hold `leaves`: each a path, and a `TensorSpec` or a plain value.

    An empty map has no leaf, so DCP does not tell that it is there.

    Raises:
        ConfigError: a value cannot be stored, or two paths do not go together.
    """
    items: dict[str, dict[str | int, Any]] = {}
    for path, value in leaves:
        item, rest = _place(path)
        item_key(item, {}, 0)
        _put(items.setdefault(item, {}), rest, value, path)
    return {name: pack(_with_lists(tree), name=name, describe=_describe).skeleton for name, tree in items.items()}


def leaves_of(items: Mapping[str, Any]) -> dict[str, Leaf]:
    """Return every leaf of the state that `items` hold, by the name that DCP gives it."""
    # Tensors that take no memory stand for what is saved: the library asks a list whether there are tensors in it.
    stand_ins: dict[int, tuple[str, TensorSpec]] = {}
    kept: list[dict[str, torch.Tensor]] = []
    state: dict[str, Any] = {}
    for name, skeleton in items.items():
        if "@" in name:
            continue  # One rank's own.
        tensors = {}
        for tensor, spec in specs(skeleton, name=name):
            tensors[tensor] = torch.empty(spec.shape, dtype=DTYPES[spec.dtype], device="meta")
            stand_ins[id(tensors[tensor])] = tensor, spec
        kept.append(tensors)
        tree = unpack(skeleton, name=name, tensors=tensors)
        state.update(tree if name == ROOT else {name: tree})
    flat, mapping = flatten_state_dict(state)
    leaves = {}
    for fqn, value in flat.items():
        if id(value) in stand_ins:
            leaves[fqn] = Leaf(mapping[fqn], *stand_ins[id(value)])
        else:
            leaves[fqn] = Leaf(mapping[fqn], value=value)
    return leaves


def _place(path: Path) -> tuple[str, Path]:
    first = str(path[0])
    if len(path) == 1 or type(path[1]) is int or first == ROOT:
        if first == ROOT:
            raise ConfigError("this key of the state is taken", key=ROOT, hint="Rename it.")
        return ROOT, path
    return first, path[1:]


def _put(tree: dict[str | int, Any], path: Path, value: Any, whole: Path) -> None:
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ConfigError("a leaf of the state has leaves of its own", path=whole, hint="Rename one of them.")
    tree[path[-1]] = value


def _with_lists(tree: Any) -> Any:
    """Return `tree` with lists where all keys are numbers: the library makes a text of every key of a map."""
    if type(tree) is not dict:
        return tree
    inner = {key: _with_lists(value) for key, value in tree.items()}
    if inner and all(type(key) is int for key in inner):
        return [inner[key] for key in sorted(inner)]
    return inner


def _describe(value: Any, name: str) -> TensorSpec | None:
    if isinstance(value, torch.Tensor):
        hint = "Put tensors in lists or dicts: DCP takes a tuple of them for one value."
        raise ConfigError("this value holds a tensor", path=name, hint=hint)
    return value if isinstance(value, TensorSpec) else None


class StepPlace:
    """A run and a step of it, as a user of DCP names them: one path, or both."""

    def __init__(self, url: str | os.PathLike[str] | None, step: int | None) -> None:
        self._url, self._given = url, step
        self.reset(None)

    def reset(self, checkpoint_id: str | os.PathLike[str] | None) -> None:
        """Take a new name; the run that was given stays."""
        self.url, self.step = self._url, self._given
        if checkpoint_id is None:
            return
        run, _, last = str(checkpoint_id).rstrip("/").rpartition("/")
        found = _STEP.fullmatch(last)
        if found is None:
            if self._url is not None:
                raise ConfigError(
                    "no step in this name",
                    checkpoint_id=str(checkpoint_id),
                    hint="End it with a number, or pass `step`.",
                )
            self.url = str(checkpoint_id)
            return
        self.step = int(found[1])
        self.url = self._url if self._url is not None else run or "."

    def storage(self) -> Storage:
        """Return the storage of the run.

        Raises:
            ConfigError: no run was named.
        """
        if self.url is None:
            raise ConfigError("no run was named", hint="Pass `checkpoint_id`, such as runs/first/step-1000, or a URL.")
        return open_storage(str(self.url))

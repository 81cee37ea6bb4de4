"""State as a tree: nested dicts, lists and tuples whose leaves are tensors or plain values. Nothing is pickled.

`pack` turns such a tree into a skeleton of plain JSON, in which each tensor is replaced by its dtype and shape, and
a flat map from the tensor's name (its path) to the tensor. `unpack` puts both together again; the tree that comes
back is equal, the order of keys, tuples, integer keys, NaN and big integers included. Any other leaf is refused by the name of its path:
the price is that a custom object must offer `state_dict()`; the gain is that loading runs no code.

What JSON cannot say is written as an object with the key `$`:

    {"$": "tensor", "dtype": "F32", "shape": [2, 3]}     {"$": "float", "value": "nan"}     {"$": "int", "value": "0x..."}
    {"$": "tuple", "values": [...]}                      {"$": "map", "pairs": [[key, value], ...]}
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from typing_extensions import override

from datastore.errors import ConfigError, plain

__all__ = [
    "MAX_DEPTH",
    "Describe",
    "PackedTree",
    "TensorSpec",
    "child_name",
    "differences",
    "pack",
    "spec_differences",
    "specs",
    "unpack",
]

T = TypeVar("T")

_OF_WRAPPERS = ("module.", "_orig_mod.")
"""What DDP, and `torch.compile`, put in front of the names in a state."""

MAX_DEPTH = 64
"""Deeper trees are refused: they are cycles or mistakes, and JSON decoders have limits of their own."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """What a tensor is, whatever it holds: safetensors' name of its dtype, and its global shape."""

    dtype: str
    shape: tuple[int, ...]

    @override
    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


Describe = Callable[[Any, str], TensorSpec | None]
"""Returns the spec of a tensor, or None for what is no tensor; the second argument is its name, for errors."""

Convert = Callable[[Any, str], Any]
"""Returns what stands in the place of a value; the second argument is its name."""


@dataclass(frozen=True, slots=True)
class PackedTree(Generic[T]):
    """A tree taken apart."""

    skeleton: Any
    tensors: dict[str, T] = field(default_factory=dict)


def child_name(name: str, key: str | int) -> str:
    """Return the name of what is stored under `key` in the container called `name` (`~` and `/` escaped as in RFC 6901)."""
    return f"{name}/{str(key).replace('~', '~0').replace('/', '~1')}"


def _itself(value: Any, _name: str) -> Any:
    return value


def pack(value: Any, *, name: str, describe: Describe, expand: Convert = _itself) -> PackedTree[Any]:
    """Return `value` as a skeleton and its tensors; what `expand` returns for a value and its name is packed in its place.

    Raises:
        ConfigError: a leaf or a key is neither a tensor nor a plain value; the message has its path.
    """
    packed: PackedTree[Any] = PackedTree(skeleton=None)
    skeleton = _Packer(describe, expand, packed.tensors).pack(value, name, 0)
    return PackedTree(skeleton=skeleton, tensors=packed.tensors)


class _Packer:
    def __init__(self, describe: Describe, expand: Convert, tensors: dict[str, Any]) -> None:
        self._describe, self._expand = describe, expand
        self._tensors = tensors

    def pack(self, value: Any, name: str, depth: int) -> Any:
        if depth > MAX_DEPTH:
            raise ConfigError("state is nested too deeply", path=name, limit=MAX_DEPTH, hint="Flatten it.")
        value = self._expand(value, name)
        spec = self._describe(value, name)
        if spec is not None:
            self._tensors[name] = value
            return {"$": "tensor", "dtype": spec.dtype, "shape": list(spec.shape)}
        if isinstance(value, dict):
            return self._pack_map(value, name, depth)
        if type(value) in (list, tuple):
            values = [self.pack(inner, child_name(name, i), depth + 1) for i, inner in enumerate(value)]
            return values if type(value) is list else {"$": "tuple", "values": values}
        return _pack_plain(value, name)

    def _pack_map(self, value: dict[Any, Any], name: str, depth: int) -> Any:
        keys = [_checked_key(key, name) for key in value]
        if len({str(key) for key in keys}) < len(keys):
            raise ConfigError("a number and a text are the same key", path=name, hint="Rename one of them.")
        values = [self.pack(inner, child_name(name, key), depth + 1) for key, inner in value.items()]
        if "$" not in value and all(type(key) is str for key in keys) and keys == sorted(keys):
            return dict(zip(keys, values, strict=True))
        return {"$": "map", "pairs": [[key, inner] for key, inner in zip(keys, values, strict=True)]}


def _checked_key(key: Any, name: str) -> str | int:
    key = plain(key)
    if type(key) is str:
        return _checked_text(key, name)
    if type(key) is int and -(2**63) <= key < 2**63:
        return key
    raise ConfigError("not a key that can be stored", path=name, key=repr(key), hint="Use texts or integers as keys.")


def _checked_text(value: str, name: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ConfigError("not valid Unicode text", path=name, hint="Remove lone surrogates.") from None
    return value


def _pack_plain(value: Any, name: str) -> Any:
    value = plain(value)
    kind = type(value)
    if kind is float:
        return value if math.isfinite(value) else {"$": "float", "value": str(value)}
    if kind is int:
        return value if -(2**63) <= value < 2**63 else {"$": "int", "value": hex(value)}
    if kind is str:
        return _checked_text(value, name)
    if value is None or kind is bool:
        return value
    raise ConfigError(
        "this value cannot be stored in a checkpoint",
        path=name,
        type=f"{kind.__module__}.{kind.__qualname__}",
        hint=_way_out(value),
    )


def _way_out(value: Any) -> str:
    """Return what to do with a value that cannot be stored."""
    if type(value).__name__ == "ndarray":
        return "Store torch.from_numpy(array)."
    if callable(getattr(value, "state_dict", None)):
        return "Store its state_dict(), or pass it as an item of its own."
    if callable(getattr(value, "get_state", None)):
        return "Store what get_state() returns, and set that after the restore."
    return "Store tensors, numbers, texts, bools, None, lists and dicts of them; convert the rest."


def unpack(skeleton: Any, *, name: str, tensors: Mapping[str, T], collapse: Convert = _itself) -> Any:
    """Return the tree that `pack` took apart, with `tensors` in the places of its tensors, and what `collapse` makes of each map."""
    if isinstance(skeleton, list):
        return [
            unpack(inner, name=child_name(name, i), tensors=tensors, collapse=collapse)
            for i, inner in enumerate(skeleton)
        ]
    if not isinstance(skeleton, dict):
        return skeleton
    kind = skeleton.get("$", "map")
    if kind == "map":
        found = {
            key: unpack(inner, name=child_name(name, key), tensors=tensors, collapse=collapse)
            for key, inner in _pairs(skeleton)
        }
        return collapse(found, name)
    if kind == "tensor":
        return tensors[name]
    if kind == "tuple":
        return tuple(unpack(skeleton["values"], name=name, tensors=tensors, collapse=collapse))
    return float(skeleton["value"]) if kind == "float" else int(skeleton["value"], 16)


def specs(skeleton: Any, *, name: str) -> Iterator[tuple[str, TensorSpec]]:
    """Yield name and spec of each tensor of the tree, in its order."""
    if isinstance(skeleton, list):
        for i, inner in enumerate(skeleton):
            yield from specs(inner, name=child_name(name, i))
    elif isinstance(skeleton, dict):
        match skeleton.get("$"):
            case "tensor":
                yield name, TensorSpec(skeleton["dtype"], tuple(skeleton["shape"]))
            case "tuple":
                yield from specs(skeleton["values"], name=name)
            case "float" | "int":
                return
            case _:
                for key, inner in _pairs(skeleton):
                    yield from specs(inner, name=child_name(name, key))


def differences(saved: Any, wanted: Any, *, name: str) -> list[str]:
    """Return a line for each place where the tree `saved` cannot be put into the tree `wanted` without loss or guess.

    Both are skeletons. Keys and tensors must be the same on both sides; plain values, and lists of them, are what a
    checkpoint brings. An empty `wanted` dict takes everything.
    """
    ours, theirs = _map_of(wanted), _map_of(saved)
    if ours is not None and theirs is not None:
        return _map_differences(theirs, ours, name) if ours else []
    if ours is not None or theirs is not None:
        return [f"{name}: {'expected' if ours is not None else 'saved'} as a dict"]
    mine, other = dict(specs(wanted, name=name)), dict(specs(saved, name=name))
    if (name in mine) != (name in other):
        return [f"{name}: saved as {other.get(name, 'no tensor')}, expected as {mine.get(name, 'no tensor')}"]
    return spec_differences(other, mine)


def _map_differences(saved: dict[Any, Any], wanted: dict[Any, Any], name: str) -> list[str]:
    found = _name_differences(*([child_name(name, key) for key in side] for side in (saved, wanted)))
    for key, inner in wanted.items():
        if key in saved:
            found += differences(saved[key], inner, name=child_name(name, key))
    return found


def spec_differences(saved: Mapping[str, TensorSpec], wanted: Mapping[str, TensorSpec]) -> list[str]:
    """Return a line for each tensor that only one side has, or that differs in dtype or shape."""
    found = _name_differences(list(saved), list(wanted))
    for name, spec in wanted.items():
        if name in saved and saved[name] != spec:
            found.append(f"{name}: saved as {saved[name]}, expected as {spec}")
    return found


def _name_differences(saved: Sequence[str], wanted: Sequence[str]) -> list[str]:
    """Return a line for each name that only one side has; or one line, if all that differs is what a wrapper of the model puts in front."""
    here, there = set(saved), set(wanted)
    if here == there:
        return []
    for prefix in _OF_WRAPPERS:
        for done, names, others in (("saved", saved, there), ("expected", wanted, here)):
            if {_bare(name, prefix) for name in names} == others:
                return [
                    f"{names[0]}: {done} with `{prefix}` in front of each name (take the state of the model inside)"
                ]
    found = [f"{name}: saved, but not expected" for name in saved if name not in there]
    return found + [f"{name}: expected, but not saved" for name in wanted if name not in here]


def _bare(name: str, prefix: str) -> str:
    path, slash, last = name.rpartition("/")
    return f"{path}{slash}{last.removeprefix(prefix)}"


def _map_of(skeleton: Any) -> dict[str | int, Any] | None:
    if isinstance(skeleton, dict) and skeleton.get("$", "map") == "map":
        return dict(_pairs(skeleton))
    return None


def _pairs(skeleton: dict[str, Any]) -> Sequence[tuple[str | int, Any]]:
    if skeleton.get("$") == "map":
        return [(key, inner) for key, inner in skeleton["pairs"]]
    return list(skeleton.items())

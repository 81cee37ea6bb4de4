"""Tensors that are made of others, as quantized ones of torchao are: saved as a dict of the tensors that they are made of.

Such a class names its tensors in `__tensor_flatten__`, together with a context: what it is beside them. Class, context and shape are saved as
plain values under the key `WRAPPED` of the dict. Where the program has the tensor already, its parts are filled in place. Where it has none,
as an optimizer that has not stepped yet, the tensor is made anew by `__tensor_unflatten__`: by a class that the program has imported.
Nothing is imported by its name, so loading runs no code that was not loaded before.

Classes of torch itself are not for this: a nested tensor has sizes of its own, and one that is still on its way has no values.
"""

import sys
from collections.abc import Iterator
from typing import Any

import torch

from datastore.checkpoint.format.tree import child_name, unpack
from datastore.errors import ConfigError, plain

__all__ = ["WRAPPED", "Wrappers", "is_wrapper", "parts_of"]

WRAPPED = "datastore.wrapped"
"""Where the dict of a tensor's parts says what they make up."""

_PLAIN = (type(None), bool, int, float, str)

_UNKNOWN = "of type"
"""The key of a context's value that is not plain: it can be compared, not made again."""


def is_wrapper(value: Any) -> bool:
    """Return whether `value` is a tensor that is made of others, of a class that is not torch's own."""
    kind = type(value)
    return (
        isinstance(value, torch.Tensor)
        and hasattr(kind, "__tensor_flatten__")
        and kind.__module__.partition(".")[0] != "torch"
    )


def parts_of(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the tensors that `tensor` is made of in the end, or itself."""
    if not is_wrapper(tensor):
        yield tensor
        return
    for name in _names(tensor):
        yield from parts_of(getattr(tensor, name))


class Wrappers:
    """The wrappers of one item: taken apart for a save, and put together from what was saved."""

    def __init__(self) -> None:
        self._known: dict[str, torch.Tensor] = {}

    def take_apart(self, value: Any, name: str) -> Any:
        """Return what to save in the place of `value`, which is called `name`."""
        if not is_wrapper(value):
            return value
        self._known[name] = value
        return {part: getattr(value, part) for part in _names(value)} | {WRAPPED: _kind_of(value)}

    def differences(self, saved: Any, *, name: str) -> list[str]:
        """Return a line for each wrapper in the skeleton `saved` that is another one here, or that cannot be made."""
        found: list[str] = []

        def look(state: dict[Any, Any], name: str) -> Any:
            kind = state.get(WRAPPED)
            if kind is not None:
                found.extend(self._differences(kind, name))
            return state

        unpack(saved, name=name, tensors=_Anything(), collapse=look)
        return found

    def _differences(self, saved: Any, name: str) -> list[str]:
        known = self._known.get(name)
        try:
            if known is not None:
                return [f"{name}: {line}" for line in _kind_differences(saved, _kind_of(known))]
            _class_of(saved["class"])
            _context_of(saved["context"])
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            return [f"{name}: cannot be made of its parts: {error}"]
        return []

    def put_together(self, state: dict[Any, Any], name: str, *, filled: dict[str, torch.Tensor]) -> Any:
        """Return the tensor that the dict `state` is in parts; one that is here if its parts are those in `filled`.

        Raises:
            ConfigError: the class refuses its own parts.
        """
        kind = state.get(WRAPPED)
        if kind is None:
            return state
        parts = {part: value for part, value in state.items() if part != WRAPPED}
        known = self._known.get(name)
        if known is not None and all(
            value is self._here(child_name(name, part), filled) for part, value in parts.items()
        ):
            return known
        try:
            make = _class_of(kind["class"]).__tensor_unflatten__
            return make(parts, _context_of(kind["context"]), torch.Size(kind["shape"]), tuple(kind["stride"]))
        except Exception as error:
            hint = "Use the release that saved it, or restore into a tensor that is made already."
            raise ConfigError(f"a tensor cannot be made of its parts: {error}", path=name, hint=hint) from error

    def is_here(self, value: Any, name: str) -> bool:
        """Return whether `value` is the wrapper called `name` that the item has had all along."""
        return value is self._known.get(name, self)

    def _here(self, name: str, filled: dict[str, torch.Tensor]) -> torch.Tensor | None:
        return self._known.get(name, filled.get(name))


class _Anything(dict[str, None]):
    """Has nothing for each name."""

    def __missing__(self, _key: str) -> None:
        return None


def _names(tensor: Any) -> list[str]:
    """Return which of its tensors are there: torchao leaves some out (no zero point)."""
    return [name for name in tensor.__tensor_flatten__()[0] if getattr(tensor, name) is not None]


def _kind_of(tensor: Any) -> dict[str, Any]:
    kind = type(tensor)
    return {
        "class": f"{kind.__module__}.{kind.__qualname__}",
        "context": _plain(tensor.__tensor_flatten__()[1]),
        "shape": list(tensor.shape),
        "stride": list(tensor.stride()),
    }


def _kind_differences(saved: dict[str, Any], ours: dict[str, Any]) -> Iterator[str]:
    if saved["class"] != ours["class"]:
        yield f"saved as {saved['class']}, expected as {ours['class']}"
        return
    theirs, mine = saved["context"], ours["context"]
    if isinstance(theirs, dict) and isinstance(mine, dict) and theirs.keys() == mine.keys() == {"dict"}:
        before, now = ({str(key): value for key, value in side["dict"]} for side in (theirs, mine))
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key):
                yield f"saved with {key} {_shown(before.get(key))}, expected with {_shown(now.get(key))}"
    elif theirs != mine:
        yield f"saved with {_shown(theirs)}, expected with {_shown(mine)}"


def _shown(value: Any) -> str:
    """Return what `_plain` was given as a text for people."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_shown, value))}]"
    if isinstance(value, dict):
        return ", ".join(f"torch.{inner}" if kind == "dtype" else str(inner) for kind, inner in value.items())
    return repr(value)


def _plain(value: Any) -> Any:
    match value:
        case None | bool() | int() | float() | str() if type(plain(value)) in _PLAIN:
            return plain(value)
        case torch.dtype():
            return {"dtype": str(value).removeprefix("torch.")}
        case torch.Size():
            return {"size": list(value)}
        case list() | tuple() if type(value) in (list, tuple):
            return type(value)(map(_plain, value))
        case dict():
            return {"dict": [[_plain(key), _plain(inner)] for key, inner in value.items()]}
    text = repr(value)
    return {_UNKNOWN: type(value).__qualname__ if " at 0x" in text else text}


def _context_of(value: Any) -> Any:
    """Return what `_plain` was given.

    Raises:
        ValueError: a part of it is not plain.
    """
    if isinstance(value, list | tuple):
        return type(value)(map(_context_of, value))
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    match kind:
        case "dtype" if isinstance(getattr(torch, inner, None), torch.dtype):
            return getattr(torch, inner)
        case "size":
            return torch.Size(inner)
        case "dict":
            return {_context_of(key): _context_of(each) for key, each in inner}
        case _:
            raise ValueError(f"{inner} is no plain value; restore into a tensor that is made already")


def _class_of(name: str) -> Any:
    """Return the class that the program has imported under that name.

    Raises:
        TypeError: there is none, or it is no such class.
    """
    module, _, last = name.rpartition(".")
    found = getattr(sys.modules.get(module), last, None)
    if found is None:
        raise TypeError(f"import {module} before, which has {last}")
    if not (isinstance(found, type) and issubclass(found, torch.Tensor) and hasattr(found, "__tensor_unflatten__")):
        raise TypeError(f"{name} makes no tensor of its parts")
    return found

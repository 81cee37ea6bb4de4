"""Where a saved item goes: which existing tensors are filled in place, and who is told about the rest.

A module's parameters and buffers and the tensors of a dict are filled where they are, so nothing that refers to them
notices. An optimizer that has not stepped yet has no tensors to fill: it is given new ones, as they were saved. Whatever
does not fit is listed, all of it, before a single byte is written.

What takes its state by a method of its own (an object with `load_state_dict`, a module's extra state) is asked for no
shape: it may have grown since it was made. Only the dtype of a tensor that it has already must be that which was saved.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from typing_extensions import override

from datastore.checkpoint.format.tree import TensorSpec, child_name, differences, spec_differences, specs, unpack
from datastore.checkpoint.format.wrapped import Wrappers, parts_of
from datastore.checkpoint.items import PARAMETERS, PerRank, item_key, pack_item, plain_name, unwrapped
from datastore.checkpoint.tensors import DTYPES, describe, local_piece, spec_text

__all__ = ["RestoreTarget", "target_of"]


class RestoreTarget(ABC):
    """One item of a running program, seen as a place for one saved item."""

    def __init__(self, name: str, item: Any, rank: int) -> None:
        self.key = item_key(name, item, rank)
        self._item = item.state if isinstance(item, PerRank) else item
        self._wrappers = Wrappers()
        packed = pack_item(name, item, rank, wrappers=self._wrappers)
        self._skeleton = packed.skeleton
        self._tensors = packed.tensors

    def problems(self, saved: Any) -> list[str]:
        """Return a line for everything in the skeleton `saved` that does not fit here."""
        return list(dict.fromkeys(self._problems(saved) + self._wrappers.differences(saved, name=self.key)))

    @abstractmethod
    def _problems(self, saved: Any) -> list[str]:
        """Return the same, of tensors that are not made of others, and of plain values."""

    def destinations(self, saved: Any) -> dict[str, torch.Tensor]:
        """Return a tensor for each one that is saved, by name; call only if there are no problems."""
        return {name: self._destination(name, spec) for name, spec in specs(saved, name=self.key)}

    @abstractmethod
    def accept(self, saved: Any, tensors: dict[str, torch.Tensor]) -> None:
        """Take over the plain values, and those of `tensors`, now filled, that were not in use already."""

    def _destination(self, name: str, spec: TensorSpec) -> torch.Tensor:
        """Return an existing tensor to fill, or a new one."""
        found = self._tensors.get(name)
        return torch.empty(spec.shape, dtype=DTYPES[spec.dtype]) if found is None else found

    def _specs(self) -> dict[str, TensorSpec]:
        return dict(specs(self._skeleton, name=self.key))

    def _tree(self, saved: Any, tensors: dict[str, torch.Tensor]) -> Any:
        def whole(state: dict[Any, Any], name: str) -> Any:
            return self._wrappers.put_together(state, name, filled=self._tensors)

        return unpack(saved, name=self.key, tensors=tensors, collapse=whole)


def target_of(name: str, item: Any, rank: int) -> RestoreTarget:
    """Return `item` as a target.

    Raises:
        ConfigError: it has no state, or a leaf of its state is of no known kind.
    """
    inner = item.state if isinstance(item, PerRank) else item
    if isinstance(inner, torch.nn.Module):
        return _ModuleTarget(name, item, rank)
    if isinstance(inner, torch.optim.Optimizer):
        return _OptimizerTarget(name, item, rank)
    return (_DictTarget if isinstance(inner, dict) else _StatefulTarget)(name, item, rank)


class _DictTarget(RestoreTarget):
    """Tensors are filled in place; the dict gets the saved values under the keys it has (an empty one gets all)."""

    @override
    def _problems(self, saved: Any) -> list[str]:
        return differences(saved, self._skeleton, name=self.key)

    @override
    def accept(self, saved: Any, tensors: dict[str, torch.Tensor]) -> None:
        state = self._tree(saved, tensors)
        self._item.clear()
        self._item.update(state)


class _StatefulTarget(RestoreTarget):
    """Given copies through `load_state_dict`: whether its state shares memory with it is not this package's business."""

    @override
    def _problems(self, saved: Any) -> list[str]:
        return _casts(dict(specs(saved, name=self.key)), self._specs())

    @override
    def accept(self, saved: Any, tensors: dict[str, torch.Tensor]) -> None:
        self._item.load_state_dict(self._tree(saved, tensors))

    @override
    def _destination(self, name: str, spec: TensorSpec) -> torch.Tensor:
        found = self._tensors.get(name)
        if found is None or tuple(found.shape) != spec.shape:
            return _empty(spec, found)
        return torch.empty_like(found, requires_grad=False)


class _ModuleTarget(RestoreTarget):
    """Filled in place; `load_state_dict` is called only for what is no parameter or buffer (extra state, clones)."""

    def __init__(self, name: str, item: Any, rank: int) -> None:
        super().__init__(name, item, rank)
        module = unwrapped(self._item)
        self._live = {local_piece(tensor, name).tensor.data_ptr() for tensor in _tensors_of(module)}
        ways = (plain_name(f"{prefix}.").removeprefix(".") for prefix in _own_ways(module))
        self._own_ways = {child_name(self.key, way) for way in ways}

    @override
    def _problems(self, saved: Any) -> list[str]:
        theirs, ours = dict(specs(saved, name=self.key)), self._specs()
        strict = ({name: spec for name, spec in side.items() if not self._has_own_way(name)} for side in (theirs, ours))
        found = spec_differences(*strict)
        keys, wanted = (set(filter(self._has_own_way, _children(side, self.key))) for side in (saved, self._skeleton))
        found += [f"{name}: saved, but not expected" for name in sorted(keys - wanted)]
        found += [f"{name}: expected, but not saved" for name in sorted(wanted - keys)]
        # Extra state is handed over; what is copied into a buffer of another dtype would be cast.
        return found + _casts({name: spec for name, spec in theirs.items() if not _is_extra(name)}, ours)

    def _has_own_way(self, name: str) -> bool:
        """Return whether the module that `name` belongs to loads it by code of its own, which may change its shape."""
        path = "/".join(name.split("/")[:2])
        return _is_extra(name) or path[: max(path.rfind("."), path.find("/")) + 1] in self._own_ways

    @override
    def accept(self, saved: Any, tensors: dict[str, torch.Tensor]) -> None:
        state = self._tree(saved, tensors)
        if all(self._is_filled(value, child_name(self.key, key)) for key, value in state.items()):
            return
        module = unwrapped(self._item)
        stored = unpack(self._skeleton, name=self.key, tensors=self._tensors)  # In the order of the module's own keys.
        module.load_state_dict({key: state[name] for key, name in zip(module.state_dict(), stored, strict=True)})

    def _is_filled(self, value: Any, name: str) -> bool:
        return value is self._tensors.get(name) or self._wrappers.is_here(value, name)

    @override
    def _destination(self, name: str, spec: TensorSpec) -> torch.Tensor:
        found = self._tensors.get(name)
        if found is None or describe(found, name) != spec:
            return _empty(spec, found)
        alive = not found.numel() or local_piece(found, name).tensor.data_ptr() in self._live
        return found if alive else torch.empty_like(found)


def _tensors_of(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    return chain.from_iterable(map(parts_of, chain(module.parameters(), module.buffers())))


def _own_ways(module: torch.nn.Module) -> Iterator[str]:
    """Yield the names of modules with a `_load_from_state_dict` of their own, such as observers that resize buffers."""
    for name, inner in module.named_modules():
        kind = next(kind for kind in type(inner).__mro__ if "_load_from_state_dict" in vars(kind))
        if not kind.__module__.startswith("torch.nn."):
            yield name


def _is_extra(name: str) -> bool:
    return name.split("/")[1].endswith("_extra_state")


def _children(skeleton: Any, name: str) -> list[str]:
    return [child_name(name, key) for key in unpack(skeleton, name=name, tensors=dict(specs(skeleton, name=name)))]


def _casts(saved: Mapping[str, TensorSpec], wanted: Mapping[str, TensorSpec]) -> list[str]:
    """Return a line for each tensor on both sides whose dtype differs."""
    both = ((name, saved[name], spec) for name, spec in wanted.items() if name in saved)
    return [f"{name}: saved as {other}, expected as {spec}" for name, other, spec in both if other.dtype != spec.dtype]


def _empty(spec: TensorSpec, like: torch.Tensor | None) -> torch.Tensor:
    return torch.empty(spec.shape, dtype=DTYPES[spec.dtype], device=None if like is None else like.device)


class _OptimizerTarget(RestoreTarget):
    """Filled in place where it has state already. Fits if its parameters are what they were when it was saved.

    torch casts floating state to the dtype of its parameter as it loads, whatever the optimizer keeps: float32 momentum of
    bfloat16 weights loses half of its bits, and indices of 8 bits become floats. Where it did, what was saved is put back.
    """

    @override
    def _problems(self, saved: Any) -> list[str]:
        spec_of = dict(specs(saved, name=self.key))
        tree = unpack(saved, name=self.key, tensors=spec_of)
        groups = tree.get("param_groups")
        if not _are_groups(groups) or not isinstance(tree.get("state"), dict):
            return [f"{self.key}: not the state of an optimizer"]
        theirs = [len(group["params"]) for group in groups]
        ours = [len(group["params"]) for group in self._item.param_groups]
        if theirs != ours:
            return [f"{self.key}: saved with groups of {theirs} parameters, expected {ours}"]
        parameters = self._parameters(groups)
        state = child_name(self.key, "state")
        found = [
            f"{child_name(state, i)}: saved for a parameter that is in no group"
            for i in tree["state"]
            if type(i) is int and i not in parameters
        ]
        if PARAMETERS in tree:
            found += self._other_parameters(tree[PARAMETERS], parameters)
        else:  # Saved before they were noted: then state must look like its parameter.
            for i in tree["state"].keys() & parameters.keys():
                found += _misfits(child_name(state, i), tree["state"][i], parameters[i])
        return found + _casts(spec_of, self._specs())

    def _other_parameters(self, saved: Any, parameters: Mapping[Any, torch.Tensor]) -> list[str]:
        ours = [spec_text(parameter) for parameter in parameters.values()]
        if not isinstance(saved, list) or len(saved) != len(ours):
            return [f"{self.key}: not the state of an optimizer"]
        return [
            f"{self.key}, parameter {i}: saved as {one}, expected as {other}"
            for i, (one, other) in enumerate(zip(saved, ours, strict=True))
            if one != other
        ]

    @override
    def destinations(self, saved: Any) -> dict[str, torch.Tensor]:
        spec_of = dict(specs(saved, name=self.key))
        tree = unpack(saved, name=self.key, tensors={name: name for name in spec_of})
        parameters = self._parameters(tree["param_groups"])
        owner = {
            name: parameters[i]
            for i in tree["state"].keys() & parameters.keys()
            for name in _texts(tree["state"][i])
            if name in spec_of
        }
        return {name: self._home(name, spec, owner.get(name)) for name, spec in spec_of.items()}

    def _home(self, name: str, spec: TensorSpec, parameter: torch.Tensor | None) -> torch.Tensor:
        found = self._tensors.get(name)
        if found is not None and describe(found, name) == spec:
            return found
        if parameter is not None and tuple(parameter.shape) == spec.shape and spec.shape:
            return torch.empty_like(parameter, dtype=DTYPES[spec.dtype], requires_grad=False)
        return _empty(spec, found)  # load_state_dict moves it if it must.

    def _parameters(self, groups: Any) -> dict[Any, torch.Tensor]:
        """Return which of our parameters each saved index means: the one at the same place, as torch has it."""
        saved = chain.from_iterable(group["params"] for group in groups)
        return dict(zip(saved, chain.from_iterable(group["params"] for group in self._item.param_groups), strict=True))

    @override
    def accept(self, saved: Any, tensors: dict[str, torch.Tensor]) -> None:
        tree = {key: value for key, value in self._tree(saved, tensors).items() if key != PARAMETERS}
        self._item.load_state_dict(tree)
        shown = self._item.state_dict()
        numbers = {parameter: i for i, parameter in self._parameters(shown["param_groups"]).items()}
        for i, parameter in self._parameters(tree["param_groups"]).items():
            held = self._item.state.get(parameter)
            # What an optimizer shows of itself need not be what it holds; then how it loads is its own business.
            if i in tree["state"] and isinstance(held, dict) and shown["state"].get(numbers[parameter]) is held:
                cast = {key: value for key, value in tree["state"][i].items() if not _alike(value, held.get(key))}
                held |= {key: _moved(value, held.get(key), parameter) for key, value in cast.items()}


def _are_groups(value: Any) -> bool:
    return isinstance(value, list) and all(
        isinstance(group, dict)
        and isinstance(group.get("params"), list)
        and all(type(i) is int for i in group["params"])
        for group in value
    )


def _misfits(name: str, state: Any, parameter: torch.Tensor) -> Iterator[str]:
    expected = describe(parameter, name)
    assert expected is not None
    for key, spec in state.items() if isinstance(state, dict) else ():
        if not isinstance(spec, TensorSpec) or len(spec.shape) == 0:
            continue
        cast = parameter.is_floating_point() and key != "step" and spec.dtype != expected.dtype
        if cast or (len(spec.shape) == len(expected.shape) and spec.shape != expected.shape):
            yield f"{child_name(name, key)}: saved as {spec}, the parameter is {expected}"


def _texts(state: Any) -> Iterator[str]:
    return (value for value in state.values() if isinstance(value, str)) if isinstance(state, dict) else iter(())


def _alike(saved: Any, held: Any) -> bool:
    if isinstance(saved, torch.Tensor):
        return isinstance(held, torch.Tensor) and (saved.dtype, saved.shape) == (held.dtype, held.shape)
    if isinstance(saved, dict):
        return isinstance(held, dict) and saved.keys() == held.keys() and all(_alike(saved[k], held[k]) for k in saved)
    if isinstance(saved, list | tuple):
        return type(saved) is type(held) and len(saved) == len(held) and all(map(_alike, saved, held))
    return type(saved) is type(held) and (saved == held or saved != saved)  # noqa: PLR0124 - NaN


def _moved(saved: Any, held: Any, parameter: torch.Tensor) -> Any:
    """Return `saved` where the optimizer has put it, or where its parameter is."""
    if isinstance(saved, torch.Tensor):
        return saved.to(held.device if isinstance(held, torch.Tensor) else parameter.device)
    if isinstance(saved, dict):
        return {key: _moved(value, None, parameter) for key, value in saved.items()}
    if isinstance(saved, list | tuple):
        return type(saved)(_moved(value, None, parameter) for value in saved)
    return saved

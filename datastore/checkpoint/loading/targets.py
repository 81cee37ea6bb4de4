"""Where a saved item goes: which existing tensors are filled in place, and who is told about the rest.

A module's parameters and buffers and the tensors of a dict are filled where they are, so nothing that refers to them
notices. An optimizer that has not stepped yet has no tensors to fill: it is given new ones of the dtype and device
that it would have made itself. Whatever does not fit is listed, all of it, before a single byte is written.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from typing_extensions import override

from datastore.checkpoint.format.tree import TensorSpec, child_name, differences, spec_differences, specs, unpack
from datastore.checkpoint.items import PerRank, item_key, pack_item, unwrapped
from datastore.checkpoint.tensors import DTYPES, describe, local_piece

__all__ = ["RestoreTarget", "target_of"]


class RestoreTarget(ABC):
    """One item of a running program, seen as a place for one saved item."""

    def __init__(self, name: str, item: Any, rank: int) -> None:
        self.key = item_key(name, item, rank)
        self._item = item.state if isinstance(item, PerRank) else item
        packed = pack_item(name, item, rank)
        self._skeleton = packed.skeleton
        self._tensors = packed.tensors

    def problems(self, saved: Any) -> list[str]:
        """Return a line for everything in the skeleton `saved` that does not fit here."""
        return spec_differences(dict(specs(saved, name=self.key)), self._specs())

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
        return unpack(saved, name=self.key, tensors=tensors)


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
    def problems(self, saved: Any) -> list[str]:
        return differences(saved, self._skeleton, name=self.key)

    @override
    def accept(self, saved: Any, tensors: dict[str, torch.Tensor]) -> None:
        state = self._tree(saved, tensors)
        self._item.clear()
        self._item.update(state)


class _StatefulTarget(RestoreTarget):
    """Given copies through `load_state_dict`: whether its state shares memory with it is not this package's business."""

    @override
    def problems(self, saved: Any) -> list[str]:
        return super().problems(saved) if self._tensors else []  # Without any yet, it makes them as it loads.

    @override
    def accept(self, saved: Any, tensors: dict[str, torch.Tensor]) -> None:
        self._item.load_state_dict(self._tree(saved, tensors))

    @override
    def _destination(self, name: str, spec: TensorSpec) -> torch.Tensor:
        found = self._tensors.get(name)
        return super()._destination(name, spec) if found is None else torch.empty_like(found, requires_grad=False)


class _ModuleTarget(RestoreTarget):
    """Filled in place; `load_state_dict` is called only for what is no parameter or buffer (extra state, clones)."""

    def __init__(self, name: str, item: Any, rank: int) -> None:
        super().__init__(name, item, rank)
        module = unwrapped(self._item)
        self._live = {local_piece(tensor, name).tensor.data_ptr() for tensor in _tensors_of(module)}

    @override
    def accept(self, saved: Any, tensors: dict[str, torch.Tensor]) -> None:
        state = self._tree(saved, tensors)
        if all(value is self._tensors.get(child_name(self.key, key)) for key, value in state.items()):
            return
        module = unwrapped(self._item)
        stored = unpack(self._skeleton, name=self.key, tensors=self._tensors)  # In the order of the module's own keys.
        module.load_state_dict({key: state[name] for key, name in zip(module.state_dict(), stored, strict=True)})

    @override
    def _destination(self, name: str, spec: TensorSpec) -> torch.Tensor:
        found = self._tensors[name]
        alive = not found.numel() or local_piece(found, name).tensor.data_ptr() in self._live
        return found if alive else torch.empty_like(found)


def _tensors_of(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    return chain(module.parameters(), module.buffers())


class _OptimizerTarget(RestoreTarget):
    """Filled in place where it has state already; new state has the shape that the parameter dictates."""

    @override
    def problems(self, saved: Any) -> list[str]:
        tree = unpack(saved, name=self.key, tensors=dict(specs(saved, name=self.key)))
        groups = tree.get("param_groups")
        if not isinstance(groups, list) or not isinstance(tree.get("state"), dict):
            return [f"{self.key}: not the state of an optimizer"]
        theirs = [len(group["params"]) for group in groups]
        ours = [len(group["params"]) for group in self._item.param_groups]
        if theirs != ours:
            return [f"{self.key}: saved with groups of {theirs} parameters, expected {ours}"]
        parameters = self._parameters(groups)
        return [line for i, state in tree["state"].items() for line in self._misfits(i, state, parameters.get(i))]

    def _misfits(self, index: int, state: Any, parameter: torch.Tensor | None) -> Iterator[str]:
        name = child_name(child_name(self.key, "state"), index)
        if parameter is None:
            yield f"{name}: saved for a parameter that is in no group"
            return
        expected = describe(parameter, name)
        assert expected is not None
        for key, spec in state.items():
            if not isinstance(spec, TensorSpec) or len(spec.shape) == 0:
                continue
            # torch casts floating state to the parameter's dtype in silence, and finds a wrong shape at the next step.
            cast = parameter.is_floating_point() and key != "step" and spec.dtype != expected.dtype
            if cast or (len(spec.shape) == len(expected.shape) and spec.shape != expected.shape):
                yield f"{child_name(name, key)}: saved as {spec}, the parameter is {expected}"

    @override
    def destinations(self, saved: Any) -> dict[str, torch.Tensor]:
        spec_of = dict(specs(saved, name=self.key))
        tree = unpack(saved, name=self.key, tensors={name: name for name in spec_of})
        parameters = self._parameters(tree["param_groups"])
        owner = {name: parameters[i] for i, state in tree["state"].items() for name in _texts(state) if name in spec_of}
        return {name: self._home(name, spec, owner.get(name)) for name, spec in spec_of.items()}

    def _home(self, name: str, spec: TensorSpec, parameter: torch.Tensor | None) -> torch.Tensor:
        found = self._tensors.get(name)
        if found is not None and describe(found, name) == spec:
            return found
        if parameter is not None and tuple(parameter.shape) == spec.shape and spec.shape:
            return torch.empty_like(parameter, dtype=DTYPES[spec.dtype], requires_grad=False)
        return torch.empty(spec.shape, dtype=DTYPES[spec.dtype])  # load_state_dict moves it if it must.

    def _parameters(self, groups: Any) -> dict[Any, torch.Tensor]:
        """Return which of our parameters each saved index means: the one at the same place, as torch has it."""
        saved = chain.from_iterable(group["params"] for group in groups)
        return dict(zip(saved, chain.from_iterable(group["params"] for group in self._item.param_groups), strict=True))

    @override
    def accept(self, saved: Any, tensors: dict[str, torch.Tensor]) -> None:
        self._item.load_state_dict(self._tree(saved, tensors))


def _texts(state: dict[Any, Any]) -> Iterator[str]:
    return (value for value in state.values() if isinstance(value, str))

"""How many bits each layer gets, where the size of all of them is given.

What a layer costs with b bits is read from the loss: half the sum over its weights of the square of what rounding moves the weight by,
times the mean square of the gradient there. All layers begin with the most bits; the one that loses least for the bytes it saves
goes down, again and again, until they fit.

Source: Z. Dong et al., "HAWQ-V2", arXiv:1911.03852 (the trade), with the squared gradient for the second derivative.
"""

from collections.abc import Callable, Mapping
from typing import get_args

import msgspec
import torch
from torch import Tensor, nn

from datastore.errors import ConfigError
from datastore.training.hooks.calibration import Calibration
from datastore.training.hooks.quantizing.grid import fitted_grid
from datastore.training.hooks.quantizing.layers import packed_words
from datastore.training.hooks.quantizing.settings import Bits, Scheme

__all__ = ["chosen_bits", "ladder", "refuse_small_budget", "sensitivities", "stored_bytes"]

Costs = Mapping[str, Mapping[int, float]]
"""Of each layer, by bits."""


def stored_bytes(shape: tuple[int, int], scheme: Scheme) -> int:
    """Return what a layer of this shape takes when it is stored."""
    out, columns = shape
    groups = columns // (scheme.group or columns)
    zeros = 0 if scheme.symmetric else packed_words(out, scheme.bits) * groups
    return 4 * (out * packed_words(columns, scheme.bits) + out * groups + zeros) + 16


def ladder(scheme: Scheme) -> list[Scheme]:
    """Return the schemes from `scheme` down to the fewest bits."""
    return [
        msgspec.structs.replace(scheme, bits=bits)
        for bits in sorted(get_args(Bits), reverse=True)
        if bits <= scheme.bits
    ]


def refuse_small_budget(shapes: Mapping[str, tuple[int, int]], scheme: Scheme, *, target: int) -> None:
    """Refuse a size that cannot be reached.

    Raises:
        ConfigError: with the fewest bits everywhere the layers are larger.
    """
    least = sum(stored_bytes(shape, ladder(scheme)[-1]) for shape in shapes.values())
    if least > target:
        raise ConfigError(
            "the layers do not fit into this size, with the fewest bits each",
            target_size=target,
            least=least,
            hint="Raise target_size, or the group.",
        )


def sensitivities(
    model: nn.Module,
    layers: Mapping[str, nn.Linear | nn.Embedding],
    scheme: Scheme,
    calibration: Calibration,
    count: int,
) -> Costs:
    """Return how much the loss is expected to rise for each layer and number of bits, looking at `count` rows."""
    squares: dict[str, Tensor] = {name: torch.zeros_like(layer.weight) for name, layer in layers.items()}
    weights = {name: layer.weight for name, layer in layers.items()}
    for batch in calibration.batches(count):
        objective = calibration.objective
        loss = objective.loss(objective.outputs(model, batch), batch)
        found = torch.autograd.grad(loss, list(weights.values()), allow_unused=True)
        for name, gradient in zip(weights, found, strict=True):
            if gradient is not None:
                squares[name] += gradient.square() * len(batch.tokens)
    costs: dict[str, dict[int, float]] = {}
    for name, weight in weights.items():
        costs[name] = {}
        for step in ladder(scheme):
            grid = fitted_grid(weight, step)
            moved = (grid.real(grid.whole(weight)) - weight.detach()).square()
            costs[name][step.bits] = float((moved * squares[name]).sum()) / 2
    return costs


def chosen_bits(
    costs: Costs, shapes: Mapping[str, tuple[int, int]], scheme: Scheme, *, target: int
) -> dict[str, Scheme]:
    """Return the scheme of each layer, so that all of them take at most `target` bytes.

    Raises:
        ConfigError: they cannot.
    """
    refuse_small_budget(shapes, scheme, target=target)
    steps = ladder(scheme)
    at = dict.fromkeys(costs, 0)

    def size() -> int:
        return sum(stored_bytes(shapes[name], steps[step]) for name, step in at.items())

    while size() > target:
        lower = [name for name, step in at.items() if step + 1 < len(steps)]
        at[min(lower, key=_price(costs, shapes, steps, at))] += 1
    return {name: steps[step] for name, step in at.items()}


def _price(
    costs: Costs, shapes: Mapping[str, tuple[int, int]], steps: list[Scheme], at: Mapping[str, int]
) -> Callable[[str], tuple[float, str]]:
    """Return what a layer loses for each byte that it saves on its next step down; names decide where that is equal."""

    def of(name: str) -> tuple[float, str]:
        now, then = steps[at[name]], steps[at[name] + 1]
        saved = stored_bytes(shapes[name], now) - stored_bytes(shapes[name], then)
        return (costs[name][then.bits] - costs[name][now.bits]) / max(1, saved), name

    return of

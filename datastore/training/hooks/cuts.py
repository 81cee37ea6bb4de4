"""A GPT made smaller: fewer layers, a narrower stream, fewer heads, narrower feed-forward parts; what is left keeps its weights.

Each cut looks at the model on calibration rows, drops what matters least there, and returns another GPT with another shape, and which
part of each tensor that is:

    layers     one by one the layer without which the loss is least
    width      the same channels of the stream everywhere: those with the least energy behind the norms; norms are rescaled to what is left
    heads      groups of heads that share keys and values, and queries within each group: by the energy that they add to the stream
    channels   of each feed-forward part: the same

Behind heads and channels that are gone the matrix that reads them is solved for anew, so that what it adds to the stream stays as near
as it can. Nothing is drawn: the same model and rows give the same bits.

The moments of an optimizer are means of gradients, and are cut as gradients are: what is left of a weight is left of them. A gradient is
that of the outputs times the inputs, so a matrix that was solved for anew has those of its columns; and where a norm is multiplied by
f its gradient is divided by f, the mean of squares by f^2. Where what goes adds nothing, this is exact.

Source: S. Muralidharan et al., "Minitron", arXiv:2407.14679 (what to cut by which activations, and then to distill).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import msgspec
import torch
from torch import Tensor, nn

from datastore.training.hooks.base import Moments
from datastore.training.hooks.calibration import Calibration, grams, observed
from datastore.training.models.gpt import GPT
from datastore.training.settings import ModelSettings

__all__ = ["Cut", "fewer_channels", "fewer_heads", "fewer_layers", "narrower"]

_DAMPING = 1e-3
"""Of the mean of the diagonal of X^T X, added to it before a matrix is solved for."""

_POWERS = {"exp_avg": 1, "exp_avg_sq": 2, "momentum_buffer": 1}
"""Of the gradient, in what an optimizer keeps."""

Part = Callable[[str, Tensor], Tensor]
"""From the name of a parameter of the smaller model, and a tensor of the shape that it had, to the part that is left."""


@dataclass(frozen=True, slots=True)
class Cut:
    """A smaller model, and how its parameters came out of those of the larger one."""

    model: GPT
    part: Part
    names: Mapping[str, str]
    """What each parameter was called."""

    factors: Mapping[str, Tensor] = field(default_factory=dict)
    """What some weights were multiplied by."""

    def moments(self, before: Moments) -> Moments:
        """Return what is left of an optimizer's state; numbers, such as a count of steps, stay."""
        return {
            name: {key: self._left(name, key, tensor) for key, tensor in before[was].items()}
            for name, was in self.names.items()
        }

    def _left(self, name: str, key: str, tensor: Tensor) -> Tensor:
        if not tensor.dim():
            return tensor
        part = self.part(name, tensor)
        return part / self.factors[name].to(part.device) ** _POWERS[key] if name in self.factors else part


def fewer_layers(model: GPT, count: int, calibration: Calibration, *, samples: int) -> Cut:
    """Return `model` with `count` of its layers."""
    kept = list(range(model.settings.layers))
    blocks = list(model.model.layers)
    while len(kept) > count:
        without = {layer: [other for other in kept if other != layer] for layer in kept}
        losses = {}
        for layer, rest in without.items():
            model.model.layers = nn.ModuleList(blocks[one] for one in rest)
            losses[layer] = calibration.loss(model, samples)
        kept = without[min(kept, key=lambda layer: losses[layer])]
    model.model.layers = nn.ModuleList(blocks)
    prefixes = {f"model.layers.{new}.": f"model.layers.{old}." for new, old in enumerate(kept)}
    shape = msgspec.structs.replace(model.settings, layers=count)
    return _cut(model, shape, lambda _name, tensor: tensor, prefixes=prefixes)


def narrower(model: GPT, width: int, calibration: Calibration, *, samples: int) -> Cut:
    """Return `model` with `width` channels between its layers."""
    norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.RMSNorm)}
    squares: dict[str, Tensor] = {}

    def take(name: str, x: Tensor) -> None:
        squares[name] = squares.get(name, 0.0) + x.double().square().sum(dim=0)

    with observed(norms, take):
        calibration.show(model, samples)
    behind = [
        squares[name] * norm.weight.detach().double().square() / squares[name].mean() for name, norm in norms.items()
    ]
    kept = _largest(torch.stack(behind).sum(dim=0), width)
    # A norm divides by the root of the mean square of what it reads, which is another one over other channels.
    factors = {f"{name}.weight": (one[kept].mean() / one.mean()).sqrt().float() for name, one in squares.items()}

    def part(name: str, tensor: Tensor) -> Tensor:
        writes = name.endswith(("o_proj.weight", "down_proj.weight"))
        return _chosen(tensor, kept, dim=0 if writes or name in factors else 1)

    shape = model.settings
    head_width = 0 if shape.head_size * shape.heads == width else shape.head_size
    wanted = msgspec.structs.replace(shape, width=width, head_width=head_width, mlp_width=shape.inner_width)
    return _cut(model, wanted, part, factors=factors)


def fewer_heads(model: GPT, heads: int, kv_heads: int, calibration: Calibration, *, samples: int) -> Cut:
    """Return `model` with `kv_heads` groups of heads, and so many queries in each that they are `heads` in all."""
    shape, size = model.settings, model.settings.head_size
    products = grams(model, _linears(model, "self_attn.o_proj"), calibration, count=samples)
    queries: dict[str, Tensor] = {}
    groups: dict[str, Tensor] = {}
    solved: dict[str, Tensor] = {}
    for name, product in products.items():
        energy = _energy(model.get_parameter(f"{name}.weight"), product, block=size).view(shape.key_heads, -1)
        best = torch.stack([_largest(one, heads // kv_heads) for one in energy])
        group = _largest(energy.gather(1, best).sum(dim=1), kv_heads)
        query = (best[group] + group.unsqueeze(1) * energy.shape[1]).flatten()
        layer = name.removesuffix("o_proj")
        queries[layer], groups[layer] = _spread(query, size), _spread(group, size)
        solved[f"{name}.weight"] = _made_up(model.get_parameter(f"{name}.weight"), product, queries[layer])

    def part(name: str, tensor: Tensor) -> Tensor:
        layer = name.rpartition(".weight")[0].rpartition(".")[0] + "."
        if name.endswith(("q_proj.weight", "o_proj.weight")):
            return _chosen(tensor, queries[layer], dim=1 if name in solved else 0)
        return _chosen(tensor, groups[layer], dim=0) if name.endswith(("k_proj.weight", "v_proj.weight")) else tensor

    head_width = 0 if size * heads == shape.width else size
    wanted = msgspec.structs.replace(shape, heads=heads, kv_heads=kv_heads, head_width=head_width)
    return _cut(model, wanted, part, solved=solved)


def fewer_channels(model: GPT, width: int, calibration: Calibration, *, samples: int) -> Cut:
    """Return `model` with `width` channels in each feed-forward part."""
    products = grams(model, _linears(model, "mlp.down_proj"), calibration, count=samples)
    kept: dict[str, Tensor] = {}
    solved: dict[str, Tensor] = {}
    for name, product in products.items():
        weight = model.get_parameter(f"{name}.weight")
        mlp = name.removesuffix("down_proj")
        kept[mlp] = _largest(_energy(weight, product, block=1), width)
        solved[f"{name}.weight"] = _made_up(weight, product, kept[mlp])

    def part(name: str, tensor: Tensor) -> Tensor:
        mlp = name.partition("mlp.")[0] + "mlp."
        return _chosen(tensor, kept[mlp], dim=1 if name in solved else 0) if mlp in kept else tensor

    return _cut(model, msgspec.structs.replace(model.settings, mlp_width=width), part, solved=solved)


def _linears(model: nn.Module, ending: str) -> dict[str, nn.Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(ending)
    }


def _largest(scores: Tensor, count: int) -> Tensor:
    """Return the places of the `count` largest scores, in ascending order; of equal ones the first."""
    return torch.argsort(scores, descending=True, stable=True)[:count].sort().values


def _spread(heads: Tensor, size: int) -> Tensor:
    """Return the rows of `heads`, of which each has `size`."""
    return (heads.unsqueeze(1) * size + torch.arange(size, device=heads.device)).flatten()


def _energy(weight: Tensor, product: Tensor, *, block: int) -> Tensor:
    """Return the sum of squares of what each `block` of inputs adds to the output, all rows together."""
    own = (weight.detach().T @ weight.detach()).double() * product.double()
    parts = own.view(len(own) // block, block, len(own) // block, block)
    return parts.diagonal(dim1=0, dim2=2).sum(dim=(0, 1))


def _made_up(weight: Tensor, product: Tensor, kept: Tensor) -> Tensor:
    """Return the columns `kept` of `weight`, changed to make up for the others: the least squares over the inputs' X^T X."""
    product = product.double()
    own = product[kept][:, kept]
    damping = _DAMPING * product.diagonal().mean().clamp(min=1e-12)
    damped = own + damping * torch.eye(len(own), dtype=own.dtype, device=own.device)
    wanted = product[kept] @ weight.detach().double().T + damping * weight.detach().double().T[kept]
    return torch.cholesky_solve(wanted, torch.linalg.cholesky(damped)).T.to(weight.dtype).contiguous()


def _chosen(tensor: Tensor, places: Tensor, *, dim: int) -> Tensor:
    return tensor.index_select(dim, places.to(tensor.device))


def _cut(
    model: GPT,
    shape: ModelSettings,
    part: Part,
    *,
    prefixes: Mapping[str, str] | None = None,
    factors: Mapping[str, Tensor] | None = None,
    solved: Mapping[str, Tensor] | None = None,
) -> Cut:
    """Return a GPT of `shape` with a `part` of each tensor of `model`, multiplied by `factors`, or what was `solved` for instead.

    `prefixes` are those of names, in the new one and the old one.
    """
    factors, solved = factors or {}, solved or {}
    made = GPT(shape, causal=model.causal).to(next(model.parameters()).device)
    old = dict(model.named_parameters())
    names = {name: _old_name(name, prefixes or {}) for name, _ in made.named_parameters()}
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            left = solved[name] if name in solved else part(name, old[names[name]].detach())
            parameter.copy_(left * factors[name] if name in factors else left)
    return Cut(made, part, names, factors)


def _old_name(name: str, prefixes: Mapping[str, str]) -> str:
    return next((name.replace(new, was, 1) for new, was in prefixes.items() if name.startswith(new)), name)

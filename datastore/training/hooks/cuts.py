"""A GPT made smaller: fewer layers, a narrower stream, fewer heads, narrower feed-forward parts; what is left keeps its weights.

Each cut looks at the model on calibration rows, drops what matters least there, and returns another GPT with another shape:

    layers     one by one the layer without which the loss is least
    width      the same channels of the stream everywhere: those with the least energy behind the norms; norms are rescaled to what is left
    heads      groups of heads that share keys and values, and queries within each group: by the energy that they add to the stream
    channels   of each feed-forward part: the same

Behind heads and channels that are gone the matrix that reads them is solved for anew, so that what it adds to the stream stays as near
as it can. Nothing is drawn: the same model and rows give the same bits.

Source: S. Muralidharan et al., "Minitron", arXiv:2407.14679 (what to cut by which activations, and then to distill).
"""

from collections.abc import Callable, Mapping

import msgspec
import torch
from torch import Tensor, nn

from datastore.training.hooks.calibration import Calibration, grams, observed
from datastore.training.models.gpt import GPT, Block
from datastore.training.settings import ModelSettings

__all__ = ["fewer_channels", "fewer_heads", "fewer_layers", "narrower"]

_DAMPING = 1e-3
"""Of the mean of the diagonal of X^T X, added to it before a matrix is solved for."""

Take = Callable[[str, Tensor], Tensor]
"""From the name of a tensor of the smaller model, and that of the larger one, to what is left of it."""


def fewer_layers(model: GPT, count: int, calibration: Calibration, *, samples: int) -> GPT:
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
    names = {f"model.layers.{new}.": f"model.layers.{old}." for new, old in enumerate(kept)}
    shape = msgspec.structs.replace(model.settings, layers=count)
    return _made(model, shape, lambda _name, tensor: tensor, names=names)


def narrower(model: GPT, width: int, calibration: Calibration, *, samples: int) -> GPT:
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

    def left(name: str, tensor: Tensor) -> Tensor:
        if name in factors:
            return tensor[kept] * factors[name]
        return tensor[kept] if name.endswith(("o_proj.weight", "down_proj.weight")) else tensor[:, kept]

    shape = model.settings
    head_width = 0 if shape.head_size * shape.heads == width else shape.head_size
    return _made(
        model, msgspec.structs.replace(shape, width=width, head_width=head_width, mlp_width=shape.inner_width), left
    )


def fewer_heads(model: GPT, heads: int, kv_heads: int, calibration: Calibration, *, samples: int) -> GPT:
    """Return `model` with `kv_heads` groups of heads, and so many queries in each that they are `heads` in all."""
    shape, size = model.settings, model.settings.head_size
    products = grams(model, _linears(model, "self_attn.o_proj"), calibration, count=samples)
    queries: dict[str, Tensor] = {}
    groups: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    for name, product in products.items():
        energy = _energy(model.get_parameter(f"{name}.weight"), product, block=size).view(shape.key_heads, -1)
        best = torch.stack([_largest(one, heads // kv_heads) for one in energy])
        group = _largest(energy.gather(1, best).sum(dim=1), kv_heads)
        query = (best[group] + group.unsqueeze(1) * energy.shape[1]).flatten()
        layer = name.removesuffix("o_proj")
        queries[layer], groups[layer] = _spread(query, size), _spread(group, size)
        rows[f"{name}.weight"] = _made_up(model.get_parameter(f"{name}.weight"), product, queries[layer])

    def left(name: str, tensor: Tensor) -> Tensor:
        layer = name.rpartition(".weight")[0].rpartition(".")[0] + "."
        if name in rows:
            return rows[name]
        if name.endswith("q_proj.weight"):
            return tensor[queries[layer]]
        return tensor[groups[layer]] if name.endswith(("k_proj.weight", "v_proj.weight")) else tensor

    head_width = 0 if size * heads == shape.width else size
    wanted = msgspec.structs.replace(shape, heads=heads, kv_heads=kv_heads, head_width=head_width)
    return _made(model, wanted, left)


def fewer_channels(model: GPT, width: int, calibration: Calibration, *, samples: int) -> GPT:
    """Return `model` with `width` channels in each feed-forward part."""
    products = grams(model, _linears(model, "mlp.down_proj"), calibration, count=samples)
    kept: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    for name, product in products.items():
        weight = model.get_parameter(f"{name}.weight")
        part = name.removesuffix("down_proj")
        kept[part] = _largest(_energy(weight, product, block=1), width)
        rows[f"{name}.weight"] = _made_up(weight, product, kept[part])

    def left(name: str, tensor: Tensor) -> Tensor:
        if name in rows:
            return rows[name]
        part = name.partition("mlp.")[0] + "mlp."
        return tensor[kept[part]] if name.endswith(("gate_proj.weight", "up_proj.weight")) else tensor

    return _made(model, msgspec.structs.replace(model.settings, mlp_width=width), left)


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


def _made(model: GPT, shape: ModelSettings, left: Take, *, names: Mapping[str, str] | None = None) -> GPT:
    """Return a GPT of `shape` with what is `left` of the tensors of `model`; `names` are prefixes, in the new one and the old one."""
    made = GPT(shape, causal=model.causal).to(next(model.parameters()).device)
    old = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            source = next(
                (name.replace(new, was, 1) for new, was in (names or {}).items() if name.startswith(new)), name
            )
            parameter.copy_(left(name, old[source].detach()))
    for block in made.model.layers:
        assert isinstance(block, Block)
    return made

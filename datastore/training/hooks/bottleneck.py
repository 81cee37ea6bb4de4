"""Bottleneck adapters: two thin layers with a nonlinearity between them, behind attention and behind the feed-forward part.

    y + gelu(y A^T + a) B^T + b        y [.., width]: what the part adds to the stream; A [rank, width], B [width, rank]

B and b begin as zero, so the first outputs are those of the model as it was, to the bit. What they do is not linear, so there is no
weight to merge them into: a model with them is trained, evaluated and asked for text, and written without them; they are written apart,
in a folder of this package, as peft has no such adapters.

Sources: N. Houlsby et al., arXiv:1902.00751 (behind both parts); J. Pfeiffer et al., arXiv:2005.00247 (behind the feed-forward part alone).
"""

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from datastore.errors import ConfigError
from datastore.training.hooks.quantizing.layers import replace_module

__all__ = ["BOTTLENECK", "Bottleneck", "add_bottlenecks", "bottleneck_table", "ends_of_parts", "refuse_unmerged"]

BOTTLENECK = ".bottleneck_"
"""In the names of the parameters of such an adapter, and of no other."""

_ENDS = ("o_proj", "down_proj")
"""Linear layers whose outputs are those of attention and of the feed-forward part."""


class Bottleneck(nn.Module):
    """A frozen layer, and two thin ones behind it."""

    def __init__(self, base_layer: nn.Module, width: int, *, rank: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down = nn.Parameter(torch.empty(rank, width))
        self.bottleneck_down_bias = nn.Parameter(torch.zeros(rank))
        self.bottleneck_up = nn.Parameter(torch.zeros(width, rank))
        self.bottleneck_up_bias = nn.Parameter(torch.zeros(width))
        nn.init.normal_(self.bottleneck_down, std=width**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Return what the layer says of `x`, and what the adapter makes of that, added up."""
        y = self.base_layer(x)
        inner = functional.gelu(functional.linear(y, self.bottleneck_down, self.bottleneck_down_bias))
        return y + functional.linear(inner, self.bottleneck_up, self.bottleneck_up_bias)  # type: ignore[no-any-return]


def ends_of_parts(layers: Iterable[str]) -> list[str]:
    """Return those of `layers` that end attention or a feed-forward part.

    Raises:
        ConfigError: none does.
    """
    layers = list(layers)
    found = [name for name in layers if name.endswith(_ENDS)]
    if not found:
        raise ConfigError(
            "no layer that is named ends attention or a feed-forward part",
            layers=layers[:8],
            hint=f"Name some that end with {' or '.join(_ENDS)}, or leave out the hook's layers.",
        )
    return found


def add_bottlenecks(model: nn.Module, table: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> None:
    """Put a bottleneck behind each of the layers that `table` names, as `bottleneck_table` says it.

    `tensors`, by the names of parameters, are what they have learned; without them they change nothing yet.

    Raises:
        ConfigError: the tensors are of other layers, or of other shapes.
    """
    for name in table["layers"]:
        base = cast("nn.Linear", model.get_submodule(name))
        replace_module(model, name, Bottleneck(base, base.out_features, rank=table["rank"]))
    if tensors is None:
        return
    own = {name: one for name, one in model.named_parameters() if BOTTLENECK in name}
    if {name: one.shape for name, one in own.items()} != {name: one.shape for name, one in tensors.items()}:
        raise ConfigError("these adapters are of another model", differ=sorted(set(own) ^ set(tensors))[:8])
    with torch.no_grad():
        for name, one in own.items():
            one.copy_(tensors[name])


def bottleneck_table(layers: Iterable[str], *, rank: int) -> dict[str, Any]:
    """Return what says where adapters are and how they look, as JSON has it."""
    return {"method": "bottleneck", "rank": rank, "activation": "gelu", "layers": [*layers]}


def refuse_unmerged(model: nn.Module) -> None:
    """Refuse a model with bottlenecks where only ordinary weights can be.

    Raises:
        ConfigError: it has some.
    """
    layers = [name for name, one in model.named_modules() if isinstance(one, Bottleneck)]
    if layers:
        raise ConfigError(
            "bottleneck adapters cannot be merged into weights: there is a nonlinearity between their two layers",
            layers=layers[:4],
            hint="Export them apart, with `--as adapter`, and the run that they began with as it is; or adapt with lora.",
        )

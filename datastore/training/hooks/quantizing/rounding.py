"""Modules that round in every forward pass, and learn all the same: quantization-aware training.

The weight that learns stays real, under its own name, so checkpoints, pruning and optimizers do not change. What is computed with are
the integers that an export at this step would write: both come from `fitted_grid`, in float32, whatever autocast does.

With learned scales each group has a number more, `weight_stretch`: its scale is e to the power of that, times what would just hold the
group. It begins at 0, and weight decay pulls it there; the optimizer's steps are relative to the scale, however small that is.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from datastore.training.hooks.quantizing.grid import round_inputs, rounded
from datastore.training.hooks.quantizing.settings import Scheme

__all__ = ["Rounded", "RoundedEmbedding", "RoundedLinear", "plain_layer", "rounded_layer", "stretch_of"]


class RoundedLinear(nn.Linear):
    """A linear layer that computes with rounded weights, once it is `active`."""

    def __init__(self, linear: nn.Linear, scheme: Scheme, *, learned: bool) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight = linear.weight
        self.bias = linear.bias
        self.scheme, self.active = scheme, False
        self.weight_stretch = _stretch(linear.weight, scheme) if learned else None

    @property
    def used_weight(self) -> Tensor:
        """What the weight is in a forward pass."""
        return _used(self)

    @override
    def forward(self, x: Tensor) -> Tensor:
        if self.active and self.scheme.activations:
            x = round_inputs(x)
        return functional.linear(x, self.used_weight, self.bias)


class RoundedEmbedding(nn.Embedding):
    """An embedding with a rounded table, once it is `active`; where the table is the output layer too, that is the same one."""

    def __init__(self, embedding: nn.Embedding, scheme: Scheme, *, learned: bool) -> None:
        super().__init__(embedding.num_embeddings, embedding.embedding_dim, _weight=embedding.weight.detach())
        self.weight = embedding.weight
        self.scheme, self.active = scheme, False
        self.weight_stretch = _stretch(embedding.weight, scheme) if learned else None

    @property
    def used_weight(self) -> Tensor:
        """What the table is in a forward pass."""
        return _used(self)

    @override
    def forward(self, input: Tensor) -> Tensor:
        return functional.embedding(input, self.used_weight)


Rounded = RoundedLinear | RoundedEmbedding
"""Any of them; also for `isinstance`."""


def rounded_layer(layer: nn.Linear | nn.Embedding, scheme: Scheme, *, learned: bool) -> Rounded:
    """Return `layer` with the same parameters, to be rounded."""
    if isinstance(layer, nn.Embedding):
        return RoundedEmbedding(layer, scheme, learned=learned)
    return RoundedLinear(layer, scheme, learned=learned)


def stretch_of(layer: nn.Module) -> Tensor | None:
    """Return what has been learned about the scales of `layer`; None: nothing."""
    found = getattr(layer, "weight_stretch", None)
    return found.detach() if isinstance(found, Tensor) else None


def plain_layer(layer: nn.Linear | nn.Embedding) -> nn.Linear | nn.Embedding:
    """Return `layer` with the same parameters, and nothing rounded."""
    plain: nn.Linear | nn.Embedding
    if isinstance(layer, nn.Embedding):
        plain = nn.Embedding(layer.num_embeddings, layer.embedding_dim, _weight=layer.weight.detach())
    else:
        plain = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
        plain.bias = layer.bias
    plain.weight = layer.weight
    return plain


def _stretch(weight: Tensor, scheme: Scheme) -> nn.Parameter:
    out, columns = weight.shape
    return nn.Parameter(torch.zeros(out, columns // (scheme.group or columns), device=weight.device))


def _used(layer: Rounded) -> Tensor:
    stretch = layer.weight_stretch
    if layer.active:
        return rounded(layer.weight, layer.scheme, stretch)
    # Reached by the loss from the first step on: ranks wait for the gradient of every parameter.
    return layer.weight if stretch is None else layer.weight + 0.0 * stretch.sum()

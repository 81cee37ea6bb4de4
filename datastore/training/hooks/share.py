"""Layers that share their matrices, each with a small difference of its own: W + A B, where A and B are narrow.

Of every `group` layers that follow each other, each matrix that `parameters` names is one for all of them. A run that begins with the
weights of another one begins as near to them as it can: the shared matrix is the mean, A B the best of rank `rank` for what is left. What
leaves training is an ordinary model, every layer with its own matrix: smaller are the run, its moments and its checkpoints, not the export.

Shared parameters lie in several blocks; FSDP2 gathers the blocks of a group together, which are about as large as one block without
sharing. Tensor parallelism has no plan for the difference.

Source: Z. Lan et al., "ALBERT", arXiv:1909.11942 (sharing); S. Bae et al., "Relaxed Recursive Transformers", arXiv:2410.20672 (with
differences of low rank, from the singular values of what is left).
"""

from fnmatch import fnmatchcase
from typing import Annotated, Any, ClassVar

import msgspec
import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from datastore.document import Count, Document, SettingsDocument
from datastore.errors import ConfigError
from datastore.training.hooks.base import Hook
from datastore.training.models.huggingface import blocks_of

__all__ = ["Share", "ShareSettings", "SharedLinear"]


class ShareSettings(SettingsDocument, frozen=True, kw_only=True):
    """Which matrices are shared, by how many layers, and how far each may differ."""

    group: Annotated[int, msgspec.Meta(ge=2)] = 2
    """Layers that share, one after the other; their number must be a multiple of it."""

    rank: Count = 8
    """Of the difference that each layer has of its own; 0: none."""

    parameters: tuple[str, ...] = ("*_proj.weight",)
    """Patterns of the names of the matrices."""


class SharedLinear(nn.Module):
    """A linear layer without bias whose weight is W + A B; `weight`, the W, belongs to several layers."""

    def __init__(self, weight: nn.Parameter, left: Tensor, right: Tensor) -> None:
        super().__init__()
        self.weight = weight
        self.left = nn.Parameter(left.contiguous())
        self.right = nn.Parameter(right.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """Return x times the transposed sum."""
        return functional.linear(x, self.weight) + functional.linear(functional.linear(x, self.right), self.left)

    def folded(self) -> nn.Linear:
        """Return the ordinary layer that this one is."""
        whole = (self.weight + self.left @ self.right).detach()
        linear = nn.Linear(whole.shape[1], whole.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(whole)
        return linear


class Share(Hook):
    """Replaces linear layers when the model is built, and folds them when it leaves training."""

    Settings: ClassVar[type[Document]] = ShareSettings
    changes: ClassVar[Any] = "shape"

    def __init__(self, settings: ShareSettings) -> None:
        super().__init__(settings)
        self._settings = settings

    @classmethod
    @override
    def layouts(cls, settings: Document) -> frozenset[str]:
        return frozenset({"shard", "context"})

    @override
    @torch.no_grad()
    def model(self, model: nn.Module) -> nn.Module:
        blocks, group = blocks_of(model), self._settings.group
        if not blocks or len(blocks) % group:
            raise ConfigError(
                "layers cannot be divided into groups that share",
                layers=len(blocks),
                group=group,
                hint="Their number must be a multiple of the hook's group.",
            )
        prefixes = {id(module): name for name, module in model.named_modules()}
        shared = [
            name
            for name, module in blocks[0].named_modules()
            if isinstance(module, nn.Linear)
            and len(list(module.parameters())) == 1
            and any(fnmatchcase(f"{prefixes[id(module)]}.weight", pattern) for pattern in self._settings.parameters)
        ]
        if not shared:
            raise ConfigError(
                "no matrix to share", parameters=list(self._settings.parameters), hint="Correct the patterns."
            )
        for start in range(0, len(blocks), group):
            for name in shared:
                _share(blocks[start : start + group], name, self._settings.rank)
        return model

    @override
    @torch.no_grad()
    def export(self, model: nn.Module) -> nn.Module:
        for name, module in list(model.named_modules()):
            if isinstance(module, SharedLinear):
                parent, _, last = name.rpartition(".")
                setattr(model.get_submodule(parent), last, module.folded())
        return model


def _share(blocks: list[nn.Module], name: str, rank: int) -> None:
    """Give the layers called `name` of `blocks` one matrix, and each what is left in `rank` dimensions."""
    own = [block.get_parameter(f"{name}.weight").detach() for block in blocks]
    if len({one.shape for one in own}) > 1 or rank > min(own[0].shape):
        raise ConfigError(
            "matrices cannot be shared like this",
            layer=name,
            shapes=[list(one.shape) for one in own],
            rank=rank,
            hint="Correct the hook's parameters, or lower its rank.",
        )
    mean = nn.Parameter(torch.stack(own).mean(dim=0))
    for block, weight in zip(blocks, own, strict=True):
        columns, values, rows = torch.linalg.svd(weight - mean, full_matrices=False)
        roots = values[:rank].sqrt()
        parent, _, last = name.rpartition(".")
        layer = SharedLinear(mean, columns[:, :rank] * roots, roots.unsqueeze(1) * rows[:rank])
        setattr(block.get_submodule(parent), last, layer)

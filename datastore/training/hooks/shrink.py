"""Structured pruning: the run begins with a smaller model, cut out of the one that `model.init` names.

It happens once, before the model is distributed and its optimizer is made: so weights, gradients and moments have the new shape from
the first step on, on any layout, and the run's own settings say it. Whatever reads a run (a resume, an export, another run's
`model.init`) needs to know nothing of this hook. To shrink in the middle of a training, stop, and go on in another run that begins with
this one's weights, and with `optim.init` its moments, cut as the weights are. The price is that a run cannot shrink twice, and the gain
that no rank ever has to be rebuilt.
"""

from typing import Any, ClassVar

import msgspec
from torch import nn
from typing_extensions import override

from datastore.document import Count, Document, Positive, SettingsDocument
from datastore.errors import ConfigError
from datastore.training.hooks.base import Hook, Moments
from datastore.training.hooks.calibration import Calibration
from datastore.training.hooks.cuts import Cut, fewer_channels, fewer_heads, fewer_layers, narrower
from datastore.training.models.gpt import GPT
from datastore.training.settings import ModelSettings

__all__ = ["Shrink", "ShrinkSettings"]


class ShrinkSettings(SettingsDocument, frozen=True, kw_only=True):
    """The shape that is left of the model that `model.init` names; 0 leaves a size as it is."""

    layers: Count = 0
    """Layers; those go without which the loss is least."""

    width: Count = 0
    """Channels between layers."""

    heads: Count = 0
    """Query heads; their width stays."""

    kv_heads: Count = 0
    """Heads of keys and values, with the queries that share them; 0: in proportion to `heads`, if that is a whole number, or else all."""

    mlp_width: Count = 0
    """Channels inside the feed-forward parts."""

    samples: Positive = 128
    """Samples of the training data on which it is measured what matters."""


class Shrink(Hook):
    """Cuts the weights that a run begins with."""

    Settings: ClassVar[type[Document]] = ShrinkSettings
    changes: ClassVar[Any] = "shape"

    def __init__(self, settings: ShrinkSettings) -> None:
        super().__init__(settings)
        self._settings = settings
        self._cuts: list[Cut] = []
        """Those of `initial`, in order."""

    @override
    def shape(self, before: ModelSettings) -> ModelSettings:
        wanted = self._settings
        heads = wanted.heads or before.heads
        group = before.heads // before.key_heads
        kv_heads = wanted.kv_heads or (heads // group if heads % group == 0 else before.key_heads)
        width = wanted.width or before.width
        after = {
            "layers": wanted.layers or before.layers,
            "width": width,
            "heads": heads,
            "kv_heads": kv_heads,
            "mlp_width": wanted.mlp_width or before.inner_width,
        }
        has = {
            "layers": before.layers,
            "width": before.width,
            "heads": before.heads,
            "kv_heads": before.key_heads,
            "mlp_width": before.inner_width,
        }
        larger: dict[str, object] = {
            name: f"asked for {size}, there are {has[name]}" for name, size in after.items() if size > has[name]
        }
        if larger or heads % kv_heads or heads // kv_heads > group:
            raise ConfigError(
                "a model cannot be shrunk to this shape",
                shape=larger or {"heads": heads, "kv_heads": kv_heads, "queries of a group": group},
                hint="No size may grow; of each group of heads as many queries are kept, heads / kv_heads.",
            )
        size = before.head_size
        return msgspec.structs.replace(before, **after, head_width=0 if size * heads == width else size)

    @override
    def initial(self, model: nn.Module, calibration: Calibration) -> nn.Module:
        if not isinstance(model, GPT):
            raise ConfigError("only our GPT can be shrunk", model=type(model).__name__, hint="Leave the hook out.")
        samples = self._settings.samples
        calibration.require(samples)
        before, goal = model.settings, self.shape(model.settings)
        self._cuts = []
        if goal.layers < before.layers:
            model = self._cut(fewer_layers(model, goal.layers, calibration, samples=samples))
        if goal.width < before.width:
            model = self._cut(narrower(model, goal.width, calibration, samples=samples))
        if (goal.heads, goal.key_heads) != (before.heads, before.key_heads):
            model = self._cut(fewer_heads(model, goal.heads, goal.key_heads, calibration, samples=samples))
        if goal.mlp_width < before.inner_width:
            model = self._cut(fewer_channels(model, goal.mlp_width, calibration, samples=samples))
        return model

    def _cut(self, cut: Cut) -> GPT:
        self._cuts.append(cut)
        return cut.model

    @override
    def moments(self, before: Moments) -> Moments:
        for cut in self._cuts:
            before = cut.moments(before)
        return before

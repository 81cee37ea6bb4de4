"""Our models for other tasks than the next token: the GPT with another end or with pictures in front, and a net for clicks.

`Classifier` has the names of `LlamaForSequenceClassification`, so its folder can be opened as that.

Legend: B batch, T tokens, C width, P patches of a picture, K classes, N columns.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from datastore.training.models.gpt import GPT, Decoder, draw_weights, turns_of
from datastore.training.settings import ModelSettings

__all__ = ["Captioner", "Classifier", "ClickNet"]


class Classifier(nn.Module):
    """The class of a text, from the state of its last token."""

    def __init__(self, settings: ModelSettings, classes: int) -> None:
        super().__init__()
        self.settings = settings
        self.model = Decoder(settings)
        self.score = nn.Linear(settings.width, classes, bias=False)

    def initialize(self, generator: torch.Generator) -> None:
        """Draw all weights anew."""
        draw_weights(self, generator, layers=self.settings.layers)

    @override
    def forward(self, ids_BT: Tensor, attention_mask: Tensor) -> Tensor:
        """Return the logits [B, K]; `attention_mask` is true up to the end of each text, which has a token at least."""
        turns = turns_of(self.settings, 0, ids_BT.shape[1], ids_BT.device)
        x_BTC = self.model(ids_BT, turns, None)
        last = attention_mask.sum(dim=1).clamp(min=1) - 1
        return self.score(x_BTC[torch.arange(len(x_BTC), device=last.device), last])  # type: ignore[no-any-return]


class ClickNet(nn.Module):
    """How likely a click is: an embedding of each category, two layers behind them."""

    def __init__(self, buckets: int, *, columns: int, numbers: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(buckets, width)
        self.inner = nn.Linear(columns * width + numbers, width)
        self.outer = nn.Linear(width, 1)

    def initialize(self, generator: torch.Generator) -> None:
        """Draw all weights anew."""
        draw_weights(self, generator, layers=1)

    @override
    def forward(self, ids_BN: Tensor, numbers: Tensor) -> Tensor:
        """Return the logits [B]."""
        x = torch.cat((self.embedding(ids_BN).flatten(1), numbers), dim=1)
        return self.outer(functional.silu(self.inner(x))).squeeze(1)  # type: ignore[no-any-return]


class Captioner(nn.Module):
    """A text about a picture: its patches, as a small encoder sees them, stand in front of the text."""

    def __init__(self, settings: ModelSettings, *, size: int, patch: int) -> None:
        super().__init__()
        self.encoder = nn.Conv2d(3, settings.width, kernel_size=patch, stride=patch)
        self.places = nn.Parameter(torch.zeros(1, (size // patch) ** 2, settings.width))
        self.norm = nn.RMSNorm(settings.width, eps=settings.norm_eps)
        self.gpt = GPT(settings)

    def initialize(self, generator: torch.Generator) -> None:
        """Draw all weights anew."""
        draw_weights(self, generator, layers=self.gpt.settings.layers)

    @override
    def forward(self, ids_BT: Tensor, images: Tensor) -> Tensor:
        """Return the logits of each next token of the text, [B, T, V]; `images` are [B, 3, size, size] in 0 to 1."""
        patches_BPC = self.norm(self.encoder(images).flatten(2).transpose(1, 2) + self.places)
        return self.gpt(ids_BT, before_BPC=patches_BPC)[:, patches_BPC.shape[1] :]  # type: ignore[no-any-return]

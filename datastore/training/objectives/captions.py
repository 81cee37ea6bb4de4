"""Captions: the words about it, from its patches and the words before.

A small encoder makes a state of each patch; these stand in front of the text. The loss is the mean over words, so it is the same
for any number of ranks and micro-batches, which a loss that compares the pictures of a batch with each other cannot be.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from datastore.document import Positive, SettingsDocument
from datastore.media import decode_image
from datastore.training.models.heads import Captioner
from datastore.training.objectives.base import Array, Context, HostRows, MicroBatch
from datastore.training.objectives.language import Causal
from datastore.training.objectives.records import TextObjective, padded
from datastore.training.settings import ModelSettings

__all__ = ["Captions", "CaptionsSettings"]


class CaptionsSettings(SettingsDocument, frozen=True, kw_only=True):
    """`[objective]` of `captions`."""

    tokenizer: str
    """A `tokenizer.json`, or a folder that has one."""

    image: str = "image"
    """The column of the picture: the bytes of its file, or what `datastore.media` takes."""

    text: str = "text"
    """The column of the words."""

    size: Positive = 32
    """Pictures are scaled to so many pixels in both directions."""

    patch: Positive = 8
    """Pixels of a patch in both directions; `size` is a multiple of it."""

    cut: bool = False
    """Whether a longer text is cut to its first `data.seq_len` tokens instead of refused."""

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        if self.size % self.patch:
            raise ValueError("size must be a multiple of patch")


class Captions(TextObjective, Causal):
    """Predict the words about a picture; the loss is in nats per token."""

    Settings = CaptionsSettings
    form = None
    settings: CaptionsSettings

    @property
    @override
    def columns(self) -> tuple[str, ...]:
        return (self.settings.image, self.settings.text)

    @property
    @override
    def vocabulary(self) -> int:
        return self._file.tokenizer.get_vocab_size() + 1

    @override
    def model(self, shape: ModelSettings) -> nn.Module:
        return Captioner(shape, size=self.settings.size, patch=self.settings.patch)

    @override
    def encode(self, row: dict[str, Any], context: Context) -> dict[str, Array]:
        width, begin = context.seq_len + 1, self._file.tokenizer.get_vocab_size()
        ids = [begin, *self._file.tokenizer.encode(row[self.settings.text]).ids]
        tokens = padded(ids, width, np.int64, cut=self.settings.cut)
        return {"tokens": tokens, "loss_mask": np.arange(width) < len(ids), "images": self._pixels(row)}

    def _pixels(self, row: dict[str, Any]) -> Array:
        image = torch.from_numpy(decode_image(row[self.settings.image])).permute(2, 0, 1).float()[None] / 255
        side = self.settings.size
        scaled = functional.interpolate(image, (side, side), mode="bilinear", antialias=True, align_corners=False)
        return scaled[0].numpy()

    @override
    def blank(self, rows: int, context: Context) -> HostRows:
        side = self.settings.size
        return HostRows(
            np.zeros((rows, context.seq_len + 1), np.int64),
            np.ones((rows, context.seq_len + 1), np.bool_),
            None,
            {"images": np.ones((rows, 3, side, side), np.float32)},
        )

    @override
    def outputs(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """Return the logits [B, T, V]."""
        return model(batch.inputs, batch.more["images"])  # type: ignore[no-any-return]

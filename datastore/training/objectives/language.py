"""Learning from tokens: the next one, the answers of a chat, or those that are hidden.

Which tokens are hidden is hashed from the run's seed, the sample's position and the place in it: the same on any number of
ranks, and after any resume.

Source: J. Devlin et al., "BERT", arXiv:1810.04805 (15 % of the tokens; of those 80 % hidden, 10 % another one, 10 % as they are).
"""

from typing import Annotated, ClassVar, cast

import msgspec
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from datastore.document import Count, Document, SettingsDocument
from datastore.errors import ConfigError
from datastore.loader.order.mix import mix64
from datastore.training.models.gpt import GPT
from datastore.training.models.huggingface import logits_of
from datastore.training.objectives.base import Context, HostRows, MicroBatch, Objective, Share
from datastore.training.settings import ModelSettings

__all__ = ["IGNORED", "Causal", "CausalSettings", "Chat", "Masked", "MaskedSettings"]

IGNORED = -100
"""A target that counts nothing."""


class CausalSettings(SettingsDocument, frozen=True, kw_only=True):
    """`[objective]` of `causal` and `chat`."""

    chunked: bool = False
    """Make the logits some rows at a time, so that they are never there as a whole: less memory with a large vocabulary, the same loss up to
    rounding. With our GPT, without hooks that look at logits, and neither with parallel.tensor nor with parallel.pipeline."""


class Causal(Objective):
    """Predict each next token; the loss is in nats per token. Columns that the loader brings along go with the rows, for hooks."""

    Settings: ClassVar[type[Document]] = CausalSettings

    def __init__(self, settings: Document = CausalSettings()) -> None:  # noqa: B008 - it cannot change
        super().__init__(settings)
        self._chunked = isinstance(settings, CausalSettings) and settings.chunked
        if self._chunked and not hasattr(functional, "linear_cross_entropy"):
            raise ConfigError(
                "this torch cannot make logits some rows at a time",
                torch=torch.__version__,
                hint="Install torch 2.13 or newer, or leave out objective.chunked.",
            )

    @property
    @override
    def loss_inside(self) -> bool:
        return self._chunked

    @override
    def prepare(self, batch: Share, context: Context) -> HostRows:
        return HostRows(batch.tokens, batch.loss_mask, more=dict(getattr(batch, "columns", {})))

    @override
    def outputs(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """Return the logits [B, T, V]; if they are made some rows at a time, the sum of the losses."""
        if self._chunked:
            return cast("Tensor", model(batch.inputs, targets_BT=_targets(batch)))
        return logits_of(model, batch.inputs)

    @override
    def loss(self, outputs: Tensor, batch: MicroBatch) -> Tensor:
        """Return the cross-entropy, computed in float32."""
        learned = batch.learned
        if self._chunked:
            return outputs / (batch.targets.numel() if learned is None else learned.clamp(min=1))
        logits = outputs.flatten(0, 1).float()
        if learned is None:
            return functional.cross_entropy(logits, batch.targets.flatten())
        targets = _targets(batch).flatten()
        return functional.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="sum") / learned.clamp(min=1)


def _targets(batch: MicroBatch) -> Tensor:
    """Return the targets [B, T], those that count nothing as `IGNORED`."""
    mask = batch.loss_mask
    return batch.targets if mask is None else batch.targets.masked_fill(~mask[:, 1:], IGNORED)


class Chat(Causal):
    """Predict the answers of chats: what the dataset's loss mask says. Data without one are refused."""

    @override
    def prepare(self, batch: Share, context: Context) -> HostRows:
        if batch.loss_mask is None:
            raise ConfigError(
                "the dataset has no loss mask, so every token would be learned",
                hint='Ingest the chats with --chat, or set objective.use = "causal".',
            )
        return super().prepare(batch, context)


class MaskedSettings(SettingsDocument, frozen=True, kw_only=True):
    """`[objective]` of `masked`."""

    mask_token: Count
    """The id that stands for a hidden token. The number of tokens of the tokenizer is a new one: the model gets room for it."""

    rate: Annotated[float, msgspec.Meta(gt=0, lt=1)] = 0.15
    """The share of the tokens that is to be predicted."""


class Masked(Objective):
    """Predict hidden tokens from those on both sides; the loss is in nats per predicted token."""

    Settings = MaskedSettings
    form = "masked"
    settings: MaskedSettings

    @property
    @override
    def vocabulary(self) -> int:
        return self.settings.mask_token + 1

    @override
    def model(self, shape: ModelSettings) -> nn.Module:
        return GPT(shape, causal=False)

    @override
    def prepare(self, batch: Share, context: Context) -> HostRows:
        tokens = batch.tokens[:, :-1].astype(np.int64)
        rows, places = batch.positions.astype(np.uint64)[:, None], np.arange(tokens.shape[1], dtype=np.uint64)
        chance = mix64(mix64(rows + np.uint64(context.seed) * np.uint64(2**40)) ^ mix64(places + np.uint64(1)))
        chosen = _fraction(chance) < self.settings.rate
        if batch.loss_mask is not None:
            chosen &= batch.loss_mask[:, :-1]
        fate = _fraction(mix64(chance + np.uint64(1)))
        other = (mix64(chance + np.uint64(2)) % np.uint64(context.vocab_size)).astype(np.int64)
        hidden = np.where(fate < 0.8, self.settings.mask_token, np.where(fate < 0.9, other, tokens))
        labels = np.where(chosen, tokens, IGNORED)
        return HostRows(np.where(chosen, hidden, tokens), None, chosen.sum(axis=1), {"labels": labels})

    @override
    def blank(self, rows: int, context: Context) -> HostRows:
        zeros = np.zeros((rows, context.seq_len), np.int64)
        return HostRows(zeros, None, np.full(rows, context.seq_len), {"labels": zeros})

    @override
    def outputs(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """Return the logits [B, T, V]."""
        return logits_of(model, batch.tokens)

    @override
    def loss(self, outputs: Tensor, batch: MicroBatch) -> Tensor:
        """Return the cross-entropy over the hidden tokens, computed in float32."""
        assert batch.counts is not None
        logits, labels = outputs.flatten(0, 1).float(), batch.more["labels"].flatten()
        total = functional.cross_entropy(logits, labels, ignore_index=IGNORED, reduction="sum")
        return total / batch.counts.sum().clamp(min=1)


def _fraction(
    numbers: np.ndarray[tuple[int, ...], np.dtype[np.uint64]],
) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    """Return numbers in [0, 1) made of the upper 53 bits."""
    return (numbers >> np.uint64(11)).astype(np.float64) * 2.0**-53

"""Which of two answers is better, learned without a model of rewards: direct preference optimization.

The model is compared with itself as it began: the frozen reference is kept in every checkpoint, so that a resumed run
compares with the same one, whatever has become of the run that it came from. The price is a checkpoint larger by one copy
of the weights.

A row is a pair, so both sides are always in the same forward pass. The loss is the mean over pairs.

Source: R. Rafailov et al., "Direct Preference Optimization", arXiv:2305.18290.
"""

from copy import deepcopy
from typing import Annotated, Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from datastore.document import SettingsDocument
from datastore.training.models.huggingface import logits_of
from datastore.training.objectives.base import Array, Context, HostRows, MicroBatch
from datastore.training.objectives.records import RecordObjective, padded

__all__ = ["Preference", "PreferenceSettings"]


class PreferenceSettings(SettingsDocument, frozen=True, kw_only=True):
    """`[objective]` of `preference`."""

    beta: Annotated[float, msgspec.Meta(gt=0)] = 0.1
    """How closely to stay with the reference: the larger, the closer."""


class Preference(RecordObjective):
    """Prefer `chosen` to `rejected`, on the records that `ingest --pairs` makes."""

    Settings = PreferenceSettings
    form = "causal"
    unit = "pairs"
    settings: PreferenceSettings

    @property
    @override
    def columns(self) -> tuple[str, ...]:
        return ("chosen", "chosen_mask", "rejected", "rejected_mask")

    @override
    def tokens_per_sample(self, seq_len: int) -> int:
        return 2 * seq_len

    @override
    def start(self, model: nn.Module) -> None:
        self.frozen = deepcopy(model).requires_grad_(requires_grad=False).eval()

    @override
    def encode(self, row: dict[str, Any], context: Context) -> dict[str, Array]:
        width = context.seq_len + 1
        sides = ("chosen", "rejected")
        tokens = np.stack([padded(row[side], width, np.int64) for side in sides])
        masks = np.stack([padded(row[f"{side}_mask"], width, np.int64) for side in sides]) != 0
        return {"tokens": tokens, "loss_mask": masks, "counts": np.array(1)}

    @override
    def blank(self, rows: int, context: Context) -> HostRows:
        shape = (rows, 2, context.seq_len + 1)
        return HostRows(np.zeros(shape, np.int64), np.ones(shape, np.bool_), np.ones(rows, np.int64))

    @override
    def outputs(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """Return the logits [2 B, T, V], chosen and rejected in turns."""
        return logits_of(model, batch.tokens.flatten(0, 1)[:, :-1])

    @override
    def loss(self, outputs: Tensor, batch: MicroBatch) -> Tensor:
        """Return the mean over pairs of -log sigmoid(beta x (how much more than the reference it prefers the chosen one))."""
        assert self.frozen is not None
        assert batch.counts is not None
        with torch.no_grad():
            before = _likelihoods(self.outputs(self.frozen, batch), batch)
        gained = _likelihoods(outputs, batch) - before
        losses = -functional.logsigmoid(self.settings.beta * (gained[:, 0] - gained[:, 1]))
        return (losses * batch.counts).sum() / batch.counts.sum().clamp(min=1)


def _likelihoods(logits: Tensor, batch: MicroBatch) -> Tensor:
    """Return the log-likelihood [B, 2] of what is to be learned of each side."""
    assert batch.loss_mask is not None
    targets, mask = batch.tokens.flatten(0, 1)[:, 1:], batch.loss_mask.flatten(0, 1)[:, 1:]
    each = functional.cross_entropy(logits.float().transpose(1, 2), targets, reduction="none")
    return -(each * mask).sum(dim=1).view(-1, 2)

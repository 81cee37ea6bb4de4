"""From a batch to a loss. An objective returns the mean over the targets that count; the loop weighs micro-batches and ranks.

Which ones count is said by the loss mask: those of deleted documents do not, nor those that the dataset has a 0 for. A batch
in which none does has the loss 0.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from datastore.config import find_class
from datastore.document import Document, convert
from datastore.loader.batch import Batch

__all__ = ["Causal", "MicroBatch", "Objective", "make_objective", "micro_batches"]

_IGNORED = -100
_NOTHING = Document()
_OURS = {"causal": "datastore.training.objectives:Causal"}


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Some rows of a batch, on the device: what one forward pass sees."""

    tokens: Tensor
    """int64 [B, seq_len + 1]"""

    loss_mask: Tensor | None = None
    """bool [B, seq_len + 1]: whether each token is to be learned; None: all are."""

    @property
    def inputs(self) -> Tensor:
        """All tokens of each row but the last, [B, seq_len]."""
        return self.tokens[:, :-1]

    @property
    def targets(self) -> Tensor:
        """The token that follows each input, [B, seq_len]."""
        return self.tokens[:, 1:]

    @property
    def learned(self) -> Tensor | None:
        """How many targets count, a scalar; None: all do."""
        return None if self.loss_mask is None else self.loss_mask[:, 1:].sum()


def micro_batches(batch: Batch, device: torch.device, *, rows: int) -> Iterator[MicroBatch]:
    """Yield the micro-batches of a batch. What is copied to the device are narrow token ids; they are widened there."""
    mask = batch.loss_mask
    tokens = torch.split(_to_device(torch.from_numpy(batch.tokens), device), rows)
    masks = torch.split(_to_device(torch.from_numpy(mask), device), rows) if mask is not None else [None] * len(tokens)
    return (MicroBatch(piece.long(), masked) for piece, masked in zip(tokens, masks, strict=True))


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


class Objective(ABC):
    """What is learned; inherit, and name the class in `[objective]`: `use = "module:Class"`."""

    Settings: ClassVar[type[Document]] = Document
    """The keys of the `[objective]` table besides `use`; an instance is the one argument of the constructor."""

    def __init__(self, settings: Document = _NOTHING) -> None:
        self.settings = settings

    @abstractmethod
    def outputs(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """Return the model's outputs for `batch`."""

    @abstractmethod
    def loss(self, outputs: Tensor, batch: MicroBatch) -> Tensor:
        """Return the mean loss over the targets of `batch` that count, a scalar."""


class Causal(Objective):
    """Predict each next token; the loss is in nats per token."""

    @override
    def outputs(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """Return the logits [B, T, V]."""
        return model(batch.inputs)  # type: ignore[no-any-return]

    @override
    def loss(self, outputs: Tensor, batch: MicroBatch) -> Tensor:
        """Return the cross-entropy, computed in float32."""
        logits, learned = outputs.flatten(0, 1).float(), batch.learned
        if batch.loss_mask is None or learned is None:
            return functional.cross_entropy(logits, batch.targets.flatten())
        targets = batch.targets.masked_fill(~batch.loss_mask[:, 1:], _IGNORED).flatten()
        return functional.cross_entropy(logits, targets, ignore_index=_IGNORED, reduction="sum") / learned.clamp(min=1)


def make_objective(table: Mapping[str, Any]) -> Objective:
    """Return the objective that an `[objective]` table names: one of ours, an entry point in `datastore.objectives`, or a class.

    Raises:
        ConfigError: an unknown objective, or a setting that it does not know or that is out of range.
        DependencyError: its module cannot be imported.
    """
    kind: type[Objective] = find_class(table["use"], base=Objective, ours=_OURS, group="datastore.objectives")  # type: ignore[type-abstract]
    own = {key: value for key, value in table.items() if key != "use"}
    return kind(convert(kind.Settings, own, where="objective"))

"""From a batch to a loss. An objective returns the mean over the tokens it was given; the loop weighs micro-batches and ranks."""

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Causal", "MicroBatch", "Objective"]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Some rows of a batch, on the device: what one forward pass sees."""

    tokens: Tensor
    """int64 [B, seq_len + 1]"""

    @property
    def inputs(self) -> Tensor:
        """All tokens of each row but the last, [B, seq_len]."""
        return self.tokens[:, :-1]

    @property
    def targets(self) -> Tensor:
        """The token that follows each input, [B, seq_len]."""
        return self.tokens[:, 1:]


class Objective(Protocol):
    """What is learned."""

    def outputs(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """Return the model's outputs for `batch`."""
        ...

    def loss(self, outputs: Tensor, batch: MicroBatch) -> Tensor:
        """Return the mean loss over the tokens of `batch`, a scalar."""
        ...


class Causal(Objective):
    """Predict each next token; the loss is in nats per token."""

    def outputs(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """Return the logits [B, T, V]."""
        return model(batch.inputs)  # type: ignore[no-any-return]

    def loss(self, outputs: Tensor, batch: MicroBatch) -> Tensor:
        """Return the cross-entropy, computed in float32."""
        return functional.cross_entropy(outputs.flatten(0, 1).float(), batch.targets.flatten())

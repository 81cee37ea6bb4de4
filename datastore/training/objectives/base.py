"""The contract of an objective: from a batch to a loss, the mean over the targets that count; the loop weighs micro-batches and ranks.

    encode    a record as arrays, where the data are records; in the loader's threads
    prepare   a batch as this rank learns from it: a function of its samples and of where they stand, not of the rank
    outputs   what the model makes of some rows
    loss      their mean loss

Which targets count is said by `counts`, where an objective counts by itself, or else by the loss mask: those of deleted documents do
not, nor those that the dataset has a 0 for. A batch in which none does has the loss 0.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from datastore.document import Document
from datastore.errors import ResumeError
from datastore.training.models.gpt import GPT
from datastore.training.settings import ModelSettings

__all__ = [
    "Context",
    "Form",
    "HostRows",
    "MicroBatch",
    "Objective",
    "Share",
    "Signed",
    "blank_rows",
    "micro_batches",
    "rows_of",
]

Array = npt.NDArray[Any]

Form = Literal["causal", "masked", "classes"]
"""What comes out of a model: the next token, the token in each place, or a class of the whole."""

_NOTHING = Document()


class Share(Protocol):
    """One rank's part of a global batch as a loader delivers it."""

    @property
    def tokens(self) -> Array:
        """[B, ...] of any unsigned type."""
        ...

    @property
    def loss_mask(self) -> npt.NDArray[np.bool_] | None:
        """As `tokens`; None: all are to be learned."""
        ...

    @property
    def positions(self) -> npt.NDArray[np.int64]:
        """[B] place of each row in the order."""
        ...


@dataclass(frozen=True, slots=True)
class HostRows:
    """Rows to learn from, on the host. The first dimension of every array is the row."""

    tokens: Array
    loss_mask: npt.NDArray[np.bool_] | None = None
    counts: Array | None = None
    """[B] how many targets of each row count, where that is not what the loss mask says."""

    more: Mapping[str, Array] = field(default_factory=dict)
    """Whatever else the objective needs, by name."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Some rows of a batch, on the device: what one forward pass sees."""

    tokens: Tensor
    """int64 [B, seq_len + 1], or what the objective makes of records."""

    loss_mask: Tensor | None = None
    """bool [B, seq_len + 1]: whether each token is to be learned; None: all are."""

    counts: Tensor | None = None
    """int64 [B] how many targets of each row count; None: the loss mask says it."""

    more: Mapping[str, Tensor] = field(default_factory=dict)
    """Whatever else the objective needs, by name, [B, ...] each."""

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
        if self.counts is not None:
            return self.counts.sum()
        return None if self.loss_mask is None else self.loss_mask[:, 1:].sum()


def micro_batches(rows: HostRows, device: torch.device, *, size: int) -> Iterator[MicroBatch]:
    """Yield `rows`, `size` at a time. What is copied to the device are narrow token ids; they are widened there."""
    whole = rows_of(rows, device)
    for start in range(0, len(rows.tokens), size):
        part = slice(start, start + size)
        yield MicroBatch(
            whole.tokens[part].long(),
            None if whole.loss_mask is None else whole.loss_mask[part],
            None if whole.counts is None else whole.counts[part],
            {name: one[part] for name, one in whole.more.items()},
        )


def rows_of(rows: HostRows, device: torch.device) -> MicroBatch:
    """Return `rows` on the device, tokens as narrow as they are."""
    return MicroBatch(
        _to_device(rows.tokens, device),
        None if rows.loss_mask is None else _to_device(rows.loss_mask, device),
        None if rows.counts is None else _to_device(rows.counts, device),
        {name: _to_device(one, device) for name, one in rows.more.items()},
    )


def _to_device(array: Array, device: torch.device) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def blank_rows(like: HostRows, rows: int) -> HostRows:
    """Return rows of zeros, shaped as those of `like`; where rows are counted, they count nothing."""

    def zeros(one: Array) -> Array:
        return np.zeros((rows, *one.shape[1:]), one.dtype)

    return HostRows(
        zeros(like.tokens),
        None if like.loss_mask is None else zeros(like.loss_mask),
        None if like.counts is None else zeros(like.counts),
        {name: zeros(one) for name, one in like.more.items()},
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """What an objective may want to know of the run."""

    seed: int
    """Of everything random in a step."""

    seq_len: int
    vocab_size: int


class Signed:
    """What an objective was made of, as an item of a checkpoint: a run goes on with no other."""

    def __init__(self, signature: str) -> None:
        self._signature = signature

    def state_dict(self) -> dict[str, str]:
        """Return the signature."""
        return {"signature": self._signature}

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        """Compare.

        Raises:
            ResumeError: it is another one.
        """
        if state["signature"] != self._signature:
            raise ResumeError(
                "a file that the objective is made of has changed since the run began",
                hint="Put the tokenizer of [objective] back, or start another run.",
            )


class Objective(ABC):
    """What is learned; inherit, and name the class in `[objective]`: `use = "module:Class"`."""

    Settings: ClassVar[type[Document]] = Document
    """The keys of the `[objective]` table besides `use`; an instance is the one argument of the constructor."""

    reads: ClassVar[Literal["tokens", "records"]] = "tokens"
    """What the dataset must hold."""

    form: ClassVar[Form | None] = "causal"
    """Which kind of model of `transformers` fits; None: none does."""

    unit: ClassVar[str] = "tokens"
    """What the loss is a mean over, as `evaluate` names it."""

    frozen: nn.Module | None = None
    """A model that is asked and not trained; it is kept in the checkpoints."""

    def __init__(self, settings: Document = _NOTHING) -> None:
        self.settings = settings

    @property
    def vocabulary(self) -> int:
        """How many ids the model must know, as far as the objective decides it; 0: it does not."""
        return 0

    @property
    def classes(self) -> int:
        """How many classes the model tells apart; 0: it predicts tokens."""
        return 0

    @property
    def signature(self) -> str:
        """Names what the objective was made of besides its settings, such as files; a run goes on with no other."""
        return ""

    @property
    def loss_inside(self) -> bool:
        """Whether the model itself works out the loss: `outputs` is a number then, which tells hooks nothing."""
        return False

    def tokens_per_sample(self, seq_len: int) -> int:
        """Return how many ids of a sample the model reads, those that fill it up included; rates count them."""
        return seq_len

    def model(self, shape: ModelSettings) -> nn.Module:
        """Return our model for it, with any weights; a method `initialize(generator)` draws them."""
        return GPT(shape)

    def start(self, model: nn.Module) -> None:  # noqa: B027 - nothing to do as a rule
        """Take note of the model before its first step, with the weights that it begins with."""

    def prepare(self, batch: Share, context: Context) -> HostRows:
        """Return what is learned from `batch`; it may depend on samples, positions and `context` only."""
        del context
        return HostRows(batch.tokens, batch.loss_mask)

    def blank(self, rows: int, context: Context) -> HostRows:
        """Return so many rows as `prepare` would, of zeros; their loss must reach every parameter."""
        return HostRows(np.zeros((rows, context.seq_len + 1), np.int64))

    @abstractmethod
    def outputs(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """Return the model's outputs for `batch`."""

    @abstractmethod
    def loss(self, outputs: Tensor, batch: MicroBatch) -> Tensor:
        """Return the mean loss over the targets of `batch` that count, a scalar."""

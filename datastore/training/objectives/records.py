"""Learning from records: classes of texts, the next item of a session, whether somebody clicks.

A record becomes arrays of a fixed size, so that every step has the same shapes: what is shorter is filled up, and counts
nothing there. What is longer is an error that names the record, unless the settings say to cut it.
"""

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
import xxhash
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn import functional
from typing_extensions import override

from datastore.document import Count, Positive, SettingsDocument
from datastore.errors import MissingError
from datastore.training.models.heads import Classifier, ClickNet
from datastore.training.models.huggingface import logits_of
from datastore.training.objectives.base import Array, Context, HostRows, MicroBatch, Objective, Share
from datastore.training.objectives.language import Causal
from datastore.training.settings import ModelSettings

__all__ = [
    "Classes",
    "ClassesSettings",
    "Clicks",
    "ClicksSettings",
    "NextItem",
    "NextItemSettings",
    "RecordObjective",
    "TextFile",
    "TextObjective",
    "padded",
]

Texts = Annotated[tuple[str, ...], msgspec.Meta(min_length=1)]


class RecordObjective(Objective):
    """An objective on the rows of a dataset of records."""

    reads = "records"

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """The columns that it reads."""

    @abstractmethod
    def encode(self, row: dict[str, Any], context: Context) -> dict[str, Array]:
        """Return a row as arrays of the same shapes for every row: `tokens`, maybe `loss_mask` and `counts`, and others by name.

        Raises:
            ValueError: it cannot be learned from; the loader names the row.
        """

    @override
    def prepare(self, batch: Share, context: Context) -> HostRows:
        del context
        rows = getattr(batch, "rows", None)
        assert isinstance(rows, HostRows)
        return rows


def padded(values: Sequence[Any], width: int, dtype: type, *, cut: bool = False) -> Array:
    """Return `values` [width], zeros behind them.

    Raises:
        ValueError: there are more, and they are not to be cut.
    """
    if len(values) > width and not cut:
        raise ValueError(f"it has {len(values)} tokens, and data.seq_len leaves room for {width}")
    kept = values[:width]
    found: Array = np.zeros(width, dtype)
    found[: len(kept)] = kept
    return found


class TextFile:
    """A tokenizer that settings name: a `tokenizer.json`, or the folder that has one."""

    def __init__(self, path: str) -> None:
        where = Path(path) / "tokenizer.json" if Path(path).is_dir() else Path(path)
        try:
            self.raw = where.read_bytes()
        except OSError as error:
            raise MissingError(
                f"the tokenizer cannot be read: {error.strerror}", file=str(where), hint="Set objective.tokenizer."
            ) from None
        self.tokenizer: Tokenizer = Tokenizer.from_str(self.raw.decode())
        self.digest = hashlib.sha256(self.raw).hexdigest()


class TextObjective(RecordObjective):
    """An objective on texts of records: `settings.tokenizer` makes tokens of them, and is part of the run."""

    settings: Any

    @cached_property
    def _file(self) -> TextFile:
        return TextFile(self.settings.tokenizer)

    @property
    @override
    def signature(self) -> str:
        return self._file.digest


class ClassesSettings(SettingsDocument, frozen=True, kw_only=True):
    """`[objective]` of `classes`."""

    tokenizer: str
    """A `tokenizer.json`, or a folder that has one."""

    labels: Texts
    """The classes, in the order of their numbers."""

    text: str = "text"
    """The column of the text."""

    label: str = "label"
    """The column of its class: one of `labels`, or its number."""

    cut: bool = False
    """Whether a longer text is cut to its first `data.seq_len` tokens instead of refused."""

    pad_token: Count = 0
    """The id behind a text's end. A `transformers` decoder takes the last token that is another one for the end of the text."""


class Classes(TextObjective):
    """Tell which class a text is of; the loss is in nats per text."""

    Settings = ClassesSettings
    form = "classes"
    unit = "texts"
    settings: ClassesSettings

    @property
    @override
    def columns(self) -> tuple[str, ...]:
        return (self.settings.text, self.settings.label)

    @property
    @override
    def vocabulary(self) -> int:
        return max(self._file.tokenizer.get_vocab_size(), self.settings.pad_token + 1)

    @property
    @override
    def classes(self) -> int:
        return len(self.settings.labels)

    @override
    def model(self, shape: ModelSettings) -> nn.Module:
        return Classifier(shape, self.classes)

    @override
    def encode(self, row: dict[str, Any], context: Context) -> dict[str, Array]:
        ids = self._file.tokenizer.encode(row[self.settings.text]).ids
        if not ids:
            raise ValueError("its text is empty")
        if ids[-1] == self.settings.pad_token:
            raise ValueError("its text ends with objective.pad_token: name an id that ends none")
        tokens = padded(ids, context.seq_len, np.int64, cut=self.settings.cut)
        present = np.arange(context.seq_len) < len(ids)
        tokens[~present] = self.settings.pad_token
        label = np.array(self._number(row[self.settings.label]))
        return {"tokens": tokens, "present": present, "label": label, "counts": np.array(1)}

    def _number(self, label: Any) -> int:
        labels = self.settings.labels
        if isinstance(label, str) and label in labels:
            return labels.index(label)
        if isinstance(label, int) and 0 <= label < len(labels):
            return label
        raise ValueError(f"its class is {label!r}, which is none of {list(labels)}")

    @override
    def blank(self, rows: int, context: Context) -> HostRows:
        shape = (rows, context.seq_len)
        more = {"present": np.ones(shape, np.bool_), "label": np.zeros(rows, np.int64)}
        return HostRows(np.ones(shape, np.int64), None, np.ones(rows, np.int64), more)

    @override
    def outputs(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """Return the logits [B, classes]."""
        return logits_of(model, batch.tokens, present=batch.more["present"])

    @override
    def loss(self, outputs: Tensor, batch: MicroBatch) -> Tensor:
        """Return the cross-entropy, computed in float32."""
        return _mean(functional.cross_entropy(outputs.float(), batch.more["label"], reduction="none"), batch)


class NextItemSettings(SettingsDocument, frozen=True, kw_only=True):
    """`[objective]` of `next_item`."""

    items: Positive
    """How many items there are: ids are below it."""

    column: str = "items"
    """The column of a session's item ids, a list."""

    cut: bool = False
    """Whether of a longer session the last `data.seq_len` + 1 items are taken instead of refusing it."""


class NextItem(RecordObjective, Causal):
    """Predict each next item of a session; the loss is in nats per item."""

    Settings = NextItemSettings
    unit = "items"
    settings: NextItemSettings

    @property
    @override
    def columns(self) -> tuple[str, ...]:
        return (self.settings.column,)

    @property
    @override
    def vocabulary(self) -> int:
        return self.settings.items

    @override
    def encode(self, row: dict[str, Any], context: Context) -> dict[str, Array]:
        items, width = row[self.settings.column], context.seq_len + 1
        if len(items) < 2:
            raise ValueError(f"a session of {len(items)} items has no next one")
        if not 0 <= min(items) <= max(items) < self.settings.items:
            raise ValueError(f"an item is not below objective.items = {self.settings.items}")
        items = items[-width:] if self.settings.cut else items
        return {"tokens": padded(items, width, np.int64), "loss_mask": np.arange(width) < len(items)}


class ClicksSettings(SettingsDocument, frozen=True, kw_only=True):
    """`[objective]` of `clicks`."""

    label: str = "clicked"
    """The column that says whether it happened: true or 1, false or 0."""

    categories: Texts
    """Columns of texts or whole numbers, of which each value is learned by itself."""

    numbers: tuple[str, ...] = ()
    """Columns of numbers that are used as they are: bring them near 1."""

    buckets: Positive = 65_536
    """Values of all categories are hashed into so many."""


class Clicks(RecordObjective):
    """Tell how likely a click is; the loss is in nats per record."""

    Settings = ClicksSettings
    form = None
    unit = "records"
    settings: ClicksSettings

    @property
    @override
    def columns(self) -> tuple[str, ...]:
        return (self.settings.label, *self.settings.categories, *self.settings.numbers)

    @property
    @override
    def vocabulary(self) -> int:
        return self.settings.buckets

    @override
    def tokens_per_sample(self, seq_len: int) -> int:
        return len(self.settings.categories)

    @override
    def model(self, shape: ModelSettings) -> nn.Module:
        columns = len(self.settings.categories)
        return ClickNet(self.settings.buckets, columns=columns, numbers=len(self.settings.numbers), width=shape.width)

    @override
    def encode(self, row: dict[str, Any], context: Context) -> dict[str, Array]:
        named = [f"{name}={row[name]}".encode() for name in self.settings.categories]
        ids = [xxhash.xxh3_64_intdigest(one) % self.settings.buckets for one in named]
        numbers = np.array([row[name] for name in self.settings.numbers], np.float32)
        if not np.isfinite(numbers).all():
            raise ValueError(f"a number of {list(self.settings.numbers)} is missing or not finite")
        if row[self.settings.label] not in {0, 1}:
            raise ValueError(f"{self.settings.label} is {row[self.settings.label]!r}, neither 0 nor 1")
        label = np.array(row[self.settings.label], np.float32)
        return {"tokens": np.array(ids), "numbers": numbers, "label": label, "counts": np.array(1)}

    @override
    def blank(self, rows: int, context: Context) -> HostRows:
        more = {"numbers": np.ones((rows, len(self.settings.numbers)), np.float32), "label": np.zeros(rows, np.float32)}
        tokens = np.zeros((rows, len(self.settings.categories)), np.int64)
        return HostRows(tokens, None, np.ones(rows, np.int64), more)

    @override
    def outputs(self, model: nn.Module, batch: MicroBatch) -> Tensor:
        """Return the logit of each record, [B]."""
        return model(batch.tokens, batch.more["numbers"])  # type: ignore[no-any-return]

    @override
    def loss(self, outputs: Tensor, batch: MicroBatch) -> Tensor:
        """Return the binary cross-entropy, computed in float32."""
        each = functional.binary_cross_entropy_with_logits(outputs.float(), batch.more["label"], reduction="none")
        return _mean(each, batch)


def _mean(losses: Tensor, batch: MicroBatch) -> Tensor:
    """Return the mean of [B] losses over the rows that count."""
    assert batch.counts is not None
    return (losses * batch.counts).sum() / batch.counts.sum().clamp(min=1)

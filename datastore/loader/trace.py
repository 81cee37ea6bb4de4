"""Where samples come from: the documents in them, and of each its source file, byte offset and range of text."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa

from datastore.dataset.snapshot import Dataset
from datastore.errors import ConfigError
from datastore.formats.tokens import Offsets, Tokens
from datastore.loader.mixture.request import Data
from datastore.loader.order.lanes import I64
from datastore.loader.order.order import BatchPlan, Planner
from datastore.loader.order.packs import PackGrid
from datastore.loader.order.samples import SampleGrid, Span
from datastore.loader.place.sources import Source, course_of, source_numbers
from datastore.loader.place.state import read_state
from datastore.loader.settings import DeletionMode, LoaderSettings, Packing, Rank
from datastore.loader.stream import SampleStream, open_stream

__all__ = ["DocumentSpan", "SampleOrigin", "Tracer", "locate", "origins_of", "plan_step", "tracer_of"]

_SHARDS_KEPT = 4


@dataclass(frozen=True, slots=True)
class DocumentSpan:
    """A stretch of one document in a sample."""

    document: str
    """id of the document."""

    source: str
    offset: int
    """Where the document starts in its source, in bytes."""

    length: int
    """Bytes of the document in its source."""

    document_tokens: tuple[int, int]
    """Which tokens of the document, `[start, stop)`."""

    sample_tokens: tuple[int, int]
    """Where they stand in the sample."""

    shard: int
    shard_tokens: tuple[int, int]
    """Where they stand in their shard."""

    deleted: bool = False
    """Whether the document is deleted: the sample has end-of-text in its place."""


@dataclass(frozen=True, slots=True)
class SampleOrigin:
    """What a sample is made of, in order; the spans follow each other without a gap."""

    sample: int
    spans: tuple[DocumentSpan, ...]


def locate(
    dataset: Dataset,
    *,
    seq_len: int,
    samples: Iterable[int],
    deletions: DeletionMode = "mask",
    packing: Packing | None = None,
) -> list[SampleOrigin]:
    """Return where each of `samples` comes from. Reads whole shards, so it is for looking, not for training.

    Raises:
        ConfigError: a sample is not one of the dataset's.
        CorruptError: a shard or its documents are damaged.
    """
    return Tracer(dataset, seq_len=seq_len, deletions=deletions, packing=packing).locate(samples)


def origins_of(stream: SampleStream, samples: I64) -> list[SampleOrigin]:
    """Return where each of `samples` of `stream` comes from, in the order given; otherwise as `locate`."""
    numbers = source_numbers(stream.sources, samples)
    found: dict[int, SampleOrigin] = {}
    for number, source in enumerate(stream.sources):
        here = np.flatnonzero(numbers == number).tolist()
        if here:
            own = (samples[here] - source.place.first_sample).tolist()
            origins = tracer_of(source, stream).locate(own)
            found |= dict(zip(here, origins, strict=True))
    return [found[row] for row in range(len(samples))]


def tracer_of(source: Source[Dataset], stream: SampleStream) -> "Tracer":
    """Return a tracer of the samples that `source` has in `stream`."""
    grid = source.runs if isinstance(source.runs, SampleGrid | PackGrid) else None
    return Tracer(source.dataset, seq_len=stream.grid.seq_len, deletions=stream.options.deletions, grid=grid)


def plan_step(data: Data, state: Mapping[str, Any], *, global_batch: int, rank: Rank | None = None) -> BatchPlan:
    """Return what the step that started from the loader state `state` read, on `rank` (default: all ranks together).

    Raises:
        ResumeError: `state` is not one of this dataset version, or of this mixture.
    """
    seq_len, seed = int(state.get("seq_len", 1)), int(state.get("seed", 0))
    options = LoaderSettings(
        deletions=state.get("deletions", "mask"), packing=state.get("packing"), shuffle=state.get("shuffle", True)
    )
    stream = open_stream(data, seq_len=seq_len, seed=seed, options=options)
    saved = read_state(state, here=stream.start, reweigh=True)  # The weights of that time are those of the state.
    course = course_of(stream.sources, saved, epochs=None)
    planner = Planner(course.order, rank=rank or Rank(), global_batch=global_batch, total=course.end)
    return planner.plan(saved.cursor, batches=1)[0]


class Tracer:
    """Looks up samples of `seq_len + 1` tokens, as a loader with `deletions` cuts them; keeps the shards it read last.

    `grid` are these samples, where somebody has them: to pack anew reads the lengths of all documents.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        seq_len: int,
        deletions: DeletionMode = "mask",
        packing: Packing | None = None,
        grid: SampleGrid | PackGrid | None = None,
    ) -> None:
        self._dataset = dataset
        options = LoaderSettings(deletions=deletions, packing=packing)
        self._grid = grid or open_stream(dataset, seq_len=seq_len, seed=0, options=options).grid
        self._tokens = lru_cache(_SHARDS_KEPT)(dataset.token_shard)
        self._documents = lru_cache(_SHARDS_KEPT)(dataset.documents)
        self._text = dataset.token_text

    def locate(self, samples: Iterable[int]) -> list[SampleOrigin]:
        """Return where each of `samples` comes from, in the order given."""
        wanted = [int(sample) for sample in samples]
        for sample in wanted:
            if not 0 <= sample < self._grid.samples:
                raise ConfigError(
                    "no such sample", sample=sample, samples=self._grid.samples, hint="Samples count from 0."
                )
        # By shard, so that each is read once; in the order asked for afterwards.
        found = {sample: self._origin(sample) for sample in sorted(set(wanted))}
        return [found[sample] for sample in wanted]

    def text(self, span: DocumentSpan) -> str:
        """Return the text of a span; bytes that are part of a character show as U+FFFD. A deleted one has none.

        Raises:
            ConfigError: the dataset names no tokenizer.
        """
        if self._text is None:
            raise ConfigError("the dataset names no tokenizer", url=self._dataset.url, hint="Ingest with --tokenizer.")
        if span.deleted:
            return ""
        return self._text.decode(self._span_tokens(span, span.shard_tokens))

    def text_range(self, span: DocumentSpan) -> tuple[int, int] | None:
        """Return which bytes `[start, stop)` of its document's text a span is; None if the tokenizer does not tell.

        For a document that is a file, `offset + start` is the position in that file.
        """
        if self._text is None or not self._text.exact or span.deleted:
            return None
        first = span.shard_tokens[0] - span.document_tokens[0]
        start = self._text.bytes_in(self._span_tokens(span, (first, span.shard_tokens[0])))
        return start, start + self._text.bytes_in(self._span_tokens(span, span.shard_tokens))

    def _span_tokens(self, span: DocumentSpan, tokens: tuple[int, int]) -> Tokens:
        return self._tokens(span.shard)[0][tokens[0] : tokens[1]]

    def _origin(self, sample: int) -> SampleOrigin:
        spans: list[DocumentSpan] = []
        at = 0
        for stretch in self._grid.spans(sample):
            spans.extend(self._document_spans(stretch, at))
            at += stretch.stop - stretch.start
        return SampleOrigin(sample, tuple(spans))

    def _document_spans(self, stretch: Span, at: int) -> Iterable[DocumentSpan]:
        offsets: Offsets = self._tokens(stretch.shard)[1]
        table: pa.Table = self._documents(stretch.shard)
        live = self._dataset.live_rows(stretch.shard)
        # `right` skips documents without tokens at the start; those in between are skipped below.
        first = int(np.searchsorted(offsets, stretch.start, side="right")) - 1
        last = int(np.searchsorted(offsets, stretch.stop, side="left"))
        for number, row in enumerate(table.slice(first, last - first).to_pylist(), start=first):
            low, high = int(offsets[number]), int(offsets[number + 1])
            start, stop = max(low, stretch.start), min(high, stretch.stop)
            if start < stop:
                yield DocumentSpan(
                    document=row["id"],
                    source=row["source"],
                    offset=row["offset"],
                    length=row["length"],
                    document_tokens=(start - low, stop - low),
                    sample_tokens=(at + start - stretch.start, at + stop - stretch.start),
                    shard=stretch.shard,
                    shard_tokens=(start, stop),
                    deleted=live is not None and not live[number],
                )

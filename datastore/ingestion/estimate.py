"""The cost of an ingest, without doing it: files and bytes are counted, the rest is scaled up from a sample.

The sample is the beginning of some files spread evenly over the plan, so a source whose parts differ a lot is judged
by a few of them; take the estimate as such.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from datastore.dataset.log.manifest import Kind
from datastore.formats.schema import decode_schema
from datastore.ingestion.encoding.chats import ChatEncoder, UnusableChatError
from datastore.ingestion.encoding.encoder import TextEncoder
from datastore.ingestion.encoding.template import ChatFormat
from datastore.ingestion.plan import WorkItem, source_bytes, work_items
from datastore.ingestion.preparation import PreparedIngest, prepare
from datastore.ingestion.quality.chain import Chain
from datastore.ingestion.quality.text import Text
from datastore.ingestion.reading.chats import read_documents
from datastore.ingestion.reading.documents import Reject, TextRecord
from datastore.ingestion.reading.rows import read_rows
from datastore.ingestion.reading.stored import StoredTexts
from datastore.ingestion.settings import IngestSettings
from datastore.storage.resolve import open_storage

__all__ = ["Estimate", "estimate"]

_SAMPLE_FILES = 64
_SAMPLE_BYTES = 2**20

_OTHER_S_PER_BYTE = 1 / 100e6
"""Reading, digests and writing, measured at some 100 MB per CPU-second beside the encoder."""


_START_S = 0.6
"""Until a fresh process has loaded its libraries and the tokenizer."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What is to be done. Everything after `tasks` is an estimate."""

    kind: Kind
    files: int
    known_files: int
    changed_files: int
    """Of the files, those that the dataset has in another state."""

    skipped: Mapping[str, int]
    source_bytes: int
    tasks: int
    workers: int
    documents: int
    tokens: int
    rejects: int
    seconds: float
    shard_bytes: int


def estimate(sources: Sequence[str], to: str, *, settings: IngestSettings | None = None) -> Estimate:
    """Return what `ingest` with the same arguments would do; nothing is written.

    Raises:
        ConfigError, MissingError, FormatError, CorruptError, StorageError: as `ingest`, where these show beforehand.
    """
    prepared = prepare(sources, to, settings or IngestSettings())
    plan = prepared.plan
    every = list(work_items(plan))
    total = sum(source_bytes(order) for order in every)
    workers = prepared.workers(len(every)) if every else 0
    sample = _Sample(prepared, every) if every else None
    scale = total / max(1, sample.source_bytes) if sample else 0.0
    return Estimate(
        kind=plan.kind,
        files=len(plan.files),
        known_files=plan.known,
        changed_files=len(prepared.changed),
        skipped=plan.skipped,
        source_bytes=total,
        tasks=len(every),
        workers=workers,
        documents=round(sample.documents * scale) if sample else 0,
        tokens=round(sample.tokens * scale) if sample else 0,
        rejects=round(sample.rejects * scale) if sample else 0,
        seconds=total * (sample.encode_s / max(1, sample.source_bytes) + _OTHER_S_PER_BYTE) / workers
        if sample
        else 0.0,
        shard_bytes=round(sample.shard_bytes * scale) if sample else 0,
    )


class _Sample:
    """A few documents, read and encoded."""

    def __init__(self, prepared: PreparedIngest, every: Sequence[WorkItem]) -> None:
        self.source_bytes = 0
        self.rejects = 0
        self.tokens = 0
        self.encode_s = 0.0
        if prepared.settings.take in {"rows", "tokens"}:
            self._look_at_rows(prepared, every)
            return
        texts: list[str] = []
        for found in _spread(prepared, every):
            self.source_bytes += len(found.excerpt) if isinstance(found, Reject) else found.length
            if isinstance(found, Reject):
                self.rejects += 1
            else:
                texts.append(found.text)
        if prepared.settings.filters:
            texts = self._filter(texts, prepared)
        self.documents = len(texts)
        self.shard_bytes = sum(len(text.encode()) for text in texts)
        if prepared.tokenizer is not None and prepared.chats is not None:
            self._encode_chats(texts, prepared.tokenizer.raw, prepared.chats, prepared.settings)
        elif prepared.tokenizer is not None and texts:
            encoder = TextEncoder(prepared.tokenizer.raw, prepared.settings)
            started = time.process_time()
            encoded = encoder.encode(texts)
            self.encode_s += time.process_time() - started
            self.tokens = encoded.values.size
            self.shard_bytes = encoded.values.nbytes

    def _filter(self, texts: Sequence[str], prepared: PreparedIngest) -> list[str]:
        """Return what the filters leave."""
        chain = Chain(prepared.settings.filters, expected=prepared.identities)
        started = time.process_time()
        judged = [chain.judge(Text(text, about={"id": "", "source": "", "offset": 0})) for text in texts]
        self.encode_s += time.process_time() - started
        return [each.text for each in judged if not each.dropped]

    def _encode_chats(self, texts: Sequence[str], raw: bytes, form: ChatFormat, settings: IngestSettings) -> None:
        encoder = ChatEncoder(raw, form, settings.special_tokens)
        started = time.process_time()
        self.documents = self.shard_bytes = 0
        for text in texts:
            try:
                chats = encoder.encode_pair(text) if settings.take == "pairs" else (encoder.encode(text),)
            except UnusableChatError:
                self.rejects += 1
                continue
            self.documents += 1
            self.tokens += sum(chat.ids.size for chat in chats)
        self.encode_s = time.process_time() - started
        self.shard_bytes = 5 * self.tokens

    def _look_at_rows(self, prepared: PreparedIngest, every: Sequence[WorkItem]) -> None:
        """Count the first rows of files spread over the plan; how many source bytes they take is not known, but about."""
        self.documents = self.shard_bytes = 0
        settings, plan = prepared.settings, prepared.plan
        schema = decode_schema(plan.record_schema) if plan.record_schema else None
        parts = [part for order in every for part in order.parts]
        for file, start, stop in islice(parts, 0, None, max(1, len(parts) // _SAMPLE_FILES)):
            url, key = prepared.roots.locate(file.path)
            tables = read_rows(open_storage(url), key, file=file, span=(start, stop), settings=settings, schema=schema)
            rows = next((rows for _, rows in tables if rows.num_rows > 0), None)
            if rows is not None:
                self.documents += rows.num_rows
                self.shard_bytes += rows.nbytes
                self.source_bytes += min(rows.nbytes, stop - start)
                if plan.kind == "tokens" and settings.tokens_key in rows.column_names:
                    counts: Any = rows.column(settings.tokens_key).combine_chunks()
                    self.tokens += len(counts.flatten())


def _spread(prepared: PreparedIngest, every: Sequence[WorkItem]) -> Iterator[TextRecord | Reject]:
    """Yield the first documents of files spread over the plan, up to `_SAMPLE_BYTES`."""
    parts = [part for order in every for part in order.parts]
    step = max(1, len(parts) // _SAMPLE_FILES)
    share = _SAMPLE_BYTES // min(len(parts), _SAMPLE_FILES)
    for file, start, stop in islice(parts, 0, None, step):
        url, key = prepared.roots.locate(file.path)
        taken = 0
        texts = (
            StoredTexts(url).read(file)
            if file.format == "datastore"
            else read_documents(open_storage(url), key, file=file, span=(start, stop), settings=prepared.settings)
        )
        for found in texts:
            if isinstance(found, str):
                continue
            yield found
            taken += found.length if isinstance(found, TextRecord) else len(found.excerpt)
            if taken >= share:
                break

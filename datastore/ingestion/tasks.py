"""One task, from its source ranges to its shards: `work(order)` is a pure function of the sources and the settings.

read -> filter -> tokenize -> shard -> write, over batches of documents. Where it runs, how often, and beside what
else changes nothing about the bytes that it stores.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cached_property

import msgspec
import numpy as np
import xxhash

from datastore.dataset.journal import Journal, SourceFile, TaskDone
from datastore.dataset.log.manifest import Kind, TokenizerRef
from datastore.dataset.roots import open_roots
from datastore.dataset.shards.files import read_tokenizer
from datastore.document import Document
from datastore.errors import RejectedError
from datastore.formats.schema import decode_schema
from datastore.ingestion.encoding.chats import ChatEncoder
from datastore.ingestion.encoding.encoder import TextEncoder
from datastore.ingestion.encoding.template import ChatFormat
from datastore.ingestion.plan import WorkItem, source_bytes
from datastore.ingestion.quality.chain import Chain
from datastore.ingestion.quality.contamination import Contamination
from datastore.ingestion.quality.sieve import Sieve
from datastore.ingestion.quality.text import Text
from datastore.ingestion.reading.chats import read_documents
from datastore.ingestion.reading.documents import (
    Reject,
    TextRecord,
    check_unchanged,
    encode_rejects,
)
from datastore.ingestion.reading.listing import SkipReason
from datastore.ingestion.reading.rows import read_rows
from datastore.ingestion.reading.sources import Roots
from datastore.ingestion.reading.stored import StoredTexts
from datastore.ingestion.reading.streams import StoredBytes
from datastore.ingestion.settings import IngestSettings
from datastore.ingestion.sinks.chats import ChatShards, PairShards
from datastore.ingestion.sinks.documents import CopiedRows, CopiedTokens, CopySink, RecordShards, ShardSink, TokenShards
from datastore.storage.base import Storage
from datastore.storage.resolve import open_storage
from datastore.storage.statistics import OperationStatistics, add_statistics

__all__ = ["Advance", "Job", "TaskRunner"]

_BATCH_BYTES = 4 * 2**20
"""Source bytes of the documents that are encoded together."""


class Job(Document, frozen=True, kw_only=True):
    """What all tasks of an ingest have in common. Never stored: its URLs may hold credentials."""

    to: str
    ingest_id: str
    kind: Kind
    roots: Roots
    settings: IngestSettings
    tokenizer: TokenizerRef | None
    record_schema: bytes = b""
    """The columns, if rows are taken over."""

    chats: ChatFormat | None = None
    """How chats become text, if they are taken."""

    identities: tuple[str, ...] = ()
    """What the filters depend on beside their settings."""

    contamination: str = ""
    """The digest of the runs of tokens that evaluations have; empty if there are none to keep out."""

    path: tuple[str, ...] = ()
    """The caller's `sys.path`: a filter that it can import, its workers can."""

    parallel: bool = False
    """Whether the encoder may use all cores."""


class Advance(Document, frozen=True, kw_only=True, tag=True):
    """A step on the way."""

    source_bytes: int = 0
    documents: int = 0
    tokens: int = 0
    rejects: int = 0
    storage: dict[str, OperationStatistics] = msgspec.field(default_factory=dict)
    """What storages were asked for since the step that last said so; at the end of each task."""
    cpu_s: dict[str, float] = msgspec.field(default_factory=dict)
    """CPU seconds of a task at its end, by what they went into: `read` (with JSON and the like), `filter`, `encode`, `write`."""


Report = Callable[[Advance], None]


class TaskRunner:
    """Everything a process needs for the tasks of a job, opened once."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.storage = open_roots(job.to)[0]
        self.journal = Journal(self.storage, job.ingest_id)
        self._folders: dict[str, Storage] = {}
        self._stored: dict[str, StoredTexts] = {}
        self._told: dict[str, OperationStatistics] = {}

    @cached_property
    def encoder(self) -> TextEncoder | None:
        """The job's tokenizer; None if text stays text."""
        if self.job.tokenizer is None:
            return None
        raw = read_tokenizer(self.storage, self.job.tokenizer)
        return TextEncoder(raw, self.job.settings, parallel=self.job.parallel)

    @cached_property
    def chat_encoder(self) -> ChatEncoder | None:
        """The job's tokenizer with its template; None if no chats are taken."""
        if self.job.chats is None or self.job.tokenizer is None:
            return None
        raw = read_tokenizer(self.storage, self.job.tokenizer)
        return ChatEncoder(raw, self.job.chats, self.job.settings.special_tokens)

    @cached_property
    def chain(self) -> Chain | None:
        """The job's filters; None if there are none."""
        filters = self.job.settings.filters
        return Chain(filters, expected=self.job.identities) if filters or self.job.contamination else None

    @cached_property
    def contamination(self) -> Contamination | None:
        """What evaluations have; None if there are none to keep out."""
        digest = self.job.contamination
        return Contamination.decode(self.journal.contamination(digest)) if digest else None

    def work(self, order: WorkItem, report: Report) -> TaskDone:
        """Do one task, mark it done, and return what it made.

        Raises:
            RejectedError: `on_error` is `fail` and there is something to reject.
            ConflictError: a source file changed.
            StorageError: a source cannot be read, or the dataset not be written.
        """
        copies = self.job.settings.take in {"rows", "tokens"}
        started = time.process_time()
        done, spent = self._copy(order, report) if copies else self._encode(order, report)
        read_s = time.process_time() - started - sum(spent.values())
        report(Advance(storage=self._spent(), cpu_s={"read": read_s} | spent))
        return done

    def _spent(self) -> dict[str, OperationStatistics]:
        """Return what storages were asked for since this was last asked."""
        now = add_statistics(storage.statistics() for storage in (self.storage, *self._folders.values()))
        spent = {name: found - self._told.get(name, OperationStatistics()) for name, found in now.items()}
        self._told = now
        return spent

    def _encode(self, order: WorkItem, report: Report) -> tuple[TaskDone, dict[str, float]]:
        """Take text; otherwise as `work`. Return also the CPU seconds of all but reading."""
        settings = self.job.settings
        sieve = Sieve(self.chain, samples=settings.trace_filters) if self.chain else None
        run = _Run(
            self._sink(order),
            report,
            settings=settings,
            stored=StoredBytes(source_bytes(order), self._read_bytes),
            sieve=sieve,
        )
        for file, start, stop in order.parts:
            for found in self._read(file, (start, stop)):
                run.take(found)
        run.end()
        encoder = self.chat_encoder or self.encoder
        done = TaskDone(
            task_id=order.task_id,
            shards=tuple(run.sink.shards),
            documents=run.documents,
            tokens=run.sink.tokens,
            text_bytes=run.text_bytes,
            rejected=dict(sorted(run.rejected.items())),
            skipped=dict(sorted(run.skipped.items())),
            rejects_digest="",
            ids_digest="",
            encoder=encoder.name if encoder else "",
            escaped=run.sink.escaped,
            filtered=dict(sorted(sieve.dropped.items())) if sieve else {},
            changed=dict(sorted(sieve.changed.items())) if sieve else {},
            lengths=tuple(run.lengths[bits] for bits in range(max(run.lengths, default=-1) + 1)),
        )
        if sieve and (samples := sieve.encode_samples()):
            self.journal.put_samples(order.task_id, samples)
        kept = self.journal.finish(done, rejects=encode_rejects(run.kept), ids=run.ids() if run.named else b"")
        return kept, run.spent_s

    def _read_bytes(self) -> int:
        """Return how many bytes of sources this process has read."""
        return sum(each.bytes for folder in self._folders.values() for each in folder.statistics().values())

    def _read(self, file: SourceFile, span: tuple[int, int]) -> Iterator[TextRecord | Reject | SkipReason]:
        url, key = self.job.roots.locate(file.path)
        if file.format == "datastore":
            if url not in self._stored:
                self._stored[url] = StoredTexts(url)
            return self._stored[url].read(file)
        folder = self._folders.setdefault(url, open_storage(url))
        return read_documents(folder, key, file=file, span=span, settings=self.job.settings)

    def _copy(self, order: WorkItem, report: Report) -> tuple[TaskDone, dict[str, float]]:
        """Take over rows or tokens; otherwise as `_encode`."""
        sink = self._copy_sink(order)
        schema = decode_schema(self.job.record_schema) if self.job.record_schema else None
        copied = 0
        left = source_bytes(order)
        for file, start, stop in order.parts:
            url, key = self.job.roots.locate(file.path)
            folder = self._folders.setdefault(url, open_storage(url))
            for first, rows in read_rows(
                folder, key, file=file, span=(start, stop), settings=self.job.settings, schema=schema
            ):
                before = sink.tokens
                sink.add(first, rows, source=file.path)
                copied += rows.nbytes
                step = min(rows.nbytes, left)
                left -= step
                report(Advance(source_bytes=step, documents=rows.num_rows, tokens=sink.tokens - before))
            check_unchanged(folder, key, file=file)
        sink.flush()
        report(Advance(source_bytes=left))
        done = TaskDone(
            task_id=order.task_id,
            shards=tuple(sink.shards),
            documents=sink.documents,
            tokens=sink.tokens,
            text_bytes=copied,
            rejected={},
            skipped={},
            rejects_digest="",
            ids_digest="",
            encoder="",
        )
        return self.journal.finish(done, rejects=b"", ids=b""), {"write": sink.write_s}

    def _copy_sink(self, order: WorkItem) -> CopySink:
        job = self.job
        size = job.settings.shard_bytes
        if job.settings.take == "rows":
            schema = decode_schema(job.record_schema)
            return CopiedRows(self.storage, order.task_id, schema=schema, shard_bytes=size)
        key = job.settings.tokens_key
        return CopiedTokens(self.storage, order.task_id, key=key, tokenizer=job.tokenizer, shard_bytes=size)

    def _sink(self, order: WorkItem) -> ShardSink:
        size = self.job.settings.shard_bytes
        if self.chat_encoder is not None:
            kind = PairShards if self.job.settings.take == "pairs" else ChatShards
            return kind(self.storage, order.task_id, encoder=self.chat_encoder, shard_bytes=size)
        if self.encoder is None:
            return RecordShards(self.storage, order.task_id, shard_bytes=size)
        return TokenShards(
            self.storage, order.task_id, encoder=self.encoder, shard_bytes=size, unwanted=self.contamination
        )


class _Run:
    """What one task has found so far. Invariant: `documents`, `text_bytes` and `digests` count what `sink` has taken."""

    def __init__(
        self,
        sink: ShardSink,
        report: Report,
        *,
        settings: IngestSettings,
        stored: StoredBytes,
        sieve: Sieve | None,
    ) -> None:
        self.sink = sink
        self.documents = 0
        self.text_bytes = 0
        self.rejected: Counter[str] = Counter()
        self.skipped: Counter[str] = Counter()
        self.lengths: Counter[int] = Counter()
        """Documents by the bits of the length of their text."""

        self.kept: list[Reject] = []
        self.digests: list[bytes] = []
        self.named = False
        """Whether a document brought its own id."""
        self._report = report
        self._on_error = settings.on_error
        self._sieve = sieve
        self._batch: list[TextRecord] = []
        self._batch_bytes = 0
        self._stored = stored
        self._encode_s = 0.0
        self._filter_s = 0.0

    @property
    def spent_s(self) -> dict[str, float]:
        """CPU seconds by what they went into, but for reading."""
        found = {"filter": self._filter_s, "encode": self._encode_s, "write": self.sink.write_s}
        return {name: seconds for name, seconds in found.items() if seconds}

    def take(self, found: TextRecord | Reject | SkipReason) -> None:
        """Take what was read."""
        if isinstance(found, TextRecord):
            self._batch.append(found)
            self._batch_bytes += found.length
            if self._batch_bytes >= _BATCH_BYTES:
                self._encode_batch()
        elif isinstance(found, Reject):
            self._refuse([found])
        else:
            self.skipped[found] += 1

    def end(self) -> None:
        """Store what is left, and report the bytes that were no document."""
        self._encode_batch()
        self.sink.flush()
        self._report(Advance(source_bytes=self._stored.left_bytes))

    def ids(self) -> bytes:
        """Return the digests of the documents' ids, end to end, each as two little-endian numbers."""
        return np.frombuffer(b"".join(self.digests), dtype=">u8").astype("<u8").tobytes()

    def _encode_batch(self) -> None:
        before, written_s = self.sink.tokens, self.sink.write_s
        started = time.process_time()
        batch = self._filtered() if self._sieve else self._batch
        filtered = time.process_time()
        taken, refused = self.sink.add(batch)
        self._filter_s += filtered - started if self._sieve else 0.0
        self._encode_s += time.process_time() - filtered - (self.sink.write_s - written_s)
        self.documents += len(taken)
        sizes = [len(record.text) if record.text.isascii() else len(record.text.encode()) for record in taken]
        self.text_bytes += sum(sizes)
        self.lengths.update(size.bit_length() for size in sizes)
        self.named = self.named or any(record.named for record in taken)
        self.digests += [xxhash.xxh3_128_digest(record.id.encode()) for record in taken]
        step = self._stored.advance(otherwise=self._batch_bytes)
        self._report(Advance(source_bytes=step, documents=len(taken), tokens=self.sink.tokens - before))
        self._batch, self._batch_bytes = [], 0
        self._refuse(refused)
        if self._sieve:
            for record, rule in self.sink.screened:
                self._sieve.drop(_as_text(record), rule)
            self.sink.screened.clear()

    def _filtered(self) -> list[TextRecord]:
        """Return what the filters leave of the batch."""
        assert self._sieve is not None
        left = self._sieve.sift([_as_text(record) for record in self._batch])
        pairs = zip(self._batch, left, strict=True)
        return [record if text is record.text else record._replace(text=text) for record, text in pairs if text]

    def _refuse(self, rejects: list[Reject]) -> None:
        for reject in rejects:
            if self._on_error == "fail":
                raise RejectedError(
                    f"a document was rejected: {reject.reason}",
                    source=reject.source,
                    offset=reject.offset,
                    begins=reject.excerpt[:40],
                    hint="Correct it, or set `on_error` to quarantine or skip.",
                )
            self.rejected[reject.reason] += 1
            if self._on_error == "quarantine":
                self.kept.append(reject)
        if rejects:
            self._report(Advance(rejects=len(rejects)))


def _as_text(record: TextRecord) -> Text:
    """Return `record` as filters see it."""
    return Text(record.text, about={"id": record.id, "source": record.source, "offset": record.offset})

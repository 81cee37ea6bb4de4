"""The cost of an ingest, without doing it: files and bytes are counted, the rest is scaled up from a sample.

The sample is the beginning of some files spread evenly over the plan, so a source whose parts differ a lot is judged
by a few of them; take the estimate as such.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from datastore.dataset.journal import SourceFile
from datastore.dataset.log.manifest import Kind
from datastore.formats.decompression import open_stream
from datastore.formats.schema import decode_schema
from datastore.ingestion.encoding.chats import ChatEncoder, UnusableChatError
from datastore.ingestion.encoding.encoder import TextEncoder
from datastore.ingestion.encoding.template import ChatFormat
from datastore.ingestion.plan import WorkItem, may_be_cut, source_bytes, work_items
from datastore.ingestion.preparation import PreparedIngest, prepare
from datastore.ingestion.quality.chain import Chain
from datastore.ingestion.quality.text import Text
from datastore.ingestion.reading.chats import read_documents
from datastore.ingestion.reading.documents import Reject, TextRecord
from datastore.ingestion.reading.rows import is_table, read_rows
from datastore.ingestion.reading.stored import StoredTexts
from datastore.ingestion.reading.streams import read_chunks
from datastore.ingestion.settings import IngestSettings
from datastore.storage.base import Storage
from datastore.storage.resolve import open_storage

__all__ = ["Estimate", "estimate"]

_SAMPLE_FILES = 64

_WHOLE_PARTS = 2
"""So many parts of tables are read whole, if they are not too large."""

_WHOLE_BYTES = 2**25

_SAMPLE_BYTES = 16 * 2**20
"""Is read, to count documents, whose lengths differ a lot."""

_ENCODE_BYTES = 2**22
"""Is filtered and encoded, which takes longer."""

_HEAD_BYTES = 2**20
"""Of a compressed file, shows how much it has been compressed."""

_OTHER_S_PER_BYTE = 1 / 160e6
"""Reading, digests and writing, measured at some 160 MB of text per CPU-second beside the encoder."""

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
        seconds=_START_S + scale * (sample.encode_s + sample.text_bytes * _OTHER_S_PER_BYTE) / workers
        if sample
        else 0.0,
        shard_bytes=round(sample.shard_bytes * scale) if sample else 0,
    )


class _Sample:
    """A few documents, read and encoded."""

    def __init__(self, prepared: PreparedIngest, every: Sequence[WorkItem]) -> None:
        self.source_bytes = 0.0
        self.text_bytes = 0
        self.rejects = 0
        self.tokens = 0
        self.encode_s = 0.0
        if prepared.settings.take in {"rows", "tokens"}:
            self._look_at_rows(prepared, every)
            return
        texts: list[str] = []
        for found, stored_bytes in _spread(prepared, every):
            self.source_bytes += stored_bytes
            if isinstance(found, Reject):
                self.rejects += 1
            elif found is not None:
                texts.append(found.text)
        every_bytes = self.text_bytes = sum(map(len, texts))
        picked = texts[:: 1 + every_bytes // _ENCODE_BYTES]
        self._judge(picked, prepared)
        self._scale(
            count=len(texts) / max(1, len(picked)), volume=every_bytes / max(1, sum(len(text) for text in picked))
        )

    def _judge(self, texts: Sequence[str], prepared: PreparedIngest) -> None:
        """Filter and encode."""
        if prepared.settings.filters:
            texts = self._filter(texts, prepared)
        self.documents = len(texts)
        self.shard_bytes = sum(len(text.encode()) for text in texts)
        if prepared.tokenizer is not None and prepared.chats is not None:
            self._encode_chats(texts, prepared.tokenizer.raw, prepared.chats, prepared.settings)
        elif prepared.tokenizer is not None and texts:
            encoder = TextEncoder(prepared.tokenizer.raw, prepared.settings)
            encoder.encode(texts[:1])  # The first call is slow.
            started = time.process_time()
            encoded = encoder.encode(texts)
            self.encode_s += time.process_time() - started
            self.tokens = encoded.values.size
            self.shard_bytes = encoded.values.nbytes

    def _scale(self, *, count: float, volume: float) -> None:
        """Count for all texts what was found in some of them."""
        self.documents = round(self.documents * count)
        self.tokens, self.shard_bytes = round(self.tokens * volume), round(self.shard_bytes * volume)
        self.encode_s *= volume

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
                self.text_bytes += rows.nbytes
                self.source_bytes += min(rows.nbytes, stop - start)
                if plan.kind == "tokens" and settings.tokens_key in rows.column_names:
                    counts: Any = rows.column(settings.tokens_key).combine_chunks()
                    self.tokens += len(counts.flatten())


def _spread(prepared: PreparedIngest, every: Sequence[WorkItem]) -> Iterator[tuple[TextRecord | Reject | None, float]]:
    """Yield the first documents of files spread over the plan, up to `_SAMPLE_BYTES`, each with the stored bytes that it takes.

    Of a table the place of a row is not known, so a few parts are read whole; None stands for their bytes.
    """
    parts = [piece for order in every for part in order.parts for piece in _pieces(part, len(every), prepared)]
    has_whole = any(_is_read_whole(file) for file, _, _ in parts)
    most = _WHOLE_PARTS if has_whole else _SAMPLE_FILES
    share = _SAMPLE_BYTES // min(len(parts), most)
    for file, start, stop in islice(parts, 0, None, max(1, len(parts) // most)):
        url, key = prepared.roots.locate(file.path)
        found = (
            StoredTexts(url).read(file)
            if file.format == "datastore"
            else read_documents(open_storage(url), key, file=file, span=(start, stop), settings=prepared.settings)
        )
        growth = _growth(open_storage(url), key, file, prepared.settings) if file.codec else 1.0
        whole = (not is_table(file) and may_be_cut(file, prepared.settings)) or (
            _is_read_whole(file) and stop - start <= _WHOLE_BYTES
        )
        taken = 0
        for each in found:
            if isinstance(each, str):
                continue
            length = len(each.excerpt) if isinstance(each, Reject) else each.length
            yield each, 0 if whole else length / growth
            taken += length
            if taken >= share and not whole:
                break
        if whole:
            yield None, stop - start


def _pieces(
    part: tuple[SourceFile, int, int], tasks: int, prepared: PreparedIngest
) -> Iterator[tuple[SourceFile, int, int]]:
    """Yield ranges spread over a part that can be read anywhere; otherwise the part."""
    file, start, stop = part
    if is_table(file) or not may_be_cut(file, prepared.settings):
        yield part
        return
    pieces = max(1, _SAMPLE_FILES // tasks)
    size = min(stop - start, _SAMPLE_BYTES // _SAMPLE_FILES)
    for number in range(pieces if size < stop - start else 1):
        at = start + (stop - start - size) * number // pieces
        yield file, at, at + size


def _is_read_whole(file: SourceFile) -> bool:
    return is_table(file) or file.format == "datastore"


def _growth(storage: Storage, key: str, file: SourceFile, settings: IngestSettings) -> float:
    """Return how many bytes one stored byte of the compressed `file` becomes, by its beginning."""
    head = min(file.size_bytes, _HEAD_BYTES)
    stream = open_stream(
        read_chunks(storage, key, start=0, size_bytes=head), codec=file.codec, max_expansion=settings.max_expansion
    )
    return max(1.0, sum(map(len, stream)) / max(1, head))

"""Near duplicates in a dataset, deleted: of documents that are alike, one stays.

It reads all texts once, from the shards (tokens are decoded), and commits a delete. No shard is touched, and the version before still has
everything. Which documents are alike can be written to a table, for splits that must not part them.
"""

import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from datastore.dataset.elsewhere import Crew, crew_of, received, sent
from datastore.dataset.operations.delete import FoundDocuments, ShardDeletion, commit_deletion
from datastore.dataset.operations.transaction import DatasetLike, open_for_change
from datastore.dataset.shards.files import read_documents
from datastore.dataset.snapshot import Dataset
from datastore.document import Document, SettingsDocument
from datastore.engines.engine import Engine, Tell
from datastore.errors import ConfigError
from datastore.formats.arrow import numbers_of
from datastore.formats.tokentext import TokenText
from datastore.ingestion.quality.minhash import SIZE, SignatureFile, WordHashes, clusters, signatures
from datastore.ingestion.quality.text import Ids
from datastore.storage.resolve import open_storage
from datastore.units import Progress

__all__ = ["DedupReport", "DedupSettings", "deduplicate"]

_BATCH_DOCUMENTS = 2048

_PIECE_DOCUMENTS = 8192
"""About what another process signs before it answers, with 512 bytes for each."""


class DedupSettings(SettingsDocument, frozen=True, kw_only=True):
    """When documents are alike, and which one stays."""

    threshold: Annotated[float, msgspec.Meta(ge=0.5, le=1)] = 0.8
    """Share of the runs of words that two documents have in common, of all that they have."""

    words: Annotated[int, msgspec.Meta(ge=1, le=64)] = 5
    """How long a run is."""

    keep: Literal["first", "longest"] = "first"
    """Of a cluster the document that was committed first, or the longest; of several as long, the first."""

    text_column: Annotated[str, msgspec.Meta(min_length=1)] = "text"
    """The column of the text, in a dataset of records."""

    clusters: str = ""
    """Path or URL of a Parquet file to write: `id`, `cluster` (the id of its first document) and `kept`, of all that have a duplicate."""


@dataclass(frozen=True, slots=True)
class DedupReport:
    """What was found, and done."""

    url: str
    version: int
    """The version without the duplicates; with nothing to delete, or only asked, the one that was read."""

    committed: bool
    documents: int
    """Those that were looked at: deleted ones are not."""

    clusters: int
    """Of two documents or more."""

    duplicates: int
    """What is deleted, or would be."""

    tokens: int
    """Of the duplicates."""

    seconds: float


@dataclass(frozen=True, slots=True)
class _Seen:
    """All documents, in the order in which they were committed."""

    shards: npt.NDArray[np.int32]
    rows: npt.NDArray[np.int32]
    sizes: Ids
    """Characters of the text."""

    first: Ids
    """The first of the document's cluster."""


def deduplicate(
    target: DatasetLike,
    *,
    settings: DedupSettings | None = None,
    dry_run: bool = False,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> DedupReport:
    """Delete the near duplicates of `target`; `progress` gets the documents that were read, and all.

    `settings` say when documents are alike, and which one stays; by default `DedupSettings()`. With `dry_run` they are only
    counted.
    With an `engine` other processes read and sign the texts; what is alike is found here. The result is the same.

    Raises:
        ConfigError: the records have no such column of text, or the tokens no tokenizer to read them by.
        DependencyError: rensa is not installed.
        ConflictError: another operation changed the same shards meanwhile; nothing was deleted.
    """
    started = time.monotonic()
    settings = settings or DedupSettings()
    dataset = open_for_change(target)
    seen = _look(dataset, settings, crew_of(dataset, target, engine) if engine else None, progress)
    kept = _kept(seen, settings)
    found = _found(dataset, seen, kept)
    if settings.clusters:
        _write_clusters(dataset, seen, kept, settings.clusters)
    commit = commit_deletion(dataset, found) if found.rows and not dry_run else dataset.commit
    return DedupReport(
        url=dataset.url,
        version=commit.version,
        committed=commit is not dataset.commit,
        documents=seen.rows.size,
        clusters=int(np.unique(seen.first[~kept]).size),
        duplicates=found.documents,
        tokens=found.tokens,
        seconds=time.monotonic() - started,
    )


def _look(dataset: Dataset, settings: DedupSettings, crew: Crew | None, progress: Progress | None) -> _Seen:
    """Read all texts, and find out which are alike."""
    _require_texts(dataset, settings.text_column)
    rows = [_live(dataset, index) for index in range(len(dataset.segments))]
    starts = np.cumsum([0, *(part.size for part in rows)])
    total = int(starts[-1])
    sizes = np.zeros(total, dtype=np.int64)
    with tempfile.TemporaryDirectory() as folder:
        stored = SignatureFile(Path(folder) / "signatures", total)
        done = 0
        for start, signed in _signed(dataset, settings, crew, starts):
            stop = start + len(signed.sizes)
            stored.put(start, signed.signatures())
            sizes[start:stop] = signed.sizes
            done += stop - start
            if progress is not None:
                progress(done, total)
        first = clusters(stored.columns[:, :total], threshold=settings.threshold)
    shards = np.repeat(np.arange(len(rows), dtype=np.int32), np.diff(starts))
    return _Seen(shards, np.concatenate([np.empty(0, dtype=np.int32), *rows]), sizes, first)


class _Signed(Document, frozen=True, kw_only=True):
    """What is known of some texts."""

    sizes: list[int]
    raw: bytes
    """Their signatures, little-endian, one after the other."""

    def signatures(self) -> npt.NDArray[np.uint32]:
        return np.frombuffer(self.raw, "<u4").reshape(-1, SIZE)


def _signed(dataset: Dataset, settings: DedupSettings, crew: Crew | None, starts: Ids) -> Iterator[tuple[int, _Signed]]:
    """Yield the texts of stretches of the dataset, each with the number of its first; of a `crew` in any order."""
    if crew is None:
        signer = _Signer(dataset, settings)
        for index in range(len(dataset.segments)):
            at = int(starts[index])
            for signed in signer.shard(index):
                yield at, signed
                at += len(signed.sizes)
        return
    stretches = _stretches(starts)
    items = (((start, stop, settings), {"shard": dataset.segments.shard(start).path}) for start, stop in stretches)
    for number, signed in crew.spread(sign_texts, items, answer=_Signed):
        yield int(starts[stretches[number][0]]), signed


def _stretches(starts: Ids) -> list[tuple[int, int]]:
    """Return shards [start, stop) of some thousand documents each, end to end.

    >>> _stretches(np.array([0, 5_000, 9_000, 9_000, 9_100]))
    [(0, 2), (2, 4)]
    """
    found, start = [], 0
    for stop in range(1, len(starts)):
        if starts[stop] - starts[start] >= _PIECE_DOCUMENTS or stop == len(starts) - 1:
            found.append((start, stop))
            start = stop
    return found


def sign_texts(order: bytes, _: Tell) -> bytes:
    """Sign the texts of some shards, in any process."""
    dataset, (start, stop, settings) = received(order, tuple[int, int, DedupSettings])
    signer = _Signer(dataset, settings)
    parts = [part for index in range(start, stop) for part in signer.shard(index)]
    sizes = [size for part in parts for size in part.sizes]
    return sent(_Signed(sizes=sizes, raw=b"".join(part.raw for part in parts)))


class _Signer:
    """Reads the texts of a dataset, and signs them."""

    def __init__(self, dataset: Dataset, settings: DedupSettings) -> None:
        self._dataset = dataset
        self._settings = settings
        self._hashes = WordHashes()
        self._decode = _decoder(dataset) if dataset.kind == "tokens" else None

    def shard(self, index: int) -> Iterator[_Signed]:
        """Yield the texts of a shard that are not deleted, in order, some at a time."""
        dataset, decode = self._dataset, self._decode
        read = _of_tokens(dataset, index, decode) if decode else _of_records(dataset, index, self._settings.text_column)
        live = _live(dataset, index)
        for start in range(0, live.size, _BATCH_DOCUMENTS):
            texts = read(live[start : start + _BATCH_DOCUMENTS])
            found = signatures(texts, length=self._settings.words, hashes=self._hashes)
            yield _Signed(sizes=[len(text) for text in texts], raw=found.astype("<u4").tobytes())


def _live(dataset: Dataset, index: int) -> npt.NDArray[np.int32]:
    """Return the rows of a shard that are not deleted."""
    alive = dataset.live_rows(index)
    count = dataset.segments.shard(index).documents
    return (np.arange(count) if alive is None else np.flatnonzero(alive)).astype(np.int32)


def _require_texts(dataset: Dataset, column: str) -> None:
    """Raise ConfigError unless there are texts to compare."""
    if dataset.kind == "tokens":
        _decoder(dataset)
    elif column not in dataset.schema.names or not pa.types.is_string(dataset.schema.field(column).type):
        raise ConfigError(
            "the records have no such column of text",
            url=dataset.url,
            text_column=column,
            columns=dataset.schema.names,
            hint="Name another one: `text_column=COLUMN`.",
        )


Read = Callable[[npt.NDArray[np.int32]], list[str]]


def _of_tokens(dataset: Dataset, index: int, decode: TokenText) -> Read:
    values, offsets = dataset.token_shard(index)
    return lambda rows: [decode.decode(values[offsets[row] : offsets[row + 1]]) for row in rows.tolist()]


def _of_records(dataset: Dataset, index: int, column: str) -> Read:
    texts: Any = dataset.record_shard(index).column(column)
    return lambda rows: [text or "" for text in texts.take(rows).to_pylist()]


def _decoder(dataset: Dataset) -> TokenText:
    if dataset.token_text is None:
        raise ConfigError(
            "the dataset names no tokenizer that its tokens could be read by",
            url=dataset.url,
            hint="Find near duplicates in the texts before they become tokens.",
        )
    return dataset.token_text


def _kept(seen: _Seen, settings: DedupSettings) -> npt.NDArray[np.bool_]:
    """Return which documents stay."""
    kept: npt.NDArray[np.bool_] = seen.first == np.arange(seen.first.size)
    if settings.keep == "longest":
        order = np.lexsort((-seen.sizes, seen.first))
        kept[:] = False
        kept[order[np.concatenate([[True], np.diff(seen.first[order]) != 0])[: order.size]]] = True
    return kept


def _found(dataset: Dataset, seen: _Seen, kept: npt.NDArray[np.bool_]) -> FoundDocuments:
    """Return the documents that go, as a delete takes them."""
    found = FoundDocuments()
    for index in np.unique(seen.shards[~kept]).tolist():
        shard = dataset.segments.shard(index)
        rows = seen.rows[(seen.shards == index) & ~kept]
        tokens = 0
        if dataset.kind == "tokens":
            lengths = numbers_of(read_documents(dataset.storage, shard, columns=["tokens"]).column("tokens"))
            found.lengths[shard.uid] = lengths
            tokens = int(lengths[rows].sum())
        found.rows[shard.uid] = rows
        found.shards.append(ShardDeletion(path=shard.path, documents=rows.size, tokens=tokens))
    return found


def _write_clusters(dataset: Dataset, seen: _Seen, kept: npt.NDArray[np.bool_], url: str) -> None:
    """Write the documents that have a duplicate, with their clusters."""
    members = np.flatnonzero(np.isin(seen.first, seen.first[~kept]))
    names: dict[int, Any] = {}
    for index in np.unique(seen.shards[members]).tolist():
        here = members[seen.shards[members] == index]
        if dataset.kind == "tokens":
            ids = read_documents(dataset.storage, dataset.segments.shard(index), columns=["id"]).column("id")
        elif "id" in dataset.schema.names:
            ids = dataset.record_shard(index).column("id")
        else:
            raise ConfigError("clusters name documents by their ids, and these records have none", url=dataset.url)
        names.update(zip(here.tolist(), ids.take(seen.rows[here]).to_pylist(), strict=True))
    table = pa.table(
        {
            "id": pa.array([str(names[member]) for member in members.tolist()], pa.string()),
            "cluster": pa.array([str(names[first]) for first in seen.first[members].tolist()], pa.string()),
            "kept": pa.array(kept[members]),
        }
    )
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    folder, slash, name = url.rpartition("/")
    open_storage(folder or slash or ".").put(name, sink.getvalue().to_pybytes())

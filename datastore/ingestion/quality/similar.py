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

from datastore.dataset.operations.delete import FoundDocuments, ShardDeletion, commit_deletion
from datastore.dataset.operations.transaction import DatasetLike, open_for_change
from datastore.dataset.shards.files import read_documents
from datastore.dataset.snapshot import Dataset
from datastore.document import SettingsDocument
from datastore.errors import ConfigError
from datastore.formats.arrow import numbers_of
from datastore.formats.tokentext import TokenText
from datastore.ingestion.quality.minhash import SignatureFile, WordHashes, clusters, signatures
from datastore.ingestion.quality.text import Ids
from datastore.storage.resolve import open_storage
from datastore.units import Progress

__all__ = ["DedupReport", "DedupSettings", "deduplicate"]

_BATCH_DOCUMENTS = 2048


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
    progress: Progress | None = None,
) -> DedupReport:
    """Delete the near duplicates of `target`; `progress` gets the documents that were read, and all.

    Raises:
        ConfigError: the records have no such column of text, or the tokens no tokenizer to read them by.
        DependencyError: rensa is not installed.
        ConflictError: another operation changed the same shards meanwhile; nothing was deleted.
    """
    started = time.monotonic()
    settings = settings or DedupSettings()
    dataset = open_for_change(target)
    seen = _look(dataset, settings, progress)
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


def _look(dataset: Dataset, settings: DedupSettings, progress: Progress | None) -> _Seen:
    """Read all texts, and find out which are alike."""
    total = dataset.totals.documents
    shards: list[npt.NDArray[np.int32]] = []
    rows: list[npt.NDArray[np.int32]] = []
    sizes: list[int] = []
    hashes = WordHashes()
    with tempfile.TemporaryDirectory() as folder:
        stored = SignatureFile(Path(folder) / "signatures", total)
        for index, live, texts in _texts(dataset, settings.text_column):
            stored.add(signatures(texts, length=settings.words, hashes=hashes))
            shards.append(np.full(live.size, index, dtype=np.int32))
            rows.append(live)
            sizes += map(len, texts)
            if progress is not None:
                progress(stored.documents, total)
        first = clusters(stored.columns[:, : stored.documents], threshold=settings.threshold)
    none = np.empty(0, dtype=np.int32)
    return _Seen(np.concatenate([none, *shards]), np.concatenate([none, *rows]), np.array(sizes, dtype=np.int64), first)


def _texts(dataset: Dataset, column: str) -> Iterator[tuple[int, npt.NDArray[np.int32], list[str]]]:
    """Yield some rows of a shard that are not deleted, with their texts, in order."""
    decode = _decoder(dataset) if dataset.kind == "tokens" else None
    if decode is None and (
        column not in dataset.schema.names or not pa.types.is_string(dataset.schema.field(column).type)
    ):
        raise ConfigError(
            "the records have no such column of text",
            url=dataset.url,
            text_column=column,
            columns=dataset.schema.names,
            hint="Name another one: `text_column=COLUMN`.",
        )
    for index in range(len(dataset.segments)):
        read = _of_tokens(dataset, index, decode) if decode else _of_records(dataset, index, column)
        alive = dataset.live_rows(index)
        count = dataset.segments.shard(index).documents
        live = (np.arange(count) if alive is None else np.flatnonzero(alive)).astype(np.int32)
        for start in range(0, live.size, _BATCH_DOCUMENTS):
            some = live[start : start + _BATCH_DOCUMENTS]
            yield index, some, read(some)


Read = Callable[[npt.NDArray[np.int32]], list[str]]


def _of_tokens(dataset: Dataset, index: int, decode: TokenText) -> Read:
    values, offsets = dataset.token_shard(index)
    return lambda rows: [decode.decode(values[offsets[row] : offsets[row + 1]]) for row in rows.tolist()]


def _of_records(dataset: Dataset, index: int, column: str) -> Read:
    texts: Any = dataset.record_shard(index).column(column)
    return lambda rows: [text or "" for text in texts.take(rows).to_pylist()]


def _decoder(dataset: Dataset) -> TokenText:
    raw, ref = dataset.tokenizer(), dataset.commit.tokenizer
    if raw is None or ref is None:
        raise ConfigError(
            "the dataset names no tokenizer that its tokens could be read by",
            url=dataset.url,
            hint="Find near duplicates in the texts before they become tokens.",
        )
    return TokenText(raw, end_of_text=ref.end_of_text)


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

"""The documents of a dataset of ours as texts, to be encoded with another tokenizer.

The tokens are the text: decoded, they give it to the byte where their tokenizer is byte-level, and each document has the digest of the text that it
was, so that whether it came back is known, not hoped. One that did not is rejected, never guessed.

Each document keeps its id, and what is said of where it comes from. The files are the shards. A shard is known by its uid, its
digest and the rows that are deleted from it; one that is no longer so has changed, like any other file.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import xxhash

from datastore.dataset.journal import SourceFile
from datastore.dataset.log.manifest import Commit
from datastore.dataset.shards.files import read_token_table
from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.digest import digest_hex
from datastore.errors import ConfigError, ConflictError
from datastore.ingestion.reading.documents import Reject, TextRecord, reject

__all__ = ["StoredTexts", "require_unwritten", "shard_file", "source_name", "stored_files"]

_OF_TEXTS = ("id", "source", "offset", "text")

_NO_DIGEST = bytes(16)
"""Of a document whose tokens were taken over, so that nobody has seen its text."""


def stored_files(url: str) -> tuple[str, list[SourceFile]]:
    """Return a name for the dataset at `url`, and its shards.

    Raises:
        ConfigError: it holds other things than texts, or more than their tokens.
        MissingError: there is no dataset.
    """
    dataset = open_dataset(url)
    if dataset.kind == "records":
        if tuple(dataset.schema.names) != _OF_TEXTS:
            raise ConfigError(
                "the dataset holds records, not texts",
                url=dataset.url,
                columns=dataset.schema.names,
                hint="Take a column of text by an export: `datastore export` to Parquet, then ingest that.",
            )
    elif dataset.commit.tokenizer is None:
        raise ConfigError(
            "the dataset names no tokenizer, so its tokens have no text",
            url=dataset.url,
            hint="Ingest the text itself.",
        )
    shards = [dataset.segments.shard(index) for index in range(len(dataset.segments))]
    columns = sorted({column.name for shard in shards for column in shard.layout.columns})
    if columns:
        raise ConfigError(
            "the tokens have columns that would have no place beside others",
            url=dataset.url,
            columns=columns,
            hint="Ingest the chats or texts themselves.",
        )
    name = source_name(dataset)
    return name, [shard_file(dataset, index, name) for index in range(len(shards))]


def source_name(dataset: Dataset) -> str:
    """Return what `dataset` is called as a source: the same wherever a part of its URL is, and no other one is called so."""
    return f"{dataset.url.rstrip('/').rpartition('/')[2] or 'root'}-{dataset.uuid[:8]}"


def shard_file(dataset: Dataset, index: int, name: str) -> SourceFile:
    """Return shard `index` of `dataset`, which is called `name`, as a file to read, in the state that it is in."""
    shard = dataset.segments.shard(index)
    deleted = dataset.deletions.rows(shard.uid).astype("<i8").tobytes()
    return SourceFile(
        path=f"{name}/{shard.path}",
        size_bytes=shard.size_bytes,
        modified=0.0,
        format="datastore",
        codec="",
        lone=False,
        fingerprint=digest_hex(shard.uid.encode(), shard.digest, deleted),
    )


def require_unwritten(files: Sequence[SourceFile], history: Sequence[tuple[Commit, Sequence[SourceFile]]]) -> None:
    """Raise if a shard that an earlier ingest has read is no more, or has lost rows: its documents would come again in another one.

    `files` are those that are to be read, `history` the versions of the destination with those that they have brought.

    Raises:
        ConfigError: there is one.
    """
    prints = {file.fingerprint for file in files}
    names = {file.path.partition("/")[0] for file in files if file.format == "datastore"}
    for commit, brought in history:
        for file in brought:
            if file.format == "datastore" and file.path.partition("/")[0] in names and file.fingerprint not in prints:
                raise ConfigError(
                    "the source has been compacted, or lost documents, since some of it was taken",
                    version=commit.version,
                    shard=file.path,
                    hint="Take all of it into a new dataset, or in the place of what is there: `operation=overwrite`.",
                )


class StoredTexts:
    """Reads the shards of the dataset at `url`; opened once for many of them."""

    def __init__(self, url: str) -> None:
        self._dataset = open_dataset(url)
        self._places = {self._dataset.segments.shard(at).path: at for at in range(len(self._dataset.segments))}
        self._text = self._dataset.token_text

    def read(self, file: SourceFile) -> Iterator[TextRecord | Reject]:
        """Yield the documents of one shard that are not deleted, in order.

        Raises:
            ConflictError: the dataset has the shard no longer, or has deleted rows of it.
            CorruptError: a file of it is damaged.
        """
        name, _, path = file.path.partition("/")
        index = self._places.get(path)
        if index is None or shard_file(self._dataset, index, name) != file:
            raise ConflictError(
                "the dataset that is read has changed", shard=file.path, hint="Run the same command again."
            )
        yield from self._records(index) if self._dataset.kind == "records" else self._decoded(index)

    def _records(self, index: int) -> Iterator[TextRecord]:
        for row in self._dataset.live_records(index).to_pylist():
            length = len(row["text"].encode())
            yield TextRecord(row["id"], row["source"], row["offset"], length, row["text"], named=False)

    def _decoded(self, index: int) -> Iterator[TextRecord | Reject]:
        assert self._text is not None
        stored = read_token_table(self._dataset.storage, self._dataset.segments.shard(index))
        documents, live = self._dataset.documents(index), self._dataset.live_rows(index)
        rows = range(documents.num_rows) if live is None else np.flatnonzero(live).tolist()
        columns: list[list[Any]] = [documents.column(name).to_pylist() for name in _DESCRIBED]
        for row in rows:
            name, source, offset, length, digest = (column[row] for column in columns)
            text = self._text.decode(stored.values[stored.offsets[row] : stored.offsets[row + 1]])
            if _is_whole(text, digest):
                yield TextRecord(name, source, offset, length, text, named=False)
            else:
                yield reject(source, offset, "text_lost", text)


_DESCRIBED = ("id", "source", "offset", "length", "digest")


def _is_whole(text: str, digest: bytes) -> bool:
    if digest == _NO_DIGEST:
        return bool(text) and "\ufffd" not in text
    return xxhash.xxh3_128_digest(text.encode()) == digest

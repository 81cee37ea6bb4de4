"""A dataset at one version: what every reader starts from. It never changes; open again to see a newer version."""

import os
import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from typing_extensions import override

from datastore.dataset.log.commits import CommitLog
from datastore.dataset.log.keys import REFERENCES, commit_key
from datastore.dataset.log.manifest import Commit, DatasetInfo, Kind, Totals
from datastore.dataset.log.tags import read_tagged
from datastore.dataset.query.views import Views
from datastore.dataset.roots import open_roots
from datastore.dataset.shards.batches import BatchReader
from datastore.dataset.shards.deletions import Deletions, load_deletions, merge_spans
from datastore.dataset.shards.files import read_documents, read_record_shard, read_token_shard, read_tokenizer
from datastore.dataset.shards.segments import Segments, load_segments
from datastore.display import html_fields
from datastore.errors import ConfigError, CorruptError, MissingError
from datastore.formats.evolution import adapt
from datastore.formats.joining import keep_rows
from datastore.formats.plain import python_rows
from datastore.formats.records import BATCH_BYTES
from datastore.formats.schema import decode_schema
from datastore.formats.tokens import Offsets, Tokens
from datastore.formats.tokentext import TokenText
from datastore.storage.base import Storage
from datastore.storage.resolve import open_storage
from datastore.storage.wrappers import LinkedStorage
from datastore.units import format_bytes

__all__ = ["Dataset", "open_dataset", "split_reference"]

_REFERENCE = re.compile(r"(?P<url>.*[^/@])@(?P<name>[A-Za-z0-9][A-Za-z0-9._-]*)", re.DOTALL)


class Dataset(Views):
    """One version of a dataset; immutable, safe for any number of threads."""

    def __init__(self, storage: Storage, *, info: DatasetInfo, commit: Commit) -> None:
        self.storage = storage
        self.info = info
        self.commit = commit

    def __repr__(self) -> str:
        return f"Dataset({self.url!r}, version={self.version})"

    def _repr_html_(self) -> str:
        """For a notebook: what the version holds. Nothing is read for it."""
        totals, tokenizer = self.totals, self.commit.tokenizer
        return html_fields(
            f"{self.url}, version {self.version} ({self.commit.operation}, {self.commit.time[:19]})",
            {
                "documents": f"{totals.documents - totals.deleted_documents:,}",
                "tokens": f"{totals.tokens - totals.deleted_tokens:,}" if self.kind == "tokens" else None,
                "deleted": f"{totals.deleted_documents:,} documents" if totals.deleted_documents else None,
                "vocabulary": f"{tokenizer.vocab_size:,} ids" if tokenizer else None,
                "columns": None if self.kind == "tokens" else ", ".join(f"{c.name}: {c.type}" for c in self.schema),
                "shards": f"{totals.shards:,} ({format_bytes(totals.size_bytes)})",
            },
        )

    @override
    def __reduce__(self) -> tuple[object, ...]:
        """Pickle the place and the version: another process opens them again, with credentials of its own."""
        return _open_version, (self.url, self.version)

    @cached_property
    def log(self) -> CommitLog:
        """All versions of the dataset."""
        return CommitLog(self.storage, exclusive=self.info.exclusive)

    def at(self, commit: Commit) -> "Dataset":
        """Return another version of the dataset, whose `commit` was read already."""
        return Dataset(self.storage, info=self.info, commit=commit)

    @property
    def url(self) -> str:
        """Where it lies, without version and credentials."""
        return self.storage.url

    @property
    def uuid(self) -> str:
        """Names the dataset, wherever it lies."""
        return self.info.uuid

    @property
    def version(self) -> int:
        """The version that is open."""
        return self.commit.version

    @property
    def kind(self) -> Kind:
        """`tokens` or `records`."""
        return self.commit.kind

    @property
    def batch_bytes(self) -> int:
        """About what a batch of records takes in memory."""
        return BATCH_BYTES

    @property
    def totals(self) -> Totals:
        """Shards, documents, tokens and bytes of this version."""
        return self.commit.totals

    @cached_property
    def segments(self) -> Segments:
        """All shards, in order, as columns.

        Raises:
            MissingError: a segment is gone.
            CorruptError: a segment is damaged.
        """
        return load_segments(self.storage, self.commit)

    @cached_property
    def deletions(self) -> Deletions:
        """Which documents of the shards are deleted.

        Raises:
            MissingError: a table of them is gone.
            CorruptError: one is damaged.
        """
        return load_deletions(self.storage, self.commit)

    @cached_property
    def deleted_spans(self) -> npt.NDArray[np.int64]:
        """[K, 2] the deleted tokens as stretches [start, stop) of the stream: all shards end to end, in order, none touching.

        Raises:
            MissingError, CorruptError: as `deletions`; or it names tokens that a shard does not have.
        """
        uids = sorted(self.deletions.uids)
        ends = np.cumsum(self.segments.tokens)
        spans = [np.empty((0, 2), np.int64)]
        for uid, place in zip(uids, self.segments.find(uids).tolist(), strict=True):
            found = self.deletions.spans(uid)
            if place < 0 or not found.size:
                continue
            if found[-1, 1] > self.segments.tokens[place]:
                raise CorruptError(
                    "more tokens are deleted than the shard has", shard=uid, hint="Restore the dataset from a copy."
                )
            spans.append(found + (ends[place] - self.segments.tokens[place]))
        return merge_spans(np.concatenate(spans))

    def tokenizer(self) -> bytes | None:
        """Return the exact `tokenizer.json`, or None if the dataset names none.

        Raises:
            MissingError: the file is gone.
            CorruptError: the file is damaged.
        """
        return read_tokenizer(self.storage, self.commit.tokenizer) if self.commit.tokenizer else None

    @cached_property
    def token_text(self) -> TokenText | None:
        """What makes text of its tokens, or None if the dataset names no tokenizer.

        Raises:
            MissingError, CorruptError: as `tokenizer`.
        """
        raw, ref = self.tokenizer(), self.commit.tokenizer
        return None if raw is None or ref is None else TokenText(raw, end_of_text=ref.end_of_text)

    def token_shard(self, index: int) -> tuple[Tokens, Offsets]:
        """Return all tokens of shard `index`, end to end, and its `documents + 1` offsets, deleted ones too.

        The whole file is checked.

        Raises:
            MissingError: the file is gone.
            CorruptError: the file is damaged.
        """
        self._require("tokens")
        return read_token_shard(self.storage, self.segments.shard(index))

    def documents(self, index: int) -> pa.Table:
        """Return the documents of token shard `index`, as `DOCUMENTS_SCHEMA`; deleted ones too.

        Raises:
            MissingError: the file is gone.
            CorruptError: the file is damaged.
        """
        self._require("tokens")
        return read_documents(self.storage, self.segments.shard(index))

    def live_rows(self, index: int) -> npt.NDArray[np.bool_] | None:
        """Return which rows of shard `index` are not deleted, or None if all are there."""
        shard = self.segments.shard(index)
        deleted = self.deletions.rows(shard.uid)
        if not deleted.size:
            return None
        live = np.ones(shard.documents, np.bool_)
        live[deleted] = False
        return live

    def live_documents(self, index: int) -> pa.Table:
        """Return the documents of token shard `index` that are not deleted; otherwise as `documents`."""
        return _only(self.documents(index), self.live_rows(index))

    @cached_property
    def schema(self) -> pa.Schema:
        """The Arrow schema of a record dataset, with what is noted in it of its changes."""
        self._require("records")
        return decode_schema(self.commit.record_schema, where=commit_key(self.commit.version))

    def record_shard(self, index: int) -> pa.Table:
        """Return the rows of record shard `index` as `schema`, deleted ones too.

        Raises:
            MissingError: the file is gone.
            CorruptError: the file is damaged.
        """
        self._require("records")
        return adapt(read_record_shard(self.storage, self.segments.shard(index)), self.schema)

    def live_records(self, index: int) -> pa.Table:
        """Return the rows of record shard `index` that are not deleted; otherwise as `record_shard`."""
        return _only(self.record_shard(index), self.live_rows(index))

    def read_batch(self, shard: int, batch: int, *, columns: Sequence[str] | None = None) -> pa.RecordBatch:
        """Return batch `batch` of record shard `shard`, some 2 MiB, deleted rows too: one range read where it is remote.

        A shard has `len(segments.shard(shard).layout.batches)` of them. With `columns` only those are read.

        Raises:
            IndexError: there is no such shard, or no such batch.
            ConfigError: there is no such column.
            MissingError: the file is gone.
            CorruptError: the file is damaged.
        """
        return self._batches.read(shard, batch, columns=columns)

    def batch_rows(self, shard: int) -> list[int]:
        """Return how many rows each batch of record shard `shard` has; none if it is of before batches could be read alone.

        Raises:
            IndexError: there is no such shard.
        """
        return [span.rows for span in self.segments.shard(shard).layout.batches]

    def iter_batches(self, *, columns: Sequence[str] | None = None, deleted: bool = False) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a record dataset in order, a few batches of 2 MiB in memory at a time.

        With `columns` only those are read; `deleted` rows are left out unless asked for.

        Raises:
            ConfigError: there is no such column.
            MissingError, CorruptError: as `record_shard`.
        """
        masks: tuple[int, npt.NDArray[np.bool_] | None] = -1, None
        for shard, row, batch in self._batches.each(columns=columns):
            if masks[0] != shard:
                masks = shard, None if deleted else self.live_rows(shard)
            live = masks[1]
            yield batch if live is None else keep_rows(batch, live[row : row + batch.num_rows])

    def iter_records(self, *, columns: Sequence[str] | None = None) -> Iterator[dict[str, Any]]:
        """Yield the rows of a record dataset that are not deleted, in order; `columns` and all else as `iter_batches`.

        Raises:
            ConfigError: also where Python has no form of a value, as of a year past 9999.
        """
        for batch in self.iter_batches(columns=columns):
            yield from python_rows(batch)

    @cached_property
    def _batches(self) -> BatchReader:
        return BatchReader(self.storage, self.segments, schema=self.schema)

    def _require(self, kind: Kind) -> None:
        if self.kind != kind:
            raise ConfigError(
                f"the dataset holds {self.kind}, not {kind}", url=self.url, hint=f"Open a dataset of {kind}."
            )


def _only(table: pa.Table, rows: npt.NDArray[np.bool_] | None) -> pa.Table:
    return table if rows is None else keep_rows(table, rows)


def open_dataset(
    url: str | os.PathLike[str] | Storage, *, version: int | None = None, tag: str | None = None
) -> Dataset:
    """Return the dataset at `url`, in its newest version, in `version`, or in that of `tag`; a URL may end in `@7` or `@tag`.

    Raises:
        ConfigError: the URL is empty or unknown, or names a version and a tag.
        MissingError: there is no dataset, no such version or no such tag; or that version has expired.
        FormatError: there is something else, or it was written by a newer version of this package.
        CorruptError: what is needed to open it is damaged.
    """
    if not isinstance(url, Storage):
        base, name = split_reference(os.fspath(url))
        if name and (version is not None or tag is not None):
            raise ConfigError("two versions are named", url=os.fspath(url), hint="Name one version or one tag.")
        if name.isdecimal():
            version = int(name)
        elif name:
            tag = name
        url = base
    if version is not None and tag is not None:
        raise ConfigError("a version and a tag are named", version=version, tag=tag, hint="Name one of them.")
    storage, info = open_roots(url)
    commit = _commit(storage, info, version, tag)
    if commit is None:
        raise MissingError(
            "the dataset has no version yet",
            url=storage.url,
            hint="Finish the ingest that was begun, by running it again.",
        )
    return Dataset(
        LinkedStorage(storage, open_storage) if REFERENCES in commit.features else storage, info=info, commit=commit
    )


def _open_version(url: str, version: int) -> Dataset:
    return open_dataset(open_storage(url), version=version)


def _commit(storage: Storage, info: DatasetInfo, version: int | None, tag: str | None) -> Commit | None:
    log = CommitLog(storage)
    if tag is not None:
        return log.readable(read_tagged(storage, tag), info=info)
    return log.newest() if version is None else log.readable(log.read(version), info=info)


def split_reference(url: str) -> tuple[str, str]:
    """Return the URL without its `@version` or `@tag`, and that ("" if there is none).

    >>> split_reference("s3://bucket/books@v1.0")
    ('s3://bucket/books', 'v1.0')
    >>> split_reference("sftp://me@host/books")
    ('sftp://me@host/books', '')
    """
    found = _REFERENCE.fullmatch(url)
    return (found["url"], found["name"]) if found else (url, "")

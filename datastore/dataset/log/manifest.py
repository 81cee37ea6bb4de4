"""The documents of a dataset: what it is, one per version, one per tag.

A `Commit` is self-contained: with its segments it names every byte of its version, so opening never replays a log.
The price is that a commit repeats the list of segments, a few hundred bytes each; there are some twenty of them at
a million shards.
"""

from typing import Annotated, ClassVar, Literal

import msgspec

from datastore.document import Count, Document, Hex32, Sealed, Sha256, Version

__all__ = [
    "Commit",
    "DatasetInfo",
    "DeletionRef",
    "Hint",
    "Kind",
    "Origin",
    "ParityRef",
    "Placement",
    "RootRef",
    "SegmentRef",
    "Tag",
    "TokenizerRef",
    "Totals",
    "oldest_readable",
    "sum_refs",
]

Kind = Literal["tokens", "records"]

Sha256OrNone = Annotated[str, msgspec.Meta(pattern="^([0-9a-f]{64})?$")]


class RootRef(Document, frozen=True, kw_only=True):
    """One of the places that a dataset lies on."""

    id: Hex32
    """Decides, with a key, whether that key lies here; it stays when the place gets another address or a new disk."""

    url: str
    """Where it is, without credentials."""


class Placement(Document, frozen=True, kw_only=True):
    """The places of a dataset that has several, and how many copies of a file there are."""

    roots: tuple[RootRef, ...]
    """The first one decides what is committed."""

    copies: Annotated[int, msgspec.Meta(ge=1)]
    """Of shards, documents and parity files; everything else lies on all roots."""

    generation: Annotated[int, msgspec.Meta(ge=1)] = 1
    """Goes up with each change of the roots: what the highest one says counts."""


class DatasetInfo(Sealed, frozen=True, kw_only=True):
    """`datastore.json`: written when the dataset is created, and again only when its places change."""

    uuid: Hex32
    """Names the dataset for good, wherever it is moved or copied to."""

    created: str
    """UTC, ISO 8601."""

    exclusive: bool
    """Whether the storage keeps put-if-absent; if not, the dataset allows one writer at a time."""

    features: tuple[str, ...] = ()
    """Names of what a reader must know beyond this format version."""

    oldest_version: Version = 1
    """The oldest version whose files are all here: a copy may have brought no older one."""

    placement: Placement | None = None
    """Where it lies, if not only here."""


class SegmentRef(Document, frozen=True, kw_only=True):
    """A segment as its commit names it: the file's digest, and the sums over its shards."""

    digest: Hex32
    """xxh3_128 of the file `_segments/<digest>.arrow`."""

    file_bytes: Count
    shards: Count
    documents: Count
    tokens: Count
    size_bytes: Count
    """Size of its shards and of their documents files."""


class DeletionRef(Document, frozen=True, kw_only=True):
    """A table of deleted documents as its commit names it."""

    digest: Hex32
    """xxh3_128 of the file `deletions/<digest>.arrow`."""

    file_bytes: Count
    shards: Count
    documents: Count
    tokens: Count


class ParityRef(Document, frozen=True, kw_only=True):
    """A table of parity groups as its commit names it."""

    digest: Hex32
    """xxh3_128 of the file `_parity/<digest>.arrow`."""

    file_bytes: Count
    groups: Count
    files: Count
    """Files of shards and documents that its groups protect."""

    size_bytes: Count
    """Size of its parity files."""


class Totals(Document, frozen=True, kw_only=True):
    """Sums over all shards of a version; deleted documents are still in their shards, and counted."""

    shards: Count = 0
    documents: Count = 0
    tokens: Count = 0
    size_bytes: Count = 0
    """Size of the shards and of their documents files."""

    deleted_documents: Count = 0
    deleted_tokens: Count = 0


class TokenizerRef(Document, frozen=True, kw_only=True):
    """The tokenizer that made the tokens; its bytes lie in `tokenizers/<sha256>.json`."""

    sha256: Sha256
    vocab_size: Annotated[int, msgspec.Meta(ge=1)]
    """One more than the largest id it can give."""

    end_of_text: Count
    """The id that ends each document."""


class Origin(Document, frozen=True, kw_only=True):
    """The version of another dataset that a clone was made of."""

    url: str
    """As it was named, without credentials."""

    uuid: Hex32
    version: Version


class Commit(Sealed, frozen=True, kw_only=True):
    """`_log/<version>.json`: one version of the dataset, whole."""

    compact: ClassVar[bool] = True

    version: Version
    parent_sha256: Sha256OrNone
    """sha256 of the previous version's file, so that history cannot be changed unseen; empty in version 1."""

    commit_id: Hex32
    """A random name by which a writer recognizes its own commit after a lost acknowledgement."""

    operation: str
    """`create`, `append`, `overwrite`, ..."""

    time: str
    """UTC, ISO 8601, by the writer's clock."""

    writer: str
    kind: Kind
    segments: tuple[SegmentRef, ...]
    """All shards of this version, in order."""

    totals: Totals
    ingest_id: str = ""
    """The ingest that made the new shards, if one did."""

    config_digest: str = ""
    """xxh3_128 of the settings of that ingest."""

    tokenizer: TokenizerRef | None = None
    record_schema: bytes = b""
    """The Arrow schema of a record dataset, as an encapsulated IPC message."""

    min_version: Version = 1
    """The oldest version that can still be read."""

    features: tuple[str, ...] = ()
    """Names of what a reader of this version must know beyond its format."""

    deletions: tuple[DeletionRef, ...] = ()
    """Which documents of the shards are deleted: the union of these tables."""

    parity: tuple[ParityRef, ...] = ()
    """From what damaged files can be made again; readers need not know. A group may name files that left the version."""

    origin: Origin | None = None
    """What this dataset was cloned from, until it is overwritten."""


class Tag(Sealed, frozen=True, kw_only=True):
    """`refs/tags/<name>.json`: a name for one version."""

    name: str
    version: Version
    commit_sha256: Sha256
    """sha256 of that version's file."""

    time: str


class Hint(Sealed, frozen=True, kw_only=True):
    """`_log/_last`: where to start looking for the newest version."""

    version: Version


def sum_refs(refs: tuple[SegmentRef, ...], deletions: tuple[DeletionRef, ...] = ()) -> Totals:
    """Return the sums over all shards of `refs`, of which `deletions` are deleted."""
    return Totals(
        shards=sum(ref.shards for ref in refs),
        documents=sum(ref.documents for ref in refs),
        tokens=sum(ref.tokens for ref in refs),
        size_bytes=sum(ref.size_bytes for ref in refs),
        deleted_documents=sum(ref.documents for ref in deletions),
        deleted_tokens=sum(ref.tokens for ref in deletions),
    )


def oldest_readable(info: DatasetInfo, newest: Commit) -> int:
    """Return the oldest version whose files are kept: this one and all after it can be opened."""
    return min(newest.version, max(newest.min_version, info.oldest_version))

"""Where everything lies in a dataset: the tree of docs/format.md as code, and the only place that spells it.

Folders that begin with `_` hold what only this package reads. Files that are written once are named by a digest or a uid.
"""

import re

__all__ = [
    "BEHIND_FOLDER",
    "CARD_KEY",
    "CERTIFICATES_FOLDER",
    "DELETIONS",
    "EVOLUTION",
    "HINT_KEY",
    "INFO_KEY",
    "JOURNALS_FOLDER",
    "KINDS",
    "LAYOUT",
    "LEASE_KEY",
    "LOG_FOLDER",
    "PACKED",
    "PARITY_TABLES_FOLDER",
    "PLACEMENT",
    "PROBE_FOLDER",
    "PURGE_PLANS_FOLDER",
    "READABLE_FEATURES",
    "REFERENCES",
    "TAGS_FOLDER",
    "behind_key",
    "certificate_key",
    "commit_key",
    "deletions_key",
    "documents_key",
    "is_data",
    "is_immutable",
    "journal_folder",
    "kind_of_key",
    "parity_key",
    "parity_table_key",
    "plan_key",
    "purge_plan_key",
    "segment_key",
    "sha256_in",
    "shard_key",
    "table_digest_in",
    "tag_key",
    "tokenizer_key",
    "version_of_key",
]

INFO_KEY = "datastore.json"
"""What the dataset is."""

CARD_KEY = "README.md"
"""A card for people; no reader depends on it."""

LOG_FOLDER = "_log"

HINT_KEY = f"{LOG_FOLDER}/_last"
"""A hint at the newest version."""

LEASE_KEY = f"{LOG_FOLDER}/_writer"
"""Who may commit, until when, where there is one writer at a time."""

TAGS_FOLDER = "refs/tags"

CERTIFICATES_FOLDER = "purges"

PURGE_PLANS_FOLDER = f"{CERTIFICATES_FOLDER}/plans"
"""Purges that are not finished."""

JOURNALS_FOLDER = "ingests"

BEHIND_FOLDER = "_behind"
"""Marks of roots that have missed a write, by id."""

PARITY_TABLES_FOLDER = "_parity"

PROBE_FOLDER = "_probe"
"""Where it is tried out whether the storage can exclude a second writer."""

KINDS = {
    "shards": "shards",
    "docs": "documents",
    "_segments": "segments",
    "deletions": "deletions",
    PARITY_TABLES_FOLDER: "parity",
    "parity": "parity",
    "tokenizers": "tokenizers",
    PROBE_FOLDER: "probes",
}
"""The kind of what lies in each folder whose files a version names, or which is left over where none does."""

DELETIONS, EVOLUTION, LAYOUT, PLACEMENT, REFERENCES = "deletions", "evolution", "layout", "placement", "references"
"""Features: of versions with deleted documents, with shards of older schemas, with columns of tokens or batches of records,
and with shards that lie elsewhere, so that their paths are URLs; `placement` is one of datasets on several disks."""

PACKED = "packed"
"""The feature of versions that may have segments which are compressed."""

READABLE_FEATURES: frozenset[str] = frozenset({DELETIONS, EVOLUTION, LAYOUT, PACKED, PLACEMENT, REFERENCES})
"""Features that this package knows; a dataset or a version with any other one is refused, not misread."""

_COMMIT = re.compile(rf"{LOG_FOLDER}/(\d{{20}})\.json")
_TABLE = re.compile(r"(?:_segments|_parity|deletions)/([0-9a-f]{32})\.arrow")
_TOKENIZER = re.compile(r"tokenizers/([0-9a-f]{64})\.json")
_DATA = ("shards/", "docs/", "parity/")
_NAMED = re.compile(
    r"(?:shards/[0-9a-f]{2}/[^/]+\.(?:arrow|parquet)|docs/[0-9a-f]{2}/[^/]+\.parquet|parity/[0-9a-f]{2}/[^/]+\.xor"
    rf"|{PROBE_FOLDER}/.+)|{_TABLE.pattern}|{_TOKENIZER.pattern}"
)
_IMMUTABLE = re.compile(rf"(?:shards|docs|parity|_segments|_parity|deletions|tokenizers|purges)/.*|{_COMMIT.pattern}")


def kind_of_key(key: str) -> str | None:
    """Return the kind of what `key` is the name of, one of `KINDS`; None if nothing that a version names is called so.

    Only what has a kind may ever be removed as something that no version needs.
    """
    return KINDS[key.partition("/")[0]] if _NAMED.fullmatch(key) and ".." not in key else None


def commit_key(version: int) -> str:
    """Return the key of the commit of `version`: twenty digits, so that names sort like numbers."""
    return f"{LOG_FOLDER}/{version:020d}.json"


def version_of_key(key: str) -> int | None:
    """Return the version whose commit lies under `key`, or None if no commit does."""
    found = _COMMIT.fullmatch(key)
    return int(found[1]) if found else None


def tag_key(name: str) -> str:
    """Return the key of the tag `name`."""
    return f"{TAGS_FOLDER}/{name}.json"


def segment_key(digest: str) -> str:
    """Return the key of the segment with that digest."""
    return f"_segments/{digest}.arrow"


def deletions_key(digest: str) -> str:
    """Return the key of the table of deletions with that digest."""
    return f"deletions/{digest}.arrow"


def parity_table_key(digest: str) -> str:
    """Return the key of the table of parity groups with that digest."""
    return f"{PARITY_TABLES_FOLDER}/{digest}.arrow"


def table_digest_in(key: str) -> str | None:
    """Return the digest by which a segment, a table of deletions or one of parity groups is called, or None."""
    found = _TABLE.fullmatch(key)
    return found[1] if found else None


def shard_key(name: str, *, suffix: str = "arrow") -> str:
    """Return the key of the shard `name`, which begins with two hex digits."""
    return f"shards/{name[:2]}/{name}.{suffix}"


def documents_key(name: str) -> str:
    """Return the key of the documents of the token shard `name`."""
    return f"docs/{name[:2]}/{name}.parquet"


def parity_key(name: str) -> str:
    """Return the key of the parity file `name`."""
    return f"parity/{name[:2]}/{name}.xor"


def tokenizer_key(sha256: str) -> str:
    """Return the key of a tokenizer's bytes."""
    return f"tokenizers/{sha256}.json"


def sha256_in(key: str) -> str | None:
    """Return the sha256 by which a tokenizer is called, or None."""
    found = _TOKENIZER.fullmatch(key)
    return found[1] if found else None


def certificate_key(digest: str) -> str:
    """Return the key of the certificate of a purge."""
    return f"{CERTIFICATES_FOLDER}/{digest}.json"


def purge_plan_key(digest: str) -> str:
    """Return the key of the plan of a purge that is not finished."""
    return f"{PURGE_PLANS_FOLDER}/{digest}.json"


def journal_folder(ingest_id: str) -> str:
    """Return the folder of the journal of an ingest."""
    return f"{JOURNALS_FOLDER}/{ingest_id}"


def plan_key(ingest_id: str) -> str:
    """Return the key of the plan of an ingest."""
    return f"{journal_folder(ingest_id)}/plan.json"


def behind_key(root_id: str) -> str:
    """Return the key that says that a root has missed something."""
    return f"{BEHIND_FOLDER}/{root_id}"


def is_data(key: str) -> bool:
    """Return whether `key` lies on some roots only: shards, their documents, parity files."""
    return key.startswith(_DATA)


def is_immutable(key: str) -> bool:
    """Return whether `key` never has other bytes than its first ones, so that any good copy is as good as another."""
    return _IMMUTABLE.fullmatch(key) is not None

"""Where everything lies in a dataset: the tree of docs/format.md as code."""

import re

__all__ = [
    "BEHIND_FOLDER",
    "PARITY_TABLES",
    "behind_key",
    "commit_key",
    "deletions_key",
    "is_data",
    "is_immutable",
    "parity_table_key",
    "segment_key",
    "tag_key",
    "tokenizer_key",
]

PARITY_TABLES = "_parity"


def parity_table_key(digest: str) -> str:
    """Return the key of the table of groups with that digest."""
    return f"{PARITY_TABLES}/{digest}.arrow"


def commit_key(version: int) -> str:
    """Return the key of the commit of `version`: twenty digits, so that names sort like numbers."""
    return f"_log/{version:020d}.json"


def tag_key(name: str) -> str:
    """Return the key of the tag `name`."""
    return f"refs/tags/{name}.json"


def tokenizer_key(sha256: str) -> str:
    """Return the key of a tokenizer's bytes."""
    return f"tokenizers/{sha256}.json"


def deletions_key(digest: str) -> str:
    """Return the key of the table of deletions with that digest."""
    return f"deletions/{digest}.arrow"


def segment_key(digest: str) -> str:
    """Return the key of the segment with that digest."""
    return f"_segments/{digest}.arrow"


BEHIND_FOLDER = "_behind"
"""Marks of roots that have missed a write, by id."""


def behind_key(root_id: str) -> str:
    """Return the key that says that a root has missed something."""
    return f"{BEHIND_FOLDER}/{root_id}"


_DATA = ("shards/", "docs/", "parity/")

_IMMUTABLE = re.compile(r"(?:shards|docs|parity|_segments|_parity|deletions|tokenizers|purges)/.*|_log/\d{20}\.json")


def is_data(key: str) -> bool:
    """Return whether `key` lies on some roots only."""
    return key.startswith(_DATA)


def is_immutable(key: str) -> bool:
    """Return whether `key` never has other bytes than its first ones, so that any good copy is as good as another."""
    return _IMMUTABLE.fullmatch(key) is not None

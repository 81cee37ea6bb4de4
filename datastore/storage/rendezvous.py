"""Where the keys of a dataset on several disks lie, as a pure function of the key and the ids of its roots.

What is data (shards, their documents, parity files) goes to the roots that come first in a rendezvous hash of its key; so no
table says where a file is, and giving a lost root's id to a new disk moves no other file. Everything else is small and
lies on all roots.

Source: D. Thaler, C. Ravishankar, "Using Name-Based Mappings to Increase Hit Rates", 1998.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from datastore.digest import digest_bytes
from datastore.storage.base import Storage

__all__ = ["BEHIND_FOLDER", "Root", "behind_key", "rank_roots"]

BEHIND_FOLDER = "_behind"


@dataclass(frozen=True, slots=True)
class Root:
    """One of the places of a dataset. Its id, not its address, decides what lies there: a disk may be mounted elsewhere."""

    id: str
    storage: Storage


def rank_roots(ids: Sequence[str], key: str) -> list[int]:
    """Return the positions of `ids` in the order in which the data key `key` goes to them."""
    return sorted(range(len(ids)), key=lambda index: digest_bytes(f"{ids[index]}/{key}".encode()), reverse=True)


def behind_key(root_id: str) -> str:
    """Return the key that says that a root has missed something."""
    return f"{BEHIND_FOLDER}/{root_id}"

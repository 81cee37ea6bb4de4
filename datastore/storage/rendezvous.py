"""Which roots a key lies on, as a pure function of the key and the ids of the roots.

What is data, by the rules of whoever places it, goes to the roots that come first in a rendezvous hash of its key; so no
table says where a file is, and giving a lost root's id to a new disk moves no other file. Everything else is small and
lies on all roots.

Source: D. Thaler, C. Ravishankar, "Using Name-Based Mappings to Increase Hit Rates", 1998.
"""

from collections.abc import Sequence

from datastore.digest import digest_bytes

__all__ = ["rank_roots"]


def rank_roots(ids: Sequence[str], key: str) -> list[int]:
    """Return the positions of `ids` in the order in which the data key `key` goes to them."""
    return sorted(range(len(ids)), key=lambda index: digest_bytes(f"{ids[index]}/{key}".encode()), reverse=True)

"""Which roots a key lies on, as a pure function of the key and the ids of the roots.

What is data, by the rules of whoever places it, goes to the roots that come first in a rendezvous hash of its key; so no
table says where a file is, and giving a lost root's id to a new disk moves no other file. Everything else is small and
lies on all roots.

Source: D. Thaler, C. Ravishankar, "Using Name-Based Mappings to Increase Hit Rates", 1998.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from datastore.digest import digest_bytes

__all__ = ["Rules", "rank_roots"]


@dataclass(frozen=True, slots=True)
class Rules:
    """What has to be known of the keys to place them; whoever lays them out knows it."""

    copies: int
    """How many copies there should be of what is data."""

    is_data: Callable[[str], bool]
    """Whether a key lies on some roots only."""

    is_immutable: Callable[[str], bool]
    """Whether a key never has other bytes than its first ones, so that any good copy is as good as another."""

    behind_key: Callable[[str], str]
    """The key that says that the root of this id has missed a write."""

    guard: str = ""
    """A root is there if it holds this key; empty: it is taken to be there."""


def rank_roots(ids: Sequence[str], key: str) -> list[int]:
    """Return the positions of `ids` in the order in which the data key `key` goes to them."""
    return sorted(range(len(ids)), key=lambda index: digest_bytes(f"{ids[index]}/{key}".encode()), reverse=True)

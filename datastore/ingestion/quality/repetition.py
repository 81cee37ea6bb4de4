"""How much a text repeats: elements that were there before, and runs of words.

Runs of words are told apart by 64-bit numbers, so a wrong decision has a chance of some 1 in 10^13 for a document of 1,000 words. The
numbers follow from the words alone, without a random seed: the same text is judged the same in every process.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from datastore.ingestion.quality.text import Ids, Words

__all__ = ["duplicates", "repeated_characters", "runs", "top_characters"]

_FACTOR = np.uint64(0x9E3779B97F4A7C15)
"""2^64 over the golden ratio, odd: spreads small numbers over all bits."""

Runs = npt.NDArray[np.uint64]


def duplicates(parts: Sequence[str]) -> tuple[int, int]:
    """Return how many of `parts` an earlier one equals, and how many characters these have.

    >>> duplicates(["a", "bc", "bc", "bc"])
    (2, 4)
    """
    first = dict.fromkeys(parts)
    if len(first) == len(parts):
        return 0, 0
    return len(parts) - len(first), sum(map(len, parts)) - sum(map(len, first))


def runs(ids: Ids, length: int) -> Runs:
    """Return a number for each run of `length` words; equal runs have the same, others all but surely not."""
    words = ids.astype(np.uint64)
    count = max(0, words.size - length + 1)
    found = np.zeros(count, dtype=np.uint64)
    for place in range(length):
        found = (found + words[place : place + count]) * _FACTOR
        found ^= found >> np.uint64(29)
    return found


def top_characters(words: Words, length: int) -> int:
    """Return the characters of the most frequent run, spaces between its words included, times how often it is there.

    Of several that are as frequent, the one that comes first counts.
    """
    found = runs(words.ids, length)
    if not found.size:
        return 0
    ranked = np.sort(found)
    borders = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1], [True]]))
    counts = np.diff(borders)
    most = int(counts.max())
    at = 0
    if most > 1:
        frequent = ranked[borders[:-1][counts == most]]
        at = int(np.flatnonzero(np.isin(found, frequent) if frequent.size > 1 else found == frequent[0])[0])
    ends = words.ends
    return (int(ends[at + length] - ends[at]) + length - 1) * most


def repeated_characters(words: Words, length: int, *, least: float = 0) -> int:
    """Return the characters of runs that were there before, each counted once: after one, its last word is passed over.

    It may return less than there are where there are no more than `least`.
    """
    found = runs(words.ids, length)
    order = np.argsort(found, kind="stable")
    ranked = found[order]
    again = order[1:][ranked[1:] == ranked[:-1]]
    if not again.size or _covered(words.ends, np.sort(again), length) <= least:
        return 0
    sizes = (words.ends[length:] - words.ends[:-length]).tolist()
    numbers = found.tolist()
    seen: set[int] = set()
    total = at = 0
    while at < len(numbers):
        if numbers[at] in seen:
            total += sizes[at]
            at += length
        else:
            seen.add(numbers[at])
            at += 1
    return total


def _covered(ends: Ids, starts: Ids, length: int) -> int:
    """Return the characters of the words that are in a run from one of `starts`: at least what is repeated."""
    stops = np.minimum(starts + length, np.append(starts[1:], ends.size - 1))
    return int((ends[stops] - ends[starts]).sum())

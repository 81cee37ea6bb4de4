"""Which texts are alike: signatures of their runs of words, and clusters of those whose signatures agree.

Two texts are as alike as the share of their runs of five words that both have (Jaccard). A signature of 128 numbers estimates it, off by
0.035 at 0.8; bands of it find the pairs that are worth a look, and each of these is looked at, so a chance meeting in one band
joins nobody. Texts of fewer words are alike only if they have the same words.

Memory: 30 bytes for each document and one batch of texts. The signatures, 512 bytes for each, lie in a file, one column after
the other, as the search reads them.

Source: A. Broder, "On the resemblance and containment of documents", 1997; `rensa` computes the signatures.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from datastore.errors import DependencyError
from datastore.ingestion.quality.repetition import Runs, runs
from datastore.ingestion.quality.text import Ids

__all__ = ["SIZE", "SignatureFile", "WordHashes", "agreement", "clusters", "rows_of_bands", "signatures"]

SIZE = 128
"""Numbers in a signature."""

_SEED = 1
_WORD = re.compile(r"\w+")
_MOST_WORDS = 2**20
"""So many words are remembered with their hashes."""

_SLACK = 0.1
"""Bands are such that a pair this much below the threshold has an even chance to be looked at."""


class WordHashes(dict[str, int]):
    """The hash of each word that was asked for."""

    def __missing__(self, word: str) -> int:
        if len(self) >= _MOST_WORDS:
            self.clear()
        found = self[word] = xxhash.xxh3_64_intdigest(word.encode("utf-8", "surrogatepass"))
        return found

    def runs(self, text: str, length: int) -> Runs:
        """Return the runs of words in `text`, without regard to case, signs and spaces; of a shorter text all as one."""
        words = _WORD.findall(text.lower())
        hashes = np.fromiter(map(self.__getitem__, words), dtype=np.uint64, count=len(words))
        if not words:
            return np.array([xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))], dtype=np.uint64)
        return runs(hashes.view(np.int64), min(length, len(words)))


def signatures(texts: Sequence[str], *, length: int, hashes: WordHashes) -> npt.NDArray[np.uint32]:
    """Return [len(texts), SIZE] the signatures of `texts`, of runs of `length` words.

    Raises:
        DependencyError: rensa is not installed.
    """
    try:
        from rensa import RMinHash  # noqa: PLC0415 - optional, and not needed for anything else
    except ImportError:
        raise DependencyError(
            "near duplicates need a library", missing="rensa", hint="pip install 'llm-datastore[quality]'"
        ) from None
    if not texts:
        return np.empty((0, SIZE), dtype=np.uint32)
    parts = [hashes.runs(text, length) for text in texts]
    offsets = np.concatenate([[0], np.cumsum([part.size for part in parts])]).astype(np.uint64)
    found: Any = RMinHash.digest_matrix_from_flat_token_hashes(np.concatenate(parts), offsets, SIZE, _SEED)
    return np.array(found.to_rows(), dtype=np.uint32)


class SignatureFile:
    """Signatures in a file, column by column."""

    def __init__(self, path: Path, documents: int) -> None:
        self.columns: npt.NDArray[np.uint32] = np.memmap(
            path, dtype=np.uint32, mode="w+", shape=(SIZE, max(1, documents))
        )

    def put(self, start: int, found: npt.NDArray[np.uint32]) -> None:
        """Store signatures of documents from number `start` on."""
        self.columns[:, start : start + len(found)] = found.T


def agreement(columns: npt.NDArray[np.uint32], one: Ids, other: Ids) -> npt.NDArray[np.float64]:
    """Return the share of each pair's signatures that agrees; reads a column at a time."""
    same = np.zeros(one.size, dtype=np.int64)
    for column in columns:
        same += column[one] == column[other]
    return same / len(columns)


def rows_of_bands(threshold: float) -> int:
    """Return how many numbers of a signature make a band, so that hardly a pair above `threshold` is missed.

    >>> rows_of_bands(0.8)
    7
    """
    rows = 1
    while rows < SIZE // 2 and (1 / (SIZE // (rows + 1))) ** (1 / (rows + 1)) <= threshold - _SLACK:
        rows += 1
    return rows


def clusters(columns: npt.NDArray[np.uint32], *, threshold: float) -> Ids:
    """Return for each document the first one of its cluster: those that are alike, directly or by others between them.

    Of documents that meet in a band, each is compared with the first of them and with the one before.
    """
    rows = rows_of_bands(threshold)
    first = np.arange(columns.shape[1], dtype=np.int64)
    for start in range(0, SIZE - rows + 1, rows):
        one, other = _pairs(columns[start : start + rows])
        apart = first[one] != first[other]
        one, other = one[apart], other[apart]
        alike = agreement(columns, one, other) >= threshold
        _join(first, one[alike], other[alike])
    return first


def _pairs(band: npt.NDArray[np.uint32]) -> tuple[Ids, Ids]:
    """Return the pairs of documents to compare, of those whose numbers in `band` are all the same."""
    keys = np.zeros(band.shape[1], dtype=np.uint64)
    for column in band:
        keys = (keys ^ column) * np.uint64(0x9E3779B97F4A7C15)
        keys ^= keys >> np.uint64(32)
    order = np.argsort(keys, kind="stable")
    ranked = keys[order]
    same = np.flatnonzero(ranked[1:] == ranked[:-1]) + 1
    begins = np.concatenate([[True], ranked[1:] != ranked[:-1]])
    leaders = np.maximum.accumulate(np.where(begins, np.arange(begins.size), 0))
    one = np.concatenate([order[leaders[same]], order[same - 1]])
    return one, np.concatenate([order[same], order[same]])


def _join(first: Ids, one: Ids, other: Ids) -> None:
    """Make the clusters of each pair one, in place."""
    while (apart := first[one] != first[other]).any():
        one, other = one[apart], other[apart]
        np.minimum.at(first, np.maximum(first[one], first[other]), np.minimum(first[one], first[other]))
        while (shorter := first[first]).tobytes() != first.tobytes():
            first[:] = shorter

"""Near duplicates are those that all pairs, compared run by run, say: on the real texts of `filters_expected.jsonl.gz`, edited."""

import gzip
import json
import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from datastore.ingestion.quality.minhash import WordHashes, clusters, signatures

EXPECTED = Path(__file__).parent / "filters_expected.jsonl.gz"

pytest.importorskip("rensa")


def runs(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + 5]) for i in range(max(1, len(words) - 4))}


def edited(text: str, every: int) -> str:
    """Return `text` with a word in so many replaced."""
    parts = re.split(r"(\w+)", text)
    for place in range(1, len(parts), 2 * every):
        parts[place] = "edited"
    return "".join(parts)


def components(size: int, pairs: list[tuple[int, int]]) -> list[int]:
    first = list(range(size))
    for one, other in pairs:
        low, high = sorted((first[one], first[other]))
        first = [low if each == high else each for each in first]
    return first


def test_clusters_lie_between_those_of_stricter_and_of_looser_comparison() -> None:
    originals = [json.loads(line)["text"] for line in gzip.decompress(EXPECTED.read_bytes()).splitlines()][:110]
    texts = [copy for text in originals for copy in (text, edited(text, 400), edited(text, 60), edited(text, 9))]
    found = [runs(text) for text in texts]
    pairs = {
        (one, other): len(found[one] & found[other]) / len(found[one] | found[other])
        for one, other in combinations(range(len(texts)), 2)
    }
    signed = np.ascontiguousarray(signatures(texts, length=5, hashes=WordHashes()).T)
    ours = clusters(signed, threshold=0.8).tolist()
    strict = components(len(texts), [pair for pair, share in pairs.items() if share >= 0.92])
    loose = components(len(texts), [pair for pair, share in pairs.items() if share >= 0.66])
    assert all(ours[each] == ours[strict[each]] for each in range(len(texts))), "what is all but the same is together"
    assert all(loose[each] == loose[ours[each]] for each in range(len(texts))), "what is together has much in common"
    assert len(set(ours)) < 0.7 * len(texts)

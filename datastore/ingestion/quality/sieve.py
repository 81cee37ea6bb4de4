"""The filters at work on the documents of one task: what is left, what was dropped and changed, and samples of what was dropped.

Samples are those whose ids have the smallest hashes, so those of several tasks together are the ones that a single task would have
kept: a fair draw from all that a rule has dropped, the same for any number of workers. There are at most so many for each rule,
and each has the beginning of its text only.
"""

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import orjson
import xxhash

from datastore.ingestion.quality.chain import Chain
from datastore.ingestion.quality.text import Text

__all__ = ["Sample", "Sieve", "decode_samples", "smallest"]

_SHOWN = 200
"""Characters of a sample."""


class Sample(NamedTuple):
    """A document that was dropped."""

    rule: str
    rank: int
    """The hash of its id."""

    id: str
    source: str
    offset: int
    begins: str


class Sieve:
    """Filters the documents of one task. Invariant: all that came in is left or counted in `dropped`."""

    def __init__(self, chain: Chain, *, samples: int) -> None:
        self.dropped: Counter[str] = Counter()
        self.changed: Counter[str] = Counter()
        self._chain = chain
        self._most = samples
        self._samples: list[Sample] = []

    def sift(self, texts: Sequence[Text]) -> list[str | None]:
        """Return what is left of each text; None if it is dropped."""
        return [self._left(text) for text in texts]

    def encode_samples(self) -> bytes:
        """Return the samples as JSON lines; empty if there are none."""
        found = smallest(self._samples, self._most)
        return b"".join(orjson.dumps(sample._asdict(), option=orjson.OPT_APPEND_NEWLINE) for sample in found)

    def drop(self, text: Text, rule: str) -> None:
        """Count `text`, which was left in, as dropped by `rule`."""
        self.dropped[rule] += 1
        if self._most:
            self._keep(text, rule)

    def _left(self, text: Text) -> str | None:
        judged = self._chain.judge(text)
        if not judged.dropped:
            self.changed.update(judged.changes)
            return judged.text
        self.drop(text, judged.dropped)
        return None

    def _keep(self, text: Text, rule: str) -> None:
        about = text.about
        rank = xxhash.xxh3_64_intdigest(about["id"].encode())
        self._samples.append(Sample(rule, rank, about["id"], about["source"], about["offset"], text.text[:_SHOWN]))
        if len(self._samples) >= 64 * self._most:
            self._samples = smallest(self._samples, self._most)


def smallest(samples: Iterable[Sample], most: int) -> list[Sample]:
    """Return of each rule the `most` samples with the smallest hashes, in order."""
    by_rule: dict[str, list[Sample]] = {}
    for sample in samples:
        by_rule.setdefault(sample.rule, []).append(sample)
    return [sample for rule in sorted(by_rule) for sample in heapq.nsmallest(most, by_rule[rule])]


def decode_samples(raw: bytes) -> list[Sample]:
    """Return the samples that `encode_samples` wrote."""
    return [Sample(**orjson.loads(line)) for line in raw.splitlines()]

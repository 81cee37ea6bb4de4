"""Documents that hold a piece of an evaluation: found by runs of 13 token ids that both have.

The runs of the evaluation files are kept as 64-bit numbers, sorted, with the file that each is of; a table of bits in front of them
answers most questions with one look. A chance hit has a probability of some 1 in 10^12 for each token of the data, with a million runs.
Runs of ids are compared, so a text is found that is tokenized alike: as a whole document or after a space, and anywhere else
but for the tokens at its edges. A text of an evaluation that is shorter than a run cannot be found, and is counted.

Source: T. Brown et al., "Language Models are Few-Shot Learners", 2020, appendix C, for the 13-grams (theirs are of words).
"""

from collections.abc import Iterable, Sequence
from typing import Annotated

import msgspec
import numpy as np
import numpy.typing as npt

from datastore.digest import digest_hex
from datastore.document import SettingsDocument
from datastore.errors import ConfigError
from datastore.ingestion.quality.repetition import Runs, runs

__all__ = ["RULE", "Contamination", "Decontaminate"]

RULE = "decontaminate"


class Decontaminate(SettingsDocument, frozen=True, kw_only=True):
    """Which evaluations are kept out of the data."""

    files: tuple[str, ...] = ()
    """Paths or URLs of their texts, read as sources are: JSON lines, a table, a text. Documents that share a run of tokens go."""

    text_key: Annotated[str, msgspec.Meta(min_length=1)] = "text"
    """The key of the text in these files."""

    tokens: Annotated[int, msgspec.Meta(ge=4, le=1024)] = 13
    """How long a run is."""


class Contamination:
    """The runs of tokens that evaluations have."""

    def __init__(self, found: Runs, owners: npt.NDArray[np.uint16], *, names: Sequence[str], length: int) -> None:
        """Take sorted runs, and for each the number of its file in `names`."""
        self.found = found
        self.owners = owners
        self.names = tuple(names)
        self.length = length
        bits = max(10, int(found.size * 16).bit_length())
        self._shift = np.uint64(64 - bits)
        self._table = np.zeros(2**bits, dtype=np.bool_)
        self._table[found >> self._shift] = True

    @classmethod
    def of(cls, texts: Iterable[tuple[str, npt.NDArray[np.uint32]]], *, length: int) -> "Contamination":
        """Return the runs of `texts`: the name of a file and the ids of a text each.

        Raises:
            ConfigError: no text is as long as a run.
        """
        names: dict[str, int] = {}
        parts: list[Runs] = []
        owners: list[npt.NDArray[np.uint16]] = []
        for name, ids in texts:
            own = runs(ids.astype(np.int64), length)
            owners.append(np.full(own.size, names.setdefault(name, len(names)), dtype=np.uint16))
            parts.append(own)
        every = np.concatenate(parts) if parts else np.empty(0, dtype=np.uint64)
        if not every.size:
            raise ConfigError(
                "no text of the evaluations is as long as a run of tokens",
                texts=len(parts),
                tokens=length,
                hint="Name files with longer texts, or lower `decontaminate.tokens`.",
            )
        found, first = np.unique(every, return_index=True)
        return cls(found, np.concatenate(owners)[first], names=tuple(names), length=length)

    @property
    def digest(self) -> str:
        """The digest of all that decides."""
        return digest_hex(self.encode())

    def encode(self) -> bytes:
        """Return it as bytes."""
        head = msgspec.json.encode([self.length, list(self.names), int(self.found.size)]) + b"\n"
        return head + self.found.astype("<u8").tobytes() + self.owners.astype("<u2").tobytes()

    @classmethod
    def decode(cls, raw: bytes) -> "Contamination":
        """Return what `encode` wrote; `raw` was checked against its digest."""
        head, _, rest = raw.partition(b"\n")
        length, names, count = msgspec.json.decode(head, type=tuple[int, tuple[str, ...], int])
        found = np.frombuffer(rest, dtype="<u8", count=count)
        owners = np.frombuffer(rest, dtype="<u2", offset=8 * count)
        return cls(found.astype(np.uint64), owners.astype(np.uint16), names=names, length=length)

    def rules(self, values: npt.NDArray[np.generic], counts: npt.NDArray[np.int64]) -> dict[int, str]:
        """Return which documents share a run with an evaluation, and the rule that says with which.

        `values` are their ids end to end, each with its end-of-text id: a run that crosses from one to the next has that
        id in it, which no evaluation has.
        """
        own = runs(values.astype(np.int64), self.length)
        maybe = np.flatnonzero(self._table[own >> self._shift])
        places = np.searchsorted(self.found, own[maybe])
        sure = self.found[np.minimum(places, self.found.size - 1)] == own[maybe]
        holders = np.searchsorted(np.cumsum(counts), maybe[sure], side="right")
        documents, first = np.unique(holders, return_index=True)
        files = self.owners[places[sure][first]]
        return {
            int(document): f"{RULE}: {self.names[file]}"
            for document, file in zip(documents, files.tolist(), strict=True)
        }

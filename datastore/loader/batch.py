"""One rank's part of a global batch, and what it can say about itself."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import xxhash

from datastore.errors import ConfigError
from datastore.loader.gathering.gather import AnyArray, TokenArray
from datastore.loader.gathering.packed import document_starts, has_deleted_piece, sequences_of
from datastore.loader.mixture.request import Data
from datastore.loader.order.lanes import I64
from datastore.loader.order.mix import mix64
from datastore.loader.order.order import NO_SAMPLE
from datastore.loader.order.packs import PackGrid
from datastore.loader.place.sources import source_numbers
from datastore.loader.settings import LOSS_MASK
from datastore.loader.stream import SampleStream
from datastore.loader.trace import DocumentSpan, origins_of

__all__ = ["Batch", "fingerprint_of"]


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Samples at consecutive positions of the order, as far as they fall to one rank. Arrays are in row order."""

    tokens: TokenArray
    """[B, seq_len + 1] uint16 or uint32: inputs are `tokens[:, :-1]`, targets `tokens[:, 1:]`."""

    positions: I64
    """[B] place of each row in the endless order; -1 in rows that only fill up the last batch of a finite pass."""

    samples: I64
    """[B] number of the sample in the dataset; -1 likewise."""

    cursor: int
    """First position of the global batch: how many samples all ranks had been given before it."""

    stream: SampleStream = field(repr=False)
    """What it was read from."""

    columns: Mapping[str, AnyArray]
    """What the tokens bring along, [B, seq_len + 1] or [B, seq_len + 1, width] each: 0 where a document is deleted, and
    in rows that hold no sample."""

    @property
    def dataset(self) -> Data:
        """The dataset, or the mixture."""
        return self.stream.data

    @property
    def sources(self) -> I64:
        """[B] which source of the mixture each row is of, a number in `Mixture.names`; 0 of a dataset, -1 in rows that fill up."""
        return source_numbers(self.stream.sources, self.samples)

    @property
    def document_starts(self) -> I64:
        """[D, 2] the row and the place in it where each document of packed rows starts, in order; padding counts as one.

        Raises:
            ConfigError: the rows are not packed: where documents start follows from the tokens.
        """
        return document_starts(self._packs, self.samples)

    @property
    def has_deleted(self) -> bool:
        """Whether tokens of deleted documents are in it, and read as end-of-text."""
        gaps, samples = self.stream.blanks, self.samples[self.valid]
        if gaps is None:
            return False
        if isinstance(self.stream.grid, PackGrid):
            return has_deleted_piece(self.stream.grid, samples, gaps=gaps)
        begin = samples * self.stream.grid.seq_len
        first, last = gaps.touched(begin, begin + self.stream.grid.seq_len + 1)
        return bool((last > first).any())

    def sequences(self) -> list[tuple[TokenArray, AnyArray]]:
        """Return for each valid row of `packing="buckets"` its documents [k, m], padded with zeros to the longest, and their loss mask.

        Views of `tokens` and of the mask: k x m is at most seq_len + 1.

        Raises:
            ConfigError: the rows are packed otherwise, or not at all.
        """
        found = []
        for row in np.flatnonzero(self.valid).tolist():
            count, width = sequences_of(self._packs, int(self.samples[row]))
            parts = (
                values[row, : count * width].reshape(count, width) for values in (self.tokens, self.columns[LOSS_MASK])
            )
            found.append(tuple(parts))
        return found  # type: ignore[return-value]

    @property
    def _packs(self) -> PackGrid:
        if not isinstance(self.stream.grid, PackGrid):
            raise ConfigError(
                "only packed rows say where documents start",
                hint='Read with LoaderSettings(packing="best_fit"), or look for end-of-text tokens.',
            )
        return self.stream.grid

    @property
    def loss_mask(self) -> npt.NDArray[np.bool_] | None:
        """[B, seq_len + 1] whether each token is to be learned; None: all are. `loss_mask[:, 1:]` is that of the targets."""
        found = self.columns.get(LOSS_MASK)
        return None if found is None else np.not_equal(found, 0)

    @property
    def valid(self) -> npt.NDArray[np.bool_]:
        """[B] whether a row holds a sample."""
        return np.not_equal(self.positions, NO_SAMPLE)

    def fingerprint(self) -> int:
        """Return 64 bits that name which samples are here, at which positions, with which tokens; columns are not in it.

        Fingerprints of the parts of a global batch add up (mod 2^64) to that of the whole, for any number of ranks.
        """
        return fingerprint_of(self.tokens, positions=self.positions, samples=self.samples)

    def documents(self) -> list[DocumentSpan]:
        """Return the stretches of documents that the valid rows are made of, row by row. Reads whole shards."""
        return [span for origin in origins_of(self.stream, self.samples[self.valid]) for span in origin.spans]


def fingerprint_of(tokens: TokenArray, *, positions: I64, samples: I64) -> int:
    """Return the sum, mod 2^64, of a hash of (position, sample, tokens) of each row that holds a sample."""
    rows = np.flatnonzero(positions != NO_SAMPLE)
    contents = np.array([xxhash.xxh3_64_intdigest(tokens[row]) for row in rows.tolist()], np.uint64)
    places = mix64(mix64(positions[rows].astype(np.uint64)) ^ samples[rows].astype(np.uint64))
    return int(mix64(places ^ contents).sum(dtype=np.uint64))

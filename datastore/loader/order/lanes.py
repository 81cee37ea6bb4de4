"""Lanes: many readers side by side on one line of samples, visited so that every batch draws from all of it.

A lane is a contiguous range of the line. Position u visits lane `visit[u % L]` at its in-lane index `u // L`, so a
batch touches many places, and each place is left only after a whole window of samples: that is what makes small range
reads pay. Lanes are visited in bit-reversed order: any run of positions is spread evenly over the line, and the slice
of a rank, sorted by lane, always falls on the same lanes.

A window is a run of `window` samples of a lane that are shuffled among themselves. Its borders differ from lane to
lane, or all lanes would need their next block at the same step.

Complexity: O(lanes) memory, O(1) a sample; nothing here knows the samples themselves.

Source: J. G. van der Corput, "Verteilungsfunktionen", 1935 (the bit-reversal sequence).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from datastore.loader.order.mix import U64, Purpose, derive_key, mix64, mix64_inplace

__all__ = ["I64", "Cells", "LaneGrid", "Windows", "lane_grid", "van_der_corput"]

I64 = npt.NDArray[np.int64]

_KEPT_SLOTS = 2**17
"""Slots of windows kept at least: 256 KiB, so that a few short lanes are planned as fast as many long ones."""

_BUILD_NUMBERS = 2**15
"""Numbers hashed at a time when windows are built: 256 KiB, which stays in a core's cache."""


def van_der_corput(lanes: int) -> npt.NDArray[np.uint16]:
    """Return the numbers below `lanes` (at most 65,536) in bit-reversed order: 0, 4, 2, 6, 1, 5, 3, 7 for eight."""
    bits = max(1, (lanes - 1).bit_length())
    numbers = np.arange(2**bits, dtype=np.uint32)
    reverse = np.zeros_like(numbers)
    for bit in range(bits):
        reverse |= ((numbers >> np.uint32(bit)) & np.uint32(1)) << np.uint32(bits - 1 - bit)
    return reverse[reverse < lanes].astype(np.uint16)


@dataclass(frozen=True, slots=True)
class Cells:
    """Where positions of one epoch fall: per position its window, and its place in the order of that window."""

    lane: I64
    window: I64
    rank: I64
    """How many samples of the window come before it."""


@dataclass(frozen=True, slots=True)
class LaneGrid:
    """How `samples` places on the line are cut into lanes and windows, for one seed, in every epoch alike."""

    samples: int
    window: int
    visit: npt.NDArray[np.uint16]
    """[L] the lane that each position of a row visits."""

    start: I64
    """[L] first place of each lane on the line."""

    length: I64
    """[L] samples in each lane: all equal, up to one. Those with one more are the first that `visit` names, so the
    last, shorter row of positions is met exactly."""

    offset: I64
    """[L] how far the first window of a lane is cut short, below `window`."""

    @property
    def lanes(self) -> int:
        """L, the number of lanes."""
        return len(self.visit)

    def lane_of(self, positions: I64) -> npt.NDArray[np.uint16]:
        """Return the lane that each position (below `samples`) visits."""
        return self.visit[positions % self.lanes]

    def cells(self, positions: I64) -> Cells:
        """Return the cell of each position (below `samples`)."""
        index, column = np.divmod(positions, self.lanes)
        lane = self.visit[column].astype(np.int64)
        window, rank = np.divmod(index + self.offset[lane], self.window)
        # The first window of a lane has lost its first `offset` places, so the counting starts after them.
        rank = np.where(window == 0, index, rank)
        return Cells(lane, window, rank)

    def place(self, lane: I64, window: I64, slot: I64) -> I64:
        """Return the place on the line of each `slot`, counted from where its window starts or would start."""
        return self.start[lane] + window * self.window - self.offset[lane] + slot


def lane_grid(*, samples: int, lanes: int, window: int, seed: int) -> LaneGrid:
    """Return the grid for `samples` places; `lanes` may exceed them."""
    visit = van_der_corput(lanes)
    each, rest = divmod(samples, lanes)
    length = np.full(lanes, each, np.int64)
    length[visit[:rest]] += 1
    numbers = np.arange(lanes, dtype=np.uint64)
    offset = (mix64(np.uint64(derive_key(seed, Purpose.STAGGER)) ^ numbers) % np.uint64(window)).astype(np.int64)
    return LaneGrid(samples, window, visit, np.cumsum(length) - length, length, offset)


class Windows:
    """The shuffles of the windows in use: two or more that follow each other for each lane, made when first needed.

    A memo of a pure function: dropping it changes nothing but the time. Not thread-safe. Memory: 2 bytes for each
    sample of the windows in use, 4 MiB for 4,096 lanes of 256.
    """

    def __init__(self, grid: LaneGrid, *, seed: int) -> None:
        self._grid = grid
        self._seed = seed
        self._bits = np.uint64((1 << max(1, (grid.window - 1).bit_length())) - 1)
        # A power of two, so that it goes round by a mask.
        self._ring = max(2, 1 << (_KEPT_SLOTS // (grid.lanes * grid.window)).bit_length())
        self._made = np.full(self._ring * grid.lanes, -1, np.int64)
        self._epoch = -1
        # Untouched memory costs nothing: a rank of many fills only the rows of its own lanes.
        self._slots = np.empty((self._ring * grid.lanes, grid.window), np.uint16)

    @property
    def positions_at_once(self) -> int:
        """How many positions that follow each other, from a multiple of this on, `slots` can take at once."""
        return (self._ring - 1) * self._grid.window * self._grid.lanes

    def slots(self, cells: Cells, *, epoch: int) -> I64:
        """Return for each cell the place in its window that the shuffle puts there.

        Together they lie within `positions_at_once`.
        """
        if epoch != self._epoch:
            self._made.fill(-1)
            self._epoch = epoch
        row = self._ring * cells.lane + (cells.window & (self._ring - 1))
        stale = self._made[row] != cells.window
        if stale.any():
            rows, first = np.unique(row[stale], return_index=True)
            window = cells.window[stale][first]
            each = max(1, _BUILD_NUMBERS // self._grid.window)
            for at in range(0, len(rows), each):
                part = slice(at, at + each)
                self._slots[rows[part]] = self._shuffle(rows[part] // self._ring, window[part])
            self._made[rows] = window
            assert (self._made[row] == cells.window).all(), "cells lie further apart than positions_at_once"
        return self._slots[row, cells.rank].astype(np.int64)

    def _shuffle(self, lane: I64, window: I64) -> npt.NDArray[np.uint16]:
        """Return [n, window]: the places of each window, sorted by hash; places outside of the lane come last."""
        grid = self._grid
        key = mix64(np.uint64(derive_key(self._seed, Purpose.WINDOW, self._epoch)) ^ lane.astype(np.uint64))
        key = mix64(key ^ window.astype(np.uint64))
        place = np.arange(grid.window, dtype=np.uint64)
        order: U64 = key[:, None] ^ place
        mix64_inplace(order)
        # The hash's low bits give way to the place: sorting numbers takes 2 ns each, argsort 15 (NumPy 2.4, AVX-512).
        order &= ~self._bits
        order |= place
        first = window * grid.window - grid.offset[lane]
        for row in np.flatnonzero((first < 0) | (first + grid.window > grid.length[lane])):
            index = first[row] + np.arange(grid.window)
            order[row, (index < 0) | (index >= grid.length[lane[row]])] = np.uint64(2**64 - 1)
        order.sort(axis=1)
        return (order & self._bits).astype(np.uint16)

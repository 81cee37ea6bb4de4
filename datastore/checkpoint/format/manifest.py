"""The documents that a run stores beside its tensors: four kinds, sealed, and the keys they live under.

    run.json                                   RunInfo, written once
    parts/<step>-<save id>-<rank>.safetensors  the tensors that one rank wrote in one save
    parts/<step>-<save id>-<rank>.json         PartInfo: where each piece of each tensor lies, with its digests
    parts/<step>-<save id>-<rank>.failed       a note that this rank could not do its part; text for people
    parts/<step>-<save id>.layout              StepLayout, where there are many ranks: which of their documents has what; see `layout.py`
    steps/<step>.json                          StepCommit, created put-if-absent: a step exists when this file does
    refs/latest.json                           LatestHint, never trusted
    votes/<session>/<number>-<rank>            how ranks agree on what to restore; see `ranks.py`

Everything but the hint is written once and never changed. Steps and ranks are padded with zeros, so that names sort
as numbers do. A part may hold nothing new: a `PartInfo` then points into parts of earlier saves only.

A piece of a tensor is hashed in chunks, so that one bad block is named and the rest is not.
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from typing_extensions import Buffer

from datastore.digest import digest_hex
from datastore.document import Count, Document, Positive, Sealed
from datastore.errors import CorruptError

__all__ = [
    "CHUNK_BYTES",
    "DIGEST_HEX",
    "LATEST_KEY",
    "PARTS",
    "RUN_KEY",
    "STEPS",
    "VOTES",
    "Chunk",
    "Entry",
    "LatestHint",
    "PartInfo",
    "PartRef",
    "RunInfo",
    "StepCommit",
    "StepRef",
    "chunks_of",
    "failure_key",
    "info_key",
    "is_part_key",
    "layout_key",
    "part_key",
    "plain_item",
    "runs_of",
    "step_key",
    "step_of_key",
]

CHUNK_BYTES = 4 * 2**20
"""A piece of a tensor is hashed in chunks of this size (the last may be shorter): the unit of verification."""

DIGEST_HEX = 32
"""Hex digits of one chunk's xxh3_128."""

RUN_KEY = "run.json"

LATEST_KEY = "refs/latest.json"

STEPS = "steps"

PARTS = "parts"

VOTES = "votes"

_STEP = re.compile(r"steps/([0-9]{10,18})\.json")

_PART = re.compile(r"parts/([0-9]{10,18})-[0-9a-f]{16}(?:-[0-9]{5,18}\.(safetensors|json|failed)|\.layout)")

Shape = tuple[Count, ...]


class RunInfo(Sealed, frozen=True, kw_only=True):
    """What never changes in a run. If this file is lost, it is written again from the newest step."""

    run_id: str
    created: str
    exclusive: bool
    """Whether the storage refuses to overwrite; if not, the run is safe with a single writer only."""

    writer: str


# Not watched by the garbage collector, as it is in no circle: 512,000 are read in 0.8 s of CPU where it takes 2.0
# (tools/bench/checkpoint-plan --ranks 256, 2026-11-29).
class Entry(Document, frozen=True, kw_only=True, gc=False):
    """One piece of one tensor: a box of the whole (`offsets`, `shape`) as row-major bytes of one part file."""

    tensor: str
    dtype: str
    global_shape: Shape
    shape: Shape
    offsets: Shape
    part: str
    start: Count
    stop: Count
    digests: str
    """xxh3_128 of each chunk of the bytes [start, stop), as hex, one after the other."""

    @property
    def place(self) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
        """Which piece this is, wherever it is stored."""
        return self.tensor, self.offsets, self.shape


class PartInfo(Sealed, frozen=True, kw_only=True):
    """What one rank contributes to one step."""

    run_id: str
    step: Count
    save_id: str
    rank: Count
    world: Positive
    part: str
    """Key of the part file; "" if every piece is as it was in an earlier save."""

    size_bytes: Count
    data_start: Count
    header_digest: str
    """xxh3_128 of the first `data_start` bytes of the part, the safetensors header."""

    chunk_bytes: Positive
    entries: tuple[Entry, ...]
    items: dict[str, str]
    """Digest of each shared item's values and tensor shapes: ranks that disagree are found before the commit."""

    own_items: dict[str, Any]
    """Values of the items that each rank has its own of (`PerRank`)."""


class StepRef(Document, frozen=True, kw_only=True):
    """Names one save of one step."""

    step: Count
    save_id: str


class PartRef(Document, frozen=True, kw_only=True):
    """One rank's contribution, named by the commit with the digest of its `PartInfo`."""

    rank: Count
    info: str
    info_digest: str
    part: str
    size_bytes: Count


class StepCommit(Sealed, frozen=True, kw_only=True):
    """One restorable step. Once this file exists every part it names has been verified to be there."""

    run_id: str
    step: Count
    save_id: str
    session: str
    parent: StepRef | None
    """The step this one was trained from; None for the first of a run."""

    time: str
    writer: str
    world: Positive
    parts: tuple[PartRef, ...]
    uses: tuple[str, ...]
    """Part files of earlier saves that entries point into."""

    items: dict[str, Any]
    """The values of each item, tensors replaced by their dtype and shape; see `datastore.checkpoint.format.tree`."""

    metrics: dict[str, Any]

    @property
    def ref(self) -> StepRef:
        """The name of this save."""
        return StepRef(step=self.step, save_id=self.save_id)


class LatestHint(Sealed, frozen=True, kw_only=True):
    """For people and dashboards; `restore` lists the steps instead."""

    step: Count
    save_id: str


def step_key(step: int) -> str:
    """Return where the commit of `step` is stored."""
    return f"{STEPS}/{step:010d}.json"


def part_key(ref: StepRef, rank: int) -> str:
    """Return where `rank` stores its tensors for the save `ref`."""
    return f"{PARTS}/{ref.step:010d}-{ref.save_id}-{rank:05d}.safetensors"


def info_key(ref: StepRef, rank: int) -> str:
    """Return where `rank` stores its `PartInfo` for the save `ref`."""
    return f"{PARTS}/{ref.step:010d}-{ref.save_id}-{rank:05d}.json"


def layout_key(ref: StepRef) -> str:
    """Return where rank 0 stores which document of the save `ref` has what."""
    return f"{PARTS}/{ref.step:010d}-{ref.save_id}.layout"


def failure_key(ref: StepRef, rank: int) -> str:
    """Return where `rank` leaves a note if it cannot do its part of the save `ref`."""
    return f"{PARTS}/{ref.step:010d}-{ref.save_id}-{rank:05d}.failed"


def plain_item(name: str) -> str:
    """Return the name of an item without the rank that has it for its own."""
    return name.partition("@")[0]


def step_of_key(key: str) -> int | None:
    """Return the step that a step file or a part belongs to, or None if `key` is neither."""
    found = _STEP.fullmatch(key) or _PART.fullmatch(key)
    return int(found[1]) if found else None


def is_part_key(key: str, suffix: str) -> bool:
    """Return whether `key` is the name of a file in `parts/` with this suffix."""
    found = _PART.fullmatch(key)
    return found is not None and found[2] == suffix


@dataclass(frozen=True, slots=True, order=True)
class Chunk:
    """A byte range of a part with its digest; ordered as they lie on disk. Equal, whichever of tied tensors it is of."""

    part: str
    start: int
    stop: int
    digest: str
    tensor: str = field(compare=False)

    @property
    def size_bytes(self) -> int:
        """Its length."""
        return self.stop - self.start

    def check(self, data: Buffer) -> None:
        """Raise `CorruptError` unless `data` are the bytes that were written."""
        self.compare(digest_hex(data))

    def compare(self, digest: str) -> None:
        """Raise `CorruptError` unless `digest` is that of the bytes that were written."""
        if digest != self.digest:
            raise CorruptError(
                "a chunk of a checkpoint does not match its digest",
                part=self.part,
                tensor=self.tensor,
                start=self.start,
                stop=self.stop,
                hint="Restore this part from a copy, or use an earlier step.",
            )


def chunks_of(entry: Entry, chunk_bytes: int, *, first: int = 0, last: int | None = None) -> Iterator[Chunk]:
    """Yield the chunks `first` to `last` (all, if None) of a piece."""
    count = -(-(entry.stop - entry.start) // chunk_bytes)
    for i in range(first, count if last is None else last):
        start = entry.start + i * chunk_bytes
        stop = min(start + chunk_bytes, entry.stop)
        yield Chunk(entry.part, start, stop, entry.digests[i * DIGEST_HEX : (i + 1) * DIGEST_HEX], entry.tensor)


def runs_of(chunks: Iterable[Chunk], largest_bytes: int) -> list[list[Chunk]]:
    """Return neighbouring ones of `chunks` (sorted) together, up to `largest_bytes` or a single chunk."""
    runs: list[list[Chunk]] = []
    for chunk in chunks:
        run = runs[-1] if runs else []
        follows = run and (run[-1].part, run[-1].stop) == (chunk.part, chunk.start)
        if follows and chunk.stop - run[0].start <= largest_bytes:
            run.append(chunk)
        else:
            runs.append([chunk])
    return runs

"""The record of what was consumed: one line per step, in segments that name their predecessor.

    {"step":1,"cursor":0,"samples":32,"fingerprint":"93a1..."}

`cursor` is the position of the step's first sample, `samples` how many follow, `fingerprint` a sum over all ranks that
depends on which samples and which tokens they were, not on who read them or in which order. A segment is written just before
the checkpoint that names it, and a checkpoint of a killed session is simply not named by anyone: the surviving chain is
exactly the history of the restored weights, whatever happened in between.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import msgspec

from datastore.digest import check_digest, digest_hex
from datastore.document import Count, Document, decode
from datastore.errors import CorruptError
from datastore.storage.base import Storage

__all__ = ["ConsumptionRecord", "SegmentLink", "StepEntry", "read_segments", "record_bytes"]


class StepEntry(Document, frozen=True, kw_only=True, omit_defaults=True):
    """What one step consumed."""

    step: Annotated[int, msgspec.Meta(gt=0)]
    """1 for the first."""

    cursor: Count
    samples: Count
    fingerprint: Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{16}$")]
    fault: Literal["", "skip", "rewind"] = ""
    """Not empty: the step consumed its samples and moved nothing, as its gradient was bad."""

    rewound_to: Annotated[int, msgspec.Meta(ge=0)] | None = None
    """Of a rewind: the step whose weights were brought back; those of all steps between are gone."""


class SegmentLink(Document, frozen=True, kw_only=True):
    """Names a segment; both empty: there is none."""

    key: str = ""
    digest: str = ""


class _Head(Document, frozen=True, kw_only=True):
    """The first line of a segment."""

    previous: SegmentLink


class ConsumptionRecord:
    """The record of a run while it grows. `last` and the lines not yet written are the same on every rank."""

    def __init__(self) -> None:
        self.last = SegmentLink()
        self._lines: list[StepEntry] = []

    def add(self, entry: StepEntry) -> None:
        """Append the entry of the step that follows the last one."""
        self._lines.append(entry)

    def close_segment(self, session: str) -> tuple[str, bytes] | None:
        """Return the key and the bytes of the segment to write now, and make it `last`; None if no step was added."""
        if not self._lines:
            return None
        first, last = self._lines[0].step, self._lines[-1].step
        body = msgspec.json.encode(_Head(previous=self.last)) + b"\n" + record_bytes(self._lines)
        key = f"consumed/{first:010d}-{last:010d}-{session}.jsonl"
        self.last = SegmentLink(key=key, digest=digest_hex(body))
        self._lines = []
        return key, body

    def state_dict(self) -> dict[str, Any]:
        """Return the link to the last segment."""
        return {"key": self.last.key, "digest": self.last.digest}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on behind the segment that `state` names."""
        self.last = SegmentLink(key=str(state["key"]), digest=str(state["digest"]))
        self._lines = []


def record_bytes(entries: Sequence[StepEntry]) -> bytes:
    """Return the lines of `entries`: the record itself, without segments and sessions."""
    return b"".join(msgspec.json.encode(entry) + b"\n" for entry in entries)


def read_segments(storage: Storage, last: SegmentLink) -> list[tuple[str, list[StepEntry]]]:
    """Return the segments that lead to `last`, oldest first, each with its key and its entries.

    Raises:
        MissingError: a segment is gone.
        CorruptError: a segment is damaged, or steps do not follow each other.
    """
    found = []
    while last.key:
        raw = storage.get(last.key)
        check_digest(raw, last.digest, where=last.key)
        head, *lines = raw.splitlines()
        found.append((last.key, [decode(StepEntry, line, where=last.key) for line in lines]))
        last = decode(_Head, head, where=last.key).previous
    found.reverse()
    step = 0
    for key, entries in found:
        for entry in entries:
            step += 1
            if entry.step != step:
                raise CorruptError("steps do not follow each other", where=key, expected=step, found=entry.step)
    return found

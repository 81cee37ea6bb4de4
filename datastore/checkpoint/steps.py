"""The steps of a run as they stand in storage: which there are, and what each is made of.

A step exists when its commit file does; nothing else is trusted. Every document that a commit names is compared with
the digest in the commit, so a part from another save, or from another run, is found. What the disk cannot give back is
damaged like what it gives back wrongly; a network that is down is not, as no other step would help.
"""

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import dataclass
from logging import getLogger
from types import TracebackType
from typing import Annotated, Self

import msgspec

from datastore.checkpoint.codec import Codec, with_codec
from datastore.checkpoint.format.checks import check_commit, check_info, check_parts
from datastore.checkpoint.format.layout import INDEXED_RANKS, StepLayout, check_layout
from datastore.checkpoint.format.manifest import (
    STEPS,
    PartInfo,
    PartRef,
    StepCommit,
    layout_key,
    step_key,
    step_of_key,
)
from datastore.digest import check_digest
from datastore.document import Count, Positive, SettingsDocument, unseal
from datastore.errors import CorruptError, DatastoreError, FormatError, MissingError, StorageError
from datastore.storage.base import Storage
from datastore.storage.errors import is_damage
from datastore.threads import each

__all__ = [
    "CheckpointerSettings",
    "Closing",
    "Damaged",
    "StepLog",
    "WholeStep",
    "extents_of",
    "reading",
    "steps_of",
]

_LOGGER = getLogger(__name__)

_THREADS = 16
"""How many parts' documents are read at once."""


@dataclass(frozen=True, slots=True)
class Damaged:
    """A step that was passed over, and why."""

    step: int
    reason: str

    def __str__(self) -> str:
        """Return it as a sentence."""
        return f"the checkpoint of step {self.step} is damaged: {self.reason}"


@dataclass(frozen=True, slots=True)
class WholeStep:
    """A commit with what its parts say: all that is known of a step short of its tensors, or what some ranks know of it."""

    commit: StepCommit
    parts: tuple[PartInfo, ...]


class StepLog:
    """Reads the steps of the run in `storage`."""

    def __init__(self, storage: Storage) -> None:
        self._storage = with_codec(storage)
        self.url = storage.url

    def steps(self) -> list[int]:
        """Return the committed steps, in rising order, damaged ones included."""
        found = (step_of_key(stat.key) for stat in self._storage.list(STEPS))
        return sorted(step for step in found if step is not None)

    def newest(self) -> int | None:
        """Return the newest committed step, or None if there is none."""
        return max(self.steps(), default=None)

    def read(self, step: int) -> StepCommit:
        """Return the commit of `step`.

        Raises:
            MissingError: there is no such step.
            CorruptError: its file does not match its digest, or belongs to another step.
            FormatError: it was written by a newer version of this package.
        """
        key = step_key(step)
        try:
            with reading(key):
                raw = self._storage.get(key)
        except MissingError:
            raise MissingError("no such step", step=step, url=self.url, hint=f"There are: {self._shown()}.") from None
        commit = unseal(StepCommit, raw, where=key)
        if commit.step != step:
            raise CorruptError("a step file holds another step", where=key, found=commit.step, hint="Remove this file.")
        check_commit(commit, where=key)
        return commit

    def read_if_sound(self, step: int) -> StepCommit | None:
        """Return the commit of `step`, or None: with a warning if it is damaged; or it was let go since the steps were listed."""
        try:
            return self.read(step)
        except MissingError:
            return None
        except CorruptError as error:
            _LOGGER.warning("step %d cannot be read and is not counted: %s", step, error)
            return None

    def read_whole(self, step: int) -> WholeStep:
        """Return the commit of `step` with its parts' documents, each compared with the commit's digest.

        Raises:
            MissingError: there is no such step.
            CorruptError: a document or a part is missing, cut short, or does not match its digest; or documents disagree.
        """
        return self.read_parts(self.read(step))

    def read_parts(self, commit: StepCommit, ranks: AbstractSet[int] | None = None) -> WholeStep:
        """Return `commit` with the documents of `ranks`, of all if that is None; otherwise as `read_whole`."""
        where = step_key(commit.step)
        refs = [ref for ref in commit.parts if ranks is None or ref.rank in ranks]
        parts = tuple(each(self.read_part, refs, threads=_THREADS))
        check_parts(commit, parts, refs, where=where)
        extents = extents_of(parts)
        each(lambda part: self.check_part(part, extents[part]), extents, threads=_THREADS)
        return WholeStep(commit, parts)

    def read_layout(self, commit: StepCommit) -> StepLayout | None:
        """Return which document of the step has what, or None if nothing says so that can be used: there are few, or an older version wrote them."""
        if commit.world < INDEXED_RANKS:
            return None
        key = layout_key(commit.ref)
        try:
            with reading(key):
                raw = self._storage.get(key)
            layout = unseal(StepLayout, raw, where=key)
            check_layout(layout, commit, where=key)
        except MissingError:
            return None
        except (CorruptError, FormatError) as error:
            _LOGGER.warning("the documents of all ranks are read: %s", error)
            return None
        return layout

    def check_header(self, info: PartInfo) -> None:
        """Raise `CorruptError` unless the header of the part is as it was written."""
        if info.part:
            with reading(info.part):
                header = self._storage.get_ranges(info.part, [(0, info.data_start)])[0]
            check_digest(header, info.header_digest, where=f"{info.part} (header)")

    def read_part(self, ref: PartRef) -> PartInfo:
        """Return the document of one part, compared with the digest in the commit.

        Raises:
            CorruptError: it is missing or does not match.
        """
        try:
            with reading(ref.info):
                raw = self._storage.get(ref.info)
            info = unseal(PartInfo, raw, where=ref.info)
        except MissingError:
            raise _gone(ref.info) from None
        if info.digest != ref.info_digest:
            hint = "Restore this file from a copy, or use an earlier step."
            raise CorruptError("a part's document is not the one that was committed", where=ref.info, hint=hint)
        check_info(info, where=ref.info)
        return info

    def check_part(self, part: str, needed_bytes: int) -> None:
        """Raise `CorruptError` unless the file `part` is there and at least `needed_bytes` long."""
        try:
            with reading(part):
                found = self._storage.stat(part).size_bytes
        except MissingError:
            raise _gone(part) from None
        if found < needed_bytes:
            hint = "Restore this part from a copy, or use an earlier step."
            raise CorruptError("a part was cut short", part=part, expected=needed_bytes, found=found, hint=hint)

    def _shown(self) -> str:
        steps = self.steps()
        return ", ".join(map(str, steps)) if steps else "none"


def steps_of(places: Sequence[Storage]) -> list[int]:
    """Return the steps that are in the first or a later one of `places`, in rising order; a later one that cannot be read is told and left out.

    Raises:
        StorageError: the first place cannot be read; or it has no step, and a later one cannot be read.
    """
    found = set(StepLog(places[0]).steps())
    for place in places[1:]:
        try:
            found |= set(StepLog(place).steps())
        except StorageError as error:
            if not found:
                raise
            _LOGGER.warning("%s is not asked for steps: %s", place.url, error)
    return sorted(found)


@contextmanager
def reading(key: str, start: int = 0, stop: int = 0) -> Iterator[None]:
    """Raise `CorruptError` in place of what a storage says if it cannot give back the bytes of `key` (up to `stop`, if not 0)."""
    try:
        yield
    except StorageError as error:
        if not is_damage(error):
            raise
        place = {"start": start, "stop": stop} if stop else {}
        hint = "Check the disk; restore this file from a copy, or use an earlier step."
        raise CorruptError(f"a file cannot be read: {error.fact}", key=key, **place, hint=hint) from None


def extents_of(parts: Iterable[PartInfo]) -> dict[str, int]:
    """Return how long each part file must be at least, earlier ones that entries point into included."""
    extents: defaultdict[str, int] = defaultdict(int)
    for info in parts:
        for entry in info.entries:
            extents[entry.part] = max(extents[entry.part], entry.stop)
        if info.part:
            extents[info.part] = max(extents[info.part], info.size_bytes)
    return dict(extents)


def _gone(key: str) -> CorruptError:
    hint = "Restore it from a copy, or use an earlier step."
    return CorruptError("a file of a committed step is missing", key=key, hint=hint)


Seconds = Annotated[float, msgspec.Meta(gt=0)]


class CheckpointerSettings(SettingsDocument, frozen=True, kw_only=True):
    """How long to wait and how many threads to use; the defaults suit a training run."""

    wait_s: Seconds = 600.0
    """How long a rank waits for the part or the commit of another one before it gives up and names it."""

    in_flight_bytes: Count = 0
    """So much state may be copied and not yet written. A save that fits beside the one before it does not wait for it; with 0 each waits."""

    codec: Codec = "none"
    """How parts are stored: "zstd" takes fewer bytes at some 1 GB/s for each of two threads. Reading need not be told."""

    threads: Positive = 2
    """Threads that copy, hash and read; hashing reaches 25 GB/s on one, so more help only where disks are faster."""


class Closing(ABC):
    """What saves in the background: it is closed when a `with` ends, and if that ends by an error, a failed save is only logged."""

    @abstractmethod
    def close(self) -> None:
        """Wait for what is in flight, and raise what went wrong."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except DatastoreError as failure:
            if error is None:
                raise
            _LOGGER.error("the last save failed, too: %s", failure)  # noqa: TRY400 - one line, no trace

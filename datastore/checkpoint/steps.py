"""The steps of a run as they stand in storage: which there are, and what each is made of.

A step exists when its commit file does; nothing else is trusted. Every document that a commit names is compared with
the digest in the commit, so a part from another save, or from another run, is found.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

from datastore.checkpoint.format.manifest import STEPS, PartInfo, PartRef, StepCommit, step_key, step_of_key
from datastore.checkpoint.parallel import each
from datastore.digest import check_digest
from datastore.document import unseal
from datastore.errors import CorruptError, MissingError
from datastore.storage.base import Storage

__all__ = ["StepLog", "WholeStep", "extents_of"]

_THREADS = 16
"""How many parts' documents are read at once."""


@dataclass(frozen=True, slots=True)
class WholeStep:
    """A commit with what its parts say: all that is known of a step short of its tensors."""

    commit: StepCommit
    parts: tuple[PartInfo, ...]


class StepLog:
    """Reads the steps of the run in `storage`."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
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
            raw = self._storage.get(key)
        except MissingError:
            raise MissingError("no such step", step=step, url=self.url, hint=f"There are: {self._shown()}.") from None
        commit = unseal(StepCommit, raw, where=key)
        if commit.step != step:
            raise CorruptError("a step file holds another step", where=key, found=commit.step, hint="Remove this file.")
        return commit

    def read_whole(self, step: int) -> WholeStep:
        """Return the commit of `step` with its parts' documents, each compared with the commit's digest.

        Raises:
            MissingError: there is no such step.
            CorruptError: a document or a part is missing, cut short, or does not match its digest.
        """
        commit = self.read(step)
        parts = tuple(each(self.read_part, commit.parts, threads=_THREADS))
        extents = extents_of(parts)
        each(lambda part: self.check_part(part, extents[part]), extents, threads=_THREADS)
        return WholeStep(commit, parts)

    def check_header(self, info: PartInfo) -> None:
        """Raise `CorruptError` unless the header of the part is as it was written."""
        if info.part:
            header = self._storage.get_ranges(info.part, [(0, info.data_start)])[0]
            check_digest(header, info.header_digest, where=f"{info.part} (header)")

    def read_part(self, ref: PartRef) -> PartInfo:
        """Return the document of one part, compared with the digest in the commit.

        Raises:
            CorruptError: it is missing or does not match.
        """
        try:
            info = unseal(PartInfo, self._storage.get(ref.info), where=ref.info)
        except MissingError:
            raise _gone(ref.info) from None
        if info.digest != ref.info_digest:
            hint = "Restore this file from a copy, or use an earlier step."
            raise CorruptError("a part's document is not the one that was committed", where=ref.info, hint=hint)
        return info

    def check_part(self, part: str, needed_bytes: int) -> None:
        """Raise `CorruptError` unless the file `part` is there and at least `needed_bytes` long."""
        try:
            found = self._storage.stat(part).size_bytes
        except MissingError:
            raise _gone(part) from None
        if found < needed_bytes:
            hint = "Restore this part from a copy, or use an earlier step."
            raise CorruptError("a part was cut short", part=part, expected=needed_bytes, found=found, hint=hint)

    def _shown(self) -> str:
        steps = self.steps()
        return ", ".join(map(str, steps)) if steps else "none"


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

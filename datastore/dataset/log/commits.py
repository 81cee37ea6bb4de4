"""The log of a dataset: one file per version, written with put-if-absent and read back after any error.

A writer that is told "failed" may have succeeded (a lost acknowledgement), so an error decides nothing: what is
stored under the version's key does. Mine: committed. Another's: rebase on it and try the next version. Absent: try
the same version again, for only when its key is taken can my earlier attempt no longer land there.

The newest version is found by reading, never by listing: from the hint upward in doubling steps, then by bisection.
Versions have no gaps, and a commit is never removed.
"""

import logging
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TypeVar

import msgspec

from datastore.dataset.log.keys import HINT_KEY, PACKED, READABLE_FEATURES, commit_key
from datastore.dataset.log.lease import CommitPatience, single_writer
from datastore.dataset.log.manifest import Commit, DatasetInfo, Hint, oldest_readable
from datastore.digest import sha256_hex
from datastore.document import seal, unseal
from datastore.errors import ConflictError, CorruptError, DatastoreError, FormatError, MissingError, StorageError
from datastore.storage.base import Storage
from datastore.storage.verified import first_sound
from datastore.threads import in_parallel

__all__ = ["CommitLog", "StoredCommit", "check_chain", "is_commit", "read_history"]

A = TypeVar("A")

B = TypeVar("B")

_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class StoredCommit:
    """A version, and the sha256 of its file as it lies there."""

    commit: Commit
    sha256: str


class CommitLog:
    """The versions of one dataset; safe for any number of processes and threads where `exclusive` holds."""

    def __init__(self, storage: Storage, *, exclusive: bool = True, patience_s: float = 120.0) -> None:
        self.storage = storage
        self.exclusive = exclusive and storage.exclusive
        self.patience_s = patience_s

    def newest(self) -> Commit | None:
        """Return the newest version, or None if there is none yet. Three requests if the hint is fresh, two at once.

        Raises:
            CorruptError: a commit on the way is damaged, or the one that the hint names is gone.
        """
        newest = self.newest_stored()
        return newest.commit if newest else None

    def newest_stored(self) -> StoredCommit | None:
        """Return as `newest`, with the sha256 of its file."""
        return self._newest()

    def read(self, version: int) -> Commit:
        """Return one version; as `stored`."""
        return self.stored(version).commit

    def readable(self, commit: Commit, *, info: DatasetInfo | None = None) -> Commit:
        """Return `commit` if its files are still kept: those of a dataset, or of what `info` says of it. Three requests.

        Raises:
            MissingError: it has expired; the message names what can be read.
        """
        newest = self.newest() or commit
        oldest = oldest_readable(info, newest) if info else newest.min_version
        if commit.version < oldest:
            raise MissingError(
                "this version has expired",
                url=self.storage.url,
                version=commit.version,
                oldest=oldest,
                newest=newest.version,
                hint="Name one from the oldest to the newest; a tag keeps a version from expiring.",
            )
        return commit

    def stored(self, version: int) -> StoredCommit:
        """Return one version and the sha256 of its file.

        Raises:
            MissingError: there is no such version; the message names the newest.
            CorruptError: its file is damaged.
        """
        found = self._find(version) if version >= 1 else None
        if found is None:
            newest = self.newest()
            raise MissingError(
                "no such version",
                url=self.storage.url,
                version=version,
                newest=newest.version if newest else None,
                hint="Name a version that `datastore log` shows.",
            )
        return found

    def history(self, newest: Commit) -> Iterator[Commit]:
        """Yield `newest` and all versions before it, each checked against the sha256 that its successor holds.

        Raises:
            MissingError: a version is gone.
            CorruptError: a version is damaged, or is not the one that its successor was built on.
        """
        commit = newest
        yield commit
        while commit.version > 1:
            parent = self.stored(commit.version - 1)
            check_chain(parent.commit.version, parent.sha256, expected=commit.parent_sha256)
            commit = parent.commit
            yield commit

    def readable_versions(self, newest: Commit, *, info: DatasetInfo, skip_damaged: bool = False) -> Iterator[Commit]:
        """Yield every version that can be read, oldest first, `newest` last: one read each, many at once.

        Raises:
            MissingError, CorruptError: one is gone or damaged, unless those are to be skipped.
        """

        def read(version: int) -> Commit | None:
            try:
                return self.read(version)
            except DatastoreError:
                if skip_damaged:
                    return None
                raise

        older = in_parallel(read, range(oldest_readable(info, newest), newest.version))
        yield from (commit for commit in older if commit is not None)
        yield newest

    def append(
        self,
        build: Callable[[Commit | None], Commit],
        *,
        then: Callable[[Commit], None] = lambda _: None,
        seen: StoredCommit | None = None,
    ) -> Commit:
        """Commit what `build` makes of the newest version, and return it as committed.

        `build` is called again each time another writer was faster. It returns the next version without its
        `version`, `parent_sha256` and `commit_id`, which are filled in here; or its argument: nothing to commit.
        `then` is called with what was committed, while the hint is being written. Whoever has `seen` the newest version
        a moment ago saves the search for it: if there is a newer one by now, that is found when the commit is stored.

        Raises:
            ConflictError: other writers were faster until patience ran out; or, on storage that cannot exclude a
                second writer, there is one.
            StorageError: the storage failed and holds no commit of ours; nothing has changed.
        """
        commit_id = uuid.uuid4().hex
        patience = CommitPatience(self.patience_s)
        with nullcontext() if self.exclusive else single_writer(self.storage):
            newest = seen or self._newest()
            while True:
                draft = build(newest.commit if newest else None)
                if newest is not None and draft is newest.commit:
                    return newest.commit
                commit, raw = _after(newest, msgspec.structs.replace(draft, commit_id=commit_id))
                faster = self._put(commit, raw, patience)
                if faster is None:
                    self._at_once(lambda: self._leave_hint(commit), lambda: then(commit))  # noqa: B023 - called right here
                    return commit
                patience.wait(commit_key(commit.version))
                newest = self._above(faster, self._find(commit.version + 1))

    def _put(self, commit: Commit, raw: bytes, patience: "CommitPatience") -> StoredCommit | None:
        """Store `commit`, whose file is `raw`, and return None; or the other one that its version's key holds."""
        key = commit_key(commit.version)
        while True:
            failure: ConflictError | StorageError | None = None
            try:
                if self.exclusive or self._find(commit.version) is None:
                    self.storage.put_new(key, raw)
                    if self.exclusive:
                        return None
            except (ConflictError, StorageError) as error:
                failure = error
            stored = self._read_back(commit.version, patience)
            if stored is not None:
                return None if stored.commit.commit_id == commit.commit_id else stored
            if isinstance(failure, StorageError) and not failure.transient:
                raise failure
            patience.wait(key)

    def _read_back(self, version: int, patience: "CommitPatience") -> StoredCommit | None:
        while True:
            try:
                return self._find(version)
            except StorageError as error:
                if not error.transient:
                    raise StorageError(
                        "a commit may or may not have been stored",
                        where=commit_key(version),
                        cause=str(error),
                        hint="Open the dataset again when the storage answers: it holds the old or the new version.",
                    ) from error
            patience.wait(commit_key(version))

    def _newest(self) -> StoredCommit | None:
        low = self._hinted()
        if not low:
            return self._above(None, self._find(1))
        newest, found = self._at_once(lambda: self._find(low), lambda: self._find(low + 1))
        if newest is None:
            raise CorruptError(
                "a commit is gone",
                where=commit_key(low),
                hint=f"Restore it from a copy; or remove {HINT_KEY} to go on from the newest version that is left.",
            )
        return self._above(newest, found)

    def _above(self, newest: StoredCommit | None, found: StoredCommit | None) -> StoredCommit | None:
        """Return the newest version from `newest` upward; `found` is the one after it, if there is one."""
        low, step = newest.commit.version if newest else 0, 1
        while found is not None:
            newest, low, step = found, low + step, step * 2
            found = self._find(low + step)
        high = low + step
        while high - low > 1:
            middle = (low + high) // 2
            found = self._find(middle)
            if found is None:
                high = middle
            else:
                newest, low = found, middle
        return newest

    def _find(self, version: int) -> StoredCommit | None:
        try:
            return first_sound(
                self.storage,
                commit_key(version),
                lambda place: _unsealed(place.get(commit_key(version)), version),
                is_good=lambda raw: is_commit(raw, version),
            )
        except MissingError:
            return None

    def _at_once(self, first: Callable[[], A], second: Callable[[], B]) -> tuple[A, B]:
        """Return what both return, called at once where each is a request to somewhere else."""
        if self.storage.local_path(HINT_KEY) is not None:
            return first(), second()
        with ThreadPoolExecutor(1) as pool:
            other = pool.submit(second)
            return first(), other.result()

    def _hinted(self) -> int:
        """Return where the hint says to start; 0 if there is none or it is damaged, which costs a few more reads."""
        try:
            return unseal(Hint, self.storage.get(HINT_KEY), where=HINT_KEY).version
        except (MissingError, CorruptError, FormatError):
            return 0

    def _leave_hint(self, commit: Commit) -> None:
        try:
            self.storage.put_hint(HINT_KEY, seal(Hint(version=commit.version)))
        except StorageError as error:
            # The commit stands; without a hint the next reader gallops from an older one.
            _LOGGER.warning("version %d is committed, but its hint was not written: %s", commit.version, error)


def _after(newest: StoredCommit | None, draft: Commit) -> tuple[Commit, bytes]:
    """Return `draft` as the version that follows `newest`, as it will be read back, and its file; what has expired stays so.

    Segments that `newest` does not have are written as this package writes them, which is a feature of the version.
    """
    written = set(draft.segments).difference(newest.commit.segments if newest else ())
    commit = msgspec.structs.replace(
        draft,
        features=tuple(sorted({*draft.features, *([PACKED] if written else [])})),
        version=newest.commit.version + 1 if newest else 1,
        parent_sha256=newest.sha256 if newest else "",
        min_version=max(draft.min_version, newest.commit.min_version) if newest else draft.min_version,
    )
    raw = seal(commit)
    return unseal(Commit, raw, where=commit_key(commit.version)), raw


def _unsealed(raw: bytes, version: int) -> StoredCommit:
    key = commit_key(version)
    commit = unseal(Commit, raw, where=key)
    if commit.version != version:
        raise CorruptError(
            "a commit lies under another version's name",
            where=key,
            version=commit.version,
            hint="Restore this file from a copy.",
        )
    unknown = sorted(set(commit.features) - READABLE_FEATURES)
    if unknown:
        raise FormatError(
            "this version uses features that this package does not know",
            where=key,
            unknown=unknown,
            hint="Install a newer datastore.",
        )
    return StoredCommit(commit, sha256_hex(raw))


def check_chain(version: int, sha256: str, *, expected: str) -> None:
    """Check that the commit of `version` is the one that its successor was built on; an empty `expected` says nothing.

    Raises:
        CorruptError: it is another one.
    """
    if expected not in {"", sha256}:
        raise CorruptError(
            "a commit is not the one that the next was built on",
            where=commit_key(version),
            expected=expected,
            found=sha256,
            hint="Restore it from a copy.",
        )


def is_commit(raw: bytes, version: int) -> bool:
    """Return whether `raw` is the file of a commit of `version`, undamaged."""
    try:
        return _unsealed(raw, version).commit.version == version
    except (CorruptError, FormatError):
        return False


def read_history(storage: Storage, newest: Commit) -> list[Commit]:
    """Return all versions up to `newest`, oldest first, also those that have expired.

    Raises:
        MissingError, CorruptError: a commit is gone or damaged.
    """
    log = CommitLog(storage)
    return [*in_parallel(lambda version: log.stored(version).commit, range(1, newest.version)), newest]

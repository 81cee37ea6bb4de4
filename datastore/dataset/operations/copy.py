"""Copy a dataset to another place: the same uuid, the same versions, the same bytes, each checked on its way.

Data goes first and the log last, version by version downward, so that a copy that stops leaves no new version visible;
run again, it goes on with what is missing. Once there is one, a copy brings it up to date. By default it has the files
of the newest version only; the log, which is a chain, is always whole, and says so for the others: they have expired here.

Nobody may write to a copy but the next copy: versions of its own would not fit into the log of the source.
"""

import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import msgspec

from datastore.dataset.log.commits import CommitLog, check_chain
from datastore.dataset.log.identity import create_dataset, require_free, write_card
from datastore.dataset.log.keys import (
    CERTIFICATES_FOLDER,
    HINT_KEY,
    INFO_KEY,
    PLACEMENT,
    REFERENCES,
    commit_key,
    plan_key,
    tag_key,
    tokenizer_key,
)
from datastore.dataset.log.manifest import Commit, DatasetInfo, Hint, oldest_readable
from datastore.dataset.log.tags import list_tags, read_tag
from datastore.dataset.roots import open_roots
from datastore.dataset.shards.files import read_tokenizer
from datastore.dataset.shards.inventory import StoredFile, files_of_versions, tables_of
from datastore.dataset.snapshot import Dataset, open_dataset, split_reference
from datastore.digest import sha256_hex
from datastore.document import seal, unseal
from datastore.errors import ConfigError, ConflictError, FormatError, MissingError, StorageError
from datastore.storage.base import Storage, StorageLike
from datastore.storage.resolve import open_storage
from datastore.storage.urls import strip_credentials
from datastore.storage.verified import read_checked
from datastore.threads import in_parallel
from datastore.units import Progress

__all__ = ["CopyReport", "Transferred", "copy", "copy_tokenizers", "open_target", "transfer"]


@dataclass(frozen=True, slots=True)
class CopyReport:
    """What was brought."""

    url: str
    version: int
    """The newest version there now."""

    oldest: int
    """The oldest whose files are there."""

    files: int
    """Shards, documents and parity files that were copied."""

    bytes: int
    present: int
    """Those that were there."""

    commits: int
    """Versions that were added to the log."""

    tags: int
    seconds: float


def copy(
    source: StorageLike, target: StorageLike, *, all_versions: bool = False, progress: Progress | None = None
) -> CopyReport:
    """Copy the newest version of the dataset `source` to `target`, with the tags of what is copied.

    With `all_versions` every version that can be read is copied. What is there already is not copied again. `progress` gets
    the bytes copied, and all.

    Raises:
        ConfigError: the source names a version, or has its shards elsewhere (a shallow clone); or the target holds
            something else.
        ConflictError: the target has versions of its own.
        MissingError, CorruptError: a file of the source is gone or damaged; nothing new is visible in the target.
        StorageError: run it again to go on.
    """
    started = time.monotonic()
    dataset = _opened(source)
    oldest = oldest_readable(dataset.info, dataset.commit) if all_versions else dataset.version
    commits = [dataset.commit]
    if all_versions:
        commits = list(dataset.log.readable_versions(dataset.commit, info=dataset.info))
    if any(REFERENCES in commit.features for commit in commits):
        raise ConfigError(
            "a shallow clone has no shards of its own to copy",
            url=dataset.url,
            hint="Make a whole dataset of it with `datastore clone`, which brings them.",
        )
    storage, info = _target(target, dataset)
    known = _common(dataset.log, CommitLog(storage), dataset) if info else 0
    done = transfer(dataset.storage, storage, list(files_of_versions(dataset.storage, commits)), progress=progress)
    copy_tokenizers(dataset.storage, storage, commits)
    info = _identity(storage, dataset.info, info, oldest=oldest if known < dataset.version or all_versions else None)
    tables = {file.key: file for commit in commits for file in tables_of(commit)}
    transfer(dataset.storage, storage, list(tables.values()))
    certificates = (stat.key for stat in dataset.storage.list(CERTIFICATES_FOLDER) if stat.key.count("/") == 1)
    _copy_plain(dataset.storage, storage, certificates)
    _copy_log(dataset, storage, known=known)
    storage.put(HINT_KEY, seal(Hint(version=dataset.version)))
    write_card(storage, info, dataset.commit)
    return CopyReport(
        url=storage.url,
        version=dataset.version,
        oldest=oldest_readable(info, dataset.commit),
        files=done.files,
        bytes=done.bytes,
        present=done.present,
        commits=dataset.version - known,
        tags=_copy_tags(dataset, storage, oldest=oldest_readable(info, dataset.commit)),
        seconds=time.monotonic() - started,
    )


def _opened(source: StorageLike) -> Dataset:
    if not isinstance(source, Storage) and split_reference(os.fspath(source))[1]:
        raise ConfigError(
            "a copy is of the newest version, or of all",
            url=strip_credentials(os.fspath(source)),
            hint="Leave out the version; `datastore clone` makes a new dataset of a single one.",
        )
    return open_dataset(source)


def _target(target: StorageLike, source: Dataset) -> tuple[Storage, DatasetInfo | None]:
    """Return where to copy to, and what dataset is there, which is none or an earlier copy."""
    storage, info = open_target(target)
    if info is None:
        return storage, None
    if storage.url == source.url:
        raise ConfigError("source and target are the same place", url=storage.url, hint="Name another target.")
    if info.uuid != source.uuid:
        raise ConfigError(
            "the target holds another dataset", url=storage.url, uuid=info.uuid, hint="Name an empty or a new folder."
        )
    return storage, info


def _common(source: CommitLog, target: CommitLog, dataset: Dataset) -> int:
    """Return the newest version of the copy, which the source has, too."""
    newest = target.newest()
    if newest is None:
        return 0
    stored = target.stored(newest.version)
    if newest.version > dataset.version or source.stored(newest.version).sha256 != stored.sha256:
        raise ConflictError(
            "the target has versions that the source does not have",
            url=target.storage.url,
            version=newest.version,
            source=dataset.version,
            hint="It was written to, so it is no copy any more. Copy to another place.",
        )
    return newest.version


def _identity(storage: Storage, source: DatasetInfo, present: DatasetInfo | None, *, oldest: int | None) -> DatasetInfo:
    """Store which versions the copy has; return its identity. `oldest` is None if that stays as it is."""
    if present is None:
        features = tuple(name for name in source.features if name != PLACEMENT)
        like = msgspec.structs.replace(source, features=features, placement=None, oldest_version=oldest or 1)
        return create_dataset(storage, like=like)
    if oldest is None or oldest == present.oldest_version:
        return present
    storage.put(INFO_KEY, seal(msgspec.structs.replace(present, oldest_version=oldest)))
    return open_roots(storage)[1]


def _copy_plain(source: Storage, target: Storage, keys: Iterable[str]) -> None:
    """Copy small files that no reader of data needs; one that has gone meanwhile is left out."""

    def bring(key: str) -> None:
        try:
            target.put(key, source.get(key))
        except MissingError:
            return

    for _ in in_parallel(bring, keys):
        pass


def _copy_log(dataset: Dataset, target: Storage, *, known: int) -> None:
    """Copy the versions after `known`, the newest first: while one is missing, those after it are not found."""
    chain = _Chain(dataset.storage)

    def put(found: tuple[str, bytes]) -> None:
        try:
            target.put_new(*found)
        except ConflictError:
            if target.get(found[0]) != found[1]:
                raise

    for _ in in_parallel(put, chain.read(range(dataset.version, known + 1, -1))):
        pass
    last = list(chain.read(range(min(known + 1, dataset.version), known, -1)))
    # By them an ingest into the copy knows which files are in it.
    _copy_plain(dataset.storage, target, sorted(chain.plans))
    for found in last:
        put(found)


class _Chain:
    """The files of a log, read from the newest down, each checked against what its successor says of it."""

    def __init__(self, storage: Storage) -> None:
        self.plans: set[str] = set()
        """The plans of the ingests that made these versions."""
        self._storage = storage
        self._expected = ""

    def read(self, versions: Iterable[int]) -> Iterator[tuple[str, bytes]]:
        """Yield key and bytes of each of `versions`, which go down by one."""
        for key, raw in in_parallel(lambda key: (key, self._storage.get(key)), map(commit_key, versions)):
            commit = unseal(Commit, raw, where=key)
            check_chain(commit.version, sha256_hex(raw), expected=self._expected)
            self._expected = commit.parent_sha256
            if commit.ingest_id:
                self.plans.add(plan_key(commit.ingest_id))
            yield key, raw


def _copy_tags(dataset: Dataset, target: Storage, *, oldest: int) -> int:
    """Copy the tags of versions whose files are there; return how many there are."""
    copied = 0
    for name in list_tags(dataset.storage):
        if oldest <= read_tag(dataset.storage, name).version <= dataset.version:
            target.put(tag_key(name), dataset.storage.get(tag_key(name)))
            copied += 1
    return copied


_PASSES = 3
"""How often to look for what is missing: the last look finds everything there, unless somebody removes it."""


@dataclass(slots=True)
class Transferred:
    """What was copied, and what was there."""

    files: int = 0
    bytes: int = 0
    present: int = 0


def transfer(
    source: Storage,
    target: Storage,
    files: Sequence[StoredFile],
    *,
    rename: Callable[[str], str] = str,
    progress: Progress | None = None,
) -> Transferred:
    """Copy those of `files` that are not there; `rename` says what each is called there.

    One that is there with the right size is taken for whole: writes are atomic. Memory: as many files as threads, and
    the names of all that are there.

    Raises:
        MissingError, CorruptError: a file of the source is gone or damaged.
        StorageError: the target cannot be written, or somebody removes from it what was copied.
    """
    folders = {rename(file.key).partition("/")[0] for file in files}
    total = sum(file.size_bytes for file in files)
    done: Transferred | None = None

    def bring(file: StoredFile) -> int:
        target.put(rename(file.key), read_checked(source, file.key, size_bytes=file.size_bytes, digest=file.digest))
        return file.size_bytes

    for _ in range(_PASSES):
        sizes = {stat.key: stat.size_bytes for folder in folders for stat in target.list(folder)}
        wanted = [file for file in files if sizes.get(rename(file.key)) != file.size_bytes]
        done = done or Transferred(present=len(files) - len(wanted))
        if not wanted:
            return done
        at = total - sum(file.size_bytes for file in wanted)
        for size_bytes in in_parallel(bring, wanted):
            done.files, done.bytes, at = done.files + 1, done.bytes + size_bytes, at + size_bytes
            if progress is not None:
                progress(at, total)
    raise StorageError(
        "what was copied does not stay", url=target.url, hint="Stop whoever removes it, then run the same again."
    )


def open_target(place: str | os.PathLike[str] | Storage) -> tuple[Storage, DatasetInfo | None]:
    """Return the storage of a place to write a dataset to, and the identity of the one that is there, if one is.

    Raises:
        ConfigError: the place holds something else.
        FormatError, CorruptError: the dataset that is there is not readable.
    """
    try:
        return open_roots(place)
    except (MissingError, FormatError):
        storage = place if isinstance(place, Storage) else open_storage(place)
        return storage, require_free(storage)


def copy_tokenizers(source: Storage, target: Storage, commits: Iterable[Commit]) -> None:
    """Copy the tokenizers that `commits` name, each checked against its sha256."""
    for ref in {commit.tokenizer for commit in commits if commit.tokenizer is not None}:
        target.put(tokenizer_key(ref.sha256), read_tokenizer(source, ref))

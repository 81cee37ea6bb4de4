"""A new dataset made of a version of another: its own uuid, one version, and from there on its own history.

A full clone has the data. A shallow one has the manifest only, in which the shards are named by the URLs of the source:
made in seconds, whatever its size, and free to append, delete and overwrite without touching the source. The price is
high: what the source removes (`vacuum` after `expire`, `purge`) is lost to the clone, and nothing warns the source.
`clone` of a shallow clone makes a whole dataset of it.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import msgspec
import pyarrow as pa

from datastore.dataset.log.commits import CommitLog
from datastore.dataset.log.identity import create_dataset, write_card
from datastore.dataset.log.keys import REFERENCES
from datastore.dataset.log.manifest import Commit, DatasetInfo, Origin, SegmentRef
from datastore.dataset.operations.copy import Transferred, copy_tokenizers, open_target, transfer
from datastore.dataset.operations.transaction import draft_commit, publish
from datastore.dataset.shards.inventory import files_of_versions, tables_of
from datastore.dataset.shards.segment_changes import store_segments
from datastore.dataset.shards.segments import load_segment
from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.errors import ConfigError, ConflictError
from datastore.formats.arrow import array_of
from datastore.storage.base import Storage, StorageLike
from datastore.storage.urls import join_url
from datastore.storage.wrappers import is_link
from datastore.units import Progress

__all__ = ["CloneReport", "clone"]


@dataclass(frozen=True, slots=True)
class CloneReport:
    """What was made."""

    url: str
    uuid: str
    source: str
    source_version: int
    shallow: bool
    shards: int
    files: int
    """Shards and documents that were copied."""

    bytes: int
    present: int
    """Those that an earlier run had copied."""

    seconds: float


def clone(
    source: StorageLike | Dataset, target: StorageLike, *, shallow: bool = False, progress: Progress | None = None
) -> CloneReport:
    """Make a new dataset at `target` of one version of `source` (`URL@3`, `URL@tag`; without it the newest).

    Every file is checked against its digest while it is copied. Run again after it was stopped, it goes on; once it
    is done, and nothing was changed since, it does nothing. A `shallow`
    clone copies no shards: it reads those of the source, and breaks when the source removes them. `progress` gets the
    bytes copied, and all.

    Raises:
        ConfigError: the target holds a dataset, or something else.
        MissingError, CorruptError: a file of the source is gone or damaged; there is no new dataset.
    """
    started = time.monotonic()
    dataset = source if isinstance(source, Dataset) else open_dataset(source)
    storage, done_before = _free(target, dataset, shallow=shallow)
    base = msgspec.structs.replace(dataset.commit, segments=(), parity=())
    wanted = [] if shallow else list(files_of_versions(dataset.storage, [_unprotected(dataset.commit)]))
    done = transfer(dataset.storage, storage, wanted, rename=_key_of, progress=progress)
    if done_before is not None:
        return _report(dataset, storage, done_before, done, shallow=shallow, started=started)
    copy_tokenizers(dataset.storage, storage, [base])
    info = create_dataset(storage)
    transfer(dataset.storage, storage, list(tables_of(base)))
    segments = tuple(_renamed(dataset, storage, _link_to(dataset.storage) if shallow else _key_of))
    features = {*base.features} - {REFERENCES} | ({REFERENCES} if shallow else set())

    def build(newest: Commit | None) -> Commit:
        if newest is not None:
            raise ConflictError("another dataset was made there", url=storage.url, hint="Name a new folder.")
        return msgspec.structs.replace(
            draft_commit("clone", parent=base),
            segments=segments,
            min_version=1,
            features=tuple(sorted(features)),
            origin=Origin(url=dataset.url, uuid=dataset.uuid, version=dataset.version),
        )

    publish(storage, info, build)
    return _report(dataset, storage, info, done, shallow=shallow, started=started)


def _report(
    dataset: Dataset, storage: Storage, info: DatasetInfo, done: Transferred, *, shallow: bool, started: float
) -> CloneReport:
    return CloneReport(
        url=storage.url,
        uuid=info.uuid,
        source=dataset.url,
        source_version=dataset.version,
        shallow=shallow,
        shards=dataset.totals.shards,
        files=done.files,
        bytes=done.bytes,
        present=done.present,
        seconds=time.monotonic() - started,
    )


def _free(target: StorageLike, source: Dataset, *, shallow: bool) -> tuple[Storage, DatasetInfo | None]:
    """Return the storage of a place where the clone can be made, and the identity of what is there if that is it."""
    storage, info = open_target(target)
    newest = CommitLog(storage).newest() if info is not None else None
    if info is None or newest is None:
        return storage, None  # Without a version, it is what a clone left that was stopped just before its commit.
    origin = Origin(url=source.url, uuid=source.uuid, version=source.version)
    if newest.version == 1 and newest.origin == origin and (REFERENCES in newest.features) == shallow:
        write_card(storage, info, newest)  # The very same clone, maybe stopped just after its commit.
        return storage, info
    raise ConfigError(
        "the target holds a dataset", url=storage.url, uuid=info.uuid, hint="Name an empty or a new folder."
    )


def _unprotected(commit: Commit) -> Commit:
    return msgspec.structs.replace(commit, parity=())


def _key_of(path: str) -> str:
    """Return what a file is called in a dataset that has it: a link ends in its key."""
    return "/".join(path.split("/")[-3:]) if is_link(path) else path


def _link_to(storage: Storage) -> Callable[[str], str]:
    """Return a function that gives the URL of a file in `storage`; of several copies, that of the first."""

    def link(path: str) -> str:
        if not path or is_link(path):
            return path
        return join_url(storage.homes(path)[0].storage.url, path)

    return link


def _renamed(dataset: Dataset, target: Storage, rename: Callable[[str], str]) -> Iterator[SegmentRef]:
    """Store the segments of `dataset` with the paths that `rename` gives."""
    for ref in dataset.commit.segments:
        batch = load_segment(dataset.storage, ref)
        for name in ("path", "docs_path"):
            paths = array_of([rename(str(path)) for path in batch.column(name).to_pylist()], pa.string())
            at = batch.schema.get_field_index(name)
            batch = batch.set_column(at, batch.schema.field(name), paths)
        yield from store_segments(target, pa.Table.from_batches([batch]))

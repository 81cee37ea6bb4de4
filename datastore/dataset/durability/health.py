"""The price of losing a disk: for each place of a dataset, what would be gone for good if it were.

Nothing is read but the log, the segments and the listings: which copies should be where follows from their keys, which
are there from the listing, and what parity could make again from its groups. Whether the bytes are right says `verify`.
"""

import os
from collections.abc import Collection
from dataclasses import dataclass

from datastore.dataset.durability.parity import live_groups, unprotected
from datastore.dataset.log.keys import is_data
from datastore.dataset.shards.inventory import files_of
from datastore.dataset.shards.parity_groups import Group
from datastore.dataset.shards.segments import Segments, load_segment
from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.storage.base import Root, Storage

__all__ = ["Health", "RootLoss", "health"]


@dataclass(frozen=True, slots=True)
class RootLoss:
    """One place, and what would be gone without it."""

    root: str
    there: bool
    behind: bool
    """Whether it has missed writes, so that other roots are more up to date."""

    files: int
    """Of data, of the newest version and its parity, that lie there."""

    bytes: int
    shards: int
    """Of the newest version, that would be gone: they, or their documents files."""

    documents: int
    """Of those, as of the tokens, without what is deleted already."""

    tokens: int
    versions: int
    """Readable versions that would lack something."""

    rebuilt: int
    """Files that would be gone, but can be made again from parity."""


@dataclass(frozen=True, slots=True)
class Health:
    """What a dataset can stand to lose."""

    url: str
    version: int
    copies: int
    groups: int
    """Parity groups all of whose files are there."""

    files: int
    unprotected: int
    """Files with one copy and no parity: a single bad block in one is beyond repair."""

    degraded: int
    """Copies that should be there and are not."""

    versions: int
    """That can be read."""

    roots: tuple[RootLoss, ...]

    @property
    def worst(self) -> RootLoss:
        """The place that it would hurt most to lose."""
        return max(self.roots, key=lambda loss: (loss.documents, loss.shards))


def health(url: str | os.PathLike[str] | Storage) -> Health:
    """Return what each place of the dataset at `url` would cost if it were lost.

    Raises:
        DatastoreError: the dataset cannot be opened, or a root that is there cannot be listed.
    """
    dataset = open_dataset(url)
    look = _Look(dataset)
    copies = dataset.info.placement.copies if dataset.info.placement else 1
    alone = {member.path for member in unprotected(dataset, look.groups)} if copies == 1 else set()
    return Health(
        url=dataset.url,
        version=dataset.version,
        copies=copies,
        groups=len(look.groups),
        files=len(look.paths),
        unprotected=len(alone),
        degraded=sum(len(look.homes[path] - look.there[path]) for path in look.paths),
        versions=len(look.versions),
        roots=tuple(look.loss(root) for root in look.roots),
    )


class _Look:
    """What lies where."""

    def __init__(self, dataset: Dataset) -> None:
        storage = dataset.storage
        self.roots = storage.roots()
        self.behind = storage.behind()
        lost = set(storage.lost())
        self.lost = {root.id for root in self.roots if root.storage.url in lost}
        self.shards = list(dataset.segments)
        self.versions = [
            commit.segments
            for commit in dataset.log.readable_versions(dataset.commit, info=dataset.info, skip_damaged=True)
        ]
        self.groups: list[Group] = live_groups(dataset)
        self.sizes = {file.key: file.size_bytes for file in files_of(self.shards)}
        self.sizes |= {group.path: group.size_bytes for group in self.groups}
        self.paths = list(self.sizes)
        self.homes = {path: {root.id for root in storage.homes(path)} for path in self.paths}
        self.there: dict[str, set[str]] = {path: set() for path in self.paths}
        for root in self.roots:
            for stat in root.storage.list() if root.id not in self.lost else ():
                if stat.key in self.there and is_data(stat.key):
                    self.there[stat.key].add(root.id)
        self._groups_of: dict[str, list[Group]] = {}
        for group in self.groups:
            for path in group.paths:
                self._groups_of.setdefault(path, []).append(group)
        self._storage = storage
        self._deletions = dataset.deletions

    def loss(self, root: Root) -> RootLoss:
        """Return what would be gone without `root`, besides what is gone already."""
        here = [path for path in self.paths if root.id in self.there[path]]
        only = {path for path in self.paths if self.there[path] <= {root.id}}
        gone = {path for path in only if not self._can_be_made(path, only)}
        if len(self.roots) == 1:
            gone = only = set(self.paths)
        shards = [shard for shard in self.shards if any(file.key in gone for file in files_of([shard]))]
        return RootLoss(
            root=root.storage.url,
            there=root.id not in self.lost,
            behind=root.id in self.behind,
            files=len(here),
            bytes=sum(self.sizes[path] for path in here),
            shards=len(shards),
            documents=sum(shard.documents - self._deletions.rows(shard.uid).size for shard in shards),
            tokens=sum(shard.tokens - self._deleted_tokens(shard.uid) for shard in shards),
            versions=self._versions_without(gone),
            rebuilt=len(only) - len(gone),
        )

    def _deleted_tokens(self, uid: str) -> int:
        spans = self._deletions.spans(uid)
        return int((spans[:, 1] - spans[:, 0]).sum())

    def _can_be_made(self, path: str, gone: Collection[str]) -> bool:
        return any(
            not any(other in gone for other in group.paths if other != path) for group in self._groups_of.get(path, ())
        )

    def _versions_without(self, gone: Collection[str]) -> int:
        if len(self.roots) == 1:
            return len(self.versions)
        lacking: dict[str, bool] = {}
        for ref in (ref for refs in self.versions for ref in refs if ref.digest not in lacking):
            segment = Segments([load_segment(self._storage, ref)]) if gone else ()
            lacking[ref.digest] = any(file.key in gone for file in files_of(segment))
        return sum(any(lacking[ref.digest] for ref in refs) for refs in self.versions)

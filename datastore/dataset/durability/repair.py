"""`repair`: every copy of every file is read; what is damaged or gone is made again from what is left.

The order: places that were named as new or moved; the small files, of which each root has all; then the data, of each
readable version and tag, from other copies, from good blocks of bad copies, and from parity. Nothing replaces a file
but bytes that have its digest, in one step, so a repair that is cut off, or fails, makes nothing worse.
"""

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from datastore.dataset.durability.blocks import Rebuilder, Room, check_blocks
from datastore.dataset.durability.mirrors import Finding, equalize, soundness
from datastore.dataset.journals import damaged_documents
from datastore.dataset.log.commits import CommitLog
from datastore.dataset.log.identity import card_text
from datastore.dataset.log.keys import (
    CARD_KEY,
    HINT_KEY,
    INFO_KEY,
    JOURNALS_FOLDER,
    behind_key,
    is_data,
    tokenizer_key,
)
from datastore.dataset.log.manifest import Commit, Hint
from datastore.dataset.log.tags import list_tags, read_tagged
from datastore.dataset.roots import RootChange, change_roots, open_roots, store_info
from datastore.dataset.shards.inventory import StoredFile, files_of, parity_file, tables_of
from datastore.dataset.shards.parity_groups import Group, load_groups
from datastore.dataset.shards.segments import Segments, load_segment
from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.document import seal
from datastore.errors import DatastoreError
from datastore.storage.base import Root, Storage
from datastore.threads import in_parallel
from datastore.units import Progress

__all__ = ["RepairReport", "repair"]


@dataclass(frozen=True, slots=True)
class RepairReport:
    """What was looked at, and what was found and done."""

    url: str
    version: int
    dry_run: bool
    files: int
    copies: int
    bytes: int
    """Read of all copies."""

    findings: tuple[Finding, ...]
    lost_roots: tuple[str, ...]
    """Places of the dataset that are not there."""

    seconds: float

    @property
    def repaired(self) -> int:
        """How many copies were repaired, or could be."""
        return sum(bool(found.repair) for found in self.findings)

    @property
    def ok(self) -> bool:
        """Whether everything is as it should be now; after a dry run, whether it would be."""
        return not self.lost_roots and all(found.repair for found in self.findings)


def repair(
    url: str | os.PathLike[str],
    *,
    roots: Mapping[str, str] | None = None,
    promote: bool = False,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> RepairReport:
    """Repair the dataset at `url`, all its readable versions.

    `roots` says where roots of it are now: `{"/disk2/data": "/disk5/data"}`; one that is empty there is a new disk and
    is filled. `promote` makes the first root that is there the first of all, if that one is lost for good. With
    `dry_run` nothing is written, and the report says what would be. `progress` gets the files looked at, and all.

    Raises:
        ConfigError: a root is not one of the dataset's, or what is to be a root holds something else.
        DatastoreError: the dataset cannot be opened by any of its roots.
    """
    url = os.fspath(url)
    started = time.monotonic()
    change = change_roots(url, roots or {}, promote=promote, dry_run=dry_run)
    storage, _ = open_roots(change.url)
    places = _places(storage, change)
    findings = list(_small(storage, places, change, dry_run=dry_run))
    if change.late is not None and not dry_run:
        store_info(change.late, change.info)
        storage, _ = open_roots(change.url)
    survey = _Survey(open_dataset(storage), storage, places)
    survey.run(progress, dry_run=dry_run)
    findings += survey.findings
    lost = tuple(root.storage.url for root in storage.roots() if root.id not in {place.id for place in places})
    if not dry_run:
        _trust_again(places, findings)
        _write_cards(survey.dataset, places)
    return RepairReport(
        url=storage.url,
        version=survey.dataset.version,
        dry_run=dry_run,
        files=len(survey.files),
        copies=survey.copies,
        bytes=survey.bytes,
        findings=tuple(findings),
        lost_roots=lost,
        seconds=time.monotonic() - started,
    )


def _places(storage: Storage, change: RootChange) -> list[Root]:
    """Return the roots that can be read and written, those that are being filled among them."""
    lost = set(storage.lost())
    return [
        root for root in storage.roots() if root.storage.url not in lost or root.id in change.filled | change.returned
    ]


def _small(storage: Storage, places: Sequence[Root], change: RootChange, *, dry_run: bool) -> Iterator[Finding]:
    """Repair what is not data."""
    behind = storage.behind()
    trusted = [root for root in places if root.id not in change.filled and (root.id not in behind or root is places[0])]
    alone = len(places) == 1
    if alone and not soundness(HINT_KEY)(_bytes(storage, HINT_KEY)) and not dry_run:
        newest = CommitLog(storage).newest()
        storage.put(HINT_KEY, seal(Hint(version=newest.version if newest else 1)))
    skip = {CARD_KEY} | ({HINT_KEY} if alone else {INFO_KEY} if change.late is not None else set())
    for found in equalize(places, trusted=trusted or places, dry_run=dry_run, skip=frozenset(skip)):
        if found.repair or not found.path.startswith(f"{JOURNALS_FOLDER}/"):
            yield found
    # What no root has a good copy of is needed no more, or is made again.
    for key, fault in damaged_documents(storage):
        if not dry_run:
            storage.delete(key)
        yield Finding(key, storage.url, fault, "removed: whoever needs it makes it again")


def _bytes(storage: Storage, key: str) -> bytes:
    try:
        return storage.get(key)
    except DatastoreError:
        return b""


def _trust_again(places: Sequence[Root], findings: Sequence[Finding]) -> None:
    """Remove the marks of the roots that have everything again."""
    bad = {found.root for found in findings if not found.repair}
    for root in places:
        if root.id and root.storage.url not in bad:
            for place in places:
                place.storage.delete(behind_key(root.id))


def _write_cards(dataset: Dataset, places: Sequence[Root]) -> None:
    """Write the dataset's card where it is not what it would be."""
    card = card_text(dataset.info, dataset.commit).encode()
    for root in places:
        if _bytes(root.storage, CARD_KEY) != card:
            with suppress(DatastoreError):  # No reader depends on it.
                root.storage.put(CARD_KEY, card)


@dataclass(slots=True)
class _Survey:
    """All files of data: looked at, and repaired."""

    dataset: Dataset
    storage: Storage
    """Its own, without what it may refer to elsewhere."""
    places: Sequence[Root]
    files: dict[str, StoredFile] = field(default_factory=dict)
    groups: dict[str, Group] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)
    copies: int = 0
    bytes: int = 0

    def run(self, progress: Progress | None, *, dry_run: bool) -> None:
        storages = [root.storage for root in self.places]
        self._collect()
        rebuilder = Rebuilder(storages, files=self.files, groups=list(self.groups.values()))
        room = Room()
        looked = in_parallel(lambda file: (file, self._look(file, room)), self.files.values())
        for done, (file, faults) in enumerate(looked, 1):
            if faults:
                self._mend(file, faults, rebuilder, dry_run=dry_run)
            if progress is not None:
                progress(done, len(self.files))
        if not dry_run and not any(not found.repair for found in self.findings):
            self._tidy()

    def _collect(self) -> None:
        """Find all files that a readable version or a tag names."""
        storage = self.storage
        commits = self._commits()
        segments = {ref.digest: ref for commit in commits for ref in commit.segments}
        tables = {ref.digest: ref for commit in commits for ref in commit.parity}
        for ref in segments.values():
            with suppress(DatastoreError):  # Told when the small files were looked at, or below.
                self.files |= {file.key: file for file in files_of(Segments([load_segment(storage, ref)]))}
        for table in tables.values():
            with suppress(DatastoreError):
                self.groups |= {group.path: group for group in load_groups(storage, table)}
        self.files |= {path: parity_file(group) for path, group in self.groups.items()}
        small = [file.key for commit in commits for file in tables_of(commit)]
        small += [tokenizer_key(commit.tokenizer.sha256) for commit in commits if commit.tokenizer]
        there = {stat.key for root in self.places for stat in root.storage.list() if not is_data(stat.key)}
        for key in sorted(set(small) - there):
            self.findings.append(Finding(key, storage.url, "it is missing", "", "there is no copy of it"))

    def _commits(self) -> list[Commit]:
        storage, newest = self.storage, self.dataset.commit
        found = list(self.dataset.log.readable_versions(newest, info=self.dataset.info, skip_damaged=True))
        for name in list_tags(storage):
            with suppress(DatastoreError):
                found.append(read_tagged(storage, name))
        return found

    def _homes(self, path: str) -> list[Root]:
        """Return the roots that should have `path`, as far as they are there."""
        there = {root.id for root in self.places}
        return [root for root in self.storage.homes(path) if root.id in there]

    def _look(self, file: StoredFile, room: Room) -> dict[str, str]:
        """Return what is wrong with the copies of `file`, by the id of their root."""
        faults = {}
        for root in self._homes(file.key):
            bad = check_blocks(root.storage, file, chosen=range(len(file)), room=room)
            if bad:
                block = "" if bad[0].block is None or len(file) < 2 else f"block {bad[0].block}: "
                faults[root.id] = f"{block}{bad[0].reason}"
            self.copies += 1
            self.bytes += file.size_bytes
        return faults

    def _mend(self, file: StoredFile, faults: Mapping[str, str], rebuilder: Rebuilder, *, dry_run: bool) -> None:
        rebuilt = rebuilder.rebuild(file)
        for root in self._homes(file.key):
            if root.id in faults:
                how, reason = (rebuilt.how, "") if rebuilt.data is not None else ("", rebuilt.how)
                if rebuilt.data is not None and not dry_run:
                    try:
                        root.storage.put(file.key, rebuilt.data.data)
                    except DatastoreError as error:
                        how, reason = "", str(error)
                self.findings.append(Finding(file.key, root.storage.url, faults[root.id], how, reason))

    def _tidy(self) -> None:
        """Remove copies from where they do not belong, now that all are where they do: a full disk sent them there."""
        if len(self.storage.roots()) == 1:
            return
        for root in self.places:
            strays = [
                stat.key
                for stat in root.storage.list()
                if stat.key in self.files and root.id not in {home.id for home in self._homes(stat.key)}
            ]
            for key in strays:
                root.storage.delete(key)

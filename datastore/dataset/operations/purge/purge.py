"""Purge: deleted documents are gone for good, their bytes, their ids, and every version that had them.

Each shard of which something is deleted is written again with those rows blank, at the same places, so that a run keeps
its map from step to sample. One commit makes these shards the dataset's and says that older versions have expired; then
their files are removed, and the journals of finished ingests cleared, all of it is read back, and a certificate stored.
What cannot be reached is not promised: copies, clones, backups, what the storage itself keeps of old objects, caches of
machines that read the dataset, checkpoints of models that saw it, and the files that it was ingested from.

A purge that is cut off leaves the old version or the new one; the next one finishes what it had begun.
"""

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter

import msgspec
import pyarrow.compute as pc

from datastore.dataset.elsewhere import Crew, crew_of, received, sent
from datastore.dataset.journals import journal_files
from datastore.dataset.log.commits import read_history
from datastore.dataset.log.keys import certificate_key
from datastore.dataset.log.manifest import Commit, sum_refs
from datastore.dataset.operations.delete import FoundDocuments, commit_deletion, find_documents
from datastore.dataset.operations.purge.blank import BlankedShard, blank_shard
from datastore.dataset.operations.purge.plan import (
    PurgeCertificate,
    deleted_shards,
    end_of_text,
    find_leftovers,
    finish_plan,
    forget_plan,
    keep_plan,
    list_certificates,
    list_plans,
    require_all_places,
    tags_before,
)
from datastore.dataset.operations.selection import Selection
from datastore.dataset.operations.transaction import (
    DatasetLike,
    draft_commit,
    explain_expiry,
    open_for_change,
    publish,
    remove_orphans,
    require_unchanged,
)
from datastore.dataset.shards.info import ShardInfo
from datastore.dataset.shards.inventory import data_paths, files_of
from datastore.dataset.shards.parity_groups import drop_parity
from datastore.dataset.shards.segment_changes import replace_shards
from datastore.dataset.snapshot import Dataset
from datastore.digest import sha256_hex
from datastore.engines.engine import Engine, Tell
from datastore.errors import ConfigError, ConflictError, MissingError
from datastore.host import package_name
from datastore.storage.base import Storage
from datastore.storage.wrappers import is_link
from datastore.threads import in_parallel
from datastore.units import Progress, telling

__all__ = ["PurgeReport", "finish_purges", "purge"]

_REWRITERS = 4
"""Shards that are written again at a time; each is in memory, twice."""

_ABANDONED_S = 86_400.0
"""A plan of this age that was not committed will not be."""

_SHOWN = 5


@dataclass(frozen=True, slots=True)
class PurgeReport:
    """What a purge did, or would do."""

    url: str
    version: int
    """The newest version; the one that the purge made, if it made one."""

    committed: bool
    documents: int
    """Documents that were purged; of a dry run, deleted ones in shards that would be written again."""

    tokens: int
    """Of them; of a dry run, of those that would be deleted first."""

    shards: int
    """Shards written again."""

    oldest: int
    """The oldest version that can be read; before it, of a dry run."""

    tags: tuple[str, ...]
    """Tags that went, or would go, with their versions."""

    certificate: PurgeCertificate | None = None
    certificate_key: str = ""
    parity_files: int = 0
    """Parity files that went: what their groups protected of other files needs `protect` again."""

    resumed: tuple[PurgeCertificate, ...] = ()
    """Certificates of purges that had been cut off, and were finished first."""

    unfinished_ingests: tuple[str, ...] = ()
    """Ingests that no version knows; what they have read is not looked at."""

    unnamed_files: int = 0
    """Shards and documents files that no version knows: of a writer at work, or of one that was killed."""

    seconds: float = 0.0


def purge(
    target: DatasetLike,
    *,
    ids: Iterable[str] | None = None,
    sources: Iterable[str] = (),
    where: "str | pc.Expression | None" = None,
    drop_tags: bool = False,
    dry_run: bool = False,
) -> PurgeReport:
    """Remove for good what is deleted from `target`; first delete what `ids`, `sources` and `where` mean, as `delete`.

    Versions from before cannot be read any more, and nothing that a `delete`, an `overwrite` or a `compact` took out can
    be brought back. If there is nothing to purge, nothing is committed. With `dry_run` the report says what would go.

    Raises:
        ConfigError: tags name versions that would go, and `drop_tags` is not set; or the documents lie in the dataset
            from which this one was cloned.
        MissingError: no document has one of the ids, nor had one that was purged before.
        ConflictError: another operation changed the same shards meanwhile; what was deleted stays deleted.
        CorruptError: a file is damaged; or what was removed or made blank was found all the same.
        StorageError: a place of the dataset cannot be reached, or failed. Purge again to finish.
    """
    patterns = tuple(sources)
    nothing = ids is None and not patterns and where is None
    selection = None if nothing else Selection.of(ids=ids, sources=patterns, where=where)
    return purge_selected(target, selection, drop_tags=drop_tags, dry_run=dry_run)


def purge_selected(
    target: DatasetLike,
    selection: Selection | None = None,
    *,
    drop_tags: bool = False,
    dry_run: bool = False,
    engine: Engine | None = None,
    progress: Progress | None = None,
) -> PurgeReport:
    """Purge what `selection` means, as `purge`; `progress` gets the bytes of shards written again, and of all that are to be.

    With an `engine` other processes write the shards again; the rest is done here.

    Raises:
        ConfigError, MissingError, ConflictError, CorruptError, StorageError: as `purge`.
    """
    started = time.monotonic()
    dataset = open_for_change(target)
    require_all_places(dataset.storage)
    with explain_expiry(dataset, operation="purge"):
        resumed = () if dry_run else finish_purges(dataset)
        found = _found(dataset, selection)
        report = replace(_outlook(dataset, found), resumed=resumed)
        if not dry_run:
            _require_no_tags(report.tags, drop_tags=drop_tags)
            if found.rows:
                dataset = dataset.at(commit_deletion(dataset, found))
            blanked = _blanked(dataset, crew_of(dataset, target, engine) if engine else None, progress)
            report = _purged(dataset, blanked, report, drop_tags=drop_tags)
    return replace(report, seconds=time.monotonic() - started)


def _outlook(dataset: Dataset, found: FoundDocuments) -> PurgeReport:
    """Return what there is to purge once `found` is deleted."""
    old = deleted_shards(dataset, blank=False)
    touched = {shard.uid for shard in old}.union(found.rows)
    return PurgeReport(
        url=dataset.url,
        version=dataset.version,
        committed=False,
        documents=found.documents + sum(dataset.deletions.rows(shard.uid).size for shard in old),
        tokens=found.tokens,
        shards=len(touched),
        oldest=dataset.commit.min_version,
        tags=tags_before(dataset.storage, dataset.version + 1) if touched else (),
    )


def finish_purges(dataset: Dataset) -> tuple[PurgeCertificate, ...]:
    """Finish the purges of `dataset` that were committed and then cut off; return their certificates.

    Plans that will never be committed are removed: another commit has their version, or they are a day old.

    Raises:
        CorruptError, StorageError: as `purge`.
    """
    storage = dataset.storage
    plans = list_plans(storage)
    certified = {certificate.version for certificate in list_certificates(storage)} if plans else set[int]()
    finished = []
    for plan, stored_at in plans:
        try:
            committed = dataset.log.stored(plan.version).commit.config_digest == plan.digest
            abandoned = not committed
        except MissingError:
            committed, abandoned = False, 0 < stored_at < time.time() - _ABANDONED_S
        if abandoned or (committed and plan.version in certified):
            forget_plan(storage, plan)
        elif committed:
            finished.append(finish_plan(dataset, plan).certificate)
    return tuple(finished)


def _found(dataset: Dataset, selection: Selection | None) -> FoundDocuments:
    """Return what is to be deleted first; nothing, if nothing is given."""
    if selection is None:
        return FoundDocuments()
    found = find_documents(dataset, selection)
    if found.missing:
        purged = {digest for certificate in list_certificates(dataset.storage) for digest in certificate.ids_sha256}
        missing = [name for name in found.missing if sha256_hex(name.encode()) not in purged]
        if missing:
            raise MissingError(
                f"{len(missing):,} of the ids are those of no document, so nothing was purged",
                url=dataset.url,
                version=dataset.version,
                missing=missing[:_SHOWN],
                hint="Correct them. What is deleted already needs no naming: purge without ids.",
            )
    return found


def _blanked(dataset: Dataset, crew: Crew | None, progress: Progress | None) -> list[BlankedShard]:
    """Store the shards again of which something is deleted, with that blank."""
    touched = deleted_shards(dataset, blank=False)
    total = sum(shard.size_bytes for shard in touched)
    if crew is None:
        written = in_parallel(partial(_blank, dataset), touched, threads=_REWRITERS)
        return list(telling(written, progress, size=lambda each: each.shard.size_bytes, total=total))
    answers = crew.spread(blank_elsewhere, ((shard, {"shard": shard.path}) for shard in touched), answer=BlankedShard)
    told = telling(answers, progress, size=lambda answer: answer[1].shard.size_bytes, total=total)
    return [each for _, each in sorted(told, key=itemgetter(0))]


def blank_elsewhere(order: bytes, _: Tell) -> bytes:
    """Store the ordered shard again with what is deleted blank."""
    return sent(_blank(*received(order, ShardInfo)))


def _blank(dataset: Dataset, shard: ShardInfo) -> BlankedShard:
    if is_link(shard.path):
        raise ConfigError(
            "the documents lie in the dataset from which this one was cloned",
            url=dataset.url,
            shard=shard.path,
            hint="Purge that one; `compact` gives this one shards of its own.",
        )
    rows = dataset.deletions.rows(shard.uid)
    return blank_shard(dataset.storage, shard, rows, end_of_text=end_of_text(dataset))


def _purged(dataset: Dataset, blanked: Sequence[BlankedShard], report: PurgeReport, *, drop_tags: bool) -> PurgeReport:
    """Commit that what is `blanked` stands where it stood, and remove what is left of it."""
    storage = dataset.storage
    plans: list[PurgeCertificate] = []

    def build(newest: Commit | None) -> Commit:
        current = require_unchanged(dataset, newest, uids={each.shard.uid for each in blanked}, operation="purge")
        draft, plan = _planned(current, blanked)
        if plan is None:
            return current.commit
        _require_no_tags(plan.tags_removed, drop_tags=drop_tags)
        plans.append(keep_plan(storage, plan))
        return msgspec.structs.replace(draft, min_version=plan.oldest, config_digest=plans[-1].digest)

    try:
        commit = publish(storage, dataset.info, build)
    except (ConfigError, ConflictError):
        _forget(storage, plans)  # Nothing of it is committed, for certain.
        remove_orphans(dataset, {each.shard.uid: [file.key for file in files_of([each.shard])] for each in blanked})
        raise
    _forget(storage, [plan for plan in plans if plan.digest != commit.config_digest])
    if not plans or plans[-1].digest != commit.config_digest:
        return replace(report, version=commit.version, documents=0, tokens=0, shards=0, tags=())
    plan = plans[-1]
    outcome = finish_plan(dataset.at(commit), plan)
    finish_purges(
        dataset.at(commit)
    )  # Of one that was killed before its commit, which this one has taken the place of.
    return replace(
        report,
        version=commit.version,
        committed=True,
        documents=plan.documents,
        tokens=plan.tokens,
        oldest=plan.oldest,
        tags=plan.tags_removed,
        parity_files=sum(key.startswith("parity/") for key in plan.files_removed),
        certificate=outcome.certificate,
        certificate_key=certificate_key(outcome.certificate.digest),
        unfinished_ingests=outcome.unfinished_ingests,
        unnamed_files=outcome.certificate.files_unnamed,
    )


def _planned(current: Dataset, blanked: Sequence[BlankedShard]) -> tuple[Commit, PurgeCertificate | None]:
    """Return the version in which `blanked` stand in the place of what they were, and what is to be removed then."""
    storage, before = current.storage, current.commit
    segments = replace_shards(storage, before.segments, {each.shard.uid: [each.shard] for each in blanked})
    draft = msgspec.structs.replace(
        draft_commit("purge", parent=before), segments=segments, totals=sum_refs(segments, before.deletions)
    )
    history = read_history(storage, before)
    left = find_leftovers(storage, history, draft)
    if not left.data:
        return draft, None
    strays = journal_files(storage, history) - {str(path) for path in data_paths(storage, segments).to_pylist()}
    # The other files of a group, and its parity file, would give back what is removed.
    parity, parity_files = drop_parity(storage, before, left.data)
    plan = PurgeCertificate(
        dataset=current.uuid,
        version=before.version + 1,
        oldest=left.oldest,
        oldest_before=before.min_version,
        begun=draft.time,
        writer=package_name(),
        documents=sum(each.documents for each in blanked),
        tokens=sum(each.tokens for each in blanked),
        ids_sha256=tuple(sorted(sha256_hex(name.encode()) for each in blanked for name in each.ids)),
        files_written=tuple(sorted(file.key for file in files_of(each.shard for each in blanked))),
        files_removed=(*sorted(strays.union(left.data)), *parity_files, *left.index),
        tags_removed=tags_before(storage, left.oldest),
    )
    return msgspec.structs.replace(draft, parity=parity), plan


def _forget(storage: Storage, plans: Iterable[PurgeCertificate]) -> None:
    for plan in plans:
        forget_plan(storage, plan)


def _require_no_tags(tags: Sequence[str], *, drop_tags: bool) -> None:
    if tags and not drop_tags:
        raise ConfigError(
            "tags name versions that hold what is to be purged",
            tags=list(tags),
            hint="Let them go with their versions (`drop_tags`), or remove them first.",
        )

"""The outcome of an ingest whose tasks are done: one commit, or the reason why there is none.

Another ingest may have brought some of the same files since this one was planned. So the commit itself, each time it
finds that another was faster, looks at what came in between, and gives way if that has files of its plan: what is left
is planned again. Nothing is ever there twice, whoever is faster.
"""

from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import msgspec
import pyarrow.compute as pc

from datastore.dataset.journal import Journal, Plan, TaskDone
from datastore.dataset.log.commits import CommitLog
from datastore.dataset.log.keys import DELETIONS
from datastore.dataset.log.manifest import Commit, TokenizerRef
from datastore.dataset.operations.append import add_shards
from datastore.dataset.operations.delete import find_documents
from datastore.dataset.operations.selection import Selection
from datastore.dataset.operations.transaction import draft_commit
from datastore.dataset.shards.deletions import add_deletions
from datastore.dataset.shards.info import ShardInfo
from datastore.dataset.snapshot import open_dataset
from datastore.errors import ConfigError, RejectedError
from datastore.formats.schema import encode_schema
from datastore.ingestion.destination import Destination, made_by_ingest, plan_of
from datastore.ingestion.quality.sieve import Sample, decode_samples, smallest
from datastore.ingestion.reading.documents import decode_rejects, encode_rejects
from datastore.ingestion.report import filtered_in, rejected_in
from datastore.ingestion.settings import IngestSettings
from datastore.ingestion.sinks.documents import RECORDS_SCHEMA
from datastore.ingestion.sinks.duplicates import without_duplicates
from datastore.storage.urls import join_url

__all__ = ["IngestOutcome", "Overtaken", "commit_ingest", "samples_of"]


class Overtaken(Exception):  # noqa: N818 - no error: nobody but `ingest` sees it
    """Another commit has changed which files of the plan are new: it is to be made again."""


@dataclass(frozen=True, slots=True)
class IngestOutcome:
    """What came of an ingest."""

    commit: Commit | None
    """The newest version; None if there is none."""

    shards: Sequence[ShardInfo]
    rejected: Counter[str]
    replaced: int = 0
    """Documents that were deleted, as their files have changed."""


def commit_ingest(
    target: Destination,
    plan: Plan,
    tasks: Sequence[TaskDone],
    *,
    settings: IngestSettings,
    tokenizer: TokenizerRef | None,
    changed: Collection[str] = (),
) -> IngestOutcome:
    """Commit the shards of `tasks`, which are all those of `plan` in its order; `changed` are files whose place they take.

    Raises:
        RejectedError: too many documents were bad.
        ConfigError: there is no document at all, and no dataset to leave as it is.
    """
    journal = Journal(target.storage, plan.ingest_id)
    found = without_duplicates(journal, tasks)
    rejected = rejected_in(tasks)
    if found.rejects:
        rejected["duplicate_id"] += len(found.rejects)
        if settings.on_error == "quarantine":
            journal.put_rejects("duplicates", encode_rejects(found.rejects))
    where = join_url(target.storage.url, journal.folder, "rejects") if settings.on_error == "quarantine" else ""
    documents = sum(task.documents for task in tasks) - len(found.rejects)
    filtered = filtered_in(tasks)
    if not documents and (filtered or rejected):
        raise _none_left(target, journal, rejected, filtered, where=where)
    _check_limit(documents + filtered.total(), rejected, settings, where=where)
    if settings.on_error == "fail" and found.rejects:
        first = found.rejects[0]
        raise RejectedError(
            "a document was rejected: duplicate_id",
            source=first.source,
            offset=first.offset,
            id=first.excerpt,
            hint="Correct it, or set `on_error` to quarantine or skip.",
        )
    if not found.shards:
        if target.newest is None or settings.operation == "overwrite":
            target.forget(plan.ingest_id)
            raise ConfigError(
                "the source is empty: there is no document in it",
                sources=list(plan.sources),
                hint="Name a folder with text in it.",
            )
        return IngestOutcome(target.newest, (), rejected)
    if settings.operation == "overwrite" and _is_all_of(target.newest, plan):
        return IngestOutcome(target.newest, (), rejected)
    base = _Base(target, plan, frozenset(changed) if settings.replace else None)
    commit = _commit(target, plan, found.shards, tokenizer, base=None if settings.operation == "overwrite" else base)
    return IngestOutcome(commit, found.shards, rejected, replaced=base.replaced)


def _none_left(
    target: Destination, journal: Journal, rejected: Counter[str], filtered: Counter[str], *, where: str
) -> RejectedError:
    """Return the error for a source of which nothing is left; where nothing was before, nothing is left."""
    if not filtered:
        return _all_rejected(target, journal, rejected, where=where)
    target.forget(journal.ingest_id)
    return RejectedError(
        "the filters have dropped all documents, so nothing was committed",
        dropped=filtered.total(),
        by=dict(filtered.most_common(5)),
        **({"rejected": rejected.total()} if rejected else {}),
        hint="Loosen the filters that dropped most.",
    )


def samples_of(target: Destination, plan: Plan, *, most: int) -> tuple[Sample, ...]:
    """Return of each rule of the filters at most so many samples of what it has dropped, over all tasks."""
    if not most or not plan.tasks:
        return ()
    found = (sample for raw in Journal(target.storage, plan.ingest_id).samples() for sample in decode_samples(raw))
    return tuple(smallest(found, most))


def _all_rejected(target: Destination, journal: Journal, rejected: Counter[str], *, where: str) -> RejectedError:
    """Return the error for a source without one good document; where nothing was before, nothing is left."""
    first = next((each for key, raw in journal.rejects() for each in decode_rejects(raw, where=key)), None)
    target.forget(journal.ingest_id)
    seen = {"source": first.source, "offset": first.offset, "begins": first.excerpt[:40]} if first else {}
    way = "Name the key of the text, `text_key=KEY`" if "missing_text" in rejected else "Correct the source"
    return RejectedError(
        "all documents were rejected, so nothing was committed",
        rejected=rejected.total(),
        reasons=dict(sorted(rejected.items())),
        **seen,
        hint=f"{way}{f'; all are described in {where}' if where and not target.fresh else ''}.",
    )


def _is_all_of(newest: Commit | None, plan: Plan) -> bool:
    """Return whether the dataset holds this very ingest, and nothing else: overwriting it again changes nothing."""
    return newest is not None and newest.ingest_id == plan.ingest_id and newest.operation in {"create", "overwrite"}


def _check_limit(documents: int, rejected: Counter[str], settings: IngestSettings, *, where: str) -> None:
    bad = rejected.total()
    ratio = bad / max(1, documents + bad)
    if ratio <= settings.max_reject_ratio:
        return
    enough = -(-ratio * 10_000 // 1) / 10_000
    look = f"Look at {where}, then correct" if where else "Correct"
    raise RejectedError(
        "too many documents were rejected, so nothing was committed",
        rejected=bad,
        of=documents + bad,
        reasons=dict(sorted(rejected.items())),
        max_reject_ratio=settings.max_reject_ratio,
        hint=f"{look} the source, or allow it: `max_reject_ratio={enough:g}`; what is done is kept for the next run.",
    )


def _commit(
    target: Destination,
    plan: Plan,
    shards: Sequence[ShardInfo],
    tokenizer: TokenizerRef | None,
    *,
    base: "_Base | None",
) -> Commit:
    Journal(target.storage, plan.ingest_id).require_plan()
    draft = draft_commit("append" if base else "overwrite", ingest_id=plan.ingest_id, config_digest=plan.reading_digest)
    if plan.kind == "records":
        schema = plan.record_schema or encode_schema(RECORDS_SCHEMA)
        draft = msgspec.structs.replace(draft, kind="records", record_schema=schema, tokenizer=tokenizer)
    else:
        draft = msgspec.structs.replace(draft, tokenizer=tokenizer)
    return add_shards(target.storage, shards, draft, base=base) if base else add_shards(target.storage, shards, draft)


class _Base:
    """The part that is kept of the version that a commit follows.

    With `changed` files, the documents of files of the plan are deleted from it. Which those are is decided anew for each version:
    another ingest may have brought some.
    """

    def __init__(self, target: Destination, plan: Plan, changed: frozenset[str] | None) -> None:
        self.replaced = 0
        self._target = target
        self._plan = plan
        self._changed = changed
        self._check = _overtaken(target, plan)

    def __call__(self, newest: Commit) -> Commit:
        self._check(newest)
        seen = self._target.newest.version if self._target.newest else 0
        if self._changed is None or (not self._changed and newest.version == seen):
            return newest
        storage = self._target.storage
        paths = sorted(file.path for file in self._plan.files)
        selection = Selection.of(ids=None, where=pc.field("source").isin(paths))
        found = find_documents(open_dataset(storage, version=newest.version), selection)
        self.replaced = found.documents
        if not found.rows:
            return newest
        return msgspec.structs.replace(
            newest,
            deletions=add_deletions(storage, newest.deletions, found.rows, lengths=found.lengths),
            features=tuple(sorted({*newest.features, DELETIONS})),
        )


def _overtaken(target: Destination, plan: Plan) -> Callable[[Commit], None]:
    """Return what raises Overtaken if the version that it is given brings files of `plan`, or lost what that left out.

    The shards alone would not tell: they may be called otherwise, and a compact may have put them together to others.
    """
    log = CommitLog(target.storage)
    known = target.newest.version if target.newest else 0
    prints = {file.fingerprint for file in plan.files}

    def check(newest: Commit) -> None:
        overtaken = False
        for version in range(known + 1, newest.version + 1):
            commit = newest if version == newest.version else log.read(version)
            if commit.operation == "overwrite":
                overtaken = bool(plan.known)
            if made_by_ingest(commit):
                theirs = plan_of(target.storage, commit)
                overtaken |= theirs is None or any(file.fingerprint in prints for file in theirs.files)
        if overtaken:
            raise Overtaken

    return check

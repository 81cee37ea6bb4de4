"""The end of an ingest: is what the tasks made good enough, and if so, one commit for all of it."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from datastore.dataset.journal import Journal, TaskDone
from datastore.dataset.log.commits import CommitLog
from datastore.dataset.log.manifest import Commit, TokenizerRef
from datastore.dataset.operations.append import Operation, commit_records, commit_shards
from datastore.dataset.shards.segment_file import ShardInfo
from datastore.errors import ConfigError, RejectedError
from datastore.formats.schema import decode_schema
from datastore.ingestion.destination import Target
from datastore.ingestion.duplicates import without_duplicates
from datastore.ingestion.plan import Plan
from datastore.ingestion.report import rejected_in
from datastore.ingestion.settings import IngestSettings
from datastore.ingestion.sinks import RECORDS_SCHEMA
from datastore.storage.resolve import join_url

__all__ = ["Outcome", "conclude"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of an ingest."""

    commit: Commit | None
    """The newest version; None if there is none."""

    shards: Sequence[ShardInfo]
    rejected: Counter[str]


def conclude(
    target: Target, plan: Plan, tasks: Sequence[TaskDone], *, settings: IngestSettings, tokenizer: TokenizerRef | None
) -> Outcome:
    """Commit the shards of `tasks`, which are all those of `plan` in its order.

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
            journal.put_rejects("duplicates", found.rejects)
    where = join_url(target.storage.url, journal.folder, "rejects") if settings.on_error == "quarantine" else ""
    _check_limit(sum(task.documents for task in tasks) - len(found.rejects), rejected, settings, where=where)
    if settings.on_error == "fail" and found.rejects:
        first = found.rejects[0]
        raise RejectedError(
            "a document was rejected: duplicate_id",
            source=first.source,
            offset=first.offset,
            id=first.excerpt,
            hint="Correct it, or set on_error to quarantine or skip.",
        )
    if not found.shards:
        if target.newest is None or settings.operation == "overwrite":
            raise ConfigError(
                "the source is empty: there is no document in it",
                sources=list(plan.sources),
                hint="Name a folder with text in it.",
            )
        return Outcome(target.newest, (), rejected)
    if settings.operation == "overwrite" and _is_all_of(target.newest, plan):
        return Outcome(target.newest, (), rejected)
    return Outcome(_commit(target, plan, found.shards, tokenizer, operation=settings.operation), found.shards, rejected)


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
        hint=f"{look} the source, or allow it: max_reject_ratio = {enough:g}; what is done is kept for the next run.",
    )


def _committed_meanwhile(target: Target, plan: Plan) -> Commit | None:
    """Return the newest version if another process has committed this ingest since ours began.

    Its shards alone would not tell: a compact may have put them together to others.
    """
    log = CommitLog(target.storage)
    newest = log.newest()
    known = target.newest.version if target.newest else 0
    found = None
    for version in range(known + 1, newest.version + 1 if newest else 0):
        commit = log.stored(version).commit
        if commit.ingest_id == plan.ingest_id:
            found = newest
        elif commit.operation == "overwrite":
            found = None
    return found


def _commit(
    target: Target, plan: Plan, shards: Sequence[ShardInfo], tokenizer: TokenizerRef | None, *, operation: Operation
) -> Commit:
    Journal(target.storage, plan.ingest_id).require_plan()
    already = _committed_meanwhile(target, plan) if operation == "append" else None
    if already is not None:
        return already
    if plan.kind == "records":
        return commit_records(
            target.storage,
            shards,
            schema=decode_schema(plan.record_schema) if plan.record_schema else RECORDS_SCHEMA,
            operation=operation,
            ingest_id=plan.ingest_id,
            config_digest=plan.reading_digest,
        )
    return commit_shards(
        target.storage,
        shards,
        tokenizer=tokenizer,
        operation=operation,
        ingest_id=plan.ingest_id,
        config_digest=plan.reading_digest,
    )

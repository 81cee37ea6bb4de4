"""`ingest`: from sources to a new version of a dataset, whole or not at all.

Plan, run, commit. Everything up to the commit can be interrupted and is picked up by the same call again, with any
number of workers; the commit happens once, and once it has happened the same call adds nothing.

`prepare` finds out everything that can be known, and refused, before anything is written. `commit_ingest` asks whether what
the tasks made is good enough, and if so, makes one commit of it.
"""

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import pyarrow as pa

from datastore.dataset.journal import Journal, Plan, TaskDone
from datastore.dataset.log.commits import CommitLog
from datastore.dataset.log.identity import create_dataset
from datastore.dataset.log.manifest import Commit, Kind, TokenizerRef
from datastore.dataset.operations.append import Operation, commit_records, commit_shards
from datastore.dataset.shards.files import put_tokenizer
from datastore.dataset.shards.info import ShardInfo
from datastore.errors import ConfigError, CorruptError, RejectedError
from datastore.formats.fitting import check_rows
from datastore.formats.huggingface import keep_features
from datastore.formats.schema import check_storable, decode_schema, encode_schema, no_rows
from datastore.host import cores
from datastore.ingestion.destination import Destination, TokenizerChoice, open_target
from datastore.ingestion.duplicates import without_duplicates
from datastore.ingestion.plan import changed_since, make_plan, work_items
from datastore.ingestion.reading.documents import decode_rejects, encode_rejects
from datastore.ingestion.reading.rows import require_rows, rows_schema
from datastore.ingestion.reading.sources import Listing, Roots, list_sources
from datastore.ingestion.report import IngestProgress, IngestReport, Tally, rejected_in, skipped_in
from datastore.ingestion.settings import IngestSettings, reading_digest
from datastore.ingestion.sinks import RECORDS_SCHEMA
from datastore.ingestion.tasks import Advance, Job
from datastore.ingestion.workers import run_orders
from datastore.storage.resolve import open_storage
from datastore.storage.statistics import add_statistics
from datastore.storage.urls import join_url

__all__ = ["IngestOutcome", "PreparedIngest", "commit_ingest", "ingest", "prepare"]


def ingest(
    sources: Sequence[str],
    to: str,
    *,
    settings: IngestSettings | None = None,
    progress: Callable[[IngestProgress], None] | None = None,
) -> IngestReport:
    """Add the documents of `sources` to the dataset at `to`, which is made if it is not there.

    `settings` default to `IngestSettings()`. `progress` is called in this thread, a few times a second at most per
    worker. Files that the dataset knows are left out; one that has changed is a new file, and its old documents stay.

    Raises:
        ConfigError: a setting or URL is wrong, a source is empty, or the dataset has another tokenizer or kind.
        MissingError: a source or the tokenizer does not exist.
        RejectedError: more documents were bad than the limit allows; nothing was committed.
        ConflictError: a source file changed meanwhile.
        StorageError: a source cannot be read or the dataset not be written. Run it again to go on.
    """
    started = time.monotonic()
    prepared = prepare(sources, to, settings or IngestSettings())
    if not prepared.plan.tasks:
        outcome = IngestOutcome(prepared.target.newest, (), Counter())
        return _report(prepared, {}, outcome, resumed=0, started=started)
    resumed = _begin(prepared)
    tally = Tally(work_items(prepared.plan), resumed, progress)
    try:
        done = _run(prepared, to, resumed, tally)
    except (ConfigError, CorruptError, RejectedError):
        prepared.target.forget(prepared.plan.ingest_id)  # The source is to be corrected, and then is another one.
        raise
    outcome = commit_ingest(
        prepared.target,
        prepared.plan,
        [done[task.id] for task in prepared.plan.tasks],
        settings=prepared.settings,
        tokenizer=prepared.tokenizer.ref if prepared.tokenizer else None,
    )
    report = _report(prepared, done, outcome, resumed=len(resumed), started=started)
    return replace(report, storage=add_statistics((report.storage, tally.storage)))


@dataclass(frozen=True, slots=True)
class PreparedIngest:
    """A planned ingest."""

    settings: IngestSettings
    roots: Roots
    target: Destination
    tokenizer: TokenizerChoice | None
    plan: Plan
    changed: Mapping[str, int]
    """Files that the dataset has in another state, and the last version that brought one."""

    def workers(self, tasks: int) -> int:
        """Return how many processes to use for that many tasks.

        Raises:
            ConfigError: several are asked for, but only this process sees the data.
        """
        urls = [self.target.storage.url, *self.roots.folders.values()]
        wanted = self.settings.workers
        if any(url.startswith("memory://") for url in urls):
            if wanted > 1:
                raise ConfigError("other processes cannot see memory://", workers=wanted, hint="Give `workers=1`.")
            return 1
        return max(1, min(tasks, wanted or cores()))

    def job(self, to: str, *, workers: int) -> Job:
        """Return what the workers need to know; `to` is the dataset's URL with credentials."""
        return Job(
            to=to,
            ingest_id=self.plan.ingest_id,
            kind=self.plan.kind,
            roots=self.roots,
            settings=self.settings,
            tokenizer=self.tokenizer.ref if self.tokenizer else None,
            record_schema=self.plan.record_schema,
            parallel=workers == 1,
        )


def _begin(prepared: PreparedIngest) -> dict[str, TaskDone]:
    """Store what the workers and the next run rely on; return the tasks that an earlier run has done."""
    storage, choice = prepared.target.storage, prepared.tokenizer
    create_dataset(storage)
    if choice is not None:
        put_tokenizer(storage, choice.raw, vocab_size=choice.ref.vocab_size, end_of_text=choice.ref.end_of_text)
    return Journal(storage, prepared.plan.ingest_id).begin(prepared.plan)


def _run(prepared: PreparedIngest, to: str, resumed: dict[str, TaskDone], tally: Tally) -> dict[str, TaskDone]:
    """Do what is not done yet; return all tasks by id."""
    done = dict(resumed)

    def take(step: Advance | TaskDone) -> None:
        if isinstance(step, TaskDone):
            done[step.task_id] = step
        tally.take(step)

    open_orders = list(work_items(prepared.plan, without=done))
    workers = prepared.workers(len(open_orders))
    run_orders(prepared.job(to, workers=workers), open_orders, workers=workers, report=take)
    return done


@dataclass(frozen=True, slots=True)
class IngestOutcome:
    """What came of an ingest."""

    commit: Commit | None
    """The newest version; None if there is none."""

    shards: Sequence[ShardInfo]
    rejected: Counter[str]


def _report(
    prepared: PreparedIngest, done: dict[str, TaskDone], outcome: IngestOutcome, *, resumed: int, started: float
) -> IngestReport:
    plan, before = prepared.plan, prepared.target.newest
    url = prepared.target.storage.url
    kept = bool(outcome.rejected) and prepared.settings.on_error == "quarantine"
    return IngestReport(
        url=url,
        version=outcome.commit.version if outcome.commit else 0,
        added=outcome.commit is not None and outcome.commit != before,
        ingest_id=plan.ingest_id if plan.tasks else "",
        kind=plan.kind,
        files=len(plan.files),
        known_files=plan.known,
        changed_files=len(prepared.changed),
        changed_since=max(prepared.changed.values(), default=0),
        skipped=dict(sorted((Counter(plan.skipped) + skipped_in(done.values())).items())),
        documents=sum(shard.documents for shard in outcome.shards),
        tokens=sum(shard.tokens for shard in outcome.shards),
        text_bytes=sum(task.text_bytes for task in done.values()),
        shards=len(outcome.shards),
        shard_bytes=sum(shard.size_bytes for shard in outcome.shards),
        rejected=dict(sorted(outcome.rejected.items())),
        rejects=join_url(url, Journal(prepared.target.storage, plan.ingest_id).folder, "rejects") if kept else "",
        tasks=len(plan.tasks),
        tasks_resumed=resumed,
        encoder=" and ".join(sorted({task.encoder for task in done.values()} - {""})),
        seconds=time.monotonic() - started,
        storage=prepared.target.storage.statistics(),
    )


def commit_ingest(
    target: Destination,
    plan: Plan,
    tasks: Sequence[TaskDone],
    *,
    settings: IngestSettings,
    tokenizer: TokenizerRef | None,
) -> IngestOutcome:
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
            journal.put_rejects("duplicates", encode_rejects(found.rejects))
    where = join_url(target.storage.url, journal.folder, "rejects") if settings.on_error == "quarantine" else ""
    documents = sum(task.documents for task in tasks) - len(found.rejects)
    if rejected and not documents:
        raise _all_rejected(target, journal, rejected, where=where)
    _check_limit(documents, rejected, settings, where=where)
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
    return IngestOutcome(
        _commit(target, plan, found.shards, tokenizer, operation=settings.operation), found.shards, rejected
    )


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


def _committed_meanwhile(target: Destination, plan: Plan) -> Commit | None:
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
    target: Destination,
    plan: Plan,
    shards: Sequence[ShardInfo],
    tokenizer: TokenizerRef | None,
    *,
    operation: Operation,
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


def prepare(sources: Sequence[str], to: str, settings: IngestSettings) -> PreparedIngest:
    """Return the ingest of `sources` into the dataset at `to`; only reads.

    Raises:
        ConfigError, MissingError, FormatError, CorruptError, StorageError: as `ingest`.
    """
    listing, roots = list_sources(sources, settings)
    if settings.take != "text":
        for file in listing.files:
            require_rows(file)
    target = open_target(to)
    tokenizer = target.choose_tokenizer(settings) if settings.take != "rows" else None
    kind: Kind = "tokens" if tokenizer or settings.take == "tokens" else "records"
    base = target if settings.operation == "append" else Destination(target.storage, None)
    history = tuple(base.ingests())
    base.require_kind(kind)
    if kind == "records" and settings.take == "text":
        base.require_schema(RECORDS_SCHEMA)
    plan = make_plan(
        listing,
        settings=settings,
        kind=kind,
        reading_digest=reading_digest(settings, tokenizer_sha256=tokenizer.ref.sha256 if tokenizer else ""),
        known=frozenset(file.fingerprint for _, plan in history for file in plan.files),
        record_schema=_record_schema(listing, roots, base, settings) if settings.take == "rows" else b"",
    )
    changed = changed_since(plan.files, history)
    return PreparedIngest(
        settings=settings, roots=roots, target=target, tokenizer=tokenizer, plan=plan, changed=changed
    )


def _record_schema(listing: Listing, roots: Roots, target: Destination, settings: IngestSettings) -> bytes:
    """Return the columns that all files must have: those of the dataset, or in a new one those of the first file.

    Raises:
        ConfigError: the first file does not have them; better now than after all the reading.
    """
    first = listing.files[0]
    if target.newest is not None and first.format == "jsonl":  # Each line is held against the columns as it is read.
        return target.newest.record_schema
    url, key = roots.locate(first.path)
    schema = rows_schema(open_storage(url), key, file=first, settings=settings)
    if target.newest is not None:
        check_rows(pa.Table.from_batches([no_rows(schema)]), decode_schema(target.newest.record_schema))
        return target.newest.record_schema
    check_storable(schema)
    return encode_schema(keep_features(schema))

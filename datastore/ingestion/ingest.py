"""`ingest`: from sources to a new version of a dataset, whole or not at all.

Plan, run, commit. Everything up to the commit can be interrupted and is picked up by the same call again, with any
number of workers; the commit happens once, and once it has happened the same call adds nothing.

`prepare` finds out everything that can be known, and refused, before anything is written. `commit_ingest` asks whether what
the tasks made is good enough, and if so, makes one commit of it.
"""

import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain

import msgspec
import pyarrow as pa

from datastore.dataset.journal import Journal, Plan, SourceFile, TaskDone
from datastore.dataset.log.identity import create_dataset
from datastore.dataset.log.manifest import Commit, Kind
from datastore.dataset.operations.expire import time_of
from datastore.dataset.shards.files import put_tokenizer
from datastore.document import encode
from datastore.errors import ConfigError, CorruptError, RejectedError
from datastore.formats.common import common_schema
from datastore.formats.fitting import check_rows
from datastore.formats.huggingface import keep_features
from datastore.formats.schema import check_storable, decode_schema, encode_schema, no_rows, with_wide_indices
from datastore.host import cores
from datastore.ingestion.destination import Destination, TokenizerChoice, chat_format_of, open_target
from datastore.ingestion.encoding.evaluations import read_contamination
from datastore.ingestion.encoding.template import ChatFormat
from datastore.ingestion.outcome import IngestOutcome, Overtaken, commit_ingest, samples_of
from datastore.ingestion.plan import changed_since, digest_after, known_files, make_plan, work_items
from datastore.ingestion.quality.contamination import Contamination
from datastore.ingestion.reading.rows import first_schema, is_table, require_rows, rows_schema
from datastore.ingestion.reading.sources import Listing, Roots, list_sources
from datastore.ingestion.reading.spool import Sources, spooled
from datastore.ingestion.report import IngestProgress, IngestReport, Tally, changed_in, filtered_in, skipped_in
from datastore.ingestion.settings import IngestSettings, filter_identities, filters_digest, reading_digest
from datastore.ingestion.sinks.chats import PAIRS_SCHEMA
from datastore.ingestion.sinks.documents import RECORDS_SCHEMA
from datastore.ingestion.tasks import Advance, Job
from datastore.ingestion.workers import run_orders
from datastore.storage.resolve import open_storage
from datastore.storage.statistics import add_statistics
from datastore.storage.urls import join_url
from datastore.threads import in_parallel

__all__ = ["PreparedIngest", "ingest", "prepare"]

_LOGGER = logging.getLogger(__name__)


def ingest(
    sources: Sources,
    to: str | os.PathLike[str],
    *,
    settings: IngestSettings | None = None,
    progress: Callable[[IngestProgress], None] | None = None,
) -> IngestReport:
    """Add the documents of `sources` to the dataset at `to`, which is made if it is not there.

    Sources are paths, URLs or globs; or one iterable of rows: dicts, or a `Dataset` or `IterableDataset` of Hugging Face
    `datasets`. Rows are first written to a file for temporary use, as several processes read them, and twice.
    `settings` default to `IngestSettings()`. `progress` is called in this thread, a few times a second at most per
    worker. Files that the dataset knows are left out, also those that another ingest brings meanwhile; one that has
    changed is a new file, and its old documents stay.

    Raises:
        ConfigError: a setting or URL is wrong, a source is empty, or the dataset has another tokenizer or kind.
        MissingError: a source or the tokenizer does not exist.
        RejectedError: more documents were bad than the limit allows; nothing was committed.
        ConflictError: a source file changed meanwhile.
        StorageError: a source cannot be read or the dataset not be written. Run it again to go on.
    """
    to = os.fspath(to)
    started = time.monotonic()
    settings = settings or IngestSettings()
    with spooled(sources) as named:
        return replace(_ingest(named, to, settings, progress), seconds=time.monotonic() - started)


def _ingest(
    sources: Sequence[str], to: str, settings: IngestSettings, progress: Callable[[IngestProgress], None] | None
) -> IngestReport:
    prepared = prepare(sources, to, settings)
    known = prepared.plan.known
    while True:
        try:
            report = _ingested(prepared, to, progress)
        except Overtaken:
            # What was committed meanwhile is known by now; what is left is planned, and done, again.
            prepared = prepare(sources, to, settings)
            continue
        overtaken = max(0, prepared.plan.known - known)
        return replace(report, overtaken_files=overtaken)


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

    chats: ChatFormat | None = None
    """How chats become text, if they are taken."""

    identities: tuple[str, ...] = ()
    """What the filters depend on beside their settings."""

    contamination: Contamination | None = None
    """What evaluations have, if they are kept out."""

    restored: Plan | None = None
    """The plan of a finished ingest that was lost or damaged, as it was."""

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
            chats=self.chats,
            identities=self.identities,
            contamination=self.contamination.digest if self.contamination else "",
            path=tuple(sys.path) if self.identities else (),
            parallel=workers == 1,
        )


def _ingested(prepared: PreparedIngest, to: str, progress: Callable[[IngestProgress], None] | None) -> IngestReport:
    """Do what is prepared; otherwise as `ingest`.

    Raises:
        Overtaken: another ingest was committed meanwhile that has some of the files; nothing was committed.
    """
    if prepared.restored is not None:
        Journal(prepared.target.storage, prepared.restored.ingest_id).keep_plan(prepared.restored)
    if not prepared.plan.tasks:
        return _report(prepared, {}, IngestOutcome(prepared.target.newest, (), Counter()), resumed=0)
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
        changed=prepared.changed,
    )
    report = _report(prepared, done, outcome, resumed=len(resumed))
    return replace(report, storage=add_statistics((report.storage, tally.storage)))


def _begin(prepared: PreparedIngest) -> dict[str, TaskDone]:
    """Store what the workers and the next run rely on; return the tasks that an earlier run has done."""
    storage, choice = prepared.target.storage, prepared.tokenizer
    create_dataset(storage)
    if choice is not None:
        put_tokenizer(storage, choice.raw, vocab_size=choice.ref.vocab_size, end_of_text=choice.ref.end_of_text)
    journal = Journal(storage, prepared.plan.ingest_id)
    if prepared.contamination is not None:
        journal.put_contamination(prepared.contamination.encode())
    return journal.begin(prepared.plan)


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


def _report(
    prepared: PreparedIngest, done: dict[str, TaskDone], outcome: IngestOutcome, *, resumed: int
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
        filtered=dict(sorted(filtered_in(done.values()).items())),
        changed=dict(sorted(changed_in(done.values()).items())),
        samples=samples_of(prepared.target, plan, most=prepared.settings.trace_filters),
        escaped=sum(task.escaped for task in done.values()),
        tasks=len(plan.tasks),
        tasks_resumed=resumed,
        encoder=" and ".join(sorted({task.encoder for task in done.values()} - {""})),
        overtaken_files=0,
        replaced_documents=outcome.replaced,
        seconds=0.0,
        storage=prepared.target.storage.statistics(),
    )


def prepare(sources: Sequence[str], to: str, settings: IngestSettings) -> PreparedIngest:
    """Return the ingest of `sources` into the dataset at `to`; only reads.

    Raises:
        ConfigError, MissingError, FormatError, CorruptError, StorageError: as `ingest`.
    """
    target = open_target(to)
    listing, roots = list_sources(sources, settings, encodes=target.holds_texts() and settings.operation == "append")
    settings = msgspec.structs.replace(settings, take=listing.take, tokens_key=listing.tokens_key)
    is_chat = settings.take in {"chats", "pairs"}
    if settings.replace and settings.take in {"rows", "tokens"}:
        raise ConfigError(
            "rows and tokens that are taken over do not say which file they are from, so none can be replaced",
            take=settings.take,
            hint="Leave out `replace`; or replace all that the dataset holds: `operation=overwrite`.",
        )
    if settings.take != "text":
        for file in listing.files:
            require_rows(file)
    tokenizer = target.choose_tokenizer(settings) if settings.take != "rows" else None
    chats = chat_format_of(tokenizer, settings) if is_chat else None
    of_pairs = settings.take == "pairs"
    kind: Kind = "tokens" if (tokenizer or settings.take == "tokens") and not of_pairs else "records"
    base = target if settings.operation == "append" else Destination(target.storage, None)
    base.require_kind(kind)
    if of_pairs or (kind == "records" and settings.take == "text"):
        base.require_schema(PAIRS_SCHEMA if of_pairs else RECORDS_SCHEMA)
    found_filters = filter_identities(settings)
    contamination = read_contamination(settings, tokenizer.raw if tokenizer else None)
    deciding = (*found_filters, *([contamination.digest] if contamination else []))
    planned = partial(
        make_plan,
        listing,
        settings=settings,
        kind=kind,
        reading_digest=reading_digest(
            settings,
            tokenizer_sha256=tokenizer.ref.sha256 if tokenizer else "",
            chats=encode(chats) if chats else b"",
            filters=deciding,
        ),
        record_schema=encode_schema(PAIRS_SCHEMA)
        if of_pairs
        else _record_schema(listing, roots, base, settings)
        if settings.take == "rows"
        else b"",
    )
    found = tuple(base.ingests())
    history = [(commit.version, each) for commit, each in found if each is not None]
    known, since = known_files(found, listing.files)
    if since:
        planned = partial(planned, reading_digest=digest_after(planned.keywords["reading_digest"], since))
    plan, restored = planned(known=known), None
    lost = [commit for commit, each in found if each is None]
    if lost and plan.files:
        restored = plan if any(commit.ingest_id == plan.ingest_id for commit in lost) else None
        again = plan.files if restored else _recognized(plan.files, base, lost, history)
        plan = planned(known=known.union(file.fingerprint for file in again))
    plan = msgspec.structs.replace(plan, filters_digest=filters_digest(settings, deciding))
    if settings.operation == "append" and not settings.begin_anew:
        target.require_same_filters(plan)
    return PreparedIngest(
        settings=settings,
        roots=roots,
        target=target,
        tokenizer=tokenizer,
        plan=plan,
        changed=changed_since(plan.files, history, in_any_state=settings.replace),
        restored=restored,
        chats=chats,
        identities=found_filters,
        contamination=contamination,
    )


def _recognized(
    files: Sequence[SourceFile], base: Destination, lost: Sequence[Commit], history: Sequence[tuple[int, Plan]]
) -> list[SourceFile]:
    """Return those of `files` that the ingests of the versions `lost`, whose plans are gone, have brought.

    They are known by their names in the dataset's documents, and that they have not changed since.
    """
    planned = {file.path for _, plan in history for file in plan.files}
    names, since = base.sources() - planned, max(map(time_of, lost))
    found = [file for file in files if file.path in names and file.modified <= since]
    _LOGGER.warning(
        "the journal of the ingest that made version %d is lost or damaged: its files are known by their names, %d of %d",
        lost[0].version,
        len(found),
        len(files),
    )
    return found


def _record_schema(listing: Listing, roots: Roots, target: Destination, settings: IngestSettings) -> bytes:
    """Return the columns that all files must have: those of the dataset, or in a new one those of the first file.

    Their types are such that the values of all tables fit, and categories are numbered by 32 bits: of each table that
    part is read which says its columns.

    Raises:
        ConfigError: the first file does not have them; better now than after all the reading.
    """
    # Each line is held against the columns as it is read.
    if target.newest is not None and not is_table(listing.files[0]):
        return target.newest.record_schema

    def read(file: SourceFile) -> pa.Schema:
        url, key = roots.locate(file.path)
        return rows_schema(open_storage(url), key, file=file, settings=settings)

    first, schema = first_schema(listing.files, read)
    if target.newest is not None:
        check_rows(pa.Table.from_batches([no_rows(schema)]), decode_schema(target.newest.record_schema))
        return target.newest.record_schema
    if is_table(first):
        others = in_parallel(read, [file for file in listing.files if file.format == first.format and file != first])
        schema = with_wide_indices(common_schema(chain([schema], others)))
    check_storable(schema)
    return encode_schema(keep_features(schema))

"""`ingest`: from sources to a new version of a dataset, whole or not at all.

Plan, run, commit. Everything up to the commit can be interrupted and is picked up by the same call again, with any
number of workers; the commit happens once, and once it has happened the same call adds nothing.

`prepare` finds out everything that can be known, and refused, before anything is written. `commit_ingest` asks whether what
the tasks made is good enough, and if so, makes one commit of it.
"""

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from datastore.dataset.journal import Journal, TaskDone
from datastore.dataset.log.identity import create_dataset
from datastore.dataset.shards.files import put_tokenizer
from datastore.engines.engine import Engine
from datastore.engines.local import LocalEngine
from datastore.errors import ConfigError, ConflictError, CorruptError, RejectedError
from datastore.ingestion.outcome import IngestOutcome, Overtaken, commit_ingest, samples_of
from datastore.ingestion.plan import Share, work_items
from datastore.ingestion.preparation import PreparedIngest, prepare
from datastore.ingestion.reading.spool import Sources, spooled
from datastore.ingestion.report import (
    IngestProgress,
    IngestReport,
    Tally,
    changed_in,
    filtered_in,
    lengths_in,
    skipped_in,
)
from datastore.ingestion.running import run_here, run_on
from datastore.ingestion.settings import IngestSettings
from datastore.ingestion.tasks import Advance
from datastore.storage.statistics import add_statistics
from datastore.storage.urls import join_url

__all__ = ["ingest"]


def ingest(
    sources: Sources,
    to: str | os.PathLike[str],
    *,
    settings: IngestSettings | None = None,
    engine: Engine | None = None,
    share: str = "",
    progress: Callable[[IngestProgress], None] | None = None,
) -> IngestReport:
    """Add the documents of `sources` to the dataset at `to`, which is made if it is not there.

    Sources are paths, URLs or globs; or one iterable of rows: dicts, or a `Dataset` or `IterableDataset` of Hugging Face
    `datasets`. Rows are first written to a file for temporary use, as several processes read them, and twice.
    `settings` default to `IngestSettings()`. `progress` is called in this thread, a few times a second at most per
    worker. Files that the dataset knows are left out, also those that another ingest brings meanwhile; one that has
    changed is a new file, and its old documents stay.

    The work is done by `settings.workers` processes of this machine, or by `engine`. With a `share`, such as `3/8`, only
    that part of it is done, for eight machines that know nothing of each other; the one that ends last commits. The
    share `none` does none of it, and only commits.

    Raises:
        ConfigError: a setting or URL is wrong, a source is empty, or the dataset has another tokenizer or kind.
        MissingError: a source or the tokenizer does not exist.
        RejectedError: more documents were bad than the limit allows; nothing was committed.
        ConflictError: a source file changed meanwhile; or there is nothing to commit yet, since a share is not done.
        StorageError: a source cannot be read or the dataset not be written. Run it again to go on.
    """
    to = os.fspath(to)
    started = time.monotonic()
    settings = settings or IngestSettings()
    how = _How(engine, Share.parse(share) if share else None, progress)
    with spooled(sources) as named:
        return replace(_ingest(named, to, settings, how), seconds=time.monotonic() - started)


@dataclass(frozen=True, slots=True)
class _How:
    """Who does the work, and which part of it."""

    engine: Engine | None
    share: Share | None
    progress: Callable[[IngestProgress], None] | None


def _ingest(sources: Sequence[str], to: str, settings: IngestSettings, how: _How) -> IngestReport:
    if how.progress is not None:
        how.progress(IngestProgress.at_first())
    prepared = prepare(sources, to, settings)
    known = prepared.plan.known
    while True:
        try:
            report = _ingested(prepared, to, how)
        except Overtaken:
            # What was committed meanwhile is known by now; what is left is planned, and done, again.
            prepared = prepare(sources, to, settings)
            continue
        overtaken = max(0, prepared.plan.known - known)
        return replace(report, overtaken_files=overtaken)


def _ingested(prepared: PreparedIngest, to: str, how: _How) -> IngestReport:
    """Do what is prepared; otherwise as `ingest`.

    Raises:
        Overtaken: another ingest was committed meanwhile that has some of the files; nothing was committed.
    """
    plan, target = prepared.plan, prepared.target
    if prepared.restored is not None:
        Journal(target.storage, prepared.restored.ingest_id).keep_plan(prepared.restored)
    unchanged = IngestOutcome(target.newest, (), Counter())
    if not plan.tasks:
        return _report(prepared, {}, unchanged, resumed=0)
    own = [task.id for task in plan.tasks] if how.share is None else how.share.tasks(plan)
    resumed = _begin(prepared, own)
    tally = Tally((item for item in work_items(plan) if item.task_id in set(own)), resumed, how.progress)
    try:
        done = _run(prepared, to, how, own, resumed, tally)
    except (ConfigError, CorruptError, RejectedError):
        if how.share is None:
            target.forget(plan.ingest_id)  # The source is to be corrected, and then is another one.
        raise
    left = _left_to_others(prepared, done)
    if left and how.share == Share(0, 0):
        raise ConflictError(
            "there are tasks that are not done, so nothing was committed",
            open=left,
            of=len(plan.tasks),
            hint="Do each share again that has failed: `--task i/n`. What is done is not done twice.",
        )
    tally.commit()
    outcome = unchanged if left else _commit(prepared, done)
    report = _report(prepared, done, outcome, resumed=len(resumed))
    return replace(report, tasks_open=left, cpu_s=tally.cpu_s, storage=add_statistics((report.storage, tally.storage)))


def _commit(prepared: PreparedIngest, done: Mapping[str, TaskDone]) -> IngestOutcome:
    return commit_ingest(
        prepared.target,
        prepared.plan,
        [done[task.id] for task in prepared.plan.tasks],
        settings=prepared.settings,
        tokenizer=prepared.tokenizer.ref if prepared.tokenizer else None,
        changed=prepared.changed,
    )


def _left_to_others(prepared: PreparedIngest, done: dict[str, TaskDone]) -> int:
    """Return how many tasks are not done; if it is none, add those of other shares to `done`, their files checked."""
    others = {task.id for task in prepared.plan.tasks} - done.keys()
    if not others:
        return 0
    journal = Journal(prepared.target.storage, prepared.plan.ingest_id)
    if left := len(others - journal.ended()):
        return left
    done |= journal.done(only=others)
    return len(others - done.keys())


def _begin(prepared: PreparedIngest, own: Sequence[str]) -> dict[str, TaskDone]:
    """Store what the workers and the next run rely on; return those of the tasks `own` that an earlier run has done."""
    storage, choice = prepared.target.storage, prepared.tokenizer
    create_dataset(storage)
    if choice is not None:
        put_tokenizer(storage, choice.raw, vocab_size=choice.ref.vocab_size, end_of_text=choice.ref.end_of_text)
    journal = Journal(storage, prepared.plan.ingest_id)
    if prepared.contamination is not None:
        journal.put_contamination(prepared.contamination.encode())
    return journal.begin(prepared.plan, only=frozenset(own))


def _run(
    prepared: PreparedIngest, to: str, how: _How, own: Sequence[str], resumed: dict[str, TaskDone], tally: Tally
) -> dict[str, TaskDone]:
    """Do those of the tasks `own` that are not done yet; return them all by id."""
    done = dict(resumed)

    def take(step: Advance | TaskDone) -> None:
        if isinstance(step, TaskDone):
            done[step.task_id] = step
        tally.take(step)

    wanted = set(own)
    items = [item for item in work_items(prepared.plan, without=done) if item.task_id in wanted]
    engine = how.engine
    if engine is not None:
        prepared.require_shared()
    elif (workers := prepared.workers(len(items))) > 1:
        engine = LocalEngine(workers)
    if engine is None:
        run_here(prepared.job(to), items, report=take)
    else:
        run_on(engine, prepared.job(to), items, report=take)
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
        lengths=lengths_in(done.values()),
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
        tasks_open=0,
        encoder=" and ".join(sorted({task.encoder for task in done.values()} - {""})),
        overtaken_files=0,
        replaced_documents=outcome.replaced,
        seconds=0.0,
        cpu_s={},
        storage=prepared.target.storage.statistics(),
    )

"""`ingest`: from sources to a new version of a dataset, whole or not at all.

Plan, run, commit. Everything up to the commit can be interrupted and is picked up by the same call again, with any
number of workers; the commit happens once, and once it has happened the same call adds nothing.
"""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from datastore.dataset.journal import Journal, TaskDone
from datastore.dataset.log.identity import create_dataset
from datastore.ingest.conclude import Outcome, conclude
from datastore.ingest.prepare import Prepared, prepare
from datastore.ingestion.plan import orders
from datastore.ingestion.report import IngestReport, Progress, Tally, skipped_in
from datastore.ingestion.settings import IngestSettings
from datastore.ingestion.tasks import Advance
from datastore.ingestion.workers import run_orders
from datastore.storage.resolve import join_url
from datastore.storage.statistics import add_statistics
from datastore.store.tokenizers import put_tokenizer

__all__ = ["ingest"]


def ingest(
    sources: Sequence[str],
    to: str,
    *,
    settings: IngestSettings | None = None,
    progress: Callable[[Progress], None] | None = None,
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
        outcome = Outcome(prepared.target.newest, (), Counter())
        return _report(prepared, {}, outcome, resumed=0, started=started)
    resumed = _begin(prepared)
    tally = Tally(orders(prepared.plan), resumed, progress)
    done = _run(prepared, to, resumed, tally)
    outcome = conclude(
        prepared.target,
        prepared.plan,
        [done[task.id] for task in prepared.plan.tasks],
        settings=prepared.settings,
        tokenizer=prepared.tokenizer.ref if prepared.tokenizer else None,
    )
    report = _report(prepared, done, outcome, resumed=len(resumed), started=started)
    return replace(report, storage=add_statistics((report.storage, tally.storage)))


def _begin(prepared: Prepared) -> dict[str, TaskDone]:
    """Store what the workers and the next run rely on; return the tasks that an earlier run has done."""
    storage, choice = prepared.target.storage, prepared.tokenizer
    create_dataset(storage)
    if choice is not None:
        put_tokenizer(storage, choice.raw, vocab_size=choice.ref.vocab_size, end_of_text=choice.ref.end_of_text)
    return Journal(storage, prepared.plan.ingest_id).begin(prepared.plan)


def _run(prepared: Prepared, to: str, resumed: dict[str, TaskDone], tally: Tally) -> dict[str, TaskDone]:
    """Do what is not done yet; return all tasks by id."""
    done = dict(resumed)

    def take(step: Advance | TaskDone) -> None:
        if isinstance(step, TaskDone):
            done[step.task_id] = step
        tally.take(step)

    open_orders = list(orders(prepared.plan, without=done))
    workers = prepared.workers(len(open_orders))
    run_orders(prepared.job(to, workers=workers), open_orders, workers=workers, report=take)
    return done


def _report(
    prepared: Prepared, done: dict[str, TaskDone], outcome: Outcome, *, resumed: int, started: float
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

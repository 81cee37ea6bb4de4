"""The card of a version: what it is made of, by which settings, what was left out, and how to make it again.

All of it stands in the log and in the journals of the ingests, so it can be asked for at any time; a purge takes the counts of an
ingest, and the card says so. It begins with the front matter that the Hugging Face Hub reads.
"""

import json
import os
import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

from datastore.dataset.journal import Journal, Plan, TaskDone
from datastore.dataset.log.manifest import Commit
from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.errors import CorruptError, FormatError
from datastore.storage.base import Storage
from datastore.units import format_bytes, format_count

__all__ = ["card"]

_MOST_SOURCES = 50
"""Named of one ingest."""

_SIZES = (
    *((10**3, "n<1K"), (10**4, "1K<n<10K"), (10**5, "10K<n<100K"), (10**6, "100K<n<1M"), (10**7, "1M<n<10M")),
    *((10**8, "10M<n<100M"), (10**9, "100M<n<1B"), (10**10, "1B<n<10B"), (10**11, "10B<n<100B"), (10**12, "100B<n<1T")),
)


def card(url: str | os.PathLike[str]) -> str:
    """Return, as Markdown, what the version at `url` is made of: sources, licences, filters, counts, how to make it again.

    Reads the log, and what each ingest of its history has noted: two small files and one per task.

    Raises:
        MissingError: there is no dataset or version.
        CorruptError, FormatError: it cannot be read.
    """
    dataset = open_dataset(os.fspath(url))
    made = [made for made in map(_Ingest.of, _history(dataset)) if made is not None]
    parts = [
        _front_matter(dataset, made),
        f"# {dataset.url.rstrip('/').rpartition('/')[2] or 'A dataset'}\n",
        _table(("", ""), _facts(dataset)),
        *(_section("Sources", _sources(made)) if made else ()),
        *(_section("Left out", rows) if (rows := _left_out(made)) else ()),
        *(_section("Lengths of texts", rows) if (rows := _lengths(made)) else ()),
        *(_again(dataset, made) if made else ()),
    ]
    return "\n".join(parts).rstrip() + "\n"


@dataclass(frozen=True, slots=True)
class _Ingest:
    """What is known of the ingest that made a version."""

    commit: Commit
    plan: Plan | None
    done: tuple[TaskDone, ...]

    @classmethod
    def of(cls, found: tuple[Storage, Commit]) -> "_Ingest | None":
        storage, commit = found
        if not commit.ingest_id:
            return None
        journal = Journal(storage, commit.ingest_id)
        try:
            plan = journal.find_plan()
        except (CorruptError, FormatError):
            plan = None
        tasks = {task.id for task in plan.tasks} if plan else set()
        keys = (stat.key for stat in storage.list(f"{journal.folder}/done"))
        return cls(commit, plan, tuple(task for task in _sound(journal, keys) if task.task_id in tasks))

    @property
    def settings(self) -> Mapping[str, Any]:
        """Those that differ from what they are if left out."""
        return self.plan.settings if self.plan else {}


def _sound(journal: Journal, keys: Iterator[str]) -> Iterator[TaskDone]:
    for key in keys:
        try:
            found = journal.task(key)
        except (CorruptError, FormatError):
            continue
        if found is not None:
            yield found


def _history(dataset: Dataset) -> list[tuple[Storage, Commit]]:
    """Return the versions, from the oldest on, that this one is made of: none from before the last overwrite."""
    found = []
    for commit in dataset.log.history(dataset.commit):
        found.append((dataset.storage, commit))
        if commit.operation in {"create", "overwrite"}:
            break
    # One ingest may stand in several commits: a compact keeps its name.
    first = {commit.ingest_id: (storage, commit) for storage, commit in found}
    return list(reversed(first.values()))


def _front_matter(dataset: Dataset, made: Sequence[_Ingest]) -> str:
    licences = {str(one.settings.get("license", "")).lower() for one in made}
    size = next((name for below, name in _SIZES if dataset.totals.documents < below), "n>1T")
    lines = []
    if any(licences):
        # The Hub knows one licence; of documents that have several, or of some that have none, it is another one.
        lines = [f"license: {json.dumps(licences.pop() if len(licences) == 1 else 'other')}"]
    return "\n".join(["---", *lines, "size_categories:", f"- {size}", "---", ""])


def _facts(dataset: Dataset) -> list[tuple[str, str]]:
    totals, tokenizer, origin = dataset.totals, dataset.commit.tokenizer, dataset.commit.origin
    documents, tokens = totals.documents - totals.deleted_documents, totals.tokens - totals.deleted_tokens
    return [
        ("version", f"{dataset.version}, {dataset.commit.time[:10]}"),
        ("holds", dataset.kind),
        ("documents", f"{documents:,}"),
        *([("tokens", f"{tokens:,} ({format_count(tokens)})")] if dataset.kind == "tokens" else []),
        *([("deleted", f"{totals.deleted_documents:,} more documents")] if totals.deleted_documents else []),
        ("size", f"{format_bytes(totals.size_bytes)} in {totals.shards:,} shards"),
        *([("tokenizer", f"{tokenizer.vocab_size:,} ids, sha256 `{tokenizer.sha256}`")] if tokenizer else []),
        *([("cloned from", f"{origin.url}, version {origin.version}")] if origin else []),
        ("uuid", f"`{dataset.uuid}`"),
    ]


def _sources(made: Sequence[_Ingest]) -> str:
    rows = []
    for one in made:
        documents = sum(task.documents for task in one.done)
        names = one.plan.sources if one.plan else ("(its journal is gone)",)
        for place, name in enumerate(names[:_MOST_SOURCES]):
            counts = (f"{len(one.plan.files):,}", f"{documents:,}" if one.done else "") if one.plan else ("", "")
            shown = (str(one.commit.version), f"`{name}`", *counts, str(one.settings.get("license", "")))
            rows.append(shown if place == 0 else ("", f"`{name}`", "", "", ""))
        if len(names) > _MOST_SOURCES:
            rows.append(("", f"... and {len(names) - _MOST_SOURCES:,} more", "", "", ""))
    return _table(("since version", "source", "files", "documents", "licence"), rows)


def _left_out(made: Sequence[_Ingest]) -> str:
    rows = []
    for what, name in (
        ("rejected", "rejected"),
        ("filtered", "dropped by a filter"),
        ("changed", "changed by a filter"),
    ):
        sums: Counter[str] = Counter()
        for one in made:
            for task in one.done:
                sums.update(getattr(task, what))
        rows += [(name, f"`{reason}`", f"{count:,}") for reason, count in sorted(sums.items()) if count]
    return _table(("", "why", "documents"), rows) if rows else ""


def _lengths(made: Sequence[_Ingest]) -> str:
    counts: Counter[int] = Counter()
    for one in made:
        for task in one.done:
            counts.update(dict(enumerate(task.lengths)))
    present = [bits for bits, count in counts.items() if count]
    if not present:
        return ""
    bits = range(min(present), max(present) + 1)
    most, total = max(counts.values()), sum(counts.values())
    rows = [
        (
            f"up to {format_bytes(1 << bit)}",
            f"{counts[bit]:,}",
            f"{below / total:.0%}",
            "#" * (24 * counts[bit] // most),
        )
        for bit, below in zip(bits, accumulate(counts[bit] for bit in bits), strict=True)
    ]
    return _table(("length", "documents", "up to here", ""), rows)


def _again(dataset: Dataset, made: Sequence[_Ingest]) -> Iterator[str]:
    """Yield how to make it again."""
    yield "\n## How to make it again\n"
    yield "The same sources give the same shards, on any number of machines.\n"
    name = dataset.url.rstrip("/").rpartition("/")[2] or "data"
    for one in made:
        if one.plan is None:
            yield f"Of version {one.commit.version} the journal is gone, and with it how it was made.\n"
            continue
        tokenizer = one.commit.tokenizer
        options = f" --tokenizer {dataset.url}/tokenizers/{tokenizer.sha256}.json" if tokenizer else ""
        table = "\n".join(
            f"{key} = {_toml(value)}" for key, value in sorted(one.settings.items()) if key != "tokenizer"
        )
        config = f" --config ingest-{one.commit.version}.toml" if table else ""
        if table:
            yield f"```toml\n# ingest-{one.commit.version}.toml\n{table}\n```\n"
        sources = " ".join(map(shlex.quote, one.plan.sources[:_MOST_SOURCES]))
        more = " ..." if len(one.plan.sources) > _MOST_SOURCES else ""
        yield f"```sh\ndatastore ingest {sources}{more} --to {name}{options}{config}\n```\n"


def _section(title: str, text: str) -> tuple[str, str]:
    return f"\n## {title}\n", text


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _toml(value: object) -> str:
    """Return `value`, of JSON, as TOML has it; the two differ in tables only."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{json.dumps(key)} = {_toml(each)}" for key, each in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value)

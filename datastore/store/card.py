"""The dataset card: a README.md for people who find the folder. No reader depends on it."""

from datastore.dataset.log.manifest import Commit, DatasetInfo
from datastore.storage.base import Storage
from datastore.units import format_bytes, format_count

__all__ = ["CARD_KEY", "card_text", "write_card"]

CARD_KEY = "README.md"


def card_text(info: DatasetInfo, commit: Commit) -> str:
    """Return the card of one version."""
    totals = commit.totals
    rows = [
        ("version", f"{commit.version} ({commit.operation}, {commit.time})"),
        ("holds", commit.kind),
        ("documents", f"{totals.documents:,}"),
        *([("deleted of them", f"{totals.deleted_documents:,}")] if totals.deleted_documents else []),
        *([("tokens", f"{totals.tokens:,} ({format_count(totals.tokens)})")] if commit.kind == "tokens" else []),
        ("shards", f"{totals.shards:,}"),
        ("size", format_bytes(totals.size_bytes)),
        *(
            [("tokenizer", f"`tokenizers/{commit.tokenizer.sha256}.json`, {commit.tokenizer.vocab_size:,} ids")]
            if commit.tokenizer
            else []
        ),
        ("uuid", f"`{info.uuid}`"),
        ("written by", commit.writer),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"""# A dataset

| | |
|---|---|
{table}

Read it in Python:

    import datastore as ds

    dataset = ds.open("URL of this folder")

or with anything that reads Arrow and Parquet: `shards/**/*.arrow` are Arrow IPC files{_columns(commit)}.
Which of them belong to a version stands in `_log/` and `_segments/`; files that no version names are unfinished work.

Written at each commit; change anything in here and the next commit undoes it.
"""


def write_card(storage: Storage, info: DatasetInfo, commit: Commit) -> None:
    """Write the card of `commit`, replacing the one before."""
    storage.put(CARD_KEY, card_text(info, commit).encode())


def _columns(commit: Commit) -> str:
    if commit.kind == "records":
        return ""
    return " with one row of `tokens` per document,\n`docs/**/*.parquet` say where each document comes from"

"""The dataset that an ingest goes to: what it is made of already, and which files it knows."""

import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from datastore.dataset.journal import Journal, Plan
from datastore.dataset.log.commits import CommitLog
from datastore.dataset.log.keys import INFO_KEY, JOURNALS_FOLDER, KINDS, LOG_FOLDER, journal_folder
from datastore.dataset.log.manifest import Commit, Kind, TokenizerRef
from datastore.dataset.roots import open_roots
from datastore.dataset.shards.files import read_documents, read_record_shard, read_tokenizer
from datastore.dataset.shards.info import ShardInfo
from datastore.dataset.shards.segments import load_segments
from datastore.dataset.snapshot import split_reference
from datastore.errors import ConfigError, CorruptError, FormatError, MissingError
from datastore.formats.schema import decode_schema
from datastore.ingestion.encoding.chatfiles import chat_format, tokenizer_file
from datastore.ingestion.encoding.chats import require_usable
from datastore.ingestion.encoding.reference import facts_of, load_tokenizer
from datastore.ingestion.encoding.template import ChatFormat
from datastore.ingestion.reading.sources import read_url
from datastore.ingestion.settings import IngestSettings
from datastore.storage.base import Storage
from datastore.storage.resolve import open_storage
from datastore.storage.urls import strip_credentials
from datastore.threads import in_parallel

__all__ = ["Destination", "TokenizerChoice", "chat_format_of", "made_by_ingest", "open_target", "plan_of"]

_OF_TEXTS = {"id", "source", "offset", "text"}
"""Columns of records that an ingest makes of texts."""

_INGEST_ID = re.compile("[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class TokenizerChoice:
    """The tokenizer of an ingest."""

    raw: bytes
    ref: TokenizerRef


@dataclass(frozen=True, slots=True)
class Destination:
    """A dataset, or the place where one is to be."""

    storage: Storage
    newest: Commit | None
    fresh: bool = False
    """Whether nothing at all was there."""

    def ingests(self) -> Iterator[tuple[Commit, Plan | None]]:
        """Yield the versions that ingests made of those the newest one is made of, each with its plan, newest first.

        A plan that is lost or damaged is None: a finished ingest is not needed to go on. Reads one commit per version.
        """
        if self.newest is None:
            return
        for commit in CommitLog(self.storage).history(self.newest):
            if made_by_ingest(commit):
                yield commit, plan_of(self.storage, commit)
            if commit.operation == "overwrite":
                return

    def sources(self) -> set[str]:
        """Return the names of the files that the documents of the newest version are from; of rows taken over, none.

        Reads what describes each document.

        Raises:
            MissingError, CorruptError: a file of the dataset is gone or damaged.
        """

        def of(shard: ShardInfo) -> list[Any]:
            if shard.kind == "tokens":
                return read_documents(self.storage, shard, columns=["source"]).column("source").unique().to_pylist()
            table = read_record_shard(self.storage, shard)
            # Rows that were taken over may have a column of that name, too, but no such offsets.
            is_text = _OF_TEXTS.issubset(table.column_names) and table.schema.field("source").type == pa.string()
            return table.column("source").unique().to_pylist() if is_text else []

        shards = load_segments(self.storage, self.newest) if self.newest else ()
        return {name for names in in_parallel(of, shards) for name in names}

    def forget(self, ingest_id: str) -> None:
        """Remove what an ingest without a document has left where nothing was, unless another one has begun there, too."""
        if not self.fresh:
            return
        own = f"{journal_folder(ingest_id)}/"

        def others() -> bool:
            keys = (stat.key for folder in (JOURNALS_FOLDER, LOG_FOLDER) for stat in self.storage.list(folder))
            return any(not key.startswith(own) for key in keys)

        if others():
            return
        info = self.storage.get(INFO_KEY)
        for stat in list(self.storage.list()):
            if stat.key.startswith(own) or stat.key.partition("/")[0] in KINDS:
                self.storage.delete(stat.key)
        self.storage.delete(INFO_KEY)
        if others():  # It began just now, and relies on the identity that it has read.
            self.storage.put(INFO_KEY, info)
        elif "://" not in self.storage.url:
            with suppress(OSError):  # Somebody else has put something there, or it is a mount point.
                Path(self.storage.url).rmdir()

    def require_same_filters(self, plan: Plan) -> None:
        """Raise if an ingest of some of the same files, but with other filters, was begun and not finished.

        Raises:
            ConfigError: there is one; to go on with other filters would be to begin anew without a word.
        """
        history = CommitLog(self.storage).history(self.newest) if self.newest else ()
        over = {plan.ingest_id, *(commit.ingest_id for commit in history)}
        prints = {file.fingerprint for file in plan.files}
        keys = [stat.key.split("/") for stat in self.storage.list(JOURNALS_FOLDER)] if prints else []
        for name in (name for _, name, *rest in keys if rest == ["plan.json"] and name not in over):
            with suppress(CorruptError, FormatError):
                begun = Journal(self.storage, name).find_plan()
                if begun is None or begun.filters_digest == plan.filters_digest:
                    continue
                if any(file.fingerprint in prints for file in begun.files):
                    raise ConfigError(
                        "an ingest of these files was begun with other filters, and not finished",
                        url=self.storage.url,
                        ingest=name,
                        hint="Give the same filters to go on with it, or leave what it did: `begin_anew=true`.",
                    )

    def holds_texts(self) -> bool:
        """Return whether the dataset has texts, or tokens of texts, to which others can be added."""
        if self.newest is None:
            return False
        return self.newest.tokenizer is not None or (
            self.newest.kind == "records" and set(decode_schema(self.newest.record_schema).names) == _OF_TEXTS
        )

    def require_kind(self, kind: Kind) -> None:
        """Raise unless documents of `kind` can be added.

        Raises:
            ConfigError: the dataset holds the other kind.
        """
        if self.newest is not None and self.newest.kind != kind:
            raise ConfigError(
                f"the dataset holds {self.newest.kind}, not {kind}",
                url=self.storage.url,
                hint="Name another URL, or replace all that it holds: `operation=overwrite`.",
            )

    def require_schema(self, schema: pa.Schema) -> None:
        """Raise unless records of exactly `schema` can be added, which is cheaper to say before they are read.

        Raises:
            ConfigError: the dataset has other columns, or has had others before.
        """
        stored = decode_schema(self.newest.record_schema) if self.newest else schema
        if not stored.equals(schema, check_metadata=True):
            raise ConfigError(
                "the dataset has another schema than texts that are ingested",
                url=self.storage.url,
                dataset=stored.names,
                ingested=schema.names,
                hint="Name another URL, or replace all that it holds: `operation=overwrite`.",
            )

    def choose_tokenizer(self, settings: IngestSettings) -> TokenizerChoice | None:
        """Return the tokenizer that `settings` name, or else the dataset's own; None if text stays text.

        Raises:
            MissingError: there is no such file.
            ConfigError: it is no tokenizer, or not the one of the dataset.
        """
        present = self.newest.tokenizer if self.newest else None
        if settings.tokenizer:
            raw = read_url(tokenizer_file(settings.tokenizer))
        elif present is not None:
            raw = read_tokenizer(self.storage, present)
        else:
            return None
        ref = facts_of(raw, load_tokenizer(raw), end_of_text=settings.end_of_text)
        if self.newest is not None and ref != present and settings.operation != "overwrite":
            raise ConfigError(
                "the dataset has another tokenizer" if present else f"the dataset holds {self._held()}",
                url=self.storage.url,
                dataset=_shown(present),
                given=_shown(ref),
                hint="Leave out `tokenizer` to use what the dataset has; name another URL; or `operation=overwrite`.",
            )
        return TokenizerChoice(raw, ref)

    def _held(self) -> str:
        is_text = self.newest is not None and self.newest.kind == "records"
        return "text, not tokens" if is_text else "tokens of a tokenizer that it does not name"


def made_by_ingest(commit: Commit) -> bool:
    """Return whether `commit` is of an ingest, and no other one that was given an id."""
    return _INGEST_ID.fullmatch(commit.ingest_id) is not None


def plan_of(storage: Storage, commit: Commit) -> Plan | None:
    """Return the plan of the ingest that made `commit`, or None if it is lost or damaged."""
    try:
        return Journal(storage, commit.ingest_id).find_plan()
    except CorruptError:
        return None


def open_target(to: str) -> Destination:
    """Return what is at the URL `to`; nothing is written yet.

    Raises:
        ConfigError: the URL names a version, or cannot be opened.
        FormatError, CorruptError: what is there cannot be added to.
    """
    name = split_reference(to)[1]
    if name:
        raise ConfigError(
            "a version cannot be added to", url=strip_credentials(to), version=name, hint="Name the dataset without it."
        )
    try:
        storage, info = open_roots(to)
    except MissingError:
        return Destination(open_storage(to), None, fresh=True)
    return Destination(storage, CommitLog(storage, exclusive=info.exclusive).newest())


def _shown(ref: TokenizerRef | None) -> str:
    return f"sha256 {ref.sha256[:16]}, end of text {ref.end_of_text}" if ref else "none"


def chat_format_of(tokenizer: TokenizerChoice | None, settings: IngestSettings) -> ChatFormat:
    """Return how chats become text, tried out: better now than after all the reading.

    Raises:
        ConfigError: there is no tokenizer, or no template that can be used.
        DependencyError: jinja2 is not installed.
    """
    if tokenizer is None:
        raise ConfigError(
            "chats need a tokenizer", take=settings.take, hint="Name one that has a chat template: `tokenizer=FOLDER`."
        )
    found = chat_format(settings)
    require_usable(tokenizer.raw, found, settings)
    return found

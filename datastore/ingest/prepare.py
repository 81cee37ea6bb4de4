"""What an ingest would do: everything that can be known, and refused, before anything is written."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from datastore.errors import ConfigError
from datastore.formats.schema import check_rows, check_storable, decode_schema, encode_schema
from datastore.ingestion.destination import Target, TokenizerChoice, open_target
from datastore.ingestion.plan import Plan, make_plan
from datastore.ingestion.reading.sources import Listing, Roots, list_sources
from datastore.ingestion.settings import IngestSettings, Kind, reading_digest
from datastore.ingestion.sinks import RECORDS_SCHEMA
from datastore.ingestion.tasks import Job
from datastore.interop.formats import FORMATS
from datastore.storage.resolve import open_storage

__all__ = ["Prepared", "prepare"]


@dataclass(frozen=True, slots=True)
class Prepared:
    """A planned ingest."""

    settings: IngestSettings
    roots: Roots
    target: Target
    tokenizer: TokenizerChoice | None
    plan: Plan

    def workers(self, tasks: int) -> int:
        """Return how many processes to use for that many tasks.

        Raises:
            ConfigError: several are asked for, but only this process sees the data.
        """
        urls = [self.target.storage.url, *self.roots.folders.values()]
        wanted = self.settings.workers
        if any(url.startswith("memory://") for url in urls):
            if wanted > 1:
                raise ConfigError("other processes cannot see memory://", workers=wanted, hint="Set workers to 1.")
            return 1
        return max(1, min(tasks, wanted or _cores()))

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


def prepare(sources: Sequence[str], to: str, settings: IngestSettings) -> Prepared:
    """Return the ingest of `sources` into the dataset at `to`; only reads.

    Raises:
        ConfigError, MissingError, FormatError, CorruptError, StorageError: as `ingest`.
    """
    listing, roots = list_sources(sources, settings)
    target = open_target(to)
    tokenizer = target.choose_tokenizer(settings) if settings.take != "rows" else None
    kind: Kind = "tokens" if tokenizer or settings.take == "tokens" else "records"
    base = target if settings.operation == "append" else Target(target.storage, None)
    base.require_kind(kind)
    if kind == "records" and settings.take == "text":
        base.require_schema(RECORDS_SCHEMA)
    plan = make_plan(
        listing,
        settings=settings,
        kind=kind,
        reading_digest=reading_digest(settings, tokenizer_sha256=tokenizer.ref.sha256 if tokenizer else ""),
        known=base.known_files(),
        record_schema=_record_schema(listing, roots, base) if settings.take == "rows" else b"",
    )
    return Prepared(settings=settings, roots=roots, target=target, tokenizer=tokenizer, plan=plan)


def _record_schema(listing: Listing, roots: Roots, target: Target) -> bytes:
    """Return the columns that all files must have: those of the dataset, or in a new one those of the first file.

    Raises:
        ConfigError: the first file does not have them; better now than after all the reading.
    """
    first = listing.files[0]
    url, key = roots.locate(first.path)
    schema = FORMATS[first.format].schema(open_storage(url), key).remove_metadata()
    if target.newest is not None:
        check_rows(schema.empty_table(), decode_schema(target.newest.record_schema))
        return target.newest.record_schema
    check_storable(schema)
    return encode_schema(schema)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

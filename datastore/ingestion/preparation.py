"""The preparation of an ingest: everything that can be known, and refused, before anything is written.

`prepare` only reads: it lists the sources, holds them against what the dataset has, and plans what is left.
"""

import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain

import msgspec
import pyarrow as pa

from datastore.dataset.journal import Plan, SourceFile
from datastore.dataset.log.manifest import Commit, Kind
from datastore.dataset.operations.expire import time_of
from datastore.document import encode
from datastore.errors import ConfigError
from datastore.formats.common import common_schema
from datastore.formats.fitting import check_rows
from datastore.formats.huggingface import keep_features
from datastore.formats.schema import check_storable, decode_schema, encode_schema, no_rows, with_wide_indices
from datastore.host import cores
from datastore.ingestion.destination import Destination, TokenizerChoice, chat_format_of, open_target
from datastore.ingestion.encoding.evaluations import read_contamination
from datastore.ingestion.encoding.template import ChatFormat
from datastore.ingestion.plan import changed_since, digest_after, known_files, make_plan
from datastore.ingestion.quality.contamination import Contamination
from datastore.ingestion.reading.rows import first_schema, is_table, require_rows, rows_schema
from datastore.ingestion.reading.sources import Listing, Roots, list_sources
from datastore.ingestion.reading.stored import require_unwritten
from datastore.ingestion.settings import IngestSettings, filter_identities, filters_digest, noted, reading_digest
from datastore.ingestion.sinks.chats import PAIRS_SCHEMA
from datastore.ingestion.sinks.documents import RECORDS_SCHEMA
from datastore.ingestion.tasks import Job
from datastore.storage.resolve import open_storage
from datastore.threads import in_parallel

__all__ = ["PreparedIngest", "prepare"]

_LOGGER = logging.getLogger(__name__)


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
        """Return how many processes of this machine to use for that many tasks.

        Raises:
            ConfigError: several are asked for, but only this process sees the data.
        """
        if self._is_private():
            if self.settings.workers > 1:
                raise _private(workers=self.settings.workers)
            return 1
        return max(1, min(tasks, self.settings.workers or cores()))

    def require_shared(self) -> None:
        """Raise unless other processes can see the data.

        Raises:
            ConfigError: only this one does.
        """
        if self._is_private():
            raise _private()

    def _is_private(self) -> bool:
        urls = [self.target.storage.url, *self.roots.folders.values()]
        return any(url.startswith("memory://") for url in urls)

    def job(self, to: str) -> Job:
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
        )


def _private(**values: int) -> ConfigError:
    return ConfigError("other processes cannot see memory://", **values, hint="Give `workers=1`.")


def prepare(sources: Sequence[str], to: str, settings: IngestSettings) -> PreparedIngest:
    """Return the ingest of `sources` into the dataset at `to`; only reads.

    Raises:
        ConfigError, MissingError, FormatError, CorruptError, StorageError: as `ingest`.
    """
    target = open_target(to)
    listing, roots = list_sources(sources, settings, encodes=target.holds_texts() and settings.operation == "append")
    as_given = noted(settings)
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
    require_unwritten(listing.files, [(commit, each.files) for commit, each in found if each is not None])
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
    about = {"filters_digest": filters_digest(settings, deciding), "settings": as_given}
    plan = msgspec.structs.replace(plan, **about)
    if settings.operation == "append" and not settings.begin_anew:
        target.require_same_filters(plan)
    return PreparedIngest(
        settings=settings,
        roots=roots,
        target=target,
        tokenizer=tokenizer,
        plan=plan,
        changed=changed_since(plan.files, history, in_any_state=settings.replace),
        restored=msgspec.structs.replace(restored, **about) if restored else None,
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

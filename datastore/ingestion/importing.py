"""A dataset becomes another one: of another library one of ours, or one of ours one with another tokenizer.

An ingest like any other: planned, in parallel, resumable, one commit. What becomes of the rows follows from their
columns: token ids are taken over as tokens; with a tokenizer, text is encoded; all else is taken over as records.
"""

import os
from collections.abc import Callable

import msgspec
import pyarrow as pa

from datastore.dataset.journal import SourceFile
from datastore.engines.engine import Engine
from datastore.errors import ConfigError
from datastore.ingestion.ingest import ingest
from datastore.ingestion.reading.rows import first_schema, is_token_column
from datastore.ingestion.reading.sources import list_sources
from datastore.ingestion.report import IngestProgress, IngestReport
from datastore.ingestion.settings import IngestSettings
from datastore.interop.formats import FORMATS, ImportFormat
from datastore.storage.resolve import open_storage

__all__ = ["import_dataset", "retokenize"]

_TOKEN_COLUMNS = ("input_ids",)
"""What a column of token ids is called elsewhere, if not as `tokens_key` says."""


def import_dataset(
    source: str | os.PathLike[str],
    to: str | os.PathLike[str],
    *,
    format: ImportFormat,  # noqa: A002 - what it is
    settings: IngestSettings | None = None,
    progress: Callable[[IngestProgress], None] | None = None,
) -> IngestReport:
    """Add what `source`, a folder or file in the `format` of another library, holds to the dataset at `to`.

    If there are token ids, `settings.tokenizer` names the tokenizer that made them; it may be left out. Otherwise it
    encodes the column `settings.text_key`; without it rows keep all their columns. `progress` is as for `ingest`.

    Raises:
        ConfigError: the source is not of this format, holds what must not be read, or does not fit the dataset.
        CorruptError: a file of the source is damaged; nothing was committed.
        MissingError, ConflictError, RejectedError, StorageError: as `ingest`.
    """
    source, to = os.fspath(source), os.fspath(to)
    if format not in FORMATS:
        raise ConfigError("no such format", format=format, hint=f"Name one of {', '.join(FORMATS)}.")
    settings = _chosen(source, msgspec.structs.replace(settings or IngestSettings(), format=format))
    return ingest([source], to, settings=settings, progress=progress)


def retokenize(
    source: str | os.PathLike[str],
    to: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str],
    settings: IngestSettings | None = None,
    engine: Engine | None = None,
    progress: Callable[[IngestProgress], None] | None = None,
) -> IngestReport:
    """Add the documents of the dataset `source` to the one at `to`, encoded with another `tokenizer`.

    Each keeps its id, and what is said of where it comes from; deleted ones are left out. An ingest like any other: it goes on
    after a kill, and what `source` has got since the last time is added by the same call. A document whose tokens do not
    give back the text that it was is rejected (`text_lost`). `settings`, `engine` and `progress` are as for `ingest`.

    Raises:
        ConfigError: the source has no texts, or has lost or rewritten some that `to` has already.
        MissingError, ConflictError, RejectedError, StorageError: as `ingest`.
    """
    chosen = msgspec.structs.replace(
        settings or IngestSettings(), format="datastore", take="text", tokenizer=os.fspath(tokenizer)
    )
    if chosen.replace:
        raise ConfigError(
            "the documents keep the names of the files that they are from, so none can be replaced",
            replace=True,
            hint="Leave out `replace`; or replace all that the dataset holds: `operation=overwrite`.",
        )
    return ingest([os.fspath(source)], to, settings=chosen, engine=engine, progress=progress)


def _chosen(source: str, settings: IngestSettings) -> IngestSettings:
    """Return `settings` with what to take of a row, by the columns of the first file that has some."""
    listing, roots = list_sources([source], msgspec.structs.replace(settings, take="rows"))

    def read(file: SourceFile) -> pa.Schema:
        url, key = roots.locate(file.path)
        return FORMATS[file.format].schema(open_storage(url), key)

    _, schema = first_schema(listing.files, read)
    for name in (settings.tokens_key, *_TOKEN_COLUMNS):
        if is_token_column(schema, name):
            return msgspec.structs.replace(settings, take="tokens", tokens_key=name)
    return msgspec.structs.replace(settings, take="text" if settings.tokenizer else "rows")

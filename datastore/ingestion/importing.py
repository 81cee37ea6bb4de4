"""`import_dataset`: a dataset in the format of another library becomes one of ours.

An ingest like any other: planned, in parallel, resumable, one commit. What becomes of the rows follows from their
columns: token ids are taken over as tokens; with a tokenizer, text is encoded; all else is taken over as records.
"""

import os
from collections.abc import Callable

import msgspec
import pyarrow as pa

from datastore.dataset.journal import SourceFile
from datastore.errors import ConfigError
from datastore.ingestion.ingest import ingest
from datastore.ingestion.reading.rows import first_schema, is_token_column
from datastore.ingestion.reading.sources import list_sources
from datastore.ingestion.report import IngestProgress, IngestReport
from datastore.ingestion.settings import IngestSettings
from datastore.interop.formats import FORMATS, ImportFormat
from datastore.storage.resolve import open_storage

__all__ = ["import_dataset"]

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
    """Add what `source`, a folder or file in the format of another library, holds to the dataset at `to`.

    If there are token ids, `settings.tokenizer` names the tokenizer that made them; it may be left out. Otherwise it
    encodes the column `settings.text_key`; without it rows keep all their columns.

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

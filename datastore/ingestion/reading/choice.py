"""The choice of what becomes a document, where the user has not said: texts, its token ids, or rows with all their columns.

Files of text and lines of JSON give texts. A table gives the texts in its column of text, if it has one. Otherwise, and for the
folders of other libraries, in which every column is there on purpose: token ids are taken over as tokens; with a
tokenizer, or into a dataset of texts, the text is taken; all else becomes records with all columns.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import pyarrow as pa

from datastore.dataset.journal import SourceFile
from datastore.ingestion.reading.rows import is_table, is_token_column
from datastore.ingestion.reading.texts import parse_template
from datastore.ingestion.settings import IngestSettings, Take
from datastore.interop.cells import is_binary, is_text
from datastore.interop.formats import FORMATS
from datastore.storage.resolve import open_storage
from datastore.threads import in_parallel

__all__ = ["Choice", "choose"]

_LIBRARIES = {"hf", "mds", "litdata", "megatron", "webdataset"}

_TOKEN_COLUMNS = ("input_ids",)
"""What a column of token ids is called elsewhere, if not as `tokens_key` says."""


class Choice(NamedTuple):
    """What is taken of the sources."""

    take: Take
    tokens_key: str
    left_out: tuple[str, ...]
    """Tables among the texts that have no column of text."""


def choose(
    files: Sequence[SourceFile], locate: Callable[[str], tuple[str, str]], settings: IngestSettings, *, encodes: bool
) -> Choice:
    """Return what to take of `files`; `encodes` says that the dataset they go to holds texts, or tokens of them.

    Raises:
        CorruptError: a table is damaged.
    """
    tables = [file for file in files if is_table(file)]
    if settings.take not in {"auto", "text"} or (settings.take == "text" and settings.format):
        return Choice(settings.take, settings.tokens_key, ())
    if not tables:
        return Choice("text", settings.tokens_key, ())

    def read(file: SourceFile) -> pa.Schema:
        url, key = locate(file.path)
        return FORMATS[file.format].schema(open_storage(url), key)

    schemas = dict(zip((file.path for file in tables), in_parallel(read, tables), strict=True))
    take: Take = "text"
    tokens_key = settings.tokens_key
    if settings.take == "auto" and len(tables) == len(files):
        take, tokens_key = _of_tables(tables, schemas, settings, encodes=encodes or bool(settings.tokenizer))
    without = [file.path for file in tables if not (file.lone or _has_text(schemas[file.path], settings))]
    left_out = take == "text" and not settings.format and len(without) < len(files)
    return Choice(take, tokens_key, tuple(without) if left_out else ())


def _of_tables(
    tables: Sequence[SourceFile], schemas: Mapping[str, pa.Schema], settings: IngestSettings, *, encodes: bool
) -> tuple[Take, str]:
    """Return what to take where all sources are tables, and the column of token ids."""
    with_text = [file for file in tables if _has_text(schemas[file.path], settings)]
    if any(file.format not in _LIBRARIES for file in with_text):
        return "text", settings.tokens_key
    columns = next((schema for schema in schemas.values() if schema.names), pa.schema([]))
    for name in (settings.tokens_key, *_TOKEN_COLUMNS):
        if is_token_column(columns, name):
            return "tokens", name
    wants_text = encodes or bool(settings.template) or settings.text_key != IngestSettings().text_key
    return ("text" if wants_text else "rows"), settings.tokens_key


def _has_text(schema: pa.Schema, settings: IngestSettings) -> bool:
    names = parse_template(settings.template).fields if settings.template else (settings.text_key,)
    kinds = [schema.field(name).type for name in names if name in schema.names]
    return len(kinds) == len(names) and all(is_text(kind) or is_binary(kind) for kind in kinds)

"""The settings of an ingest, and which of them the shards depend on.

Everything that can change a byte of a shard enters `reading_digest`, and with it the ids of tasks and shards; what
only changes who does the work, or how much bad input is tolerable (`workers`, `on_error`, `max_reject_ratio`), does
not: raising a limit and running again picks up where the refused run ended.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec

from datastore.dataset.operations.append import Operation
from datastore.digest import digest_hex
from datastore.document import Positive, SettingsDocument, encode
from datastore.errors import ConfigError
from datastore.ingestion.quality.chain import AnyFilter, identities
from datastore.ingestion.quality.contamination import Decontaminate
from datastore.interop.formats import ImportFormat
from datastore.storage.urls import strip_credentials

__all__ = [
    "CODE_VERSION",
    "IngestSettings",
    "OnError",
    "ReadAs",
    "SpecialTokens",
    "Take",
    "filter_identities",
    "filters_digest",
    "noted",
    "reading_digest",
]

CODE_VERSION = 1
"""Raised whenever the same source and settings would give other shard bytes than before."""

OnError = Literal["quarantine", "skip", "fail"]

SpecialTokens = Literal["escape", "allow", "reject"]

Take = Literal["auto", "text", "rows", "tokens", "chats", "pairs"]

ReadAs = Literal["", "text", "lines", "jsonl", "json", "warc", "datastore", ImportFormat]

Encoder = Literal["auto", "tokenizers", "gigatoken", "fastokens"]

Ratio = Annotated[float, msgspec.Meta(ge=0, le=1)]

Name = Annotated[str, msgspec.Meta(min_length=1)]


class IngestSettings(SettingsDocument, frozen=True, kw_only=True):
    """How sources become shards."""

    tokenizer: str = ""
    """Path or URL of a `tokenizer.json`, or of its folder. Empty: the one that the dataset has; in a new dataset, text stays text."""

    end_of_text: Name = "<|endoftext|>"
    """The token that ends each document."""

    special_tokens: SpecialTokens = "escape"
    """A special token written out in a text: made of ordinary tokens, taken for the real one, or a reason to reject."""

    encoder: Encoder = "auto"
    """Who encodes; the ids are the same. `auto`: the fastest that is installed and knows the tokenizer."""

    format: ReadAs = ""
    """Read all files as those of this format: `text` as it is, whatever is in it; `lines` of text.
    `datastore`: the texts of a dataset of ours. Empty: what each file is, by its content."""

    take: Take = "auto"
    """What of a row of a table, or of a JSON line, becomes a document: the text under `text_key`, all columns (`rows`), tokens;
    a chat, its messages made tokens by a chat template; or a pair of chats, `chosen` and `rejected`, as one record.
    `auto`: text where there is some; of the folders of other libraries tokens, then text if there is a tokenizer, then rows."""

    chat_template: str = ""
    """Path or URL of a file with the chat template. Empty: the one beside the tokenizer, if chats or pairs are taken."""

    chat_day: Annotated[str, msgspec.Meta(pattern=r"^(\d{4}-\d{2}-\d{2})?$")] = ""
    """The day that a template is told which asks for it, such as 2026-11-28. Empty: today, in UTC; an ingest that goes on
    the next day then begins anew."""

    include: tuple[Name, ...] = ()
    """Take only files of a folder that match one of these globs (a name, or with `/` the path in the folder)."""

    exclude: tuple[Name, ...] = ()
    """Leave out files and folders that match one of these globs."""

    gitignore: bool = False
    """Leave out of local folders what git ignores there."""

    text_key: Name = "text"
    """The key of the text in a JSON line, or its column."""

    template: str = ""
    """Makes the text of several fields, such as `{title}: {body}`, in the place of the one under `text_key`."""

    id_key: Name = "id"
    """The key of the id, or its column; without an id, a document is called after its file and place in it."""

    tokens_key: Name = "tokens"
    """The column of token ids, if tokens are taken over."""

    separator: str = ""
    """What parts the documents of a text file, such as `<|endoftext|>`. Empty: a file is one document."""

    html_text: bool = False
    """Of HTML pages in WARC archives, take the main text, found by resiliparse, instead of the HTML."""

    max_document_bytes: Annotated[int, msgspec.Meta(ge=1, le=2**29)] = 16 * 2**20
    """A longer document is rejected. Encoding takes some 200 times its size in memory with `tokenizers`."""

    max_expansion: Positive = 200
    """A compressed file that grows more than this many times (beyond 64 MiB) is taken for a decompression bomb."""

    task_bytes: Annotated[int, msgspec.Meta(ge=2**10, le=2**34)] = 32 * 2**20
    """Source bytes of one task: small files together, long ones cut."""

    shard_bytes: Annotated[int, msgspec.Meta(ge=2**10, le=2**30)] = 64 * 2**20
    """A shard ends with the batch of documents that reaches this size; it never holds more than one task."""

    filters: tuple[AnyFilter, ...] = ()
    """What texts are filtered by, in this order; each is a table with `use`, see [filters](#filters)."""

    decontaminate: Decontaminate = Decontaminate()
    """Evaluations that are kept out of the data."""

    trace_filters: Annotated[int, msgspec.Meta(ge=0, le=1000)] = 0
    """Of what each rule of a filter drops, so many samples are kept, drawn at random."""

    begin_anew: bool = False
    """Begin anew where an ingest of the same files with other filters was not finished."""

    workers: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 0
    """Processes; 0: as many as this process may use cores. Shard bytes do not depend on it."""

    on_error: OnError = "quarantine"
    """What becomes of a bad document: kept aside and counted, counted only, or the end of the ingest."""

    max_reject_ratio: Ratio = 0.001
    """Of all documents; above it nothing is committed."""

    replace: bool = False
    """A file that has changed takes the place of what it was: in the same commit, its earlier documents are deleted."""

    license: str = ""
    """The licence of the documents, such as `cc-by-4.0` (SPDX); it stands in the dataset's card."""

    operation: Operation = "append"
    """`overwrite`: the new version holds the sources and nothing else; what it held can be read in the versions before."""


_NO_EFFECT = {
    "replace",
    *(
        "license",
        "tokenizer",
        "encoder",
        "include",
        "exclude",
        "gitignore",
        "workers",
        "on_error",
        "max_reject_ratio",
        "operation",
    ),
    *("chat_template", "chat_day", "trace_filters", "begin_anew"),
}
"""Settings that change no shard byte (the tokenizer enters by its sha256, the template by its text, globs by the files they leave)."""


def reading_digest(
    settings: IngestSettings, *, tokenizer_sha256: str, chats: bytes = b"", filters: Sequence[str] = ()
) -> str:
    """Return the digest of all that shard bytes depend on besides the source; an empty sha256 stands for text.

    `chats` says how they become text, `filters` what each filter depends on beside its settings.
    """
    plain = IngestSettings()
    same = {name: getattr(plain, name) for name in _NO_EFFECT}
    relevant = encode(msgspec.structs.replace(settings, **same))
    return digest_hex(
        f"{CODE_VERSION}/{tokenizer_sha256}\n".encode(),
        relevant,
        *([chats] if chats else []),
        *(each.encode() for each in filters),
    )


def noted(settings: IngestSettings) -> dict[str, Any]:
    """Return the settings that are not what they are if left out, without credentials, for who wants to do the same again.

    Not those that only say how this machine works.
    """
    return {key: value for key, value in _given(settings).items() if key not in _OF_THE_MACHINE}


_OF_THE_MACHINE = {"workers", "begin_anew", "encoder"}


def _given(value: Any) -> Any:
    """Return `value` as JSON has it: of documents what is not as it is if left out, of URLs no credentials."""
    if isinstance(value, msgspec.Struct):
        tag = value.__struct_config__.tag
        fields = {
            each.name: getattr(value, each.name) for each in msgspec.structs.fields(value) if _is_given(value, each)
        }
        return ({str(value.__struct_config__.tag_field): tag} if tag else {}) | {
            k: _given(v) for k, v in fields.items()
        }
    if isinstance(value, str):
        return strip_credentials(value) if "://" in value else value
    if isinstance(value, dict):
        return {key: _given(each) for key, each in value.items()}
    return [_given(each) for each in value] if isinstance(value, list | tuple) else value


def _is_given(record: msgspec.Struct, field: msgspec.structs.FieldInfo) -> bool:
    default = field.default_factory() if field.default_factory is not msgspec.NODEFAULT else field.default
    return bool(getattr(record, field.name) != default)


def filter_identities(settings: IngestSettings) -> tuple[str, ...]:
    """Return what the filters depend on beside their settings.

    Raises:
        ConfigError: what is taken is no text, or a filter cannot be used.
        MissingError, DependencyError: a file, module or library is not there.
    """
    if settings.filters and settings.take != "text":
        raise ConfigError(
            "filters are for texts", take=settings.take, hint="Leave out `filters`, or take the texts: `take=text`."
        )
    return identities(settings.filters)


def filters_digest(settings: IngestSettings, found: Sequence[str]) -> str:
    """Return the digest of the filters, of which `found` are the identities; empty if there are none."""
    if not found:
        return ""
    return digest_hex(*map(encode, settings.filters), *(each.encode() for each in found))

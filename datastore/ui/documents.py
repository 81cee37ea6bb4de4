"""Documents of a dataset: listed, searched, one of them shown as what it is.

A search looks at shard after shard, and stops with a page of hits or when its time is up; where it stopped is where the next one
goes on. So no page waits longer for a large dataset, and no index has to be kept. A document is named by its shard and row.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from datastore.dataset.operations.selection import Matcher, Selection
from datastore.dataset.snapshot import Dataset
from datastore.errors import ConfigError, MissingError
from datastore.formats.arrow import numbers_of
from datastore.formats.documents import DOCUMENTS_SCHEMA
from datastore.formats.tokentext import TokenText

__all__ = ["Document", "Field", "Found", "Piece", "Query", "blob", "find", "show"]

PAGE = 50

_BUDGET_S = 0.25
"""How long one page of a search takes at most, a shard more or less."""

_TEXT_ROWS = 256
"""Documents whose text is made at once."""

_SHOWN_TOKENS = 4_000
_SHOWN_TEXT = 20_000
_EXCERPT = 160
_EXCERPT_TOKENS = 8 * _EXCERPT
"""So many tokens make twice as many characters as an excerpt has, even where each is a byte of a character of four."""


@dataclass(frozen=True, slots=True)
class Query:
    """What to look for."""

    text: str = ""
    """In the id or the source of a document, whatever the case; with `inside`, in its text."""

    inside: bool = False
    where: str = ""
    """A condition over the columns, in SQL."""

    source: str = ""
    """A pattern of the source, `*` for any text."""

    @property
    def empty(self) -> bool:
        """Whether every document is meant."""
        return not (self.text or self.where or self.source)


@dataclass(frozen=True, slots=True)
class Found:
    """A page of a list or search."""

    hits: list[dict[str, Any]]
    """`shard`, `row`, `id`, `source`, `size`, `deleted`, `excerpt`."""

    next: tuple[int, int] | None
    """Shard and row to go on from; None: that was all."""

    looked_at: int
    """Documents from the first on that have been looked at so far."""


def find(dataset: Dataset, query: Query, *, at: tuple[int, int] = (0, 0)) -> Found:
    """Return the documents that a query means, from shard and row `at` on: a page of them, or as many as the time allows.

    Raises:
        ConfigError: the condition does not fit the columns.
        DependencyError: it is SQL, and DuckDB is not installed.
        MissingError, CorruptError: a file is gone or damaged.
    """
    deadline = time.monotonic() + _BUDGET_S
    look = _Look(dataset, query)
    hits: list[dict[str, Any]] = []
    shard, row = at
    while shard < len(dataset.segments):
        rows, scanned = look.shard(shard, start=row, most=PAGE - len(hits), deadline=deadline)
        hits += rows
        if scanned is not None:
            return Found(hits, (shard, scanned), _before(dataset, shard) + scanned)
        shard, row = shard + 1, 0
        if len(hits) >= PAGE or (time.monotonic() > deadline and shard < len(dataset.segments)):
            return Found(hits, (shard, 0) if shard < len(dataset.segments) else None, _before(dataset, shard))
    return Found(hits, None, _before(dataset, len(dataset.segments)))


def _before(dataset: Dataset, shard: int) -> int:
    return int(dataset.segments.documents[:shard].sum())


class _Look:
    """Looks for documents in shards."""

    def __init__(self, dataset: Dataset, query: Query) -> None:
        self._dataset = dataset
        self._query = query
        self._texts = dataset.token_text
        self._tokens = lru_cache(1)(dataset.token_shard)
        selection = None
        if query.where or query.source:
            selection = Selection.of(
                ids=None, sources=[query.source] if query.source else (), where=query.where or None
            )
        schema = dataset.schema if dataset.kind == "records" else DOCUMENTS_SCHEMA
        self._matcher = Matcher(selection, schema) if selection else None

    def shard(self, index: int, *, start: int, most: int, deadline: float) -> tuple[list[dict[str, Any]], int | None]:
        """Return hits of a shard from row `start` on, and the row to go on from; None: the shard is done."""
        table = self._table(index)
        chosen = np.flatnonzero(self._meant(table))
        chosen = chosen[chosen >= start]
        found: list[dict[str, Any]] = []
        for first in range(0, chosen.size, _TEXT_ROWS):
            some = chosen[first : first + _TEXT_ROWS]
            if self._query.text and self._query.inside:
                some = some[[self._has(text) for text in self._text(index, table, some)]]
            found += self._described(index, table, some[: most - len(found)])
            if len(found) >= most or time.monotonic() > deadline:
                after = (
                    int(found[-1]["row"]) + 1
                    if len(found) >= most
                    else int(chosen[min(first + _TEXT_ROWS, chosen.size) - 1]) + 1
                )
                return found, after if after < table.num_rows else None
        return found, None

    def _table(self, index: int) -> pa.Table:
        return self._dataset.documents(index) if self._dataset.kind == "tokens" else self._dataset.record_shard(index)

    def _meant(self, table: pa.Table) -> Any:
        meant = np.ones(table.num_rows, np.bool_)
        if self._matcher is not None:
            meant &= self._matcher.match(table.select(self._matcher.columns))[0]
        if self._query.text and not self._query.inside:
            named = np.zeros(table.num_rows, np.bool_)
            for name in ("id", "source"):
                if name in table.column_names:
                    values: Any = pc.cast(table.column(name), pa.string())
                    hit = pc.match_substring(values, self._query.text, ignore_case=True)
                    named |= numbers_of(hit.fill_null(False).combine_chunks())
            meant &= named
        return meant

    def _has(self, text: str) -> bool:
        return self._query.text.casefold() in text.casefold()

    def _text(self, index: int, table: pa.Table, rows: Any, *, most_tokens: int | None = None) -> list[str]:
        """Return the texts of some rows; of tokens, if that is enough, only what the first of them make."""
        if self._dataset.kind == "records":
            names = [field.name for field in table.schema if pa.types.is_string(field.type)]
            columns = [table.column(name).take(pa.array(rows)).to_pylist() for name in names]
            return (
                ["\n".join(value or "" for value in row) for row in zip(*columns, strict=True)]
                if names
                else [""] * len(rows)
            )
        if self._texts is None:
            raise ConfigError(
                "the dataset names no tokenizer that its tokens could be read by", hint="Search ids and sources."
            )
        values, offsets = self._tokens(index)
        return [self._texts.decode(values[offsets[row] : offsets[row + 1]][:most_tokens]) for row in rows.tolist()]

    def _described(self, index: int, table: pa.Table, rows: Any) -> list[dict[str, Any]]:
        alive = self._dataset.live_rows(index)
        taken = table.take(pa.array(rows))
        texts = [""] * len(rows)
        if self._dataset.kind == "records" or self._texts:
            texts = self._text(index, table, rows, most_tokens=_EXCERPT_TOKENS)
        columns = {
            name: taken.column(name).to_pylist() for name in ("id", "source", "tokens") if name in table.column_names
        }
        return [
            {
                "shard": index,
                "row": row,
                "id": str(columns.get("id", [row] * len(rows))[place]),
                "source": str(columns["source"][place]) if "source" in columns else "",
                "size": columns["tokens"][place] if "tokens" in columns else None,
                "deleted": alive is not None and not alive[row],
                "excerpt": " ".join(texts[place][: 2 * _EXCERPT].split())[:_EXCERPT],
            }
            for place, row in enumerate(rows.tolist())
        ]


@dataclass(frozen=True, slots=True)
class Piece:
    """One token as it is shown."""

    text: str
    token: int
    learned: bool = True
    """Whether the loss mask has it."""


@dataclass(frozen=True, slots=True)
class Field:
    """One column of a record, as it is shown."""

    name: str
    kind: str
    """`text`, `image`, `audio`, `chat` or `value`."""

    value: Any


@dataclass(frozen=True, slots=True)
class Document:
    """One document."""

    shard: int
    row: int
    facts: dict[str, Any]
    deleted: bool
    pieces: list[Piece] = field(default_factory=list)
    """Of tokens: the first some thousand."""

    fields: list[Field] = field(default_factory=list)
    """Of a record."""

    more: int = 0
    """Tokens that are not shown."""


def show(dataset: Dataset, shard: int, row: int) -> Document:
    """Return one document.

    Raises:
        MissingError: there is none at that place, or a file is gone.
        CorruptError: a file is damaged.
    """
    _require(dataset, shard, row)
    alive = dataset.live_rows(shard)
    deleted = alive is not None and not bool(alive[row])
    if dataset.kind == "records":
        values = dataset.record_shard(shard).slice(row, 1).to_pylist()[0]
        return Document(shard, row, {}, deleted, fields=[_field(name, value) for name, value in values.items()])
    facts = dataset.documents(shard).slice(row, 1).drop_columns(["digest"]).to_pylist()[0]
    table = dataset.token_lists(shard).slice(row, 1)
    tokens = np.asarray(table.column("tokens")[0].as_py()[:_SHOWN_TOKENS])
    mask = table.column("loss_mask")[0].as_py() if "loss_mask" in table.column_names else None
    pieces = _pieces(dataset.token_text, tokens, mask)
    return Document(shard, row, facts, deleted, pieces=pieces, more=max(0, int(facts["tokens"]) - len(tokens)))


def _require(dataset: Dataset, shard: int, row: int) -> None:
    if not (0 <= shard < len(dataset.segments) and 0 <= row < dataset.segments.shard(shard).documents):
        raise MissingError("there is no such document", shard=shard, row=row, hint="Go back to the list.")


def _pieces(text: TokenText | None, tokens: Any, mask: Sequence[int] | None) -> list[Piece]:
    if text is None:
        return [Piece(str(token), token) for token in tokens.tolist()]
    learned = [bool(each) for each in mask] if mask is not None else [True] * len(tokens)
    return [
        Piece(text.decode(tokens[place : place + 1]) or f"<{token}>", int(token), learned[place])
        for place, token in enumerate(tokens.tolist())
    ]


def _field(name: str, value: Any) -> Field:
    raw = raw_of(value)
    if raw is not None and (kind := media_type(raw)):
        return Field(name, kind.split("/", maxsplit=1)[0], None)
    if isinstance(value, list) and value and all(isinstance(turn, Mapping) and "role" in turn for turn in value):
        return Field(name, "chat", [(str(turn["role"]), str(turn.get("content") or "")) for turn in value])
    if isinstance(value, str):
        return Field(name, "text", value[:_SHOWN_TEXT])
    shown = f"{len(raw):,} bytes" if raw is not None else str(value)
    return Field(name, "value", shown[:_SHOWN_TEXT])


def raw_of(value: Any) -> bytes | None:
    """Return the bytes of an image or a sound, as rows have them: themselves, or in a struct."""
    found = value.get("bytes") if isinstance(value, Mapping) else value
    return bytes(found) if isinstance(found, bytes | bytearray) else None


_SIGNS = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF8", "image/gif"),
    (b"OggS", "audio/ogg"),
    (b"fLaC", "audio/flac"),
    (b"ID3", "audio/mpeg"),
    (b"\xff\xfb", "audio/mpeg"),
)


def media_type(raw: bytes) -> str:
    """Return what some bytes are, if a browser can show it; empty if not. SVG is none: it may hold scripts.

    >>> media_type(b"RIFF....WAVEfmt ")
    'audio/wav'
    """
    if raw[:4] == b"RIFF":
        return {b"WEBP": "image/webp", b"WAVE": "audio/wav"}.get(raw[8:12], "")
    return next((kind for sign, kind in _SIGNS if raw.startswith(sign)), "")


def blob(dataset: Dataset, shard: int, row: int, name: str) -> tuple[bytes, str]:
    """Return the bytes of an image or sound, and what they are.

    Raises:
        MissingError: there is none of that name in that place.
    """
    _require(dataset, shard, row)
    raw = None
    if dataset.kind == "records" and name in dataset.schema.names:
        raw = raw_of(dataset.record_shard(shard).column(name)[row].as_py())
    if raw is None or not (kind := media_type(raw)):
        raise MissingError("there is no such picture or sound", shard=shard, row=row, column=name, hint="Go back.")
    return raw, kind

"""Writing tokens from a program of one's own: documents are collected into shards, and the end of the block commits all.

    with token_writer("data/chat", tokenizer="tokenizer.json", columns={"loss_mask": "bool"}) as out:
        out.write(tokens, id="1", loss_mask=answers)

Tokens are taken as they are: who wants an end of text after each document writes it. What goes with each token is declared
once, and given with every document. If the block raises, nothing is committed.

With a `task_id`, the same documents make the same shards, and a program that was killed may simply run again: what is
committed already is not added twice. Other documents under the same id are refused. Without one, every block adds.
"""

import os
import uuid
from collections.abc import Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from typing_extensions import override

from datastore.dataset.log.manifest import Commit, TokenizerRef
from datastore.dataset.operations.append import add_shards
from datastore.dataset.operations.transaction import draft_commit
from datastore.dataset.shards.files import put_tokenizer, read_documents, shard_uid, write_token_shard
from datastore.dataset.shards.info import ShardInfo
from datastore.dataset.shards.segments import Segments, load_segments
from datastore.digest import digest_bytes
from datastore.errors import ConfigError, ConflictError
from datastore.formats.arrow import table_of
from datastore.formats.documents import DOCUMENTS_SCHEMA
from datastore.formats.tokens import ColumnType, column_type, encode_tokens, narrow_tokens, offsets_of, token_dtype
from datastore.ingestion.destination import Destination, open_target
from datastore.ingestion.settings import IngestSettings
from datastore.ingestion.writers.records import ShardWriter

__all__ = ["ColumnTypes", "TokenWriter", "token_writer"]

_SHARD_BYTES = 64 * 2**20
ColumnTypes = Mapping[str, str | tuple[str, int]]
"""For each column NumPy's name of its type, and, if there are several values for each token, how many."""

_NO_COLUMNS: ColumnTypes = MappingProxyType({})
_TAKEN = frozenset({"tokens", "id", "source"})


def token_writer(
    url: str | os.PathLike[str],
    *,
    tokenizer: str | os.PathLike[str] = "",
    end_of_text: str = "<|endoftext|>",
    vocab_size: int = 0,
    columns: ColumnTypes = _NO_COLUMNS,
    task_id: str = "",
) -> "TokenWriter":
    """Return a writer of tokenized documents to the dataset at `url`, which is made if it is not there.

    `tokenizer` is the path or URL of the `tokenizer.json` that made the tokens, `end_of_text` what it calls the token
    that ends a document; by default they are those that the dataset names. Without either, `vocab_size` says which ids
    there may be. `columns` maps the names of further columns, which have a value for each token, to their types. With a
    `task_id` a program that was killed may run again: the same documents make the same shards.

    Raises:
        ConfigError: the place holds something else, or was made with another tokenizer; a column cannot be stored, or is
            not what the dataset has; or nobody says how large the vocabulary is.
        MissingError: there is no such tokenizer.
    """
    target = open_target(os.fspath(url))
    target.require_kind("tokens")
    declared = [_declared(name, kind) for name, kind in sorted(columns.items())]
    _check_columns(target, declared)
    ref = target.newest.tokenizer if target.newest is not None else None
    if tokenizer:
        settings = IngestSettings(tokenizer=os.fspath(tokenizer), end_of_text=end_of_text)
        chosen = target.choose_tokenizer(settings)
        assert chosen is not None, "one is named"
        ref = put_tokenizer(
            target.storage, chosen.raw, vocab_size=chosen.ref.vocab_size, end_of_text=chosen.ref.end_of_text
        )
    if (ref.vocab_size if ref is not None else vocab_size) < 1:
        raise ConfigError(
            "nobody says how large the vocabulary is",
            url=target.storage.url,
            hint="Name the tokenizer, or give vocab_size.",
        )
    vocab_size = ref.vocab_size if ref is not None else vocab_size
    return TokenWriter(target, tokenizer=ref, vocab_size=vocab_size, columns=declared, task_id=task_id)


class TokenWriter(ShardWriter):
    """Collects documents into shards of about 64 MiB. Not safe for several threads."""

    def __init__(
        self,
        target: Destination,
        *,
        tokenizer: TokenizerRef | None,
        vocab_size: int,
        columns: Sequence[ColumnType],
        task_id: str,
    ) -> None:
        super().__init__(target.storage)
        self._newest = target.newest
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._columns = {column.name: column for column in columns}
        self._task_id = task_id
        self._unique_id = task_id or uuid.uuid4().hex
        self._documents: list[tuple[str, str, int, bytes]] = []
        self._values: list[npt.NDArray[Any]] = []
        self._beside: dict[str, list[npt.NDArray[Any]]] = {name: [] for name in self._columns}
        self._size_bytes = 0

    def write(
        self,
        tokens: npt.ArrayLike,
        *,
        id: str,  # noqa: A002 - what it is called everywhere
        source: str = "",
        **columns: npt.ArrayLike,
    ) -> None:
        """Add a document of `tokens`, with the values of each declared column that go with them.

        Raises:
            ConfigError: a token is not in the vocabulary; a column is missing, unknown, of another length or type. The
                document is not written.
            StorageError: a full shard could not be stored.
        """
        values = np.asarray(tokens)
        if values.ndim != 1 or (values.size and not np.issubdtype(values.dtype, np.integer)):
            raise ConfigError(
                "tokens are a flat list of integers", id=id, shape=values.shape, hint="Give one document."
            )
        if values.size and not 0 <= int(values.min()) <= int(values.max()) < self._vocab_size:
            raise ConfigError(
                "a token is outside of the vocabulary",
                id=id,
                smallest=int(values.min()),
                largest=int(values.max()),
                vocab_size=self._vocab_size,
                hint="Use the tokenizer that the dataset names.",
            )
        if columns.keys() != self._columns.keys():
            raise ConfigError(
                "a document has other columns than were declared",
                id=id,
                given=sorted(columns),
                declared=sorted(self._columns),
                hint="Declare them for token_writer, and give each with every document.",
            )
        beside = {name: _converted(columns[name], kind, len(values), id) for name, kind in self._columns.items()}
        stored = narrow_tokens(values, token_dtype(self._vocab_size))
        self._documents.append((id, source, len(values), digest_bytes(stored.tobytes())))
        self._values.append(stored)
        self._size_bytes += stored.nbytes + sum(column.nbytes for column in beside.values())
        for name, column in beside.items():
            self._beside[name].append(column)
        if self._size_bytes >= _SHARD_BYTES:
            self._store_shard()

    @override
    def _commit(self) -> Commit:
        if not self._shards:
            raise ConfigError("nothing was written", url=self.storage.url, hint="Write a document.")
        draft = msgspec.structs.replace(draft_commit("append"), tokenizer=self._tokenizer)
        return add_shards(self.storage, self._shards, draft, settle=self._last.settle)

    @override
    def _store_shard(self) -> None:
        if not self._documents:
            return
        ids, sources, lengths, digests = zip(*self._documents, strict=True)
        offsets = offsets_of(lengths)
        zeros = np.zeros(len(lengths), np.int64)
        documents = table_of([ids, sources, zeros, zeros, lengths, digests], DOCUMENTS_SCHEMA)
        values = np.concatenate(self._values)
        columns = {name: np.concatenate(parts) for name, parts in self._beside.items()}
        uid = shard_uid(self._unique_id, len(self._shards))
        shard = self._present(uid) if self._task_id else None
        if shard is None:
            shard = write_token_shard(
                self._to, uid=uid, values=values, offsets=offsets, documents=documents, columns=columns
            )
        elif not self._is_same(shard, documents, encode_tokens(values, offsets, columns=columns).data):
            # A shard that is committed is never written again: other bytes under its name would be damage.
            raise ConflictError(
                "other documents were written under this task id",
                task_id=self._task_id,
                url=self.storage.url,
                hint="One task id stands for one input; choose another one.",
            )
        self._shards.append(shard)
        self._documents, self._values, self._size_bytes = [], [], 0
        self._beside = {name: [] for name in self._columns}

    def _present(self, uid: str) -> ShardInfo | None:
        """Return the shard `uid` of the version that is added to, if it has it."""
        segments = self._segments
        (place,) = segments.find([uid]).tolist()
        return segments.shard(place) if place >= 0 else None

    def _is_same(self, shard: ShardInfo, documents: pa.Table, data: bytes) -> bool:
        return shard.digest == digest_bytes(data) and bool(read_documents(self.storage, shard).equals(documents))

    @cached_property
    def _segments(self) -> Segments:
        return Segments([]) if self._newest is None else load_segments(self.storage, self._newest)

    @override
    def _withdraw(self) -> None:
        if not self._task_id:  # Those of a task id may be another run's, too.
            super()._withdraw()


def _check_columns(target: Destination, declared: Sequence[ColumnType]) -> None:
    """Refuse at once what a commit would refuse in the end."""
    if target.newest is None:
        return
    stored = load_segments(target.storage, target.newest)
    present = [ColumnType(column.name, column.dtype, column.width) for column in stored.columns]
    if len(stored) and present != list(declared):
        raise ConfigError(
            "the tokens of the dataset have other columns beside them",
            url=target.storage.url,
            dataset={column.name: (column.dtype, column.width) for column in present},
            given={column.name: (column.dtype, column.width) for column in declared},
            hint="Declare the same columns, or name another URL.",
        )


def _declared(name: str, kind: str | tuple[str, int]) -> ColumnType:
    if name in _TAKEN:
        raise ConfigError("not a name for a column", column=name, hint=f"{', '.join(sorted(_TAKEN))} are taken.")
    dtype, width = (kind, 1) if isinstance(kind, str) else kind
    return column_type(name, dtype, width=width)


def _converted(given: npt.ArrayLike, kind: ColumnType, tokens: int, document: str) -> npt.NDArray[Any]:
    """Return the values of one document as they are stored; what would not stay what it is is refused."""
    values = np.asarray(given)
    shape = (tokens,) if kind.width == 1 else (tokens, kind.width)
    wrong = values.shape != shape
    if not wrong:
        with np.errstate(over="ignore", invalid="ignore"):
            stored = values.astype(kind.dtype)
            wrong = not _is_equal(stored, values)
    if wrong or (kind.name == "loss_mask" and stored.size and stored.max() > 1):
        raise ConfigError(
            "a column does not fit what was declared",
            id=document,
            column=kind.name,
            given=f"{values.dtype.name} {values.shape}",
            declared=f"{kind.dtype} {shape}",
            hint="Give one value for each token, which the type holds exactly; round floats to it yourself.",
        )
    return stored


def _is_equal(stored: npt.NDArray[Any], values: npt.NDArray[Any]) -> bool:
    """Return whether no value has changed; a bool stays one, and a NaN is equal to a NaN."""
    if (stored.dtype.kind == "b") is not (values.dtype.kind == "b") and values.size and not _is_bit(values):
        return False
    return np.array_equal(stored, values, equal_nan=stored.dtype.kind == "f" and values.dtype.kind == "f")


def _is_bit(values: npt.NDArray[Any]) -> bool:
    return bool(np.isin(values, (0, 1)).all())

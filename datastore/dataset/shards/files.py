"""The files of shards, read and written whole: each is written once, with its digests, and read against them.

So are tokenizers: the exact bytes that made the tokens, named by their sha256.
"""

import logging
from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from typing_extensions import Buffer

from datastore.dataset.log.keys import documents_key, shard_key, tokenizer_key
from datastore.dataset.log.manifest import TokenizerRef
from datastore.dataset.shards.info import BatchRange, ColumnLayout, ShardInfo, ShardLayout, frame_ranges
from datastore.dataset.shards.segment_file import BLOCK_BYTES
from datastore.digest import block_digests, digest_bytes, digest_hex, sha256_hex
from datastore.errors import ConfigError, CorruptError, StorageError
from datastore.formats.arrow import numbers_of
from datastore.formats.documents import DOCUMENTS_SCHEMA, decode_documents, encode_documents
from datastore.formats.evolution import schema_id
from datastore.formats.records import EncodedRecords, RecordFormat, decode_records, encode_records
from datastore.formats.tokens import Offsets, Tokens, TokenTable, decode_token_table, decode_tokens, encode_tokens
from datastore.storage.base import Storage
from datastore.storage.verified import first_sound, read_checked

__all__ = [
    "put_tokenizer",
    "read_documents",
    "read_record_shard",
    "read_token_shard",
    "read_token_table",
    "read_tokenizer",
    "remove_unused",
    "shard_uid",
    "store_records",
    "write_record_shard",
    "write_token_shard",
]

_LOGGER = logging.getLogger(__name__)

_NO_COLUMNS: Mapping[str, npt.NDArray[Any]] = MappingProxyType({})


def shard_uid(task_id: str, index: int) -> str:
    """Return the uid of shard `index` of a task: the same task makes the same shards, whoever runs it."""
    return digest_hex(f"{task_id}/{index}".encode())


def write_token_shard(
    storage: Storage,
    *,
    uid: str,
    values: Tokens,
    offsets: Offsets,
    documents: pa.Table,
    columns: Mapping[str, npt.NDArray[Any]] = _NO_COLUMNS,
) -> ShardInfo:
    """Store a token shard and its documents; return what a commit needs to know of it. Nothing shows before that.

    Row `i` of `documents` (as `DOCUMENTS_SCHEMA`) describes `values[offsets[i]:offsets[i + 1]]`; `columns`, [T] or
    [T, width] each, lie beside the tokens. Writing the same shard again is no error: it has the same bytes.

    Raises:
        ConfigError: the rows do not match the offsets, or as `encode_tokens` and `encode_documents`.
    """
    encoded = encode_tokens(values, offsets, columns=columns)
    counts = np.diff(offsets)
    if not np.array_equal(numbers_of(documents.column("tokens")), counts):
        raise ConfigError(
            "documents do not match the shard's rows",
            uid=uid,
            documents=documents.num_rows,
            rows=counts.size,
            hint="Row i of the documents describes row i of the shard, and counts its tokens.",
        )
    docs = encode_documents(documents)
    docs_path = documents_key(uid)
    path = shard_key(uid)
    storage.put(docs_path, docs)
    storage.put(path, encoded.data)
    sources = documents.column("source")
    layout = encoded.layout
    return ShardInfo(
        uid=uid,
        path=path,
        kind="tokens",
        dtype=layout.dtype,
        documents=layout.documents,
        tokens=layout.tokens,
        size_bytes=len(encoded.data),
        values_start=layout.values_start,
        offsets_start=layout.offsets_start,
        offsets_dtype=layout.offsets_dtype,
        block_bytes=BLOCK_BYTES,
        digest=digest_bytes(encoded.data),
        block_digests=block_digests(encoded.data, BLOCK_BYTES),
        docs_path=docs_path,
        docs_bytes=len(docs),
        docs_digest=digest_bytes(docs),
        source_first=str(sources[0]) if layout.documents else "",
        source_last=str(sources[-1]) if layout.documents else "",
        layout=ShardLayout(
            columns=tuple(
                ColumnLayout(name=kind.name, dtype=kind.dtype, width=kind.width, values_start=start)
                for kind, start in layout.columns
            )
        ),
    )


def write_record_shard(
    storage: Storage,
    *,
    uid: str,
    table: pa.Table,
    format: RecordFormat = "arrow",  # noqa: A002
    name: str = "",
) -> ShardInfo:
    """Store the rows of `table` as a record shard; return what a commit needs to know of it.

    Its schema, with all that is noted in it, must be that of the version that will have it. The file is called after
    the uid, or `name`.

    Raises:
        ConfigError: as `encode_records`.
    """
    encoded = encode_records(table, format=format)
    return store_records(storage, encoded, uid=uid, schema=table.schema, format=format, name=name)


def store_records(
    storage: Storage,
    encoded: EncodedRecords,
    *,
    uid: str,
    schema: pa.Schema,
    format: RecordFormat,  # noqa: A002
    name: str = "",
) -> ShardInfo:
    """Store a record shard that is encoded, of rows of `schema`; otherwise as `write_record_shard`."""
    data = encoded.data
    path = shard_key(name or uid, suffix=format)
    storage.put(path, data)
    batches = tuple(BatchRange(*span, digest_bytes(data[span.start : span.stop])) for span in encoded.batches)
    frame = [data[start:stop] for start, stop in frame_ranges(batches, len(data))]
    layout = ShardLayout(batches=batches, frame_digest=digest_bytes(*frame), format=format, schema_id=schema_id(schema))
    return ShardInfo(
        uid=uid,
        path=path,
        kind="records",
        dtype="",
        documents=sum(batch.rows for batch in encoded.batches),
        tokens=0,
        size_bytes=len(data),
        values_start=0,
        offsets_start=0,
        offsets_dtype="",
        block_bytes=BLOCK_BYTES,
        digest=digest_bytes(data),
        block_digests=block_digests(data, BLOCK_BYTES),
        docs_path="",
        docs_bytes=0,
        docs_digest=bytes(16),
        source_first="",
        source_last="",
        layout=layout,
    )


def read_token_shard(storage: Storage, shard: ShardInfo) -> tuple[Tokens, Offsets]:
    """Return the flat tokens and document offsets of a shard, all of it read and checked.

    Raises:
        MissingError: its file is gone.
        CorruptError: its file is damaged.
    """
    return decode_tokens(read_checked(storage, shard.path, size_bytes=shard.size_bytes, digest=shard.digest))


def read_token_table(storage: Storage, shard: ShardInfo) -> TokenTable:
    """Return all that a token shard holds, its columns too; what `write_token_shard` was given.

    Raises:
        MissingError: its file is gone.
        CorruptError: its file is damaged.
    """
    return decode_token_table(read_checked(storage, shard.path, size_bytes=shard.size_bytes, digest=shard.digest))


def read_record_shard(storage: Storage, shard: ShardInfo) -> pa.Table:
    """Return the rows of a record shard, all of it read and checked.

    Raises:
        MissingError: its file is gone.
        CorruptError: its file is damaged.
    """
    raw = read_checked(storage, shard.path, size_bytes=shard.size_bytes, digest=shard.digest)
    return decode_records(raw, format=shard.layout.format)


def read_documents(storage: Storage, shard: ShardInfo, *, columns: Sequence[str] = DOCUMENTS_SCHEMA.names) -> pa.Table:
    """Return the documents of a token shard, one row per row of the shard; only `columns` are decoded.

    Raises:
        MissingError: their file is gone.
        CorruptError: their file is damaged.
    """
    raw = read_checked(storage, shard.docs_path, size_bytes=shard.docs_bytes, digest=shard.docs_digest)
    return decode_documents(raw, columns=columns)


def remove_unused(storage: Storage, paths: Iterable[str]) -> None:
    """Remove files that no version names; one that cannot be removed stays, and a warning says so."""
    for path in paths:
        try:
            storage.delete(path)
        except StorageError as error:
            _LOGGER.warning("an unused file is left behind: %s", error)


def put_tokenizer(storage: Storage, raw: Buffer, *, vocab_size: int, end_of_text: int) -> TokenizerRef:
    """Store the `tokenizer.json` bytes `raw`; return how a commit names them. Storing them twice is no error."""
    ref = TokenizerRef(sha256=sha256_hex(raw), vocab_size=vocab_size, end_of_text=end_of_text)
    storage.put(tokenizer_key(ref.sha256), raw)
    return ref


def read_tokenizer(storage: Storage, ref: TokenizerRef) -> bytes:
    """Return the bytes of the tokenizer `ref`.

    Raises:
        MissingError: the file is gone.
        CorruptError: its sha256 differs.
    """
    key = tokenizer_key(ref.sha256)
    return first_sound(
        storage, key, lambda place: _checked(place.get(key), ref), is_good=lambda raw: sha256_hex(raw) == ref.sha256
    )


def _checked(raw: bytes, ref: TokenizerRef) -> bytes:
    found = sha256_hex(raw)
    if found != ref.sha256:
        raise CorruptError(
            "tokenizer does not match its sha256",
            where=tokenizer_key(ref.sha256),
            expected=ref.sha256,
            found=found,
            hint="Restore this file from a copy.",
        )
    return raw

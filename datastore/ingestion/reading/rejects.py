"""Records that give no document: where each stands, why, and how it begins."""

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import orjson

from datastore.errors import CorruptError
from datastore.ingestion.reading.streams import HEAD_BYTES

__all__ = ["Reason", "Reject", "decode_rejects", "encode_rejects", "reject"]

Reason = Literal[
    "bad_message",
    "bad_record",
    "bad_tools",
    "bomb",
    "content_not_text",
    "corrupt_stream",
    "digest_mismatch",
    "duplicate_id",
    "empty_text",
    "id_not_text",
    "invalid_json",
    "invalid_utf8",
    "lone_surrogate",
    "mask_unknown",
    "message_dropped",
    "missing_text",
    "no_answer",
    "no_messages",
    "no_tokens",
    "nul",
    "null_text",
    "pair_disagrees",
    "special_token",
    "template_refused",
    "text_lost",
    "text_not_string",
    "token_out_of_range",
    "too_long",
    "truncated",
    "unknown_encoding",
]
"""Why a document was rejected; `docs/` explains each."""


class Reject(NamedTuple):
    """One record that gives no document."""

    source: str
    offset: int
    reason: Reason
    excerpt: str
    """Its first 200 bytes; those that are no UTF-8 as `\\xNN`."""


def encode_rejects(rejects: Sequence[Reject]) -> bytes:
    """Return `rejects` as JSON lines."""
    return b"".join(orjson.dumps(reject._asdict(), option=orjson.OPT_APPEND_NEWLINE) for reject in rejects)


def decode_rejects(raw: bytes, *, where: str) -> Iterator[Reject]:
    """Yield the rejects of the JSON lines `raw`.

    Raises:
        CorruptError: a line is damaged, as far as that shows: only people read them.
    """
    for line in raw.split(b"\n")[:-1]:
        try:
            found = Reject(**orjson.loads(line))
        except (TypeError, ValueError) as error:
            raise CorruptError(f"a line is no reject: {error}", where=where) from None
        yield found


def reject(source: str, offset: int, reason: Reason, data: bytes | str) -> Reject:
    """Return the reject for the record that begins with `data`."""
    raw = data if isinstance(data, bytes) else data[:HEAD_BYTES].encode("utf-8", "surrogatepass")
    return Reject(source, offset, reason, raw[:HEAD_BYTES].decode("utf-8", "backslashreplace"))

"""A decoder that is handed damaged bytes without their digest raises, or reads something; it never crashes or hangs.

Digests find every flip before a decoder sees it. This is the second line: a file that some other writer made.
"""

from collections.abc import Callable

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from datastore.errors import CorruptError
from datastore.formats.documents import DOCUMENTS_SCHEMA, decode_documents, encode_documents
from datastore.formats.records import decode_records, encode_records
from datastore.formats.schema import decode_schema, encode_schema
from datastore.storage.memory import MemoryStorage
from datastore.store.segment import Segments, decode_segment, encode_segment, segment_of
from datastore.testing.datasets import documents_of, make_shard

SHARDS = [make_shard(MemoryStorage("decoder-fuzz"), f"{index:032x}", lengths=[3, 4]) for index in range(5)]
RECORDS = pa.table({"text": ["ein", None, "drei"], "labels": [["a", "b"], [], None], "image": [b"\0", b"", None]})


def damaged(raw: bytes) -> st.SearchStrategy[bytes]:
    """Return `raw` with a few bytes changed, perhaps cut."""

    def change(edits: list[tuple[int, int]], stop: int) -> bytes:
        out = bytearray(raw)
        for place, mask in edits:
            out[place] ^= mask
        return bytes(out[:stop])

    edits = st.lists(st.tuples(st.integers(0, len(raw) - 1), st.integers(1, 255)), min_size=1, max_size=6)
    return st.builds(change, edits, st.one_of(st.just(len(raw)), st.integers(0, len(raw))))


def read_segment(raw: bytes) -> None:
    segments = Segments([decode_segment(raw, where="here")])
    assert len(list(segments)) == len(segments) <= len(raw)
    assert segments.tokens.size == segments.uid64.size == segments.itemsize.size == len(segments)


def read_documents(raw: bytes) -> None:
    assert decode_documents(raw).schema.equals(DOCUMENTS_SCHEMA)


def read_records(raw: bytes) -> None:
    decode_records(raw).to_pylist()


def read_schema(raw: bytes) -> None:
    assert len(decode_schema(raw).names) <= len(raw)


DECODERS = {
    "segment": (read_segment, encode_segment(segment_of(SHARDS))),
    "documents": (read_documents, encode_documents(documents_of("0" * 32, [1, 2, 3]))),
    "records": (read_records, bytes(encode_records(RECORDS).data)),
    "schema": (read_schema, encode_schema(RECORDS.schema)),
}


@pytest.mark.parametrize("name", DECODERS)
@settings(deadline=None)
@given(data=st.data())
def test_damage_is_an_error_or_another_value(name: str, data: st.DataObject) -> None:
    read: Callable[[bytes], None]
    read, raw = DECODERS[name]
    try:
        read(data.draw(damaged(raw)))
    except CorruptError:
        return

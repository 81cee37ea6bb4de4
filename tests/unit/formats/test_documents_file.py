"""The documents file: its columns, its bytes, what it refuses."""

import pyarrow as pa
import pytest

from datastore.errors import ConfigError, CorruptError
from datastore.formats.documents import DOCUMENTS_SCHEMA, decode_documents, encode_documents
from datastore.testing.examples import documents_of

UID = "00" * 16


def test_what_is_read_is_what_was_written() -> None:
    table = documents_of(UID, [3, 0, 7])
    assert decode_documents(encode_documents(table)).equals(table)


def test_no_documents_are_a_file_too() -> None:
    assert decode_documents(encode_documents(DOCUMENTS_SCHEMA.empty_table())).num_rows == 0


def test_the_same_rows_give_the_same_bytes_however_they_are_chunked() -> None:
    # More than a megabyte of ids, so that the column has several pages and their borders show.
    rows = 30_000
    table = documents_of(UID, [1] * rows).set_column(0, "id", pa.array([f"{index:060d}" for index in range(rows)]))
    pieces = pa.concat_tables([table.slice(0, 3), table.slice(3, 17_000), table.slice(17_003)])
    assert encode_documents(pieces) == encode_documents(table)


def test_columns_in_another_order_give_the_same_bytes() -> None:
    table = documents_of(UID, [1, 2])
    assert encode_documents(table.select(table.column_names[::-1])) == encode_documents(table)


@pytest.mark.parametrize("column", DOCUMENTS_SCHEMA.names)
def test_a_missing_column_is_refused(column: str) -> None:
    with pytest.raises(ConfigError, match="not a documents table"):
        encode_documents(documents_of(UID, [1]).drop_columns([column]))


def test_an_extra_column_is_refused() -> None:
    with pytest.raises(ConfigError, match="unexpected columns"):
        encode_documents(documents_of(UID, [1]).append_column("more", pa.array([1])))


@pytest.mark.parametrize("column", DOCUMENTS_SCHEMA.names)
def test_a_null_is_refused(column: str) -> None:
    table = documents_of(UID, [1, 2])
    place = table.column_names.index(column)
    nulls = pa.nulls(2, table.schema.field(column).type)
    with pytest.raises(ConfigError, match="null"):
        encode_documents(table.set_column(place, pa.field(column, nulls.type), nulls))


def test_a_wrong_type_is_refused() -> None:
    table = documents_of(UID, [1, 2])
    with pytest.raises(ConfigError, match="not a documents table"):
        encode_documents(table.set_column(0, "digest", pa.array([b"short", b"digests"])))


@pytest.mark.parametrize("raw", [b"", b"PAR1", b"nothing of the kind", b"PAR1" + bytes(100) + b"PAR1"])
def test_what_is_not_a_documents_file_is_said_to_be_none(raw: bytes) -> None:
    with pytest.raises(CorruptError, match="not a documents file"):
        decode_documents(raw)

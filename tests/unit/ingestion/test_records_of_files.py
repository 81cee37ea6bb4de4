"""What becomes of a record: a document, nothing, or a reject with the right reason."""

import pytest

from datastore.ingestion.reading.documents import Reject, TextRecord, line_parser, text_parser
from datastore.ingestion.reading.streams import RecordPiece


def piece(data: bytes, offset: int = 40, length: int | None = None) -> RecordPiece:
    return RecordPiece(offset, data, len(data) if length is None else length, ended=True)


def line(data: bytes) -> TextRecord | Reject | None:
    return line_parser("f.jsonl", text_key="text", id_key="id")(piece(data))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"text": "caf\xe9"}', "invalid_utf8"),
        (b'{"text": "a"', "invalid_json"),
        (b'{"text": NaN}', "invalid_json"),
        (b'["text"]', "invalid_json"),
        (b'"text"', "invalid_json"),
        (b"[" * 5000 + b"]" * 5000, "invalid_json"),
        (b'{"body": "a"}', "missing_text"),
        (b'{"text": null}', "null_text"),
        (b'{"text": ""}', "empty_text"),
        (b'{"text": 7}', "text_not_string"),
        (b'{"text": ["a"]}', "text_not_string"),
        (b'{"text": "a\\u0000b"}', "nul"),
        (b'{"text": "a\\ud800b"}', "lone_surrogate"),
        (b'{"text": "a", "id": ["x"]}', "id_not_text"),
        (b'{"text": "a", "id": true}', "id_not_text"),
        (b'{"text": "a", "id": 1.5}', "id_not_text"),
        (b'{"text": "a", "id": ""}', "id_not_text"),
    ],
)
def test_a_bad_line_is_rejected_for_its_reason_and_shown(data: bytes, reason: str) -> None:
    found = line(data)
    assert isinstance(found, Reject)
    assert (found.source, found.offset, found.reason) == ("f.jsonl", 40, reason)
    assert found.excerpt == data[:200].decode("utf-8", "backslashreplace")


def test_a_line_over_the_limit_is_rejected() -> None:
    found = line_parser("f", text_key="text", id_key="id")(piece(b'{"text', length=10**9))
    assert isinstance(found, Reject)
    assert found.reason == "too_long"


@pytest.mark.parametrize("data", [b"", b"   ", b"\r", b"\t \r"])
def test_a_blank_line_is_no_record(data: bytes) -> None:
    assert line(data) is None


@pytest.mark.parametrize(
    ("data", "name", "named"),
    [
        (b'{"text": "a"}', "f.jsonl#40", False),
        (b'{"text": "a", "id": null}', "f.jsonl#40", False),
        (b'{"text": "a", "id": "x"}', "x", True),
        (b'{"text": "a", "id": 12}', "12", True),
        (b'{"text": "a", "id": 12}\r', "12", True),
    ],
)
def test_a_document_is_called_by_its_id_or_by_its_place(data: bytes, name: str, named: bool) -> None:  # noqa: FBT001
    assert line(data) == TextRecord(name, "f.jsonl", 40, len(data), "a", named)


def test_a_surrogate_pair_is_one_character() -> None:
    found = line(b'{"text": "\\ud83d\\ude00"}')
    assert isinstance(found, TextRecord)
    assert found.text == "\N{GRINNING FACE}"


def test_a_byte_order_mark_belongs_to_no_document() -> None:
    whole = text_parser("f.txt", whole=True)(piece(b"\xef\xbb\xbfhello", offset=0))
    assert whole == TextRecord("f.txt", "f.txt", 3, 5, "hello", named=False)
    first = line_parser("f", text_key="text", id_key="id")(piece(b'\xef\xbb\xbf{"text": "a"}', offset=0))
    assert isinstance(first, TextRecord)
    assert first.text == "a"


@pytest.mark.parametrize(
    ("data", "reason"), [(b"caf\xe9", "invalid_utf8"), (b"a\0b", "nul"), (b"\xed\xa0\x80", "invalid_utf8")]
)
def test_a_text_file_that_is_not_utf8_is_rejected_never_repaired(data: bytes, reason: str) -> None:
    found = text_parser("f.txt", whole=True)(piece(data, offset=0))
    assert isinstance(found, Reject)
    assert found.reason == reason


def test_the_text_of_a_file_is_kept_to_the_byte() -> None:
    data = "  \r\nnaïve\t\n\n".encode()
    found = text_parser("f.txt", whole=True)(piece(data, offset=0))
    assert isinstance(found, TextRecord)
    assert found.text.encode() == data


def test_white_space_between_separators_is_no_document() -> None:
    assert text_parser("f.txt", whole=False)(piece(b"\n\n")) is None

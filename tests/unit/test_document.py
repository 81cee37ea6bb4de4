"""Documents: a value has one text, a text has one value, and no changed bit goes unseen."""

import subprocess
import sys
from typing import Annotated, Any

import jsonschema
import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datastore.checkpoint.format.manifest import PartInfo
from datastore.digest import digest_hex
from datastore.document import Document, Sealed, convert, decode, encode, json_schema, seal, unseal
from datastore.errors import ConfigError, CorruptError, FormatError


class Part(Document, frozen=True, kw_only=True):
    name: str
    size_bytes: Annotated[int, msgspec.Meta(ge=0)] = 0


class Stored(Sealed, frozen=True, kw_only=True):
    title: str
    ratio: float = 0.0
    parts: tuple[Part, ...] = ()
    notes: dict[str, str] = msgspec.field(default_factory=dict)
    parent: str | None = None


class Newer(Sealed, frozen=True, kw_only=True):
    newest_format = 2

    title: str = ""


TEXT = st.text(st.characters(codec="utf-8"), max_size=12)
PARTS = st.builds(Part, name=TEXT, size_bytes=st.integers(0, 2**63 - 1))
STORED = st.builds(
    Stored,
    title=TEXT,
    ratio=st.floats(allow_nan=False, allow_infinity=False),
    parts=st.lists(PARTS, max_size=3).map(tuple),
    notes=st.dictionaries(TEXT, TEXT, max_size=3),
    parent=st.none() | TEXT,
)


@given(STORED)
def test_what_was_sealed_is_unsealed_with_its_digest(document: Stored) -> None:
    found = unseal(Stored, seal(document), where="here")
    assert len(found.digest) == 32
    assert msgspec.structs.replace(found, digest="") == document


@given(STORED)
def test_sealing_again_changes_nothing(document: Stored) -> None:
    raw = seal(document)
    assert seal(unseal(Stored, raw, where="here")) == raw


@given(STORED, st.randoms(use_true_random=False))
def test_the_bytes_do_not_depend_on_the_order_in_which_a_map_was_filled(document: Stored, random: Any) -> None:
    items = list(document.notes.items())
    random.shuffle(items)
    assert seal(msgspec.structs.replace(document, notes=dict(items))) == seal(document)


@given(STORED, st.data())
def test_any_flipped_bit_of_a_sealed_document_is_found(document: Stored, data: st.DataObject) -> None:
    raw = bytearray(seal(document))
    position = data.draw(st.integers(0, 8 * len(raw) - 1))
    raw[position // 8] ^= 1 << position % 8
    with pytest.raises(CorruptError):
        unseal(Stored, raw, where="here")


@given(STORED, st.data())
def test_a_truncated_or_lengthened_document_is_found(document: Stored, data: st.DataObject) -> None:
    raw = seal(document)
    cut = data.draw(st.integers(0, len(raw) - 1))
    for changed in (raw[:cut], raw + b" ", b" " + raw, raw + raw):
        with pytest.raises(CorruptError):
            unseal(Stored, changed, where="here")


@given(
    st.binary(max_size=60)
    | st.sampled_from([b"[" * 100_000, b'{"format": 1e99}', b'{"format": "x"}', b"null", b"\xff"])
)
def test_bytes_that_are_no_document_are_called_corrupt(raw: bytes) -> None:
    with pytest.raises(CorruptError, match="here"):
        unseal(Stored, raw, where="here")


def test_a_document_of_a_newer_format_is_told_apart_from_a_corrupt_one() -> None:
    raw = seal(Newer(format=2, title="later"))
    assert unseal(Newer, raw, where="here").title == "later"
    with pytest.raises(FormatError, match="found=2, newest_known=1"):
        unseal(Stored, raw, where="here")
    with pytest.raises(FormatError, match="Install a newer datastore"):
        unseal(Stored, b'{"format": 9, "something": "else"}', where="here")


@given(STORED)
def test_encoded_is_decoded(document: Stored) -> None:
    assert decode(Stored, encode(document), where="here") == document


def test_an_encoded_document_is_text_for_people() -> None:
    text = encode(Part(name="a", size_bytes=3))
    assert text == b'{\n  "name": "a",\n  "size_bytes": 3\n}\n'


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"name": "a", "sizebytes": 1}, "unknown setting `sizebytes`"),
        ({"name": 1}, "`name`: expected `str`, got `int`"),
        ({"name": "a", "size_bytes": -1}, "`size_bytes`: expected `int` >= 0"),
        ({}, "the setting `name` is missing"),
    ],
)
def test_a_wrong_setting_is_named_with_its_path_and_file(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=f"{message}.*where='run.toml'"):
        convert(Part, table, where="run.toml")


def test_a_document_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        Part(name="a").name = "b"  # type: ignore[misc]


@given(STORED)
def test_the_schema_accepts_what_the_encoder_writes(document: Stored) -> None:
    jsonschema.validate(msgspec.json.decode(seal(document)), json_schema(Stored))


@pytest.mark.parametrize(
    "bad", [{"title": 1}, {}, {"title": "a", "more": 1}, {"title": "a", "parts": [{"name": "x", "size_bytes": -1}]}]
)
def test_schema_and_decoder_refuse_the_same(bad: dict[str, Any]) -> None:
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(bad, json_schema(Stored))
    with pytest.raises(CorruptError):
        decode(Stored, msgspec.json.encode(bad), where="here")


def test_what_was_written_before_a_field_was_added_is_still_read() -> None:
    class Before(Sealed, frozen=True, kw_only=True):
        title: str

    class Since(Sealed, frozen=True, kw_only=True):
        title: str
        added: int = 7

    found = unseal(Since, seal(Before(title="old")), where="here")
    assert (found.title, found.added) == ("old", 7)


def test_another_writer_may_space_its_json_differently_if_its_digest_says_so() -> None:
    blank = b'{"format":1, "digest": "", "title":"one line"}'
    raw = blank.replace(b'""', f'"{digest_hex(blank)}"'.encode(), 1)
    assert unseal(Stored, raw, where="here").title == "one line"
    with pytest.raises(CorruptError, match="does not match its digest"):
        unseal(Stored, raw.replace(b"one", b"two"), where="here")


FIRST_DECODED_BY_MANY = """
import sys, threading
from datastore.checkpoint.format.manifest import PartInfo
from datastore.document import unseal
raw = sys.stdin.buffer.read()
sys.setswitchinterval(1e-6)
start = threading.Barrier(8)
def decode():
    start.wait()
    unseal(PartInfo, raw, where="here")
threads = [threading.Thread(target=decode) for _ in range(8)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_a_kind_may_be_decoded_for_the_first_time_by_several_threads_at_once() -> None:
    values: dict[str, Any] = {"run_id": "r", "step": 1, "save_id": "s", "rank": 0, "world": 1, "part": "p"}
    values |= {"size_bytes": 0, "data_start": 0, "header_digest": "", "chunk_bytes": 1}
    raw = seal(PartInfo(**values, entries=(), items={"a": "b"}, own_items={}))
    for _ in range(5):  # Without the lock one process in four is killed by SIGSEGV.
        command = [sys.executable, "-c", FIRST_DECODED_BY_MANY]
        done = subprocess.run(command, input=raw, capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, b"")

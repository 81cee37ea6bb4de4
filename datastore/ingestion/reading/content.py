"""The format of a file, told by its first bytes: text, lines of JSON, a JSON array, or a table.

A name is trusted where it says a language or a kind of prose (`.py`, `.md`), and for what bytes cannot tell: CSV and TSV.
Everything else is looked at. Lines that are JSON objects, and an array of such, are records whatever the file is called; one JSON
object, as in `package.json`, is text.
"""

import re
from pathlib import PurePosixPath
from typing import NamedTuple

import orjson
import pyarrow as pa

from datastore.dataset.journal import SourceFormat
from datastore.formats.decompression import Codec, codec_of, open_stream
from datastore.ingestion.reading.listing import kind_of, named_codec
from datastore.storage.base import Storage

__all__ = ["Kind", "kind_of_bytes", "look"]

_HEADS_BYTES = (2**16, 2**24)
"""How much of a file is looked at: more if the first line is longer."""

_PLAIN = """
    adoc asm awk bash bat bib c cc cfg cl clj cmake cpp cs css cu cxx dart diff ex f90 fs go graphql h hpp hs htm html ini ipynb
    java jl js jsx kt less lisp lua m markdown md mjs ml nim org patch php pl proto py pyi r rb rs rst s sass scala scss sh sql
    svg swift tex toml ts tsx v vb vim vue xml yaml yml zig
"""

_PLAIN_SUFFIXES = frozenset(f".{suffix}" for suffix in _PLAIN.split())

_LOOKED_AT = {".parquet", ".arrow", ".feather", ".tar", ".tgz", ".gz", ".zst", ".bz2", ".xz"}
"""Names of binary files that may be a source; what other binary names say is believed."""

_NAMED: dict[str, SourceFormat] = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".parquet": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
}

_MAGIC: dict[bytes, SourceFormat] = {b"PAR1": "parquet", b"ARROW1": "arrow"}

_UNPACKED: set[SourceFormat] = {"parquet", "arrow"}
"""Formats that pack by themselves, and are not read through another packing."""

_PACKED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")

_WARC = re.compile(rb"WARC/\d\.\d+[ \t]*\r?\n")

_ARRAY = re.compile(rb"\s*\[\s*\{")

_BOM = b"\xef\xbb\xbf"

_FIRST_LINES = 5


class Kind(NamedTuple):
    """How a file is to be read."""

    format: SourceFormat
    codec: Codec


def look(storage: Storage, key: str, size_bytes: int) -> Kind | None:
    """Return how to read the file `key`, or None if nothing here reads it.

    Raises:
        MissingError, StorageError: it cannot be read.
    """
    suffix = PurePosixPath(key.lower()).suffix
    named = kind_of(key)
    if suffix in _PLAIN_SUFFIXES or (named is None and suffix not in _LOOKED_AT):
        return Kind(*named) if named is not None else None
    for head_bytes in _HEADS_BYTES:
        stored = storage.get_ranges(key, [(0, min(head_bytes, size_bytes))])[0]
        codec = named_codec(key) or codec_of(stored)
        head = b"".join(open_stream([stored], codec=codec, max_expansion=200)) if codec else stored
        whole = size_bytes <= head_bytes
        found = kind_of_bytes(key, head, whole=whole)
        if found is not None or whole or b"\n" in head:
            break
    if found is not None:
        readable = not codec or (found not in _UNPACKED and (found != "webdataset" or key.endswith(_PACKED_TARS)))
        return Kind(found, codec) if readable else None
    return Kind(*named) if named is not None else None


def kind_of_bytes(name: str, head: bytes, *, whole: bool) -> SourceFormat | None:
    r"""Return which structured format a file has that is called `name` and begins with `head`, perhaps its `whole`.

    >>> kind_of_bytes("a.json", b'{"text": "one"}\n{"text": "two"}\n', whole=True)
    'jsonl'
    >>> kind_of_bytes("a.json", b'[\n  {"text": "one"}\n]\n', whole=True)
    'json'
    >>> kind_of_bytes("package.json", b'{"name": "x"}\n', whole=True) is None
    True
    """
    for magic, found in _MAGIC.items():
        if head.startswith(magic):
            return found
    if _is_arrow_stream(head):
        return "arrow"
    if _WARC.match(head) or head[257:262] == b"ustar":
        return "webdataset" if head[257:262] == b"ustar" else "warc"
    path = PurePosixPath(name.lower())
    named = _NAMED.get(path.with_suffix("").suffix if named_codec(name) else path.suffix)
    if named is not None:
        return named
    text = head.removeprefix(_BOM)
    if _ARRAY.match(text):
        return "json"
    return "jsonl" if _are_objects(text, whole=whole) else None


def _is_arrow_stream(head: bytes) -> bool:
    if not head.startswith(b"\xff\xff\xff\xff"):
        return False
    try:
        pa.ipc.read_schema(pa.py_buffer(head))
    except (pa.ArrowException, OSError, ValueError):
        return False
    return True


def _are_objects(text: bytes, *, whole: bool) -> bool:
    """Return whether there is more than one line, the first is a JSON object, and so are most of those that follow."""
    lines = [line for line in text.split(b"\n", _FIRST_LINES) if line.strip()]
    complete = lines if whole else lines[:-1]
    if len(lines) < 2 or not complete or not _is_object(complete[0]):
        return False
    if len(complete) == 1:
        return lines[1].lstrip().startswith(b"{")
    return 2 * sum(map(_is_object, complete[:_FIRST_LINES])) > len(complete[:_FIRST_LINES])


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(orjson.loads(line), dict)
    except orjson.JSONDecodeError:
        return False

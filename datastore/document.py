"""Typed JSON documents: validated while they are decoded, canonical when they are encoded.

A `Document` is any record with named fields. A `Sealed` document is one that is stored: its bytes are a
pure function of its value and carry their own digest, so any flipped bit is found, white space included,
and two writers of the same value write the same bytes.

Source: msgspec, https://jcristharif.com/msgspec (validates 100,000 shards three times faster than pydantic).
"""

import math
import re
import threading
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from functools import cache
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

import msgspec
from typing_extensions import Buffer

from datastore.digest import digest_hex
from datastore.errors import ConfigError, CorruptError, FormatError, plain

__all__ = [
    "Count",
    "Document",
    "Hex32",
    "Positive",
    "Rate",
    "Sealed",
    "SettingsDocument",
    "Sha256",
    "Version",
    "convert",
    "decode",
    "encode",
    "json_schema",
    "seal",
    "setting_names",
    "unseal",
]

_LARGEST = 2**63 - 1
"""What the columns of a segment can hold, and every reader of the format."""

Count = Annotated[int, msgspec.Meta(ge=0, le=_LARGEST)]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Rate = Annotated[float, msgspec.Meta(ge=0)]
Version = Annotated[int, msgspec.Meta(ge=1, le=_LARGEST)]
"""The number of a version of a dataset; the first is 1."""

Hex32 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
"""A uid, or an xxh3_128 digest, in lower-case hex."""

Sha256 = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{64}$")]

T = TypeVar("T")
D = TypeVar("D", bound="Document")
S = TypeVar("S", bound="Sealed")


class Document(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A frozen record; an unknown field, a wrong type or a value out of range is refused when decoding."""


class SettingsDocument(Document, frozen=True, kw_only=True):
    """A record that users fill in: a NumPy number in it is the number that it is."""

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            number = plain(value)
            if number is not value:
                msgspec.structs.force_setattr(self, name, number)


class Sealed(Document, frozen=True, kw_only=True):
    """A stored document. `format` is the format version it was written in; `digest` covers all other bytes."""

    newest_format: ClassVar[int] = 1

    compact: ClassVar[bool] = False
    """Whether it is stored on one line, without fields that have their default: there are many, for machines."""

    format: int = 1
    digest: str = ""
    """xxh3_128 of the file's bytes with this value empty, as 32 hex digits."""


class _Head(msgspec.Struct):
    format: int = 1
    digest: str = ""


_lock = threading.Lock()
_decoders: dict[type[Any], msgspec.json.Decoder[Any]] = {}


def _decoder(kind: type[T]) -> msgspec.json.Decoder[T]:
    """Return the decoder of `kind`, made once.

    msgspec analyses a class when it is decoded for the first time, and shows what it has so far to other threads: two
    first times at once crash the process (0.22.0; 8 threads, every second run). So the first time is alone.
    """
    found = _decoders.get(kind)
    if found is None:
        with _lock:
            found = _decoders.setdefault(kind, msgspec.json.Decoder(kind))
    return found


def encode(document: Document) -> bytes:
    """Return canonical JSON: fields in declaration order, two-space indent, map keys sorted, one final newline."""
    return msgspec.json.format(msgspec.json.encode(document, order="deterministic"), indent=2) + b"\n"


def decode(kind: type[D], raw: Buffer, *, where: str) -> D:
    """Return the `kind` that `raw` holds.

    Raises:
        CorruptError: not JSON, or not a `kind`; the message has the JSON path and `where`.
    """
    try:
        return _decoder(kind).decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise CorruptError(
            f"not a {kind.__name__} document: {error}", where=where, hint="Restore this file from a copy."
        ) from None


def convert(kind: type[D], value: Mapping[str, Any], *, where: str, origins: Mapping[str, str] | None = None) -> D:
    """Return `value`, as parsed from TOML or given by a user, as a `kind`.

    `origins` says of a dotted key, such as `train.steps`, where it comes from if not from `where`.

    Raises:
        ConfigError: an unknown key, a wrong type, a value out of range or a number that is not finite (JSON, in which
            values are handed on and stored, has none); the message has the key and where it is from, the values that are
            allowed if they can be listed, and the nearest key.
    """
    for path, number in _floats(value, "$"):
        if not math.isfinite(number):
            text = f"{number} is not a number to set - at `{path}`"
            raise _mistake(kind, text, where=where, origins=origins or {})
    try:
        _decoder(kind)
        return msgspec.convert(plain(dict(value)), type=kind)
    except msgspec.ValidationError as error:
        raise _mistake(kind, str(error), where=where, origins=origins or {}) from None


_PLACE = re.compile(r"(.*?)(?: - at `\$\.?(.*)`)?", re.DOTALL)
_UNKNOWN = re.compile(r"Object contains unknown field `(.*)`", re.DOTALL)
_MISSING = re.compile(r"Object missing required field `(.*)`", re.DOTALL)


def _mistake(kind: type[Document], text: str, *, where: str, origins: Mapping[str, str]) -> ConfigError:
    """Return the error for what msgspec says of a value that is no `kind`."""
    found = _PLACE.fullmatch(text)
    assert found is not None
    reason, path = found[1], re.sub(r"\[.*", "", found[2] or "")
    unknown, missing = _UNKNOWN.fullmatch(reason), _MISSING.fullmatch(reason)
    key = ".".join(filter(None, (path, *(match[1] for match in (unknown, missing) if match))))
    where = ", ".join(origin for name, origin in origins.items() if _is_about(name, key)) or where
    if unknown:
        near = _nearest(kind, key)
        table = _type_at(kind, path)
        fields = [field.encode_name for each in _records(table) for field in msgspec.structs.fields(each)]
        known = list(dict.fromkeys(fields))
        near = near or next(iter(get_close_matches(unknown[1], known, 1)), "")
        hint = f"Did you mean {near}?" if near else "Use one of the known ones."
        return ConfigError(f"unknown setting `{key}`", where=where, known=known, hint=hint)
    if missing:
        return ConfigError(f"the setting `{key}` is missing", where=where, hint="Set it.")
    at = _type_at(kind, path)
    allowed = _choices(at) or ([str(_tag(each)) for each in _records(at)] if reason.startswith("Invalid value") else [])
    listed = {"allowed": allowed} if allowed else {}
    fact = reason[0].lower() + reason[1:].replace("nvalid enum value", "t cannot be", 1)
    return ConfigError(f"`{found[2]}`: {fact}" if found[2] else fact, where=where, **listed, hint="Correct it.")


def _is_about(name: str, key: str) -> bool:
    """Return whether setting `name` can have made `key` wrong: it is the same, above or below it."""
    return not key or f"{name}.".startswith(f"{key}.") or f"{key}.".startswith(f"{name}.")


def _nearest(kind: type[Document], key: str) -> str:
    """Return the key that was meant: most like it in its own table, or of that name in another one."""
    keys = setting_names(kind)
    above, _, name = key.rpartition(".")
    elsewhere = [each for each in keys if each.rpartition(".")[2] == name]
    beside = {each.rpartition(".")[2]: each for each in keys if each.rpartition(".")[0] == above}
    close = [beside[each] for each in get_close_matches(name, beside, 1)] or get_close_matches(key, keys, 1)
    return next(iter([*elsewhere, *close]), "")


def setting_names(kind: type[msgspec.Struct], above: str = "") -> list[str]:
    """Return the dotted names of all settings of `kind`, tables included."""
    keys = []
    for field in msgspec.structs.fields(kind):
        keys.append(f"{above}{field.encode_name}")
        keys += setting_names(field.type, f"{keys[-1]}.") if _is_record(field.type) else []
    return keys


def _type_at(kind: Any, path: str) -> Any:
    """Return the type of the setting at `path`; None where nothing says what it is."""
    for name in filter(None, path.split(".")):
        fields = msgspec.structs.fields(kind) if _is_record(kind) else ()
        kind = next((field.type for field in fields if field.encode_name == name), None)
    return kind


def _records(kind: Any) -> list[type[msgspec.Struct]]:
    """Return the records that `kind` is, or is a list of."""
    return [kind] if _is_record(kind) else [each for part in get_args(kind) for each in _records(part)]


def _tag(kind: type[msgspec.Struct]) -> object:
    """Return the word that tells `kind` from others in a list."""
    return kind.__struct_config__.tag


def _is_record(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _choices(kind: Any) -> list[str]:
    """Return the values that `kind` allows, as TOML writes them, if they can be listed."""
    if get_origin(kind) is Literal:
        return [str(value) for value in get_args(kind)]
    if kind is bool:
        return ["true", "false"]
    parts = [_choices(part) for part in get_args(kind)] if get_origin(kind) in {Union, UnionType} else [[]]
    return [value for part in parts for value in part] if all(parts) else []


def _floats(value: object, path: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, float):
        yield path, value
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _floats(inner, f"{path}.{key}")
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            yield from _floats(inner, f"{path}[{place}]")


def json_schema(kind: type[Document]) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of `kind`."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **msgspec.json.schema(kind)}


def seal(document: Sealed) -> bytes:
    """Return the bytes to store for `document`, its digest filled in."""
    blank = msgspec.structs.replace(document, digest="")
    raw = _encode_compact(blank) if document.compact else encode(blank)
    # The file's own digest is its second field, so the first that is empty.
    return raw.replace(b'"digest": ""', f'"digest": "{digest_hex(raw)}"'.encode(), 1)


def _encode_compact(document: Sealed) -> bytes:
    """Return canonical JSON on one line: fields in declaration order, those left out that have their default."""
    usual = _defaults(type(document))
    fields = msgspec.structs.asdict(document)
    kept = {name: value for name, value in fields.items() if name in {"format", "digest"} or value != usual[name]}
    return msgspec.json.format(msgspec.json.encode(kept), indent=0) + b"\n"


@cache
def _defaults(kind: type[Sealed]) -> dict[str, Any]:
    return {field.name: field.default for field in msgspec.structs.fields(kind)}


def unseal(kind: type[S], raw: Buffer, *, where: str) -> S:
    """Return the document that `seal` wrote, its digest checked.

    Raises:
        FormatError: written in a newer format than this package reads.
        CorruptError: any bit differs from what was written.
    """
    try:
        head = _decoder(_Head).decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        head = _Head()  # Not even JSON: `decode` below says so with its position.
    # A flipped bit in the format's number must not pass for a newer format.
    if head.format > kind.newest_format and (not head.digest or _holds(raw, head.digest)):
        raise FormatError(
            f"{kind.__name__} was written in a newer format",
            where=where,
            found=head.format,
            newest_known=kind.newest_format,
            hint="Install a newer datastore.",
        )
    document = decode(kind, raw, where=where)
    if not _holds(raw, document.digest):
        raise CorruptError("document does not match its digest", where=where, hint="Restore this file from a copy.")
    return document


def _holds(raw: Buffer, digest: str) -> bool:
    """Return whether `raw` has the digest that it carries.

    The bytes are checked, not the value: what an older version of this package wrote lacks the fields added since, and
    another writer may space its JSON differently. The file's own digest comes first, before any nested one.
    """
    own = f'"digest": "{digest}"'.encode()
    return digest_hex(bytes(raw).replace(own, b'"digest": ""', 1)) == digest

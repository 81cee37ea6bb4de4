"""The schema of records: any Arrow schema, its columns written as text where a person types them.

A type is written as Arrow prints it: `int64`, `list<string>`, `fixed_size_list<float>[768]`, `struct<role: string,
content: string>`. A media type (`image/jpeg`, `audio/*`) means a column of bytes whose field says so under the key
`media_type`: plain binary, because that is what a decoder wants and every reader of Arrow and Parquet gives. What one
process would have to know about another's types (extension types of their own) is refused.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any, cast

import pyarrow as pa
import pyarrow.types as pt
from typing_extensions import Buffer

from datastore.errors import ConfigError, CorruptError

__all__ = [
    "MEDIA_TYPE",
    "SchemaLike",
    "check_names",
    "check_storable",
    "decode_schema",
    "encode_schema",
    "no_rows",
    "parse_field",
    "parse_type",
    "record_schema",
    "with_wide_indices",
    "without_views",
]

MEDIA_TYPE = b"media_type"
"""Key in the metadata of a field of bytes, or of a struct that has them: what they are, as IANA lists it."""

SchemaLike = pa.Schema | Mapping[str, "str | pa.DataType | pa.Field[Any]"]

_MEDIA = re.compile(r"(?:application|audio|font|image|model|text|video)/[a-z0-9.+*-]+")
_WORD = re.compile(r"[A-Za-z_0-9]+")
_SUFFIX = re.compile(r"\[[^\]<>]*\]|\([\d\s,-]+\)")
_NAME = re.compile(r"([^:<>,]+):\s*")
_DECIMAL = re.compile(r"decimal(32|64|128|256)\((\d+),\s*(-?\d+)\)")
_LISTS: dict[str, Any] = {
    "list": pa.list_,
    "large_list": pa.large_list,
    "list_view": pa.list_view,
    "large_list_view": pa.large_list_view,
}
_INT32: Any = pa.int32()
_ALIAS: Any = pa.type_for_alias
_MAP: Any = pa.map_
_EXTENSIONS = {"arrow.uuid": "uuid", "arrow.json": "json_", "arrow.bool8": "bool8"}


def record_schema(columns: SchemaLike) -> pa.Schema:
    """Return a schema from a mapping of column names to types, written or not; a schema is returned as it is.

    Raises:
        ConfigError: a type cannot be read.

    >>> record_schema({"caption": "string", "image": "image/jpeg"}).field("image").metadata
    {b'media_type': b'image/jpeg'}
    """
    if isinstance(columns, pa.Schema):
        return columns
    return pa.schema([parse_field(name, kind) for name, kind in columns.items()])


def parse_field(name: str, kind: "str | pa.DataType | pa.Field[Any]") -> "pa.Field[Any]":
    """Return the column called `name` of a type: a text (`int64`, `string not null`, `image/png`), a type or a field.

    Raises:
        ConfigError: the text is no type.
    """
    if isinstance(kind, pa.Field):
        return kind.with_name(name)
    if isinstance(kind, pa.DataType):
        return pa.field(name, kind)
    text, required = kind.strip().removesuffix(" not null").strip(), kind.strip().endswith(" not null")
    if _MEDIA.fullmatch(text):
        return pa.field(name, pa.binary(), nullable=not required, metadata={MEDIA_TYPE: text.encode()})
    return pa.field(name, parse_type(text), nullable=not required)


def parse_type(text: str) -> pa.DataType:
    """Return the type that `text` writes, as Arrow prints it; inner names may be left out.

    Raises:
        ConfigError: it is none.

    >>> parse_type("list<struct<role: string, content: string>>")
    ListType(list<item: struct<role: string, content: string>>)
    """
    reader = _Reader(text)
    found: pa.DataType = reader.type()
    reader.end()
    return found


class _Reader:
    """Reads a type from its text, from left to right."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.at = 0

    def type(self) -> Any:
        word = self._take(_WORD)
        if self._skip("<"):
            return self._nested(word)
        return self._leaf(word + self._take(_SUFFIX, optional=True))

    def end(self) -> None:
        if self.text[self.at :].strip():
            raise self._wrong()

    def _nested(self, word: str) -> Any:
        if word in _LISTS:
            return _LISTS[word](self._last(self._field("item")))
        if word == "fixed_size_list":
            item = self._last(self._field("item"))
            return pa.list_(item, self._size())
        if word == "struct":
            fields = [] if self._skip(">") else [self._field("")]
            while fields and self._skip(","):
                fields.append(self._field(""))
            return pa.struct(self._last(fields) if fields else fields)
        if word == "map":
            key = self.type()
            self._expect(",")
            return pa.map_(key, self._last(self.type()))
        if word == "dictionary":
            return self._dictionary()
        return self._extension(word)

    def _dictionary(self) -> Any:
        self._skip("values=")
        values, indices, ordered = self.type(), _INT32, False
        if self._skip(","):
            self._expect("indices=")
            indices = self.type()
        if self._skip(","):
            self._expect("ordered=")
            ordered = self._take(_WORD) == "1"
        return pa.dictionary(indices, self._last(values), ordered=ordered)

    def _extension(self, word: str) -> Any:
        name = self._take(re.compile(r"[a-z0-9.]+"))
        self._expect(">")
        # An older pyarrow lacks some of them.
        make = getattr(pa, _EXTENSIONS.get(name, ""), None)
        if word != "extension" or make is None:
            raise self._wrong()
        return make()

    def _leaf(self, text: str) -> Any:
        decimal = _DECIMAL.fullmatch(text)
        if decimal and hasattr(pa, f"decimal{decimal[1]}"):
            return getattr(pa, f"decimal{decimal[1]}")(int(decimal[2]), int(decimal[3]))
        if text.startswith("fixed_size_binary["):
            return pa.binary(int(text[18:-1]))
        if text in {"month_day_nano_interval", "date32[day]", "date64[ms]"}:
            return getattr(pa, text.partition("[")[0])()
        if text.startswith("timestamp[") and "," in text:
            unit, zone = text[10:-1].split(",", 1)
            return pa.timestamp(unit, zone.strip().removeprefix("tz="))
        try:
            return _ALIAS(text)
        except ValueError:
            raise self._wrong() from None

    def _field(self, name: str) -> "pa.Field[Any]":
        found = _NAME.match(self.text, self.at)
        if found:
            self.at = found.end()
            name = found[1].strip()
        if not name:
            raise self._wrong()
        kind = self.type()
        return pa.field(name, kind, nullable=not self._skip("not null"))

    def _size(self) -> int:
        return int(self._take(re.compile(r"\[\d+\]"))[1:-1])

    def _last(self, value: Any) -> Any:
        self._expect(">")
        return value

    def _take(self, pattern: re.Pattern[str], *, optional: bool = False) -> str:
        self._blanks()
        found = pattern.match(self.text, self.at)
        if found is None:
            if optional:
                return ""
            raise self._wrong()
        self.at = found.end()
        return found[0]

    def _skip(self, token: str) -> bool:
        self._blanks()
        found = self.text.startswith(token, self.at)
        self.at += len(token) * found
        return found

    def _expect(self, token: str) -> None:
        if not self._skip(token):
            raise self._wrong()

    def _blanks(self) -> None:
        while self.at < len(self.text) and self.text[self.at] == " ":
            self.at += 1

    def _wrong(self) -> ConfigError:
        return ConfigError(
            "not a type",
            text=self.text,
            at=self.at,
            hint="Write it as Arrow does: int64, string, list<float>, struct<a: int8, b: string>, image/jpeg.",
        )


def no_rows(schema: pa.Schema) -> pa.RecordBatch:
    """Return a batch of no rows. `Schema.empty_table` fails where another type holds one of Arrow's extensions (pyarrow 26.0.1)."""
    return pa.RecordBatch.from_arrays([pa.nulls(0, field.type) for field in schema], schema=schema)


def encode_schema(schema: pa.Schema) -> bytes:
    """Return `schema` as an encapsulated Arrow IPC message."""
    return schema.serialize().to_pybytes()


def decode_schema(raw: Buffer, *, where: str = "a record schema") -> pa.Schema:
    """Return the schema that `encode_schema` wrote; `where` is the document that holds it.

    Raises:
        CorruptError: not an Arrow schema message.
    """
    try:
        schema = pa.ipc.read_schema(pa.py_buffer(raw))
        check_names(schema)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise CorruptError(
            f"not an Arrow schema: {error}", where=where, hint="Restore this file from a copy."
        ) from None
    return schema


def check_names(fields: Iterable["pa.Field[Any]"]) -> None:
    """Raise UnicodeDecodeError for a name that is not UTF-8, at any depth; pyarrow decodes names when they are used."""
    for field in fields:
        _ = field.name
        check_names(field.type.field(index) for index in range(field.type.num_fields))


def check_storable(schema: pa.Schema) -> None:
    """Refuse columns that a reader could not be handed as they were.

    Raises:
        ConfigError: two columns or fields of a struct have one name; or a type is another's extension, a view, a union or
            has run ends.
    """
    _check_fields(list(schema), "")


def without_views(schema: pa.Schema) -> pa.Schema:
    """Return the schema of the same values in types that can be stored, at any depth.

    Those are plain text, bytes and lists instead of views, and plain values instead of run ends.
    """
    return pa.schema([_without_views(field) for field in schema], metadata=cast("Any", schema.metadata))


def _without_views(field: Any) -> Any:
    kind = field.type
    if pt.is_run_end_encoded(kind):
        return _without_views(field.with_type(kind.value_type))
    if pt.is_dictionary(kind):
        values = _without_views(field.with_type(kind.value_type))
        odd = _is_odd(values.type)
        return values if odd else field.with_type(pa.dictionary(kind.index_type, values.type, ordered=kind.ordered))
    for is_one, plain in _PLAIN:
        if is_one(kind):
            return field.with_type(plain(_without_views(kind.value_field)) if kind.num_fields else plain())
    return _inside(field, _without_views)


def with_wide_indices(schema: pa.Schema) -> pa.Schema:
    """Return `schema` with categories numbered by 32 bits at least, at any depth.

    How many there were in one frame says nothing of the next one; whoever does want 8 bits says so in a schema.
    """
    return pa.schema([_wide(field) for field in schema], metadata=cast("Any", schema.metadata))


def _wide(field: Any) -> Any:
    kind = field.type
    if pt.is_dictionary(kind) and kind.index_type.bit_width < _INT32.bit_width:
        return field.with_type(pa.dictionary(_INT32, kind.value_type, ordered=kind.ordered))
    return _inside(field, _wide)


def _inside(field: Any, change: Any) -> Any:
    """Return `field` with `change` made to the fields that its type has."""
    kind = field.type
    if pt.is_struct(kind):
        return field.with_type(pa.struct([change(kind.field(index)) for index in range(kind.num_fields)]))
    if pt.is_map(kind):
        return field.with_type(_MAP(change(kind.key_field), change(kind.item_field), keys_sorted=kind.keys_sorted))
    if pt.is_fixed_size_list(kind):
        return field.with_type(pa.list_(change(kind.value_field), kind.list_size))
    for is_one, make in ((pt.is_list, pa.list_), (pt.is_large_list, pa.large_list)):
        if is_one(kind):
            return field.with_type(make(change(kind.value_field)))
    return field


_PLAIN: tuple[tuple[Any, Any], ...] = (
    (pt.is_string_view, pa.string),
    (pt.is_binary_view, pa.binary),
    (pt.is_list_view, pa.list_),
    (pt.is_large_list_view, pa.large_list),
)


_VIEW = "is a view: its rows share their bytes, so they cannot be stored batch by batch"
_ODD = "is a dictionary of values that are no plain ones, which Arrow cannot put together with another"
_NOT_STORED: tuple[tuple[Any, str, str], ...] = (
    (pt.is_union, "is a union, of which rows cannot be taken", "Make it a struct with a field for each kind."),
    (
        pt.is_run_end_encoded,
        "has run ends, of which rows cannot be taken",
        "Decode it: pyarrow.compute.run_end_decode(column).",
    ),
    (lambda kind: pt.is_dictionary(kind) and _is_odd(kind.value_type), _ODD, "Cast it to its values."),
    (lambda kind: "_view" in str(kind).partition("<")[0], _VIEW, "Cast it to string, binary or list."),
)
"""Types that cannot be stored: what is wrong with them, and what to do."""


def _is_odd(values: Any) -> bool:
    """Return whether pyarrow (26.0.1) has no way to put two dictionaries of such values together."""
    return bool(values.num_fields or pt.is_null(values) or isinstance(values, pa.BaseExtensionType))


def _check_fields(fields: "list[pa.Field[Any]]", where: str) -> None:
    names = [field.name for field in fields]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise ConfigError("two columns have the same name", names=twice, within=where, hint="Give each its own.")
    for field in fields:
        _check_type(field.type, f"{where}.{field.name}" if where else field.name)


def _check_type(kind: Any, where: str) -> None:
    if isinstance(kind, pa.BaseExtensionType):
        name = str(kind.extension_name)
        if not name.startswith("arrow."):
            raise ConfigError(
                "a column has an extension type that other readers do not know",
                column=where,
                type=name,
                hint=f"Store it as {kind.storage_type}, and say in the field's metadata what it is.",
            )
        _check_type(kind.storage_type, where)
        return
    for is_one, fact, hint in _NOT_STORED:
        if is_one(kind):
            raise ConfigError(f"a column {fact}", column=where, type=str(kind)[:80], hint=hint)
    if pa.types.is_dictionary(kind):
        _check_type(kind.value_type, where)
        return
    children = [kind.field(index) for index in range(kind.num_fields)]
    if pa.types.is_struct(kind):
        _check_fields(children, where)
        return
    for child in children:
        _check_type(child.type, where)

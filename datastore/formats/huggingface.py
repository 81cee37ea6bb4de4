"""The features of Hugging Face `datasets`: what a schema says of columns beyond their types, and which types there are.

`datasets` need not be installed. A schema that it wrote has its features as JSON in the metadata of the whole schema: that `label` is a class label, what its
classes are called, that bytes are an image. Here each column keeps its own in its field's metadata, so what is renamed,
dropped or added takes its feature along. Plain values need none: their type says all.

Source: https://huggingface.co/docs/datasets/about_dataset_features; `Features.from_arrow_schema` of datasets 5.2.0 takes
from the metadata what fits the type of the column, and makes the rest of the types.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.types as kinds

from datastore.errors import ConfigError

__all__ = ["check_features", "check_hf_types", "features_of", "is_hf_array", "keep_features", "with_features"]

_KEY = b"huggingface"
"""Key in the metadata of a schema, as `datasets` writes it; and in that of a field, as it is kept here."""

_EXTENSION_KEYS = (b"ARROW:extension:name", b"ARROW:extension:metadata")
_EXTENSIONS = "datasets.features.features."
_ARRAYS = {"Array2D", "Array3D", "Array4D", "Array5D"}

_PLAIN = {"Value", "List", "LargeList", "Sequence"}
"""Features that follow from the type of a column."""


def keep_features(schema: pa.Schema, features: Mapping[str, Any] | None = None) -> pa.Schema:
    """Return `schema` without metadata of its own; what it, or `features`, says of its columns stands in their fields."""
    found = features_of(schema) | _telling(features or {})
    return pa.schema([_noted(_without_extension(field), found.get(field.name)) for field in schema])


def with_features(schema: pa.Schema) -> pa.Schema:
    """Return `schema` as `datasets` writes one: with the features of its columns, if it has any, in its metadata."""
    found = features_of(schema)
    note: dict[Any, Any] | None = {_KEY: json.dumps({"info": {"features": found}}).encode()} if found else None
    return pa.schema([_with_extension(_noted(field, None), found.get(field.name)) for field in schema], metadata=note)


def is_hf_array(kind: pa.DataType) -> bool:
    """Return whether a type is the extension that `datasets` registers for arrays: lists, in every other process."""
    return isinstance(kind, pa.BaseExtensionType) and str(kind.extension_name).startswith(_EXTENSIONS)


def features_of(schema: pa.Schema) -> dict[str, Any]:
    """Return what is said of the columns of `schema`, for the whole or by column, by their names."""
    whole = _loaded((schema.metadata or {}).get(_KEY))
    info = whole.get("info")
    features = info.get("features") if isinstance(info, dict) else None
    found = _telling(features if isinstance(features, dict) else {})
    for field in schema:
        own = _loaded((field.metadata or {}).get(_KEY))
        if own:
            found[field.name] = own
    return {name: found[name] for name in schema.names if name in found}


def check_features(given: pa.Schema, schema: pa.Schema) -> None:
    """Refuse columns that say something else than those of `schema`: a label 0 would get another name.

    Raises:
        ConfigError: there is one; the message names it, and the first difference.
    """
    here, there = features_of(given), features_of(schema)
    for name in here.keys() & there.keys():
        if here[name] != there[name]:
            raise ConfigError(
                "rows do not fit the schema: a column means something else",
                column=name,
                given=_shown(here[name]),
                schema=_shown(there[name]),
                hint="Cast it to the features of the dataset before: `datasets.Dataset.cast_column`.",
            )


def check_hf_types(schema: pa.Schema) -> None:
    """Refuse columns of types that `datasets` does not have, at any depth.

    Raises:
        ConfigError: there is one; the message names it.
    """
    for field in schema:
        for kind in _types_of(field.type):
            if not _has(kind):
                raise ConfigError(
                    "datasets has no such type",
                    column=field.name,
                    type=str(kind),
                    hint="Leave out the column, or cast it to another type.",
                )


def _without_extension(field: Any) -> Any:
    """Return a field that is the same one whether or not `datasets` has been imported."""
    kept = {key: value for key, value in (field.metadata or {}).items() if key not in _EXTENSION_KEYS}
    if is_hf_array(field.type):
        field = field.with_type(field.type.storage_type)
    elif not (field.metadata or {}).get(_EXTENSION_KEYS[0], b"").startswith(_EXTENSIONS.encode()):
        return field
    return field.with_metadata(kept) if kept else field.remove_metadata()


def _with_extension(field: Any, feature: Any) -> Any:
    """Return the field of an array as `datasets` writes it: without the note it would read lists."""
    name = feature.get("_type") if isinstance(feature, dict) else None
    if name not in _ARRAYS:
        return field
    said = json.dumps([feature.get("shape"), feature.get("dtype")]).encode()
    note = dict(zip(_EXTENSION_KEYS, (f"{_EXTENSIONS}{name}ExtensionType".encode(), said), strict=True))
    return field.with_metadata({**(field.metadata or {}), **note})


def _noted(field: "pa.Field[Any]", feature: Any) -> "pa.Field[Any]":
    kept: dict[Any, Any] = {key: value for key, value in (field.metadata or {}).items() if key != _KEY}
    if feature is not None:
        kept[_KEY] = json.dumps(feature).encode()
    return field.with_metadata(kept) if kept else field.remove_metadata()


def _loaded(raw: bytes | None) -> dict[str, Any]:
    try:
        found = json.loads(raw) if raw else {}
    except ValueError:  # Another program's note, which nothing here rests on.
        return {}
    return found if isinstance(found, dict) else {}


def _telling(features: Mapping[str, Any]) -> dict[str, Any]:
    return {name: feature for name, feature in features.items() if any(_names(feature) - _PLAIN)}


def _names(feature: Any) -> set[str]:
    """Return the kinds of features that one is made of."""
    if isinstance(feature, list):
        return {name for inner in feature for name in _names(inner)}
    if not isinstance(feature, dict):
        return set()
    own = {feature["_type"]} if isinstance(feature.get("_type"), str) else set()
    return own.union(*map(_names, feature.values()))


def _shown(feature: Any) -> str:
    text = json.dumps(feature)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _types_of(kind: Any) -> Iterator[Any]:
    """Yield a type and those it is made of; what is within one that `datasets` lacks does not matter."""
    yield kind
    if _has(kind) and not kinds.is_dictionary(kind):
        for index in range(kind.num_fields):
            yield from _types_of(kind.field(index).type)


def _has(kind: Any) -> bool:
    if isinstance(kind, pa.BaseExtensionType):
        return kind.extension_name == "arrow.json"
    if kinds.is_dictionary(kind):
        return not kinds.is_nested(kind.value_type) and _has(kind.value_type)
    lists = kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind)
    if kinds.is_nested(kind):
        return lists or kinds.is_struct(kind)
    missing = kinds.is_interval(kind) or kinds.is_decimal32(kind) or kinds.is_decimal64(kind)
    return not (missing or kinds.is_run_end_encoded(kind))

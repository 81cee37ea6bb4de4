"""The schema that the rows of several files have in common: the first file does not decide for the rest.

A column is nullable if it is so in one of the files; a column of nulls has the type that another file gives it; text, lists
and numbers are as wide as the widest. Where types have nothing in common the first one's stays, and rows that do not fit
it are refused when they are read.
"""

from collections.abc import Iterable
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.types as kinds

__all__ = ["common_schema"]

_MAP: Any = pa.map_


def common_schema(schemas: Iterable[pa.Schema]) -> pa.Schema:
    """Return the schema with the columns and the metadata of the first, each of a type that those of all others fit."""
    return reduce(_merged, schemas)


def _merged(one: pa.Schema, other: pa.Schema) -> pa.Schema:
    if one.equals(other):
        return one
    there = set(other.names)
    fields = [_field(field, other.field(field.name)) if field.name in there else field for field in one]
    return pa.schema(fields, metadata=one.metadata)  # type: ignore[arg-type]  # bytes are what it gives


def _field(one: Any, other: Any) -> Any:
    nullable = one.nullable or other.nullable or kinds.is_null(one.type) or kinds.is_null(other.type)
    return one.with_type(_type(one.type, other.type)).with_nullable(nullable)


def _type(one: Any, other: Any) -> Any:
    if one.equals(other) or kinds.is_null(one) or kinds.is_null(other):
        return other if kinds.is_null(one) else one
    if kinds.is_dictionary(one) or kinds.is_dictionary(other):
        return _dictionary(one, other)
    if kinds.is_struct(one) and kinds.is_struct(other):
        theirs = {field.name: field for field in other}
        return pa.struct([_field(field, theirs[field.name]) if field.name in theirs else field for field in one])
    if kinds.is_map(one) and kinds.is_map(other):
        key = one.key_field.with_type(_type(one.key_type, other.key_type))
        return _MAP(key, _field(one.item_field, other.item_field), keys_sorted=one.keys_sorted and other.keys_sorted)
    if _is_list(one) and _is_list(other):
        return _list(one, other)
    return _leaf(one, other)


def _dictionary(one: Any, other: Any) -> Any:
    """Return a dictionary where both are; otherwise plain values, which hold both."""
    both = kinds.is_dictionary(one) and kinds.is_dictionary(other)
    values = [kind.value_type if kinds.is_dictionary(kind) else kind for kind in (one, other)]
    value = _type(*values)
    if not both:
        return value
    index = max((one.index_type, other.index_type), key=lambda kind: kind.bit_width)
    return pa.dictionary(index, value, ordered=one.ordered and other.ordered)


def _list(one: Any, other: Any) -> Any:
    item = _field(one.value_field, other.value_field)
    if kinds.is_fixed_size_list(one) and kinds.is_fixed_size_list(other) and one.list_size == other.list_size:
        return pa.list_(item, one.list_size)
    return pa.large_list(item) if kinds.is_large_list(one) or kinds.is_large_list(other) else pa.list_(item)


def _leaf(one: Any, other: Any) -> Any:
    for small, large in ((pa.string(), pa.large_string()), (pa.binary(), pa.large_binary())):
        if {one, other} == {small, large}:
            return large
    for is_one in (kinds.is_integer, kinds.is_floating):
        if is_one(one) and is_one(other):
            wide = pa.from_numpy_dtype(np.promote_types(one.to_pandas_dtype(), other.to_pandas_dtype()))
            return wide if is_one(wide) else one
    return one


def _is_list(kind: Any) -> bool:
    return bool(kinds.is_list(kind) or kinds.is_large_list(kind) or kinds.is_fixed_size_list(kind))

"""Which rows of a table a selection means: by id, by source, by a condition over the columns; all that is given must hold.

A condition is an SQL expression, which DuckDB evaluates without access to files, or a pyarrow expression. Null is not
true, so a row for which a condition has no answer is not meant. Columns that it cannot name are not even decoded.
"""

import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from datastore.errors import ConfigError, DependencyError, MissingError
from datastore.formats.arrow import array_of, numbers_of, scalar_of
from datastore.formats.schema import no_rows

__all__ = ["Matcher", "Selection", "read_ids"]

Mask = npt.NDArray[np.bool_]

_ROW = "__row__"


@dataclass(frozen=True, slots=True)
class Selection:
    """What is meant; an empty one means nothing that could be told, and is refused."""

    ids: "pa.StringArray | None" = None
    """The distinct ids."""

    sources: tuple[str, ...] = ()
    """Patterns, one of which the source matches: `*` stands for any text, `?` for one character."""

    where: "str | pc.Expression | None" = None

    @classmethod
    def of(
        cls, *, ids: Iterable[str] | None, sources: Iterable[str] = (), where: "str | pc.Expression | None" = None
    ) -> "Selection":
        """Return the selection, checked.

        Raises:
            ConfigError: nothing is given, or not text where text belongs.
        """
        named = None if ids is None else _texts("ids", ids)
        patterns = () if sources is None else tuple(_texts("sources", sources))
        if named is None and not patterns and where is None:
            raise ConfigError(
                "nothing says which documents are meant", hint="Give `ids`, `sources` or a condition (`where`)."
            )
        if isinstance(where, str) and not where.strip():
            raise ConfigError("the condition is empty", hint='Write an SQL expression, such as "tokens > 1000".')
        distinct = None if named is None else cast("pa.StringArray", array_of(list(dict.fromkeys(named)), pa.string()))
        return cls(ids=distinct, sources=patterns, where=where)

    def columns(self, schema: pa.Schema) -> list[str]:
        """Return the columns of `schema` that have to be read.

        Raises:
            ConfigError: ids or sources are given, but there is no column of that name; or SQL names columns that it
                cannot tell apart.
        """
        needed = {"id"} if self.ids is not None else set[str]()
        needed |= {"source"} if self.sources else set()
        for name in sorted(needed - set(schema.names)):
            raise ConfigError(
                f"the rows have no column {name}",
                columns=schema.names,
                hint="Give a condition over their columns: `where`.",
            )
        if self.where is not None:
            text = str(self.where).lower()
            # An expression can only name a column by its name; those that name columns by number or all at once read all.
            everything = "columns" in text or "fieldpath" in text
            meant = {name for name in schema.names if everything or name.lower() in text}
            if isinstance(self.where, str):
                _check_distinct(sorted(meant))
            needed |= meant
        return [name for name in schema.names if name in needed]


class Matcher:
    """Applies a selection to tables; safe for several threads, each of which gets an engine of its own."""

    def __init__(self, selection: Selection, schema: pa.Schema) -> None:
        self.selection = selection
        self.columns = selection.columns(schema)
        """The columns that tables given to `match` need to have."""
        self._engines = threading.local()
        # What is wrong with a condition shows on no rows, before anything is read.
        self.match(pa.Table.from_batches([no_rows(pa.schema([schema.field(name) for name in self.columns]))]))

    def match(self, table: pa.Table) -> tuple[Mask, "npt.NDArray[np.int64]"]:
        """Return which rows of `table` are meant, and which of the selection's ids are there, by their index.

        Raises:
            ConfigError: the condition does not fit the columns.
            DependencyError: it is SQL, and DuckDB is not installed.
        """
        chosen = np.ones(table.num_rows, np.bool_)
        present = np.empty(0, np.int64)
        if self.selection.ids is not None:
            found = pc.index_in(_as_text(table, "id"), value_set=self.selection.ids)
            chosen &= numbers_of(found.is_valid())
            present = np.unique(numbers_of(found.drop_null())).astype(np.int64)
        if self.selection.sources:
            source = _as_text(table, "source")
            matching = np.zeros(table.num_rows, np.bool_)
            for pattern in self.selection.sources:
                like = pc.match_like(source, _like(pattern))
                matching |= numbers_of(like.fill_null(scalar_of(False, pa.bool_())))
            chosen &= matching
        if self.selection.where is not None:
            true = np.zeros(table.num_rows, np.bool_)
            true[self._where(table.append_column(_ROW, array_of(np.arange(table.num_rows))))] = True
            chosen &= true
        return chosen, present

    def _where(self, table: pa.Table) -> "npt.NDArray[np.int64]":
        """Return the numbers of the rows for which the condition is true."""
        where = self.selection.where
        if isinstance(where, str):
            return self._sql(table, where)
        try:
            kept = table.filter(cast("pc.Expression", where))
        except (pa.ArrowException, ValueError, TypeError) as error:
            raise _bad_condition(str(where), error) from None
        return np.asarray(kept.column(_ROW))

    def _sql(self, table: pa.Table, where: str) -> "npt.NDArray[np.int64]":
        try:
            import duckdb  # noqa: PLC0415 - an optional package, and half a tenth of a second
        except ImportError:
            raise DependencyError(
                "an SQL condition needs DuckDB",
                hint="Install it: pip install 'llm-datastore[sql]'; or give `ids` or `sources`.",
            ) from None
        engine = getattr(self._engines, "duckdb", None)
        if engine is None:
            # One thread each: shards are looked at in parallel already. No files: a condition is over columns.
            engine = duckdb.connect(":memory:", config={"threads": 1, "enable_external_access": "false"})
            self._engines.duckdb = engine
        try:
            rows = engine.from_arrow(table).filter(where).project(_ROW).fetchnumpy()[_ROW]
        except duckdb.Error as error:
            raise _bad_condition(where, error) from None
        return np.asarray(rows, np.int64)


def read_ids(path: str | os.PathLike[str]) -> list[str]:
    """Return the ids in a file: one per line, without the spaces around it; blank lines are none.

    Raises:
        MissingError: there is no such file.
        ConfigError: it cannot be read, or is not UTF-8.
    """
    try:
        with open(path, encoding="utf-8-sig") as file:  # noqa: PTH123 - also /dev/stdin
            return [name for line in file if (name := line.strip())]
    except FileNotFoundError:
        raise MissingError("no such file", file=os.fspath(path), hint="Name a file with one id per line.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the file cannot be read: {error}", file=os.fspath(path), hint="Check it.") from None


def _texts(what: str, values: Iterable[str]) -> list[str]:
    listed = [values] if isinstance(values, str) else list(values)
    for value in listed:
        if not isinstance(value, str):
            raise ConfigError(f"{what} must be text", found=repr(value), hint="Convert it with str().")
    return listed


def _check_distinct(names: list[str]) -> None:
    """Raise a ConfigError if two of `names` are one to SQL, which ignores case even in quotes."""
    for name in names:
        same = [other for other in names if other.casefold() == name.casefold()]
        if len(same) > 1:
            raise ConfigError(
                "SQL cannot tell columns apart whose names differ only in case",
                columns=same,
                hint="Give the condition as a pyarrow expression: pyarrow.compute.field(NAME) == VALUE.",
            )


def _as_text(table: pa.Table, name: str) -> Any:
    """Return a column as plain strings.

    Raises:
        ConfigError: its values cannot be written as text.
    """
    column = table.column(name).combine_chunks()
    if column.type == pa.string():
        return column
    if column.type == pa.uuid():
        return pa.array([None if value is None else str(value) for value in column.to_pylist()], pa.string())
    try:
        return pc.cast(column, pa.string())
    except pa.ArrowException as error:
        raise ConfigError(
            f"the column cannot be compared with text: {error}",
            column=name,
            type=str(column.type),
            hint="Give a condition over the columns: `where`.",
        ) from None


def _like(pattern: str) -> str:
    """Return the pattern of SQL's LIKE for one with `*` and `?`."""
    quoted = "".join(f"\\{char}" if char in "\\%_" else char for char in pattern)
    return quoted.replace("*", "%").replace("?", "_")


def _bad_condition(where: str, error: Exception) -> ConfigError:
    reason = " ".join(str(error).split())
    return ConfigError(
        f"the condition cannot be used: {reason}", where=where, hint="Write an expression over the columns."
    )

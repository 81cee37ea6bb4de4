"""The numbers of runs, as pictures need them: columns that are read once and grow, thinned to what a screen can show.

A session of a run writes one file of JSON lines, and replaces it by a longer one. So only what was added is read and parsed,
from the beginning of the last line on, which may have been amended. Steps that a later session took again count as it took them; what they
were before is kept apart, so that it can be seen that they were.

Cost: a first look parses some 200 MB of lines a second; 8 bytes for each number; a picture has at most 3,000 points a line.
"""

import io
import re
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.json as pa_json

from datastore.errors import CorruptError
from datastore.storage.base import Storage
from datastore.training.metrics import ALWAYS, session_number

__all__ = ["AXES", "Line", "RunSeries", "thinned"]

Floats = npt.NDArray[np.float64]

AXES = ("step", "tokens", "hours")

_POINTS = 1_000
"""Parts of a picture: of each the least and the largest value are drawn, so that no spike is lost."""

_AT_ONCE = 2**22
"""Bytes of a file that are read and parsed together."""

_MARKS = 200
"""Steps whose number was not finite that are named, of each line, evenly among them."""


@dataclass(slots=True)
class Line:
    """One number of a run, thinned."""

    x: list[float]
    y: list[float | None]
    marks: list[float]
    """Where it was no finite number."""

    marked: int
    """How many of those there are."""

    taken_again: list[tuple[list[float], list[float | None]]] = field(default_factory=list)
    """Stretches of steps that a later session took again, as they were before."""


@dataclass(slots=True)
class _File:
    """What one session wrote."""

    number: tuple[int, str]
    size: int = 0
    at: int = 0
    """Where the last line begins."""

    columns: dict[str, list[Floats]] = field(default_factory=dict)
    rows: int = 0

    nulls: dict[str, list[int]] = field(default_factory=dict)
    """By number, the rows in which it is null: it was there and not finite."""

    def column(self, name: str) -> Floats:
        """Return a number of each step; NaN where there is none, or it is not finite."""
        found = self.columns.get(name)
        if found is None:
            return np.full(self.rows, np.nan)
        if len(found) > 1:
            found[:] = [np.concatenate(found)]
        return found[0]

    def present(self, name: str) -> npt.NDArray[np.bool_]:
        """Return which rows have a number at all, be it a finite one or not."""
        if name in ALWAYS:
            return np.ones(self.rows, np.bool_)
        has = np.isfinite(self.column(name))
        has[self.nulls.get(name, [])] = True
        return has

    def add(self, lines: bytes) -> None:
        """Take whole lines that follow, from the last one that is known on: it may have been amended.

        Raises:
            AttributeError, TypeError, ValueError: they are not records of steps; nothing was taken.
        """
        added = _columns(lines)
        if "step" not in added or not np.isfinite(added["step"]).all():
            raise ValueError("a line names no step")
        count = len(added["step"])
        if self.rows:
            self.rows -= 1
            for parts in self.columns.values():
                parts[-1] = parts[-1][:-1]
            self.nulls = {name: [row for row in rows if row < self.rows] for name, rows in self.nulls.items()}
        for name in {*self.columns, *added}:
            before = self.columns.setdefault(name, [np.full(self.rows, np.nan)])
            before.append(added.get(name, np.full(count, np.nan)))
        for name, rows in _nulls(lines).items():
            self.nulls.setdefault(name, []).extend(self.rows + row for row in rows)
        self.rows += count


class RunSeries:
    """The numbers of one run; safe for several threads."""

    def __init__(self, storage: Storage) -> None:
        self._storage = storage
        self._files: dict[str, _File] = {}
        self._lock = threading.Lock()
        self.version = 0
        """Grows with what is read."""

    def refresh(self) -> int:
        """Read what was added since; return the version.

        Raises:
            StorageError: the storage failed.
            CorruptError: a file does not hold records of steps.
        """
        with self._lock:
            for found in self._storage.list("metrics"):
                known = self._files.setdefault(found.key, _File(session_number(found.key)))
                if found.size_bytes != known.size:
                    self._read(found.key, known, found.size_bytes)
                    self.version += 1
            return self.version

    def names(self) -> list[str]:
        """Return the numbers that there are, in order."""
        with self._lock:
            return sorted({name for file in self._files.values() for name in file.columns} - {"step"})

    def last(self) -> dict[str, float]:
        """Return the numbers of the last step, those that are finite."""
        with self._lock:
            kept = [(file, stop) for file, _, stop in self._kept() if stop]
            if not kept:
                return {}
            file, stop = kept[-1]
            numbers = {name: float(file.column(name)[stop - 1]) for name in file.columns}
            return {name: value for name, value in numbers.items() if np.isfinite(value)}

    def rows(self) -> int:
        """Return how many steps are drawn."""
        with self._lock:
            return sum(stop - start for _, start, stop in self._kept())

    def line(self, name: str, *, against: str = "step", span: tuple[float, float] | None = None) -> Line:
        """Return a number over `against`, of the steps within `span` of that, thinned; where it is not finite, a gap.

        Of a number that not every step has, those that have it are joined.
        """
        with self._lock:
            parts = [
                (self._x(file, against)[start:stop], file.column(name)[start:stop])
                for file, start, stop in self._kept()
            ]
            present = [file.present(name)[start:stop] for file, start, stop in self._kept()]
            again = [
                (self._x(file, against)[stop:][has], file.column(name)[stop:][has])
                for file, _, stop in self._kept()
                if (has := file.present(name)[stop:]).any()
            ]
        x, y = _joined([part for part, _ in parts]), _joined([part for _, part in parts])
        has = np.concatenate([np.empty(0, np.bool_), *present])
        x, y = x[has], y[has]
        if span is not None:
            x, y = _within(x, y, span)
            again = [_within(*each, span) for each in again]
        marks = x[~np.isfinite(y)]
        return Line(
            *thinned(x, y),
            marks=marks[np.linspace(0, marks.size - 1, min(marks.size, _MARKS), dtype=np.int64)].tolist(),
            marked=int(marks.size),
            taken_again=[thinned(*each) for each in again],
        )

    def at(self, step: int) -> dict[str, float]:
        """Return the finite numbers of one step; none if it was not taken."""
        with self._lock:
            for file, _, stop in self._kept():
                row = int(np.searchsorted(file.column("step")[:stop], step))
                if row < stop and file.column("step")[row] == step:
                    numbers = {name: float(file.column(name)[row]) for name in file.columns}
                    return {name: value for name, value in numbers.items() if np.isfinite(value)}
            return {}

    def values(self, name: str) -> dict[int, float | None]:
        """Return a number of each step that has it; None where it is not finite."""
        with self._lock:
            found: dict[int, float | None] = {}
            for file, start, stop in self._kept():
                has = file.present(name)[start:stop]
                steps, values = file.column("step")[start:stop][has], file.column(name)[start:stop][has]
                pairs = zip(steps.astype(np.int64).tolist(), values.tolist(), strict=True)
                found |= {step: value if np.isfinite(value) else None for step, value in pairs}
            return found

    def _kept(self) -> Iterator[tuple[_File, int, int]]:
        """Yield the files in the order of their sessions, each with the rows that count: [start, stop)."""
        files = sorted((file for file in self._files.values() if file.rows), key=lambda file: file.number)
        first = np.inf
        kept: list[tuple[_File, int, int]] = []
        for file in reversed(files):
            steps = file.column("step")
            kept.append((file, 0, int(np.searchsorted(steps, first))))
            first = min(first, float(steps[0]))
        yield from reversed(kept)

    def _x(self, file: _File, against: str) -> Floats:
        if against != "hours":
            return file.column(against)
        begun = min(float(each.column("time")[0]) for each in self._files.values() if each.rows)
        return (file.column("time") - begun) / 3600

    def _read(self, key: str, file: _File, size: int) -> None:
        if size < file.size:  # Somebody put another file in its place.
            file = self._files[key] = _File(file.number)
        length, stop = _AT_ONCE, 0
        while stop < size:
            stop = min(size, file.at + length)
            lines = self._storage.get_ranges(key, [(file.at, stop)])[0]
            lines = lines[: lines.rfind(b"\n") + 1]
            if lines:
                _take(file, lines, key)
            begun = lines.rfind(b"\n", 0, -1) + 1
            file.at += begun
            length = _AT_ONCE if begun else 2 * length  # A line that is longer than what was read.
        file.size = size


def _take(file: _File, lines: bytes, key: str) -> None:
    try:
        file.add(lines)
    except (AttributeError, TypeError, ValueError) as error:
        raise CorruptError(
            f"metrics cannot be read: {error}", key=key, hint="Restore this file from a copy, or remove it."
        ) from None


def _columns(lines: bytes) -> dict[str, Floats]:
    """Return the numbers in JSON lines, by name; NaN where a line has none."""
    if not lines:
        return {}
    try:
        options = pa_json.ReadOptions(use_threads=False, block_size=len(lines) + 1)
        table = pa_json.read_json(io.BytesIO(lines), read_options=options)
    except pa.ArrowInvalid:  # A number that became a text, say: slower, and forgiving.
        records = [orjson.loads(line) for line in lines.splitlines()]
        names = {name for record in records for name in record}
        return {name: np.array([_number(record.get(name)) for record in records]) for name in names}
    found = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        if pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_null(column.type):
            found[name] = np.asarray(column.cast(pa.float64()), dtype=np.float64)  # Null becomes NaN.
    return found


_NULL = re.compile(rb'"([^"\\]+)":null')


def _nulls(lines: bytes) -> dict[str, list[int]]:
    r"""Return by name the lines in which a number is null.

    >>> _nulls(b'{"step":1,"loss":null}\n{"step":2}\n{"step":3,"loss":null}\n')
    {'loss': [0, 2]}
    """
    if b":null" not in lines:  # So says a fast search; the pattern takes as long as reading the numbers does.
        return {}
    places = [(match[1].decode(), match.start()) for match in _NULL.finditer(lines)]
    ends = np.flatnonzero(np.frombuffer(lines, np.uint8) == ord("\n"))
    rows = np.searchsorted(ends, [place for _, place in places]).tolist()
    found: dict[str, list[int]] = {}
    for (name, _), row in zip(places, rows, strict=True):
        found.setdefault(name, []).append(row)
    return found


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else float("nan")


def _within(x: Floats, y: Floats, span: tuple[float, float]) -> tuple[Floats, Floats]:
    """Return what lies within `span`, and one more on either side, so that the line goes on to the edges of the picture."""
    first = max(0, int(np.searchsorted(x, span[0])) - 1)
    stop = int(np.searchsorted(x, span[1], side="right")) + 1
    return x[first:stop], y[first:stop]


def _joined(parts: Sequence[Floats]) -> Floats:
    return np.concatenate([np.empty(0), *parts])


def thinned(x: Floats, y: Floats, *, points: int = _POINTS) -> tuple[list[float], list[float | None]]:
    """Return up to three points for each of `points` parts of the line: the least, the largest, and a gap if there is one.

    >>> thinned(np.arange(6.0), np.array([0, 9, 1, np.nan, 5, 5]), points=2)
    ([0.0, 1.0, 3.0, 4.0], [0.0, 9.0, None, 5.0])
    """
    if x.size > 2 * points:
        starts = np.linspace(0, x.size, points, endpoint=False).astype(np.int64)
        low = _where(np.fmin.reduceat(y, starts), y, starts)
        high = _where(np.fmax.reduceat(y, starts), y, starts)
        bad = np.flatnonzero(~np.isfinite(y))
        _, first = np.unique(np.searchsorted(starts, bad, side="right"), return_index=True)
        chosen = np.unique(np.concatenate([low, high, bad[first]]))
        x, y = x[chosen], y[chosen]
    return x.tolist(), [value if np.isfinite(value) else None for value in y.tolist()]


def _where(values: Floats, y: Floats, starts: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return where the value of each part stands in it; where it begins if there is none."""
    lengths = np.diff([*starts, y.size])
    same = y == np.repeat(values, lengths)
    found = starts.copy()
    places = np.flatnonzero(same)
    part = np.searchsorted(starts, places, side="right") - 1
    firsts, index = np.unique(part, return_index=True)
    found[firsts] = places[index]
    return found

"""The shards and samples of several datasets under one numbering, so that what reads one dataset reads a mixture.

Shards are those of all sources, one source after the other. A source's line of tokens begins at a multiple of the length of a
sample, so that sample k of a source is sample `first_sample + k` of all: a few places at the end of each line stay empty.
"""

import bisect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from typing_extensions import override

from datastore.dataset.shards.info import ColumnLayout, ShardInfo
from datastore.dataset.shards.segments import Segments
from datastore.dataset.snapshot import Dataset
from datastore.errors import ConfigError
from datastore.loader.mixture.order import Place
from datastore.loader.order.samples import I64, Gaps, SampleGrid
from datastore.storage.base import ReadOnly, Stat, Storage
from datastore.storage.statistics import OperationStatistics, add_statistics
from datastore.storage.wrappers import RoutedReads

__all__ = ["JointSegments", "JointStorage", "joint_grid", "places_of"]


class JointSegments(Segments):
    """The shards of several datasets, by name; a path begins with the name of its source."""

    def __init__(self, sources: Mapping[str, Dataset]) -> None:
        super().__init__([batch for source in sources.values() for batch in source.segments.batches])
        self._names = list(sources)
        self._parts = [source.segments for source in sources.values()]
        self._first: list[int] = [0, *np.cumsum([len(part) for part in self._parts]).tolist()]

    @override
    def __iter__(self) -> Iterator[ShardInfo]:
        return map(self.shard, range(len(self)))

    @override
    def shard(self, index: int) -> ShardInfo:
        """Return shard `index`.

        Raises:
            IndexError: there is no such shard.
        """
        if not 0 <= index < len(self):
            raise IndexError(index)
        source = bisect.bisect_right(self._first, index) - 1
        info = self._parts[source].shard(index - self._first[source])
        return msgspec.structs.replace(info, path=f"{self._names[source]}/{info.path}")

    @property
    @override
    def columns(self) -> tuple[ColumnLayout, ...]:
        """The columns that any source has beside its tokens, by name.

        Raises:
            ConfigError: two sources have one of the same name and of different types.
        """
        found: dict[str, ColumnLayout] = {}
        for name, part in zip(self._names, self._parts, strict=True):
            for column in part.columns:
                known = found.setdefault(column.name, column)
                if (known.dtype, known.width) != (column.dtype, column.width):
                    raise ConfigError(
                        "sources of the mixture have the same column with different types",
                        column=column.name,
                        source=name,
                        types=f"{known.dtype} x {known.width}, {column.dtype} x {column.width}",
                        hint="Leave one of the sources out.",
                    )
        return tuple(found.values())

    def lacks(self, name: str) -> npt.NDArray[np.bool_]:
        """Return for each shard whether its source has no column `name`."""
        lacking = [all(column.name != name for column in part.columns) for part in self._parts]
        return np.repeat(lacking, [len(part) for part in self._parts])

    @override
    def column_start(self, name: str) -> npt.NDArray[np.int64]:
        """Return where the first value of column `name` is in each shard's file; where it lacks it, where its tokens are."""
        starts = [
            part.column_start(name) if any(column.name == name for column in part.columns) else part.values_start
            for part in self._parts
        ]
        return np.concatenate(starts)


class JointStorage(RoutedReads, ReadOnly):
    """The files of several storages: a key begins with the name of its storage."""

    def __init__(self, storages: Mapping[str, Storage]) -> None:
        self._storages = dict(storages)

    @property
    @override
    def url(self) -> str:
        return " + ".join(storage.url for storage in self._storages.values())

    @override
    def list(self, folder: str = "") -> Iterator[Stat]:
        for prefix, storage in self._storages.items():
            for found in storage.list():
                key = f"{prefix}/{found.key}"
                if not folder or key.startswith(f"{folder}/"):
                    yield Stat(key=key, size_bytes=found.size_bytes, modified=found.modified)

    @override
    def copies(self, key: str) -> Sequence[Storage]:
        prefix = key.partition("/")[0]
        storage, name = self._place(key)
        return [JointStorage({prefix: copy}) for copy in storage.copies(name)]

    @override
    def statistics(self) -> dict[str, OperationStatistics]:
        return add_statistics(storage.statistics() for storage in self._storages.values())

    @override
    def _place(self, key: str) -> tuple[Storage, str]:
        prefix, _, name = key.partition("/")
        return self._storages[prefix], name


def places_of(numbers: Sequence[int], *, shards: Sequence[int]) -> list[Place]:
    """Return where sources begin that take up so many numbers of samples, and have so many shards."""
    first_shard, first_sample = (np.cumsum([0, *counts]).tolist() for counts in (shards, numbers))
    return [Place(*both) for both in zip(first_shard[:-1], first_sample[:-1], strict=True)]


def joint_grid(grids: Sequence[SampleGrid], places: Sequence[Place]) -> SampleGrid:
    """Return the samples of all sources, which begin at `places`."""
    seq_len = grids[0].seq_len
    lines = [place.first_sample * seq_len for place in places]
    # What is left out of the sources before makes up the difference between a line and the stream that it is taken from.
    left_out = np.cumsum([0, *(int(grid.stored_start[-1] - grid.token_start[-1]) for grid in grids)])
    streams = [line + int(out) for line, out in zip(lines, left_out[:-1], strict=True)]
    gaps = [
        np.stack([grid.gaps.start, grid.gaps.stop], axis=1) + stream
        for grid, stream in zip(grids, streams, strict=True)
        if grid.gaps is not None
    ]
    stored = _end_to_end([grid.stored_start for grid in grids], streams)
    return SampleGrid(
        seq_len=seq_len,
        samples=sum(grid.samples for grid in grids),
        token_start=_end_to_end([grid.token_start for grid in grids], lines) if gaps else stored,
        run_start=np.concatenate([grid.run_start + at.first_sample for grid, at in zip(grids, places, strict=True)]),
        run_length=np.concatenate([grid.run_length for grid in grids]),
        stored_start=stored,
        gaps=Gaps(np.concatenate(gaps)) if gaps else None,
    )


def _end_to_end(starts: Sequence[I64], origins: Sequence[int]) -> I64:
    """Return the starts of all shards, each source's from its origin on, and the end of the last."""
    parts: list[Any] = [start[:-1] + origin for start, origin in zip(starts, origins, strict=True)]
    return np.concatenate([*parts, starts[-1][-1:] + origins[-1]])

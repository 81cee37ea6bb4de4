"""The loader: an iterator of batches whose every sample follows from (dataset version, seed, position).

It plans some thousand samples ahead, lets a few threads bring and check the blocks they need, and copies rows when the
batch is asked for. No rank talks to another, nothing is written, and no memory is shared between processes. What a
batch holds does not depend on threads, memory or prefetching: those change only how long it takes.

Shards that are files of this machine are read where they lie, others into memory with a budget.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Self

import numpy as np
from typing_extensions import override

from datastore.display import html_fields
from datastore.errors import ConfigError, DatastoreError, StorageError, whole_number
from datastore.loader.assemble import empty_columns
from datastore.loader.batch import Batch
from datastore.loader.gathering.gather import AnyArray, BatchColumn, TokenArray
from datastore.loader.mixture.request import Data, Weights
from datastore.loader.order.lanes import I64
from datastore.loader.pipeline import Pipeline
from datastore.loader.place.position import Position
from datastore.loader.place.state import LoaderState
from datastore.loader.settings import LoaderSettings, Rank, checked_options
from datastore.loader.stream import columns_of, open_stream
from datastore.storage.base import Storage

__all__ = ["Loader"]


class Loader:
    """One rank's batches of `global_batch` samples (over all ranks) of `seq_len + 1` tokens each.

    `dataset` is an open one, of tokens, or a `Mixture` of several; `seed` chooses one of its orders; `options` say how to read.
    `global_batch` may change between runs, `rank` too: the order stays. Rows per rank differ by one if the world does
    not divide the batch. Not thread-safe. Safe to use in a forked child: it starts its own threads there. Pickled, it goes on
    in another process where it stands.

    Raises:
        ConfigError: a value is out of range, the dataset holds records or is shorter than one sample, `global_batch` is
            smaller than the world, or documents are deleted and nobody says what end-of-text is.
    """

    def __init__(
        self,
        dataset: Data,
        *,
        seq_len: int,
        global_batch: int,
        seed: int = 0,
        rank: Rank = Rank(),  # noqa: B008 - a frozen value
        options: LoaderSettings = LoaderSettings(),  # noqa: B008 - a frozen value
    ) -> None:
        self.dataset = dataset
        self.rank = rank
        self.global_batch = whole_number(global_batch, name="global_batch")
        self.options = checked_options(options)
        self._stream = open_stream(dataset, seq_len=seq_len, seed=seed, options=self.options)
        itemsize = int(self._stream.segments.itemsize.max())
        self.dtype: np.dtype[Any] = np.dtype("uint16" if itemsize == 2 else "uint32")
        self.columns: Mapping[str, BatchColumn] = columns_of(self._stream, self.options)
        """What batches bring along beside their tokens, by name."""
        self._position = Position(
            dataset,
            self._stream.sources,
            self._stream.start,
            rank=rank,
            global_batch=self.global_batch,
            epochs=self.options.epochs,
        )
        self._pipeline = Pipeline(
            self._stream, self._position, columns=self.columns, rank=rank, global_batch=self.global_batch
        )
        self._delivered = 0
        self._unsettled = False
        """Whether a call is under way, or was ended by an exception: then what was planned may have holes."""

    def _repr_html_(self) -> str:
        """For a notebook: what its batches are, and where it stands."""
        sample = f"{self.seq_len:,} tokens and the one after them, {self.dtype}"
        return html_fields(
            "Loader", self._position.shown() | {"sample": sample, "columns": ", ".join(self.columns) or None}
        )

    @override
    def __reduce__(self) -> tuple[object, ...]:
        """Pickle what it was made of and where it stands: another process opens the dataset and goes on from there."""
        made_of = self.dataset, self.seq_len, self.global_batch, self.rank, self.options
        return _loader_at, (*made_of, self.state_dict())

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return self._next(None, self.empty_columns())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def storage(self) -> Storage:
        """The files that it reads."""
        return self._stream.storage

    @property
    def seq_len(self) -> int:
        """Tokens of a sample, less its last target."""
        return self._stream.grid.seq_len

    @property
    def rows(self) -> int:
        """B, the rows of this rank's batches."""
        start, stop = self.rank.share(self.global_batch)
        return stop - start

    @property
    def cursor(self) -> int:
        """Samples delivered so far, over all ranks and epochs."""
        return self._position.cursor

    @property
    def samples_per_epoch(self) -> int:
        """N, the samples of the dataset; of a mixture, those of all its sources."""
        return self._position.samples_per_epoch

    @property
    def batches_per_epoch(self) -> int:
        """Steps of one finite pass; an endless one does not stop there, its batches straddle epochs."""
        return -(-self.samples_per_epoch // self.global_batch)

    @property
    def batches(self) -> int | None:
        """Steps from the start to the end of all passes, or of the mixture; None: it does not end."""
        return None if self.end is None else -(-self.end // self.global_batch)

    @property
    def end(self) -> int | None:
        """Position after the last sample of all passes, or of the mixture; None: it does not end."""
        return self._position.end

    def next_into(self, out: TokenArray, *, columns: Mapping[str, AnyArray] | None = None) -> Batch:
        """Return the next batch with its tokens in `out` [rows, seq_len + 1], which the caller may use again later.

        Its columns come in the arrays `columns`, one for each of `Loader.columns`, or by default in new ones.

        Raises:
            StopIteration: a finite pass is over.
            CorruptError: a block of it is damaged; the message names shard and block. The cursor stays.
            StorageError: the storage failed; the cursor stays, so the same call may be tried again.
        """
        if out.shape != (self.rows, self.seq_len + 1) or out.dtype != self.dtype or not out.flags.c_contiguous:
            raise ConfigError(
                "the buffer does not fit the batch",
                shape=out.shape,
                dtype=out.dtype.name,
                hint=f"Pass a contiguous {self.dtype.name} array of shape {(self.rows, self.seq_len + 1)}.",
            )
        into = self.empty_columns() if columns is None else columns
        if columns is not None:
            self._check_columns(columns)
        return self._next(out, into)

    def _next(self, out: TokenArray | None, into: Mapping[str, AnyArray]) -> Batch:
        try:
            return self._deliver(out, into)
        except (DatastoreError, StopIteration) as error:
            if isinstance(error, StorageError):
                error.values["rank"] = f"{self.rank.rank} of {self.rank.world}"
            raise
        except BaseException:
            self._pipeline.abandon()
            raise

    def _deliver(self, out: TokenArray | None, into: Mapping[str, AnyArray]) -> Batch:
        if self._unsettled:  # Something was raised while plans were being made or used up: none of them is trusted.
            self._start_at(self._position.state)
        self._unsettled = True
        made = self._pipeline.make(out, into)
        if made is None:
            raise StopIteration
        plan, batch = made
        self._pipeline.passed()
        moved = self._position.after(plan)
        # Nothing can be raised from here to the caller: the cursor counts this batch when, and only when, it is delivered.
        self._unsettled, self._position.state, self._delivered = False, moved, self._delivered + 1
        return batch

    def empty_columns(self) -> dict[str, AnyArray]:
        """Return arrays for the columns of one batch; what is in them is undefined."""
        return empty_columns(self.columns, rows=self.rows, tokens=self.seq_len + 1)

    def state_dict(self) -> dict[str, Any]:
        """Return where the loader stands, as JSON values: under 1 KB, the same on every rank."""
        return self._position.saved()

    def load_state_dict(self, state: Mapping[str, Any], *, reweigh: bool = False) -> None:
        """Go on from `state`, on any world and any batch size.

        It was saved by a loader of the same dataset version; or, where deleted tokens are masked, of an earlier one that has
        the same shards: what has been deleted since is masked from now on. With `reweigh` a mixture whose weights, stages,
        epochs or sources are others here goes on with these; how often each source was drawn before is kept.

        Raises:
            ResumeError: `state` belongs to another order; the message names the keys that differ.
        """
        self._start_at(self._position.read(state, reweigh=reweigh))

    def replay(self, state: Mapping[str, Any]) -> None:
        """Go through what came after `state` once more: the weights, stages and epochs of a mixture are those of the state.

        Raises:
            ResumeError: as `load_state_dict`.
        """
        self._start_at(self._position.recalled(state))

    def reweigh(self, weights: Weights) -> None:
        """Give the sources of the mixture other `weights`, from the next batch on and until the end; it is part of the state.

        Raises:
            ConfigError: the loader reads one dataset, or a weight is out of range.
        """
        self._start_at(self._position.reweighed(weights))

    def skip(self, batches: int) -> None:
        """Go on `batches` batches later, without reading any."""
        self._start_at(self._position.skipped(batches))

    def seek(self, position: int) -> None:
        """Go to `position` of the order: so many samples, of all ranks and epochs, come before the next batch. Nothing is read.

        Raises:
            ConfigError: it is negative, or lies behind the end.
        """
        self._start_at(self._position.sought(position))

    def plan(self, batches: int) -> list[I64]:
        """Return the samples of this rank's next `batches` batches, one array [B] each; nothing is read or moved."""
        return [plan.samples for plan in self._position.plan(self.cursor, batches=batches)]

    def stats(self) -> dict[str, int | float]:
        """Return counts since the start: batches, lanes, those of the block cache (`BlockStats`), and how it fares now.

        `hit_rate` is the part of the blocks asked for that were there already; `ahead` how many batches could be delivered at once.
        """
        counts: dict[str, int | float] = {
            "batches": self._delivered,
            "lanes": self._position.lanes,
            "window": self._position.state.window,
        }
        return counts | self._pipeline.stats()

    def close(self) -> None:
        """End the threads and give back the memory. The loader may be used again; it starts anew where it stands."""
        self._pipeline.close()
        self._start_at(self._position.state)

    def _check_columns(self, columns: Mapping[str, AnyArray]) -> None:
        wanted = {
            name: (column.shape(self.rows, self.seq_len + 1), column.dtype) for name, column in self.columns.items()
        }
        found = {name: (array.shape, array.dtype) for name, array in columns.items() if array.flags.c_contiguous}
        if found != wanted or found.keys() != columns.keys():
            raise ConfigError(
                "the buffers do not fit the columns of the batch",
                columns=sorted(columns),
                wanted=sorted(wanted),
                hint="Pass contiguous arrays as `empty_columns` returns them.",
            )

    def _start_at(self, state: LoaderState) -> None:
        """Plan from `state` on, and forget what was planned."""
        self._unsettled = True
        self._position.go_to(state)
        self._pipeline.start()
        self._unsettled = False


def _loader_at(
    dataset: Data, seq_len: int, global_batch: int, rank: Rank, options: LoaderSettings, state: dict[str, Any]
) -> Loader:
    loader = Loader(dataset, seq_len=seq_len, global_batch=global_batch, seed=state["seed"], rank=rank, options=options)
    loader.load_state_dict(state)
    return loader

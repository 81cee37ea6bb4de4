"""Where a loader stands in its order, and what comes next: the same for tokens and for rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from datastore.errors import ConfigError, whole_number
from datastore.loader.mixture.order import MixedOrder
from datastore.loader.mixture.request import Mixture, Stage, Weights
from datastore.loader.order.lanes import I64
from datastore.loader.order.order import BatchPlan, LaneOrder, Located, Order, Planner
from datastore.loader.place.sources import Source, course_of, reweighed
from datastore.loader.place.state import LoaderState, as_values, is_same_mixture, read_state
from datastore.loader.settings import Rank

__all__ = ["Position"]


class Position:
    """A state, and the batches that one rank has from there on. Not thread-safe.

    A state says where the next batch begins, so whoever delivers one moves on by `state = after(plan)`, and nothing else does.

    Raises:
        ConfigError: `global_batch` leaves a rank without a row.
    """

    def __init__(
        self,
        data: object,
        sources: Sequence[Source[Any]],
        start: LoaderState,
        *,
        rank: Rank,
        global_batch: int,
        epochs: int | None,
    ) -> None:
        self._mixture = data if isinstance(data, Mixture) else None
        self._sources = sources
        self._start = start
        self._rank = rank
        self._global_batch = global_batch
        self._epochs = epochs
        self.samples_per_epoch = sum(source.runs.rows_per_epoch for source in sources)
        """N, the samples of the dataset; of a mixture, those of all its sources."""
        self.state = start
        self._planner = self._planner_of(start)

    @property
    def cursor(self) -> int:
        """Samples delivered so far, over all ranks and epochs."""
        cursor: int = self.state.cursor
        return cursor

    @property
    def lanes(self) -> int:
        """Lanes of all sources together."""
        return sum(source.lanes for source in self.state.sources.values()) or self.state.lanes

    @property
    def end(self) -> int | None:
        """Position after the last sample; None: there is no end."""
        return self._end

    def shown(self) -> dict[str, str]:
        """Return where it stands in what, by name, for people."""
        start, stop = self._rank.share(self._global_batch)
        passes, done = divmod(self.cursor, max(1, self.samples_per_epoch))
        length = f"{self._end:,} samples" if self._end is not None else "without an end"
        return {
            "data": ", ".join(
                f"{each.name}: {each.dataset}" if each.name else str(each.dataset) for each in self._sources
            ),
            "batch": f"{stop - start:,} of {self._global_batch:,} samples, as rank {self._rank.rank} of {self._rank.world}",
            "order": f"{self.samples_per_epoch:,} samples a pass, {length}",
            "stands at": f"sample {done:,} of pass {passes + 1:,}",
        }

    def plan(self, cursor: int, *, batches: int) -> list[BatchPlan]:
        """Return the next `batches` batches from `cursor` on, fewer at the end."""
        return self._planner.plan(cursor, batches=batches)

    def orders(self) -> tuple[LaneOrder, LaneOrder] | None:
        """Return the order, and the same again for another thread; None if its lanes do not read on."""
        orders = self._order, course_of(self._sources, self.state, epochs=self._epochs).order
        first, again = (order if isinstance(order, Order | MixedOrder) else None for order in orders)
        return None if first is None or again is None else (first, again)

    def locate(self, positions: I64) -> Located:
        """Return the samples at some positions, wherever they lie."""
        return course_of(self._sources, self.state, epochs=self._epochs).order.locate(positions)

    def end_of(self, plan: BatchPlan) -> int:
        """Return the cursor after `plan`."""
        return self._within(plan.cursor + self._global_batch)

    def after(self, plan: BatchPlan) -> LoaderState:
        """Return the state once `plan` is delivered."""
        return msgspec.structs.replace(self.state, cursor=self.end_of(plan))

    def skipped(self, batches: int) -> LoaderState:
        """Return the state `batches` batches later.

        Raises:
            ConfigError: that is backwards.
        """
        if batches < 0:
            raise ConfigError("cannot skip backwards", batches=batches, hint="Load a saved state instead.")
        return msgspec.structs.replace(self.state, cursor=self._within(self.cursor + batches * self._global_batch))

    def sought(self, position: int) -> LoaderState:
        """Return the state at `position`: so many samples, of all ranks and epochs, come before the next batch.

        Raises:
            ConfigError: it is negative, or lies behind the end.
        """
        position = whole_number(position, name="position")
        if position < 0 or (self._end is not None and position > self._end):
            raise ConfigError("there is no such position", position=position, end=self._end, hint="Stay in the order.")
        return msgspec.structs.replace(self.state, cursor=position)

    def saved(self) -> dict[str, Any]:
        """Return the state as JSON values."""
        return as_values(self.state)

    def read(self, saved: Mapping[str, Any], *, reweigh: bool = False) -> LoaderState:
        """Return `saved` as a state of this order; with `reweigh`, if the mixture is another one here, with what it is here from now on.

        Raises:
            ResumeError: it belongs to another order; the message names the keys that differ.
            ConfigError: `reweigh` is for a mixture.
        """
        state = read_state(saved, here=self._start, reweigh=reweigh)
        if not reweigh:
            return state
        self._mixed("reweigh")
        if is_same_mixture(state, self._start):
            return state
        stages = [Stage(stage.start, stage.weights) for stage in self._start.stages]
        return msgspec.structs.replace(reweighed(state, stages=stages, here=self._start), given=self._start.stages)

    def recalled(self, saved: Mapping[str, Any]) -> LoaderState:
        """Return `saved` as it was, whatever weights the mixture has here.

        Raises:
            ResumeError: as `read`.
        """
        return read_state(saved, here=self._start, reweigh=True)

    def reweighed(self, weights: Weights) -> LoaderState:
        """Return the state with other weights from here on.

        Raises:
            ConfigError: there is no mixture, or the weights are out of range.
        """
        mixture = self._mixed("reweigh")
        changed = Mixture(mixture.sources, weights, mixture.temperature, mixture.epochs)
        stages = changed.stages_of({source.name: source.runs.samples for source in self._sources})
        given = self.state.given or self._start.stages
        return msgspec.structs.replace(reweighed(self.state, stages=stages, here=self._start), given=given)

    def go_to(self, state: LoaderState) -> None:
        """Stand at `state`."""
        same = msgspec.structs.replace(state, cursor=0) == msgspec.structs.replace(self.state, cursor=0)
        planner = self._planner if same else self._planner_of(state)
        self._planner, self.state = planner, state

    def _mixed(self, what: str) -> Mixture:
        if self._mixture is None:
            raise ConfigError(
                f"there is nothing to {what}: the loader reads one dataset", hint="Pass a `Mixture` to it."
            )
        return self._mixture

    def _within(self, cursor: int) -> int:
        return cursor if self._end is None else min(cursor, max(self._end, self.cursor))

    def _planner_of(self, state: LoaderState) -> Planner:
        self._order, self._end = course_of(self._sources, state, epochs=self._epochs)
        return Planner(self._order, rank=self._rank, global_batch=self._global_batch, total=self._end)

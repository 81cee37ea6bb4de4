"""One dataset, or the sources of a mixture, and the order that a state gives them.

The same for tokens and for rows: a source is known here by its dataset, its samples shard by shard, and where it begins in
the joint numbering.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import msgspec
import numpy as np

from datastore.errors import ConfigError
from datastore.loader.mixture.order import MixedOrder, Place, seed_of
from datastore.loader.mixture.request import Mixture, Stage, weights_in_force
from datastore.loader.mixture.schedule import Phase, phases_of
from datastore.loader.order.lanes import I64
from datastore.loader.order.order import ORDER_VERSION, Order, Ordered, OrderKey, SampleOrder
from datastore.loader.place.state import LoaderState, SourceState, StageState
from datastore.loader.settings import LoaderSettings

__all__ = ["Course", "Shape", "Source", "course_of", "first_state", "reweighed", "source_numbers"]

_LEAST_LANES = 16
"""Lanes of a source of a mixture at least, however small its weight."""


class Shape(NamedTuple):
    """How a source is read, and what names its line."""

    lanes: int
    window: int
    fingerprint: str


class Named(Protocol):
    """What the order of a source depends on, besides its samples."""

    @property
    def uuid(self) -> str:
        """Names what is in it."""
        ...

    @property
    def version(self) -> int:
        """Counts what may change while a run goes on."""
        ...

    @property
    def segments(self) -> Any:
        """Its shards; `uid64` names them."""
        ...


D_co = TypeVar("D_co", bound=Named, covariant=True)


@dataclass(frozen=True, slots=True)
class Source(Generic[D_co]):
    """One dataset of what a loader goes through."""

    name: str
    """Its name in the mixture; empty, where there is none."""

    dataset: D_co
    runs: Ordered
    place: Place
    shape: Shape


class Course(NamedTuple):
    """The order of samples, and where it ends."""

    order: SampleOrder
    end: int | None
    """Position after the last; None: there is none."""


def first_state(
    sources: Sequence[Source[Any]], mixture: Mixture | None, *, seq_len: int, seed: int, options: LoaderSettings
) -> LoaderState:
    """Return the state of a loader that has delivered nothing.

    Raises:
        ConfigError: `options.epochs` says how often to go through a mixture.
    """
    state = LoaderState(
        dataset=sources[0].dataset.uuid,
        version=sources[0].dataset.version,
        fingerprint=sources[0].shape.fingerprint,
        seq_len=seq_len,
        seed=seed,
        lanes=sources[0].shape.lanes,
        window=sources[0].shape.window,
        order=ORDER_VERSION,
        cursor=0,
        deletions=options.deletions,
        shuffle=options.shuffle,
        packing=options.packing,
    )
    if mixture is None:
        return state
    if options.epochs is not None:
        raise ConfigError(
            "a mixture says itself how often to go through each source",
            epochs=options.epochs,
            hint='Pass `epochs={"name": passes}` to the mixture.',
        )
    stages = mixture.stages_of({source.name: source.runs.samples for source in sources})
    shares = stages[0].weights
    total = sum(shares.values())
    states = {
        source.name: SourceState(
            dataset=source.dataset.uuid,
            version=source.dataset.version,
            fingerprint=source.shape.fingerprint,
            samples=source.runs.samples,
            # Together the sources have about as many lanes as one dataset would.
            lanes=max(
                1, min(source.shape.lanes, max(_LEAST_LANES, round(options.lanes * shares[source.name] / total)))
            ),
            window=source.shape.window,
            epochs=mixture.epochs.get(source.name),
        )
        for source in sources
    }
    return msgspec.structs.replace(
        state,
        dataset="mixture",
        version=0,
        fingerprint="",
        lanes=max(one.lanes for one in states.values()),
        window=max(one.window for one in states.values()),
        sources=states,
        stages=tuple(StageState(start=stage.start, weights=dict(stage.weights)) for stage in stages),
    )


def course_of(sources: Sequence[Source[Any]], state: LoaderState, *, epochs: int | None) -> Course:
    """Return the order that `state` is a position of."""
    if not state.stages:
        source = sources[0]
        key = OrderKey(state.seed, state.lanes, state.window, state.shuffle)
        end = None if epochs is None else epochs * source.runs.rows_per_epoch
        return Course(source.runs.order(source.dataset.segments.uid64, key), end)
    orders = [
        source.runs.order(
            source.dataset.segments.uid64,
            OrderKey(seed_of(state.seed, source.name), shape.lanes, shape.window, state.shuffle),
        )
        for source, shape in ((source, state.sources[source.name]) for source in sources)
    ]
    phases, end = _phases(state)
    plain = [order for order in orders if isinstance(order, Order)]
    assert len(plain) == len(orders), "sources of a mixture are gone through as they are"
    key = OrderKey(state.seed, state.lanes, state.window, state.shuffle)
    return Course(MixedOrder(plain, [source.place for source in sources], phases=phases, key=key), end)


def reweighed(state: LoaderState, *, stages: Sequence[Stage], here: LoaderState) -> LoaderState:
    """Return `state` with the weights of `stages` from its cursor on, and the sources and epochs of `here`.

    How often each source was drawn so far is counted and kept: none begins anew, none is drawn beyond its epochs.
    """
    phases, _ = _phases(state)
    current = [phase for phase in phases if phase.start <= state.cursor][-1]
    counts = current.drawn(state.cursor - current.start)
    drawn = {name: count for name, count in zip(sorted(state.sources), counts, strict=True) if name in here.sources}
    first = StageState(start=state.cursor, weights=dict(weights_in_force(stages, state.cursor)), drawn=drawn)
    later = [StageState(start=each.start, weights=dict(each.weights)) for each in stages if each.start > state.cursor]
    known = {
        name: msgspec.structs.replace(source, lanes=state.sources[name].lanes, window=state.sources[name].window)
        if name in state.sources
        else source
        for name, source in here.sources.items()
    }
    return msgspec.structs.replace(state, dataset=here.dataset, sources=known, stages=(first, *later))


def source_numbers(sources: Sequence[Source[Any]], samples: I64) -> I64:
    """Return the number of the source that each of `samples` is of; that of no sample is -1."""
    starts = np.array([source.place.first_sample for source in sources], np.int64)
    return np.searchsorted(starts, samples, side="right") - 1


def _phases(state: LoaderState) -> tuple[list[Phase], int | None]:
    names = sorted(state.sources)
    most = {
        number: int(source.epochs * source.samples)
        for number, source in enumerate(state.sources[name] for name in names)
        if source.epochs is not None
    }
    stages = [(stage.start, [stage.weights.get(name, 0.0) for name in names]) for stage in state.stages]
    return phases_of(stages, most=most, before=tuple(state.stages[0].drawn.get(name, 0) for name in names))

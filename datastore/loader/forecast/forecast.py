"""The forecast of a run: which blocks each rank needs follows from the real planning, when they are there from a model of the node.

One node is simulated, for every other has the same work: its ranks lie next to each other. Nothing is read but the manifest of
the dataset, and not even that where the dataset is imagined.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from datastore.dataset.snapshot import Dataset
from datastore.document import Count, Document, Positive
from datastore.errors import ConfigError
from datastore.loader.cache.blocks import BlockLayout, Track
from datastore.loader.cache.prefetch import blocks_of_a_run
from datastore.loader.forecast.imagined import ImaginedDataset
from datastore.loader.forecast.node import Need, NodeRun, Wire, run_node
from datastore.loader.gathering.gather import Reads, reads_of
from datastore.loader.gathering.packed import reads_of_packs
from datastore.loader.mixture.order import Place
from datastore.loader.mixture.request import Mixture
from datastore.loader.order.ahead import LaneReader
from datastore.loader.order.order import BatchPlan
from datastore.loader.order.packs import PackGrid
from datastore.loader.order.samples import SampleGrid, sample_grid
from datastore.loader.place.position import Position
from datastore.loader.place.sources import Shape, Source, first_state
from datastore.loader.settings import LoaderSettings, Rank
from datastore.loader.stream import columns_of, lanes_for, open_stream

__all__ = ["Cluster", "Forecast", "forecast"]


class Cluster(Document, frozen=True, kw_only=True):
    """Where a run is to take place."""

    ranks: Positive = 1
    ranks_per_node: Positive = 8
    link_bytes_per_s: Positive = 1_250_000_000
    """Of each node."""

    store_bytes_per_s: Positive = 10**15
    """Of the store, for all nodes together."""

    delay_s: float = 0.02
    """Until the first byte of a request."""

    step_s: float = 0.5
    """A training step without waiting for data."""

    steps: Positive = 200
    requests_cost: float = 0.4
    """For a million requests."""

    seed: Count = 0


@dataclass(frozen=True, slots=True)
class Forecast:
    """How the first steps go, for all ranks together."""

    ranks: int
    nodes: int
    lanes: int
    steps: int
    start_s: float
    """Until the first batch is there on every rank, once the dataset is open."""

    total_s: float
    stall: float
    """Share of the time after the first batch that was spent waiting for data."""

    requests: int
    fetched_bytes: int
    share_bytes: int
    """Bytes of the samples that were delivered."""

    hit_rate: float
    """Share of the blocks that were there when a step began."""

    evictions: int
    bytes_per_s: float
    """Of each node, on average."""

    cost: float
    """Of the requests."""

    per_step: Sequence[tuple[float, float, int, int]]
    """Of each step, on one node: when it began, how long it waited, its requests, its bytes."""


def forecast(
    data: Dataset | Mixture | ImaginedDataset,
    cluster: Cluster,
    *,
    seq_len: int,
    rows: int,
    options: LoaderSettings = LoaderSettings(),  # noqa: B008 - a frozen value
) -> Forecast:
    """Return how a run on `cluster` goes, with `rows` samples of each rank in a step.

    Takes about 1 ms for each step and rank of a node, and more where the global batch is very large.

    Raises:
        ConfigError: as `Loader`; or there is no whole number of nodes.
    """
    if cluster.ranks > cluster.ranks_per_node and cluster.ranks % cluster.ranks_per_node:
        raise ConfigError(
            "the ranks are no whole number of nodes",
            ranks=cluster.ranks,
            ranks_per_node=cluster.ranks_per_node,
            hint="Use a multiple.",
        )
    each = min(cluster.ranks, cluster.ranks_per_node)
    nodes = cluster.ranks // each
    view = _view(data, seq_len=seq_len, seed=cluster.seed, options=options)
    layout = BlockLayout(view.segments)
    # The ranks in the middle: the first and the last have no neighbour on one side.
    first = nodes // 2 * each
    needs, lanes = [], 0
    for rank in range(first, first + each):
        position = Position(
            data,
            view.sources,
            view.start,
            rank=Rank(rank, cluster.ranks),
            global_batch=rows * cluster.ranks,
            epochs=options.epochs,
        )
        lanes = position.lanes
        needs.append(list(_needs(view, position, layout, cluster=cluster, rows=rows, options=options)))
    budget = max(
        options.memory_bytes, max((len(need.blocks) for one in needs for need in one), default=1) * layout.largest_bytes
    )
    wire = Wire(
        min(cluster.link_bytes_per_s, cluster.store_bytes_per_s / nodes),
        cluster.delay_s,
        max(1, options.threads),
        blocks_of_a_run(layout.largest_bytes),
    )
    run = run_node(
        needs,
        sizes=layout.sizes(np.arange(layout.blocks)),
        budget_bytes=budget,
        wire=wire,
        ahead=options.prefetch_batches if options.threads else 0,
        step_s=cluster.step_s,
    )
    steps = len(run.ready_s)
    return _summed(
        run, cluster, nodes=nodes, lanes=lanes, share_bytes=steps * rows * cluster.ranks * seq_len * view.token_bytes
    )


@dataclass(frozen=True, slots=True)
class _View:
    segments: Any
    sources: tuple[Source[Any], ...]
    start: Any
    grid: SampleGrid | PackGrid
    columns: tuple[Track, ...]
    token_bytes: int


def _view(data: Dataset | Mixture | ImaginedDataset, *, seq_len: int, seed: int, options: LoaderSettings) -> _View:
    if not isinstance(data, ImaginedDataset):
        stream = open_stream(data, seq_len=seq_len, seed=seed, options=options)
        tracks = tuple(one.track for one in columns_of(stream, options).values() if one.track is not None)
        token_bytes = int(stream.segments.itemsize.max())
        return _View(stream.segments, stream.sources, stream.start, stream.grid, tracks, token_bytes)
    if options.packing is not None:
        raise ConfigError("an imagined dataset has no documents to pack", hint="Name a dataset.")
    grid = sample_grid(data.segments.tokens, seq_len=seq_len)
    shape = Shape(lanes_for(data.segments, grid, options), options.window, "")  # type: ignore[arg-type]
    sources = (Source("", data, grid, Place(0, 0), shape),)
    start = first_state(sources, None, seq_len=seq_len, seed=seed, options=options)
    return _View(data.segments, sources, start, grid, (), data.segments.token_bytes)


def _needs(
    view: _View, position: Position, layout: BlockLayout, *, cluster: Cluster, rows: int, options: LoaderSettings
) -> Iterator[Need]:
    """Yield what each step needs, as `Pipeline` requests it."""
    tracks = [layout.tokens, *view.columns]
    stretches = -(-position.lanes // cluster.ranks) * len(tracks)
    orders, reader = position.orders(), None
    if orders is not None:
        reader = LaneReader(
            orders, view.grid, layout, tracks=tracks, budget_bytes=options.memory_bytes, stretches=stretches
        )
    plans = position.plan(0, batches=cluster.steps)
    for step, (plan, reads) in enumerate(zip(plans, _reads_of(view, plans, layout, tracks), strict=True)):
        begun = step * rows * cluster.ranks >= position.lanes
        coming = reader.coming(plan) if reader is not None and begun else []
        yield Need(tuple(np.unique(reads.blocks)[::-1].tolist()), tuple(coming))


def _reads_of(view: _View, plans: list[BatchPlan], layout: BlockLayout, tracks: list[Track]) -> list[Reads]:
    if isinstance(view.grid, PackGrid):
        return reads_of_packs(plans, grid=view.grid, layout=layout, tracks=tracks, gaps=None)
    return reads_of(plans, grid=view.grid, layout=layout, tracks=tracks)


def _summed(run: NodeRun, cluster: Cluster, *, nodes: int, lanes: int, share_bytes: int) -> Forecast:
    steps = len(run.ready_s)
    start = run.ready_s[0] if steps else 0.0
    total = run.ready_s[-1] + cluster.step_s if steps else 0.0
    waits = [ready - began for ready, began in zip(run.ready_s, run.began_s, strict=False)]
    fetched, requests = sum(run.fetched_bytes), sum(run.requests)
    return Forecast(
        ranks=cluster.ranks,
        nodes=nodes,
        lanes=lanes,
        steps=steps,
        start_s=start,
        total_s=total,
        stall=sum(waits[1:]) / max(1e-9, total - start),
        requests=requests * nodes,
        fetched_bytes=fetched * nodes,
        share_bytes=share_bytes,
        hit_rate=run.there / max(1, run.asked),
        evictions=run.evictions * nodes,
        bytes_per_s=fetched / max(1e-9, total),
        cost=requests * nodes * cluster.requests_cost / 1e6,
        per_step=list(zip(run.began_s, waits, run.requests, run.fetched_bytes, strict=False)),
    )

"""The forecast: the model of a node against sums done by hand, and the whole against a real run."""

import time
import warnings
from pathlib import Path

import numpy as np
import pytest

from datastore.dataset.snapshot import open_dataset
from datastore.errors import ConfigError
from datastore.loader.forecast.forecast import Cluster, forecast
from datastore.loader.forecast.imagined import ImaginedDataset
from datastore.loader.forecast.node import Need, NodeRun, Wire, run_node
from datastore.loader.loader import Loader
from datastore.loader.mixture.request import Mixture
from datastore.loader.settings import LoaderSettings
from datastore.testing.examples import make_dataset
from datastore.testing.web import Link, serve_folder

MB = 1_000_000
SIZES = np.full(64, MB)


def run(
    needs: list[list[Need]],
    *,
    budget: int = 100 * MB,
    threads: int = 4,
    run: int = 1,
    ahead: int = 0,
    step: float = 0.0,
) -> NodeRun:
    wire = Wire(bytes_per_s=10 * MB, delay_s=0.5, threads=threads, run=run)
    return run_node(needs, sizes=SIZES, budget_bytes=budget, wire=wire, ahead=ahead, step_s=step)


def test_a_block_takes_the_delay_and_its_bytes() -> None:
    found = run([[Need((3,))]])
    assert found.ready_s == [pytest.approx(0.6)]
    assert (found.requests, found.fetched_bytes, found.asked, found.there) == ([1], [MB], 1, 0)


def test_requests_under_way_share_the_link_and_threads_are_few() -> None:
    assert run([[Need((0, 2, 4, 6))]]).ready_s == [pytest.approx(0.5 + 0.4)]
    assert run([[Need((0, 2, 4, 6))]], threads=1).ready_s == [pytest.approx(4 * 0.6)]
    two = run([[Need((0,))], [Need((9,))]])
    assert two.ready_s == [pytest.approx(0.5 + 0.2)], "two ranks share the link of their node"


def test_neighbours_come_in_one_request() -> None:
    found = run([[Need((5, 4, 3, 2))]], run=4)
    assert (found.requests, found.ready_s) == ([1], [pytest.approx(0.5 + 0.4)])


def test_what_is_fetched_ahead_is_there_after_a_long_step() -> None:
    needs = [Need((0,)), Need((10,)), Need((20,)), Need((0,))]
    found = run([needs], ahead=2, step=2.0)
    waits = [ready - began for ready, began in zip(found.ready_s, found.began_s, strict=True)]
    # Before the first batch nothing else is fetched; the second one then waits, and the others do not.
    assert waits == [pytest.approx(0.6), pytest.approx(0.7), 0.0, 0.0]
    assert (found.there, found.asked) == (2, 4)
    assert run([needs], ahead=0, step=2.0).there == 1


def test_memory_that_is_short_gives_up_what_is_needed_last() -> None:
    needs = [Need((0,)), Need((10,)), Need((20,)), Need((0,)), Need((10,))]
    found = run([needs], budget=2 * MB)
    assert sum(found.requests) == 4, "20 takes the place of 10, which is needed after 0"
    assert found.evictions == 2
    assert sum(run([needs], budget=MB).requests) == 5


def test_what_lanes_read_on_is_fetched_when_there_is_time() -> None:
    found = run([[Need((0,), coming=(1, 2)), Need((1,)), Need((2,))]], run=4, step=2.0)
    assert (found.requests, found.there) == ([2, 0, 0], 2)


def test_an_imagined_dataset_is_planned_for_in_moments_and_grows_as_it_should() -> None:
    data = ImaginedDataset.of(10**11, shard_bytes=2**29)
    few, many = (forecast(data, Cluster(ranks=ranks, steps=20), seq_len=4096, rows=4) for ranks in (8, 64))
    assert (few.nodes, many.nodes, few.lanes) == (1, 8, 4096)
    assert many.share_bytes == 8 * few.share_bytes == 20 * 64 * 4 * 4096 * 2
    assert many.fetched_bytes > few.fetched_bytes > few.share_bytes
    slow = forecast(data, Cluster(ranks=8, steps=20, link_bytes_per_s=50_000_000), seq_len=4096, rows=4)
    assert slow.start_s > 5 * few.start_s
    assert slow.stall > few.stall
    starved = forecast(data, Cluster(ranks=64, steps=20, store_bytes_per_s=8 * 50_000_000), seq_len=4096, rows=4)
    assert starved.start_s > 5 * many.start_s
    with pytest.raises(ConfigError, match="no whole number of nodes"):
        forecast(data, Cluster(ranks=12), seq_len=4096, rows=4)
    with pytest.raises(ConfigError, match="no documents to pack"):
        forecast(data, Cluster(), seq_len=4096, rows=4, options=LoaderSettings(packing="best_fit"))


def test_mixtures_and_packs_are_planned_for(tmp_path: Path) -> None:
    sets = {name: make_dataset(tmp_path / name, [[700] * 40], name=name, block_bytes=4096) for name in "ab"}
    packed = LoaderSettings(packing="best_fit")
    for data, options in ((Mixture(sets), LoaderSettings()), (sets["a"], packed)):
        found = forecast(data, Cluster(ranks=2, steps=5), seq_len=99, rows=4, options=options)
        assert found.steps == 5
        assert found.fetched_bytes > 0


@pytest.mark.slow
def test_a_real_run_makes_the_requests_that_were_forecast(tmp_path: Path) -> None:
    make_dataset(tmp_path / "set", [[2**23], [2**23]], block_bytes=2**18)
    options = LoaderSettings(lanes=16, window=64, memory_bytes=2**25)
    with serve_folder(tmp_path / "set", link=Link(bits_per_s=4e8, delay_s=0.01)) as served, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cluster = Cluster(link_bytes_per_s=50 * MB, delay_s=0.01, step_s=0.02, steps=200)
        planned = forecast(open_dataset(served.url), cluster, seq_len=1023, rows=64, options=options)
        with Loader(open_dataset(served.url), seq_len=1023, global_batch=64, options=options) as loader:
            for _ in range(200):
                next(loader)
                time.sleep(0.02)
            stats = loader.stats()
    assert planned.requests == pytest.approx(stats["requests"], rel=0.2)
    assert planned.fetched_bytes == pytest.approx(stats["fetched_bytes"], rel=0.2)

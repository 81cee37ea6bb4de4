"""Loading over a slow link: what a rank fetches is its share, in few requests, and the first batch comes after few round trips."""

import warnings
from pathlib import Path

import numpy as np
import pytest

import datastore as ds
from datastore.dataset.snapshot import open_dataset
from datastore.errors import StorageError
from datastore.loader.loader import Loader
from datastore.loader.mixture.request import Mixture
from datastore.loader.rows.loader import RowLoader
from datastore.loader.settings import LoaderSettings, Rank
from datastore.storage.backends.web import WebStorage
from datastore.testing.examples import make_dataset
from datastore.testing.web import Link, Served, round_trips, serve_folder

MIB = 2**20
GIGABIT = Link(bits_per_s=1e9, delay_s=0.02)
SEQ_LEN = 1023


def shards_of(served: Served) -> list[tuple[int, int]]:
    return [(asked.start, asked.stop) for asked in served.requests if asked.path.startswith("shards/")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """64 MiB in two shards of 256 KiB blocks."""
    folder = tmp_path_factory.mktemp("link") / "set"
    make_dataset(folder, [[16 * MIB], [16 * MIB]], block_bytes=MIB // 4)
    return folder


def share_of(loader: Loader) -> int:
    """Return the bytes of the blocks that a rank's whole epoch lies in, by planning alone."""
    pipeline = loader._pipeline
    blocks = pipeline._ready()
    pipeline._look_ahead(blocks)
    found: set[int] = set()
    reads = pipeline._planned
    while reads:
        found.update(np.unique(reads[0][1].blocks).tolist())
        reads.popleft()
        pipeline._look_ahead(blocks)
    loader.close()
    return int(blocks.layout.sizes(np.array(sorted(found))).sum())


@pytest.mark.slow
@pytest.mark.parametrize("cached", [False, True])
def test_a_rank_fetches_its_share_once_in_requests_of_several_mib(
    folder: Path, tmp_path: Path, *, cached: bool
) -> None:
    with serve_folder(folder, link=GIGABIT) as served, warnings.catch_warnings():
        warnings.simplefilter("error")
        options = LoaderSettings(
            lanes=16, window=64, epochs=1, memory_bytes=64 * MIB, cache_dir=str(tmp_path / "cache") if cached else ""
        )
        rank = Rank(1, 2)

        def loader() -> Loader:
            return Loader(open_dataset(served.url), seq_len=SEQ_LEN, global_batch=64, rank=rank, options=options)

        share = share_of(loader())
        served.requests.clear()
        with loader() as reading:
            count = sum(1 for _ in reading)
            stats = reading.stats()
        assert count == reading.batches_per_epoch
        asked = shards_of(served)
        fetched = sum(stop - start for start, stop in asked)
        assert share <= fetched <= 1.05 * share
        assert fetched == stats["fetched_bytes"]
        assert len(asked) == stats["requests"]
        # 8 lanes begin with a block by itself; what follows comes 16 at a time, where it would take 128 requests.
        assert len(asked) <= 40
        assert max(stop - start for start, stop in asked) >= 3 * MIB
        assert stats["peak_bytes"] <= options.memory_bytes
        if cached:
            served.requests.clear()
            with loader() as reading:
                assert sum(1 for _ in reading) == count
            assert not shards_of(served)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "most"), [("mixture", 80), ("packs", 70)])
def test_lanes_of_mixtures_and_packs_read_on_too(tmp_path: Path, kind: str, most: int) -> None:
    lengths = np.random.default_rng(0).geometric(1 / 900, 8_000) + 1
    for name, shards in {"a": [[16 * MIB], [8 * MIB]], "b": [[8 * MIB]], "c": [lengths.tolist()] * 4}.items():
        make_dataset(tmp_path / name, shards, block_bytes=MIB // 4, name=name)
    with serve_folder(tmp_path, link=GIGABIT) as served, warnings.catch_warnings():
        warnings.simplefilter("error")
        sets = {name: open_dataset(f"{served.url}/{name}") for name in "abc"}
        packs = kind == "packs"
        options = LoaderSettings(
            lanes=16,
            window=64,
            epochs=1 if packs else None,
            memory_bytes=64 * MIB,
            packing="best_fit" if packs else None,
        )
        mixture = Mixture({name: sets[name] for name in "ab"}, epochs={"a": 1, "b": 1})
        data = sets["c"] if packs else mixture
        rank = Rank(1, 2)
        share = share_of(Loader(data, seq_len=SEQ_LEN, global_batch=64, rank=rank, options=options))
        with Loader(data, seq_len=SEQ_LEN, global_batch=64, rank=rank, options=options) as loader:
            assert sum(1 for _ in loader) > 100
            stats = loader.stats()
        assert share <= stats["fetched_bytes"] <= 1.02 * share
        # Block by block it would take twice as many.
        assert stats["requests"] <= most
        assert share / (MIB // 4) > 1.4 * most
        assert stats["peak_bytes"] <= options.memory_bytes


def test_the_first_batch_comes_after_two_round_trips_past_the_manifest(folder: Path) -> None:
    with serve_folder(folder, link=GIGABIT) as served:
        dataset = open_dataset(served.url)
        assert dataset.segments.shard(0).tokens
        served.requests.clear()
        with Loader(dataset, seq_len=SEQ_LEN, global_batch=8, options=LoaderSettings(lanes=8, window=64)) as loader:
            next(loader)
            before_the_first = [*served.requests]
        assert 1 <= round_trips(before_the_first) <= 2
        # Nothing but what the first batch needs was asked for before it.
        assert sum(asked.stop - asked.start for asked in before_the_first) <= 16 * MIB // 4


def test_a_server_that_hangs_is_named_and_the_same_batch_comes_once_it_answers(folder: Path) -> None:
    with serve_folder(folder) as served:
        options = LoaderSettings(lanes=8, window=64, timeout_s=1)
        dataset = open_dataset(WebStorage(served.url))
        with Loader(open_dataset(folder), seq_len=SEQ_LEN, global_batch=8, options=options) as local:
            right = [next(local).tokens.tobytes() for _ in range(400)]
        with Loader(dataset, seq_len=SEQ_LEN, global_batch=8, rank=Rank(0, 1), options=options) as loader:
            found = [next(loader).tokens.tobytes()]
            served.answers.clear()
            with pytest.raises(StorageError, match="a block did not come in time") as caught:  # noqa: PT012 - sooner or later
                while len(found) < 400:
                    found.append(next(loader).tokens.tobytes())
            for word in (
                served.url,
                "shards/",
                "block=",
                "bytes=",
                "rank='0 of 1'",
                "waited_s=1",
                "tried=",
                "timeout_s",
            ):
                assert word in str(caught.value)
            assert caught.value.transient
            served.answers.set()
            while len(found) < 400:
                found.append(next(loader).tokens.tobytes())
        assert found == right


def test_rows_that_do_not_come_are_named_too(tmp_path: Path) -> None:
    with ds.record_writer(tmp_path / "rows", schema={"value": "int64"}) as writer:
        writer.write([{"value": number} for number in range(1000)])
    with serve_folder(tmp_path / "rows") as served:
        options = LoaderSettings(timeout_s=1, threads=2, epochs=1)
        # Which rows there are is known from the manifest.
        with RowLoader(open_dataset(served.url), global_batch=50, options=options) as loader:
            served.answers.clear()
            with pytest.raises(StorageError, match="a batch of rows was not made in time") as caught:
                next(loader)
            assert served.url in str(caught.value)
            assert "rank='0 of 1'" in str(caught.value)
            served.answers.set()
            assert sum(batch.data.num_rows for batch in loader) == 1000

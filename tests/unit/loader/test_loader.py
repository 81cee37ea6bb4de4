"""What a loader refuses, names, counts and gives back."""

import gc
import json
import multiprocessing
import os
import threading
import uuid
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from datastore.dataset.shards.segments import Segments
from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.errors import ConfigError, CorruptError, DatastoreError, ResumeError
from datastore.loader.batch import fingerprint_of
from datastore.loader.loader import Loader
from datastore.loader.order.samples import sample_grid
from datastore.loader.settings import LoaderSettings, Rank
from datastore.loader.stream import lanes_for
from datastore.storage.backends.fsspec_storage import FsspecStorage
from datastore.testing.examples import make_dataset


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return make_dataset(tmp_path / "data", [[5_000], [3_000, 100], [4_000]], block_bytes=4096)


@pytest.fixture
def remote() -> Dataset:
    return make_dataset(f"memory://{uuid.uuid4().hex}", [[5_000], [3_000, 100], [4_000]], block_bytes=4096)


def loader_of(dataset: Dataset, **changes: object) -> Loader:
    return Loader(dataset, **({"seq_len": 16, "global_batch": 8} | changes))  # type: ignore[arg-type]


def threads_of_ours() -> int:
    return sum(thread.name == "datastore-prefetch" for thread in threading.enumerate())


def test_a_batch_says_what_it_holds(dataset: Dataset) -> None:
    loader = loader_of(dataset, seed=3)
    next(loader)
    batch = next(loader)
    whole = np.concatenate([dataset.token_shard(shard)[0] for shard in range(3)])
    assert (batch.tokens.dtype, batch.tokens.shape, batch.cursor) == (np.dtype(np.uint16), (8, 17), 8)
    assert sorted(batch.positions.tolist()) == list(range(8, 16))
    assert batch.valid.all()
    for row, sample in zip(batch.tokens, batch.samples.tolist(), strict=True):
        assert np.array_equal(row, whole[sample * 16 : sample * 16 + 17])
    assert loader.cursor == 16
    assert loader.samples_per_epoch == (12_100 - 1) // 16
    assert loader.batches_per_epoch == -(-loader.samples_per_epoch // 8)


def test_wide_tokens_stay_wide(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "wide", [[500]], dtype="uint32")
    batch = next(loader_of(dataset))
    assert batch.tokens.dtype == np.uint32
    assert np.array_equal(batch.tokens[0], dataset.token_shard(0)[0][int(batch.samples[0]) * 16 :][:17])


def test_shards_of_both_widths_give_wide_tokens(tmp_path: Path) -> None:
    narrow = make_dataset(tmp_path / "mixed", [[300]])
    wide = make_dataset(tmp_path / "other", [[300]], dtype="uint32", name="other")
    mixed = Dataset(narrow.storage, info=narrow.info, commit=narrow.commit)
    mixed.__dict__["segments"] = Segments([*narrow.segments.batches, *wide.segments.batches])
    for key in [stat.key for stat in wide.storage.list("shards")]:
        narrow.storage.put(key, wide.storage.get(key))
    whole = np.concatenate([narrow.token_shard(0)[0].astype(np.uint32), wide.token_shard(0)[0]])
    with loader_of(mixed, global_batch=37) as loader:
        batch = next(loader)
    for row, sample in zip(batch.tokens, batch.samples.tolist(), strict=True):
        assert np.array_equal(row, whole[sample * 16 : sample * 16 + 17])


def test_the_state_is_small_plain_and_names_the_order(dataset: Dataset) -> None:
    loader = loader_of(dataset, seed=3)
    next(loader)
    state = loader.state_dict()
    assert len(json.dumps(state)) < 1_000
    assert state == {
        "dataset": dataset.uuid,
        "version": 1,
        "fingerprint": state["fingerprint"],
        "seq_len": 16,
        "seed": 3,
        "lanes": 2,
        "window": 256,
        "order": 1,
        "cursor": 8,
        "deletions": "mask",
        "shuffle": True,
    }
    del state["shuffle"]  # As one that was saved before there was a choice.
    again = loader_of(dataset, seed=3)
    again.load_state_dict(state)
    assert again.cursor == 8


def test_skipping_is_the_same_as_reading(dataset: Dataset) -> None:
    reads, skips = loader_of(dataset), loader_of(dataset)
    for _ in range(200):
        next(reads)
    next(skips)
    skips.skip(199)
    assert np.array_equal(next(skips).samples, next(reads).samples)


def test_a_plan_is_what_comes_and_moves_nothing(dataset: Dataset) -> None:
    loader = loader_of(dataset, rank=Rank(1, 3))
    next(loader)
    planned = loader.plan(5)
    assert loader.cursor == 8
    assert [samples.tolist() for samples in planned] == [next(loader).samples.tolist() for _ in range(5)]


def test_a_finite_pass_can_be_skipped_to_its_end(dataset: Dataset) -> None:
    loader = loader_of(dataset, options=LoaderSettings(epochs=1))
    loader.skip(loader.batches_per_epoch - 1)
    (last,) = list(loader)
    assert last.valid.sum() == loader.samples_per_epoch % 8
    assert loader.cursor == loader.samples_per_epoch
    assert list(loader) == []
    assert loader.plan(3) == []


def test_state_of_another_order_is_refused_and_the_keys_are_named(dataset: Dataset) -> None:
    state = loader_of(dataset).state_dict()
    with pytest.raises(
        ResumeError, match=r"of samples: seq_len, seed differ \(seq_len='saved 16, here 8', seed='saved 0, here 1'\)"
    ):
        loader_of(dataset, seq_len=8, seed=1).load_state_dict(state)
    make_dataset(dataset.storage, [[900]], name="more")
    appended = open_dataset(dataset.storage)
    with pytest.raises(ResumeError, match="version, fingerprint differ"):
        loader_of(appended).load_state_dict(state)
    loader_of(open_dataset(dataset.storage, version=1)).load_state_dict(state)
    with pytest.raises(ResumeError, match="order differ"):
        loader_of(dataset).load_state_dict(state | {"order": 2})


@pytest.mark.parametrize(
    ("change", "fact"),
    [
        ({"cursor": -1}, r"cursor"),
        ({"lanes": 0}, r"lanes"),
        ({"window": "wide"}, r"window"),
        ({"more": 1}, r"unknown field `more`"),
    ],
)
def test_a_state_that_is_none_is_refused(dataset: Dataset, change: dict[str, object], fact: str) -> None:
    loader = loader_of(dataset)
    with pytest.raises(ResumeError, match=fact):
        loader.load_state_dict(loader.state_dict() | change)
    with pytest.raises(ResumeError, match="missing required field"):
        loader.load_state_dict({})


def test_lanes_of_a_saved_state_win_over_options(dataset: Dataset) -> None:
    first = loader_of(dataset, options=LoaderSettings(lanes=2, window=64))
    next(first)
    second = loader_of(dataset, options=LoaderSettings(lanes=1, window=9))
    second.load_state_dict(first.state_dict())
    assert np.array_equal(next(second).samples, next(first).samples)
    assert second.state_dict()["lanes"] == 2


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"seq_len": 12_100}, r"seq_len is longer than the whole dataset \(seq_len=12100, tokens=12100\)"),
        ({"seq_len": 0}, "seq_len must be at least 1"),
        ({"seed": -1}, "seed out of range"),
        ({"global_batch": 0}, "global_batch is smaller than the number of readers"),
        ({"options": LoaderSettings(lanes=0)}, r"`lanes`"),
        ({"options": LoaderSettings(epochs=0)}, r"`epochs`"),
        ({"options": LoaderSettings(memory_bytes=0)}, r"`memory_bytes`"),
    ],
)
def test_what_does_not_fit_is_refused_at_once(dataset: Dataset, changes: dict[str, object], fact: str) -> None:
    with pytest.raises(ConfigError, match=fact):
        loader_of(dataset, **changes)


def test_the_longest_sample_is_the_whole_dataset(dataset: Dataset) -> None:
    batch = next(loader_of(dataset, seq_len=12_099, global_batch=1))
    whole = np.concatenate([dataset.token_shard(shard)[0] for shard in range(3)])
    assert np.array_equal(batch.tokens[0], whole)


def test_any_position_can_be_gone_to(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path / "seek", [[400], [90]])
    loader = Loader(dataset, seq_len=9, global_batch=4, options=LoaderSettings(epochs=2))
    batches = list(loader)
    for step in (5, 0, 11):
        loader.seek(4 * step)
        assert loader.cursor == 4 * step
        assert next(loader).fingerprint() == batches[step].fingerprint()
    for wrong in (-1, 2 * loader.samples_per_epoch + 1):
        with pytest.raises(ConfigError, match="no such position"):
            loader.seek(wrong)


def test_records_are_refused(tmp_path: Path) -> None:
    from datastore.ingestion.writers.records import record_writer

    schema = pa.schema([("text", pa.string())])
    with record_writer(str(tmp_path / "records"), schema=schema) as out:
        out.write([{"text": "hello"}])
    with pytest.raises(ConfigError, match="holds records, and a loader reads tokens"):
        loader_of(open_dataset(str(tmp_path / "records")))


def test_a_buffer_that_does_not_fit_is_refused(dataset: Dataset) -> None:
    loader = loader_of(dataset)
    for buffer in (np.empty((8, 16), np.uint16), np.empty((8, 17), np.uint32), np.empty((17, 8), np.uint16).T):
        with pytest.raises(ConfigError, match="the buffer does not fit the batch"):
            loader.next_into(buffer)
    buffer = np.empty((8, 17), np.uint16)
    assert loader.next_into(buffer).tokens is buffer


def damaged_shard(dataset: Dataset, byte: int) -> str:
    info = dataset.segments.shard(1)
    data = bytearray(dataset.storage.get(info.path))
    data[byte] ^= 1
    dataset.storage.put(info.path, bytes(data))
    return info.path


@pytest.mark.parametrize("place", ["local", "remote"])
def test_a_flipped_bit_stops_at_the_batch_that_needs_it_and_names_file_and_block(
    place: str, request: pytest.FixtureRequest
) -> None:
    dataset: Dataset = request.getfixturevalue("dataset" if place == "local" else "remote")
    path = damaged_shard(dataset, 4096 + 5)
    cursors = [0]
    with loader_of(dataset) as loader, pytest.raises(CorruptError) as caught:
        cursors.extend(loader.cursor for _ in loader)
    assert path in str(caught.value)
    assert "block=1" in str(caught.value)
    assert loader.cursor == cursors[-1] < loader.samples_per_epoch
    values_start = int(dataset.segments.values_start[1])
    first = 5_000 + (4096 - values_start) // 2
    assert any(first - 17 <= sample * 16 < first + 2048 for sample in loader.plan(1)[0].tolist())


def test_a_loader_goes_on_after_the_damage_is_repaired(dataset: Dataset) -> None:
    path = dataset.segments.shard(1).path
    good = dataset.storage.get(path)
    with loader_of(dataset, global_batch=800) as loader:
        dataset.storage.put(path, good[:4000])
        with pytest.raises(DatastoreError):
            next(loader)
        dataset.storage.put(path, good)
        loader.close()
        assert loader.cursor == 0
        assert np.array_equal(next(loader).samples, loader_of(dataset, global_batch=800).plan(1)[0])


def test_threads_end_on_close_and_with_the_loader(dataset: Dataset) -> None:
    gc.collect()  # Loaders of other tests.
    before = threads_of_ours()
    closed, dropped = loader_of(dataset), loader_of(dataset)
    next(closed)
    next(dropped)
    assert threads_of_ours() > before
    closed.close()
    closed.close()
    del dropped
    gc.collect()
    assert threads_of_ours() == before


def test_making_a_loader_starts_nothing(dataset: Dataset) -> None:
    gc.collect()
    before = threads_of_ours()
    loader = loader_of(dataset)
    loader.plan(3)
    assert threads_of_ours() == before


def test_a_closed_loader_goes_on_where_it_stood(dataset: Dataset) -> None:
    plain, closed = loader_of(dataset), loader_of(dataset)
    for _ in range(5):
        next(plain)
        next(closed)
        closed.close()
    assert np.array_equal(next(plain).tokens, next(closed).tokens)


@pytest.mark.parametrize("place", ["local", "remote"])
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_forked_child_goes_on_by_itself(place: str, request: pytest.FixtureRequest) -> None:
    dataset: Dataset = request.getfixturevalue("dataset" if place == "local" else "remote")
    loader, twin = loader_of(dataset), loader_of(dataset)
    next(loader)
    next(twin)
    wanted = [next(twin).fingerprint() for _ in range(30)]
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def child() -> None:
        sender.send([next(loader).fingerprint() for _ in range(30)])

    process = context.Process(target=child)
    process.start()
    assert receiver.poll(60)
    assert receiver.recv() == wanted
    process.join()
    assert process.exitcode == 0
    assert [next(loader).fingerprint() for _ in range(30)] == wanted
    loader.close()


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_child_forked_while_a_thread_holds_the_lock_does_not_wait_for_it(remote: Dataset) -> None:
    loader = loader_of(remote)
    next(loader)
    locked, done = threading.Event(), threading.Event()

    def hold() -> None:
        with loader._pipeline._blocks._changed:  # type: ignore[union-attr]
            locked.set()
            done.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    locked.wait()
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=lambda: sender.send(next(loader).cursor))
    process.start()
    done.set()
    holder.join()
    went_on = receiver.poll(20)
    process.kill()
    process.join()
    assert went_on
    loader.close()


def test_rows_that_only_fill_up_leave_no_trace_in_the_fingerprint(dataset: Dataset) -> None:
    *_, last = loader_of(dataset, options=LoaderSettings(epochs=1))
    kept = last.valid
    assert 0 < kept.sum() < 8
    alone = fingerprint_of(last.tokens[kept], positions=last.positions[kept], samples=last.samples[kept])
    assert last.fingerprint() == alone
    assert fingerprint_of(last.tokens[:0], positions=last.positions[:0], samples=last.samples[:0]) == 0


def test_a_fingerprint_tells_positions_samples_and_tokens_apart(dataset: Dataset) -> None:
    batch = next(loader_of(dataset))
    tokens = batch.tokens.copy()
    tokens[3, 5] ^= 1
    swapped = batch.samples[[1, 0, *range(2, 8)]]
    others = [
        fingerprint_of(tokens, positions=batch.positions, samples=batch.samples),
        fingerprint_of(batch.tokens, positions=batch.positions, samples=swapped),
        fingerprint_of(batch.tokens, positions=batch.positions + 8, samples=batch.samples),
    ]
    assert len({batch.fingerprint(), *others}) == 4


def test_a_remote_loader_warns_when_memory_is_too_short_for_its_lanes(remote: Dataset) -> None:
    options = LoaderSettings(lanes=64, window=8, memory_bytes=8_192)
    with pytest.warns(RuntimeWarning, match=r"memory_bytes \(8 KiB\) cannot hold one block of each"):
        next(loader_of(remote, options=options))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        next(loader_of(remote))


def test_each_block_is_fetched_once_if_memory_allows(remote: Dataset) -> None:
    with loader_of(remote, options=LoaderSettings(epochs=1)) as loader:
        for _ in loader:
            pass
        stats = loader.stats()
    stored = int(remote.segments.size_bytes.sum())
    assert stored - 4096 * 3 < stats["filled_bytes"] <= stored
    assert stats["evictions"] == 0


def test_any_storage_gives_the_same_batches(dataset: Dataset) -> None:
    elsewhere = open_dataset(FsspecStorage(f"file://{dataset.url}"))
    with loader_of(dataset) as mapped, loader_of(elsewhere) as fetched:
        for _ in range(100):
            assert next(mapped).fingerprint() == next(fetched).fingerprint()
        assert fetched.stats()["resident_bytes"] > mapped.stats()["resident_bytes"] == 0


def test_lanes_follow_the_size_of_the_dataset(dataset: Dataset) -> None:
    def lanes(tokens: int, seq_len: int, **options: int) -> int:
        columns = Segments(dataset.segments.batches)
        columns.__dict__["block_bytes"] = np.full(3, 2**21)
        return lanes_for(columns, sample_grid(np.array([tokens]), seq_len=seq_len), LoaderSettings(**options))

    assert lanes(10_000, 16) == 2, "small: a lane for each window"
    assert lanes(100, 16) == 1
    assert lanes(2**29, 2048) == 1023, "1 GiB is still small"
    assert lanes(2**33, 2048) == 2047, "large: four blocks for each lane"
    assert lanes(2**40, 2048) == 4096
    assert lanes(2**40, 2048, lanes=7) == 7


def test_importing_the_loader_leaves_torch_alone() -> None:
    import subprocess
    import sys

    code = "import sys, datastore.loader.loader; sys.exit('torch' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], check=False, env=os.environ | {"PYTHONPATH": ""}).returncode == 0
    )

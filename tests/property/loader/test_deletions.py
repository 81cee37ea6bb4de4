"""Deleted documents in the loader: masked they leave every other token where it was, left out they leave no trace."""

import tempfile
import uuid
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import msgspec
import numpy as np
import pytest
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st

from datastore.dataset.operations.delete import delete
from datastore.dataset.shards.deletions import Deletions, decode_deletions, encode_deletions, merge_spans
from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.errors import ConfigError, CorruptError, ResumeError
from datastore.loader.batch import Batch
from datastore.loader.cache.blocks import BlockLayout
from datastore.loader.gathering.gather import reads_of
from datastore.loader.loader import Loader
from datastore.loader.order.order import NO_SAMPLE, BatchPlan
from datastore.loader.order.samples import Gaps, sample_grid
from datastore.loader.settings import DeletionMode, LoaderSettings, Rank
from datastore.loader.trace import locate
from datastore.testing.examples import make_dataset

SHARDS = [[70, 30, 1, 0, 99], [5], [200, 11], [1, 1, 1], [90, 40]]
TOKENS = sum(map(sum, SHARDS))
SEQ_LEN = 7
BLOCK = 256
END = 60_000
"""Read in place of a deleted token."""

ROWS = [(shard, row) for shard, lengths in enumerate(SHARDS) for row in range(len(lengths))]
some_rows = st.sets(st.sampled_from(ROWS), min_size=1, max_size=len(ROWS) - 4).filter(
    lambda rows: any(SHARDS[shard][row] for shard, row in rows)
)
seeds = st.integers(0, 2**63 - 1)
modes = st.sampled_from(["mask", "compact"])


@cache
def before() -> Dataset:
    """The dataset of which nothing is deleted."""
    return make_dataset(f"memory://{uuid.uuid4().hex}", SHARDS, block_bytes=BLOCK)


def without(rows: set[tuple[int, int]], *, dataset: Dataset | None = None, version: int = 2) -> Dataset:
    """Return `dataset` as it is once `rows` are deleted, in a later version; nothing is stored."""
    whole = dataset or before()
    uids = [shard.uid for shard in whole.segments]
    gone = {uids[s]: np.array(sorted(r for t, r in rows if t == s), np.int32) for s in {s for s, _ in rows}}
    table = encode_deletions(gone, lengths={uid: np.array(row) for uid, row in zip(uids, SHARDS, strict=True)})
    commit = msgspec.structs.replace(whole.commit, version=version)
    after = Dataset(whole.storage, info=whole.info, commit=commit)
    after.__dict__ |= {"segments": whole.segments, "deletions": Deletions([decode_deletions(table, where="here")])}
    return after


def ids_of(dataset: Dataset, rows: set[tuple[int, int]]) -> list[str]:
    return [dataset.documents(shard).column("id")[row].as_py() for shard, row in sorted(rows)]


def stream_of(dataset: Dataset) -> np.ndarray:
    """All tokens, read the simple way."""
    return np.concatenate([dataset.token_shard(shard)[0] for shard in range(len(SHARDS))])


def live_of(rows: set[tuple[int, int]]) -> np.ndarray:
    """Of each token of the stream, whether it is still there."""
    parts = [np.full(length, (s, r) not in rows) for s, ls in enumerate(SHARDS) for r, length in enumerate(ls)]
    return np.concatenate(parts)


def small(**changes: object) -> LoaderSettings:
    few = {"lanes": 8, "window": 4, "threads": 0, "memory_bytes": 8 * BLOCK, "end_of_text": END}
    return LoaderSettings(**(few | changes))  # type: ignore[arg-type]


def loader_of(dataset: Dataset, *, deletions: DeletionMode = "mask", **changes: object) -> Loader:
    options = small(deletions=deletions, epochs=changes.pop("epochs", None))
    arguments = {"seq_len": SEQ_LEN, "global_batch": 5, "options": options} | changes
    return Loader(dataset, **arguments)  # type: ignore[arg-type]


pytestmark = pytest.mark.filterwarnings("ignore:memory_bytes:RuntimeWarning")


@given(st.sets(st.integers(0, 60)), st.integers(0, 50), st.integers(0, 20))
def test_places_of_the_line_are_the_places_of_the_stream_that_are_not_in_a_gap(
    gone: set[int], start: int, length: int
) -> None:
    spans = merge_spans(np.array([[place, place + 1] for place in gone], np.int64).reshape(-1, 2))
    if not spans.size:
        return
    gaps = Gaps(spans)
    left = np.array([place for place in range(120) if place not in gone])
    assert np.array_equal(gaps.stream_of(np.arange(len(left))), left)
    assert gaps.line_of(np.arange(120)).tolist() == [int((left < place).sum()) for place in range(120)]
    pieces = list(gaps.between(start, start + length))
    assert [place for low, high in pieces for place in range(low, high)] == left[start : start + length].tolist()
    assert all(low < high for low, high in pieces)
    first, last = gaps.touched(np.array([start]), np.array([start + length + 1]))
    touched = {place for gap in range(int(first[0]), int(last[0])) for place in range(*spans[gap].tolist())}
    assert touched >= gone & set(range(start, start + length + 1))
    assert all(
        set(range(*spans[gap].tolist())) & set(range(start, start + length + 1))
        for gap in range(int(first[0]), int(last[0]))
    )


@settings(max_examples=40)
@given(rows=some_rows, seed=seeds, global_batch=st.integers(1, 40))
def test_masked_tokens_read_as_end_of_text_and_all_others_are_where_they_were(
    rows: set[tuple[int, int]], seed: int, global_batch: int
) -> None:
    after = without(rows)
    stream, live = stream_of(before()), live_of(rows)
    undisturbed = loader_of(before(), seed=seed, global_batch=global_batch, epochs=1)
    for batch, plain in zip(loader_of(after, seed=seed, global_batch=global_batch, epochs=1), undisturbed, strict=True):
        assert np.array_equal(batch.samples, plain.samples)
        assert np.array_equal(batch.positions, plain.positions)
        assert plain.loss_mask is None
        assert batch.loss_mask is not None
        for row, sample in enumerate(batch.samples.tolist()):
            places = slice(sample * SEQ_LEN, sample * SEQ_LEN + SEQ_LEN + 1)
            if sample == NO_SAMPLE:
                assert not batch.loss_mask[row].any()
                assert not batch.tokens[row].any()
                continue
            assert np.array_equal(batch.loss_mask[row], live[places])
            assert np.array_equal(batch.tokens[row], np.where(live[places], stream[places], END))


@settings(max_examples=40)
@given(rows=some_rows, seed=seeds, global_batch=st.integers(1, 40), seq_len=st.sampled_from([1, 7, 60]))
def test_left_out_the_tokens_of_an_epoch_are_the_live_ones_and_each_sample_follows_the_one_before(
    rows: set[tuple[int, int]], seed: int, global_batch: int, seq_len: int
) -> None:
    after = without(rows)
    line = stream_of(before())[live_of(rows)]
    if (len(line) - 1) // seq_len < 1:
        with pytest.raises(ConfigError, match="seq_len is longer than the whole dataset"):
            loader_of(after, deletions="compact", seq_len=seq_len)
        return
    loader = loader_of(after, deletions="compact", seed=seed, global_batch=global_batch, seq_len=seq_len, epochs=1)
    delivered: Counter[int] = Counter()
    samples = []
    for batch in loader:
        assert batch.loss_mask is None
        for row in np.flatnonzero(batch.valid).tolist():
            sample = int(batch.samples[row])
            samples.append(sample)
            assert np.array_equal(batch.tokens[row], line[sample * seq_len : (sample + 1) * seq_len + 1])
            delivered.update(batch.tokens[row, :-1].tolist())
    assert sorted(samples) == list(range((len(line) - 1) // seq_len))
    assert delivered == Counter(line[: len(samples) * seq_len].tolist())


@settings(max_examples=30)
@given(rows=some_rows, seed=seeds, mode=modes, data=st.data())
def test_stop_after_any_step_and_resume_on_any_world(
    rows: set[tuple[int, int]], seed: int, mode: DeletionMode, data: st.DataObject
) -> None:
    after = without(rows)
    try:
        undisturbed = loader_of(after, deletions=mode, seed=seed, global_batch=9)
    except ConfigError:
        reject()  # Too few tokens are left for one sample.
    whole = {t: row for _ in range(8) for t, row in rows_of([next(undisturbed)]).items()}
    cursor, state = 0, None
    while cursor < 50:
        world = data.draw(st.integers(1, 4), label="world")
        global_batch = data.draw(st.integers(world, 20), label="global batch")
        ranks = [
            loader_of(after, deletions=mode, seed=seed, global_batch=global_batch, rank=Rank(rank, world))
            for rank in range(world)
        ]
        for loader in ranks:
            if state is not None:
                loader.load_state_dict(state)
        found = rows_of([next(loader) for loader in ranks])
        for position, row in found.items():
            assert row == whole.get(position, row)
        assert sorted(found) == list(range(cursor, cursor + global_batch))
        cursor += global_batch
        state = ranks[0].state_dict()
        assert state["deletions"] == mode


def rows_of(step: list[Batch]) -> dict[int, tuple[list[int], list[bool] | None]]:
    """position -> tokens and loss mask, over all ranks."""
    return {
        int(position): (
            batch.tokens[row].tolist(),
            None if batch.loss_mask is None else batch.loss_mask[row].tolist(),
        )
        for batch in step
        for row, position in enumerate(batch.positions)
    }


@settings(max_examples=20)
@given(rows=some_rows, later=some_rows, seed=seeds, steps=st.integers(0, 30))
def test_a_masked_run_goes_on_in_a_later_version_with_the_same_samples_at_the_same_steps(
    rows: set[tuple[int, int]], later: set[tuple[int, int]], seed: int, steps: int
) -> None:
    after = without(rows)
    loader = loader_of(before(), seed=seed)
    loader.skip(steps)
    state = loader.state_dict()
    moved = loader_of(after, seed=seed)
    moved.load_state_dict(state)
    assert moved.state_dict() == state | {"version": after.version}
    assert np.array_equal(next(moved).samples, next(loader).samples)
    latest = loader_of(without(rows | later, version=3), seed=seed)
    latest.load_state_dict(moved.state_dict())
    assert np.array_equal(next(latest).samples, next(loader).samples)
    with pytest.raises(ResumeError, match="version differ"):
        loader_of(after, seed=seed).load_state_dict(latest.state_dict())


def test_a_run_that_leaves_out_deleted_documents_stays_with_its_version() -> None:
    after = without({(0, 1)})
    state = loader_of(before(), deletions="compact").state_dict()
    with pytest.raises(ResumeError, match=r"version, fingerprint differ .*Open version 1: a run that leaves out"):
        loader_of(after, deletions="compact").load_state_dict(state)
    with pytest.raises(ResumeError, match="deletions differ"):
        loader_of(before()).load_state_dict(state)
    loader_of(before(), deletions="compact").load_state_dict(state)


def test_a_run_does_not_go_on_where_shards_were_added() -> None:
    dataset = make_dataset(f"memory://{uuid.uuid4().hex}", SHARDS)
    state = loader_of(dataset).state_dict()
    with pytest.raises(ResumeError, match=r"version, fingerprint differ .*Open version 1, or a later one"):
        loader_of(make_dataset(dataset.storage, [[50]], name="more")).load_state_dict(state)


def test_a_state_from_before_there_were_deletions_is_one_of_masking() -> None:
    after = without({(0, 1)})
    state = loader_of(before()).state_dict()
    del state["deletions"]
    loader_of(after).load_state_dict(state)


def test_without_a_tokenizer_somebody_must_say_what_deleted_tokens_read_as() -> None:
    after = without({(0, 1)})
    with pytest.raises(ConfigError, match="no tokenizer says what to read in their place"):
        Loader(after, seq_len=SEQ_LEN, global_batch=5)
    with pytest.raises(ConfigError, match="end_of_text is no token of the dataset"):
        Loader(after, seq_len=SEQ_LEN, global_batch=5, options=LoaderSettings(end_of_text=65_536))
    Loader(after, seq_len=SEQ_LEN, global_batch=5, options=LoaderSettings(deletions="compact"))
    Loader(before(), seq_len=SEQ_LEN, global_batch=5)


@given(rows=some_rows, seq_len=st.sampled_from([1, 7, 60]), data=st.data())
def test_the_blocks_of_a_batch_are_those_that_its_live_tokens_lie_in(
    rows: set[tuple[int, int]], seq_len: int, data: st.DataObject
) -> None:
    after = without(rows)
    segments = after.segments
    live = np.flatnonzero(live_of(rows))
    if len(live) <= seq_len:
        return
    layout = BlockLayout(segments)
    grid = sample_grid(segments.tokens, seq_len=seq_len, gaps=Gaps(after.deleted_spans))
    samples = np.array(data.draw(st.lists(st.integers(0, grid.samples - 1), min_size=1, max_size=4)), np.int64)
    plan = BatchPlan(0, samples, samples, grid.owner(samples))
    (reads,) = reads_of([plan], grid=grid, layout=layout, tracks=[layout.tokens])
    starts = np.concatenate([[0], np.cumsum(segments.tokens)])
    wanted = set()
    for token in {int(t) for k in samples for t in live[k * seq_len : (k + 1) * seq_len + 1]}:
        shard = int(np.searchsorted(starts, token, side="right")) - 1
        byte = int(segments.values_start[shard]) + 2 * (token - int(starts[shard]))
        wanted |= {layout.of_shard(shard).start + at // BLOCK for at in (byte, byte + 1)}
    assert set(reads.blocks.tolist()) == wanted


@settings(max_examples=20)
@given(rows=some_rows, mode=modes)
def test_documents_of_a_batch_say_which_of_them_are_deleted(rows: set[tuple[int, int]], mode: DeletionMode) -> None:
    after = without(rows)
    gone = set(ids_of(before(), rows))
    assume(mode != "compact" or after.totals.tokens - after.totals.deleted_tokens > SEQ_LEN)
    batch = next(loader_of(after, deletions=mode))
    spans = batch.documents()
    assert all(span.deleted == (span.document in gone) for span in spans)
    assert sum(stop - start for start, stop in (span.sample_tokens for span in spans)) == 5 * (SEQ_LEN + 1)
    if mode == "compact":
        assert not any(span.deleted for span in spans)
    else:
        assert spans == [
            span for origin in locate(after, seq_len=SEQ_LEN, samples=batch.samples) for span in origin.spans
        ]


def test_deletions_beyond_the_end_of_a_shard_are_damage() -> None:
    wrong = without({(4, 1)})
    lengths = {before().segments.shard(0).uid: np.array([201, 10])}
    table = encode_deletions({uid: np.array([0], np.int32) for uid in lengths}, lengths=lengths)
    wrong.__dict__["deletions"] = Deletions([decode_deletions(table, where="here")])
    with pytest.raises(CorruptError, match="more tokens are deleted than the shard has"):
        loader_of(wrong)


@pytest.fixture
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


@pytest.mark.parametrize("mode", ["mask", "compact"])
def test_mapped_and_fetched_shards_give_the_same(folder: Path, mode: DeletionMode) -> None:
    rows = {(0, 1), (2, 0), (4, 1)}
    made = make_dataset(folder / "data", SHARDS, block_bytes=BLOCK)
    delete(made.storage, ids=ids_of(made, rows))
    local, remote = open_dataset(made.storage), without(rows)
    for here, there in zip(
        loader_of(local, deletions=mode, epochs=1), loader_of(remote, deletions=mode, epochs=1), strict=True
    ):
        assert here.fingerprint() == there.fingerprint()

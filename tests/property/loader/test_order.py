"""Laws of the order, and a second implementation of it, written number by number from its definition."""

from bisect import bisect_right
from itertools import accumulate

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from datastore.errors import ConfigError
from datastore.loader.order.lanes import lane_grid, van_der_corput
from datastore.loader.order.mix import Purpose, derive_key, mix_int
from datastore.loader.order.order import NO_SAMPLE, BatchPlan, Order, OrderKey, Planner, line_of
from datastore.loader.order.samples import SampleGrid, sample_grid
from datastore.loader.settings import Rank

shard_tokens = st.lists(st.integers(0, 60), min_size=1, max_size=12).filter(lambda tokens: sum(tokens) > 10)
seq_lens = st.integers(1, 9)
keys = st.builds(OrderKey, seed=st.integers(0, 2**63 - 1), lanes=st.integers(1, 40), window=st.integers(1, 40))


def uids(count: int) -> np.ndarray:
    return np.array([mix_int(shard) for shard in range(count)], np.uint64)


def order_of(tokens: list[int], seq_len: int, key: OrderKey) -> Order:
    return Order(sample_grid(np.array(tokens, np.int64), seq_len=seq_len), uids(len(tokens)), key)


def first_positions(order: Order, count: int, *, start: int = 0) -> list[int]:
    return order.locate(start + np.arange(count, dtype=np.int64)).samples.tolist()


@given(shard_tokens, seq_lens, keys, st.integers(0, 2**40))
@example([11], 10, OrderKey(seed=0, lanes=40, window=40), 0)  # one sample in forty lanes
@example([60] * 12, 1, OrderKey(seed=1, lanes=1, window=1), 0)  # no shuffle within the line
@example([60] * 12, 1, OrderKey(seed=1, lanes=7, window=40), 2**40)
def test_every_epoch_is_a_bijection(tokens: list[int], seq_len: int, key: OrderKey, epoch: int) -> None:
    order = order_of(tokens, seq_len, key)
    found = first_positions(order, order.samples, start=epoch * order.samples)
    assert sorted(found) == list(range(order.samples))


@settings(max_examples=30)
@given(st.integers(60_000, 70_000), st.integers(1, 3_000), st.sampled_from([1, 255, 256, 257, 1024]))
def test_every_epoch_is_a_bijection_for_large_grids_too(samples: int, lanes: int, window: int) -> None:
    order = order_of([samples // 2, samples - samples // 2 + 1], 1, OrderKey(seed=3, lanes=lanes, window=window))
    found = order.locate(np.arange(samples, dtype=np.int64)).samples
    assert np.array_equal(np.sort(found), np.arange(samples))


@given(shard_tokens, seq_lens, keys, st.lists(st.integers(0, 2**45), min_size=1, max_size=20))
def test_a_position_means_the_same_however_it_is_asked_for(
    tokens: list[int], seq_len: int, key: OrderKey, positions: list[int]
) -> None:
    together = order_of(tokens, seq_len, key).locate(np.array(positions, np.int64)).samples.tolist()
    assert together == [first_positions(order_of(tokens, seq_len, key), 1, start=position)[0] for position in positions]


def sample_by_definition(tokens: list[int], seq_len: int, key: OrderKey, position: int) -> int:
    """The order, one number at a time, as docs/order.md words it."""
    starts = [0, *accumulate(tokens)]
    samples = (starts[-1] - 1) // seq_len
    runs = [[k for k in range(samples) if starts[s] <= k * seq_len < starts[s + 1]] for s in range(len(tokens))]
    epoch, u = divmod(position, samples)
    hashes = [mix_int(derive_key(key.seed, Purpose.LINE, epoch) ^ mix_int(shard)) for shard in range(len(tokens))]
    line = [k for shard in sorted(range(len(tokens)), key=hashes.__getitem__) for k in runs[shard]]
    bits = max(1, (key.lanes - 1).bit_length())
    visit = [lane for n in range(2**bits) if (lane := int(f"{n:0{bits}b}"[::-1], 2)) < key.lanes]
    length = [samples // key.lanes + (visit.index(lane) < samples % key.lanes) for lane in range(key.lanes)]
    lane, index = visit[u % key.lanes], u // key.lanes
    offset = mix_int(derive_key(key.seed, Purpose.STAGGER) ^ lane) % key.window
    window = (index + offset) // key.window
    inside = [i for i in range(length[lane]) if (i + offset) // key.window == window]
    base = mix_int(mix_int(derive_key(key.seed, Purpose.WINDOW, epoch) ^ lane) ^ window)
    slots = sorted(inside, key=lambda i: mix_int(base ^ ((i + offset) % key.window)))
    return line[sum(length[:lane]) + slots[index - inside[0]]]


@settings(max_examples=60)
@given(shard_tokens, seq_lens, keys, st.integers(0, 2**45))
def test_the_order_is_the_one_of_its_definition(tokens: list[int], seq_len: int, key: OrderKey, start: int) -> None:
    found = first_positions(order_of(tokens, seq_len, key), 8, start=start)
    assert found == [sample_by_definition(tokens, seq_len, key, start + step) for step in range(8)]


def test_the_order_is_frozen() -> None:
    order = order_of([500, 300, 700], 7, OrderKey(seed=7, lanes=5, window=16))
    assert first_positions(order, 12) == GOLDEN[0]
    assert first_positions(order, 12, start=10**12) == GOLDEN[1]


GOLDEN = [
    [116, 30, 72, 167, 102, 115, 29, 206, 159, 3, 117, 35],
    [37, 169, 123, 3, 79, 33, 170, 119, 202, 82, 42, 158],
]
"""Made by version 1 of the order; they change only with `ORDER_VERSION`."""


@given(shard_tokens, st.lists(st.integers(0, 60), max_size=5), seq_lens, st.integers(0, 2**40), st.integers(0, 99))
def test_an_append_keeps_earlier_samples_and_the_order_of_earlier_shards(
    tokens: list[int], added: list[int], seq_len: int, seed: int, epoch: int
) -> None:
    before = sample_grid(np.array(tokens, np.int64), seq_len=seq_len)
    after = sample_grid(np.array(tokens + added, np.int64), seq_len=seq_len)
    assert [list(before.spans(k)) for k in range(before.samples)] == [
        list(after.spans(k)) for k in range(before.samples)
    ]
    line = line_of(uids(len(tokens)), before.run_length, seed=seed, epoch=epoch).shard
    longer = line_of(uids(len(tokens + added)), after.run_length, seed=seed, epoch=epoch).shard
    assert longer[longer < len(tokens)].tolist() == line.tolist()


@given(shard_tokens, seq_lens)
def test_samples_cover_the_stream_and_overlap_by_their_one_target(tokens: list[int], seq_len: int) -> None:
    grid = sample_grid(np.array(tokens, np.int64), seq_len=seq_len)
    starts = [0, *accumulate(tokens)]
    for sample in range(grid.samples):
        spans = list(grid.spans(sample))
        covered = [starts[span.shard] + at for span in spans for at in range(span.start, span.stop)]
        assert covered == list(range(sample * seq_len, sample * seq_len + seq_len + 1))
        assert all(span.start < span.stop <= tokens[span.shard] for span in spans)
    assert sum(tokens) - 1 - grid.samples * seq_len < seq_len


@given(shard_tokens, seq_lens)
def test_a_sample_belongs_to_the_shard_of_its_first_token(tokens: list[int], seq_len: int) -> None:
    grid: SampleGrid = sample_grid(np.array(tokens, np.int64), seq_len=seq_len)
    starts = [0, *accumulate(tokens)]
    wanted = [bisect_right(starts, k * seq_len) - 1 for k in range(grid.samples)]
    assert grid.owner(np.arange(grid.samples)).tolist() == wanted
    assert np.repeat(np.arange(len(tokens)), grid.run_length).tolist() == wanted


def test_a_dataset_shorter_than_one_sample_is_refused_with_both_lengths() -> None:
    with pytest.raises(ConfigError, match=r"longer than the whole dataset \(seq_len=8, tokens=8\)"):
        sample_grid(np.array([4, 4]), seq_len=8)
    assert sample_grid(np.array([4, 5]), seq_len=8).samples == 1


def planner_of(order: Order, place: Rank, global_batch: int, total: int | None = None) -> Planner:
    return Planner(order, rank=place, global_batch=global_batch, total=total)


def global_batches(order: Order, world: int, global_batch: int, cursor: int, steps: int) -> list[list[BatchPlan]]:
    """The batches of all ranks, step by step."""
    ranks = [planner_of(order, Rank(rank, world), global_batch).plan(cursor, batches=steps) for rank in range(world)]
    return [list(step) for step in zip(*ranks, strict=True)]


def delivered(step: list[BatchPlan]) -> list[tuple[int, int]]:
    """The (position, sample) pairs of one global batch, in order of position."""
    pairs = zip(
        np.concatenate([part.positions for part in step]).tolist(),
        np.concatenate([part.samples for part in step]).tolist(),
        strict=True,
    )
    return sorted(pairs)


@given(shard_tokens, seq_lens, keys, st.integers(1, 8), st.integers(0, 30), st.integers(0, 2**40))
def test_the_set_of_each_global_batch_does_not_depend_on_the_world(
    tokens: list[int], seq_len: int, key: OrderKey, world: int, more: int, cursor: int
) -> None:
    order, global_batch = order_of(tokens, seq_len, key), world + more
    alone = global_batches(order, 1, global_batch, cursor, 3)
    together = global_batches(order, world, global_batch, cursor, 3)
    assert [delivered(step) for step in together] == [delivered(step) for step in alone]
    sizes = {len(part.samples) for step in together for part in step}
    assert max(sizes) - min(sizes) <= (global_batch % world > 0)


@given(shard_tokens, seq_lens, keys, st.data())
def test_stop_after_any_step_and_resume_with_any_world_and_batch_size(
    tokens: list[int], seq_len: int, key: OrderKey, data: st.DataObject
) -> None:
    order = order_of(tokens, seq_len, key)
    cursor, union = 0, []
    for _ in range(data.draw(st.integers(1, 4), label="launches")):
        world = data.draw(st.integers(1, 8), label="world")
        global_batch = data.draw(st.integers(world, 40), label="global batch")
        steps = data.draw(st.integers(1, 5), label="steps")
        for step in global_batches(order, world, global_batch, cursor, steps):
            union += delivered(step)
        cursor += steps * global_batch
    undisturbed = first_positions(order_of(tokens, seq_len, key), cursor)
    assert union == list(enumerate(undisturbed))


@given(shard_tokens, seq_lens, keys, st.integers(1, 8), st.integers(0, 60), st.integers(1, 3))
def test_a_finite_pass_holds_each_sample_once_per_epoch_and_takes_the_same_steps_on_every_rank(
    tokens: list[int], seq_len: int, key: OrderKey, world: int, more: int, epochs: int
) -> None:
    order, global_batch = order_of(tokens, seq_len, key), world + more
    total = epochs * order.samples
    ranks = [planner_of(order, Rank(rank, world), global_batch, total).plan(0, batches=10**4) for rank in range(world)]
    assert {len(plans) for plans in ranks} == {-(-total // global_batch)}
    samples = np.concatenate([plan.samples[plan.valid] for plans in ranks for plan in plans])
    assert np.bincount(samples, minlength=order.samples).tolist() == [epochs] * order.samples
    for rank, plans in enumerate(ranks):
        start, stop = Rank(rank, world).share(global_batch)
        assert {len(plan.samples) for plan in plans} == {stop - start}
        assert all((plan.samples[~plan.valid] == NO_SAMPLE).all() for plan in plans)


@given(keys, st.integers(1, 8), st.integers(1, 59))
def test_the_free_rows_of_the_last_batch_are_spread_over_the_ranks(key: OrderKey, world: int, rest: int) -> None:
    order = order_of([200], 1, key)
    ranks = [planner_of(order, Rank(rank, world), 64, 64 + rest).plan(64, batches=9) for rank in range(world)]
    counts = [int(plans[0].valid.sum()) for plans in ranks]
    assert sum(counts) == rest
    assert max(counts) - min(counts) <= 2


@given(st.integers(1, 65_536))
def test_lanes_are_visited_once_each_and_evenly(lanes: int) -> None:
    visit = van_der_corput(lanes)
    assert np.array_equal(np.sort(visit), np.arange(lanes))
    half = visit[: (lanes + 1) // 2].astype(np.int64)
    assert abs(int((half < lanes // 2).sum()) - len(half) // 2) <= 17


@given(st.integers(0, 5_000), st.integers(1, 300), st.integers(1, 300), st.integers(0, 2**63 - 1))
def test_lanes_differ_by_at_most_one_sample(samples: int, lanes: int, window: int, seed: int) -> None:
    grid = lane_grid(samples=samples, lanes=lanes, window=window, seed=seed)
    assert grid.length.sum() == samples
    assert grid.length.max() - grid.length.min() <= 1
    assert ((grid.offset >= 0) & (grid.offset < window)).all()


def test_a_rank_keeps_to_its_part_of_the_lanes() -> None:
    order = order_of([64 * 1024 + 1], 1, OrderKey(seed=2, lanes=1024, window=16))
    plans = planner_of(order, Rank(3, 8), 256).plan(0, batches=64)
    lanes = {int(lane) for plan in plans for lane in order.lanes.lane_of(plan.positions)}
    assert len(lanes) <= 1024 // 8 + 16


def test_a_micro_batch_is_not_a_run_of_neighbouring_lanes() -> None:
    order = order_of([64 * 1024 + 1], 1, OrderKey(seed=2, lanes=1024, window=16))
    (plan,) = planner_of(order, Rank(), 256).plan(0, batches=1)
    lanes = order.lanes.lane_of(plan.positions).astype(np.int64)
    micro = lanes[:64]
    assert micro.max() - micro.min() > 512
    assert (np.diff(lanes) < 0).any()


def test_more_ranks_than_samples_in_a_batch_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"global_batch=3, world=4"):
        planner_of(order_of([99], 1, OrderKey(seed=0, lanes=1, window=1)), Rank(0, 4), 3)


@pytest.mark.parametrize(
    ("rank", "world", "fact"), [(0, 0, "world must be"), (2, 2, "rank is not"), (-1, 2, "rank is not")]
)
def test_a_place_that_does_not_exist_is_refused(rank: int, world: int, fact: str) -> None:
    with pytest.raises(ConfigError, match=fact):
        Rank(rank, world)


def deff(order: Order, *, global_batch: int, span: int, shards: int) -> float:
    """Variance of the mean, over `span` batches, of a number that each shard has; relative to random draws."""
    numbers = np.random.default_rng(1).standard_normal(shards)
    found = order.locate(np.arange(order.samples // global_batch * global_batch, dtype=np.int64)).shards
    means = numbers[found].reshape(-1, global_batch).mean(axis=1)
    many = means[: len(means) // span * span].reshape(-1, span).mean(axis=1)
    return float(((many - numbers.mean()) ** 2).mean() * global_batch * span / numbers.var())


def test_batches_mix_like_a_shuffle_of_everything() -> None:
    """The proportions of `tools/bench/shuffle`, an eighth as large."""
    tokens = [500] * 639 + [501]
    fine, coarse = (OrderKey(seed=4, lanes=lanes, window=window) for lanes, window in ((512, 32), (8, 500)))
    mixed = [deff(order_of(tokens, 1, fine), global_batch=48, span=span, shards=640) for span in (1, 10, 100)]
    lumps = [deff(order_of(tokens, 1, coarse), global_batch=48, span=span, shards=640) for span in (1, 10, 100)]
    assert mixed[0] < 1.2
    assert mixed[1] < 1.2
    assert mixed[2] < 4
    assert all(lump > 4 * fine_one for lump, fine_one in zip(lumps, mixed, strict=True))


def in_epoch(order: Order, epoch: int) -> list[tuple[int, int, int, int]]:
    """Return (position, lane, shard, sample) of each position of an epoch."""
    positions = epoch * order.samples + np.arange(order.samples, dtype=np.int64)
    found = order.locate(positions)
    lanes = order.lanes.lane_of(positions % order.samples)
    return list(zip(positions.tolist(), lanes.tolist(), found.shards.tolist(), found.samples.tolist(), strict=True))


@given(shard_tokens, seq_lens, keys, st.integers(0, 3))
def test_the_last_sample_of_a_lane_in_a_shard_is_the_last_one_that_it_visits_there(
    tokens: list[int], seq_len: int, key: OrderKey, epoch: int
) -> None:
    order = order_of(tokens, seq_len, key)
    visits = in_epoch(order, epoch)
    positions, shards = np.array([visit[0] for visit in visits]), np.array([visit[2] for visit in visits])
    wanted = [max(k for _, at, where, k in visits if (at, where) == (lane, shard)) for _, lane, shard, _ in visits]
    assert order.last_of_lane(positions, shards).tolist() == wanted


@given(shard_tokens, seq_lens, keys, st.data())
def test_the_next_read_of_a_stretch_is_foreseen_up_to_a_window(
    tokens: list[int], seq_len: int, key: OrderKey, data: st.DataObject
) -> None:
    order = order_of(tokens, seq_len, key)
    cursor = data.draw(st.integers(0, 3 * order.samples))
    epoch = cursor // order.samples
    _, _, shard, first = data.draw(st.sampled_from(in_epoch(order, epoch)))
    samples = [k for _, _, where, k in in_epoch(order, epoch) if where == shard and k >= first]
    last = data.draw(st.sampled_from(samples))
    later = in_epoch(order, epoch) + in_epoch(order, epoch + 1)
    really = min(at for at, _, where, k in later if at >= cursor and where == shard and first <= k <= last)
    found = int(order.next_read(np.array([shard]), np.array([first]), np.array([last]), cursor=cursor)[0])
    slack = 2 * (key.window + 1) * key.lanes
    assert cursor <= found <= really + slack
    lanes = {lane for _, lane, where, k in in_epoch(order, epoch) if where == shard and first <= k <= last}
    again = {lane for _, lane, where, k in in_epoch(order, epoch + 1) if where == shard and first <= k <= last}
    if len(lanes) == len(again) == 1:
        # Perhaps in this epoch still, where the window is not over: then a whole epoch early.
        over = max(at for at, _, where, k in in_epoch(order, epoch) if where == shard and first <= k <= last)
        assert found >= really - slack or over >= cursor - slack

"""Laws of merging segments: their number stays small, and no append rewrites a large one."""

import math

from hypothesis import given
from hypothesis import strategies as st

from datastore.dataset.shards.segment_changes import merge_tail
from datastore.dataset.shards.segment_file import MAX_SEGMENT_SHARDS

appends = st.lists(st.one_of(st.integers(1, 5), st.integers(1, 70_000)), max_size=200)


def append(segments: list[int], added: int) -> list[int]:
    """Return the sizes of the segments after an append, as the writer cuts them."""
    merged = merge_tail(segments, added)
    kept, total = segments[: len(segments) - merged], added + sum(segments[len(segments) - merged :])
    while total > 0:
        kept = [*kept, min(total, MAX_SEGMENT_SHARDS)]
        total -= MAX_SEGMENT_SHARDS
    return kept


@given(appends)
def test_segments_stay_few_and_within_their_size(appends: list[int]) -> None:
    segments: list[int] = []
    for added in appends:
        segments = append(segments, added)
        total = sum(segments)
        assert all(0 < size <= MAX_SEGMENT_SHARDS for size in segments)
        assert len(segments) <= 2 * total / MAX_SEGMENT_SHARDS + math.log(min(total, MAX_SEGMENT_SHARDS), 4) + 3
    assert sum(segments) == sum(appends)


@given(appends, st.integers(1, 1000))
def test_a_small_append_rewrites_small_segments_only(appends: list[int], added: int) -> None:
    segments: list[int] = []
    for earlier in appends:
        segments = append(segments, earlier)
    merged = merge_tail(segments, added)
    rewritten = added
    for size in reversed(segments[len(segments) - merged :]):
        assert size < 4 * rewritten
        rewritten += size


def test_many_appends_of_one_shard_rewrite_each_shard_a_few_times() -> None:
    segments: list[int] = []
    rewritten, most = 0, 0
    for _ in range(20_000):
        merged = merge_tail(segments, 1)
        rewritten += 1 + sum(segments[len(segments) - merged :])
        segments = append(segments, 1)
        most = max(most, len(segments))
    assert most <= 9
    assert rewritten / 20_000 < 20

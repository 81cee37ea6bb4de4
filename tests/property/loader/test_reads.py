"""What a batch asks to be held is exactly what its rows touch."""

import uuid

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from datastore.loader.cache.blocks import BlockLayout
from datastore.loader.gathering.gather import reads_of
from datastore.loader.order.order import NO_SAMPLE, BatchPlan
from datastore.loader.order.samples import sample_grid
from datastore.testing.examples import make_dataset

SHARDS = [[700, 300], [5], [2_000, 11], [1, 1, 1], [900]]


@given(
    block_bytes=st.sampled_from([64, 100, 1_000, 4_096]),
    seq_len=st.sampled_from([1, 7, 150, 900]),
    rows=st.integers(1, 4),
    data=st.data(),
)
def test_the_blocks_of_a_batch_are_those_that_its_tokens_lie_in(
    block_bytes: int, seq_len: int, rows: int, data: st.DataObject
) -> None:
    dataset = make_dataset(f"memory://{uuid.uuid4().hex}", SHARDS, block_bytes=block_bytes)
    segments = dataset.segments
    layout, grid = BlockLayout(segments), sample_grid(segments.tokens, seq_len=seq_len)
    numbers = st.lists(st.integers(NO_SAMPLE, grid.samples - 1), min_size=rows, max_size=rows)
    batches = data.draw(st.lists(numbers, min_size=1, max_size=3))
    plans = []
    for batch in batches:
        samples = np.array(batch, np.int64)
        shards = np.where(samples == NO_SAMPLE, 0, grid.owner(np.maximum(samples, 0)))
        plans.append(BatchPlan(0, samples, samples, shards))
    starts = np.concatenate([[0], np.cumsum(segments.tokens)])
    for batch, reads in zip(batches, reads_of(plans, grid=grid, layout=layout, tracks=[layout.tokens]), strict=True):
        wanted = set()
        for sample in batch:
            for token in range(sample * seq_len, sample * seq_len + seq_len + 1) if sample != NO_SAMPLE else ():
                shard = int(np.searchsorted(starts, token, side="right")) - 1
                byte = int(segments.values_start[shard]) + 2 * (token - int(starts[shard]))
                first = layout.of_shard(shard).start
                wanted |= {first + byte // block_bytes, first + (byte + 1) // block_bytes}
        assert set(reads.blocks.tolist()) == wanted
        for block in wanted:
            place = layout.range_of(block)
            assert block in layout.of_shard(place.shard)
            assert layout.sizes(np.array([block])).tolist() == [place.stop - place.start]

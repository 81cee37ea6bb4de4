"""Loading over a network, from a real S3: every rank reads its part once, with threads that fetch ahead."""

import warnings

import numpy as np
import pytest

from datastore.dataset.snapshot import open_dataset
from datastore.loader.loader import Loader
from datastore.loader.settings import LoaderSettings, Rank
from datastore.testing.examples import make_dataset

BLOCK = 64 * 1024
WORLD = 3


@pytest.mark.s3
def test_ranks_that_read_from_s3_see_each_sample_once_and_fetch_little_more_than_their_share(s3_url: str) -> None:
    made = make_dataset(s3_url, [[200_000], [150_000, 50_000], [333_333]], block_bytes=BLOCK)
    # Lanes of whole blocks, as a large dataset has them.
    options = LoaderSettings(lanes=6, window=32, epochs=1, threads=4, memory_bytes=16 * BLOCK)
    whole = np.concatenate([made.token_shard(shard)[0] for shard in range(3)])
    seen: list[int] = []
    fetched = 0
    for rank in range(WORLD):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loader = Loader(open_dataset(s3_url), seq_len=256, global_batch=24, rank=Rank(rank, WORLD), options=options)
            with loader:
                for step, batch in enumerate(loader):
                    rows = batch.samples[batch.valid]
                    seen.extend(rows.tolist())
                    for sample, row in zip(rows.tolist(), batch.tokens[batch.valid], strict=True):
                        assert np.array_equal(row, whole[sample * 256 : sample * 256 + 257])
                    if step == 20:
                        loader.load_state_dict(loader.state_dict())
                fetched += loader.stats()["filled_bytes"]
                assert loader.stats()["peak_bytes"] <= 16 * BLOCK
    assert sorted(seen) == list(range((len(whole) - 1) // 256))
    assert fetched < 1.5 * int(made.segments.size_bytes.sum())

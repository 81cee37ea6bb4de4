from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.errors import ConfigError, MissingError
from datastore.loader.loader import Loader
from datastore.loader.settings import Rank
from datastore.storage.backends.memory import MemoryStorage
from datastore.testing.examples import make_dataset, make_language
from datastore.training.run.data import open_at, ref_of, version_to_read
from datastore.training.run.split import Stretch, make_split

SHARDS = [[5, 7], [1], [30, 2, 11], [4]]
TOTAL = sum(map(sum, SHARDS))


@pytest.fixture(scope="module")
def dataset() -> Dataset:
    return make_dataset(MemoryStorage("split"), SHARDS)


def stream_of(dataset: Dataset) -> list[int]:
    """Return the tokens that samples of one token and its follower are made of: all of them, in order."""
    with Loader(dataset, seq_len=1, global_batch=1) as loader:
        batches = [next(loader) for _ in range(loader.samples_per_epoch)]
    rows = sorted((int(batch.samples[0]), batch.tokens[0].tolist()) for batch in batches)
    return [row[0] for _, row in rows] + [rows[-1][1][1]]


@given(start=st.integers(0, TOTAL - 2), data=st.data())
def test_a_stretch_is_that_part_of_the_stream(dataset: Dataset, start: int, data: st.DataObject) -> None:
    stop = data.draw(st.integers(start + 2, TOTAL))
    whole = np.concatenate([dataset.token_shard(index)[0] for index in range(len(SHARDS))])
    assert stream_of(Stretch(dataset, start=start, stop=stop)) == whole[start:stop].tolist()


@given(holdout=st.floats(0, 0.5))
def test_training_and_validation_share_no_token_and_lose_none(dataset: Dataset, holdout: float) -> None:
    split = make_split(dataset, holdout=holdout, validation=None)
    kept, held_out = (int(part.segments.tokens.sum()) for part in (split.training, split.validation[""]))
    assert kept + held_out == TOTAL
    assert held_out == int(TOTAL * holdout)


@pytest.mark.parametrize("world", [1, 2, 3, 20])
def test_any_number_of_ranks_validates_on_the_same_samples(tmp_path: Path, world: int) -> None:
    split = make_split(make_language(tmp_path), holdout=0.1, validation=None)
    (alone,) = split.samples(16, seq_len=32, rank=Rank())
    parts = [split.samples(16, seq_len=32, rank=Rank(rank, world))[0] for rank in range(world)]
    together = np.concatenate([part.mine for part in parts])
    assert {part.count for part in parts} == {alone.count} == {16}
    assert sorted(map(tuple, together.tolist())) == sorted(map(tuple, alone.mine.tolist()))


def test_what_cannot_be_validated_on_is_refused(tmp_path: Path) -> None:
    dataset = make_language(tmp_path / "one")
    with pytest.raises(ConfigError, match="nothing to validate on"):
        make_split(dataset, holdout=0, validation=None).samples(4, seq_len=32, rank=Rank())
    with pytest.raises(ConfigError, match="is the training dataset"):
        make_split(dataset, holdout=0, validation=open_dataset(tmp_path / "one"))
    other = make_dataset(tmp_path / "other", SHARDS)
    with pytest.raises(ConfigError, match="another tokenizer"):
        make_split(dataset, holdout=0, validation=other)


def test_another_dataset_is_validated_on_as_a_whole(tmp_path: Path) -> None:
    dataset, other = make_language(tmp_path / "one"), make_language(tmp_path / "other", seed=1)
    split = make_split(dataset, holdout=0.3, validation=other)
    assert split.training is dataset
    assert split.validation[""] is other


def test_a_run_whose_dataset_was_moved_is_told_how_to_go_on(tmp_path: Path) -> None:
    ref = ref_of(make_language(tmp_path / "data"))
    (tmp_path / "data").rename(tmp_path / "moved")
    for ask in (
        lambda: version_to_read(str(tmp_path / "data"), ref, deletions="mask"),
        lambda: version_to_read(f"{tmp_path / 'data'}@1", ref, deletions="mask"),
        lambda: open_at(str(tmp_path / "data"), ref, version=1),
    ):
        with pytest.raises(MissingError, match=r"no dataset there.*data\.url"):
            ask()
    with pytest.raises(MissingError, match="no such version") as caught:
        open_at(str(tmp_path / "moved"), ref, version=9)
    assert "data.url" not in caught.value.hint

"""Tensors from a loader: right, of one's own, counted when delivered, and never duplicated by workers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from datastore.dataset.snapshot import Dataset
from datastore.errors import ConfigError
from datastore.loader.loader import Loader
from datastore.loader.settings import LoaderSettings, Rank
from datastore.testing.examples import make_dataset
from datastore.testing.resume import check_resumes_everywhere
from datastore.torch import BUFFERS, TensorStream, TokenDataset, rank_of, stream


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return make_dataset(tmp_path / "data", [[5_000], [3_000, 100]], block_bytes=4096)


def loader_of(dataset: Dataset, *, epochs: int | None = None, rank: Rank | None = None) -> Loader:
    options = LoaderSettings(epochs=epochs, threads=1)
    return Loader(dataset, seq_len=16, global_batch=6, rank=rank or Rank(), options=options)


def test_tensors_are_the_batches_of_the_loader(dataset: Dataset) -> None:
    plain = loader_of(dataset)
    for batch in [next(tensors) for tensors in [stream(loader_of(dataset))] for _ in range(10)]:
        wanted = next(plain)
        assert batch.tokens.dtype == torch.int64
        assert np.array_equal(batch.tokens.numpy(), wanted.tokens)
        assert torch.equal(batch.inputs[:, 1:], batch.targets[:, :-1])
        assert batch.host.cursor == wanted.cursor
        assert batch.valid.all()


@pytest.mark.parametrize("world", [1, 2, 3])
def test_unshuffled_samples_come_in_the_order_of_the_dataset(dataset: Dataset, world: int) -> None:
    options = LoaderSettings(epochs=2, threads=1, shuffle=False)
    ranks = [
        Loader(dataset, seq_len=16, global_batch=6, rank=Rank(rank, world), options=options) for rank in range(world)
    ]
    count = ranks[0].samples_per_epoch
    assert count > 60
    seen = []
    for step in zip(*ranks, strict=True):
        cursor = step[0].cursor
        assert len({batch.cursor for batch in step}) == 1
        found = [sample for batch in step for sample in batch.samples[batch.valid].tolist()]
        assert found == [(cursor + slot) % count for slot in range(len(found))]
        seen += found
    assert seen == [*range(count)] * 2


def test_ids_above_2_to_the_15_stay_positive(dataset: Dataset) -> None:
    batch = next(stream(loader_of(dataset)))
    assert int(batch.tokens.max()) > 2**15
    assert int(batch.tokens.min()) >= 0


def test_what_was_handed_out_is_not_touched(dataset: Dataset) -> None:
    tensors, plain = stream(loader_of(dataset)), loader_of(dataset)
    batches = [next(tensors) for _ in range(2 * BUFFERS)]
    for batch, wanted in zip(batches, plain, strict=False):
        assert np.array_equal(batch.tokens.numpy(), wanted.tokens)
        assert np.array_equal(batch.host.tokens, wanted.tokens)


def test_what_did_not_become_tensors_is_the_next_batch_still(dataset: Dataset, monkeypatch: pytest.MonkeyPatch) -> None:
    tensors, plain = stream(loader_of(dataset)), loader_of(dataset)
    next(tensors), next(plain)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "from_numpy", lambda _array: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            next(tensors)
    assert tensors.state_dict() == plain.state_dict()
    assert np.array_equal(next(tensors).tokens.numpy(), next(plain).tokens)


def test_a_stream_resumes_after_every_step(dataset: Dataset) -> None:
    def open_at(state: dict | None) -> TensorStream:
        tensors = stream(loader_of(dataset, epochs=1))
        if state is not None:
            tensors.load_state_dict(state)
        return tensors

    check_resumes_everywhere(open_at, steps=20, value=lambda batch: batch.tokens.tolist())


def test_a_data_loader_delivers_each_sample_once_and_its_state_counts_what_was_delivered(dataset: Dataset) -> None:
    source = TokenDataset(loader_of(dataset, epochs=1))
    plain = list(loader_of(dataset, epochs=1))
    state = source.state_dict()
    for step, batch in enumerate(DataLoader(source, batch_size=None)):
        assert np.array_equal(batch.tokens.numpy(), plain[step].tokens)
        assert batch.host.samples.tolist() == plain[step].samples.tolist()
        assert batch.valid.tolist() == plain[step].valid.tolist()
        state = source.state_dict()
        assert state["cursor"] == min(6 * (step + 1), source.loader.samples_per_epoch)
        if step == 9:
            break
    resumed = TokenDataset(loader_of(dataset, epochs=1))
    resumed.load_state_dict(state)
    rest = [batch.tokens.numpy() for batch in DataLoader(resumed, batch_size=None)]
    assert len(rest) == len(plain) - 10
    assert all(np.array_equal(mine, other.tokens) for mine, other in zip(rest, plain[10:], strict=True))


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_worker_processes_are_refused_with_the_way_out(dataset: Dataset, method: str) -> None:
    loading = DataLoader(
        TokenDataset(loader_of(dataset)), batch_size=None, num_workers=1, multiprocessing_context=method
    )
    with pytest.raises(ConfigError, match="num_workers=0"):
        next(iter(loading))


class FakeMesh:
    """What `rank_of` asks of a DeviceMesh, without processes."""

    def __init__(self, **dimensions: tuple[int, int]) -> None:
        self.mesh_dim_names: tuple[str, ...] | None = tuple(dimensions)
        self.sizes = list(dimensions.values())
        self.ndim = len(dimensions)
        self.shape = tuple(size for _, size in self.sizes)

    def size(self, dimension: int) -> int:
        return self.sizes[dimension][1]

    def get_local_rank(self, dimension: int) -> int:
        return self.sizes[dimension][0]


def test_ranks_that_share_a_model_replica_share_their_data() -> None:
    assert rank_of(FakeMesh(replicate=(1, 2), shard=(2, 4), tp=(1, 2))) == Rank(6, 8)
    assert rank_of(FakeMesh(pp=(1, 2), dp=(2, 3), cp=(0, 4))) == Rank(2, 3)
    assert rank_of(FakeMesh(tp=(1, 2))) == Rank(0, 1)


def test_a_mesh_of_one_dimension_divides_the_data_and_more_need_names() -> None:
    mesh = FakeMesh(x=(1, 2))
    mesh.mesh_dim_names = None
    assert rank_of(mesh) == Rank(1, 2)
    mesh = FakeMesh(x=(1, 2), y=(0, 2))
    mesh.mesh_dim_names = None
    with pytest.raises(ConfigError, match="have no names"):
        rank_of(mesh)


def test_a_loader_for_another_place_than_the_mesh_says_is_refused(dataset: Dataset) -> None:
    mesh = FakeMesh(dp=(1, 2))
    stream(loader_of(dataset, rank=Rank(1, 2)), mesh=mesh).close()
    with pytest.raises(ConfigError, match=r"loader='rank 0 of 1', mesh='rank 1 of 2'"):
        stream(loader_of(dataset), mesh=mesh)

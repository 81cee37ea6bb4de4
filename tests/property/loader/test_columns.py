"""What goes with each token comes with it: in every batch, whatever the world, the storage, or what is deleted."""

import shutil
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datastore.dataset.operations.delete import delete
from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.errors import ConfigError, CorruptError
from datastore.ingestion.writers.tokens import token_writer
from datastore.loader.cache.blocks import BlockLayout, Track
from datastore.loader.loader import Loader
from datastore.loader.settings import DeletionMode, LoaderSettings, Rank
from datastore.testing.resume import check_resumes_everywhere
from datastore.torch import TensorStream, stream
from datastore.training.run.split import Stretch, make_split

DOCUMENTS = [70, 30, 1, 0, 99, 5, 200, 11, 1, 1, 1, 90]
SEQ_LEN = 7
NAMES = ("logits", "loss_mask", "weight")
TYPES = {"logits": ("float16", 3), "loss_mask": "bool", "weight": "float32", "unread": "int64"}


@dataclass(frozen=True)
class Known:
    """A dataset and, read the simple way, all that is in it."""

    dataset: Dataset
    tokens: np.ndarray = field(repr=False)
    columns: dict[str, np.ndarray] = field(repr=False)


def made(url: str) -> Known:
    """Documents in several shards, each token with values of its own."""
    generator = np.random.default_rng(0)
    total = sum(DOCUMENTS)
    tokens = generator.integers(0, 1000, total).astype(np.uint16)
    columns: dict[str, np.ndarray] = {
        "logits": generator.normal(size=(total, 3)).astype(np.float16),
        "loss_mask": generator.integers(0, 2, total).astype(np.uint8),
        "weight": generator.random(total).astype(np.float32),
        "unread": np.arange(total),
    }
    ends = np.cumsum(DOCUMENTS)
    for first in range(0, len(DOCUMENTS), 5):
        with token_writer(url, vocab_size=1000, columns=TYPES, task_id=f"{first}") as out:
            for number in range(first, min(first + 5, len(DOCUMENTS))):
                part = slice(ends[number] - DOCUMENTS[number], ends[number])
                values = {name: column[part] for name, column in columns.items()}
                out.write(tokens[part], id=f"document {number}", **values)
    return Known(open_dataset(url), tokens, columns)


@pytest.fixture(scope="module", params=["memory", "local"])
def known(request: pytest.FixtureRequest) -> Iterator[Known]:
    folder = Path(tempfile.mkdtemp())
    yield made(f"memory://{uuid.uuid4().hex}" if request.param == "memory" else str(folder / "data"))
    shutil.rmtree(folder)


def loader_of(dataset: Dataset, **changes: Any) -> Loader:
    options = LoaderSettings(
        lanes=4,
        window=4,
        threads=changes.pop("threads", 0),
        columns=("weight", "logits"),
        memory_bytes=changes.pop("memory_bytes", 2**24),
        epochs=changes.pop("epochs", None),
        deletions=changes.pop("deletions", "mask"),
        end_of_text=999,
    )
    return Loader(dataset, **({"seq_len": SEQ_LEN, "global_batch": 5, "options": options} | changes))


def places(sample: int, seq_len: int = SEQ_LEN) -> slice:
    return slice(sample * seq_len, (sample + 1) * seq_len + 1)


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**60),
    world=st.integers(1, 3),
    more=st.integers(0, 20),
    seq_len=st.sampled_from([1, 7, 150]),
    memory_bytes=st.sampled_from([2**24, 40_000]),
)
@pytest.mark.filterwarnings("ignore:memory_bytes:RuntimeWarning")
def test_each_token_comes_with_its_values(
    known: Known, seed: int, world: int, more: int, seq_len: int, memory_bytes: int
) -> None:
    for rank in range(world):
        loader = loader_of(
            known.dataset,
            seed=seed,
            seq_len=seq_len,
            global_batch=world + more,
            rank=Rank(rank, world),
            epochs=1,
            memory_bytes=memory_bytes,
        )
        assert sorted(loader.columns) == list(NAMES)
        for batch in loader:
            for row, sample in enumerate(batch.samples.tolist()):
                if sample < 0:
                    assert not any(batch.columns[name][row].any() for name in NAMES)
                    continue
                assert np.array_equal(batch.tokens[row], known.tokens[places(sample, seq_len)])
                for name in NAMES:
                    wanted = known.columns[name][places(sample, seq_len)]
                    assert batch.columns[name].dtype == wanted.dtype
                    assert np.array_equal(batch.columns[name][row], wanted)
            assert batch.loss_mask is not None
            assert np.array_equal(batch.loss_mask, batch.columns["loss_mask"] == 1)


@pytest.mark.parametrize("deletions", ["mask", "compact"])
def test_what_goes_with_a_deleted_token_is_gone_with_it(deletions: DeletionMode) -> None:
    known = made(f"memory://{uuid.uuid4().hex}")
    gone = {1, 4, 5, 11}
    delete(known.dataset.storage, ids=[f"document {number}" for number in gone])
    live = np.repeat([number not in gone for number in range(len(DOCUMENTS))], DOCUMENTS)
    if deletions == "compact":
        tokens = known.tokens[live]
        columns = {name: column[live] for name, column in known.columns.items()}
    else:
        tokens = np.where(live, known.tokens, 999)
        columns = {name: (column.T * live).T.astype(column.dtype) for name, column in known.columns.items()}
    seen = 0
    for batch in loader_of(open_dataset(known.dataset.storage), deletions=deletions, epochs=1):
        for row in np.flatnonzero(batch.valid).tolist():
            part = places(int(batch.samples[row]))
            assert np.array_equal(batch.tokens[row], tokens[part])
            assert all(np.array_equal(batch.columns[name][row], columns[name][part]) for name in NAMES)
            seen += 1
    assert seen == (len(tokens) - 1) // SEQ_LEN


@settings(max_examples=20)
@given(start=st.integers(0, 400), length=st.integers(20, 100))
def test_a_stretch_of_a_dataset_brings_the_values_of_its_own_tokens(known: Known, start: int, length: int) -> None:
    part = Stretch(known.dataset, start=start, stop=start + length)
    for batch in loader_of(part, epochs=1):
        for row in np.flatnonzero(batch.valid).tolist():
            inside = places(int(batch.samples[row]))
            assert np.array_equal(batch.tokens[row], known.tokens[start : start + length][inside])
            for name in NAMES:
                assert np.array_equal(batch.columns[name][row], known.columns[name][start : start + length][inside])


def test_held_out_samples_bring_their_loss_mask(known: Known) -> None:
    split = make_split(known.dataset, holdout=0.2, validation=None)
    (found,) = split.samples(4, seq_len=SEQ_LEN, rank=Rank())
    assert found.loss_mask is not None
    held_out = known.tokens[-int(len(known.tokens) * 0.2) :].tolist()
    for tokens, mask in zip(found.mine.tolist(), found.loss_mask.tolist(), strict=True):
        (at,) = [at for at in range(len(held_out)) if held_out[at : at + SEQ_LEN + 1] == tokens]
        at += len(known.tokens) - len(held_out)
        assert mask == (known.columns["loss_mask"][at : at + SEQ_LEN + 1] == 1).tolist()


def test_tensors_bring_the_same_values_and_keep_them_while_buffers_are_reused(known: Known) -> None:
    tensors, plain = stream(loader_of(known.dataset)), loader_of(known.dataset)
    batches = [next(tensors) for _ in range(8)]
    for batch in batches:
        wanted = next(plain)
        assert sorted(batch.columns) == list(NAMES)
        for name in NAMES:
            assert np.array_equal(batch.columns[name].numpy(), wanted.columns[name])
        assert batch.loss_mask is not None
        assert batch.loss_mask.dtype == torch.bool
        assert np.array_equal(batch.loss_mask.numpy(), wanted.loss_mask)
        assert batch.columns["logits"].shape == (5, SEQ_LEN + 1, 3)


def test_values_resume_with_the_tokens_they_go_with(known: Known) -> None:
    def open_at(state: dict | None) -> TensorStream:
        tensors = stream(loader_of(known.dataset, epochs=1, threads=1))
        if state is not None:
            tensors.load_state_dict(state)
        return tensors

    check_resumes_everywhere(open_at, steps=15, value=lambda batch: [batch.columns[name].tolist() for name in NAMES])


def test_buffers_for_columns_are_filled_and_those_that_do_not_fit_are_refused(known: Known) -> None:
    loader = loader_of(known.dataset)
    out, columns = np.empty((5, SEQ_LEN + 1), np.uint16), loader.empty_columns()
    batch = loader.next_into(out, columns=columns)
    assert all(batch.columns[name] is columns[name] for name in NAMES)
    for wrong in (
        {},
        columns | {"more": columns["weight"]},
        columns | {"weight": columns["weight"].astype(np.float64)},
        columns | {"weight": np.empty((SEQ_LEN + 1, 5), np.float32).T},
    ):
        with pytest.raises(ConfigError, match="the buffers do not fit the columns of the batch"):
            loader.next_into(out, columns=wrong)


def test_a_column_that_is_not_there_is_refused_and_the_others_are_named(known: Known) -> None:
    with pytest.raises(ConfigError, match=r"no such column \(column='x', columns=\['logits', 'loss_mask', 'unread'"):
        Loader(known.dataset, seq_len=SEQ_LEN, global_batch=5, options=LoaderSettings(columns=("x",)))


def test_only_the_loss_mask_is_read_if_nothing_is_asked_for(known: Known) -> None:
    assert list(Loader(known.dataset, seq_len=SEQ_LEN, global_batch=5).columns) == ["loss_mask"]


def test_a_flipped_bit_in_a_column_stops_the_batch_that_needs_it() -> None:
    known = made(f"memory://{uuid.uuid4().hex}")
    shard = known.dataset.segments.shard(1)
    start = next(column.values_start for column in shard.layout.columns if column.name == "weight")
    raw = bytearray(known.dataset.storage.get(shard.path))
    raw[start] ^= 1
    known.dataset.storage.put(shard.path, bytes(raw))
    with pytest.raises(CorruptError, match="a block does not match its digest"):
        list(loader_of(known.dataset, epochs=1))


def test_the_blocks_of_a_column_are_those_that_its_values_lie_in(known: Known) -> None:
    segments = known.dataset.segments
    layout = BlockLayout(segments)
    track = Track(segments.column_start("logits"), np.full(len(segments), 6))
    first, last = layout.of_tokens(np.array([0]), np.array([3]), np.array([9]), track=track)
    start = int(segments.column_start("logits")[0])
    block = int(segments.block_bytes[0])
    assert (int(first[0]), int(last[0])) == ((start + 18) // block, (start + 53) // block)

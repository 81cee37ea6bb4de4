"""Packed rows: whole documents, none cut that fits, each once an epoch, on any ranks and after any resume."""

import json
import os
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import datastore as ds
from datastore.dataset.snapshot import Dataset
from datastore.errors import ConfigError, ResumeError
from datastore.loader.batch import Batch
from datastore.loader.loader import Loader
from datastore.loader.lookup import SampleReader
from datastore.loader.order.packs import PackGrid, best_fit, pack_grid
from datastore.loader.settings import LoaderSettings, Rank
from datastore.testing.examples import make_dataset
from datastore.testing.resume import check_resumes_everywhere
from datastore.torch import document_layout
from datastore.training.run.split import Stretch

SEQ_LEN = 31
SHARDS = [[5, 90, 31, 32, 33, 1, 2, 0, 17], [64, 63, 62, 7, 7, 7, 7], [1], list(range(2, 40))]
PACKED = LoaderSettings(lanes=4, window=4, threads=0, packing="best_fit", epochs=1, memory_bytes=2**20)

Documents = list[tuple[int, ...]]


def documents_of(dataset: Dataset) -> Documents:
    found: Documents = []
    for shard in range(len(dataset.segments)):
        tokens, offsets = dataset.token_shard(shard)
        found += [tuple(tokens[low:high].tolist()) for low, high in pairwise(offsets)]
    return found


def pieces_of(documents: Documents, seq_len: int = SEQ_LEN) -> Counter[tuple[int, ...]]:
    """Cut documents as the page says, the simple way."""
    pieces = []
    for document in documents:
        rest = document
        while len(rest) > seq_len + 1:
            pieces.append(rest[: seq_len + 1])
            rest = rest[seq_len:]
        if len(rest) > 1:
            pieces.append(rest)
    return Counter(pieces)


def pieces_in(batch: Batch) -> list[tuple[tuple[int, ...], tuple[bool, ...]]]:
    """Return the tokens of each document of a batch and whether they are learned; zeros that fill up are checked and left out."""
    assert batch.loss_mask is not None
    width = batch.tokens.shape[1]
    rows = batch.tokens[batch.valid].reshape(-1), batch.loss_mask[batch.valid].reshape(-1)
    valid = np.flatnonzero(batch.valid)
    shift = {int(row): int(np.searchsorted(valid, row)) for row in valid}
    flat = [shift[row] * width + at for row, at in batch.document_starts.tolist()]
    ends = [*flat[1:], len(rows[0])]
    found = []
    for low, high in zip(flat, ends, strict=True):
        tokens, mask = tuple(rows[0][low:high].tolist()), tuple(rows[1][low:high].tolist())
        if any(mask):
            found.append((tokens, mask))
        else:
            assert not any(tokens), "what is not learned at all is zeros"
    return found


@pytest.fixture(scope="module", params=["memory", "local"])
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    url = (
        f"memory://packing-{os.getpid()}"
        if request.param == "memory"
        else str(tmp_path_factory.mktemp("packs") / "data")
    )
    return make_dataset(url, SHARDS, block_bytes=128, name="packs")


@settings(max_examples=60)
@given(lengths=st.lists(st.integers(1, 40), max_size=200))
def test_best_fit_takes_each_piece_once_and_opens_no_row_that_an_open_one_would_do_for(lengths: list[int]) -> None:
    order, sizes = best_fit(np.array(lengths, np.int64), room=40)
    assert sorted(order.tolist()) == list(range(len(lengths)))
    rows = np.split(order, np.cumsum(sizes)[:-1]) if lengths else []
    totals = [sum(lengths[piece] for piece in row) for row in rows]
    assert all(total <= 40 for total in totals)
    assert all(row.tolist() == sorted(row.tolist()) for row in rows)
    halves = [total for total in totals if total <= 20]
    assert len(halves) <= 1, "two rows that are half empty would have been one"
    assert len(rows) <= max(1, 11 / 9 * sum(lengths) / 40 + 1) or max(lengths) > 8


def test_a_real_mix_of_lengths_fills_rows_to_more_than_99_percent() -> None:
    lengths = np.maximum(2, np.exp(np.random.default_rng(1).normal(6.3, 1.1, 30_000))).astype(np.int64)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    for seq_len in (2048, 8192):
        grid = pack_grid([offsets], tokens=offsets[-1:], seq_len=seq_len, live=[None])
        assert grid.fill >= 0.99


@settings(max_examples=30)
@given(
    shards=st.lists(st.lists(st.integers(0, 60_000), min_size=1, max_size=150), min_size=1, max_size=3), data=st.data()
)
def test_a_group_says_where_its_packs_end_and_which_packs_a_token_may_be_in(
    shards: list[list[int]], data: st.DataObject
) -> None:
    offsets = [np.cumsum([0, *lengths]) for lengths in shards]
    tokens = np.array([each[-1] for each in offsets])
    if not any(length > 1 for lengths in shards for length in lengths):
        return
    grid = pack_grid(offsets, tokens=tokens, seq_len=511, live=[None] * len(shards))
    for shard in range(len(shards)):
        packs = np.arange(grid.run_start[shard], grid.run_start[shard] + grid.run_length[shard])
        ends = grid.end_in(np.full(len(packs), shard), packs)
        assert (np.diff(ends) >= 0).all()
        for pack in packs[:: max(1, len(packs) // 5)].tolist():
            spans = list(grid.spans(pack))
            assert max(span.stop for span in spans) <= ends[pack - packs[0]] <= tokens[shard]
            span = data.draw(st.sampled_from(spans))
            low, high = grid.samples_of(np.array([shard]), np.array([span.start]), np.array([span.stop - 1]))
            assert packs[0] <= low[0] <= pack <= high[0] <= packs[-1]


@pytest.mark.parametrize("world", [1, 3])
def test_every_document_comes_whole_and_once(dataset: Dataset, world: int) -> None:
    ranks = [
        Loader(dataset, seq_len=SEQ_LEN, global_batch=4, rank=Rank(rank, world), options=PACKED)
        for rank in range(world)
    ]
    assert isinstance(ranks[0]._stream.grid, PackGrid)
    found: Counter[tuple[int, ...]] = Counter()
    for step in zip(*ranks, strict=True):
        for batch in step:
            for tokens, mask in pieces_in(batch):
                found[tokens] += 1
                assert mask == (False, *[True] * (len(tokens) - 1))
    assert found == pieces_of(documents_of(dataset))


def test_buckets_are_rectangles_within_the_budget_with_each_document_once(dataset: Dataset) -> None:
    options = LoaderSettings(lanes=4, window=4, threads=0, packing="buckets", epochs=1, memory_bytes=2**20)
    found: Counter[tuple[int, ...]] = Counter()
    padding = total = 0
    for batch in Loader(dataset, seq_len=SEQ_LEN, global_batch=3, options=options):
        starts = {(row, at) for row, at in batch.document_starts.tolist()}
        for row, (tokens, mask) in zip(np.flatnonzero(batch.valid).tolist(), batch.sequences(), strict=True):
            assert tokens.size <= SEQ_LEN + 1
            assert not batch.tokens[row, tokens.size :].any()
            for at, (sequence, learned) in enumerate(zip(tokens, mask, strict=True)):
                length = 1 + int(np.count_nonzero(learned))
                assert learned.tolist() == [0] + [1] * (length - 1) + [0] * (len(sequence) - length)
                assert not sequence[length:].any()
                assert (row, at * tokens.shape[1]) in starts
                found[tuple(sequence[:length].tolist())] += 1
                padding, total = padding + len(sequence) - length, total + len(sequence)
    assert found == pieces_of(documents_of(dataset))
    assert padding < 0.1 * total, "documents of a row are of similar length"
    with pytest.raises(ConfigError, match="similar length"):
        next(Loader(dataset, seq_len=SEQ_LEN, global_batch=3, options=PACKED)).sequences()


def test_it_resumes_everywhere_and_on_other_ranks(dataset: Dataset) -> None:
    def open_at(state: object, rank: Rank = Rank(), batch: int = 4) -> Loader:  # noqa: B008
        loader = Loader(dataset, seq_len=SEQ_LEN, global_batch=batch, seed=5, rank=rank, options=PACKED)
        if state is not None:
            loader.load_state_dict(json.loads(json.dumps(state)))
        return loader

    check_resumes_everywhere(open_at, steps=20)
    whole = [next(loader).fingerprint() for loader in [open_at(None, batch=8)] for _ in range(5)]
    state, found = open_at(None).state_dict(), []
    for step in range(5):
        ranks = [open_at(state, Rank(rank, 1 + step), 8) for rank in range(1 + step)]
        found.append(sum(next(rank).fingerprint() for rank in ranks) % 2**64)
        state = ranks[0].state_dict()
    assert found == whole
    with pytest.raises(ResumeError, match="packing"):
        Loader(dataset, seq_len=SEQ_LEN, global_batch=4, seed=5).load_state_dict(state)


def test_samples_by_number_and_documents_of_a_batch_agree(dataset: Dataset) -> None:
    loader = Loader(dataset, seq_len=SEQ_LEN, global_batch=4, options=PACKED)
    reader = SampleReader(dataset, seq_len=SEQ_LEN, options=PACKED)
    for _ in range(4):
        batch = next(loader)
        again = reader.read(batch.positions)
        assert np.array_equal(again.tokens, batch.tokens)
        assert np.array_equal(again.columns["loss_mask"], batch.columns["loss_mask"])
        lengths = [span.sample_tokens[1] - span.sample_tokens[0] for span in batch.documents()]
        assert lengths == [len(tokens) for tokens, _ in pieces_in(batch)]


@pytest.mark.parametrize("deletions", ["mask", "compact"])
def test_deleted_documents_are_masked_or_left_out(deletions: str) -> None:
    url = f"memory://packing-{os.getpid()}-{deletions}"
    whole = make_dataset(url, SHARDS, block_bytes=128, name=deletions)
    ids = whole.documents(0)["id"].to_pylist()
    first = Loader(whole, seq_len=SEQ_LEN, global_batch=4, options=PACKED)
    next(first)
    ds.delete(url, ids=[ids[1], ids[8]])
    documents = documents_of(whole)
    gone = {documents[1], documents[8]}
    options = LoaderSettings(
        **{
            **{name: getattr(PACKED, name) for name in PACKED.__struct_fields__},
            "deletions": deletions,
            "end_of_text": 9,
        }
    )
    loader = Loader(ds.open(url), seq_len=SEQ_LEN, global_batch=4, options=options)
    if deletions == "mask":
        loader.load_state_dict(first.state_dict())  # A run goes on after a delete.
        loader = Loader(ds.open(url), seq_len=SEQ_LEN, global_batch=4, options=options)
    found: Counter[tuple[int, ...]] = Counter()
    blanked = 0
    for batch in loader:
        assert batch.loss_mask is not None
        width = SEQ_LEN + 1
        starts = [row * width + at for row, at in batch.document_starts.tolist()]
        flat, mask = batch.tokens.reshape(-1), batch.loss_mask.reshape(-1)
        for low, high in zip(starts, [*starts[1:], 10**9], strict=True):
            tokens = flat[low : min(high, (low // width + 1) * width)]
            if mask[low : min(high, (low // width + 1) * width)].any():
                found[tuple(tokens.tolist())] += 1
            elif tokens.any():
                assert set(tokens.tolist()) == {9}
                blanked += len(tokens)
    assert found == pieces_of([document for document in documents if document not in gone])
    assert bool(blanked) == (deletions == "mask")


def test_what_is_held_back_is_not_packed(dataset: Dataset) -> None:
    documents = documents_of(dataset)
    for kept in (3, 150, 400):
        part = Stretch(dataset, start=0, stop=kept)
        ends = np.cumsum([len(document) for document in documents])
        left = [
            document[: max(0, kept - int(end) + len(document))] for document, end in zip(documents, ends, strict=True)
        ]
        found: Counter[tuple[int, ...]] = Counter()
        for batch in Loader(part, seq_len=SEQ_LEN, global_batch=1, options=PACKED):
            found.update(tokens for tokens, _ in pieces_in(batch))
        assert found == pieces_of(left)


def test_it_mixes_and_widens(tmp_path: Path) -> None:
    wide = make_dataset(str(tmp_path / "wide"), [[40, 3, 20]], dtype="uint32", name="wide", block_bytes=128)
    narrow = make_dataset(f"memory://packing-{os.getpid()}-narrow", [[9, 9, 50], [12]], name="narrow", block_bytes=128)
    options = LoaderSettings(lanes=4, window=4, threads=0, packing="best_fit")
    mixture = ds.Mixture({"narrow": narrow, "wide": wide}, epochs={"narrow": 1, "wide": 1})
    found: Counter[tuple[int, ...]] = Counter()
    for batch in Loader(mixture, seq_len=SEQ_LEN, global_batch=2, options=options):
        found.update(tokens for tokens, _ in pieces_in(batch))
    assert found == pieces_of(documents_of(narrow)) + pieces_of(documents_of(wide))


@pytest.mark.parametrize("memory_bytes", [2**20, 600])
@pytest.mark.filterwarnings("ignore:memory_bytes:RuntimeWarning")
def test_zeros_between_sequences_are_there_in_whatever_way_a_row_is_read(tmp_path: Path, memory_bytes: int) -> None:
    lengths = [[9, 5, 4, 50], [12, 3, 3]]
    narrow = make_dataset(f"memory://gaps-{os.getpid()}-{memory_bytes}", lengths, name="narrow", block_bytes=128)
    wide = make_dataset(str(tmp_path / "wide"), [[8, 4, 4, 3]], dtype="uint32", name="wide", block_bytes=128)
    options = LoaderSettings(lanes=4, window=4, threads=0, packing="buckets", memory_bytes=memory_bytes)
    for sets in ({"narrow": narrow}, {"narrow": narrow, "wide": wide}):
        found: Counter[tuple[int, ...]] = Counter()
        for batch in Loader(
            ds.Mixture(sets, epochs=dict.fromkeys(sets, 1)), seq_len=SEQ_LEN, global_batch=3, options=options
        ):
            found.update(tokens for tokens, _ in pieces_in(batch))
        assert found == sum((pieces_of(documents_of(one)) for one in sets.values()), Counter())


def test_attention_stays_within_a_document(dataset: Dataset) -> None:
    loader = Loader(dataset, seq_len=SEQ_LEN, global_batch=4, options=PACKED)
    batch = next(loader)
    inputs = torch.from_numpy(batch.tokens[:, :-1].astype(np.int64))
    layout = document_layout(inputs, starts=torch.from_numpy(batch.document_starts))
    for row, at in batch.document_starts.tolist():
        if at < SEQ_LEN:
            assert layout.position_ids[row, at] == 0
    assert int((layout.position_ids == 0).sum()) == sum(at < SEQ_LEN for _, at in batch.document_starts.tolist())
    assert layout.cu_seqlens.tolist()[-1] == inputs.numel()


def test_what_cannot_be_packed_is_refused() -> None:
    short = make_dataset(f"memory://packing-{os.getpid()}-short", [[1, 1, 0]], name="short")
    with pytest.raises(ConfigError, match="nothing to pack"):
        Loader(short, seq_len=SEQ_LEN, global_batch=1, options=PACKED)
    plain = Loader(make_dataset(f"memory://packing-{os.getpid()}-plain", [[400]], name="p"), seq_len=8, global_batch=1)
    with pytest.raises(ConfigError, match="only packed rows"):
        next(plain).document_starts  # noqa: B018 - a property that raises

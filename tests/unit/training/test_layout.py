"""A table of sizes is right, or refused before anything starts; every rank has a place of its own."""

import pytest

from datastore.errors import ConfigError
from datastore.testing.examples import tiny_settings
from datastore.training.parallel.layout import Layout, Place, check_model, layout_of
from datastore.training.settings import ModelSettings


def test_without_a_table_every_rank_has_a_copy() -> None:
    assert layout_of(tiny_settings("none"), 4) == Layout(data=4)


def test_data_is_what_the_other_sizes_leave() -> None:
    assert layout_of(tiny_settings("none", "parallel.shard=2"), 6) == Layout(data=3, shard=2)
    assert layout_of(tiny_settings("none", "parallel.tensor=2"), 2) == Layout(tensor=2)


@pytest.mark.parametrize(
    ("world", "sizes", "fact"),
    [
        (3, ["parallel.shard=2"], "do not multiply"),
        (4, ["parallel.data=3"], "do not multiply"),
        (3, ["parallel.context=2"], "do not multiply"),
        (2, ["parallel.context=2", "data.seq_len=31"], "data.seq_len"),
        (2, ["parallel.context=2", 'objective={use="masked", mask_token=9}'], "a sequence cannot be shared"),
        (2, ["parallel.context=2", "sync.use=int8"], "parallel.data alone"),
        (2, ["parallel.tensor=2", 'objective={use="causal", chunked=true}'], "output layer on every rank"),
        (2, ["parallel.pipeline=2", 'objective={use="chat", chunked=true}'], "output layer on every rank"),
        (3, ["parallel.tensor=3"], "model.heads"),
        (4, ["parallel.tensor=4"], "model.kv_heads"),
        (2, ["parallel.tensor=2", "data.seq_len=31"], "data.seq_len"),
        (2, ["parallel.tensor=2", "model.vocab_size=97"], "model.vocab_size"),
        (2, ["parallel.tensor=2", "model.mlp_width=33"], "model.mlp_width"),
        (6, ["parallel.tensor=2", "parallel.shard=3"], "model.width"),
        (3, ["parallel.pipeline=3"], "model.layers"),
        (2, ["parallel.pipeline=2", "parallel.interleave=2"], "model.layers"),
        (2, ["parallel.tensor=2", "train.compile=true"], "compiled blocks"),
        (4, ["parallel.pipeline=2", "parallel.tensor=2", "train.compile=true"], "compiled blocks"),
        (2, ["parallel.tensor=2", "train.precision=fp8"], "not cut, rounded or packed"),
        (1, ["train.precision=fp8", 'hooks=[{use="quantize", bits=8, qat_from=0}]'], "qat_from = 0"),
        (1, ["train.precision=fp8_emulated", 'hooks=[{use="adapt", base_bits=4}]'], "base_bits = 4"),
        (1, ["train.precision=fp8", "data.seq_len=40"], "multiple of 16"),
        (2, ["train.precision=fp8", "data.seq_len=48", "parallel.context=2"], "multiple of 16"),
        (13, [], "more ranks than samples"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(world: int, sizes: list[str], fact: str) -> None:
    with pytest.raises(ConfigError, match=fact) as caught:
        layout_of(tiny_settings("none", *sizes), world)
    assert caught.value.hint


def test_ranks_that_share_sequences_have_the_same_samples_and_neighbouring_tokens() -> None:
    places = [Place(Layout(data=2, shard=2, context=2, tensor=2), rank) for rank in range(16)]
    assert [(one.reader, one.slice) for one in places if one.tensor == 0] == [
        (0, 0), (1, 0), (0, 1), (1, 1), (2, 0), (3, 0), (2, 1), (3, 1),
    ]  # fmt: skip


def test_ranks_that_read_the_same_samples_need_no_sample_each() -> None:
    small = tiny_settings("none", "parallel.tensor=2", "data.global_batch=1")
    assert layout_of(small, 2).readers == 1


def test_a_vocabulary_that_is_not_known_yet_is_checked_later() -> None:
    check_model(ModelSettings(), Layout(tensor=2), seq_len=8)
    with pytest.raises(ConfigError, match=r"model\.vocab_size"):
        check_model(ModelSettings(vocab_size=51), Layout(tensor=2), seq_len=8)


@pytest.mark.parametrize(
    "layout", [Layout(2, 3, 2, 2), Layout(4), Layout(1, 1, 4, 1), Layout(1, 2, 1, 3, 2), Layout(2, 2, 2, context=3)]
)
def test_every_share_of_a_batch_has_one_rank_that_speaks(layout: Layout) -> None:
    places = [Place(layout, rank) for rank in range(layout.world)]
    assert len({(place.stage, place.reader, place.slice, place.tensor) for place in places}) == layout.world
    assert sorted(place.reader for place in places if place.speaks) == list(range(layout.readers))

"""Gradients as bytes, and what is refused before a rank starts."""

import pytest
import torch
from torch import Tensor

from datastore.config import settings_from
from datastore.errors import ConfigError
from datastore.training.parallel.layout import layout_of
from datastore.training.parallel.servers import deal
from datastore.training.parallel.sync.codecs import Blocks, Brief, Codec, Largest, Plain
from datastore.training.parallel.sync.feedback import Feedback
from datastore.training.parallel.sync.lowrank import LowRank
from datastore.training.settings import Settings

CODECS: dict[str, Codec] = {
    "fp32": Plain(),
    "bf16": Brief(),
    "int8": Blocks(bits=8, block=16),
    "int4": Blocks(bits=4, block=16),
    "top_k": Largest(keep=0.1),
}


@pytest.fixture
def values() -> Tensor:
    return torch.randn((3, 50), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "row_bytes"),
    [("fp32", 200), ("bf16", 100), ("int8", 4 * 4 + 64), ("int4", 4 * 4 + 32), ("top_k", 5 * 8)],
)
def test_a_row_takes_as_many_bytes_as_are_promised(name: str, row_bytes: int, values: Tensor) -> None:
    assert CODECS[name].encode(values).shape == (3, row_bytes)


@pytest.mark.parametrize(("name", "levels"), [("int8", 127), ("int4", 7)])
def test_a_value_of_a_block_is_off_by_half_a_level_at_most(name: str, levels: int, values: Tensor) -> None:
    codec = CODECS[name]
    found = codec.decode(codec.encode(values), 50)
    for row, other in zip(values, found, strict=True):
        for block, seen in zip(row.split(16), other.split(16), strict=True):
            assert (block - seen).abs().max() <= block.abs().max() / levels / 2 * 1.001
            assert torch.isclose(seen.abs().max(), block.abs().max())


def test_the_largest_values_come_through_and_nothing_else(values: Tensor) -> None:
    found = CODECS["top_k"].decode(CODECS["top_k"].encode(values), 50)
    for row, other in zip(values, found, strict=True):
        assert set(other.nonzero().flatten().tolist()) == set(row.abs().argsort(descending=True)[:5].tolist())
        assert torch.equal(other[other != 0], row[other != 0])


def test_nothing_is_lost_in_four_bytes(values: Tensor) -> None:
    assert torch.equal(Plain().decode(Plain().encode(values), 50), values)


@pytest.mark.parametrize("name", list(CODECS))
def test_zeros_are_zeros(name: str) -> None:
    codec = CODECS[name]
    assert not codec.decode(codec.encode(torch.zeros((2, 50))), 50).any()


@pytest.mark.parametrize("name", list(CODECS))
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_seen_on_the_other_side(name: str, bad: float, values: Tensor) -> None:
    codec = CODECS[name]
    values[1, 20] = bad
    found = codec.decode(codec.encode(values), 50)
    assert not found[1].isfinite().all()
    assert found[0].isfinite().all()


@pytest.mark.parametrize("name", list(CODECS))
def test_what_a_message_leaves_out_goes_with_a_later_one(name: str) -> None:
    """After any number of messages, what was sent and the rest are all that was to be sent."""
    feedback, draw = Feedback(CODECS[name], world=2), torch.Generator().manual_seed(2)
    wanted, sent = torch.zeros((2, 50)), torch.zeros((2, 50))
    for _ in range(20):
        values = torch.randn((2, 50), generator=draw)
        codes = feedback._encode("key", values)
        assert codes is not None
        wanted += values
        sent += CODECS[name].decode(codes, 50)
    assert torch.allclose(sent + feedback.rests["key"], wanted, atol=1e-4)
    assert feedback.rests["key"].any() == (name != "fp32")


def test_a_step_that_overflowed_leaves_no_rest() -> None:
    feedback = Feedback(CODECS["int8"], world=2)
    feedback._encode("key", torch.full((2, 50), float("inf")))
    assert not feedback.rests["key"].any()


def test_parameters_are_dealt_out_evenly_the_largest_first() -> None:
    assert deal([1, 8, 3, 4], 2) == [1, 0, 1, 1]
    assert deal([5, 5], 3) == [0, 1]


@pytest.mark.parametrize(
    ("sync", "world", "parallel", "match"),
    [
        ("int8", 4, {"shard": 2}, "parallel.data alone or parallel.shard alone"),
        ("int8", 2, {"tensor": 2}, "parallel.data alone or parallel.shard alone"),
        ("powersgd", 2, {"shard": 2}, "powersgd needs the whole model"),
        ("parameter_server", 2, {"pipeline": 2}, "parameter_server needs the whole model"),
        ("diloco", 2, {"tensor": 2}, "diloco needs the whole model"),
    ],
)
def test_a_combination_that_cannot_work_is_refused_before_a_rank_starts(
    sync: str, world: int, parallel: dict[str, int], match: str
) -> None:
    table = {"data": {"url": "data"}, "model": {"tied": False}, "sync": {"use": sync}, "parallel": parallel}
    with pytest.raises(ConfigError, match=match):
        layout_of(settings_from(Settings, table, where="run.toml"), world)


def test_more_servers_than_ranks_and_scaled_losses_are_refused() -> None:
    table = {"data": {"url": "data"}, "sync": {"use": "parameter_server", "servers": 3}}
    with pytest.raises(ConfigError, match="more parameter servers than ranks"):
        layout_of(settings_from(Settings, table, where="run.toml"), 2)
    table = {"data": {"url": "data"}, "sync": {"use": "int8"}, "train": {"precision": "fp16"}}
    with pytest.raises(ConfigError, match="float16"):
        layout_of(settings_from(Settings, table, where="run.toml"), 2)


def matrix_of_rank(rank: int) -> Tensor:
    draw = torch.Generator().manual_seed(3)
    return torch.randn((24, rank), generator=draw) @ torch.randn((rank, 32), generator=draw)


def test_a_matrix_that_is_a_product_of_thin_ones_comes_through_whole() -> None:
    mean, matrix = LowRank(1, rank=4), matrix_of_rank(4)
    sent = matrix.clone()
    mean.mean("key", [sent])
    assert torch.allclose(sent, matrix, atol=1e-4)


def test_what_a_product_leaves_of_a_matrix_goes_with_later_ones() -> None:
    mean, matrix, sent = LowRank(1, rank=2), matrix_of_rank(8), torch.zeros(24, 32)
    for _ in range(30):
        message = matrix.clone()
        mean.mean("key", [message])
        sent += message
    assert torch.allclose(sent + mean.rests["key.0.rest"], 30 * matrix, atol=1e-2)
    assert (sent / 30 - matrix).norm() < 0.2 * matrix.norm()


@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")])
def test_a_low_rank_mean_recovers_from_one_bad_step(bad: float) -> None:
    """torch's own hook hands a NaN on for ever."""
    mean, matrix = LowRank(1, rank=4), matrix_of_rank(4)
    mean.mean("key", [matrix * bad])
    sent = matrix.clone()
    mean.mean("key", [sent])
    assert torch.allclose(sent, matrix, atol=1e-4)

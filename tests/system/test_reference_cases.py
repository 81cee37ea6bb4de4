"""The cases that say what data parallel training is, taken through our own ranks, loop and optimizer."""

import re
from itertools import pairwise
from typing import Any

import pytest

from datastore.training.launcher import spawn


@pytest.mark.parametrize(
    "layout",
    [
        {},
        {"data": 1, "shard": 2},
        {"data": 1, "tensor": 2},
        {"sync": {"use": "parameter_server"}},
        {"sync": {"use": "diloco", "every": 2, "outer_lr": 0.9, "outer_momentum": 0.1}},
    ],
    ids=["copies", "sharded", "tensor parallel", "parameter server", "diloco"],
)
def test_two_ranks_train_a_linear_layer_and_print_the_same_falling_loss(
    layout: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    first, second = spawn("training_programs:linear_layer", layout, processes=2)
    assert first == second
    assert len(first) == 10
    assert all(later < earlier for earlier, later in pairwise(first))
    printed = re.findall(r"rank (\d) iteration (\d+) loss (\S+)", capfd.readouterr().out)
    for rank in ("0", "1"):
        assert [float(loss) for who, _, loss in printed if who == rank] == first


@pytest.mark.parametrize("world", [2, 4, pytest.param(8, marks=pytest.mark.slow)])
def test_a_gradient_of_a_tenth_on_every_node_moves_every_parameter_by_a_tenth_of_the_rate(world: int) -> None:
    lr = 0.5
    for values in spawn("training_programs:eight_parameters", {"lr": lr}, processes=world):
        assert values == pytest.approx([1 - 0.1 * lr] * 8, abs=1e-7)

"""Two steps held against each other: what is the same is not read, what changed is measured, whatever the layout and the kind of number."""

import itertools
import math
import os

import pytest
import torch

from datastore.checkpoint.checkpointer import Checkpointer
from datastore.checkpoint.difference import TensorChange, difference
from datastore.errors import ConfigError
from datastore.storage.base import Storage
from datastore.storage.resolve import open_storage

NUMBER = itertools.count()


@pytest.fixture
def storage() -> Storage:
    return open_storage(f"memory://difference-{os.getpid()}-{next(NUMBER)}")


def saved(storage: Storage, *states: dict[str, object]) -> None:
    with Checkpointer(storage) as ck:
        for step, state in enumerate(states, 1):
            ck.save(step, {"model": state}, metrics={"loss": 1.0 / step}, blocking=True)


def test_what_changed_is_told_with_how_much_and_the_rest_is_counted(storage: Storage) -> None:
    one = {
        "same": torch.ones(5),
        "w": torch.tensor([3.0, 4.0, 0.0, 0.0]),
        "bf16": torch.ones(4, dtype=torch.bfloat16),
        "ids": torch.arange(4),
        "flags": torch.tensor([True, False]),
        "gone": torch.zeros(1),
        "shape": torch.zeros(2, 2),
        "zero": torch.zeros(2),
        "n": 1,
        "deep": {"x": [1, 2], "nan": math.nan},
    }
    other = {
        "same": torch.ones(5),
        "w": torch.tensor([3.0, 4.0, 0.0, 1.0]),
        "bf16": torch.tensor([1.0, 1.5, 1.0, 1.0], dtype=torch.bfloat16),
        "ids": torch.tensor([0, 1, 2, 2**40]),
        "flags": torch.tensor([True, True]),
        "new": torch.zeros(1),
        "shape": torch.zeros(4),
        "zero": torch.ones(2),
        "n": 2,
        "deep": {"x": [1, 3], "nan": math.nan},
    }
    saved(storage, one, other)
    found = difference((storage, 1), (storage, 2))
    changed = {change.name.removeprefix("model/"): change for change in found.changed}
    assert set(changed) == {"w", "bf16", "ids", "flags", "shape", "zero"}
    assert changed["w"] == TensorChange("model/w", "F32[4]", "F32[4]", 0.25, 1.0, 0.2)
    assert changed["bf16"].largest == 0.5
    assert changed["bf16"].changed == 0.25
    assert changed["ids"].largest == 2.0**40 - 3
    assert changed["flags"].changed == 0.5
    assert changed["shape"] == TensorChange("model/shape", "F32[2, 2]", "F32[4]")
    assert changed["zero"].relative == math.inf
    assert (found.same, found.only_before, found.only_after) == (1, ["model/gone"], ["model/new"])
    assert found.values == {"model/n": (1, 2), "model/deep/x/1": (2, 3)}
    assert found.metrics == {"loss": (1.0, 0.5)}


def test_a_step_differs_from_itself_in_nothing_and_reads_nothing(storage: Storage) -> None:
    state = {"w": torch.randn(1000), "nan": torch.tensor([math.nan, 1.0])}
    saved(storage, state, {**state, "x": 1})
    before = storage.statistics()["get_ranges"].calls if "get_ranges" in storage.statistics() else 0
    found = difference((storage, 1), (storage, 2))
    assert (found.same, found.changed, found.values) == (2, [], {"model/x": (None, 1)})
    after = storage.statistics()["get_ranges"].calls if "get_ranges" in storage.statistics() else 0
    assert after == before


def test_not_a_number_on_one_side_is_shown_and_on_both_sides_is_no_change(storage: Storage) -> None:
    one = {"w": torch.tensor([1.0, math.nan, math.inf])}
    saved(storage, one, {"w": torch.tensor([math.nan, math.nan, math.inf])})
    (change,) = difference((storage, 1), (storage, 2)).changed
    assert change.changed == pytest.approx(1 / 3)
    assert change.largest is not None
    assert math.isnan(change.largest)


def test_runs_and_kinds_of_numbers_are_compared(storage: Storage) -> None:
    other = open_storage(f"{storage.url}-other")
    kinds = [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.uint16, torch.int8, torch.float64]
    saved(
        storage,
        {str(kind): torch.ones(4).to(kind) for kind in kinds} | {"empty": torch.empty(0), "scalar": torch.tensor(1.0)},
    )
    saved(
        other,
        {str(kind): torch.zeros(4).to(kind) for kind in kinds} | {"empty": torch.empty(0), "scalar": torch.tensor(3.0)},
    )
    found = difference((storage, 1), (other, 1))
    assert found.same == 1
    assert {change.name for change in found.changed} == {f"model/{kind}" for kind in kinds} | {"model/scalar"}
    assert all(change.changed for change in found.changed)
    scalar = next(change for change in found.changed if change.name == "model/scalar")
    assert (scalar.largest, scalar.relative) == (2.0, 2.0)


def test_one_item_is_compared_and_nothing_else_is_read(storage: Storage) -> None:
    with Checkpointer(storage) as ck:
        for step in (1, 2):
            items = {"model": {"w": torch.full((3,), step)}, "optim": {"m": torch.full((3,), step), "lr": step}}
            ck.save(step, items, blocking=True)
    read: list[tuple[int, int]] = []
    found = difference((storage, 1), (storage, 2), item="model", progress=lambda *at: read.append(at))
    assert ([change.name for change in found.changed], found.values, read[-1]) == (["model/w"], {}, (1, 1))
    with pytest.raises(ConfigError, match="neither step has such an item"):
        difference((storage, 1), (storage, 2), item="modle")

"""Models, optimizers and schedulers through a checkpoint: what fits is restored bit for bit, what does not is listed."""

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from datastore.checkpoint.checkpointer import Checkpointer
from datastore.checkpoint.format.manifest import step_key
from datastore.checkpoint.inspect import newest_values
from datastore.checkpoint.items import PerRank
from datastore.errors import ConfigError, CorruptError, DatastoreError, MissingError, ResumeError
from datastore.storage.resolve import open_storage

COLOURS, WIDTH = 50, 8


class Tiny(nn.Module):
    """An embedding tied to the output, a batch norm with buffers, and a non-persistent buffer."""

    def __init__(self, width: int = WIDTH, *, tied: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(COLOURS, width)
        self.norm = nn.BatchNorm1d(width)
        self.out = nn.Linear(width, COLOURS, bias=False)
        if tied:
            self.out.weight = self.embed.weight
        self.register_buffer("scratch", torch.zeros(3), persistent=False)

    def forward(self, numbers: torch.Tensor) -> torch.Tensor:
        return self.out(self.norm(self.embed(numbers)))


def trained(seed: int = 0, **options: Any) -> tuple[Tiny, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = Tiny(**options)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, steps=3)
    return model, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, *, steps: int) -> list[float]:
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.arange(20)).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def equal(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal(one[key], other[key]) for key in one)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(equal, one, other))
    return bool(one == other)


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "run")


def test_training_goes_on_exactly_as_if_it_had_not_been_stopped(url: str) -> None:
    model, optimizer = trained()
    with Checkpointer(url) as ck:
        ck.save(3, {"model": model, "optim": optimizer}, blocking=True)
    expected = train(model, optimizer, steps=4)

    torch.manual_seed(99)
    again = Tiny()
    fresh = torch.optim.AdamW(again.parameters(), lr=0.5)
    with Checkpointer(url) as ck:
        info = ck.restore({"model": again, "optim": fresh})
    assert info.step == 3
    assert train(again, fresh, steps=4) == expected
    assert equal(again.state_dict(), model.state_dict())
    assert equal(fresh.state_dict(), optimizer.state_dict())


def test_a_warm_optimizer_is_filled_where_its_state_is(url: str) -> None:
    model, optimizer = trained()
    other, warm = trained(seed=1)
    places = [state["exp_avg"].data_ptr() for state in warm.state.values()]
    with Checkpointer(url) as ck:
        ck.save(1, {"model": model, "optim": optimizer}, blocking=True)
        ck.restore({"model": other, "optim": warm})
    assert equal(warm.state_dict(), optimizer.state_dict())
    assert [state["exp_avg"].data_ptr() for state in warm.state.values()] == places


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # torch's own, as it loads its compiler
@pytest.mark.parametrize("save_compiled", [True, False])
def test_a_compiled_model_and_a_plain_one_read_each_others_checkpoints(url: str, *, save_compiled: bool) -> None:
    model, _ = trained()
    other, _ = trained(seed=1)
    inner, _ = trained(seed=2)
    wrapped = nn.ModuleDict({"a": torch.compile(inner, backend="eager")})
    with Checkpointer(url) as ck:
        ck.save(1, {"model": torch.compile(model, backend="eager") if save_compiled else model}, blocking=True)
        ck.restore({"model": other if save_compiled else torch.compile(other, backend="eager")})
        ck.save(2, {"model": nn.ModuleDict({"a": model})}, blocking=True)
        ck.restore({"model": wrapped})
    assert equal(other.state_dict(), model.state_dict())
    assert equal(inner.state_dict(), model.state_dict())


def test_a_part_is_a_safetensors_file_aligned_to_pages_and_tied_weights_are_in_it_once(url: str) -> None:
    model, optimizer = trained()
    with Checkpointer(url) as ck:
        ck.save(1, {"model": model, "optim": optimizer}, blocking=True)
        commit = ck.save(1, {"model": model, "optim": optimizer}, blocking=True).committed()
    part = Path(url) / commit.parts[0].part
    found = load_file(part)
    assert (int.from_bytes(part.read_bytes()[:8], "little") + 8) % 4096 == 0
    assert torch.equal(found["model/embed.weight"], model.embed.weight)
    assert torch.equal(found["optim/state/0/exp_avg"], optimizer.state_dict()["state"][0]["exp_avg"])
    assert "model/out.weight" not in found


def test_weights_that_were_saved_apart_do_not_go_into_tied_ones(url: str) -> None:
    apart, _ = trained(tied=False)
    tied, _ = trained()
    before = {key: value.clone() for key, value in tied.state_dict().items()}
    with Checkpointer(url) as ck:
        ck.save(1, {"model": apart}, blocking=True)
        with pytest.raises(ResumeError, match=r"model/out.weight: shares its memory with model/embed.weight"):
            ck.restore({"model": tied})
        assert equal(tied.state_dict(), before)
        ck.save(2, {"model": tied}, blocking=True)
        ck.restore({"model": apart})
    assert torch.equal(apart.embed.weight, apart.out.weight)


def test_every_difference_is_listed_and_nothing_is_touched_or_cast(url: str) -> None:
    saved = {"same": torch.ones(2), "shape": torch.ones(2), "type": torch.ones(2), "gone": torch.ones(1), "kind": 1}
    target = {
        "same": torch.zeros(2),
        "shape": torch.zeros(3),
        "type": torch.zeros(2, dtype=torch.float64),
        "new": torch.zeros(1),
        "kind": torch.zeros(1),
    }
    with Checkpointer(url) as ck:
        ck.save(1, {"state": saved}, blocking=True)
        with pytest.raises(ResumeError) as caught:
            ck.restore({"state": target})
    text = str(caught.value)
    for line in (
        "state/gone: saved, but not expected",
        "state/new: expected, but not saved",
        "state/shape: saved as F32[2], expected as F32[3]",
        "state/type: saved as F32[2], expected as F64[2]",
        "state/kind: saved as no tensor, expected as F32[1]",
    ):
        assert line in text
    assert all(not tensor.any() for tensor in target.values())


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod."])
def test_names_with_what_a_wrapper_puts_in_front_are_told_in_one_line(prefix: str, url: str) -> None:
    model = Tiny()
    bare = dict(model.state_dict())
    wrapped = {f"{prefix}{name}": tensor for name, tensor in bare.items()}
    with Checkpointer(url) as ck:
        ck.save(1, {"model": wrapped}, blocking=True)
        for target in (model, bare):
            with pytest.raises(ResumeError, match=rf"model/{prefix}\S+: saved with `{prefix}` in front") as caught:
                ck.restore({"model": target})
            assert "not expected" not in str(caught.value)
        ck.save(2, {"model": bare}, blocking=True)
        with pytest.raises(ResumeError, match=f"expected with `{prefix}` in front"):
            ck.restore({"model": wrapped})


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (lambda model: nn.Sequential(model, nn.Linear(1, 1)), "expected, but not saved"),
        (lambda _: Tiny(width=WIDTH + 1), f"saved as F32[{COLOURS}, {WIDTH}], expected as F32[{COLOURS}, {WIDTH + 1}]"),
        (lambda model: model.to(torch.bfloat16), "expected as BF16"),
    ],
)
def test_another_model_is_refused(url: str, change: Any, line: str) -> None:
    with Checkpointer(url) as ck:
        ck.save(1, {"model": Tiny()}, blocking=True)
        with pytest.raises(ResumeError) as caught:
            ck.restore({"model": change(Tiny())})
    assert line in str(caught.value)


def test_an_optimizer_of_another_model_or_dtype_is_refused_before_anything_is_loaded(url: str) -> None:
    model, optimizer = trained()
    wide, narrow = Tiny(width=WIDTH + 1), Tiny().to(torch.bfloat16)
    fewer = torch.optim.AdamW([model.embed.weight])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with Checkpointer(url) as ck:
        ck.save(1, {"model": Tiny(), "optim": optimizer}, blocking=True)
        for wrong, line in (
            (torch.optim.AdamW(wide.parameters()), "optim, parameter 0: saved as F32[50, 8], expected as F32[50, 9]"),
            (torch.optim.AdamW(narrow.parameters()), "expected as BF16[50, 8]"),
            (fewer, "saved with groups of [3] parameters, expected [1]"),
        ):
            with pytest.raises(ResumeError) as caught:
                ck.restore({"model": model, "optim": wrong})
            assert line in str(caught.value)
            assert not wrong.state_dict()["state"]
    assert equal(model.state_dict(), before)


def test_items_are_strict_both_ways_unless_partial(url: str) -> None:
    model, optimizer = trained()
    with Checkpointer(url) as ck:
        ck.save(1, {"model": model, "optim": optimizer}, blocking=True)
        with pytest.raises(ResumeError, match=r"optim: saved, but not expected \(pass partial=True"):
            ck.restore({"model": model})
        with pytest.raises(ResumeError, match="data: expected, but not saved"):
            ck.restore({"model": model, "optim": optimizer, "data": {}}, partial=True)
        assert ck.restore({"model": model}, partial=True).step == 1


class Counter:
    """Something with a state of its own that may refuse what it is given."""

    def __init__(self, *, refuses: DatastoreError | None = None) -> None:
        self.value = 0
        self.refuses = refuses

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if self.refuses:
            raise self.refuses
        self.value = state["value"]


def test_an_object_that_refuses_its_state_does_so_before_the_model_is_touched(url: str) -> None:
    model, _ = trained()
    other, _ = trained(seed=1)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    counter = Counter()
    counter.value = 7
    with Checkpointer(url) as ck:
        ck.save(1, {"model": model, "data": counter}, blocking=True)
        ck.save(2, {"model": model, "data": counter}, blocking=True)
        for reason in (ResumeError("another dataset"), MissingError("no such dataset"), CorruptError("bad dataset")):
            with pytest.raises(ResumeError, match=reason.fact):
                ck.restore({"model": other, "data": Counter(refuses=reason)})
        assert equal(other.state_dict(), before)
        fresh = Counter()
        ck.restore({"model": other, "data": fresh})
    assert fresh.value == 7


class Extra(nn.Linear):
    """A module with extra state, which is no tensor."""

    def __init__(self) -> None:
        super().__init__(2, 2)
        self.extra: Any = {"scale": 1.0}

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None:
        self.extra = state


def test_a_modules_extra_state_and_a_schedulers_values_are_restored(url: str) -> None:
    one, other = Extra(), Extra()
    one.extra = {"scale": 2.5, "seen": [1, 2]}
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(torch.optim.SGD(one.parameters(), 0.1), 10) for _ in "ab"]
    schedules[0].last_epoch = 4
    with Checkpointer(url) as ck:
        ck.save(1, {"model": nn.Sequential(one), "schedule": schedules[0]}, blocking=True)
        ck.restore({"model": nn.Sequential(other), "schedule": schedules[1]})
    assert other.extra == {"scale": 2.5, "seen": [1, 2]}
    assert torch.equal(one.weight, other.weight)
    assert schedules[1].last_epoch == 4


def test_an_item_of_each_rank_is_restored_to_that_rank_only(url: str) -> None:
    state = {"seed": 5}
    with Checkpointer(url) as ck:
        ck.save(1, {"rng": PerRank(state), "model": {"w": torch.ones(1)}}, blocking=True)
        ck.restore({"rng": PerRank(state), "model": {"w": torch.ones(1)}})
    with Checkpointer(url, rank=1, world=2, session="s") as ck, pytest.raises(ResumeError, match="rng@1: expected"):
        ck.restore({"rng": PerRank(state), "model": {}}, agree=lambda value: value)


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (torch.ones(2, device="meta"), "meta device"),
        (torch.ones(2, 2).to_sparse(), "layout"),
        (torch.ones(2, dtype=torch.complex128), "torch.complex128"),
    ],
)
def test_a_tensor_that_cannot_be_stored_is_refused_by_name(url: str, tensor: torch.Tensor, reason: str) -> None:
    with Checkpointer(url) as ck:
        with pytest.raises(ConfigError, match=f"{reason}.*path='state/deep/0'"):
            ck.save(1, {"state": {"deep": [tensor]}})
        assert ck.steps() == []


@pytest.mark.parametrize("items", [{"a/b": {}}, {"": {}}, {"a@1": {}}, {"a": [1]}, {"a": None}, {"__metadata__": {}}])
def test_an_item_needs_a_plain_name_and_a_state(url: str, items: Any) -> None:
    with Checkpointer(url) as ck, pytest.raises(ConfigError):
        ck.save(1, items)


def test_an_empty_run_has_nothing_to_restore_and_reading_writes_nothing(url: str) -> None:
    with Checkpointer(url) as ck:
        assert (ck.steps(), ck.latest()) == ([], None)
        with pytest.raises(MissingError, match="no checkpoint"):
            ck.restore({})
        with pytest.raises(MissingError, match="There are: none"):
            ck.restore({}, step=5)
    assert not Path(url).exists()


@pytest.mark.parametrize(
    "options",
    [{"rank": 1}, {"rank": -1}, {"world": 0}, {"world": 2}, {"session": "a/b"}, {"world": 2, "session": ".hidden"}],
)
def test_a_wrong_rank_world_or_session_is_refused(url: str, options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Checkpointer(url, **options)


def test_a_dataset_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "datastore.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds a dataset, not a run"):
        Checkpointer(tmp_path)


def test_a_saved_step_can_be_looked_into(url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    model, optimizer = trained()
    with Checkpointer(url) as ck:
        ck.save(7, {"model": model, "optim": optimizer}, metrics={"loss": 2.5, "name": "x"}, blocking=True)
        report = ck.inspect(7)
    assert (report.summary.step, report.summary.metrics) == (7, {"loss": 2.5, "name": "x"})
    items = {item.name: item for item in report.items}
    assert items["model"].values["embed.weight"] == f"F32[{COLOURS}, {WIDTH}]"
    assert items["optim"].values["param_groups"][0]["lr"] == 0.01
    assert not caplog.records


def test_looking_at_a_run_from_outside_needs_no_torch() -> None:
    program = "import sys, datastore.checkpoint.inspect, datastore.checkpoint.steps; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_items_without_tensors_are_read_from_the_newest_step_whose_files_are_there(url: str) -> None:
    storage = open_storage(url)
    with pytest.raises(MissingError, match="no checkpoint yet"):
        newest_values(storage, ["data"])
    with Checkpointer(url) as ck:
        for step in (1, 2):
            ck.save(step, {"data": {"cursor": 10 * step}, "model": {"w": torch.full((4,), step)}}, blocking=True)
        assert newest_values(storage, ["data"]) == ({"data": {"cursor": 20}}, ())
        (part,) = ck.inspect(2).parts
    with pytest.raises(MissingError, match=r"lacks an item.*record"):
        newest_values(storage, ["data", "record"])
    (Path(url) / part).unlink()
    values, passed_over = newest_values(storage, ["data"])
    assert values == {"data": {"cursor": 10}}
    assert [reason.partition(":")[0] for reason in passed_over] == ["the checkpoint of step 2 is damaged"]
    storage.delete(step_key(1))
    with pytest.raises(CorruptError, match="no checkpoint of the run is sound"):
        newest_values(storage, ["data"])

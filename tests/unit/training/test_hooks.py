from importlib.metadata import EntryPoint
from typing import Any

import numpy as np
import pytest
import torch

from datastore.errors import ConfigError, DependencyError, ResumeError
from datastore.training.hooks.base import Hook, HookSet, find_hook, make_hooks, numbers_of
from datastore.training.hooks.prune import Prune
from datastore.training.run.changes import changed_hooks, hooks_by_place


class Remembers(Hook):
    def __init__(self, settings: Any) -> None:
        super().__init__(settings)
        self.value = torch.zeros(2)

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value}

    def load_state_dict(self, state: Any) -> None:
        self.value.copy_(state["value"])


def test_a_hook_is_found_by_our_name_by_its_path_and_by_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_hook("prune") is Prune
    assert find_hook("datastore.training.hooks.prune:Prune") is Prune
    point = EntryPoint(name="theirs", value="datastore.training.hooks.prune:Prune", group="datastore.hooks")
    monkeypatch.setattr("datastore.config.entry_points", lambda *, group: [point] if group == point.group else [])
    assert find_hook("theirs") is Prune


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("distil", ConfigError, "known="),
        ("no_such_package:Hook", DependencyError, "missing='no_such_package'"),
        ("datastore.training.hooks.prune:keep_mask", ConfigError, "not a hook"),
        ("datastore.training.hooks.prune:Nothing", ConfigError, "not a hook"),
    ],
)
def test_what_is_no_hook_is_refused(name: str, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        find_hook(name)


def test_a_wrong_setting_of_a_hook_is_named_with_its_place() -> None:
    with pytest.raises(ConfigError, match=r"unknown setting `rate`.*hooks\[1\]"):
        make_hooks([{"use": "prune"}, {"use": "prune", "rate": 2}], where="run.toml")
    with pytest.raises(ConfigError, match="`ratio`"):
        make_hooks([{"use": "prune", "ratio": 0.5}], where="run.toml")


def test_hooks_of_one_kind_keep_their_state_apart() -> None:
    first, second = Remembers(None), Remembers(None)
    first.value += 1
    saved = {
        name: {"value": state["value"].clone()}
        for name, state in HookSet({"0": first, "1": second}).state_dict().items()
    }
    other = {"0": Remembers(None), "1": Remembers(None)}
    HookSet(other).load_state_dict(saved)
    assert [hook.value.tolist() for hook in other.values()] == [[1, 1], [0, 0]]


def test_state_of_other_hooks_is_refused() -> None:
    with pytest.raises(ResumeError, match=r"saved=\['0'\]"):
        HookSet({"1": Remembers(None)}).load_state_dict({"0": {"value": torch.zeros(2)}})
    with pytest.raises(ResumeError, match="no state"):
        Hook(None).load_state_dict({"a": 1})  # type: ignore[arg-type]


def test_a_resume_is_told_which_setting_of_which_hook_differs() -> None:
    before = [{"use": "prune", "ratio": 2.0}, {"use": "ema"}]
    after = [{"use": "prune", "ratio": 4.0, "every": 3}, {"use": "share"}]
    names = changed_hooks(hooks_by_place(before), hooks_by_place(after))
    assert names == {"hooks.0.prune.ratio", "hooks.0.prune.every", "hooks.1.ema", "hooks.1.share"}
    assert changed_hooks(hooks_by_place(before), hooks_by_place(before)) == set()


class Tells(Hook):
    def __init__(self, told: Any) -> None:
        super().__init__(told)

    def metrics(self) -> Any:
        return self.settings


def test_numbers_of_a_hook_may_be_tensors_and_those_of_numpy() -> None:
    found = numbers_of({"0": Tells({"a": 1, "b": 0.5, "c": torch.tensor(1.5), "d": np.float32(2)})}, taken=())
    assert found == {"a": 1, "b": 0.5, "c": 1.5, "d": 2.0}
    assert {type(value) for value in found.values()} == {int, float}


@pytest.mark.parametrize("told", [None, {"a": "much"}, {"a": None}, {"a": torch.zeros(2)}, 3.0])
def test_metrics_that_are_no_numbers_name_the_hook(told: Any) -> None:
    with pytest.raises(ConfigError, match=r"not numbers by name.*Tells"):
        numbers_of({"0": Tells(told)}, taken=())


def test_numbers_of_hooks_keep_their_names_apart() -> None:
    hooks = {"0.prune": Tells({"sparsity": 0.5}), "1.prune": Tells({"sparsity": 0.25, "swapped": 3})}
    assert numbers_of(hooks, taken={"loss"}) == {"sparsity": 0.5, "1.prune.sparsity": 0.25, "swapped": 3}
    with pytest.raises(ConfigError, match=r"what the loop calls its own \(hook='0.prune', names=\['loss'\]\)"):
        numbers_of({"0.prune": Tells({"loss": 1.0})}, taken={"loss", "lr"})

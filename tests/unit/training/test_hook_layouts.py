"""Which hooks train in which layouts: the table in `docs/parallelism.md` is what the code says."""

import re
from pathlib import Path
from typing import Any

import pytest

from datastore.errors import ConfigError
from datastore.training.hooks.base import Hook, acting, make_hooks
from datastore.training.parallel.building import check_hooks
from datastore.training.parallel.layout import Layout

PAGE = Path(__file__).parents[3] / "docs" / "parallelism.md"

ROWS: dict[str, list[dict[str, Any]]] = {
    "`prune` by magnitude or movement": [{"use": "prune"}, {"use": "prune", "method": "movement"}],
    "`prune` by wanda or reconstruct": [{"use": "prune", "method": one} for one in ("wanda", "reconstruct")],
    "`distill`": [{"use": "distill"}],
    "`ema`": [{"use": "ema"}],
    "`share`": [{"use": "share"}],
    "`adapt` by lora, dora or bottleneck": [{"use": "adapt", "method": one} for one in ("lora", "dora", "bottleneck")],
    "`adapt` by adalora": [{"use": "adapt", "method": "adalora"}],
    "`quantize` with `qat_from`": [{"use": "quantize", "qat_from": 2}],
    "`shrink`, and `quantize` as a model leaves": [{"use": "shrink", "layers": 1}, {"use": "quantize"}],
}


def table() -> dict[str, dict[str, bool]]:
    """Return the table of the page: by hook and size, whether it trains."""
    lines = [line[1:-1].split("|") for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| ")]
    start = next(place for place, cells in enumerate(lines) if cells[0].strip() == "hook")
    sizes = [re.sub("`", "", cell).strip() for cell in lines[start][1:]]
    rows = lines[start + 1 : start + 1 + len(ROWS)]
    return {
        cells[0].strip(): {size: cell.strip() == "yes" for size, cell in zip(sizes, cells[1:], strict=True)}
        for cells in rows
    }


def test_the_page_says_which_hooks_train_in_which_layouts() -> None:
    found = table()
    assert found.keys() == ROWS.keys()
    for name, hooks in ROWS.items():
        for hook in hooks:
            made = make_hooks([hook], where="here")
            for size, works in found[name].items():
                layout = Layout(**{size: 2})
                if works:
                    check_hooks(made, layout, differs=False)
                    continue
                with pytest.raises(ConfigError, match=rf"cannot train where.*parallel\.{size}") as caught:
                    check_hooks(made, layout, differs=False)
                assert caught.value.hint


def test_ranks_that_differ_take_no_hook_that_trains() -> None:
    check_hooks(make_hooks([{"use": "shrink"}, {"use": "quantize"}], where="here"), Layout(2), differs=True)
    with pytest.raises(ConfigError, match=r"same weights and moments on every rank.*0\.ema"):
        check_hooks(make_hooks([{"use": "ema"}], where="here"), Layout(2), differs=True)


class Reports(Hook):
    """Has numbers to tell, and changes nothing."""

    def metrics(self) -> dict[str, float]:
        return {"one": 1.0}


class Averages(Hook):
    """Looks at parameters after each step."""

    def updated(self, run: Any) -> None:
        pass


def test_a_hook_of_ones_own_acts_in_training_if_it_overrides_a_point_there() -> None:
    hooks = {"0": Reports(None), "1": Averages(None)}  # type: ignore[arg-type]
    assert [*acting(hooks)] == ["1"]
    with pytest.raises(ConfigError, match=r"hook='1', parallel\.shard=2"):
        check_hooks(hooks, Layout(shard=2), differs=False)
    check_hooks(hooks, Layout(data=2), differs=False)

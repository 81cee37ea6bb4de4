import math
import subprocess
import sys
from typing import Any

import msgspec
import pytest

from datastore.config import settings_from
from datastore.errors import ConfigError
from datastore.training.parallel.layout import layout_of
from datastore.training.run.changes import changed_keys, flatten
from datastore.training.settings import (
    DataSettings,
    ModelSettings,
    OptimSettings,
    Settings,
)
from datastore.training.start import train

DATA = {"url": "data"}


FLOATS = {
    tuple(key.split("."))
    for key, value in flatten(Settings(data=DataSettings(url="data"))).items()
    if isinstance(value, float)
}


def fill(value: Any, number: float) -> Any:
    """Return `value` with `number` in the place of `...`."""
    if isinstance(value, dict):
        return {key: fill(inner, number) for key, inner in value.items()}
    if isinstance(value, list):
        return [fill(inner, number) for inner in value]
    return number if value is ... else value


def made(**tables: Any) -> Settings:
    return settings_from(Settings, {"data": DATA, **tables}, where="run.toml")


def test_reading_settings_loads_no_torch() -> None:
    program = "import sys, datastore.training.settings, datastore.training.start; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)


@pytest.mark.parametrize(
    ("tables", "path"),
    [
        ({"train": {"step": 4}}, r"unknown setting `train.step` .*Did you mean train.steps\?"),
        ({"train": {"steps": "many"}}, r"`train\.steps`"),
        ({"train": {"steps": 0}}, r"`train\.steps`"),
        ({"train": {"compile": "yes"}}, r"`train\.compile`.*allowed=\['true', 'false', 'auto'\]"),
        ({"model": {"width": 60, "heads": 7}}, r"`model`: width / heads"),
        ({"model": {"heads": 8, "kv_heads": 3}}, r"`model`: .*multiple of kv_heads"),
        ({"loader": {"epochs": 1}}, r"train\.steps"),
        ({"hooks": [{"ratio": 2}]}, r'needs use = "name"'),
        ({"data": {}}, r"url"),
    ],
)
def test_a_wrong_setting_is_named_by_its_path(tables: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError, match=path):
        made(**tables)


@pytest.mark.parametrize("number", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize(
    ("tables", "path"),
    [
        *(({part: {key: ...}}, rf"{part}\.{key}") for part, key in sorted(FLOATS)),
        ({"optim": {"betas": [0.9, ...]}}, r"optim\.betas\[1\]"),
        ({"hooks": [{"use": "prune", "inner": {"limit": ...}}]}, r"hooks\[0\]\.inner\.limit"),
        ({"objective": {"use": "causal", "by": ...}}, r"objective\.by"),
    ],
)
def test_a_number_that_is_not_finite_is_refused_by_its_path(tables: dict[str, Any], path: str, number: float) -> None:
    with pytest.raises(ConfigError, match=path):
        made(**fill(tables, number))


def test_settings_made_in_python_are_checked_like_those_of_a_file() -> None:
    settings = msgspec.structs.replace(made(), optim=OptimSettings(clip=math.inf))
    with pytest.raises(ConfigError, match=r"settings\.optim\.clip`: inf is not a number"):
        train(settings, "memory://never")


def test_settings_that_change_what_is_learned_may_not_change_in_a_run() -> None:
    before = made()
    after = made(
        data={"url": "elsewhere", "global_batch": 8},
        train={"steps": 7, "seed": 1, "threads": 3},
        loader={"lanes": 2, "threads": 1},
        hooks=[{"use": "prune"}],
    )
    assert changed_keys(before, after) == ("data.global_batch", "hooks", "loader.lanes", "train.seed")


def test_an_objective_that_is_not_named_is_the_default_one() -> None:
    chunked = {"use": "causal", "chunked": True}
    assert made(objective={"chunked": True}).objective == chunked
    set_once = settings_from(Settings, {"data": DATA}, overrides=["objective.chunked=true"], where="run.toml")
    assert set_once.objective == chunked
    assert made(objective={"use": "chat"}).objective == {"use": "chat"}
    with pytest.raises(ConfigError, match="needs use"):
        made(objective={"use": 3})


def test_defaults_of_the_shape_are_resolved() -> None:
    shape = ModelSettings(width=192, heads=6)
    assert (shape.key_heads, shape.inner_width) == (6, 512)
    assert (ModelSettings(kv_heads=2).key_heads, ModelSettings(mlp_width=100).inner_width) == (2, 100)


@pytest.mark.parametrize("world", [0, -1, 65])
def test_a_world_that_cannot_share_a_batch_is_refused(world: int) -> None:
    with pytest.raises(ConfigError):
        layout_of(made(), world)

"""A hook that trains where ranks share the work learns what it learns in one process; see the table in `docs/parallelism.md`."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from datastore.errors import ConfigError
from datastore.testing.examples import make_language, tiny_settings
from datastore.training.metrics import read_metrics
from datastore.training.run.folder import RunFolder
from datastore.training.settings import ModelSettings, Settings
from datastore.training.start import dry_run, train

pytestmark = pytest.mark.filterwarnings("ignore")

PRUNE = {"use": "prune", "every": 2, "stop": 5, "samples": 8}
HOOKS: dict[str, dict[str, Any]] = {
    "prune, magnitude": PRUNE,
    "prune, movement": PRUNE | {"method": "movement"},
    "prune, regrow": PRUNE | {"schedule": "regrow"},
    "prune, wanda": PRUNE | {"method": "wanda", "pattern": "2:4"},
    "prune, reconstruct": PRUNE | {"method": "reconstruct", "schedule": "once"},
    "distill": {"use": "distill", "hidden": 0.1},
    "ema": {"use": "ema", "decay": 0.8},
    "share": {"use": "share", "rank": 2},
    "adapt, lora": {"use": "adapt", "rank": 2},
    "adapt, dora": {"use": "adapt", "rank": 2, "method": "dora"},
    "adapt, bottleneck": {"use": "adapt", "rank": 2, "method": "bottleneck"},
    "adapt, adalora": {"use": "adapt", "rank": 2, "method": "adalora", "every": 1},
    "quantize, minmax": {"use": "quantize", "bits": 3, "group": 16, "qat_from": 0},
    "quantize, learned": {"use": "quantize", "bits": 3, "group": 16, "qat_from": 0, "scales": "learned"},
    "quantize, export": {"use": "quantize", "bits": 4, "group": 16, "method": "gptq", "samples": 8},
    "shrink": {"use": "shrink", "layers": 2, "mlp_width": 48, "samples": 8},
}
SIZES = ("data", "shard", "tensor", "context", "pipeline")
REFUSED = {
    *((name, "context") for name in ("prune, wanda", "prune, reconstruct", "distill")),
    *((name, "tensor") for name in HOOKS if name.startswith(("share", "adapt", "quantize")) and "export" not in name),
    ("adapt, adalora", "shard"),
    *((name, "pipeline") for name in HOOKS if name not in {"quantize, export", "shrink"}),
}
# A choice near a threshold falls on its other side by a rounding error: other micro-batches in one process do as much.
CHOOSING = {"prune, reconstruct", "quantize, minmax", "quantize, learned"}
QUICK = {("ema", "context"), ("shrink", "pipeline"), ("prune, magnitude", "tensor")}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, and a model that has learned for a while: it teaches, and runs begin with it."""
    folder = tmp_path_factory.mktemp("base")
    make_language(folder / "data")
    shape = ["model.layers=4", "model.vocab_size=64", "model.tied=false"]
    train(tiny_settings(folder / "data", *shape, "train.steps=20", "eval.every=0"), str(folder / "base"))
    return folder


def settings(base: Path, hook: dict[str, Any], *overrides: str) -> Settings:
    init = str(base / "base")
    hook = hook | {"teacher": init} if hook["use"] == "distill" else hook
    fixed = [
        "train.steps=6",
        "optim.warmup=0",
        "optim.floor=1",
        "optim.lr=0.002",
        "eval.samples=7",
        "checkpoint.every=0",
    ]
    made = tiny_settings(base / "data", *fixed, *overrides, hooks=(hook,))
    return msgspec.structs.replace(made, model=ModelSettings(init=init))


def numbers(run: Path) -> list[tuple[float, float]]:
    return [(line["loss"], line["grad_norm"]) for line in read_metrics(RunFolder.open(str(run)).storage)]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        pytest.param(name, size, marks=[] if (name, size) in QUICK else [pytest.mark.slow])
        for name in HOOKS
        for size in SIZES
        if (name, size) not in REFUSED
    ],
)
def test_a_hook_learns_in_a_layout_what_it_learns_in_one_process(
    name: str, size: str, base: Path, tmp_path: Path
) -> None:
    alone = train(settings(base, HOOKS[name]), str(tmp_path / "alone"))
    both = train(settings(base, HOOKS[name], f"parallel.{size}=2"), str(tmp_path / "both"), processes=2)
    pairs = zip(numbers(tmp_path / "alone"), numbers(tmp_path / "both"), strict=True)
    apart = [max(abs(one - other) for one, other in zip(first, second, strict=True)) for first, second in pairs]
    allowed = 3e-3 if name in CHOOSING else 1e-5
    assert apart[0] < 1e-5
    assert max(apart) < allowed
    assert both.validation_loss == pytest.approx(alone.validation_loss, abs=allowed)


@pytest.mark.parametrize(("name", "size"), sorted(REFUSED))
def test_other_hooks_are_refused_before_anything_is_written(name: str, size: str, base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"cannot train where ranks share.*parallel\.{size}=2"):
        dry_run(settings(base, HOOKS[name], f"parallel.{size}=2"), str(tmp_path / "run"), processes=2)


@pytest.mark.parametrize("size", ["tensor", pytest.param("pipeline", marks=pytest.mark.slow)])
def test_a_run_is_refused_as_its_rehearsal_is(size: str, base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=rf"cannot train where ranks share.*parallel\.{size}=2"):
        train(settings(base, HOOKS["share"], f"parallel.{size}=2"), str(tmp_path / "run"), processes=2)
    assert not (tmp_path / "run" / "steps").exists()

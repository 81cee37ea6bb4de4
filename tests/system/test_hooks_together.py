"""Hooks that make a model smaller, several in one run: killed in the middle of their schedules, the run ends with the same bits.

Every part of a model is compared: what is exported, what trains, the optimizer's moments and the state of the hooks.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from datastore.checkpoint.steps import StepLog
from datastore.testing.examples import tiny_settings
from datastore.training.export.export import open_model
from datastore.training.run.folder import RunFolder
from datastore.training.start import train

pytestmark = pytest.mark.filterwarnings("ignore")

LAYOUTS = {"DDP": "parallel.data=2", "FSDP2": "parallel.shard=2"}
STEPS, KILLED_AT = 16, [5, 10]

PRUNE = {"use": "prune", "ratio": 2.0, "every": 3, "stop": 12, "method": "wanda", "samples": 8}
ROUND = {"use": "quantize", "bits": 4, "group": 16, "qat_from": 6, "scales": "learned"}
PACK = {"use": "quantize", "bits": 4, "group": 16, "method": "gptq", "samples": 8}
TEACH = {"use": "distill", "alpha": 0.5, "hidden": 0.1}
LORA = {"use": "adapt", "rank": 2}

COMBINATIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "prune, quantize": (PRUNE, ROUND),
    "adapt, quantize": (LORA | {"base_bits": 4}, PACK),
    "distill, prune": (PRUNE | {"schedule": "regrow", "method": "magnitude"}, TEACH),
    "distill, prune, quantize": (PRUNE | {"method": "movement", "scope": "global"}, TEACH, ROUND),
    "adapt, distill": (LORA | {"method": "dora"}, TEACH),
    "share, distill, quantize": ({"use": "share", "rank": 4}, TEACH, PACK),
    "shrink, prune, distill": ({"use": "shrink", "mlp_width": 32, "samples": 8}, PRUNE, TEACH | {"hidden": 0.0}),
}
QUICK = {("prune, quantize", "FSDP2")}


@pytest.fixture(scope="module")
def base(language: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A trained model: it teaches, and runs begin with it."""
    run = tmp_path_factory.mktemp("base") / "run"
    train(tiny_settings(language, "train.steps=20", "model.tied=false", "eval.every=0"), str(run))
    return str(run)


def with_kills(
    language: str, base: str, layout: str, *, hooks: tuple[dict[str, Any], ...], kills: list[int], run: Path
) -> None:
    """Train two ranks that begin with `base`; in each step of `kills` one dies by SIGKILL, and all begin again."""
    file = run.with_suffix(".json")
    file.write_text(json.dumps(kills))
    taught = tuple(hook | {"teacher": base} if hook["use"] == "distill" else hook for hook in hooks)
    hooks = (*taught, {"use": "training_hooks:Kill", "file": str(file)})
    fixed = ["optim.warmup=0", "eval.every=0", "checkpoint.every=4", "faults.restarts=3"]
    wanted = tiny_settings(language, *fixed, f"train.steps={STEPS}", f"model.init='{base}'", layout, hooks=hooks)
    train(wanted, str(run), processes=2)
    assert json.loads(file.read_text()) == [], "it died as often as it should"


def state_of(run: Path) -> tuple[dict[str, str], Any]:
    """Return the digests of all tensors of the last step, as each rank holds them, and the hooks' other values."""
    log = StepLog(RunFolder.open(str(run)).storage)
    commit = log.read(STEPS)
    entries = (entry for ref in commit.parts for entry in log.read_part(ref).entries)
    return {f"{entry.tensor} {entry.offsets}": entry.digests for entry in entries}, commit.items["hooks"]


@pytest.mark.parametrize(
    ("names", "layout"),
    [
        pytest.param(names, layout, marks=[] if (names, layout) in QUICK else [pytest.mark.slow])
        for names in COMBINATIONS
        for layout in LAYOUTS
    ],
)
def test_hooks_together_go_on_after_two_kills_with_the_same_bits(
    names: str, layout: str, language: str, base: str, tmp_path: Path
) -> None:
    runs = {"once": [], "twice": KILLED_AT}
    for name, kills in runs.items():
        with_kills(language, base, LAYOUTS[layout], hooks=COMBINATIONS[names], kills=kills, run=tmp_path / name)
    once, twice = (state_of(tmp_path / name) for name in runs)
    assert once == twice
    first, second = (open_model(str(tmp_path / name)).model.state_dict() for name in runs)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)

"""A run that begins with the moments of another one, as well as with its weights: `optim.init`."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from datastore.checkpoint.checkpointer import Checkpointer
from datastore.errors import ConfigError, ResumeError
from datastore.storage.resolve import open_storage
from datastore.testing.examples import make_language, tiny_settings
from datastore.training.export.export import export, open_model
from datastore.training.metrics import read_metrics
from datastore.training.run.folder import RunFolder
from datastore.training.settings import ModelSettings, Settings
from datastore.training.start import dry_run, fork, resume, train

Moments = dict[str, dict[str, Tensor]]

LAYOUTS: dict[str, list[str]] = {
    "DDP": ["parallel.data=2"],
    "FSDP2": ["parallel.shard=2"],
    "tensor": ["parallel.tensor=2"],
    "pipeline": ["parallel.pipeline=2"],
    "context": ["parallel.context=2"],
    "parameter server": ["sync.use=parameter_server"],
}
SHRINK = {"use": "shrink", "layers": 2, "width": 16, "heads": 4, "mlp_width": 48, "samples": 8}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of 10 steps, one of each optimizer."""
    folder = tmp_path_factory.mktemp("base")
    make_language(folder / "data")
    shape = ["model.layers=4", "model.vocab_size=64", "train.steps=10", "eval.every=0"]
    train(tiny_settings(folder / "data", *shape), str(folder / "base"))
    train(tiny_settings(folder / "data", *shape, "optim.use=muon"), str(folder / "muon"))
    return folder


def begun(base: Path, *overrides: str, init: str = "base@10", hooks: tuple[dict[str, Any], ...] = ()) -> Settings:
    """Return settings of a run that begins with the weights and moments of another one."""
    fixed = [
        "optim.warmup=0",
        "optim.floor=1",
        "eval.every=0",
        "checkpoint.every=4",
        "train.steps=3",
        "optim.init=true",
    ]
    settings = tiny_settings(base / "data", f"model.init={base / init}", *fixed, *overrides, hooks=hooks)
    return msgspec.structs.replace(settings, model=ModelSettings(init=settings.model.init))


def saved(run: Path, *, step: int) -> Moments:
    moments: Moments = {}
    with Checkpointer(open_storage(str(run))) as checkpointer:
        checkpointer.restore({"optim": moments}, step=step, partial=True)
    return moments


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(RunFolder.open(str(run)).storage)]


@pytest.mark.parametrize("use", ["base", "muon"])
def test_the_optimizer_begins_with_what_was_saved(use: str, base: Path, tmp_path: Path) -> None:
    told = {"use": "training_hooks:TellMoments", "file": str(tmp_path / "moments")}
    optimizer = "muon" if use == "muon" else "adamw"
    train(begun(base, f"optim.use={optimizer}", init=f"{use}@5", hooks=(told,)), str(tmp_path / "run"))
    found, wanted = torch.load(tmp_path / "moments"), saved(base / use, step=5)
    assert found.keys() == wanted.keys()
    for name, moments in wanted.items():
        assert found[name].keys() == moments.keys()
        assert all(torch.equal(found[name][key], one) for key, one in moments.items()), name
    kept = {key for moments in found.values() for key in moments}
    assert kept == {"step", "exp_avg", "exp_avg_sq"} | ({"momentum_buffer"} if use == "muon" else set())
    assert {float(one["step"]) for one in found.values() if "step" in one} == {5.0}


def test_what_a_shrunk_run_keeps_of_a_weight_it_keeps_of_its_moments(base: Path, tmp_path: Path) -> None:
    hook = {"use": "shrink", "mlp_width": 48, "layers": 3, "samples": 8}
    told = {"use": "training_hooks:TellMoments", "file": str(tmp_path / "moments")}
    train(begun(base, "optim.lr=1e-30", "train.steps=1", hooks=(hook, told)), str(tmp_path / "run"))
    found, wanted = torch.load(tmp_path / "moments"), saved(base / "base", step=10)
    weights = {name: open_model(str(path)).model.state_dict() for name, path in
               (("small", tmp_path / "run"), ("large", base / "base"))}  # fmt: skip
    layers = [
        next(
            old
            for old in range(4)
            if torch.equal(
                weights["small"][f"model.layers.{new}.self_attn.q_proj.weight"],
                weights["large"][f"model.layers.{old}.self_attn.q_proj.weight"],
            )
        )
        for new in range(3)
    ]
    for new, old in enumerate(layers):
        part, was = f"model.layers.{new}.mlp", f"model.layers.{old}.mlp"
        up, large = weights["small"][f"{part}.up_proj.weight"], weights["large"][f"{was}.up_proj.weight"]
        rows = [int((large == row).all(dim=1).nonzero()) for row in up]
        assert len(set(rows)) == 48
        for key in ("exp_avg", "exp_avg_sq"):
            for name in ("up_proj", "gate_proj"):
                assert torch.equal(found[f"{part}.{name}.weight"][key], wanted[f"{was}.{name}.weight"][key][rows])
            down = wanted[f"{was}.down_proj.weight"][key][:, rows]  # Of a matrix that was solved for anew.
            assert torch.equal(found[f"{part}.down_proj.weight"][key], down)
            name = "self_attn.k_proj.weight"
            assert torch.equal(found[f"model.layers.{new}.{name}"][key], wanted[f"model.layers.{old}.{name}"][key])
    assert {float(one["step"]) for one in found.values()} == {10.0}


@pytest.mark.parametrize(
    "layout",
    [name if name in {"FSDP2", "tensor"} else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS],
)
def test_two_ranks_begin_with_the_moments_that_one_process_has(layout: str, base: Path, tmp_path: Path) -> None:
    train(begun(base, hooks=(SHRINK,)), str(tmp_path / "alone"))
    train(begun(base, "optim.init=false", hooks=(SHRINK,)), str(tmp_path / "fresh"))
    train(begun(base, *LAYOUTS[layout], hooks=(SHRINK,)), str(tmp_path / "both"), processes=2)
    apart = [abs(one - other) for one, other in zip(losses(tmp_path / "alone"), losses(tmp_path / "both"), strict=True)]
    assert max(apart) < 1e-5
    assert abs(losses(tmp_path / "alone")[2] - losses(tmp_path / "fresh")[2]) > 1e-3, "moments matter"


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["DDP", "FSDP2"])
def test_a_shrunk_run_with_moments_has_the_same_bits_after_two_kills(layout: str, base: Path, tmp_path: Path) -> None:
    """Killed before its first checkpoint, when it begins with the other run once more, and after it."""
    for name, kills in (("once", []), ("twice", [2, 6])):
        file = tmp_path / f"{name}.json"
        file.write_text(json.dumps(kills))
        hooks = (SHRINK, {"use": "training_hooks:Kill", "file": str(file)})
        wanted = begun(base, *LAYOUTS[layout], "faults.restarts=2", "train.steps=8", hooks=hooks)
        train(wanted, str(tmp_path / name), processes=2)
        assert json.loads(file.read_text()) == []
    once, twice = (saved(tmp_path / name, step=8) for name in ("once", "twice"))
    assert all(torch.equal(one, twice[name][key]) for name, kept in once.items() for key, one in kept.items())
    assert {float(one["step"]) for one in once.values()} == {18.0}
    shape = RunFolder.open(str(tmp_path / "once")).config().settings.model
    assert (shape.layers, shape.width, shape.mlp_width) == (2, 16, 48)


def test_a_run_that_began_with_moments_goes_on_with_its_own(base: Path, tmp_path: Path) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    train(begun(base, "train.steps=6", hooks=(SHRINK,)), str(once))
    train(begun(base, "train.steps=2", hooks=(SHRINK,)), str(twice))
    with pytest.raises(ResumeError, match=r"optim\.init"):
        resume(str(twice), overrides=["train.steps=6", "optim.init=false"])
    resume(str(twice), overrides=["train.steps=6"])
    assert losses(once) == losses(twice)


def test_a_fork_begins_with_moments_only_if_it_is_told(base: Path, tmp_path: Path) -> None:
    train(begun(base), str(tmp_path / "first"))
    fork(str(tmp_path / "first"), str(tmp_path / "cold"), overrides=["train.steps=2"])
    fork(str(tmp_path / "first"), str(tmp_path / "warm"), overrides=["train.steps=2", "optim.init=true"])
    counts = {
        name: {float(one["step"]) for one in saved(tmp_path / name, step=2).values()} for name in ("cold", "warm")
    }
    assert counts == {"cold": {2.0}, "warm": {15.0}}


def test_what_has_no_moments_for_this_run_is_refused_before_the_first_step(base: Path, tmp_path: Path) -> None:
    export(str(base / "base"), to=str(base / "hf"))
    train(tiny_settings(base / "data", "train.steps=2", "optim.use=sgd", "eval.every=0"), str(base / "sgd"))
    train(tiny_settings(base / "data", "train.steps=6", "checkpoint.every=2", "eval.every=0"), str(base / "light"))
    with Checkpointer(open_storage(str(base / "light"))) as checkpointer:
        checkpointer.drop("optim", steps=[4])
    adapt, share = {"use": "adapt", "rank": 2}, {"use": "share", "rank": 2}
    train(begun(base, "optim.init=false", "train.steps=1", hooks=(adapt,)), str(base / "adapted"))
    early = {
        "a model folder has no moments": begun(base, init="hf"),
        r"another optimizer.*it_has='muon', asked_for='adamw'": begun(base, init="muon"),
        r"another optimizer.*it_has='adamw', asked_for='muon'": begun(base, "optim.use=muon"),
        r"has no moments.*optimizer='sgd'": begun(base, "optim.use=sgd", init="sgd"),
        r"has no moments.*step=4.*has=": begun(base, init="light@4"),
        r"`optim.init` takes the moments": tiny_settings(base / "data", "optim.init=true"),
    }
    late = {
        r"other parameters.*lora": begun(base, hooks=(adapt,)),
        r"other parameters.*left": begun(base, hooks=(share,)),
        r"other parameters.*model\.": begun(base, init="adapted"),
    }
    for text, settings in (early | late).items():
        with pytest.raises(ConfigError, match=text) as caught:
            train(settings, str(tmp_path / "run"))
        assert caught.value.hint
        assert not (tmp_path / "run" / "steps").exists()
    for text, settings in early.items():
        with pytest.raises(ConfigError, match=text):
            dry_run(settings, str(tmp_path / "run"))


def test_a_dry_run_knows_the_shape_and_the_moments_that_a_run_begins_with(base: Path, tmp_path: Path) -> None:
    cold, warm = (dry_run(begun(base, f"optim.init={init}"), str(tmp_path / "run")) for init in ("false", "true"))
    real = train(begun(base, "train.steps=1"), str(tmp_path / "real"))
    assert cold.parameters == warm.parameters == real.parameters
    assert warm.memory.start_bytes - cold.memory.start_bytes == pytest.approx(8 * real.parameters, rel=1e-3)

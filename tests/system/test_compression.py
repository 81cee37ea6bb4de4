"""Hooks that make a model smaller, on ranks that are killed and started again: the same bits as without."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from datastore.checkpoint.steps import StepLog
from datastore.errors import ConfigError
from datastore.testing.examples import make_language, tiny_settings
from datastore.training.export.averaging import average
from datastore.training.export.export import export, open_model
from datastore.training.export.inference import evaluate
from datastore.training.export.initial import teacher as teacher_of
from datastore.training.export.report import draw, report
from datastore.training.export.teaching import teach
from datastore.training.metrics import read_metrics
from datastore.training.run.folder import RunFolder
from datastore.training.settings import ModelSettings, Settings
from datastore.training.start import compress, fork, resume, train

LAYOUTS = {"DDP": [], "FSDP2": ["parallel.shard=2"]}
TENSOR = ["parallel.tensor=2", "model.vocab_size=128"]


def settings(language: str, *overrides: str, hooks: tuple[dict[str, Any], ...] = ()) -> Settings:
    fixed = ["optim.warmup=0", "eval.every=0", "checkpoint.every=4", "faults.restarts=3"]
    return tiny_settings(language, *fixed, *overrides, hooks=hooks)


def killed_at(steps: list[int], folder: Path) -> dict[str, Any]:
    file = folder / "kills.json"
    file.write_text(json.dumps(steps))
    return {"use": "training_hooks:Kill", "file": str(file)}


def weights(run: Path) -> dict[str, Tensor]:
    return dict(open_model(str(run)).model.state_dict())


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert all(torch.equal(first[name], second[name]) for name in first)


def lines(run: Path) -> list[dict[str, Any]]:
    return read_metrics(RunFolder.open(str(run)).storage)


def tensor_bytes(run: Path, *, step: int) -> int:
    """Return the bytes that the tensors of a step take, those with several names once."""
    log = StepLog(RunFolder.open(str(run)).storage)
    infos = [log.read_part(ref) for ref in log.read(step).parts]
    return sum(
        stop - start for _, start, stop in {(one.part, one.start, one.stop) for info in infos for one in info.entries}
    )


def zeros(found: dict[str, Tensor]) -> dict[str, float]:
    return {name: float((one == 0).float().mean()) for name, one in found.items() if name.endswith("_proj.weight")}


VARIANTS: dict[str, dict[str, Any]] = {
    "magnitude, cubic": {},
    "wanda, 2:4": {"method": "wanda", "pattern": "2:4", "ratio": 2.0},
    "reconstruct, cubic": {"method": "reconstruct"},
    "movement, global": {"method": "movement", "scope": "global"},
    "magnitude, regrow": {"schedule": "regrow"},
}
QUICK = {("movement, global", "FSDP2")}


@pytest.mark.parametrize(
    ("variant", "layout"),
    [
        pytest.param(variant, layout, marks=[] if (variant, layout) in QUICK else [pytest.mark.slow])
        for variant in VARIANTS
        for layout in [*LAYOUTS, "TP"]
    ],
)
def test_a_pruned_run_that_was_killed_twice_has_the_bits_of_one_that_was_not(
    variant: str, layout: str, language: str, tmp_path: Path
) -> None:
    prune = {"use": "prune", "ratio": 4.0, "every": 3, "samples": 8, **VARIANTS[variant]}
    for name, kills in (("once", []), ("twice", [6, 13])):
        hooks = (prune, killed_at(kills, tmp_path))
        sizes = {**LAYOUTS, "TP": TENSOR}[layout]
        train(settings(language, "train.steps=18", *sizes, hooks=hooks), str(tmp_path / name), processes=2)
    assert_same_weights(tmp_path / "once", tmp_path / "twice")
    found = zeros(weights(tmp_path / "once"))
    wanted = 1 - 1 / prune["ratio"]
    assert lines(tmp_path / "once")[-1]["sparsity"] == pytest.approx(wanted, abs=1e-4)
    if "global" not in variant:
        assert found == dict.fromkeys(found, wanted)


def test_masks_survive_two_ranks_one_and_two_again(language: str, tmp_path: Path) -> None:
    prune = ({"use": "prune", "ratio": 4.0, "every": 3, "method": "movement"},)
    sharded = settings(language, "train.steps=8", "parallel.shard=2", hooks=prune)
    train(sharded, str(tmp_path), processes=2)
    before = zeros(weights(tmp_path))
    assert set(before.values()) == {0.75}
    resume(str(tmp_path), overrides=["train.steps=12", "parallel.shard=1"])
    resume(str(tmp_path), overrides=["train.steps=16", "parallel.shard=2"], processes=2)
    assert zeros(weights(tmp_path)) == before
    assert {line["sparsity"] for line in lines(tmp_path)[8:]} == {0.75}


@pytest.mark.parametrize(
    ("hook", "text"),
    [
        ({"use": "prune", "parameters": ["no_such.*"]}, "no matrix to prune"),
        ({"use": "prune", "method": "wanda", "samples": 10**7}, "calibration set is shorter"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(
    hook: dict[str, Any], text: str, language: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=text):
        train(settings(language, "train.steps=4", hooks=(hook,)), str(tmp_path))
    assert not (tmp_path / "steps").exists()


def test_a_run_begins_with_a_part_of_another_model_and_everything_knows_its_shape(
    language: str, tmp_path: Path
) -> None:
    base, small, folder = tmp_path / "base", tmp_path / "small", tmp_path / "folder"
    train(settings(language, "train.steps=12", "model.layers=3"), str(base))
    shrink = {"use": "shrink", "layers": 2, "width": 24, "heads": 2, "mlp_width": 48, "samples": 16}
    wanted = settings(language, "train.steps=8", hooks=(shrink,))
    wanted = msgspec.structs.replace(wanted, model=ModelSettings(init=str(base)))
    train(wanted, str(small))
    resume(str(small), overrides=["train.steps=12"])
    shape = RunFolder.open(str(small)).config().settings.model
    assert (shape.layers, shape.width, shape.heads, shape.key_heads, shape.head_size) == (2, 24, 2, 1, 8)
    losses = [line["loss"] for line in lines(small)]
    assert losses[0] < lines(base)[0]["loss"] - 0.3
    export(str(small), str(folder))
    assert evaluate(str(folder), run=str(small)).loss == pytest.approx(evaluate(str(small)).loss, abs=1e-5)
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(20).view(2, 10)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids).logits, open_model(str(small)).model(ids), atol=1e-4, rtol=1e-4)
    fork(str(small), str(tmp_path / "fork"), overrides=["train.steps=2", "hooks=[]"])
    assert RunFolder.open(str(tmp_path / "fork")).config().settings.model.width == 24


def test_shrinking_without_weights_and_hooks_in_a_wrong_order_are_refused(language: str, tmp_path: Path) -> None:
    for hooks, text in (
        (({"use": "shrink", "layers": 1},), "cut weights to begin with, and there are none"),
        (({"use": "quantize"}, {"use": "prune"}), "in an order that cannot work"),
    ):
        with pytest.raises(ConfigError, match=text):
            train(settings(language, "train.steps=4", hooks=hooks), str(tmp_path))
    assert not (tmp_path / "steps").exists()


@pytest.fixture(scope="module")
def teacher(language: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    run = tmp_path_factory.mktemp("teacher") / "run"
    train(settings(language, "train.steps=30"), str(run))
    return str(run)


@pytest.mark.parametrize("layout", ["FSDP2", pytest.param("DDP", marks=pytest.mark.slow)])
def test_a_run_that_is_pruned_taught_and_averaged_has_the_same_bits_after_two_kills(
    layout: str, language: str, teacher: str, tmp_path: Path
) -> None:
    compress = (
        {"use": "prune", "ratio": 2.0, "every": 3, "method": "wanda", "samples": 8},
        {"use": "distill", "teacher": teacher, "alpha": 0.5, "hidden": 0.1},
        {"use": "ema", "decay": 0.8},
    )
    for name, kills in (("once", []), ("twice", [6, 13])):
        hooks = (*compress, killed_at(kills, tmp_path))
        train(settings(language, "train.steps=18", *LAYOUTS[layout], hooks=hooks), str(tmp_path / name), processes=2)
    assert_same_weights(tmp_path / "once", tmp_path / "twice")
    assert set(zeros(weights(tmp_path / "once")).values()) == {0.5}  # Of the average, which is what leaves.
    assert lines(tmp_path / "once")[-1]["distill_kl"] < lines(tmp_path / "once")[0]["distill_kl"]


def test_a_student_learns_from_what_a_teacher_wrote_beside_the_tokens(
    language: str, teacher: str, tmp_path: Path
) -> None:
    teach(language, str(tmp_path / "taught"), model=teacher, top=4)
    hooks = ({"use": "distill"},)
    columns = 'loader.columns=["teacher_tokens", "teacher_logprobs"]'
    wanted = settings(str(tmp_path / "taught"), "train.steps=30", columns, hooks=hooks)
    train(wanted, str(tmp_path / "student"))
    found = [line["distill_kl"] for line in lines(tmp_path / "student")]
    assert found[-1] < 0.3 * found[0]


def test_a_teacher_with_another_tokenizer_is_refused_before_the_first_step(teacher: str, tmp_path: Path) -> None:
    dataset = make_language(tmp_path / "data")
    own = dataset.tokenizer()
    assert own is not None
    with pytest.raises(ConfigError, match="another tokenizer"):
        _opened_by(teacher, own.replace(b"w59", b"v59"))


def _opened_by(teacher: str, tokenizer: bytes) -> None:
    class Other:
        url = "elsewhere"

        def tokenizer(self) -> bytes:
            return tokenizer

    teacher_of(teacher, datasets=[Other()])  # type: ignore[list-item]


RECIPE = """
[[hooks]]
use = "prune"
method = "reconstruct"
schedule = "once"
samples = 16
"""


def test_a_finished_model_is_compressed_in_one_shot_and_gone_on_with(teacher: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE)
    done = compress(f"{teacher}@30", tmp_path / "shot", recipe=recipe)
    before, after = weights(Path(teacher)), weights(tmp_path / "shot")
    kept = [name for name in after if not name.endswith("_proj.weight")]
    assert all(torch.equal(before[name], after[name]) for name in kept)  # Nothing was trained.
    assert set(zeros(after).values()) == {0.5}
    assert (done.steps, done.loss_before) == (0, pytest.approx(evaluate(teacher).loss, abs=1e-6))
    assert done.loss_before < done.loss < done.loss_before + 1.0
    resume(str(tmp_path / "shot"), overrides=["train.steps=15", "optim.lr=0.003"])
    assert evaluate(str(tmp_path / "shot")).loss < done.loss


def test_a_folder_is_compressed_with_data_and_steps(language: str, teacher: str, tmp_path: Path) -> None:
    export(teacher, str(tmp_path / "folder"))
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(f"[data]\nseq_len = 32\nglobal_batch = 12\n[train]\nsteps = 8\nthreads = 1\n{RECIPE}")
    with pytest.raises(ConfigError, match="which data to look at"):
        compress(tmp_path / "folder", tmp_path / "never", recipe=recipe_without_data(tmp_path))
    done = compress(tmp_path / "folder", tmp_path / "run", recipe=recipe, data=language)
    assert done.steps == 8
    assert set(zeros(weights(tmp_path / "run")).values()) == {0.5}
    found = report([teacher, tmp_path / "run", tmp_path / "folder"])
    assert [one.parameters for one in found] == [found[0].parameters] * 3
    assert found[0].nonzero > found[1].nonzero
    assert found[0].flops_per_token > found[1].flops_per_token
    assert found[0].loss == pytest.approx(found[2].loss, abs=1e-5)
    assert [one.bits for one in found] == [32.0] * 3
    draw(found, tmp_path / "sizes.svg")
    assert "folder" in (tmp_path / "sizes.svg").read_text()


@pytest.mark.filterwarnings("ignore")
def test_a_folder_that_our_model_is_not_is_compressed_as_a_model_of_transformers(
    language: str, teacher: str, tmp_path: Path
) -> None:
    import transformers

    folder, recipe, words = tmp_path / "qwen", tmp_path / "recipe.toml", 61
    config = transformers.Qwen3Config(**QWEN, vocab_size=words)
    transformers.Qwen3ForCausalLM(config).save_pretrained(folder)
    recipe.write_text(f"[data]\nseq_len = 32\nglobal_batch = 12\n[train]\nthreads = 1\n{RECIPE}")
    before = weights(folder)
    done = compress(folder, tmp_path / "run", recipe=recipe, data=language)
    after = weights(tmp_path / "run")
    assert done.loss_before == pytest.approx(done.loss, abs=0.1)
    assert set(zeros(after).values()) == {0.5}
    assert all(torch.equal(before[name], after[name]) for name in after if not name.endswith("_proj.weight"))
    with pytest.raises(ConfigError, match="Export it"):
        fork(str(tmp_path / "run"), str(tmp_path / "forked"))

    tokenizer = make_language(tmp_path / "data").tokenizer()
    assert tokenizer is not None
    (folder / "tokenizer.json").write_bytes(tokenizer.replace(b"w59", b"v59"))
    with pytest.raises(ConfigError, match="another tokenizer"):
        compress(folder, tmp_path / "never", recipe=recipe, data=language)
    recipe.write_text(f"[model]\nlayers = 1\n{RECIPE}")
    with pytest.raises(ConfigError, match="has another shape"):
        compress(teacher, tmp_path / "never", recipe=recipe)
    assert not (tmp_path / "never" / "steps").exists()


QWEN: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}


def recipe_without_data(folder: Path) -> Path:
    (folder / "bare.toml").write_text(RECIPE)
    return folder / "bare.toml"


def test_the_mean_of_stored_steps_is_exported(teacher: str, tmp_path: Path) -> None:
    done = average(teacher, tmp_path / "mean", last=2)
    steps = [open_model(teacher, step=step).model.state_dict() for step in (28, 30)]
    found = weights(tmp_path / "mean")
    assert done.step == 30
    for name, one in found.items():
        torch.testing.assert_close(one, (steps[0][name] + steps[1][name]) / 2)
    with pytest.raises(ConfigError, match="so many steps are not stored"):
        average(teacher, tmp_path / "more", last=9)


def test_a_run_whose_layers_share_goes_on_with_the_same_bits_and_leaves_as_an_ordinary_model(
    language: str, teacher: str, tmp_path: Path
) -> None:
    hooks = ({"use": "share", "rank": 4},)
    for name, steps in (("once", [10]), ("twice", [4, 10])):
        wanted = settings(language, f"train.steps={steps[0]}", "optim.floor=1", hooks=hooks)
        train(msgspec.structs.replace(wanted, model=ModelSettings(init=teacher)), str(tmp_path / name))
        for more in steps[1:]:
            resume(str(tmp_path / name), overrides=[f"train.steps={more}"])
    assert_same_weights(tmp_path / "once", tmp_path / "twice")
    assert [line["loss"] for line in lines(tmp_path / "once")] == [line["loss"] for line in lines(tmp_path / "twice")]
    export(str(tmp_path / "once"), str(tmp_path / "folder"))
    found = evaluate(str(tmp_path / "folder"), run=str(tmp_path / "once")).loss
    assert found == pytest.approx(evaluate(str(tmp_path / "once")).loss, abs=1e-5)


def test_layers_that_share_learn_on_two_ranks_what_they_learn_on_one(
    language: str, teacher: str, tmp_path: Path
) -> None:
    layouts = {"one": (1, ""), "DDP": (2, "parallel.data=2"), "FSDP2": (2, "parallel.shard=2")}
    for name, (processes, layout) in layouts.items():
        hooks = ({"use": "share", "rank": 4},)
        wanted = settings(language, "train.steps=12", *([layout] if layout else []), hooks=hooks)
        wanted = msgspec.structs.replace(wanted, model=ModelSettings(init=teacher))
        train(wanted, str(tmp_path / name), processes=processes)
    one = [line["loss"] for line in lines(tmp_path / "one")]
    for name in ("DDP", "FSDP2"):
        assert [line["loss"] for line in lines(tmp_path / name)] == pytest.approx(one, abs=1e-5)
    assert len({tensor_bytes(tmp_path / name, step=12) for name in layouts}) == 1, "shared matrices are stored once"
    first, second = (weights(tmp_path / name)["model.layers.1.mlp.up_proj.weight"] for name in ("one", "FSDP2"))
    torch.testing.assert_close(first, second, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("hooks", "layout", "text"),
    [
        (({"use": "share"},), ("parallel.tensor=2", "model.vocab_size=128"), "cannot train where ranks share"),
        (({"use": "adapt"},), ("parallel.tensor=2", "model.vocab_size=128"), "cannot train where ranks share"),
        (({"use": "share"}, {"use": "adapt"}), (), "only linear layers are adapted"),
        (({"use": "share"}, {"use": "quantize", "qat_from": 1}), (), "folded after training has rounded"),
    ],
)
def test_what_layers_in_place_of_others_cannot_do_is_refused_before_the_first_step(
    hooks: tuple[dict[str, Any], ...], layout: tuple[str, ...], text: str, language: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=text):
        train(settings(language, *layout, hooks=hooks), str(tmp_path / "never"), processes=2 if layout else 1)

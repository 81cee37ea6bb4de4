"""However the ranks share the work, they learn the same from the same samples, and go on from each other's checkpoints."""

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from datastore.dataset.operations.delete import delete
from datastore.errors import ConfigError, ResumeError, WaitError
from datastore.testing.examples import make_language, tiny_settings
from datastore.training.export.export import open_model
from datastore.training.launcher import spawn
from datastore.training.metrics import read_metrics
from datastore.training.run.audit import read_history
from datastore.training.run.folder import RunFolder
from datastore.training.run.proof import prove
from datastore.training.run.record import record_bytes
from datastore.training.settings import Settings
from datastore.training.start import resume, train

LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "data 2": (2, {"data": 2}),
    "data 4": (4, {"data": 4}),
    "shard 2": (2, {"shard": 2}),
    "shard 3": (3, {"shard": 3}),
    "shard 4": (4, {"shard": 4}),
    "data 2 x shard 2": (4, {"data": 2, "shard": 2}),
    "tensor 2": (2, {"tensor": 2}),
    "data 2 x tensor 2": (4, {"data": 2, "tensor": 2}),
    "shard 2 x tensor 2": (4, {"shard": 2, "tensor": 2}),
    "pipeline 2": (2, {"pipeline": 2}),
    "pipeline 2, interleaved": (2, {"pipeline": 2, "interleave": 2}),
    "pipeline 4": (4, {"pipeline": 4}),
    "data 2 x pipeline 2": (4, {"data": 2, "pipeline": 2}),
    "shard 2 x pipeline 2": (4, {"shard": 2, "pipeline": 2}),
    "context 2": (2, {"context": 2}),
    "context 4": (4, {"context": 4}),
    "data 2 x context 2": (4, {"data": 2, "context": 2}),
    "shard 2 x context 2": (4, {"shard": 2, "context": 2}),
    "context 2 x tensor 2": (4, {"context": 2, "tensor": 2}),
    "context 2 x pipeline 2": (4, {"context": 2, "pipeline": 2}),
    "pipeline 2 x tensor 2": (4, {"pipeline": 2, "tensor": 2}),
    "pipeline 2 x tensor 2, interleaved": (4, {"pipeline": 2, "tensor": 2, "interleave": 2}),
    "data 2 x pipeline 2 x tensor 2": (8, {"data": 2, "pipeline": 2, "tensor": 2}),
    "shard 2 x pipeline 2 x tensor 2": (8, {"shard": 2, "pipeline": 2, "tensor": 2}),
    "context 2 x pipeline 2 x tensor 2": (8, {"context": 2, "pipeline": 2, "tensor": 2}),
}
QUICK = ("shard 2", "tensor 2", "pipeline 2, interleaved", "context 2")
ALONE = {"data": 0, "shard": 1, "tensor": 1, "pipeline": 1, "interleave": 1, "context": 1}


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A dataset of which some documents are deleted, so that not every target counts."""
    url = tmp_path_factory.mktemp("language")
    dataset = make_language(url)
    delete(dataset.storage, ids=dataset.documents(0).column("id").to_pylist()[:10])
    return str(url)


def table(sizes: Mapping[str, int]) -> list[str]:
    return [f"parallel.{name}={size}" for name, size in {**ALONE, **sizes}.items()]


def settings(language: str, *overrides: str, hooks: tuple[dict[str, object], ...] = ()) -> Settings:
    """A model that every layout can take apart, and a rate that does not depend on the number of steps."""
    shape = ["model.layers=4", "model.vocab_size=128", "model.tied=false"]
    fixed = ["optim.warmup=0", "optim.floor=1", "eval.every=0", "checkpoint.every=0"]
    return tiny_settings(language, *shape, *fixed, *overrides, hooks=hooks)


def numbers(run: Path) -> list[tuple[float, float]]:
    found = read_metrics(RunFolder.open(str(run)).storage)
    return [(line["loss"], line["grad_norm"]) for line in found]


def consumed(run: Path) -> bytes:
    return record_bytes([entry for _, entry in read_history(RunFolder.open(str(run))).steps])


def farthest(one: Path, other: Path) -> float:
    """Return the largest difference of a loss or a norm in two runs."""
    pairs = zip(numbers(one), numbers(other), strict=True)
    return max(abs(a - b) for first, second in pairs for a, b in zip(first, second, strict=True))


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = (open_model(str(run)).model.state_dict() for run in (one, other))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(
    ("name", "tied"),
    [
        *((name, "false") for name in QUICK),
        ("pipeline 2, interleaved", "true"),
        pytest.param("pipeline 2 x tensor 2, interleaved", "true", marks=pytest.mark.slow),
        ("pipeline 2 x tensor 2", "false"),
        pytest.param("context 2 x pipeline 2", "true", marks=pytest.mark.slow),
    ],
)
def test_a_layout_learns_what_one_process_learns(name: str, tied: str, language: str, tmp_path: Path) -> None:
    """With batches of which ranks get unequal parts, in several forward passes; validation and norms, too."""
    processes, sizes = LAYOUTS[name]
    few = ["train.steps=8", "data.global_batch=7", "train.micro_batch=2", "eval.samples=5"]
    plain = [*few, f"model.tied={tied}"]
    alone = train(settings(language, *plain), str(tmp_path / "alone"))
    together = train(settings(language, *plain, *table(sizes)), str(tmp_path / "together"), processes=processes)
    assert farthest(tmp_path / "alone", tmp_path / "together") < 1e-5
    assert together.validation_loss == pytest.approx(alone.validation_loss, abs=1e-5)
    assert consumed(tmp_path / "alone") == consumed(tmp_path / "together")
    assert together.parameters == alone.parameters


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("tied", ["true", "false"])
def test_fifty_steps_of_every_layout_are_those_of_one_process(tied: str, language: str, tmp_path: Path) -> None:
    plain = [f"model.tied={tied}", "train.steps=50", "optim.warmup=5", "optim.floor=0.1"]
    train(settings(language, *plain), str(tmp_path / "alone"))
    for name, (processes, sizes) in LAYOUTS.items():
        train(settings(language, *plain, *table(sizes)), str(tmp_path / name), processes=processes)
        assert farthest(tmp_path / "alone", tmp_path / name) < 1e-5, name
        assert consumed(tmp_path / "alone") == consumed(tmp_path / name), name


def goes_on_like_one_process(language: str, folder: Path, names: list[str], *, tied: str = "false") -> None:
    """Take two steps in each layout, one after the other, from the checkpoint of the one before."""
    slow = ["optim.lr=0.002", f"model.tied={tied}"]  # At a higher rate, rounding grows from step to step.
    train(settings(language, f"train.steps={2 * len(names)}", *slow), str(folder / "alone"))
    run = str(folder / "moving")
    for place, name in enumerate(names, start=1):
        processes, sizes = LAYOUTS.get(name, (1, {}))
        if place == 1:
            train(settings(language, "train.steps=2", *slow, *table(sizes)), run, processes=processes)
        else:
            resume(run, overrides=[f"train.steps={2 * place}", *table(sizes)], processes=processes)
    assert farthest(folder / "alone", folder / "moving") < 1e-5
    proof = prove(run)
    assert proof.holds
    assert proof.steps == 2 * len(names)


def test_a_run_moves_from_four_ranks_to_three_to_one(language: str, tmp_path: Path) -> None:
    goes_on_like_one_process(language, tmp_path, ["shard 2 x tensor 2", "shard 3", "one process", "context 2"])


def test_a_tied_embedding_moves_out_of_a_pipeline_and_back(language: str, tmp_path: Path) -> None:
    goes_on_like_one_process(language, tmp_path, ["pipeline 2", "one process", "pipeline 2, interleaved"], tied="true")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_tied_embedding_that_is_cut_moves_out_of_a_pipeline_and_back(language: str, tmp_path: Path) -> None:
    names = ["pipeline 2 x tensor 2", "one process", "tensor 2", "pipeline 2 x tensor 2, interleaved", "shard 2"]
    goes_on_like_one_process(language, tmp_path, names, tied="true")


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("tied", ["true", "false"])
def test_a_run_moves_through_every_layout(tied: str, language: str, tmp_path: Path) -> None:
    goes_on_like_one_process(language, tmp_path, [*LAYOUTS, "one process"], tied=tied)


@pytest.mark.parametrize("tied", ["false", pytest.param("true", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name",
    [
        "shard 2",
        "pipeline 2, interleaved",
        pytest.param("shard 2 x tensor 2", marks=pytest.mark.slow),
        pytest.param("data 2 x shard 2", marks=pytest.mark.slow),
        pytest.param("data 2 x pipeline 2", marks=pytest.mark.slow),
        pytest.param("shard 2 x pipeline 2", marks=pytest.mark.slow),
        pytest.param("pipeline 2 x tensor 2", marks=pytest.mark.slow),
        pytest.param("shard 2 x pipeline 2 x tensor 2", marks=pytest.mark.slow),
        pytest.param("shard 2 x context 2", marks=pytest.mark.slow),
    ],
)
def test_a_resumed_run_has_the_same_bits(name: str, tied: str, language: str, tmp_path: Path) -> None:
    processes, sizes = LAYOUTS[name]
    once, twice = tmp_path / "once", tmp_path / "twice"
    chosen = [f"model.tied={tied}", *table(sizes)]
    train(settings(language, "train.steps=6", *chosen), str(once), processes=processes)
    train(settings(language, "train.steps=3", *chosen), str(twice), processes=processes)
    resume(str(twice), overrides=["train.steps=6"], processes=processes)
    assert numbers(once) == numbers(twice)
    assert_same_weights(once, twice)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_pipeline_of_cut_matrices_that_was_killed_goes_on_with_the_same_bits(language: str, tmp_path: Path) -> None:
    processes, sizes = LAYOUTS["pipeline 2 x tensor 2"]
    once, twice = tmp_path / "once", tmp_path / "twice"
    chosen = ["train.steps=8", "checkpoint.every=2", "model.tied=true", *table(sizes)]
    train(settings(language, *chosen), str(once), processes=processes)
    deadly = 'metrics.trackers=[{use="training_hooks:Deadly", step=5}]'
    with pytest.raises(WaitError, match="rank=0, cause='SIGKILL'"):
        train(settings(language, *chosen, deadly), str(twice), processes=processes)
    assert 0 < resume(str(twice), overrides=["metrics.trackers=[]"], processes=processes).resumed_from < 8
    assert numbers(once) == numbers(twice)
    assert_same_weights(once, twice)


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param({"data": 1, "shard": 2}, id="sharded"),
        pytest.param({"data": 1, "pipeline": 2}, id="pipeline", marks=pytest.mark.slow),
        pytest.param({"context": 2}, id="context", marks=pytest.mark.slow),
    ],
)
def test_blocks_computed_twice_give_the_same_bits(sizes: dict[str, int], language: str, tmp_path: Path) -> None:
    for recompute in ("true", "false"):
        chosen = settings(language, "train.steps=3", f"train.recompute={recompute}", *table(sizes))
        train(chosen, str(tmp_path / recompute), processes=2)
    assert numbers(tmp_path / "true") == numbers(tmp_path / "false")


@pytest.mark.parametrize(
    ("name", "tied"), [("shard 2", "true"), pytest.param("context 2", "false", marks=pytest.mark.slow)]
)
def test_logits_made_some_rows_at_a_time_learn_the_same(name: str, tied: str, language: str, tmp_path: Path) -> None:
    processes, sizes = LAYOUTS[name]
    plain = ["train.steps=4", "train.micro_batch=2", f"model.tied={tied}"]
    alone = train(settings(language, *plain), str(tmp_path / "alone"))
    chunked = settings(language, *plain, *table(sizes), 'objective={use="causal", chunked=true}')
    together = train(chunked, str(tmp_path / name), processes=processes)
    assert farthest(tmp_path / "alone", tmp_path / name) < 1e-5
    assert together.validation_loss == pytest.approx(alone.validation_loss, abs=1e-5)


def test_a_hook_that_looks_at_logits_is_refused_where_there_are_never_all(language: str, tmp_path: Path) -> None:
    train(settings(language, "train.steps=1"), str(tmp_path / "teacher"))
    taught = ({"use": "distill", "teacher": str(tmp_path / "teacher")},)
    chunked = settings(language, 'objective={use="causal", chunked=true}', hooks=taught)
    with pytest.raises(ConfigError, match=r"look at logits.*distill"):
        train(chunked, str(tmp_path / "run"))
    assert not (tmp_path / "run" / "steps").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["data 2", "shard 2", "pipeline 2", "context 2"])
def test_compiled_blocks_learn_the_same(name: str, language: str, tmp_path: Path) -> None:
    processes, sizes = LAYOUTS[name]
    train(settings(language, "train.steps=4"), str(tmp_path / "alone"))
    compiled = settings(language, "train.steps=4", "train.compile=true", *table(sizes))
    train(compiled, str(tmp_path / name), processes=processes)
    assert farthest(tmp_path / "alone", tmp_path / name) < 1e-5


def test_gradients_travel_once_a_step_however_many_passes_it_has() -> None:
    """Of three passes, the first two gather weights, and reduce nothing."""
    for once, thrice in spawn("training_programs:messages_of_a_step", {}, processes=2):
        assert once == thrice == 3  # Two blocks and the rest.


def test_a_loss_that_looks_at_all_logits_is_right_if_ranks_have_some_of_them(language: str, tmp_path: Path) -> None:
    for name, sizes in (("alone", {}), ("tensor", {"tensor": 2})):
        table_of = [*table(sizes), "train.steps=3", 'objective={use="training_programs:Smoothed"}']
        train(settings(language, *table_of), str(tmp_path / name), processes=2 if sizes else 1)
    assert farthest(tmp_path / "alone", tmp_path / "tensor") < 1e-5


def test_a_hook_that_needs_whole_parameters_is_refused_where_ranks_have_parts(language: str, tmp_path: Path) -> None:
    average = ({"use": "training_hooks:Average"},)
    with pytest.raises(ConfigError, match=r"cannot train where ranks share.*parallel\.shard=2"):
        train(settings(language, "parallel.shard=2", hooks=average), str(tmp_path / "run"), processes=2)
    assert not (tmp_path / "run" / "steps").exists()


def test_a_parameter_that_no_loss_reaches_is_refused_where_ranks_have_parts(language: str, tmp_path: Path) -> None:
    spare = ({"use": "training_programs:Spare"},)
    with pytest.raises(ConfigError, match="does not depend on a parameter") as caught:
        train(settings(language, "parallel.shard=2", hooks=spare), str(tmp_path / "run"), processes=2)
    assert caught.value.values["parameters"] == ["spare"]


def test_an_objective_of_ones_own_is_refused_in_a_pipeline(language: str, tmp_path: Path) -> None:
    own = 'objective={use="training_programs:Smoothed"}'
    with pytest.raises(ConfigError, match="a pipeline runs our objective"):
        train(settings(language, "parallel.pipeline=2", own), str(tmp_path / "run"), processes=2)


def test_a_vocabulary_of_the_dataset_that_does_not_divide_is_refused(language: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocab_size"):
        train(settings(language, "model.vocab_size=129", "parallel.tensor=2"), str(tmp_path / "run"), processes=2)
    assert not (tmp_path / "run" / "config.json").exists()


@pytest.mark.parametrize(
    "name", ["one process", *(pytest.param(name, marks=pytest.mark.slow) for name in ("shard 2", "pipeline 2"))]
)
def test_a_run_in_float16_learns_and_resumes_with_its_scale(name: str, language: str, tmp_path: Path) -> None:
    processes, sizes = LAYOUTS.get(name, (1, {}))
    once, twice = tmp_path / "once", tmp_path / "twice"
    half = ["train.precision=fp16", "optim.lr=0.01", *table(sizes)]
    train(settings(language, "train.steps=6", *half), str(once), processes=processes)
    train(settings(language, "train.steps=3", *half), str(twice), processes=processes)
    resume(str(twice), overrides=["train.steps=6"], processes=processes)
    assert numbers(once) == numbers(twice)
    assert numbers(once)[-1][0] < numbers(once)[0][0]
    scales = [line["loss_scale"] for line in read_metrics(RunFolder.open(str(once)).storage)]
    assert all(scale in {2.0**power for power in range(17)} for scale in scales)
    with pytest.raises(ResumeError, match=r"train\.precision"):
        resume(str(twice), overrides=["train.steps=7", "train.precision=fp32"], processes=processes)

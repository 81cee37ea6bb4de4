"""Training that rounds: killed, resumed, in parts, with pruning; what leaves is what was computed with."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from datastore.errors import ConfigError, WaitError
from datastore.storage.resolve import open_storage
from datastore.testing.examples import tiny_settings
from datastore.training.export.export import export, open_model
from datastore.training.export.huggingface import read_folder
from datastore.training.export.inference import evaluate
from datastore.training.hooks.quantizing.layers import Packed
from datastore.training.metrics import read_metrics
from datastore.training.run.folder import RunFolder
from datastore.training.start import resume, train

LAYOUTS: dict[str, tuple[int, dict[str, int]]] = {
    "one": (1, {}),
    "data 2": (2, {"data": 2}),
    "shard 2": (2, {"shard": 2}),
}
PRUNE = {"use": "prune", "ratio": 2.0, "stop": 8, "every": 2}
QAT: dict[str, Any] = {"use": "quantize", "bits": 4, "group": 16, "qat_from": 4}
LEARNED = QAT | {"scales": "learned"}


def settings(language: str, *overrides: str, hooks: tuple[Mapping[str, Any], ...], sizes: Mapping[str, int]) -> Any:
    table = [f"parallel.{name}={size}" for name, size in {"data": 0, "shard": 1, **sizes}.items()]
    fixed = ["optim.warmup=0", "optim.floor=1", "eval.every=0", "checkpoint.every=2", "train.steps=12"]
    return tiny_settings(language, *fixed, *table, *overrides, hooks=tuple(dict(hook) for hook in hooks))


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(RunFolder.open(str(run)).storage)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return dict(open_model(str(run)).model.state_dict())


def assert_same(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("layout", "hooks", "killed_in"),
    [
        ("shard 2", (LEARNED,), 7),
        ("one", (PRUNE, LEARNED), 7),
        pytest.param("one", (QAT,), 2, marks=SLOW),
        pytest.param("one", (QAT | {"symmetric": False, "layers": ["*", "model.embed_tokens"]},), 7, marks=SLOW),
        pytest.param("data 2", (LEARNED,), 2, marks=SLOW),
        pytest.param("shard 2", (LEARNED,), 2, marks=SLOW),
        pytest.param("shard 2", (QAT | {"bits": 3, "activations": 8},), 7, marks=SLOW),
        pytest.param("data 2", (PRUNE, LEARNED), 7, marks=SLOW),
    ],
)
def test_training_that_rounds_goes_on_after_a_kill_with_the_same_bits(
    layout: str, hooks: tuple[Mapping[str, Any], ...], killed_in: int, language: str, tmp_path: Path
) -> None:
    """Before rounding begins at step 4, and behind it."""
    processes, sizes = LAYOUTS[layout]
    kills = tmp_path / "kills.json"
    wanted = settings(language, hooks=(*hooks, {"use": "training_hooks:Kill", "file": str(kills)}), sizes=sizes)
    train(wanted, str(tmp_path / "once"), processes=processes)
    kills.write_text(json.dumps([killed_in]))
    with pytest.raises(WaitError, match="SIGKILL"):
        train(wanted, str(tmp_path / "killed"), processes=max(2, processes)) if processes > 1 else alone(
            wanted, tmp_path
        )
    resume(str(tmp_path / "killed"), processes=processes)
    assert losses(tmp_path / "once")[-3:] == losses(tmp_path / "killed")[-3:]
    assert_same(tmp_path / "once", tmp_path / "killed")


def alone(wanted: Any, folder: Path) -> None:
    """Train in a process of its own, which may die."""
    from multiprocessing import get_context

    process = get_context("spawn").Process(target=train, args=(wanted, str(folder / "killed")))
    process.start()
    process.join()
    if process.exitcode == -9:
        raise WaitError("it died", cause="SIGKILL")


@pytest.mark.parametrize("hooks", [(QAT,), (LEARNED,), (QAT | {"symmetric": False},), (QAT | {"activations": 8},)])
def test_the_last_validation_is_that_of_the_exported_integers(
    hooks: tuple[Mapping[str, Any], ...], language: str, tmp_path: Path
) -> None:
    wanted = settings(language, "eval.every=12", hooks=hooks, sizes={})
    done = train(wanted, str(tmp_path / "run"))
    export(str(tmp_path / "run"), str(tmp_path / "hf"))
    assert evaluate(str(tmp_path / "hf"), run=str(tmp_path / "run")).loss == pytest.approx(
        done.validation_loss, abs=1e-5
    )
    bits = [line.get("weight_bits") for line in read_metrics(RunFolder.open(str(tmp_path / "run")).storage)]
    assert (bits[0], bits[-1], bits == sorted(bits, reverse=True)) == (32.0, 4.0, True)


def test_training_that_rounds_learns_where_rounding_at_the_end_would_lose(language: str, tmp_path: Path) -> None:
    three = {"use": "quantize", "bits": 3}
    for name, hook in (("after", three), ("while", three | {"qat_from": 10})):
        train(settings(language, "train.steps=60", "optim.floor=0.1", hooks=(hook,), sizes={}), str(tmp_path / name))
    after, during = (evaluate(str(tmp_path / name)).loss for name in ("after", "while"))
    assert during < after


def test_zeros_of_pruning_are_zeros_of_the_integers(language: str, tmp_path: Path) -> None:
    for symmetric in (True, False):
        run = tmp_path / f"{symmetric}"
        train(settings(language, hooks=(PRUNE, LEARNED | {"symmetric": symmetric}), sizes={}), str(run))
        export(str(run), str(run / "hf"))
        model = read_folder(open_storage(run / "hf")).model
        for layer in (one for one in model.modules() if isinstance(one, Packed)):
            assert int((layer.weight == 0).sum()) >= layer.weight.numel() // 2


def test_ranks_with_parts_learn_what_one_process_learns(language: str, tmp_path: Path) -> None:
    for name, (processes, sizes) in LAYOUTS.items():
        train(settings(language, hooks=(LEARNED,), sizes=sizes), str(tmp_path / name), processes=processes)
    for name in ("data 2", "shard 2"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), abs=1e-2), "an integer may flip"


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_an_export_that_looks_at_the_data_loses_less(method: str, language: str, tmp_path: Path) -> None:
    url, few = str(tmp_path / "run"), {"use": "quantize", "bits": 3, "samples": 32}
    train(settings(language, "train.steps=60", "optim.floor=0.1", hooks=(few,), sizes={}), url)
    plain = evaluate(url).loss
    resume(url, overrides=[f"hooks=[{{use='quantize', bits=3, samples=32, method='{method}'}}]"])
    assert evaluate(url).loss < plain
    export(url, str(tmp_path / "hf"))
    assert evaluate(str(tmp_path / "hf"), run=url).loss == pytest.approx(evaluate(url).loss, abs=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_a_size_to_be_reached_gives_layers_different_bits(language: str, tmp_path: Path) -> None:
    hook = {"use": "quantize", "bits": 8, "group": 16, "samples": 16, "target_size": 24_000}
    train(settings(language, hooks=(hook,), sizes={}), str(tmp_path / "run"))
    export(str(tmp_path / "run"), str(tmp_path / "hf"))
    layers = [one for one in open_model(str(tmp_path / "hf")).model.modules() if isinstance(one, Packed)]
    assert sum(layer.size_bytes for layer in layers) <= 24_000
    assert len({layer.scheme.bits for layer in layers}) > 1


@pytest.mark.parametrize(
    ("hook", "fact"),
    [
        ({"layers": ["*", "model.emb"]}, r"no layer has such a name \(pattern='model.emb'"),
        ({"layers": ["lm_head"]}, "no layer has such a name"),
        ({"group": 12}, r"do not divide into groups.*group=12"),
        ({"target_size": 100}, "do not fit into this size"),
        ({"method": "gptq", "samples": 10**6}, "shorter than asked"),
        ({"method": "gptq", "qat_from": 2}, "rounds to nearest"),
        ({"scales": "learned"}, "in training only"),
        ({"qat_from": 12}, "begins after the last step"),
        ({"symmetric": False, "activations": 8}, "transformers opens zero points"),
        ({"bits": 5}, "hooks"),
    ],
)
def test_what_cannot_be_is_refused_before_the_first_step(
    hook: Mapping[str, Any], fact: str, language: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=fact):
        train(settings(language, hooks=({"use": "quantize", **hook},), sizes={}), str(tmp_path / "run"))
    assert not (tmp_path / "run" / "config.json").exists()


def test_matrices_cut_by_tensor_parallelism_are_refused(language: str, tmp_path: Path) -> None:
    sizes = {"tensor": 2}
    wanted = settings(language, "model.tied=false", "model.vocab_size=128", hooks=(QAT,), sizes=sizes)
    with pytest.raises(ConfigError, match=r"share the work like this .*parallel.tensor=2"):
        train(wanted, str(tmp_path / "run"), processes=2)

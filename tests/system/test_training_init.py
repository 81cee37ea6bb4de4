"""A run that begins with the weights of another one, or of a Hugging Face folder."""

import json
from pathlib import Path

import pytest
import torch

from datastore.checkpoint.checkpointer import Checkpointer
from datastore.errors import ConfigError, MissingError
from datastore.storage.resolve import open_storage
from datastore.testing.examples import make_language, tiny_settings
from datastore.training.export.export import export, open_model
from datastore.training.export.inference import evaluate
from datastore.training.metrics import read_metrics
from datastore.training.run.folder import RunFolder
from datastore.training.run.proof import prove
from datastore.training.start import fork, resume, train


def weights_of(source: str, *, step: int | None = None) -> dict[str, torch.Tensor]:
    return dict(open_model(source, step=step).model.state_dict())


def first_loss(run: str) -> float:
    return float(read_metrics(RunFolder.open(run).storage)[0]["loss"])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make_language(folder / "data")
    train(tiny_settings(folder / "data", "train.steps=20"), str(folder / "base"))
    export(str(folder / "base"), to=str(folder / "hf"))
    return folder


def test_a_fork_begins_where_the_other_one_was_and_is_a_run_of_its_own(base: Path, tmp_path: Path) -> None:
    run = str(tmp_path / "tuned")
    fork(f"{base / 'base'}@15", run, overrides=["train.steps=4", "data.seed=9", "optim.lr=1e-12"])
    began = weights_of(str(base / "base"), step=15)
    assert all(torch.allclose(tensor, began[name], atol=1e-6, rtol=0) for name, tensor in weights_of(run).items())
    assert RunFolder.open(run).config().settings.model.init == f"{base / 'base'}@15"
    result = resume(run, overrides=["train.steps=8", "optim.lr=0.01"], processes=2)
    assert (result.resumed_from, result.step) == (4, 8)
    assert prove(run).holds


def test_a_model_folder_gives_shape_and_weights(base: Path, tmp_path: Path) -> None:
    table = json.loads((base / "hf" / "config.json").read_text())
    settings = tiny_settings(
        base / "data",
        "train.steps=4",
        f"model.init={base / 'hf'}",
        "model.layers=8",
        "model.width=512",
        "model.heads=8",
        "model.kv_heads=0",
    )
    run = str(tmp_path / "run")
    train(settings, run)
    stored = RunFolder.open(run).config().settings.model
    assert (stored.layers, stored.width) == (table["num_hidden_layers"], table["hidden_size"]) == (2, 32)
    fresh = str(tmp_path / "fresh")
    train(tiny_settings(base / "data", "train.steps=4"), fresh)
    assert first_loss(run) < first_loss(fresh) - 0.5, "what was learned before is there"
    assert evaluate(run).loss < evaluate(fresh).loss


def test_the_same_program_goes_on_though_the_model_it_began_with_is_gone(base: Path, tmp_path: Path) -> None:
    train(tiny_settings(base / "data", "train.steps=5"), str(tmp_path / "first"))
    settings = tiny_settings(base / "data", "train.steps=5", f"model.init={tmp_path / 'first'}")
    train(settings, str(tmp_path / "second"))
    (tmp_path / "first").rename(tmp_path / "gone")
    again = tiny_settings(base / "data", "train.steps=7", f"model.init={tmp_path / 'first'}")
    assert train(again, str(tmp_path / "second")).resumed_from == 5


def test_what_cannot_be_begun_with_is_said_before_the_first_step(base: Path, tmp_path: Path) -> None:
    with pytest.raises(MissingError, match="no run and no model folder"):
        train(tiny_settings(base / "data", "model.init=nowhere"), str(tmp_path / "a"))
    with pytest.raises(ConfigError, match=r"another shape.*model\.layers=.*asked for 3, it has 2"):
        train(tiny_settings(base / "data", f"model.init={base / 'base'}", "model.layers=3"), str(tmp_path / "b"))
    with pytest.raises(MissingError, match="step"):
        fork(f"{base / 'base'}@3", str(tmp_path / "c"))
    export(str(base / "base"), to=str(tmp_path / "small"), quantize="int8")
    with pytest.raises(ConfigError, match="quantized model"):
        train(tiny_settings(base / "data", f"model.init={tmp_path / 'small'}"), str(tmp_path / "d"))
    for name in "abcd":
        assert not (tmp_path / name).exists() or not list((tmp_path / name).glob("steps/*"))
    with Checkpointer(open_storage(str(base / "base"))) as checkpointer:
        assert checkpointer.latest() == 20

"""A model of transformers goes on with a text as transformers itself would, fed with new tokens only; one that cannot is refused."""

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from datastore.errors import ConfigError
from datastore.testing.examples import make_language, tiny_settings
from datastore.training.export.export import export, open_model
from datastore.training.export.inference import Sampling, evaluate, generate, sample_tokens
from datastore.training.models.huggingface import Continuation
from datastore.training.start import train

pytestmark = pytest.mark.filterwarnings("ignore")

SHAPES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "qwen3": {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 64,
    },
    "mamba": {"hidden_size": 32, "num_hidden_layers": 2, "state_size": 8},
    "bert": {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4},
}

FEW = ("train.steps=4", "eval.every=0", "checkpoint.every=0", "eval.samples=8")


def trained(folder: Path, kind: str, *more: str, words: int = 61) -> Path:
    make_language(folder / "data")
    (folder / "model").mkdir()
    config = SHAPES[kind] | {"model_type": kind, "vocab_size": words}
    (folder / "model" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    train(tiny_settings(folder / "data", *FEW, f"model.use=hf:{folder / 'model'}", *more), folder / "run")
    return folder / "run"


@pytest.mark.parametrize("kind", ["gpt2", "qwen3", "mamba"])
def test_the_likeliest_text_is_that_of_transformers(tmp_path: Path, kind: str) -> None:
    run = trained(tmp_path, kind)
    loaded = open_model(str(run))
    new = list(sample_tokens(loaded, [3, 17, 5], Sampling(tokens=12, temperature=0.0)))
    model: Any = loaded.model
    theirs = model.generate(
        torch.tensor([[3, 17, 5]]), max_new_tokens=12, do_sample=False, eos_token_id=0, pad_token_id=0
    )
    wanted = theirs[0, 3:].tolist()
    assert new == (wanted[: wanted.index(0)] if 0 in wanted else wanted)


@pytest.mark.parametrize("kind", ["gpt2", "qwen3"])
def test_only_new_tokens_are_fed(tmp_path: Path, kind: str) -> None:
    loaded = open_model(str(trained(tmp_path, kind)))
    lengths = []
    loaded.model.register_forward_pre_hook(lambda _model, inputs: lengths.append(inputs[0].shape[1]))
    go_on = Continuation(loaded.model.eval())
    with torch.inference_mode():
        pieces: list[Tensor] = [go_on(torch.tensor([ids])) for ids in ([1, 2, 3], [4], [5])]
        whole = Continuation(loaded.model)(torch.tensor([[1, 2, 3, 4, 5]]))
    assert lengths == [3, 1, 1, 5]
    assert torch.allclose(pieces[-1], whole, atol=1e-5)


def test_nothing_that_transformers_will_take_away_is_used(tmp_path: Path) -> None:
    loaded = open_model(str(trained(tmp_path, "qwen3")))
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        assert len(list(sample_tokens(loaded, [3, 17, 5], Sampling(tokens=2, temperature=0.0)))) <= 2


def test_an_exported_folder_of_any_kind_is_opened_again(tmp_path: Path) -> None:
    run = trained(tmp_path, "qwen3")
    export(run, tmp_path / "out")
    wanted = Sampling(tokens=8, seed=3)
    assert generate(tmp_path / "out", "w1 w2", sampling=wanted) == generate(run, "w1 w2", sampling=wanted)
    assert evaluate(tmp_path / "out", run=run).loss == pytest.approx(evaluate(run).loss, abs=1e-6)


@pytest.mark.parametrize("use", ["gpt", "bert"])
def test_a_model_that_sees_both_sides_is_refused(tmp_path: Path, use: str) -> None:
    objective = 'objective={use = "masked", mask_token = 61}'
    if use == "bert":
        run = trained(tmp_path, "bert", objective, words=62)
    else:
        run = tmp_path / "run"
        make_language(tmp_path / "data")
        train(tiny_settings(tmp_path / "data", *FEW, objective), run)
    with pytest.raises(ConfigError, match="not learned to go on"):
        generate(run, "w1")
    assert evaluate(run).loss > 0


def test_a_folder_of_an_unknown_kind_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit", "architectures": ["ViTModel"]}', encoding="utf-8")
    with pytest.raises(ConfigError, match="not a kind of model that is used here"):
        open_model(str(tmp_path))

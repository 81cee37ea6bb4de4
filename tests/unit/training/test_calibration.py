from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from datastore.dataset.snapshot import open_dataset
from datastore.errors import ConfigError
from datastore.testing.examples import make_language, tiny_settings
from datastore.training.hooks.calibration import Calibration, grams, linears_of, observed, square_sums
from datastore.training.models.gpt import GPT
from datastore.training.objectives.base import Context, HostRows
from datastore.training.objectives.language import Causal
from datastore.training.run.feed import calibration_rows
from datastore.training.run.split import make_split
from datastore.training.settings import ModelSettings

SHAPE = ModelSettings(layers=2, width=16, heads=4, kv_heads=2, vocab_size=32)


def rows_of(count: int) -> HostRows:
    return HostRows(np.random.Generator(np.random.PCG64(3)).integers(0, 32, size=(count, 9)))


@pytest.fixture
def model() -> GPT:
    made = GPT(SHAPE)
    made.initialize(torch.Generator().manual_seed(0))
    return made


@pytest.fixture
def calibration() -> Calibration:
    return Calibration(rows_of, Causal(), torch.device("cpu"), micro_rows=2)


def test_layers_are_named_by_patterns_of_their_weights(model: GPT) -> None:
    assert set(linears_of(model, ["*layers.1.mlp.*"])) == {
        f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")
    }
    assert linears_of(model, ["nothing"]) == {}


def test_products_are_those_of_all_the_inputs_of_each_layer(model: GPT, calibration: Calibration) -> None:
    linears = linears_of(model, ["*_proj.weight"])
    inputs: dict[str, list[Tensor]] = {name: [] for name in linears}
    with observed(linears, lambda name, x: inputs[name].append(x.clone())):
        calibration.show(model, 5)
    whole = {name: torch.cat(parts) for name, parts in inputs.items()}
    assert {len(x) for x in whole.values()} == {5 * 8}
    found = grams(model, linears, calibration, count=5)
    squares = square_sums(model, linears, calibration, count=5)
    assert set(found) == set(squares) == set(linears)
    for name, x in whole.items():
        torch.testing.assert_close(found[name], x.T @ x)
        torch.testing.assert_close(squares[name], x.square().sum(dim=0))


def test_layers_that_read_the_same_tensor_share_a_product_and_others_do_not(
    model: GPT, calibration: Calibration
) -> None:
    found = grams(model, linears_of(model, ["*_proj.weight"]), calibration, count=4)
    attention, mlp = "model.layers.0.self_attn.", "model.layers.0.mlp."
    assert found[f"{attention}q_proj"] is found[f"{attention}k_proj"] is found[f"{attention}v_proj"]
    assert found[f"{mlp}gate_proj"] is found[f"{mlp}up_proj"]
    assert len({id(product) for product in found.values()}) == 2 * 4


def test_looking_leaves_the_mode_of_the_model_and_draws_no_number(calibration: Calibration) -> None:
    model = nn.Sequential(nn.Embedding(32, 8), nn.Dropout(0.5), nn.Linear(8, 32, bias=False))
    before = torch.get_rng_state()
    square_sums(model, linears_of(model, ["*"]), calibration, count=4)
    assert model.training
    assert torch.equal(before, torch.get_rng_state())


def test_a_compiled_block_is_looked_into(model: GPT, calibration: Calibration) -> None:
    linears = linears_of(model, ["*_proj.weight"])
    plain = square_sums(model, linears, calibration, count=4)
    for block in model.model.layers:
        block.compile(backend="eager")
    with torch.no_grad():
        calibration.objective.outputs(model, next(iter(calibration.batches(2))))  # Compiled without a hook.
    compiled = square_sums(model, linears, calibration, count=4)
    assert all(torch.equal(plain[name], compiled[name]) for name in plain)


@pytest.fixture(scope="module")
def language(tmp_path_factory: pytest.TempPathFactory) -> Path:
    url = tmp_path_factory.mktemp("language")
    make_language(url)
    return url


def read(language: Path, count: int, *overrides: str) -> HostRows:
    settings = tiny_settings(str(language), *overrides)
    split = make_split(open_dataset(str(language)), holdout=settings.data.holdout, validation=None)
    context = Context(seed=settings.train.seed, seq_len=settings.data.seq_len, vocab_size=128)
    return calibration_rows(split, settings, Causal(), context, count=count)


def test_the_rows_do_not_depend_on_the_batch_or_the_seed_of_the_run(language: Path) -> None:
    first = read(language, 8)
    other = read(language, 8, "data.global_batch=3", "data.seed=5", "train.seed=7")
    assert np.array_equal(first.tokens, other.tokens)
    assert len(first.tokens) == 8
    assert len(np.unique(first.tokens, axis=0)) == 8


def test_a_calibration_set_shorter_than_asked_is_refused(language: Path) -> None:
    with pytest.raises(ConfigError, match="shorter than asked") as caught:
        read(language, 10**6)
    assert caught.value.values["asked"] == 10**6

"""Muon moves the matrices within blocks, AdamW the rest: alone, on copies, and after a resume with the same bits."""

from pathlib import Path

import pytest
import torch
from torch import nn

from datastore.errors import ConfigError
from datastore.testing.examples import tiny_settings
from datastore.training.export.export import open_model
from datastore.training.metrics import read_metrics
from datastore.training.optim import MuonAndAdamW, inner_matrices, make_optimizer, set_learning_rate
from datastore.training.run.folder import RunFolder
from datastore.training.settings import OptimSettings
from datastore.training.start import resume, train

MUON = ("optim.use=muon", "optim.lr=0.01", "train.steps=12", "eval.every=0", "checkpoint.every=4")


def losses(run: Path) -> list[float]:
    return [float(line["loss"]) for line in read_metrics(RunFolder.open(str(run)).storage)]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return open_model(str(run)).model.state_dict()


def test_each_parameter_has_the_optimizer_that_is_for_it() -> None:
    block = nn.Linear(4, 4)
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "block": block, "norm": nn.LayerNorm(4)})
    optimizer = make_optimizer(model.parameters(), OptimSettings(use="muon"), inner=inner_matrices([block]))
    assert isinstance(optimizer, MuonAndAdamW)
    assert optimizer.state[block.weight].keys() == {"momentum_buffer"}
    assert all(
        optimizer.state[one].keys() == {"step", "exp_avg", "exp_avg_sq"}
        for one in model.parameters()
        if one is not block.weight
    )


def test_it_moves_as_both_would_by_themselves() -> None:
    torch.manual_seed(0)
    settings = OptimSettings(use="muon")
    matrix, vector = nn.Parameter(torch.randn(6, 4)), nn.Parameter(torch.randn(4))
    others = [nn.Parameter(one.detach().clone()) for one in (matrix, vector)]
    together = make_optimizer([matrix, vector], settings, inner=[matrix])
    muon = torch.optim.Muon([others[0]], weight_decay=settings.weight_decay, adjust_lr_fn="match_rms_adamw")
    adamw = make_optimizer([others[1]], OptimSettings())
    for step in range(3):
        for one, other in zip((matrix, vector), others, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for optimizer in (together, muon, adamw):
            set_learning_rate(optimizer, 0.01 * (step + 1))
            optimizer.step()
    assert torch.equal(matrix, others[0])
    assert torch.equal(vector, others[1])


def test_a_resumed_run_has_the_same_bits(language: str, tmp_path: Path) -> None:
    train(tiny_settings(language, *MUON), tmp_path / "whole")
    train(tiny_settings(language, *MUON, "train.steps=5", "optim.warmup=0", "optim.floor=1.0"), tmp_path / "short")
    train(tiny_settings(language, *MUON, "optim.warmup=0", "optim.floor=1.0"), tmp_path / "long")
    resume(tmp_path / "short", overrides=["train.steps=12"])
    one, other = weights(tmp_path / "short"), weights(tmp_path / "long")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert losses(tmp_path / "whole")[-1] < losses(tmp_path / "whole")[0] - 0.5


@pytest.mark.slow
def test_copies_learn_what_one_process_does(language: str, tmp_path: Path) -> None:
    train(tiny_settings(language, *MUON), tmp_path / "alone")
    train(tiny_settings(language, *MUON), tmp_path / "ranks", processes=2)
    # Its iteration is in bfloat16, where the last bit of a gradient can show.
    assert losses(tmp_path / "ranks") == pytest.approx(losses(tmp_path / "alone"), abs=2e-2)
    resume(tmp_path / "ranks", overrides=["train.steps=14"])


@pytest.mark.parametrize(
    "table", ["parallel.shard=2", "parallel.pipeline=2", "parallel.tensor=2", "sync.use=parameter_server"]
)
def test_where_a_rank_has_parts_it_is_refused_before_anything_starts(language: str, tmp_path: Path, table: str) -> None:
    with pytest.raises(ConfigError, match="Muon needs the whole"):
        train(tiny_settings(language, *MUON, table), tmp_path / "run", processes=2)
    assert not (tmp_path / "run").exists()

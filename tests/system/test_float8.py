"""A run in fp8 learns as one in bfloat16 does, and its checkpoints are those of any other precision. Emulated: there is no such CPU."""

from pathlib import Path

import pytest
import torch

from datastore.errors import ConfigError
from datastore.testing.examples import tiny_settings
from datastore.training.export.export import open_model
from datastore.training.metrics import read_metrics
from datastore.training.run.folder import RunFolder
from datastore.training.settings import Settings
from datastore.training.start import dry_run, resume, train


def settings(language: str, precision: str, *overrides: str) -> Settings:
    fixed = ["optim.warmup=0", "optim.floor=1", "eval.every=0", "checkpoint.every=0", f"train.precision={precision}"]
    return tiny_settings(language, *fixed, *overrides)


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(RunFolder.open(str(run)).storage)]


@pytest.mark.parametrize("scales", ["tensorwise", pytest.param("rowwise", marks=pytest.mark.slow)])
def test_a_run_in_fp8_learns_what_one_in_bfloat16_learns(scales: str, language: str, tmp_path: Path) -> None:
    train(settings(language, "bf16", "train.steps=40"), str(tmp_path / "bf16"))
    train(settings(language, "fp8_emulated", "train.steps=40", f"train.fp8_scales={scales}"), str(tmp_path / "fp8"))
    bf16, fp8 = losses(tmp_path / "bf16"), losses(tmp_path / "fp8")
    assert bf16 != fp8
    assert fp8[-1] < fp8[0] / 2
    assert fp8 == pytest.approx(bf16, abs=0.2)
    assert sum(fp8[-10:]) == pytest.approx(sum(bf16[-10:]), rel=0.1)


def test_a_checkpoint_does_not_tell_in_which_precision_it_was_made(language: str, tmp_path: Path) -> None:
    """So a run may change to fp8 and back; and one that was stopped in between has the same bits."""
    once, twice, other = tmp_path / "once", tmp_path / "twice", tmp_path / "other"
    train(settings(language, "fp8_emulated", "train.steps=4"), str(once))
    train(settings(language, "fp8_emulated", "train.steps=2"), str(twice))
    resume(str(twice), overrides=["train.steps=4"])
    assert losses(once) == losses(twice)
    first, second = (open_model(str(run)).model.state_dict() for run in (once, twice))
    assert all(torch.equal(first[name], second[name]) for name in first)
    train(settings(language, "bf16", "train.steps=4"), str(other))
    for run, precision in ((once, "bf16"), (other, "fp8_emulated")):
        resume(str(run), overrides=["train.steps=5", f"train.precision={precision}"])
        assert losses(run)[-1] < losses(run)[0]
    assert losses(once)[4] == pytest.approx(losses(other)[4], abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"data": 2}, {"shard": 2}, {"pipeline": 2}, {"context": 2}])
def test_ranks_in_fp8_learn_what_one_process_learns(sizes: dict[str, int], language: str, tmp_path: Path) -> None:
    """Ranks have other matrices of activations, so other scales: the same up to the rounding of fp8."""
    plain = ["train.steps=6", "model.vocab_size=128"]
    train(settings(language, "fp8_emulated", *plain), str(tmp_path / "alone"))
    table = [f"parallel.{name}={size}" for name, size in sizes.items()]
    train(settings(language, "fp8_emulated", *plain, *table), str(tmp_path / "together"), processes=2)
    assert losses(tmp_path / "together") == pytest.approx(losses(tmp_path / "alone"), abs=0.05)


def test_a_device_without_fp8_is_refused_before_anything_is_written(language: str, tmp_path: Path) -> None:
    for begin in (train, dry_run):
        with pytest.raises(ConfigError, match="does not multiply in fp8"):
            begin(settings(language, "fp8"), str(tmp_path / "run"))
    assert not (tmp_path / "run" / "config.json").exists()
    assert dry_run(settings(language, "fp8_emulated"), str(tmp_path / "run")).precision == "fp8_emulated"

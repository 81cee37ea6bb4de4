"""A run on several datasets: each by its weight, weights changed on the way, and all of it proven afterwards."""

from collections import Counter
from pathlib import Path

import msgspec
import pytest

from datastore.config import settings_from
from datastore.dataset.snapshot import open_dataset
from datastore.errors import ConfigError, ResumeError
from datastore.testing.examples import make_language, tiny_settings
from datastore.training.export.inference import evaluate
from datastore.training.metrics import read_metrics
from datastore.training.run.audit import trace
from datastore.training.run.folder import RunFolder
from datastore.training.run.proof import prove
from datastore.training.settings import Settings
from datastore.training.start import resume, train


def mixed(folder: Path, *overrides: str, weights: dict[str, float] | None = None) -> Settings:
    for name in ("first", "second"):
        if not (folder / name).exists():
            make_language(folder / name, seed=len(name))
    table = msgspec.to_builtins(tiny_settings(folder / "first"))
    table["data"] |= {"url": "", "sources": {name: {"url": str(folder / name)} for name in ("first", "second")}}
    for name, weight in (weights or {}).items():
        table["data"]["sources"][name]["weight"] = weight
    return settings_from(Settings, table, overrides=overrides, where="mixed")


def sources_of(run: str, step: int) -> Counter[str]:
    return Counter(sample.dataset for sample in trace(run, step).samples)


def test_a_mixed_run_goes_on_as_it_was_is_measured_by_source_and_proven(tmp_path: Path) -> None:
    weights = {"first": 3.0, "second": 1.0}
    whole, cut = str(tmp_path / "whole"), str(tmp_path / "cut")
    train(mixed(tmp_path, "train.steps=10", weights=weights), whole)
    train(mixed(tmp_path, "train.steps=5", weights=weights), cut)
    resume(cut, overrides=["train.steps=10"], processes=2)
    assert [trace(whole, step).fingerprint for step in (1, 6, 10)] == [
        trace(cut, step).fingerprint for step in (1, 6, 10)
    ]
    for run in (whole, cut):
        proof = prove(run)
        assert proof.holds, proof.problems
        assert proof.samples == proof.distinct == 120
    for step in range(1, 11):
        assert sources_of(cut, step) == {"first": 9, "second": 3}
    losses = [line for line in read_metrics(RunFolder.open(whole).storage) if "validation_loss" in line]
    assert losses
    for line in losses:
        parts = [line["validation_loss/first"], line["validation_loss/second"]]
        assert min(parts) <= line["validation_loss"] <= max(parts)
    found = evaluate(whole)
    assert found.sources.keys() == {"first", "second"}
    assert found.loss == pytest.approx(sum(found.sources.values()) / 2, rel=0.05)


def test_weights_and_sources_may_change_at_a_resume_and_the_proof_knows(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    train(mixed(tmp_path, "train.steps=5", weights={"first": 1.0, "second": 1.0}), run)
    told: list[str] = []
    resume(
        run,
        overrides=["train.steps=10", "data.sources.second.weight=3.0"],
        on_progress=lambda progress: told.append(progress.note),
    )
    assert any("data.sources" in note for note in told)
    make_language(tmp_path / "third", seed=3)
    third = f'{{url = "{tmp_path / "third"}", weight = 4.0}}'
    resume(run, overrides=["train.steps=15", f"data.sources.third={third}"])
    assert [sources_of(run, step) for step in (5, 6, 10)] == [
        {"first": 6, "second": 6},
        {"first": 3, "second": 9},
        {"first": 3, "second": 9},
    ]
    late = sources_of(run, 11) + sources_of(run, 12)
    assert late == {"first": 3, "second": 9, "third": 12}
    proof = prove(run)
    assert proof.holds, proof.problems
    assert proof.samples == proof.distinct == 180


def test_what_cannot_be_mixed_is_said_before_the_first_step(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"name one dataset as data\.url, or several"):
        mixed(tmp_path, f"data.url={tmp_path / 'first'}")
    with pytest.raises(ConfigError, match="weight to every source, or to none"):
        mixed(tmp_path, weights={"first": 1.0})
    size = (int(open_dataset(tmp_path / "first").segments.tokens.sum() * 0.9) - 1) // 32
    few = mixed(tmp_path, "data.sources.first.epochs=1", "data.sources.second.epochs=0", "train.steps=100000")
    with pytest.raises(ConfigError, match=f"sources end before the last step.*there_are={size // 12}"):
        train(few, str(tmp_path / "few"))
    run = str(tmp_path / "run")
    train(mixed(tmp_path, "train.steps=5"), run)
    with pytest.raises(ResumeError, match="seq_len"):
        resume(run, overrides=["data.seq_len=16"])

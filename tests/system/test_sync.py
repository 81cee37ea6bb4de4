"""However ranks bring their gradients together: the same samples, a loss that falls, and the same bits after any interruption."""

from pathlib import Path

import pytest
import torch

from datastore.errors import ConfigError, ResumeError
from datastore.testing.examples import tiny_settings
from datastore.training.export.export import open_model
from datastore.training.metrics import TrainingProgress, read_metrics
from datastore.training.run.audit import read_history
from datastore.training.run.folder import RunFolder
from datastore.training.run.proof import prove
from datastore.training.run.record import record_bytes
from datastore.training.settings import Settings
from datastore.training.start import resume, train

WAYS: dict[str, list[str]] = {
    "bf16": [],
    "int8": [],
    "int4": [],
    "powersgd": ["sync.rank=4"],
    "top_k": [],
    "parameter_server": ["sync.servers=2"],
    "parameter_server, late": ["sync.staleness=2"],
    "diloco": ["sync.every=4"],
    "diloco, int4": ["sync.every=4", "sync.deltas=int4"],
    "bf16, sharded": ["parallel.shard=2"],
    "int8, sharded": ["parallel.shard=2"],
    "int4, sharded": ["parallel.shard=2"],
    "top_k, sharded": ["parallel.shard=2"],
}
QUICK = ("parameter_server, late", "diloco, int4", "int8, sharded")


def settings(language: str, *overrides: str) -> Settings:
    """A rate that does not depend on the number of steps."""
    fixed = ["optim.warmup=0", "optim.floor=1", "eval.every=0", "checkpoint.every=0"]
    return tiny_settings(language, *fixed, *overrides)


def way(name: str) -> list[str]:
    return [f"sync.use={name.partition(',')[0]}", *WAYS[name]]


def numbers(run: Path) -> list[tuple[float, float]]:
    found = read_metrics(RunFolder.open(str(run)).storage)
    return [(line["loss"], line["grad_norm"]) for line in found]


def sent_bytes(run: Path) -> float:
    return float(read_metrics(RunFolder.open(str(run)).storage)[-1]["sync_sent_bytes"])


def consumed(run: Path) -> bytes:
    return record_bytes([entry for _, entry in read_history(RunFolder.open(str(run))).steps])


@pytest.mark.parametrize(
    "name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in WAYS]
)
def test_a_resumed_run_has_the_same_bits(name: str, language: str, tmp_path: Path) -> None:
    once, twice = tmp_path / "once", tmp_path / "twice"
    train(settings(language, "train.steps=6", *way(name)), str(once), processes=2)
    train(settings(language, "train.steps=3", *way(name)), str(twice), processes=2)
    resume(str(twice), overrides=["train.steps=6"], processes=2)
    assert numbers(once) == numbers(twice)
    assert consumed(once) == consumed(twice)
    first, second = (open_model(str(run)).model.state_dict() for run in (once, twice))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_saving_in_between_changes_nothing(language: str, tmp_path: Path) -> None:
    """A look at whether a step can be gone on from runs the backward pass, and must leave no rest."""
    for every in (0, 1):
        chosen = settings(language, "train.steps=5", *way("int8, sharded"), f"checkpoint.every={every}")
        train(chosen, str(tmp_path / str(every)), processes=2)
    assert numbers(tmp_path / "0") == numbers(tmp_path / "1")


def test_a_parameter_server_learns_what_all_reduce_learns(language: str, tmp_path: Path) -> None:
    train(settings(language, "train.steps=8", "data.global_batch=7"), str(tmp_path / "all"), processes=2)
    served = settings(language, "train.steps=4", "data.global_batch=7", *way("parameter_server"))
    train(served, str(tmp_path / "served"), processes=2)
    resume(str(tmp_path / "served"), overrides=["train.steps=8"], processes=3)  # The moments move to other owners.
    for one, other in zip(numbers(tmp_path / "all"), numbers(tmp_path / "served"), strict=True):
        assert one == pytest.approx(other, abs=1e-5)
    assert consumed(tmp_path / "all") == consumed(tmp_path / "served")


def test_a_late_gradient_moves_nothing_before_it_is_due(language: str, tmp_path: Path) -> None:
    train(settings(language, "train.steps=5", *way("parameter_server, late")), str(tmp_path), processes=2)
    norms = [norm for _, norm in numbers(tmp_path)]
    assert norms[:2] == [0.0, 0.0]
    assert all(norm > 0 for norm in norms[2:])


@pytest.mark.slow
def test_compressed_gradients_learn_almost_as_much(language: str, tmp_path: Path) -> None:
    long = ["train.steps=40", "optim.lr=0.005"]
    train(settings(language, *long), str(tmp_path / "all"), processes=2)
    wanted = numbers(tmp_path / "all")[-1][0]
    for name, within in (("bf16", 0.02), ("int8", 0.02), ("int4", 0.1), ("int8, sharded", 0.02)):
        train(settings(language, *long, *way(name)), str(tmp_path / name), processes=2)
        assert numbers(tmp_path / name)[-1][0] == pytest.approx(wanted, abs=within), name
    assert sent_bytes(tmp_path / "int8") < 0.53 * sent_bytes(tmp_path / "bf16")
    assert sent_bytes(tmp_path / "int4") < 0.53 * sent_bytes(tmp_path / "int8")


def test_workers_leave_and_join_a_run_of_rounds(language: str, tmp_path: Path) -> None:
    """Three workers, then two in the middle of a round, then three: nobody's samples are lost."""
    run, notes = str(tmp_path / "run"), []

    def told(progress: TrainingProgress) -> None:
        notes.append(progress.note)

    train(settings(language, "train.steps=6", *way("diloco, int4")), run, processes=3)
    resume(run, overrides=["train.steps=12"], processes=2, on_progress=told)
    assert any("what each of 3 ranks kept" in note for note in notes)
    resume(run, overrides=["train.steps=16"], processes=3)
    proof = prove(run)
    assert proof.holds
    assert proof.worlds == [3, 2, 3]
    losses = [loss for loss, _ in numbers(Path(run))]
    assert losses[-1] < losses[0] - 1
    alone = settings(language, "train.steps=16")
    train(alone, str(tmp_path / "alone"))
    assert consumed(Path(run)) == consumed(tmp_path / "alone")


def test_a_compressed_run_goes_on_elsewhere_without_its_rests(language: str, tmp_path: Path) -> None:
    run, notes = str(tmp_path), []
    train(settings(language, "train.steps=3", *way("int8")), run, processes=2)
    resume(run, overrides=["train.steps=4"], processes=3, on_progress=lambda progress: notes.append(progress.note))
    assert any("what each of 2 ranks kept" in note for note in notes)
    resume(run, overrides=["train.steps=5", "parallel.shard=2"], processes=2)
    resume(run, overrides=["train.steps=6", "parallel.shard=1"])
    assert prove(run).worlds == [2, 3, 2, 1]


def test_the_way_cannot_change_within_a_run(language: str, tmp_path: Path) -> None:
    train(settings(language, "train.steps=1"), str(tmp_path))
    with pytest.raises(ResumeError, match=r"sync\.use"):
        resume(str(tmp_path), overrides=["train.steps=2", "sync.use=int8"])


@pytest.mark.parametrize("name", ["parameter_server", "diloco"])
def test_a_hook_that_trains_is_refused_where_ranks_differ(name: str, language: str, tmp_path: Path) -> None:
    hook = 'hooks=[{use="prune", ratio=2.0}]'
    with pytest.raises(ConfigError, match="need the same weights and moments on every rank"):
        train(settings(language, "train.steps=2", hook, *way(name)), str(tmp_path / "run"), processes=2)

"""A trainer with a second place for its checkpoints: the run is there, comes back from there, and trains on when it is out of reach."""

import shutil
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest
import torch

import datastore as ds
from datastore.checkpoint.inspect import list_steps, verify_step
from datastore.checkpoint.replica import fork_step
from datastore.errors import ConfigError, StorageError
from datastore.storage.resolve import open_storage
from datastore.testing.examples import tiny_settings
from datastore.training.export.export import open_model
from datastore.training.metrics import TrainingProgress
from datastore.training.run.proof import prove
from datastore.training.start import resume, train


def weights(run: Path) -> dict[str, torch.Tensor]:
    return open_model(str(run)).model.state_dict()


def assert_same_weights(one: Path, other: Path) -> None:
    first, second = weights(one), weights(other)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_whose_disk_is_lost_goes_on_from_its_second_place(language: str, tmp_path: Path) -> None:
    run, there, whole = tmp_path / "run", tmp_path / "there", tmp_path / "whole"
    settings = tiny_settings(language, "checkpoint.every=4", f"checkpoint.replica={there}", "train.steps=12")
    train(tiny_settings(language, "checkpoint.every=4", "train.steps=12"), str(whole))

    def lose(progress: TrainingProgress) -> None:
        if progress.step >= 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(settings, str(run), on_progress=lose)
    assert list_steps(open_storage(str(there)))[-1].step == 8
    shutil.rmtree(run)
    ds.replicate(str(there), str(run))
    assert resume(str(run)).step == 12
    assert_same_weights(run, whole)
    assert_same_weights(there, whole)
    assert prove(str(run)).holds


def packed(place: Path) -> set[bool]:
    """Whether the parts of a run are packed, each of them."""
    return {path.suffix == ".packed" for path in place.glob("parts/*.safetensors*")}


@pytest.mark.parametrize(("codec", "replica_codec"), [("zstd", "none"), ("none", "zstd"), ("zstd", "zstd")])
def test_each_place_stores_checkpoints_by_its_own_codec_and_may_take_another_when_resumed(
    language: str, tmp_path: Path, codec: str, replica_codec: str
) -> None:
    run, there = tmp_path / "run", tmp_path / "there"
    codecs = (f"checkpoint.codec={codec}", f"checkpoint.replica_codec={replica_codec}")
    train(tiny_settings(language, f"checkpoint.replica={there}", *codecs, "train.steps=4"), str(run))
    assert (packed(run), packed(there)) == ({codec == "zstd"}, {replica_codec == "zstd"})
    assert_same_weights(run, there)
    assert resume(str(run), overrides=["train.steps=6", "checkpoint.codec=none", "checkpoint.keep=1"]).step == 6
    assert packed(run) == {False}
    assert_same_weights(run, there)


def test_a_run_that_begins_with_a_checkpoint_of_another_goes_on_as_that_would_have_or_otherwise(
    language: str, tmp_path: Path
) -> None:
    run, same, other = tmp_path / "run", tmp_path / "same", tmp_path / "other"
    train(tiny_settings(language, "checkpoint.every=4", "train.steps=12"), str(run))
    before = sorted(path for path in run.rglob("*") if path.is_file())
    for branch in (same, other):
        fork_step(run, branch, step=8)
    assert resume(str(same)).step == 12
    assert_same_weights(run, same)
    assert prove(str(same)).holds
    assert resume(str(other), overrides=["optim.lr=0.001"]).step == 12
    assert not all(torch.equal(weights(run)[name], tensor) for name, tensor in weights(other).items())
    assert prove(str(other)).holds
    assert sorted(path for path in run.rglob("*") if path.is_file()) == before


def test_ranks_have_a_second_place_together(language: str, tmp_path: Path) -> None:
    there = tmp_path / "there"
    train(
        tiny_settings(language, f"checkpoint.replica={there}", "parallel.shard=2"), str(tmp_path / "run"), processes=2
    )
    assert [step.step for step in list_steps(open_storage(str(there)))] == [10, 15, 20]
    assert not verify_step(open_storage(str(there)), 20).bad
    assert_same_weights(there, tmp_path / "run")


def test_a_second_place_out_of_reach_is_told_and_the_last_step_ends_the_session(language: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder can be made below a file")
    told: list[str] = []
    settings = tiny_settings(language, "checkpoint.every=5", f"checkpoint.replica={tmp_path / 'file' / 'there'}")
    with pytest.raises(StorageError):
        train(settings, str(tmp_path / "run"), on_progress=lambda progress: told.append(progress.note))
    assert any("the second place lacks a checkpoint" in note for note in told)
    assert [step.step for step in list_steps(open_storage(str(tmp_path / "run")))][-1] == 20


def test_a_second_place_that_is_the_run_itself_is_refused(language: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is the first"):
        train(tiny_settings(language, f"checkpoint.replica={tmp_path}"), str(tmp_path))


PROGRAM = """
import os, signal, sys, torch
import datastore as ds
near, far = sys.argv[1:]
state = {"model": {"w": torch.zeros(1000)}}
with ds.Checkpointer(ds.TwoPlaces(near, far), keep=ds.Keep(last=1)) as ck:
    begun = ck.restore(state) if ck.latest() is not None else None
    print(begun.step if begun else 0, begun.url if begun else "", state["model"]["w"][0].item(), flush=True)
    for step in range(1 + (begun.step if begun else 0), 100):
        state["model"]["w"].fill_(step)
        handle = ck.save(step, state)
        if step % 5 == 3:
            handle.replicated()
            os.rename(far, far + ".away")
            open(far, "x").close()   # What comes after does not get there.
            ck.save(step + 1, {"model": {"w": torch.full((1000,), step + 1.0)}}).committed()
            os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.skipif(not Path("/dev/shm").is_dir(), reason="there is no file system in memory")
def test_a_first_place_in_memory_outlives_the_process_and_the_second_is_not_asked(tmp_path: Path) -> None:
    near, far = Path("/dev/shm") / f"datastore-{uuid.uuid4().hex}", tmp_path / "far"
    far.mkdir()
    try:
        said = []
        for _ in range(2):
            done = subprocess.run(
                [sys.executable, "-c", PROGRAM, str(near), str(far)],
                capture_output=True,
                text=True,
                check=False,
                timeout=100,
            )
            assert done.returncode == -signal.SIGKILL, done.stderr
            said.append(done.stdout.split())
            far.with_name("far.away").rename(tmp_path / f"kept-{len(said)}")
            far.unlink()
            far.mkdir()
        assert said == [["0", "0.0"], ["4", str(near), "4.0"]]
    finally:
        shutil.rmtree(near)

"""A run whose disk fails, whose numbers fail, or whose files are damaged: nothing that is good is lost, and all of it is told."""

import errno
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from datastore.checkpoint.checkpointer import Checkpointer
from datastore.cli.main import cli
from datastore.cli.shell import CliSession, call
from datastore.errors import ConflictError, DatastoreError, ResumeError, StorageError
from datastore.storage.backends.local import LocalStorage
from datastore.storage.errors import explain
from datastore.testing.examples import tiny_settings
from datastore.training import supervisor
from datastore.training.export.export import export, open_model
from datastore.training.export.inference import evaluate
from datastore.training.metrics import TrainingProgress, read_metrics
from datastore.training.run.folder import RunFolder
from datastore.training.run.proof import prove
from datastore.training.start import resume, train
from datastore.training.trainer import Trainer


class FullDisk:
    """Has no room for keys that begin with one of `where`, until it is told to `clear`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *where: str, error: Exception | None = None) -> None:
        self.where: tuple[str, ...] = where
        self.refused: list[str] = []
        self.notes: list[str] = []
        self.hit = threading.Event()
        self.error = error
        for name in ("put", "put_new"):
            monkeypatch.setattr(LocalStorage, name, self._guarded(getattr(LocalStorage, name)))

    def _guarded(self, honest: Callable[..., None]) -> Callable[..., None]:
        def write(storage: LocalStorage, key: str, *chunks: Any) -> None:
            if key.startswith(self.where):
                self.refused.append(key)
                self.hit.set()
                raise self.error or explain(OSError(errno.ENOSPC, ""), key=key, url=storage.url, writing=True)
            honest(storage, key, *chunks)

        return write

    def clear_at(self, step: int) -> Callable[[TrainingProgress], None]:
        """Free the disk at `step`, once it has refused something; remember what is told, and when."""

        def told(progress: TrainingProgress) -> None:
            if progress.note:
                self.notes.append(f"{progress.step}: {progress.note}")
            if progress.step >= step and self.where != ("nothing",):
                assert self.hit.wait(60), "nothing was refused"  # A save may take longer than the steps beside it.
                self.where = ("nothing",)

        return told


@pytest.fixture
def _often(monkeypatch: pytest.MonkeyPatch) -> None:
    """Progress is told after each step."""
    monkeypatch.setattr(supervisor, "_PROGRESS_S", 0.0)


@pytest.mark.usefixtures("_often")
@pytest.mark.parametrize("where", ["parts/0000000005", "steps/0000000005", "consumed/0000000001-0000000005"])
def test_a_save_that_fails_is_told_and_a_later_one_stores_the_newest_state(
    language: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    disk = FullDisk(monkeypatch, where)
    run = str(tmp_path / "run")
    result = train(tiny_settings(language, "train.steps=12"), run, on_progress=disk.clear_at(9))
    assert disk.refused
    assert not result.stopped
    told = [note for note in disk.notes if "step 5 was not saved" in note]
    assert len(told) == 1
    assert "the disk is full" in told[0]
    with Checkpointer(run) as ck:
        assert ck.steps() == [10, 12]
    assert prove(run).holds
    monkeypatch.undo()
    other = str(tmp_path / "other")
    train(tiny_settings(language, "train.steps=12"), other)
    one, two = (open_model(url).model.state_dict() for url in (run, other))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_last_save_that_fails_ends_the_session_with_its_reason(
    language: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FullDisk(monkeypatch, "parts/0000000007")
    with pytest.raises(StorageError, match="the disk is full"):
        train(tiny_settings(language, "train.steps=7"), str(tmp_path / "run"))
    monkeypatch.undo()
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    assert resume(str(tmp_path / "run")).resumed_from == 5


def test_a_save_that_fails_for_a_reason_that_stays_ends_the_session_at_once(
    language: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    FullDisk(monkeypatch, "parts/0000000005", error=ConflictError("another writer"))
    with pytest.raises(ConflictError, match="another writer"):
        train(tiny_settings(language, "train.steps=200"), str(tmp_path / "run"))


@pytest.mark.usefixtures("_often")
def test_metrics_that_cannot_be_stored_are_told_tried_again_and_end_no_run(
    language: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FullDisk(monkeypatch, "metrics/")
    train(tiny_settings(language), str(tmp_path / "run"), on_progress=disk.clear_at(12))
    assert any("metrics were not stored" in note for note in disk.notes)
    lines = read_metrics(LocalStorage(tmp_path / "run"))
    assert [line["step"] for line in lines] == list(range(1, 21))
    with Checkpointer(tmp_path / "run") as ck:
        assert ck.steps() == [10, 15, 20]


def test_the_metrics_of_a_step_are_stored_before_the_step_is(
    language: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored: dict[str, list[dict[str, Any]]] = {}
    honest = LocalStorage.put_new

    def put_new(storage: LocalStorage, key: str, *chunks: Any) -> None:
        if key.startswith("steps/"):
            stored[key] = read_metrics(storage)
        honest(storage, key, *chunks)

    monkeypatch.setattr(LocalStorage, "put_new", put_new)
    train(tiny_settings(language), str(tmp_path))
    for step in (5, 10, 15, 20):
        lines = stored[f"steps/{step:010d}.json"]
        assert [line["step"] for line in lines] == list(range(1, step + 1))
        assert ("validation_loss" in lines[-1]) == (step in {10, 20})
    after = read_metrics(LocalStorage(tmp_path))
    assert [line["step"] for line in after if "save_stall_s" in line] == [5, 10, 15, 20]


@pytest.mark.parametrize("broken", [{}, {"value": "nan"}, {"momentum": True}])
def test_weights_that_are_not_finite_are_never_saved_over_the_last_good_step(
    language: str, tmp_path: Path, broken: dict[str, Any]
) -> None:
    hook = {"use": "training_hooks:Break", "step": 10, "value": "inf"} | broken
    settings = tiny_settings(language, "checkpoint.keep=1", "eval.every=0", hooks=(hook,))
    with pytest.raises(DatastoreError, match="not finite") as caught:
        train(settings, str(tmp_path / "run"))
    assert caught.value.values["step"] == 10
    assert "newest checkpoint is that of step 5" in caught.value.hint
    with Checkpointer(tmp_path / "run") as ck:
        assert ck.steps() == [5]


@pytest.mark.parametrize("keep", [1, 2])
def test_a_step_whose_weights_lead_to_a_loss_that_is_not_finite_is_dropped_for_the_one_before(
    language: str, tmp_path: Path, keep: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "can_go_on", lambda _: True)  # It looks at one row; the next step may have another.
    hook = {"use": "training_hooks:Break", "step": 15, "value": "1e38"}
    settings = tiny_settings(language, "optim.use=sgd", "eval.every=0", f"checkpoint.keep={keep}", hooks=(hook,))
    with pytest.raises(DatastoreError, match="the loss is not finite") as caught:
        train(settings, str(tmp_path / "run"))
    assert "The checkpoint of step 15 led to this step and was dropped" in caught.value.hint
    assert "that of step 10" in caught.value.hint
    with Checkpointer(tmp_path / "run") as ck:
        assert ck.steps() == [5, 10][-keep:]


def test_as_many_steps_are_kept_as_were_asked_for_once_the_newest_has_proven_itself(
    language: str, tmp_path: Path
) -> None:
    train(tiny_settings(language, "checkpoint.keep=1", "train.steps=10"), str(tmp_path))
    with Checkpointer(tmp_path) as ck:
        assert ck.steps() == [10]


def test_a_run_whose_validation_loss_is_not_a_number_is_not_finished(
    language: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Lost:
        loss = float("nan")

    settings = tiny_settings(language, "eval.every=20")
    with monkeypatch.context() as patch:
        patch.setattr(supervisor, "validation_loss", lambda *_, **__: Lost())
        with pytest.raises(DatastoreError, match="the validation loss is not finite"):
            train(settings, str(tmp_path))
    with Checkpointer(tmp_path) as ck:
        assert ck.latest() == 15
    assert resume(str(tmp_path)).resumed_from == 15


@pytest.fixture
def damaged(language: str, tmp_path: Path) -> Path:
    """A run whose newest step, 20, cannot be read."""
    run = tmp_path / "run"
    train(tiny_settings(language), str(run))
    (run / "steps" / "0000000020.json").write_bytes(b"{}")
    return run


def said(words: str, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    capsys.readouterr()
    code = call(cli, words.split(), CliSession())
    return code, capsys.readouterr().out


def test_what_uses_an_older_step_names_it_and_why(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found, done = evaluate(str(damaged)), export(str(damaged), str(damaged.parent / "hf"))
    assert found.step == done.step == 15
    for passed_over in (found.passed_over, done.passed_over):
        assert [reason.partition(":")[0] for reason in passed_over] == ["the checkpoint of step 20 is damaged"]
    assert evaluate(str(damaged.parent / "hf"), run=str(damaged)).step is None
    code, text = said(f"evaluate {damaged}", capsys)
    assert code == 0
    assert "at step 15" in text
    assert "not used: the checkpoint of step 20 is damaged" in text
    code, text = said(f"checkpoint export {damaged} {damaged.parent / 'again'}", capsys)
    assert code == 0
    assert "not used: the checkpoint of step 20 is damaged" in text


def test_nothing_is_proven_of_a_run_whose_newest_step_is_damaged(
    damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proof = prove(str(damaged))
    assert proof.steps == 15
    assert not proof.holds
    code, text = said(f"prove {damaged}", capsys)
    assert code == 1
    assert "up to the checkpoint of step 15" in text
    assert "differs: the checkpoint of step 20 is damaged" in text
    assert "proven" not in text


def test_a_damaged_session_file_does_not_stop_a_resume(language: str, tmp_path: Path) -> None:
    train(tiny_settings(language, "train.steps=5"), str(tmp_path))
    (session,) = (tmp_path / "sessions").iterdir()
    session.write_bytes(session.read_bytes()[:-40])
    assert resume(str(tmp_path), overrides=["train.steps=6"]).resumed_from == 5
    assert RunFolder.open(str(tmp_path)).threads_before(1) == 1


def test_a_run_that_is_past_its_last_step_is_not_called_finished(language: str, tmp_path: Path) -> None:
    train(tiny_settings(language, "train.steps=6"), str(tmp_path))
    with pytest.raises(
        ResumeError, match=r"more steps than it is to have \(step=6, train_steps=4\)\. To go on, ask for more"
    ):
        resume(str(tmp_path), overrides=["train.steps=4"])
    assert resume(str(tmp_path)).step == 6, "the steps of the run are what they were"


def test_the_command_line_goes_back_to_a_step_and_training_goes_on_from_there(
    language: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(tiny_settings(language), str(run))
    before = open_model(str(run)).model.state_dict()
    assert said(f"checkpoint rewind {run} --step 10 --dry-run", capsys) == (
        0,
        "would drop steps: 15, 20; the newest is 10\n",
    )
    code, text = said(f"checkpoint rewind {run} --step 10 --json", capsys)
    assert (code, json.loads(text)) == (0, {"step": 10, "dropped": [15, 20]})
    assert resume(str(run)).resumed_from == 10
    after = open_model(str(run)).model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert prove(str(run)).holds


def test_the_command_line_does_not_go_back_to_a_damaged_step(damaged: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with next(damaged.glob("parts/0000000010-*.safetensors")).open("r+b") as part:
        part.seek(5000)
        part.write(bytes(4000))
    assert call(cli, ["checkpoint", "rewind", str(damaged), "--step", "10"], CliSession()) == 1
    assert "this step is damaged" in capsys.readouterr().err
    with Checkpointer(damaged) as ck:
        assert ck.steps() == [10, 15, 20]

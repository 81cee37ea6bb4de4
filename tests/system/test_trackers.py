"""Trackers get each step, in order; what they do wrong is told once and stops nothing."""

import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from typing_extensions import override

from datastore.errors import ConfigError
from datastore.testing.examples import tiny_settings
from datastore.training.metrics import TrainingProgress, read_metrics
from datastore.training.run.folder import RunFolder
from datastore.training.session import trackers
from datastore.training.session.trackers import TrackedRun, Tracker, Trackers
from datastore.training.settings import Settings
from datastore.training.start import resume, train

FEW = ("train.steps=4", "eval.every=0", "checkpoint.every=2")

RUN = TrackedRun(url="runs/x", created="now", first_step=1, settings={}, folder=None)


class Diary(Tracker):
    seen: list[Any] = []  # noqa: RUF012 - of all, as the run makes the instance

    @override
    def start(self, run: TrackedRun) -> None:
        self.seen.append(("start", run.first_step))

    @override
    def log(self, step: int, record: Mapping[str, Any]) -> None:
        self.seen.append((step, record["loss"]))

    @override
    def finish(self) -> None:
        self.seen.append("finish")


class Broken(Tracker):
    @override
    def log(self, step: int, record: Mapping[str, Any]) -> None:
        if step == 2:
            raise ConnectionError("no route to host")


class Offline(Tracker):
    @override
    def start(self, run: TrackedRun) -> None:
        raise TimeoutError("no answer")


class Stuck(Tracker):
    @override
    def log(self, step: int, record: Mapping[str, Any]) -> None:
        threading.Event().wait(60)


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "my_trackers", sys.modules[__name__])
    Diary.seen.clear()


def tracked(language: str, *uses: str) -> Settings:
    tables = ", ".join(f'{{use = "my_trackers:{use}"}}' for use in uses)
    return tiny_settings(language, *FEW, f"metrics.trackers=[{tables}]")


def test_a_tracker_gets_each_step_of_each_session(language: str, tmp_path: Path) -> None:
    train(tracked(language, "Diary"), tmp_path)
    resume(tmp_path, overrides=["train.steps=6"])
    losses = {line["step"]: line["loss"] for line in read_metrics(RunFolder.open(str(tmp_path)).storage)}
    first = [(step, losses[step]) for step in range(1, 5)]
    assert Diary.seen == [("start", 1), *first, "finish", ("start", 5), (5, losses[5]), (6, losses[6]), "finish"]


def test_those_that_fail_are_told_once_and_stop_nothing(language: str, tmp_path: Path) -> None:
    told: list[TrainingProgress] = []
    settings = tracked(language, "Broken", "Offline", "Diary")
    result = train(settings, tmp_path, on_progress=told.append)
    assert result.step == 4
    assert Diary.seen[-1] == "finish"
    notes = [one.note for one in told if "left out" in one.note]
    assert sum("Broken" in note for note in notes) <= 1
    assert sum("Offline" in note and "TimeoutError: no answer" in note for note in notes) == 1


def test_one_that_fails_in_the_middle_is_told_with_its_reason() -> None:
    followed = Trackers({"broken": Broken(Tracker.Settings())}, RUN)
    for step in range(1, 5):
        followed.log({"step": step, "loss": 1.0})
    followed.finish()
    assert followed.trouble() == "the tracker broken is left out from here on: ConnectionError: no route to host"
    assert followed.trouble() == ""


def test_one_that_hangs_holds_nobody_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers, "_FINISH_S", 0.1)
    monkeypatch.setattr(trackers, "_MOST_WAITING", 3)
    followed = Trackers({"stuck": Stuck(Tracker.Settings())}, RUN)
    for step in range(1, 10):
        followed.log({"step": step})
    assert "3 records late" in followed.trouble()
    followed = Trackers({"stuck": Stuck(Tracker.Settings())}, RUN)
    followed.log({"step": 1})
    followed.finish()
    assert "did not end" in followed.trouble()


def test_a_wrong_setting_is_an_error_before_the_first_step(language: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="projekt"):
        train(tiny_settings(language, *FEW, 'metrics.trackers=[{use = "wandb", projekt = "x"}]'), tmp_path / "run")
    assert not RunFolder.open(str(tmp_path / "run")).has_checkpoint()


def records_of(file: Path) -> Iterator[bytes]:
    """Yield the records in a file of wandb: a log in blocks of 32 KiB, each part with checksum, size and kind."""
    raw, place, record = file.read_bytes(), 7, b""
    while place + 7 <= len(raw):
        left = 32768 - place % 32768
        size, kind = int.from_bytes(raw[place + 4 : place + 6], "little"), raw[place + 6]
        if left < 7 or kind == 0:
            place += left
            continue
        record += raw[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in {1, 4}:
            yield record
            record = b""


@pytest.mark.filterwarnings("ignore")
def test_wandb_has_all_steps_offline_also_those_of_a_killed_session(language: str, tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    from wandb.proto.wandb_internal_pb2 import Record

    train(tiny_settings(language, *FEW, 'metrics.trackers=[{use = "wandb", mode = "offline"}]'), tmp_path)
    # As after a kill: the newest checkpoint is older than what the tracker was told.
    for file in (tmp_path / "steps").iterdir():
        if "4" in file.name:
            file.unlink()
    result = resume(tmp_path, overrides=["train.steps=5"])
    assert result.resumed_from == 2
    found, ids = [], set()
    for file in sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb")):
        ids.add(file.stem)
        for raw in records_of(file):
            record = Record.FromString(raw)
            if record.WhichOneof("record_type") == "history":
                values = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
                found.append((int(values["step"]), float(values["loss"])))
    assert len(ids) == 1
    assert [step for step, _ in found] == [1, 2, 3, 4, 3, 4, 5]
    losses = dict(found)
    assert losses == {
        line["step"]: pytest.approx(line["loss"]) for line in read_metrics(RunFolder.open(str(tmp_path)).storage)
    }

"""Looking back on runs: summaries, differences and pictures, also of runs that were killed, went back, or are damaged."""

import math
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from click.testing import CliRunner

from datastore.checkpoint.checkpointer import Checkpointer
from datastore.cli.main import cli
from datastore.errors import ConfigError, MissingError
from datastore.storage.backends.local import LocalStorage
from datastore.storage.resolve import open_storage
from datastore.testing.examples import make_language, tiny_settings
from datastore.training.metrics import MetricsWriter
from datastore.training.run.folder import RunFolder, RunSession
from datastore.training.run.history import _thinned, compare, ending_of, numbers_of, plot, runs_below, summary_of
from datastore.training.run.lock import RunLock


def make_run(url: str, data: str, *overrides: str) -> RunFolder:
    """A run whose first session was killed at step 30, and whose second went on from step 20 to step 40."""
    folder = RunFolder.open(url)
    folder.store(folder.begin(tiny_settings(data, "train.steps=40", *overrides)))
    for number, (first, last) in enumerate([(1, 30), (21, 40)], 1):
        name = f"{number:06d}-{number:016x}"
        writer = MetricsWriter(folder.storage, session=name, first_step=first)
        for step in range(first, last + 1):
            record = {
                "step": step,
                "time": 3600.0 * step,
                "tokens": 100 * step,
                "loss": number + 1 / step,
                "tokens_per_s": 10.0 * number,
                "note": "not a number",
            }
            writer.write(record | ({"validation_loss": 9.5} if step == 25 else {}))
        writer.close()
        folder.add_session(
            RunSession(
                session=name,
                started="2026-01-01T00:00:00Z",
                from_step=first - 1,
                world=number,
                host="here",
                device="cpu",
                precision="fp32",
                compiled=False,
                threads=1,
                versions={},
                number=number,
            )
        )
    return folder


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    make_language(tmp_path / "data")
    make_run(str(tmp_path / "runs" / "a"), str(tmp_path / "data"))
    make_run(str(tmp_path / "runs" / "sweep" / "b"), str(tmp_path / "data"), "optim.lr=0.5")
    return tmp_path / "runs"


def test_runs_are_found_and_summed_up(runs: Path) -> None:
    (runs / "model").mkdir()
    (runs / "model" / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    assert runs_below(str(runs)) == [str(runs / "a"), str(runs / "sweep" / "b")]
    assert runs_below(str(runs / "a")) == [str(runs / "a")]
    assert runs_below(str(runs / "nowhere")) == []
    found = summary_of(str(runs / "a"))
    assert (found.step, found.steps, found.sessions, found.world, found.tokens) == (40, 40, 2, 2, 4_000)
    assert (found.loss, found.validation_loss, found.tokens_per_s) == (2 + 1 / 40, 9.5, 20.0)
    assert found.data == {"data": f"{runs.parent / 'data'}@1"}
    assert (found.writer, found.saved) == (None, 0)
    make_run(str(runs / "c"), f"{runs.parent / 'data'}@1")
    assert summary_of(str(runs / "c")).data == found.data


def test_a_run_is_finished_when_its_last_step_is_saved() -> None:
    assert ending_of(40, steps=40, saved=40) == "finished"
    assert ending_of(30, steps=40, saved=30) == "stopped"
    assert ending_of(40, steps=40, saved=5) == "stopped, saved up to step 5"
    assert ending_of(3, steps=40, saved=0) == "stopped, no step is saved"


def test_runs_of_the_same_name_are_told_apart(runs: Path) -> None:
    make_run(str(runs / "old" / "b"), str(runs.parent / "data"))
    listed = CliRunner().invoke(cli, ["runs", "ls", str(runs)]).output
    assert [line.split()[0] for line in listed.splitlines()] == ["run", "a", "old/b", "sweep/b"]
    compared = CliRunner().invoke(cli, ["runs", "compare", str(runs / "sweep" / "b"), str(runs / "old" / "b")]).output
    assert compared.split()[:3] == ["setting", "sweep/b", "old/b"]
    figure = plot([str(runs / "sweep" / "b"), str(runs / "old" / "b")], numbers=["loss"])
    assert [line.get_label() for line in figure.axes[0].lines] == ["sweep/b", "old/b"]


def test_runs_are_found_without_a_look_at_every_file(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (runs / ".hidden").mkdir()
    monkeypatch.setattr(LocalStorage, "list", lambda *_: pytest.fail("every file is listed"))
    assert runs_below(str(runs)) == [str(runs / "a"), str(runs / "sweep" / "b")]


def test_runs_are_found_where_there_are_no_folders(tmp_path: Path) -> None:
    make_language(tmp_path / "data")
    url = f"memory://history-{tmp_path.name}"
    make_run(f"{url}/x/one", str(tmp_path / "data"))
    assert runs_below(url) == [f"{url}/x/one"]
    assert summary_of(f"{url}/x/one").step == 40


def test_who_writes_is_told_and_a_damaged_run_does_not_hide_the_others(runs: Path) -> None:
    with RunLock(open_storage(str(runs / "a")), session="s"):
        assert "process" in str(summary_of(str(runs / "a")).writer)
    assert summary_of(str(runs / "a")).writer is None
    config = runs / "a" / "config.json"
    config.write_text(config.read_text(encoding="utf-8").replace('"lr"', '"rl"'), encoding="utf-8")
    assert "config.json" in summary_of(str(runs / "a")).problem
    assert len(runs_below(str(runs))) == 2
    with pytest.raises(MissingError, match=r"there is no run .* Start one"):
        summary_of(str(runs))
    with Checkpointer(str(runs / "own")) as checkpointer:
        checkpointer.save(1, {"numbers": {"one": 1}})
    with pytest.raises(MissingError, match=r"there is no run .* checkpoints of another loop"):
        summary_of(str(runs / "own"))


def test_what_differs_is_told_and_nothing_else(runs: Path) -> None:
    found = compare([str(runs / "a"), str(runs / "sweep" / "b")])
    assert set(found.settings) == {"optim.lr"}
    assert found.settings["optim.lr"][1] == 0.5
    assert [step for step, _ in found.losses] == list(range(4, 41, 4))
    # Steps 21 to 30 were taken twice: what counts is the second time.
    assert dict(found.losses)[20] == [1 + 1 / 20] * 2
    assert dict(found.losses)[24] == [2 + 1 / 24] * 2
    with pytest.raises(ConfigError, match="nothing to compare"):
        compare([str(runs / "a")])


def test_a_notebook_shows_a_picture_without_pyplot(runs: Path) -> None:
    figure: Any = plot(str(runs / "a"))
    assert figure._repr_png_().startswith(b"\x89PNG")


def test_a_picture_has_a_panel_for_each_number_and_a_line_for_each_run(runs: Path, tmp_path: Path) -> None:
    urls = [str(runs / "a"), str(runs / "sweep" / "b")]
    figure = plot(urls, tmp_path / "picture.svg")
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["loss", "tokens_per_s"]
    steps, losses = figure.axes[0].lines[0].get_data()
    assert list(steps) == list(range(1, 41))
    assert list(losses) == [(1 if step <= 20 else 2) + 1 / step for step in range(1, 41)]
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert labels == ["a", "a, validation", "b", "b, validation"]
    assert ET.parse(tmp_path / "picture.svg").getroot().tag.endswith("svg")
    hours = plot(urls[0], numbers=["loss"], against="hours").axes[0].lines[0].get_data()[0]
    assert list(hours) == list(range(40))
    assert list(plot(urls[0], numbers=["lr", "loss"], against="tokens").axes[0].lines[0].get_data()[0])[-1] == 4_000
    assert set(numbers_of(urls[0])) == {"time", "tokens", "loss", "tokens_per_s", "validation_loss"}


def test_what_cannot_be_drawn_is_refused(runs: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing to draw"):
        plot(str(runs / "a"), numbers=["no"])
    with pytest.raises(ConfigError, match="no such axis"):
        plot(str(runs / "a"), against="epochs")
    with pytest.raises(ConfigError, match="cannot be saved"):
        plot(str(runs / "a"), tmp_path / "picture.nothing")
    with pytest.raises(MissingError):
        plot(str(runs / "zz"))


def test_a_long_line_keeps_its_spikes_and_its_gaps() -> None:
    points = [(float(step), math.sin(step / 1e4)) for step in range(100_000)]
    points[54_321] = (54_321.0, 99.0)
    points[70_007] = (70_007.0, -99.0)
    for step in range(90_000, 90_500):
        points[step] = (float(step), math.nan)
    kept = _thinned(points)
    assert len(kept) <= 2_000
    assert kept == sorted(kept, key=lambda point: point[0])
    assert {(54_321.0, 99.0), (70_007.0, -99.0)} <= set(kept)
    assert sum(math.isnan(value) for _, value in kept) >= 3
    assert _thinned(points[:100]) == points[:100]

"""What commands print, and the line that shows how training goes."""

import io
import re
import sys
import threading
import time
from typing import Any

import click
import pytest

from datastore.cli.output import (
    PlainLines,
    ProgressWords,
    fields,
    json_option,
    moment,
    progress_option,
    say_json,
    table,
    waiting,
    with_progress,
)
from datastore.cli.runs import TrainingLine, line_of
from datastore.cli.shell import CliSession, call
from datastore.training.metrics import TrainingProgress
from datastore.units import Progress

NOW = TrainingProgress(
    step=1200, steps=3000, loss=2.5, validation_loss=2.75, tokens_per_s=12345.6, data_wait=0.0012, eta_s=90
)


class Terminal(io.StringIO):
    """A stderr that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_numbers_stand_to_the_right_and_text_to_the_left(capsys: pytest.CaptureFixture[str]) -> None:
    table(("name", "size"), [("a", 5), ("longer", 12345)])
    assert capsys.readouterr().out == "name      size\na            5\nlonger  12,345\n"


def test_a_missing_value_is_an_empty_cell(capsys: pytest.CaptureFixture[str]) -> None:
    table(("name", "loss"), [("a", None), ("b", 1.23456)])
    assert capsys.readouterr().out == "name  loss\na\nb     1.235\n"


def test_fields_without_a_value_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    fields({"one": 1, "longer": None, "two": "x"})
    assert capsys.readouterr().out == "one     1\ntwo     x\n"


def test_json_takes_documents(capsys: pytest.CaptureFixture[str]) -> None:
    say_json([TrainingProgress(step=1, steps=2)])
    assert '"step": 1' in capsys.readouterr().out


def test_a_stored_time_is_shown_without_fractions() -> None:
    assert moment("2026-11-24T22:34:25.582583Z") == moment("2026-11-24T22:34:25Z") == "2026-11-24 22:34:25 UTC"


def test_the_line_says_step_loss_rate_wait_and_what_is_left() -> None:
    assert line_of(NOW) == (
        "step 1,200/3,000  loss 2.5000  validation 2.7500  12,346 tokens/s  waiting for data 0.1%  1 min 30 s left"
    )
    assert line_of(TrainingProgress(step=0, steps=3)) == "step 0/3"


def test_on_a_terminal_the_line_is_redrawn_and_a_new_validation_loss_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with TrainingLine() as line:
        line.update(NOW)
        line.update(NOW)
    assert screen.getvalue().count("\n") == 1
    assert screen.getvalue().endswith("\r\x1b[K")


def test_elsewhere_only_notes_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingLine() as line:
        line.update(NOW)
        line.update(TrainingProgress(step=4, steps=9, note="resumed at step 4"))
    assert capsys.readouterr().err == "resumed at step 4\n"


def test_other_ranks_show_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingLine(shown=False) as line:
        line.update(TrainingProgress(step=4, steps=9, note="resumed at step 4"))
    assert capsys.readouterr().err == ""


class Clock:
    """A clock that stands still until it is told to move."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_words_have_the_amounts_the_share_the_rate_and_the_time_left() -> None:
    clock = Clock()
    words = ProgressWords(clock=clock)
    assert words(0, 4 * 2**30) == "0 B of 4 GiB (0%)"
    clock.now += 10
    assert words(2**30, 4 * 2**30) == "1 GiB of 4 GiB (25%), 102 MiB/s, 30.0 s left"
    clock.now += 30
    assert words(4 * 2**30, 4 * 2**30) == "4 GiB of 4 GiB (100%), 102 MiB/s"


def test_what_an_earlier_run_has_done_does_not_count_for_the_rate() -> None:
    clock = Clock()
    words = ProgressWords(unit="files", clock=clock)
    assert words(900, 1000) == "900 of 1,000 files (90%)"
    clock.now += 10
    assert words(950, 1000) == "950 of 1,000 files (95%), 5 files/s, 10.0 s left"


def test_a_total_that_nobody_knows_is_not_named() -> None:
    clock = Clock()
    words = ProgressWords(unit="files", clock=clock)
    words(0, 0)
    clock.now += 2
    assert words(4, 0) == "4 files, 2 files/s"


def test_a_line_is_printed_when_ten_seconds_are_over(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    lines = PlainLines(clock=clock)
    for now in (101, 109.9, 110, 119, 120, 121):
        clock.now = now
        lines.say(lambda: f"at {clock.now:g}")
    assert capsys.readouterr().err == "at 110\nat 120\n"


def test_each_stage_has_a_rate_of_its_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("datastore.cli.output.LINE_EVERY_S", 0.0)
    monkeypatch.setattr("datastore.cli.output.progress_kind", lambda: "plain")

    def work(*, progress: Any) -> None:
        progress(0, 0, "looking")
        progress(10, 100)
        progress(100, 100, "ending")

    with_progress("job", work, unit="files")
    assert capsys.readouterr().err.splitlines() == [
        "job, looking",
        "job: 10 of 100 files (10%)",
        "job, ending: 100 of 100 files (100%)",
    ]


def count_to_ten(*, progress: Progress | None, by: int) -> int:
    for done in range(0, 10, by):
        if progress is not None:
            progress(done, 10)
    return 10


@pytest.mark.parametrize(
    ("options", "terminal", "shown"),
    [
        ("", True, "bar"),
        ("", False, "lines"),
        ("--json", True, "bar"),
        ("--json", False, "nothing"),
        ("--progress none", True, "nothing"),
        ("--progress plain", True, "lines"),
        ("--progress plain --json", False, "lines"),
        ("--progress bar", False, "bar"),
    ],
)
def test_progress_suits_stderr_unless_the_option_says_otherwise(
    *, options: str, terminal: bool, shown: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    @click.command()
    @progress_option
    @json_option
    def go(*, as_json: bool) -> None:
        assert as_json == ("--json" in options)
        assert with_progress("count", count_to_ten, unit="numbers", by=5) == 10

    stderr = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr("datastore.cli.output.LINE_EVERY_S", 0.0)
    assert call(go, options.split(), CliSession()) == 0
    text = stderr.getvalue()
    found = "bar" if "\x1b[" in text else "lines" if text.startswith("count: 0 of 10 numbers (0%)\n") else text
    assert (found or "nothing") == shown


@pytest.mark.parametrize("kind", ["plain", "bar"])
def test_who_waits_hears_how_long_it_has_taken(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = Terminal()
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr("datastore.cli.output.LINE_EVERY_S", 0.001)
    monkeypatch.setattr("datastore.cli.output.progress_kind", lambda: kind)
    given_up = time.monotonic() + 30
    with waiting("sql"):
        while not (found := re.search(r"sql.*?[\d.]+ m?s so far", stderr.getvalue())) and time.monotonic() < given_up:
            time.sleep(0.001)
    assert found
    assert "datastore-waiting" not in {thread.name for thread in threading.enumerate()}


def test_an_error_ends_the_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datastore.cli.output.progress_kind", lambda: "plain")
    with pytest.raises(ValueError, match="no such column"), waiting("sql"):
        raise ValueError("no such column")
    assert "datastore-waiting" not in {thread.name for thread in threading.enumerate()}


def test_where_no_progress_is_wanted_there_is_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datastore.cli.output.progress_kind", lambda: "none")
    with waiting("sql"):
        assert "datastore-waiting" not in {thread.name for thread in threading.enumerate()}


def test_training_prints_its_line_now_and_then_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with TrainingLine(clock=clock) as line:
        line.update(NOW)
        clock.now += 10
        line.update(NOW)
        line.update(NOW)
    assert capsys.readouterr().err == f"{line_of(NOW)}\n"

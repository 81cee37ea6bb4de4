"""What commands print, and the line that shows how training goes."""

import io
import sys

import pytest

from datastore.cli.output import fields, moment, progress_bar, say_json, table
from datastore.cli.runs import TrainingLine, line_of
from datastore.training.metrics import TrainingProgress

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


def test_a_bar_is_for_terminals_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("verify") as move:
        assert move is None
    assert capsys.readouterr().err == ""
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    with progress_bar("verify") as move:
        assert move is not None
        move(5, 10)
    assert "verify" in screen.getvalue()

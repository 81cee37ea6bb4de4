"""The numbers of runs, as they are drawn: sessions that overlap, numbers that are none, files that grow."""

import random
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest

from datastore.errors import CorruptError
from datastore.storage.base import Storage
from datastore.storage.resolve import open_storage
from datastore.storage.statistics import total_statistics
from datastore.training.metrics import read_metrics
from datastore.ui.series import RunSeries, thinned


def put(storage: Storage, first: int, session: int, records: list[dict[str, Any]]) -> None:
    lines = b"".join(orjson.dumps(record) + b"\n" for record in records)
    storage.put(f"metrics/{first:010d}-{session:06d}-abc.jsonl", lines)


def steps(first: int, stop: int, loss: float, **more: float) -> list[dict[str, Any]]:
    return [
        {"step": step, "time": 1000.0 + 3600 * step, "tokens": 64 * step, "loss": loss + step / 1000, **more}
        for step in range(first, stop)
    ]


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return open_storage(str(tmp_path))


def test_a_step_that_was_taken_again_counts_as_it_was_taken_last(storage: Storage) -> None:
    put(storage, 1, 1, steps(1, 61, 5.0))
    put(storage, 41, 2, steps(41, 81, 3.0))
    series = RunSeries(storage)
    series.refresh()
    line = series.line("loss")
    assert line.x == list(range(1, 81))
    assert line.y == [record["loss"] for record in read_metrics(storage)]
    assert line.taken_again == [([float(step) for step in range(41, 61)], [5 + step / 1000 for step in range(41, 61)])]
    assert series.rows() == 80
    assert series.last()["loss"] == 3.08


def test_sessions_that_were_cut_short_twice(storage: Storage) -> None:
    put(storage, 1, 1, steps(1, 101, 5.0))
    put(storage, 51, 2, steps(51, 91, 4.0))
    put(storage, 21, 3, steps(21, 31, 3.0))
    series = RunSeries(storage)
    series.refresh()
    assert series.line("loss").y == [record["loss"] for record in read_metrics(storage)]
    assert [len(x) for x, _ in series.line("loss").taken_again] == [80, 40]


def test_what_is_not_finite_is_a_gap_and_marked(storage: Storage) -> None:
    records = steps(1, 11, 2.0)
    records[3]["loss"] = float("nan")
    records[7]["loss"] = float("inf")
    put(storage, 1, 1, records)
    series = RunSeries(storage)
    series.refresh()
    line = series.line("loss")
    assert [place for place, value in enumerate(line.y) if value is None] == [3, 7]
    assert (line.marks, line.marked) == ([4.0, 8.0], 2)
    assert series.values("loss")[4] is None


def test_a_loss_that_stays_bad_is_a_gap_to_the_end(storage: Storage) -> None:
    """The trainer leaves out what is not finite, as JSON has no word for it."""
    records = steps(1, 101, 2.0)
    for record in records[10:]:
        del record["loss"]
    put(storage, 1, 1, records)
    series = RunSeries(storage)
    series.refresh()
    line = series.line("loss")
    assert (len(line.x), line.y[9:12], line.marked) == (100, [2.01, None, None], 90)
    assert series.line("loss", span=(50, 60)).marked == 13  # One more on either side.


def test_a_number_that_begins_or_ends_within_a_run_was_never_bad(storage: Storage) -> None:
    records = steps(1, 101, 2.0)
    for record in records[20:]:
        record["sparsity"] = 0.5
    records[60]["validation_loss"], records[80]["validation_loss"] = 3.0, float("nan")
    put(storage, 1, 1, records)
    series = RunSeries(storage)
    series.refresh()
    line = series.line("sparsity")
    assert (line.x[0], line.y.count(None), line.marked) == (21.0, 0, 0)
    line = series.line("validation_loss")
    assert (line.x, line.y, line.marks) == ([61.0, 81.0], [3.0, None], [81.0])


def test_marks_are_of_the_whole_run_however_many_there_are(storage: Storage) -> None:
    records = steps(1, 5_001, 2.0)
    for record in records[1::2]:
        record["loss"] = None
    put(storage, 1, 1, records)
    series = RunSeries(storage)
    series.refresh()
    line = series.line("loss")
    assert (line.marked, line.marks[0], line.marks[-1]) == (2_500, 2.0, 5_000.0)
    assert len(line.x) <= 3_000
    assert line.y.count(None) > 900


def test_what_a_later_session_took_again_is_drawn_where_it_has_the_number(storage: Storage) -> None:
    records = steps(1, 61, 5.0)
    records[49]["validation_loss"] = 4.0
    put(storage, 1, 1, records)
    put(storage, 41, 2, steps(41, 81, 3.0))
    series = RunSeries(storage)
    series.refresh()
    assert series.line("validation_loss").taken_again == [([50.0], [4.0])]
    assert series.line("lr").taken_again == []
    assert [len(x) for x, _ in series.line("loss", span=(1, 42)).taken_again] == [3]


def test_the_numbers_of_one_step_are_those_that_count(storage: Storage) -> None:
    put(storage, 1, 1, steps(1, 61, 5.0))
    put(storage, 41, 2, steps(41, 81, 3.0))
    series = RunSeries(storage)
    series.refresh()
    assert [series.at(step).get("loss") for step in (40, 41, 80, 81)] == [5.04, 3.041, 3.08, None]


def test_a_number_that_few_steps_have_is_a_line_without_gaps(storage: Storage) -> None:
    records = steps(1, 101, 2.0)
    for record in records[9::10]:
        record["validation_loss"] = 7.0
    put(storage, 1, 1, records)
    series = RunSeries(storage)
    series.refresh()
    line = series.line("validation_loss")
    assert (line.x, set(line.y), line.marked) == ([float(step) for step in range(10, 101, 10)], {7.0}, 0)


def test_axes_and_stretches(storage: Storage) -> None:
    put(storage, 1, 1, steps(1, 11, 2.0))
    series = RunSeries(storage)
    series.refresh()
    assert series.line("loss", against="tokens").x == [64.0 * step for step in range(1, 11)]
    assert series.line("loss", against="hours").x == pytest.approx(range(10))
    assert series.line("loss", span=(3, 5)).x == list(range(2, 7))  # One more on either side: it goes on to the edges.
    assert series.line("loss", span=(1, 10)).x == list(range(1, 11))


def test_files_that_grow_are_read_on_and_their_last_line_may_change(storage: Storage) -> None:
    records = steps(1, 401, 2.0)
    series = RunSeries(storage)
    rng, stop = random.Random(3), 0
    while stop < len(records):
        stop = min(len(records), stop + rng.randrange(1, 90))
        seen = [dict(record) for record in records[:stop]]
        put(storage, 1, 1, seen)
        series.refresh()
        records[stop - 1]["validation_loss"] = 9.0  # As `amend` adds it to a line that was stored already.
    put(storage, 1, 1, records)
    version = series.refresh()
    assert series.values("loss") == {record["step"]: record["loss"] for record in records}
    whole = RunSeries(storage)
    whole.refresh()
    assert series.line("validation_loss") == whole.line("validation_loss")
    assert series.refresh() == version


def test_only_what_is_new_is_read(storage: Storage) -> None:
    records = steps(1, 1_001, 2.0)
    put(storage, 1, 1, records[:-1])
    series = RunSeries(storage)
    series.refresh()
    put(storage, 1, 1, records)
    before = total_statistics(storage.statistics()).bytes
    series.refresh()
    read = total_statistics(storage.statistics()).bytes - before
    assert 0 < read < 3 * len(orjson.dumps(records[-1]))
    assert len(series.line("loss").x) == 1_000


def test_a_file_that_is_read_in_parts_is_the_same(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    records = steps(1, 301, 2.0, sparsity=0.5)
    for record in records[100:]:
        record["validation_loss"] = float("nan") if record["step"] % 7 else 3.0
    records[200]["note"] = "x" * 5_000
    put(storage, 1, 1, records)
    whole = RunSeries(storage)
    whole.refresh()
    for length in (1, 100, 1_000):
        monkeypatch.setattr("datastore.ui.series._AT_ONCE", length)
        parts = RunSeries(storage)
        parts.refresh()
        assert parts.names() == whole.names()
        for name in ("step", "loss", "validation_loss", "sparsity"):
            assert parts.line(name) == whole.line(name)


def test_another_file_in_the_place_of_one_is_read_anew(storage: Storage) -> None:
    put(storage, 1, 1, steps(1, 101, 2.0))
    series = RunSeries(storage)
    series.refresh()
    put(storage, 1, 1, steps(1, 11, 7.0))
    series.refresh()
    assert series.line("loss").y == [7 + step / 1000 for step in range(1, 11)]


@pytest.mark.parametrize("rubbish", [b"nothing\n", b'{"loss":1}\n', b"[1]\n", b'{"step":null}\n', b"\xff\xfe\n"])
def test_a_damaged_file_is_said_with_its_name(storage: Storage, rubbish: bytes) -> None:
    storage.put("metrics/0000000001-000001-abc.jsonl", rubbish)
    with pytest.raises(CorruptError, match="metrics/0000000001-000001-abc"):
        RunSeries(storage).refresh()


def test_a_number_that_becomes_a_text_does_not_hide_the_others(storage: Storage) -> None:
    records = steps(1, 5, 2.0)
    records[2]["tokens"] = "many"
    put(storage, 1, 1, records)
    series = RunSeries(storage)
    series.refresh()
    assert len(series.line("loss").x) == 4


def test_a_picture_keeps_every_extreme() -> None:
    rng = np.random.default_rng(5)
    x, y = np.arange(100_000.0), rng.normal(size=100_000)
    y[77_777], y[33_333], y[50_000] = 100, -100, np.nan
    found_x, found_y = thinned(x, y)
    assert len(found_x) <= 2_100
    known = dict(zip(found_x, found_y, strict=True))
    assert (known[77_777], known[33_333], known[50_000]) == (100, -100, None)
    assert found_x == sorted(found_x)


def test_a_million_steps_are_few_points() -> None:
    x = np.arange(1e6)
    points, values = thinned(x, np.full(x.size, np.nan))
    assert len(points) < 2_100
    assert set(values) == {None}
    assert thinned(np.empty(0), np.empty(0)) == ([], [])

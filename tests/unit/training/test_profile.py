"""A profile of some steps says where they went."""

import gzip
import json
from pathlib import Path

import pytest

from datastore.errors import ConfigError
from datastore.testing.examples import make_language, tiny_settings
from datastore.training.run.profile import _covered, _parts, part, window_of
from datastore.training.start import resume, train


def test_what_lies_within_another_part_counts_as_that() -> None:
    spans = [
        ("datastore: step", 0.0, 100.0),
        ("datastore: save", 10.0, 50.0),
        ("datastore: forward", 20.0, 30.0),
        ("datastore: forward", 60.0, 65.0),
        ("aten::mm", 61.0, 64.0),
    ]
    assert _parts(spans) == {"save": 40.0, "forward": 5.0}


def test_messages_that_overlap_are_counted_once() -> None:
    assert _covered([(5.0, 8.0), (0.0, 3.0), (2.0, 6.0)]) == 8.0


def test_a_part_is_free_while_nobody_looks() -> None:
    assert part("forward") is part("backward")


@pytest.mark.parametrize("text", ["", "0:3", "5:4", "a:b", "3-4", ":4"])
def test_a_window_that_names_no_steps_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="not steps to profile"):
        window_of(text)


def test_a_profile_tells_of_each_part_and_changes_no_bit(tmp_path: Path) -> None:
    make_language(tmp_path / "d")
    few = ("train.steps=6", "checkpoint.every=4", "eval.every=0")
    plain = train(tiny_settings(tmp_path / "d", *few), tmp_path / "plain")
    looked = train(tiny_settings(tmp_path / "d", *few, "metrics.profile=3:5"), tmp_path / "looked")
    assert looked.loss == plain.loss
    found = looked.profile
    assert found is not None
    assert (found.first, found.last) == (3, 5)
    assert {"data", "forward", "backward", "optimizer", "save"} <= found.parts.keys()
    inside = sum(seconds for name, seconds in found.parts.items() if name != "save")
    assert inside == pytest.approx(found.step_s, rel=0.05)
    trace = json.loads(gzip.decompress((tmp_path / "looked" / found.trace).read_bytes()))
    steps = [one for one in trace["traceEvents"] if one.get("name") == "datastore: step" and one.get("ph") == "X"]
    assert len([one for one in steps if one.get("cat") == "user_annotation"]) == 3


def test_a_run_that_ends_within_the_window_has_the_steps_that_it_took(tmp_path: Path) -> None:
    make_language(tmp_path / "d")
    few = ("train.steps=3", "checkpoint.every=0", "eval.every=0")
    found = train(tiny_settings(tmp_path / "d", *few, "metrics.profile=2:9"), tmp_path / "run").profile
    assert found is not None
    assert (found.first, found.last) == (2, 3)
    assert resume(tmp_path / "run", overrides=["train.steps=4", "metrics.profile=1:2"]).profile is None

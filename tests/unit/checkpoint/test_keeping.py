"""Which steps stay: the last, the best, every n-th, those of a time, the pinned; held against saying it the plain way."""

import itertools
import math
import os
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from datastore.checkpoint.checkpointer import Checkpointer
from datastore.checkpoint.format.manifest import StepCommit
from datastore.checkpoint.inspect import list_steps
from datastore.checkpoint.keeping import Keep, best_steps, check_metric, collect, expired, pin, pinned_steps
from datastore.cli.main import cli
from datastore.cli.shell import CliSession, call
from datastore.errors import ConfigError, ConflictError, MissingError
from datastore.storage.base import Storage
from datastore.storage.resolve import open_storage

NUMBER = itertools.count()


@pytest.fixture
def storage() -> Storage:
    return open_storage(f"memory://keeping-{os.getpid()}-{next(NUMBER)}")


def commit_of(step: int, loss: float | None, second: int) -> StepCommit:
    value = loss if loss is None or math.isfinite(loss) else {"$": "float", "value": str(loss)}
    return StepCommit(
        run_id="r",
        step=step,
        save_id=f"{step:016x}",
        session="s",
        parent=None,
        time=datetime.fromtimestamp(second, UTC).isoformat(),
        writer="w",
        world=1,
        parts=(),
        uses=(),
        items={},
        metrics={} if loss is None else {"loss": value},
    )


losses = st.none() | st.sampled_from([0.5, 1.0, 2.0, math.nan, math.inf])


@settings(max_examples=200)
@given(
    found=st.lists(st.tuples(losses, st.booleans()), max_size=12),
    keep=st.builds(
        Keep,
        last=st.integers(1, 4),
        every=st.integers(0, 4),
        within_s=st.sampled_from([0, 25, 1000]),
        best=st.sampled_from(["", "loss", "-loss", "other"]),
        best_count=st.integers(1, 3),
    ),
    pinned=st.sets(st.integers(0, 12)),
)
def test_a_step_goes_only_if_no_rule_keeps_it(
    found: list[tuple[float | None, bool]], keep: Keep, pinned: set[int]
) -> None:
    commits = {step: None if bad else commit_of(step, loss, 10 * step) for step, (loss, bad) in enumerate(found)}
    gone = set(expired(commits, keep, pinned=pinned))
    sound = [step for step, commit in commits.items() if commit is not None]
    with_loss = [(found[step][0], step) for step in sound if found[step][0] is not None]
    numbers = [(value, step) for value, step in with_loss if value is not None and math.isfinite(value)]
    sign = -1 if keep.best.startswith("-") else 1
    best = [step for _, step in sorted(numbers, key=lambda pair: (sign * pair[0], -pair[1]))][: keep.best_count]
    for step in commits:
        stays = (
            len(sound) < keep.last
            or step >= sorted(sound)[-keep.last]
            or step in pinned
            or (step in sound and keep.every > 0 and step % keep.every == 0)
            or (keep.best.endswith("loss") and step in best)
            or (step in sound and keep.within_s > 0 and 10 * (sound[-1] - step) <= keep.within_s)
        )
        assert (step not in gone) == stays, step


def test_the_best_and_the_pinned_survive_and_can_be_restored(storage: Storage) -> None:
    with Checkpointer(storage, keep=Keep(last=1, best="loss", every=5)) as ck:
        for step, loss in enumerate([3.0, 1.0, 2.0, 4.0, 5.0, 6.0, 7.0], 1):
            ck.save(step, {"model": {"w": torch.full((3,), float(step))}}, metrics={"loss": loss}, blocking=True)
            if step == 3:
                ck.pin(3)
        assert ck.best("loss") == 2
        assert ck.best("-loss") == 7
        assert ck.best("accuracy") is None
    assert [(found.step, found.pinned) for found in list_steps(storage)] == [
        (2, False),
        (3, True),
        (5, False),
        (7, False),
    ]
    with Checkpointer(storage) as ck:
        for step in (2, 3, 5, 7):
            into = torch.zeros(3)
            ck.restore({"model": {"w": into}}, step=step)
            assert into.eq(float(step)).all()
            assert not ck.verify(step).bad
        with pytest.raises(ConflictError, match="a later step is pinned"):
            ck.rewind(2)
        ck.unpin(3)
        with pytest.raises(ConfigError, match="not pinned"):
            ck.unpin(3)
        with pytest.raises(MissingError, match="no such step"):
            ck.pin(4)
    assert collect(storage, Keep(last=1)).steps == (2, 3, 5)
    assert pinned_steps(storage) == []


def test_a_step_that_goes_while_it_is_pinned_is_told(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    with Checkpointer(storage, keep=Keep(last=3)) as ck:
        for step in (1, 2):
            ck.save(step, {"model": {"w": torch.zeros(3)}}, blocking=True)
    put = type(storage).put

    def meanwhile(self: Storage, key: str, *data: bytes) -> None:
        collect(storage, Keep(last=1))
        put(self, key, *data)

    monkeypatch.setattr(type(storage), "put", meanwhile)
    with pytest.raises(ConflictError, match="removed meanwhile"):
        pin(storage, 1)
    assert pinned_steps(storage) == []


def test_of_equal_numbers_the_later_is_the_better() -> None:
    commits = [commit_of(step, 1.0, step) for step in (1, 2, 3)]
    assert best_steps(commits, "loss") == [3, 2, 1]
    assert msgspec.structs.replace(Keep(), best="loss").best_count == 1


def test_a_metric_that_no_step_has_is_a_mistake(storage: Storage) -> None:
    with Checkpointer(storage) as ck:
        ck.save(1, {"model": {}}, metrics={"loss": 2.0}, blocking=True)
    for sound in (Keep(), Keep(best="loss"), Keep(best="-loss")):
        check_metric(storage, sound)
    with pytest.raises(ConfigError, match=r"no step has this metric.*'loss'"):
        check_metric(storage, Keep(best="lose"))


def test_the_command_line_keeps_by_time_and_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Checkpointer(str(tmp_path), keep=Keep(last=9)) as ck:
        for step in (1, 2, 3):
            ck.save(step, {"numbers": {"step": step}})
    for rules, gone in (("", "1, 2"), ("--within 1h", "none"), ("--every 2", "1"), ("--within 0s", "1, 2")):
        words = ["checkpoint", "gc", str(tmp_path), "--last", "1", "--dry-run", *rules.split()]
        assert call(cli, words, CliSession()) == 0
        assert capsys.readouterr().out.startswith(f"would remove steps: {gone};")
    assert call(cli, ["checkpoint", "gc", str(tmp_path), "--within", "soon"], CliSession()) == 2
    assert "Write a number and s, min, h, d or w" in capsys.readouterr().err

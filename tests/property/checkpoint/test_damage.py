"""What others lose: a flipped bit, a zeroed page, a cut or missing file. Found each time, nothing touched, one step back."""

import logging
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from datastore.checkpoint import inspect as looking
from datastore.checkpoint.checkpointer import Checkpointer
from datastore.checkpoint.format.manifest import Chunk
from datastore.checkpoint.loading.sources import Sources
from datastore.errors import CorruptError, DatastoreError
from datastore.storage.backends.local import LocalStorage
from datastore.storage.resolve import open_storage

OLDER, NEWER = 10, 20
BEFORE = -1.0


def items(value: float) -> dict[str, dict[str, torch.Tensor | float]]:
    """Some tensors of different sizes: small ones that share a page, and one of several chunks."""
    return {
        "model": {
            "large": torch.full((2**20 + 5,), value),
            "small": torch.full((7,), value),
            "half": torch.full((3, 5), value, dtype=torch.bfloat16),
            "gaps": torch.full((8, 2), value)[:, 0],
        },
        "data": {"cursor": value},
    }


def untouched(target: dict[str, dict[str, torch.Tensor | float]]) -> bool:
    return all_values(target) == {BEFORE}


def all_values(target: dict[str, dict[str, torch.Tensor | float]]) -> set[float]:
    found: set[float] = set()
    for item in target.values():
        for value in item.values():
            found |= {value} if isinstance(value, float) else {value.min().item(), value.max().item()}
    return found


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pristine")
    with Checkpointer(folder) as ck:
        for step in (OLDER, NEWER):
            ck.save(step, items(float(step)), metrics={"loss": 1.0 / step}, blocking=True)
    return folder


@pytest.fixture
def run(pristine: Path, tmp_path: Path) -> Iterator[Path]:
    yield Path(shutil.copytree(pristine, tmp_path / "run"))
    shutil.rmtree(tmp_path / "run")


def files_of(folder: Path, step: int) -> list[Path]:
    return sorted([*folder.glob(f"parts/{step:010d}-*"), folder / f"steps/{step:010d}.json"])


def check_it_is_found(run: Path, damaged: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Restoring the damaged step by number fails and touches nothing; restoring the newest falls back, loudly.

    So it does where nothing is worth anything yet, and every chunk is verified only once.
    """
    caplog.clear()
    target = items(BEFORE)
    with Checkpointer(run) as ck:
        with pytest.raises(CorruptError):
            ck.restore(target, step=NEWER)
        assert untouched(target)
        assert ck.verify(NEWER).bad, damaged
        info = ck.restore(target)
        fresh = items(BEFORE)
        assert [bad.step for bad in ck.restore(fresh, fresh=True).fell_back] == [NEWER]
        with pytest.raises(CorruptError):
            ck.restore(items(BEFORE), step=NEWER, fresh=True)
    assert info.step == OLDER
    assert all_values(target) == all_values(fresh) == {float(OLDER)}
    assert [bad.step for bad in info.fell_back] == [NEWER]
    assert any(
        "FALLING BACK" in record.message.upper() for record in caplog.records if record.levelno == logging.WARNING
    )


FIXTURES = [HealthCheck.function_scoped_fixture]


@settings(max_examples=50, deadline=None, suppress_health_check=FIXTURES)
@given(st.data())
def test_a_flipped_bit_anywhere_in_a_step_is_found(
    pristine: Path, run: Path, caplog: pytest.LogCaptureFixture, data: st.DataObject
) -> None:
    original = data.draw(st.sampled_from(files_of(pristine, NEWER)), label="file")
    damaged = run / original.relative_to(pristine)
    raw = bytearray(original.read_bytes())
    position = data.draw(st.integers(0, 8 * len(raw) - 1), label="bit")
    raw[position // 8] ^= 1 << position % 8
    damaged.write_bytes(raw)
    try:
        check_it_is_found(run, damaged, caplog)
    finally:
        shutil.copy(original, damaged)


@settings(max_examples=40, deadline=None, suppress_health_check=FIXTURES)
@given(st.data())
def test_a_file_cut_short_anywhere_is_found(
    pristine: Path, run: Path, caplog: pytest.LogCaptureFixture, data: st.DataObject
) -> None:
    original = data.draw(st.sampled_from(files_of(pristine, NEWER)), label="file")
    damaged = run / original.relative_to(pristine)
    length = data.draw(st.integers(0, original.stat().st_size - 1), label="bytes left")
    with damaged.open("r+b") as file:
        file.truncate(length)
    try:
        check_it_is_found(run, damaged, caplog)
    finally:
        shutil.copy(original, damaged)


def test_a_zeroed_page_is_found_whichever_it_is(pristine: Path, run: Path, caplog: pytest.LogCaptureFixture) -> None:
    original = next(pristine.glob(f"parts/{NEWER:010d}-*.safetensors"))
    damaged = run / original.relative_to(pristine)
    for page in (*range(0, original.stat().st_size // 4096, 200), original.stat().st_size // 4096):
        with damaged.open("r+b") as file:
            file.seek(4096 * page)
            file.write(bytes(min(4096, original.stat().st_size - 4096 * page)))
        check_it_is_found(run, damaged, caplog)
        shutil.copy(original, damaged)


@pytest.mark.parametrize("suffix", ["safetensors", "json"])
def test_a_missing_part_is_found(run: Path, caplog: pytest.LogCaptureFixture, suffix: str) -> None:
    damaged = next(run.glob(f"parts/{NEWER:010d}-*.{suffix}"))
    damaged.unlink()
    check_it_is_found(run, damaged, caplog)


def test_a_part_of_another_step_in_its_place_is_found(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    for suffix in ("safetensors", "json"):
        shutil.copy(*(next(run.glob(f"parts/{step:010d}-*.{suffix}")) for step in (OLDER, NEWER)))
    check_it_is_found(run, run, caplog)


def test_bytes_that_change_between_the_two_passes_heal_by_falling_back(
    run: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = next(run.glob(f"parts/{NEWER:010d}-*.safetensors")).relative_to(run).as_posix()
    honest = Sources.copy

    def differently(self: Sources, chunk: Chunk, target: Any) -> None:
        honest(self, chunk, target)
        if chunk.part == part:
            target[len(target) // 2] ^= 1
            chunk.check(target.data)

    monkeypatch.setattr(Sources, "copy", differently)
    target = items(BEFORE)
    with Checkpointer(run) as ck:
        info = ck.restore(target)
    assert info.step == OLDER
    assert all_values(target) == {float(OLDER)}
    assert "partly overwritten" in caplog.text
    with Checkpointer(run) as ck, pytest.raises(CorruptError, match=r"partly overwritten.*before you use it"):
        ck.restore(target, step=NEWER)


def test_if_no_step_is_sound_every_reason_is_told_and_nothing_is_touched(run: Path) -> None:
    for step in (OLDER, NEWER):
        next(run.glob(f"parts/{step:010d}-*.safetensors")).unlink()
    target = items(BEFORE)
    with Checkpointer(run) as ck, pytest.raises(CorruptError, match="no checkpoint of the run is sound") as caught:
        ck.restore(target)
    assert all(f"step {step}: a file of a committed step is missing" in str(caught.value) for step in (OLDER, NEWER))
    assert untouched(target)


def test_where_all_is_fresh_an_error_says_that_it_is_spoiled_only_if_it_is(run: Path) -> None:
    part = next(run.glob(f"parts/{NEWER:010d}-*.safetensors"))
    raw = bytearray(part.read_bytes())
    raw[-1] ^= 1
    part.write_bytes(raw)
    with Checkpointer(run) as ck:
        with pytest.raises(CorruptError, match=r"does not match its digest.*partly overwritten: restore another step"):
            ck.restore(items(BEFORE), step=NEWER, fresh=True)
        next(run.glob(f"parts/{OLDER:010d}-*.safetensors")).unlink()
        with pytest.raises(CorruptError, match=r"no checkpoint of the run is sound.*partly overwritten: start again"):
            ck.restore(items(BEFORE), fresh=True)
        part.unlink()
        target = items(BEFORE)
        with pytest.raises(CorruptError, match="no checkpoint of the run is sound") as caught:
            ck.restore(target, fresh=True)
        assert "partly overwritten" not in str(caught.value)
        assert untouched(target)


def test_where_all_is_fresh_each_chunk_is_read_once(run: Path) -> None:
    def read_bytes(*, fresh: bool) -> int:
        storage = open_storage(run)
        target = items(BEFORE)
        with Checkpointer(storage) as ck:
            ck.restore(target, fresh=fresh)
        assert all_values(target) == {float(NEWER)}
        return storage.statistics()["read_into"].bytes

    tensors = sum(
        value.nbytes for item in items(0.0).values() for value in item.values() if isinstance(value, torch.Tensor)
    )
    assert read_bytes(fresh=False) >= 2 * tensors
    assert tensors <= read_bytes(fresh=True) < 1.5 * tensors


@settings(max_examples=30, deadline=None, suppress_health_check=FIXTURES)
@given(st.data())
def test_a_damaged_run_file_is_named_and_can_be_made_again(pristine: Path, run: Path, data: st.DataObject) -> None:
    original = (pristine / "run.json").read_bytes()
    position = data.draw(st.integers(0, 8 * len(original) - 1))
    raw = bytearray(original)
    raw[position // 8] ^= 1 << position % 8
    (run / "run.json").write_bytes(raw)
    with pytest.raises(DatastoreError, match=r"run\.json"):
        Checkpointer(run)
    (run / "run.json").unlink()
    target = items(BEFORE)
    with Checkpointer(run) as ck:
        assert ck.restore(target).step == NEWER
        ck.save(NEWER + 10, target, blocking=True)
        assert ck.steps() == [OLDER, NEWER, NEWER + 10]
    assert b'"run_id"' in (run / "run.json").read_bytes()
    (run / "run.json").write_bytes(original)
    for file in files_of(run, NEWER + 10):
        file.unlink()


def test_hints_are_never_trusted(run: Path) -> None:
    (run / "refs" / "latest.json").write_bytes(b"nonsense")
    with Checkpointer(run) as ck:
        assert ck.restore(items(BEFORE)).step == NEWER
    shutil.rmtree(run / "refs")
    with Checkpointer(run) as ck:
        assert ck.restore(items(BEFORE)).step == NEWER


def test_verify_names_each_bad_range_and_its_tensor(run: Path) -> None:
    part = next(run.glob(f"parts/{NEWER:010d}-*.safetensors"))
    sound = looking.verify_step(LocalStorage(run), NEWER)
    assert sound.bad == ()
    raw = bytearray(part.read_bytes())
    raw[8192] ^= 1
    raw[-1] ^= 1
    part.write_bytes(raw)
    progress: list[int] = []
    report = looking.verify_step(LocalStorage(run), NEWER, progress=lambda done, _total: progress.append(done))
    assert [bad.tensor for bad in report.bad] == ["model/large", "model/half"]
    assert all(bad.start <= position < bad.stop for bad, position in zip(report.bad, (8192, len(raw) - 1), strict=True))
    assert progress[-1] == report.size_bytes == sound.size_bytes


def test_a_damaged_step_stays_listed_with_its_error(run: Path) -> None:
    (run / f"steps/{NEWER:010d}.json").write_bytes(b"{}")
    older, newer = looking.list_steps(LocalStorage(run))
    assert (older.step, older.error) == (OLDER, "")
    assert newer.step == NEWER
    assert "StepCommit" in newer.error


def test_a_step_file_under_the_name_of_another_step_is_found(run: Path) -> None:
    shutil.copy(run / f"steps/{OLDER:010d}.json", run / f"steps/{NEWER + 1:010d}.json")
    target = items(BEFORE)
    with Checkpointer(run) as ck:
        info = ck.restore(target)
    assert info.step == NEWER
    assert "holds another step" in info.fell_back[0].reason

"""A disk that cannot give back what it was given: named, passed over, and never taken for a network that is down."""

import errno
import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from datastore.checkpoint import inspect as looking
from datastore.checkpoint.checkpointer import Checkpointer
from datastore.checkpoint.keeping import Keep, collect
from datastore.cli.main import cli
from datastore.errors import CorruptError, StorageError
from datastore.storage.backends.local import LocalStorage
from datastore.storage.backends.memory import MemoryStorage
from datastore.storage.base import Storage
from datastore.storage.errors import explain, too_short
from datastore.storage.wrappers import WrappedStorage

OLDER, NEWER = 10, 20


class BadSectors(WrappedStorage):
    """Fails with `code` to read those keys that contain `where`, from byte `first` on."""

    def __init__(self, inner: Storage, where: str, *, code: int = errno.EIO, first: int = 0) -> None:
        super().__init__(inner)
        self.where, self.code, self.first = where, code, first

    def get(self, key: str) -> bytes:
        self._touch(key, 0, 2**62)
        return super().get(key)

    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        for start, stop in ranges:
            self._touch(key, start, stop)
        return super().get_ranges(key, ranges)

    def read_into(self, key: str, start: int, target: Any) -> None:
        self._touch(key, start, start + memoryview(target).nbytes)
        super().read_into(key, start, target)

    def stat(self, key: str) -> Any:
        if not self.first:
            self._touch(key, 0, 1)
        return super().stat(key)

    def _touch(self, key: str, _start: int, stop: int) -> None:
        if self.where in key and stop > self.first:
            raise explain(OSError(self.code, "injected"), key=key, url=self.url)


def state(value: float) -> dict[str, Any]:
    return {"model": {"w": torch.full((3000,), value), "x": torch.full((2, 3), value)[:, :2]}}


@pytest.fixture(params=["near", "far"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Storage:
    storage = LocalStorage(tmp_path) if request.param == "near" else MemoryStorage(uuid.uuid4().hex)
    with Checkpointer(storage) as ck:
        for step in (OLDER, NEWER):
            ck.save(step, state(float(step)), blocking=True)
    return storage


BAD = [
    (f"steps/{NEWER:010d}", 0),
    (f"parts/{NEWER:010d}", 0),
    (".safetensors", 0),
    (".safetensors", 4097),
    (".safetensors", 4096 + 12_000),
]


@pytest.mark.parametrize("code", [errno.EIO, errno.EBADMSG, errno.EUCLEAN])
@pytest.mark.parametrize(("where", "first"), BAD[:2])
def test_whatever_of_a_step_the_disk_has_lost_the_step_before_is_taken(
    disk: Storage, where: str, first: int, code: int
) -> None:
    bad, target = BadSectors(disk, where, code=code, first=first), state(-1.0)
    with Checkpointer(bad) as ck:
        with pytest.raises(CorruptError, match="cannot be read"):
            ck.restore(target, step=NEWER)
        assert target["model"]["w"].unique().tolist() == [-1.0]
        info = ck.restore(target)
        assert info.step == OLDER
        assert "cannot be read" in info.fell_back[0].reason
        ck.save(NEWER + 5, target, blocking=True)
        assert ck.steps() == [OLDER, NEWER + 5]


@pytest.mark.parametrize(("where", "first"), BAD)
def test_verify_names_what_the_disk_has_lost_and_goes_on(disk: Storage, where: str, first: int) -> None:
    report = looking.verify_step(BadSectors(disk, where, first=first), NEWER)
    assert report.bad
    assert all("cannot be read" in found.reason for found in report.bad)
    if first > 4096:
        assert {found.tensor for found in report.bad} == ({"model/w", "model/x"} if first == 4097 else {"model/x"})


def test_an_unreadable_commit_is_listed_with_its_reason_and_not_counted_as_kept(disk: Storage) -> None:
    bad = BadSectors(disk, f"steps/{NEWER:010d}")
    older, newer = looking.list_steps(bad)
    assert (older.error, "cannot be read" in newer.error) == ("", True)
    assert collect(bad, Keep(last=1)).steps == ()
    disk.delete("run.json")
    with Checkpointer(bad) as ck:
        assert ck.restore(state(0.0)).step == OLDER
        ck.save(NEWER + 1, state(1.0), blocking=True)
    run_ids = {json.loads(disk.get(key))["run_id"] for key in ("run.json", f"steps/{OLDER:010d}.json")}
    assert len(run_ids) == 1


@pytest.mark.parametrize("code", [errno.EACCES, errno.ETIMEDOUT, errno.EMFILE])
@pytest.mark.parametrize(("where", "first"), BAD[:3])
def test_what_may_be_sound_is_never_passed_over(disk: Storage, where: str, first: int, code: int) -> None:
    bad = BadSectors(disk, where, code=code, first=first)
    with Checkpointer(bad) as ck, pytest.raises(StorageError):
        ck.restore(state(0.0))
    with pytest.raises(StorageError):
        looking.verify_step(bad, NEWER)


def test_a_part_that_ends_too_early_is_damaged(disk: Storage) -> None:
    class Short(BadSectors):
        def _touch(self, key: str, _start: int, stop: int) -> None:
            if self.where in key and stop > self.first:
                raise too_short(key=key, url=self.url, wanted_bytes=stop)

    bad = Short(disk, f"parts/{NEWER:010d}", first=4097)
    with Checkpointer(bad) as ck:
        assert ck.restore(state(0.0)).step == OLDER


def test_the_command_line_verifies_all_steps_though_one_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Checkpointer(tmp_path) as ck:
        for step in (OLDER, NEWER):
            ck.save(step, state(float(step)), blocking=True)
    bad = BadSectors(LocalStorage(tmp_path), f"parts/{OLDER:010d}")
    monkeypatch.setattr("datastore.storage.resolve.open_storage", lambda *_: bad)
    done = CliRunner().invoke(cli, ["checkpoint", "verify", str(tmp_path)], standalone_mode=False)
    assert done.return_value == 1
    assert f"step {OLDER}: damaged" in done.output
    assert "cannot be read: the disk reported an error" in done.output
    assert f"step {NEWER}: sound" in done.output

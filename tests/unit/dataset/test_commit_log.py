"""The commit log: who commits, what a failure decides, how the newest version is found."""

import uuid
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from typing_extensions import Buffer, override

from datastore.dataset.log.commits import CommitLog
from datastore.dataset.log.keys import HINT_KEY, commit_key
from datastore.dataset.log.manifest import Commit, Hint, Totals
from datastore.digest import sha256_hex
from datastore.document import seal
from datastore.errors import ConflictError, CorruptError, MissingError, StorageError
from datastore.host import utc_now
from datastore.storage.backends.memory import MemoryStorage


class Troubled(MemoryStorage):
    """Storage that calls `trouble(key)` around each exclusive write, and counts the keys it is asked for."""

    def __init__(self, trouble: Callable[["Troubled", str, Callable[[], None]], None] | None = None) -> None:
        super().__init__(uuid.uuid4().hex)
        self.trouble = trouble
        self.asked: list[str] = []

    @override
    def get(self, key: str) -> bytes:
        self.asked.append(key)
        return super().get(key)

    @override
    def put_new(self, key: str, *chunks: Buffer) -> None:
        write = super().put_new
        if self.trouble is None:
            write(key, *chunks)
        else:
            self.trouble(self, key, lambda: write(key, *chunks))


def draft(**values: Any) -> Commit:
    blank = Commit(
        version=1,
        parent_sha256="",
        commit_id="",
        operation="append",
        time=utc_now(),
        writer="a test",
        kind="tokens",
        segments=(),
        totals=Totals(),
    )
    return msgspec.structs.replace(blank, **values)


def filled(storage: Troubled, commits: int) -> CommitLog:
    log = CommitLog(storage)
    for _ in range(commits):
        log.append(lambda _: draft())
    storage.asked.clear()
    return log


def test_an_empty_log_has_no_newest_version() -> None:
    assert CommitLog(Troubled()).newest() is None


def test_versions_count_from_one_and_each_names_its_parent() -> None:
    log = filled(Troubled(), 3)
    first, second, third = (log.read(version) for version in (1, 2, 3))
    assert [commit.version for commit in (first, second, third)] == [1, 2, 3]
    assert first.parent_sha256 == ""
    assert second.parent_sha256 == log.stored(1).sha256 == sha256_hex(log.storage.get(commit_key(1)))
    assert third.parent_sha256 == log.stored(2).sha256
    assert log.newest() == third
    assert list(log.history(third)) == [third, second, first]


def test_a_builder_that_returns_the_newest_commits_nothing() -> None:
    log = filled(Troubled(), 2)
    assert log.append(lambda newest: newest or draft()).version == 2
    assert log.newest() == log.read(2)


@pytest.mark.parametrize("commits", [1, 10, 100])
def test_opening_takes_three_requests_however_long_the_log_is(commits: int) -> None:
    storage = Troubled()
    filled(storage, commits).newest()
    assert len(storage.asked) == 3


@pytest.mark.parametrize("commits", range(40))
def test_the_newest_is_found_without_a_hint(commits: int) -> None:
    storage = Troubled()
    log = filled(storage, commits)
    storage.delete(HINT_KEY)
    newest = log.newest()
    assert (newest.version if newest else 0) == commits
    assert len(storage.asked) <= 2 * commits.bit_length() + 3


@pytest.mark.parametrize("hint", range(1, 33))
def test_a_hint_that_lags_costs_requests_not_versions(hint: int) -> None:
    storage = Troubled()
    log = filled(storage, 33)
    storage.put(HINT_KEY, seal(Hint(version=hint)))
    newest = log.newest()
    assert newest is not None
    assert newest.version == 33


@pytest.mark.parametrize(
    "hint", [b"", b"7", b"{}", b"\xff\xfe", seal(Hint(version=2)).replace(b"2", b"3"), b"[" * 10_000]
)
def test_a_damaged_hint_is_ignored(hint: bytes) -> None:
    storage = Troubled()
    log = filled(storage, 5)
    storage.put(HINT_KEY, hint)
    newest = log.newest()
    assert newest is not None
    assert newest.version == 5


def test_a_commit_that_the_hint_names_but_is_gone_is_no_step_back_in_silence() -> None:
    storage = Troubled()
    log = filled(storage, 5)
    storage.delete(commit_key(5))
    with pytest.raises(CorruptError, match="a commit is gone"):
        log.newest()


def test_an_unknown_version_is_said_with_the_newest() -> None:
    log = filled(Troubled(), 2)
    for version in (3, 0, -1):
        with pytest.raises(MissingError, match="newest=2"):
            log.read(version)


def test_a_commit_under_another_version_s_name_is_found_out() -> None:
    storage = Troubled()
    log = filled(storage, 3)
    storage.put(commit_key(2), storage.get(commit_key(1)))
    with pytest.raises(CorruptError, match="another version's name"):
        log.read(2)


def test_a_replaced_commit_breaks_the_chain() -> None:
    storage = Troubled()
    log = filled(storage, 3)
    storage.put(commit_key(2), seal(msgspec.structs.replace(log.read(2), writer="someone else")))
    with pytest.raises(CorruptError, match="not the one that the next was built on"):
        list(log.history(log.read(3)))


def failing(
    error: Exception, times: int, *, after_writing: bool
) -> Callable[[Troubled, str, Callable[[], None]], None]:
    """Fail the first `times` exclusive writes with `error`: without writing, or after it (a lost acknowledgement)."""
    left = [times]

    def trouble(storage: Troubled, key: str, write: Callable[[], None]) -> None:
        del storage, key
        if left[0] == 0:
            write()
            return
        left[0] -= 1
        if after_writing:
            write()
        raise error

    return trouble


ERRORS = [
    ConflictError("409"),
    StorageError("connection reset", transient=True),
    StorageError("EINVAL", transient=False),
]


@pytest.mark.parametrize("error", ERRORS, ids=str)
def test_a_lost_acknowledgement_is_a_commit(error: Exception) -> None:
    storage = Troubled(failing(error, 1, after_writing=True))
    committed = CommitLog(storage).append(lambda _: draft())
    assert CommitLog(storage).newest() == committed
    assert committed.version == 1


@pytest.mark.parametrize("error", ERRORS[:2], ids=str)
def test_a_write_that_failed_for_now_is_tried_again(error: Exception) -> None:
    storage = Troubled(failing(error, 3, after_writing=False))
    assert CommitLog(storage).append(lambda _: draft()).version == 1
    assert CommitLog(storage).newest() is not None


def test_a_write_that_failed_for_good_is_an_error_and_changes_nothing() -> None:
    storage = Troubled(failing(StorageError("no space left", transient=False), 1, after_writing=False))
    with pytest.raises(StorageError, match="no space left"):
        CommitLog(storage).append(lambda _: draft())
    assert CommitLog(storage).newest() is None


def test_a_commit_that_lost_the_race_is_built_again_on_the_winner() -> None:
    def rival_first(storage: Troubled, key: str, write: Callable[[], None]) -> None:
        if key == commit_key(1) and storage.trouble is not None:
            storage.trouble = None
            CommitLog(storage).append(lambda _: draft(writer="the rival"))
        write()

    storage = Troubled(rival_first)
    seen: list[int] = []

    def build(newest: Commit | None) -> Commit:
        seen.append(newest.version if newest else 0)
        return draft()

    assert CommitLog(storage).append(build).version == 2
    assert seen == [0, 1]
    assert CommitLog(storage).read(1).writer == "the rival"


def test_a_late_write_of_an_attempt_that_seemed_to_fail_is_recognized() -> None:
    # The first attempt reports an error, is not there when read back, and lands afterwards.
    def late(storage: Troubled, key: str, write: Callable[[], None]) -> None:
        del key
        storage.trouble = lambda _storage, _key, second: (write(), second())[1]
        raise StorageError("time-out", transient=True)

    storage = Troubled(late)
    committed = CommitLog(storage).append(lambda _: draft())
    assert committed.version == 1
    newest = CommitLog(storage).newest()
    assert newest is not None
    assert (newest.version, newest.commit_id) == (1, committed.commit_id)


def test_patience_ends_with_an_error_that_says_nothing_happened() -> None:
    storage = Troubled(failing(StorageError("503", transient=True), 10**6, after_writing=False))
    with pytest.raises(ConflictError, match="could not commit in time"):
        CommitLog(storage, patience_s=0.05).append(lambda _: draft())
    assert CommitLog(storage).newest() is None


def test_an_outcome_that_cannot_be_read_back_is_called_unknown() -> None:
    class Gone(Troubled):
        @override
        def put_new(self, key: str, *chunks: Buffer) -> None:
            self.get = lambda key: (_ for _ in ()).throw(StorageError("down", key=key, transient=False))  # type: ignore[method-assign]
            raise StorageError("time-out", transient=True)

    with pytest.raises(StorageError, match="may or may not have been stored"):
        CommitLog(Gone()).append(lambda _: draft())


def test_a_hint_that_cannot_be_written_does_not_undo_the_commit(caplog: pytest.LogCaptureFixture) -> None:
    class NoHint(Troubled):
        @override
        def put(self, key: str, *chunks: Buffer) -> None:
            if key == HINT_KEY:
                raise StorageError("no space left", key=key)
            super().put(key, *chunks)

    storage = NoHint()
    assert CommitLog(storage).append(lambda _: draft()).version == 1
    assert "version 1 is committed" in caplog.text

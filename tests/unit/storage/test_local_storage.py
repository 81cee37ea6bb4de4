"""What a local disk does to a writer: it fills up, is read-only, denies, loses power - and the order that guards against it."""

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import pytest

from datastore.errors import ConflictError, StorageError
from datastore.storage.backends import local
from datastore.storage.backends import syscalls as writeback
from datastore.storage.backends.local import LocalStorage
from datastore.storage.backends.memory import MemoryStorage
from datastore.storage.wrappers import Subfolder

WRITER = """
import sys
from pathlib import Path
from datastore.storage.backends.local import LocalStorage  # noqa: E402
storage = LocalStorage(Path(sys.argv[1]))
print("ready", flush=True)
while True:
    for letter in b"ab":
        storage.put("k", bytes([letter]) * 3_000_000)
"""


def names_below(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[None]:
    """Mount a small file system in memory at `folder`."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "none", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_one_clear_error_and_nothing_is_half_written(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with mounted(disk, "size=1m"):
        storage = LocalStorage(disk / "data")
        storage.put("k", b"old")
        for write in (storage.put, storage.put_new):
            with pytest.raises(StorageError, match=r"the disk is full \(key='.*Free some space"):
                write("k" if write == storage.put else "new", bytes(4 * 2**20))
        assert names_below(disk) == ["k"]
        assert storage.get("k") == b"old"
        storage.put("small", bytes(100_000))


def test_a_read_only_disk_is_one_clear_error(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    with mounted(disk, "size=1m"):
        LocalStorage(disk).put("k", b"old")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        storage = LocalStorage(disk)
        for write in (
            lambda: storage.put("k", b"new"),
            lambda: storage.put_new("deep/er/k", b"new"),
            lambda: storage.delete("k"),
        ):
            with pytest.raises(
                StorageError, match=r"the file system is read-only.*Choose a target that can be written"
            ):
                write()
        assert storage.get("k") == b"old"


def test_a_file_larger_than_the_limit_is_one_clear_error(tmp_path: Path) -> None:
    program = (
        "import resource, sys; from pathlib import Path; from datastore.storage.backends.local import LocalStorage\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
        "LocalStorage(Path(sys.argv[1])).put('k', bytes(200_000))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], capture_output=True, text=True, check=False, timeout=60
    )
    assert "StorageError: the file would be larger than allowed" in found.stderr
    assert names_below(tmp_path) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to become somebody else")
def test_a_denied_folder_is_one_clear_error() -> None:
    folder = Path(f"/tmp/denied-{os.getpid()}")  # pytest's own folders are closed to others, which is another error
    storage = LocalStorage(folder)
    storage.put("k", b"old")
    (folder / "k").chmod(0o600)
    os.seteuid(65534)
    try:
        for call in (lambda: storage.put("k", b"new"), lambda: storage.get("k"), lambda: storage.delete("k")):
            with pytest.raises(StorageError, match=r"permission denied.*Check owner and mode"):
                call()
    finally:
        os.seteuid(0)
        storage.delete("k")
        folder.rmdir()


@pytest.mark.parametrize(
    ("code", "transient"), [(errno.EDQUOT, False), (errno.EIO, False), (errno.ESTALE, True), (errno.ETIMEDOUT, True)]
)
def test_other_failures_of_a_write_leave_nothing_and_say_whether_to_try_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    transient: bool,  # noqa: FBT001
) -> None:
    def fail(_: int) -> None:
        raise OSError(code, os.strerror(code))

    storage = LocalStorage(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", fail)
        for write in (storage.put, storage.put_new):
            with pytest.raises(StorageError) as caught:
                write("k", b"x")
            assert caught.value.transient == transient
    assert names_below(tmp_path) == []


def test_a_key_that_is_a_folder_cannot_be_written(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.put("a/b", b"x")
    with pytest.raises(StorageError, match="there is a folder of that name"):
        storage.put("a", b"x")
    with pytest.raises(StorageError, match="part of the path is a file"):
        storage.put("a/b/c", b"x")
    assert names_below(tmp_path) == ["b"]


def test_a_name_that_is_too_long_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="too long"):
        LocalStorage(tmp_path).put("n" * 300, b"x")


def test_bytes_are_flushed_before_they_get_their_name_and_the_name_before_the_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def record(name: str, owner: ModuleType = os) -> None:
        original = getattr(owner, name)

        def call(*arguments: object, **options: object) -> object:
            of_fd = name in {"fsync", "fdatasync"}
            path = Path(f"/proc/self/fd/{arguments[0]}").readlink() if of_fd else Path(str(arguments[-1]))
            found = original(*arguments, **options)
            events.append(f"{name.lstrip('_')} {path.relative_to(tmp_path)}")
            return found

        monkeypatch.setattr(owner, name, call)

    record("_linkat", local)
    for name in ("fsync", "fdatasync", "link", "replace", "mkdir"):
        record(name)
    storage = LocalStorage(tmp_path / "root")
    storage.put_new("a/b/k", b"x")
    storage.put("a/b/k", b"y")
    made = ["mkdir root", "fsync .", "mkdir root/a", "fsync root", "mkdir root/a/b", "fsync root/a"]
    first, second = (event for event in events if event.startswith("fdatasync"))
    named = "linkat" if local._ANONYMOUS else "link"
    staged = [event for event in events if event.startswith("linkat") and event.endswith(".tmp")]
    assert events == [
        *made, first, f"{named} root/a/b/k", "fsync root/a/b", second, *staged, "replace root/a/b/k", "fsync root/a/b",
    ]  # fmt: skip
    assert all("/.k." in event and event.endswith(".tmp") for event in staged)
    assert all(event.startswith("fdatasync root/a/b/") for event in (first, second))


def test_a_write_that_was_killed_leaves_no_file_behind(tmp_path: Path) -> None:
    if not local._ANONYMOUS:
        pytest.skip("this system has no files without a name")
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from datastore.storage.backends.local import LocalStorage\n"
        "os.fdatasync = lambda fd: os.kill(os.getpid(), signal.SIGKILL)\n"
        "LocalStorage(Path(sys.argv[1])).put_new('a/k', bytes(1_000_000))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert names_below(tmp_path) == []


def test_without_anonymous_files_a_named_one_does_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_ANONYMOUS", False)
    storage = LocalStorage(tmp_path)
    storage.put_new("a/k", b"x")
    storage.put("a/k", b"y")
    assert storage.get("a/k") == b"y"
    assert names_below(tmp_path) == ["k"]


def test_a_link_whose_answer_was_lost_counts_as_won(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def lose_the_answer(source: str, target: str) -> None:
        link(source, target)
        raise FileExistsError(errno.EEXIST, "repeated by the NFS client", target)

    monkeypatch.setattr(os, "link", lose_the_answer)
    storage = LocalStorage(tmp_path)
    storage.put_new("k", b"mine")
    assert storage.get("k") == b"mine"
    assert names_below(tmp_path) == ["k"]


def test_what_a_killed_writer_left_is_never_seen(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    for round_ in range(6):
        writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        writer.stdout.readline()
        time.sleep(0.02 * round_)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        for found in storage.list():
            assert found.key == "k"
            assert storage.get("k") in (b"a" * 3_000_000, b"b" * 3_000_000)


def test_files_get_the_mode_that_the_umask_leaves(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        LocalStorage(tmp_path).put("k", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "k").stat().st_mode & 0o777 == 0o640


def test_a_linked_folder_is_listed_as_it_is_read(tmp_path: Path) -> None:
    elsewhere = LocalStorage(tmp_path / "elsewhere")
    elsewhere.put("k", b"x")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "shards").symlink_to(tmp_path / "elsewhere")
    storage = LocalStorage(tmp_path / "root")
    assert [found.key for found in storage.list()] == ["shards/k"]
    assert storage.get("shards/k") == b"x"


def test_a_read_needs_no_more_memory_than_its_target(tmp_path: Path) -> None:
    import tracemalloc

    storage = LocalStorage(tmp_path)
    storage.put("k", bytes(8 * 2**20))
    target = bytearray(8 * 2**20)
    tracemalloc.start()
    try:
        storage.read_into("k", 0, target)
        assert tracemalloc.get_traced_memory()[1] < 100_000
    finally:
        tracemalloc.stop()


def test_a_read_past_the_end_names_the_key_and_the_bytes_wanted(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    storage.put("k", b"12345")
    for read in (lambda: storage.read_into("k", 3, bytearray(9)), lambda: storage.get_ranges("k", [(3, 12)])):
        with pytest.raises(
            StorageError,
            match=r"^the object ends too early \(key='k', url='/.*', wanted_bytes=12\)\. Restore it from a copy\.$",
        ):
            read()


@pytest.mark.parametrize("supported", [True, False])
def test_the_disk_is_started_early_on_large_files_and_every_byte_arrives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, supported: bool
) -> None:
    started: list[tuple[int, int]] = []
    monkeypatch.setattr(writeback, "_PIECE_BYTES", 1000)
    hint = (lambda _fd, start, length, _flags: started.append((start, length))) if supported else None
    monkeypatch.setattr(writeback, "_sync_file_range", lambda: hint)
    data = os.urandom(7_777)
    LocalStorage(tmp_path).put_new("k", data[:10], data[10:2_500], b"", data[2_500:])
    assert (tmp_path / "k").read_bytes() == data
    assert started == (
        [(0, 1010), (1010, 1000), (2010, 1490), (3500, 1000), (4500, 1000), (5500, 1000), (6500, 1000)]
        if supported
        else []
    )


def test_a_new_file_has_no_other_name_at_any_time(tmp_path: Path) -> None:
    if not local._ANONYMOUS:
        pytest.skip("this system has no files without a name")
    program = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from datastore.storage.backends import local\n"
        "link = local._linkat\n"
        "def linked(*arguments, **options):\n"
        "    link(*arguments, **options)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "local._linkat = linked\n"
        "getattr(local.LocalStorage(Path(sys.argv[1])), sys.argv[2])(sys.argv[2], b'x')\n"
    )
    for verb in ("put", "put_new"):
        done = subprocess.run([sys.executable, "-c", program, str(tmp_path), verb], check=False, timeout=60)
        assert done.returncode == -signal.SIGKILL
    assert names_below(tmp_path) == ["put", "put_new"]


def test_a_name_as_long_as_names_may_be_is_written_and_replaced(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    name = "ä" * 127 + "x"
    for value in (b"1", b"2"):
        storage.put(name, value)
        assert storage.get(name) == value


def test_hints_that_many_write_at_once_are_those_of_one_of_them(tmp_path: Path) -> None:
    storage = LocalStorage(tmp_path)
    values = [f"{number}".encode() * 50 for number in range(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(30):
            list(pool.map(lambda value: storage.put_hint("hint", value), values))
            assert storage.get("hint") in values
    assert names_below(tmp_path) == ["hint"]


def test_a_hint_is_not_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    storage = LocalStorage(tmp_path)
    storage.put("k", b"the folder is there")
    for name in ("fsync", "fdatasync"):
        monkeypatch.setattr(os, name, None)
    storage.put_hint("hint", b"1")
    storage.put_hint("hint", b"2")
    assert storage.get("hint") == b"2"


def test_a_file_of_this_machine_is_adopted_under_a_second_name_that_outlives_the_first(tmp_path: Path) -> None:
    first, second = LocalStorage(tmp_path / "first"), Subfolder(LocalStorage(tmp_path / "second"), "below")
    first.put("a/x", b"bytes")
    path = first.local_path("a/x")
    assert path is not None
    assert second.adopt("b/y", path)
    with pytest.raises(ConflictError):
        second.adopt("b/y", path)
    first.delete("a/x")
    assert second.get("b/y") == (tmp_path / "second/below/b/y").read_bytes() == b"bytes"
    with pytest.raises(StorageError, match="No such file"):
        second.adopt("b/z", path)
    assert not MemoryStorage("adopts-nothing").adopt("b/y", tmp_path / "second/below/b/y")

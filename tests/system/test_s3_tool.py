"""What `tools/s3` does where there is no server, or none can be started; it never ends what it did not start."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"
PROGRAMS = ("ceph-mon", "ceph-osd", "ceph-mgr", "radosgw", "radosgw-admin", "ceph", "monmaptool")


@pytest.fixture
def tool(tmp_path: Path) -> Path:
    """The tool in a clone of its own."""
    (tmp_path / "tools").mkdir()
    for name in ("s3", "s3.py", "_ceph.py"):
        shutil.copy(TOOLS / name, tmp_path / "tools" / name)
    return tmp_path / "tools" / "s3"


def run(tool: Path, *arguments: str, path: str = "") -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PATH": os.pathsep.join((path, os.environ["PATH"]) if path else (os.environ["PATH"],))}
    return subprocess.run([tool, *arguments], capture_output=True, text=True, env=environment, timeout=60, check=False)


def test_without_a_server_status_says_how_to_get_one(tool: Path) -> None:
    done = run(tool, "status")
    assert (done.returncode, done.stdout) == (1, "there is no server. Run: tools/s3 start\n")


def test_stopping_twice_is_no_error(tool: Path) -> None:
    assert run(tool, "stop").returncode == run(tool, "stop").returncode == 0


def test_stop_leaves_alone_a_process_that_has_the_number_of_one_of_ours(tool: Path) -> None:
    pids = tool.parent.parent / ".cache" / "s3" / "run"
    pids.mkdir(parents=True)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        (pids / "mon.a.pid").write_text(f"{other.pid} 1")
        assert run(tool, "stop").returncode == 0
        assert other.poll() is None
    assert not pids.exists()


def test_a_start_that_fails_says_why_and_leaves_nothing_running(tool: Path, tmp_path: Path) -> None:
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in PROGRAMS:
        (programs / name).write_text("#!/bin/sh\nexit 0\n")
        (programs / name).chmod(0o755)
    # The monitor makes its data, then ends instead of staying up; nobody answers.
    (programs / "ceph-mon").write_text(
        '#!/bin/sh\ncase "$*" in *mkfs*) exit 0;; esac\necho the disk is on fire; exit 3\n'
    )
    (programs / "ceph").write_text("#!/bin/sh\necho no monitor answers >&2; exit 1\n")
    done = run(tool, "start", path=str(programs))
    assert done.returncode == 1
    assert done.stdout == ""
    assert "no monitor answers" in done.stderr.splitlines()[0]
    assert "the disk is on fire" in done.stderr
    assert run(tool, "status").returncode == 1

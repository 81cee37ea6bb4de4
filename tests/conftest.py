"""What tests of several folders share: the contract's messages, and a real S3 server.

`s3_url` belongs to the marker `s3`. The server is that of `tools/s3`: if it is not up, the first test that asks for it
starts it, with three OSDs, and the end of the run stops it. One that was up before stays up, and as it was.
"""

import os
import re
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

from datastore.storage.backends.s3 import forget_clients

pytest.register_assert_rewrite("datastore.testing.storage")
# A law does not fail because the machine is busy.
hypothesis.settings.register_profile("laws", deadline=None)
hypothesis.settings.load_profile("laws")

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "s3"
STARTED = ROOT / ".cache" / "s3-started-by-tests"
START_TIMEOUT_S = 270


def run_tool(*arguments: str, timeout_s: float = START_TIMEOUT_S) -> subprocess.CompletedProcess[str]:
    return subprocess.run([TOOL, *arguments], capture_output=True, text=True, timeout=timeout_s, check=False)


@pytest.fixture(scope="session")
def s3_bucket(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a bucket on a real server; AWS_... in the environment lead there, for child processes, too."""
    s3fs = pytest.importorskip("s3fs")
    there = "there is no server" not in run_tool("status").stdout
    try:
        done = run_tool("start", *([] if there else ["--osds", "3"]))
    except subprocess.TimeoutExpired:
        pytest.skip(f"`tools/s3 start` took more than {START_TIMEOUT_S} s")
    if done.returncode != 0:
        pytest.skip(f"`tools/s3 start`: {done.stderr.strip().splitlines()[0]}")
    if not there:
        STARTED.write_text(str(run_id(request.config)))
    found = re.search(r"bucket (s3://\S+)", done.stdout)
    assert found, done.stdout
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in re.findall(r"^export (\w+)=(\S+)$", done.stdout, re.MULTILINE):
            patch.setenv(name, value)
        # Connections are kept by their arguments, of which the environment is none.
        s3fs.S3FileSystem.clear_instance_cache()
        forget_clients()
        yield found[1]
        s3fs.S3FileSystem.clear_instance_cache()
        forget_clients()


@pytest.fixture
def s3_url(s3_bucket: str) -> str:
    """An empty place on a real S3 server."""
    return f"{s3_bucket}/{uuid.uuid4().hex}"


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Stop the server if a test of this run started it; the workers of a run share it, so only their parent does."""
    if hasattr(session.config, "workerinput") or not STARTED.exists():
        return
    if STARTED.read_text() == str(run_id(session.config)):
        STARTED.unlink()
        run_tool("stop")


def run_id(config: pytest.Config) -> int:
    """Return a number that all workers of this run have in common: the process of their parent."""
    return os.getppid() if hasattr(config, "workerinput") else os.getpid()

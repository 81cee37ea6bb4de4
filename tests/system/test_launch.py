import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from datastore.errors import ConfigError, WaitError
from datastore.training.launcher import spawn

HERE = Path(__file__).parent


def test_each_rank_gets_its_place_and_results_come_back_by_rank() -> None:
    events: list[dict[str, int]] = []
    results = spawn("rank_programs:introduce", {"a": [1, 2]}, processes=3, on_event=events.append)
    assert [result["rank"] for result in results] == [0, 1, 2]
    assert {result["world"] for result in results} == {3}
    assert all(result["given"] == {"a": [1, 2]} for result in results)
    assert events == [{"rank": 0}]


def test_an_error_of_a_rank_is_raised_as_it_was() -> None:
    with pytest.raises(ConfigError, match="this rank refuses") as caught:
        spawn("rank_programs:refuse", {"rank": 1}, processes=2)
    assert caught.value.values == {"rank": 1}
    assert caught.value.hint == "Ask another one."


def test_a_rank_that_was_killed_is_named() -> None:
    with pytest.raises(WaitError, match=r"rank=1, cause='SIGKILL'"):
        spawn("rank_programs:die", {"rank": 1}, processes=2)


def test_the_peers_of_a_killed_rank_end_and_it_is_the_one_that_is_named() -> None:
    started = time.monotonic()
    with pytest.raises(WaitError, match=r"rank=1, cause='SIGKILL'"):
        spawn("training_programs:wait_for_a_peer_that_dies", {}, processes=2)
    assert time.monotonic() - started < 60


def test_ranks_share_texts_and_sums_that_wrap() -> None:
    results = spawn("training_programs:agree", {}, processes=3)
    wrapped = (3 * (2**63 - 1) + 2**63) % 2**64 - 2**63
    assert all(result == {"shared": "from rank 0", "least": 8, "sum": [wrapped, 3]} for result in results)


def test_a_mistake_that_rank_0_finds_is_told_once_and_torch_logs_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match="rank 0 refuses"):
        spawn("training_programs:refuse_on_rank_0", {}, processes=3)
    assert capfd.readouterr().err == ""


def test_no_rank_outlives_a_parent_that_was_killed() -> None:
    program = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from datastore.training.launcher import spawn\n"
        "spawn('rank_programs:wait_for_ever', {}, processes=2, on_event=lambda e: print(e['pid'], flush=True))"
    )
    parent = subprocess.Popen([sys.executable, "-c", program, str(HERE)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 30
    while _is_alive(child):
        assert time.monotonic() < deadline
        threading.Event().wait(0.05)


def _is_alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    os.kill(pid, signal.SIGCONT)
    return stat.rpartition(")")[2].split()[0] != "Z"

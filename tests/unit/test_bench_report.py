"""The table of the benchmarks: turns within each round, ratios within each round, noise shown."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

PATH = Path(__file__).parents[2] / "tools" / "bench" / "_report.py"


@pytest.fixture(scope="module")
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_report", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["bench_report"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_twice_as_fast_is_a_ratio_of_two(report: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    slow = report.Alternative("slow", lambda: report.Sample(0.2, 0.4))
    fast = report.Alternative("fast", lambda: report.Sample(0.1, 0.8))
    by_wall = report.compare("write", [slow, fast], work=report.Work(50e6, "MB", 1e6), rounds=5)
    assert [line.ratio for line in by_wall] == pytest.approx([1.0, 2.0, 1.0])
    assert by_wall[1].rate == pytest.approx(500)
    by_cpu = report.compare("write", [slow, fast], work=report.Work(1, "files"), rounds=5, clock="cpu")
    assert by_cpu[1].ratio == pytest.approx(0.5)
    printed = capsys.readouterr().out
    assert "slow again (A/A)" in printed
    assert "500 MB/s   2.00x  [2.00, 2.00]" in printed


def test_alternatives_take_turns_and_each_round_starts_with_another(report: ModuleType) -> None:
    turns: list[str] = []
    alternatives = [report.Alternative(name, lambda name=name: turns.append(name)) for name in "ab"]
    report.compare("order", alternatives, work=report.Work(1, "x"), rounds=3)
    assert turns[2:] == ["a", "b", "a", "b", "a", "a", "a", "a", "b"]  # the A/A line is an "a", too


def test_drift_of_the_machine_does_not_change_the_ratio(report: ModuleType) -> None:
    clock = iter(range(1, 1000))
    a, b = (
        report.Alternative(name, lambda f=f: report.Sample(f * (1 + next(clock) // 3), 0))
        for name, f in (("a", 2), ("b", 1))
    )
    lines = report.compare("drift", [a, b], work=report.Work(1, "x"), rounds=50)
    assert lines[1].ratio == pytest.approx(2.0, rel=0.1)


def test_preparing_is_not_timed_and_cpu_counts_ended_children(report: ModuleType) -> None:
    import subprocess
    import threading

    pause = threading.Event()
    burn = "import time\nstop = time.process_time() + 0.15\nwhile time.process_time() < stop: pass"
    child = report.Alternative("child", lambda: subprocess.run([sys.executable, "-c", burn], check=True))
    rest = report.Alternative("rest", lambda: None, lambda: pause.wait(0.1))
    lines = report.compare("children", [child, rest], work=report.Work(1, "x"), rounds=1)
    assert lines[0].cpu_s > 0.14
    assert lines[1].wall_s < 0.05

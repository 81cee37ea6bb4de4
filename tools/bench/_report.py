"""Run named alternatives in turns and print a ratio that one can doubt.

Machines drift: a figure taken a minute ago says little about now. So all alternatives take their turn within each
round, each round starts with another one, every ratio is taken within its round, and the reference runs once more
under a second name: that A/A line is the noise, and a difference smaller than it is not shown.

    each line: median time, rate, median of per-round ratios, [middle 90 % of them]

A ratio above 1 is faster than the reference. Seconds are wall or CPU, as `clock` says; CPU counts all threads of this
process and every child that has ended and was waited for; see `adopt_orphans`.
"""

import ctypes
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Self

__all__ = [
    "Alternative",
    "Line",
    "Sample",
    "Work",
    "adopt_orphans",
    "compare",
    "machine",
    "stopwatch",
    "wait_for_orphans",
]

Clock = Literal["wall", "cpu"]


@dataclass(frozen=True, slots=True)
class Sample:
    """What one turn took."""

    wall_s: float
    cpu_s: float


@dataclass(frozen=True, slots=True)
class Alternative:
    """One way to do the work. `run` is timed, or returns a `Sample` it took itself; `prepare` before it is not."""

    name: str
    run: Callable[[], object]
    prepare: Callable[[], object] | None = None


@dataclass(frozen=True, slots=True)
class Work:
    """How much one turn does: `Work(64e6, "MB", 1e6)` prints rates in MB/s."""

    amount: float
    unit: str
    per_unit: float = 1.0


@dataclass(frozen=True, slots=True)
class Line:
    """One printed line: medians, and the ratio to the reference with its middle 90 %."""

    name: str
    wall_s: float
    cpu_s: float
    rate: float
    ratio: float
    low: float
    high: float


@dataclass(slots=True)
class stopwatch:  # noqa: N801 - used as a block: `with stopwatch() as watch`
    """Measure a block; `sample` is there once it has ended."""

    sample: Sample = field(default_factory=lambda: Sample(0.0, 0.0))
    _started: Sample = field(default_factory=lambda: Sample(0.0, 0.0))

    def __enter__(self) -> Self:
        self._started = _now()
        return self

    def __exit__(self, *_: object) -> None:
        now = _now()
        self.sample = Sample(now.wall_s - self._started.wall_s, now.cpu_s - self._started.cpu_s)


def compare(
    title: str, alternatives: Sequence[Alternative], *, work: Work, rounds: int = 21, clock: Clock = "wall"
) -> list[Line]:
    """Run `alternatives` (the first is the reference) for `rounds` rounds after one unmeasured; print and return the table."""
    reference = alternatives[0]
    turns = [*alternatives, Alternative(f"{reference.name} again (A/A)", reference.run, reference.prepare)]
    samples: list[list[Sample]] = [[] for _ in turns]
    for alternative in alternatives:
        _take(alternative)
    for number in range(rounds):
        for index in ((number + offset) % len(turns) for offset in range(len(turns))):
            samples[index].append(_take(turns[index]))
    lines = [_line(turn.name, own, samples[0], work, clock) for turn, own in zip(turns, samples, strict=True)]
    print(f"{title}\n{rounds} rounds, interleaved; ratios of {clock} time; {machine()}")
    width = max(len(line.name) for line in lines)
    for index, line in enumerate(lines):
        bracket = f"[{line.low:.2f}, {line.high:.2f}]" if index else "reference"
        print(
            f"  {line.name:<{width}}  {_seconds(line.wall_s)} wall  {_seconds(line.cpu_s)} CPU  "
            f"{line.rate:>12,.4g} {work.unit}/{'s' if clock == 'wall' else 'CPU-s'}  {line.ratio:5.2f}x  {bracket}",
            flush=True,
        )
    return lines


def machine() -> str:
    """Return processor, cores, Python version and git commit, for the head of a table."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_processor()}, {cores} cores, Python {platform.python_version()}, {_commit()}"


def adopt_orphans() -> None:
    """Let this process be the parent of all that its children leave behind, so that `wait_for_orphans` can count their time. Linux."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER


def wait_for_orphans() -> None:
    """Wait until every child has ended, adopted ones too. What no one waits for counts for nobody: workers of a fork server, for one."""
    with suppress(ChildProcessError):
        while True:
            os.wait()


def _take(alternative: Alternative) -> Sample:
    if alternative.prepare is not None:
        alternative.prepare()
    with stopwatch() as watch:
        result = alternative.run()
    return result if isinstance(result, Sample) else watch.sample


def _now() -> Sample:
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Sample(time.perf_counter(), time.process_time() + children.ru_utime + children.ru_stime)


def _line(name: str, own: list[Sample], reference: list[Sample], work: Work, clock: Clock) -> Line:
    times = [_seconds_of(sample, clock) for sample in own]
    ratios = sorted(_seconds_of(base, clock) / time for base, time in zip(reference, times, strict=True))
    margin = round(0.05 * (len(ratios) - 1))
    return Line(
        name=name,
        wall_s=statistics.median(sample.wall_s for sample in own),
        cpu_s=statistics.median(sample.cpu_s for sample in own),
        rate=work.amount / work.per_unit / statistics.median(times),
        ratio=statistics.median(ratios),
        low=ratios[margin],
        high=ratios[-1 - margin],
    )


def _seconds_of(sample: Sample, clock: Clock) -> float:
    return max(sample.wall_s if clock == "wall" else sample.cpu_s, 1e-9)


def _seconds(seconds: float) -> str:
    for unit, size in (("s ", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:8.2f} {unit}"
    return f"{seconds * 1e6:8.1f} us"


def _processor() -> str:
    if sys.platform.startswith("linux"):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.machine()


def _commit() -> str:
    def git(*arguments: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *arguments], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        return f"git {git('rev-parse', '--short', 'HEAD')}{changed}"
    except (OSError, subprocess.CalledProcessError):
        return "no git"

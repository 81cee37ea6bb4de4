"""A profile of some steps of a run: a trace for Perfetto, and a table of where a step goes.

Code says what it is at by `with part("forward")`: while nobody looks, that is one look at a flag of torch. What lies within another
part counts as that one: the passes of an evaluation are evaluation. Messages between ranks go on beside the parts, so their time is told by
itself, and is not one of them.

    profile/<first>-<last>-rank<rank>.json.gz    a trace, which ui.perfetto.dev opens

Times are those of the host: on a GPU the trace says what the device did meanwhile.
"""

import tempfile
from collections import defaultdict
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch.autograd import profiler as switch
from torch.profiler import ProfilerActivity, profile, record_function

from datastore.errors import ConfigError
from datastore.storage.base import Storage
from datastore.training.metrics import StepProfile

__all__ = ["Profiler", "part", "window_of"]

_OURS = "datastore: "

_MESSAGES = ("gloo:", "nccl:")

_NOTHING: AbstractContextManager[Any] = nullcontext()


def part(name: str) -> AbstractContextManager[Any]:
    """Return the context of a part of a step."""
    return record_function(_OURS + name) if switch._is_profiler_enabled else _NOTHING  # noqa: SLF001 - what torch itself looks at


def window_of(text: str) -> tuple[int, int]:
    """Return the first and the last step that `text` names: "10:13", or "10" for one.

    Raises:
        ConfigError: it names none.
    """
    first, _, last = text.partition(":")
    if not first.isdecimal() or not (last or first).isdecimal() or not 1 <= int(first) <= int(last or first):
        raise ConfigError("not steps to profile", profile=text, hint="Write 10:13 for the steps 10 to 13.")
    return int(first), int(last or first)


class Profiler:
    """Looks at the steps `first` to `last` of this rank."""

    def __init__(self, window: tuple[int, int], storage: Storage, *, rank: int) -> None:
        self._first, self._last = window
        self._storage, self._rank = storage, rank
        self._running: profile | None = None
        self._begun = 0
        self.found: StepProfile | None = None
        """What was seen, once the last step is over."""

    def before(self, step: int) -> None:
        """Begin, or end, as `step` is the next one."""
        if self._running is not None and step > self._last:
            self._end(step - 1)
        elif self._running is None and self.found is None and self._first <= step <= self._last:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._running, self._begun = profile(activities=activities), step
            self._running.start()

    def close(self, step: int) -> None:
        """End, as `step` was the last one."""
        if self._running is not None:
            self._end(step)

    def _end(self, last: int) -> None:
        running, self._running = self._running, None
        assert running is not None
        running.stop()
        key = f"profile/{self._begun}-{last}-rank{self._rank}.json.gz"
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "trace.json.gz"
            running.export_chrome_trace(str(file))
            self._storage.put(key, file.read_bytes())
        events = [one for one in running.events() or () if one.device_type.name == "CPU"]  # type: ignore[no-untyped-call]
        spans = [(one.name, one.time_range.start, one.time_range.end) for one in events]
        steps = last - self._begun + 1
        parts, whole = _parts(spans), sum(end - start for name, start, end in spans if name == f"{_OURS}step")
        messages = _covered((start, end) for name, start, end in spans if name.startswith(_MESSAGES))
        outside = sum(parts.get(name, 0.0) for name in ("evaluate", "save"))
        parts["other"] = max(0.0, whole + outside - sum(parts.values()))
        self.found = StepProfile(
            first=self._begun,
            last=last,
            step_s=whole / steps / 1e6,
            parts={name: seconds / steps / 1e6 for name, seconds in parts.items()},
            messages_s=messages / steps / 1e6,
            trace=key,
        )


_Span = tuple[str, float, float]


def _parts(spans: Iterable[_Span]) -> dict[str, float]:
    """Return the microseconds of each part; one within another counts as that."""
    found: dict[str, float] = defaultdict(float)
    until = 0.0
    ours = [one for one in spans if one[0].startswith(_OURS) and one[0] != f"{_OURS}step"]
    for name, start, end in sorted(ours, key=lambda one: (one[1], -one[2])):
        if start >= until:
            found[name.removeprefix(_OURS)] += end - start
            until = end
    return dict(found)


def _covered(spans: Iterable[tuple[float, float]]) -> float:
    """Return how many microseconds lie in at least one of `spans`."""
    total = until = 0.0
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total

"""Who, when and where: the time and the package as documents say them, cores and memory of this machine."""

import logging
import os
import resource
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version as installed_version
from pathlib import Path

__all__ = ["available_bytes", "cores", "memory_bytes", "package_name", "quieten", "resident_bytes", "utc_now"]


def utc_now() -> str:
    """Return the time as it stands in manifests: UTC, ISO 8601, microseconds."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


@cache
def package_name() -> str:
    """Return the name and version of this package as they stand in commits; reading them once takes a millisecond."""
    return f"datastore {installed_version('llm-datastore')}"


def quieten() -> None:
    """Let libraries keep to themselves what nobody can act on; for processes that are ours, not for a user's program.

    Whenever torchao 0.18 is imported, which transformers and peft do where it is installed, it warns of kernels for other devices and, by
    torch 2.13, of names that it should no longer use.
    """
    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


def cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int:
    """Return the memory that this process may use: that of the machine, or of its control group."""
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    text = _text("/sys/fs/cgroup/memory.max").strip()
    return min(machine, int(text)) if text.isdigit() else machine


def available_bytes() -> int | None:
    """Return the memory of the machine that is free or can be freed; None where the system does not say it."""
    return _kilobytes("/proc/meminfo", "MemAvailable:")


def resident_bytes() -> int:
    """Return the memory that this process has now; where the system does not say it, the most that it had."""
    return _kilobytes("/proc/self/status", "VmRSS:") or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _kilobytes(path: str, name: str) -> int | None:
    return next((int(line.split()[1]) * 1024 for line in _text(path).splitlines() if line.startswith(name)), None)


def _text(path: str) -> str:
    try:
        return Path(path).read_text(encoding="ascii")
    except OSError:
        return ""

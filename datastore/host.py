"""Who and when, as documents say it: the time, the package, the cores of this machine."""

import os
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import version as installed_version

__all__ = ["cores", "package_name", "utc_now"]


def utc_now() -> str:
    """Return the time as it stands in manifests: UTC, ISO 8601, microseconds."""
    return datetime.now(UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")


@cache
def package_name() -> str:
    """Return the name and version of this package as they stand in commits; reading them once takes a millisecond."""
    return f"datastore {installed_version('llm-datastore')}"


def cores() -> int:
    """Return how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

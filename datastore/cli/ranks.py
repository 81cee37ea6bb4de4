"""Which rank this process is, as the variables of its launcher say.

Torchrun sets `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `LOCAL_WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT`, and others set the same.
Its agent also says how often it has started them again.
"""

from collections.abc import Mapping
from typing import Any

from datastore.errors import ConfigError

__all__ = ["launched_by"]

_HINT = "Start all ranks with one launcher, such as torchrun, or unset RANK and WORLD_SIZE."


def launched_by(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Return the fields of `datastore.training.launcher.Launch` that a launcher has set, or None if there was none.

    Raises:
        ConfigError: a variable is missing, no number, or out of range.
    """
    if "RANK" not in environ and "WORLD_SIZE" not in environ:
        return None
    world = _number(environ, "WORLD_SIZE", low=1)
    rank = _number(environ, "RANK", high=world)
    local_world = _number(environ, "LOCAL_WORLD_SIZE", low=1, default=1)
    agent_store = environ.get("TORCHELASTIC_USE_AGENT_STORE", "") == "True"
    return {
        "rank": rank,
        "world": world,
        "local_rank": _number(environ, "LOCAL_RANK", high=local_world, default=0),
        "local_world": local_world,
        "host": environ.get("MASTER_ADDR", "127.0.0.1"),
        "port": _number(environ, "MASTER_PORT", low=1, high=2**16) if world > 1 else 0,
        "agent_store": agent_store,
        # Agents count by themselves, and one that joins later has counted less: it is told only where a store outlives its ranks.
        "attempt": _number(environ, "TORCHELASTIC_RESTART_COUNT", default=0) if agent_store else 0,
    }


def _number(
    environ: Mapping[str, str], name: str, *, low: int = 0, high: int | None = None, default: int | None = None
) -> int:
    """Return the variable `name`, a number of at least `low` and below `high`."""
    text = environ.get(name)
    if text is None:
        if default is None:
            raise ConfigError("a variable of the launcher is not set", variable=name, hint=_HINT)
        return default
    if not text.isdecimal() or int(text) < low or (high is not None and int(text) >= high):
        below = {} if high is None else {"below": high}
        raise ConfigError(
            "a variable of the launcher is wrong", variable=name, value=text, at_least=low, **below, hint=_HINT
        )
    return int(text)

"""Settings of a run that change when it is resumed: which differ, and which may."""

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import msgspec

from datastore.training.settings import Settings

__all__ = ["HooksByPlace", "changed_hooks", "changed_keys", "flatten", "hooks_by_place"]

HooksByPlace: TypeAlias = Mapping[str, Mapping[str, Any]]
"""The `[[hooks]]` tables by place and name, such as "0.prune"."""

_MAY_CHANGE = (
    "checkpoint.",
    "data.sources",
    "data.stages",
    "data.temperature",
    "data.url",
    "eval.",
    "faults.",
    "loader.cache_bytes",
    "loader.cache_dir",
    "loader.end_of_text",
    "loader.memory_bytes",
    "loader.prefetch_batches",
    "loader.threads",
    "loader.timeout_s",
    "metrics.",
    "optim.clip",
    "optim.floor",
    "optim.lr",
    "optim.warmup",
    "parallel.",
    "train.compile",
    "train.deterministic",
    "train.device",
    "train.fp8_scales",
    "train.micro_batch",
    "train.precision",
    "train.recompute",
    "train.steps",
    "train.threads",
    "train.timeout_s",
)
"""Settings that a resumed run may change: none of them changes which samples a step consumes or what is learned from them, but
for the size of its steps and the weights of its sources. Those may have to change: a run whose loss has blown up can go on with smaller
ones only, and one that was started on the wrong mixture with another one."""


def flatten(settings: Settings) -> dict[str, Any]:
    """Return every setting by its dotted TOML path; `hooks` is one value."""
    parts: dict[str, Any] = msgspec.to_builtins(settings)
    hooks = parts.pop("hooks")
    flat = {f"{part}.{key}": value for part, values in parts.items() for key, value in values.items()}
    return flat | {"hooks": hooks}


def changed_keys(before: Settings, after: Settings) -> tuple[str, ...]:
    """Return the paths of settings that differ and may not differ in one run, sorted."""
    old, new = flatten(before), flatten(after)
    differ = [key for key in old if old[key] != new[key]]
    scaled = [key for key in differ if key == "train.precision" and "fp16" in {old[key], new[key]}]
    return tuple(sorted([key for key in differ if not key.startswith(_MAY_CHANGE)] + scaled))


def hooks_by_place(tables: Sequence[Mapping[str, Any]]) -> HooksByPlace:
    """Return all `[[hooks]]` tables by place and name."""
    return {f"{place}.{table['use']}": table for place, table in enumerate(tables)}


def changed_hooks(before: HooksByPlace, after: HooksByPlace) -> set[str]:
    """Return what differs between hooks: "hooks.0.prune.ratio", or "hooks.0.prune" if only one side has such a hook in this place."""
    lone = {f"hooks.{name}" for name in before.keys() ^ after.keys()}
    return lone | {
        f"hooks.{name}.{key}"
        for name in before.keys() & after.keys()
        for key in before[name].keys() | after[name].keys()
        if before[name].get(key) != after[name].get(key)
    }

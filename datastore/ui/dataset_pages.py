"""The pages of datasets: each from an address to a template and what it shows."""

from collections.abc import Mapping
from itertools import islice
from typing import Any

from datastore.dataset.durability.health import health
from datastore.dataset.snapshot import Dataset
from datastore.errors import ConfigError, DatastoreError
from datastore.ui import datasets as of
from datastore.ui import documents as docs
from datastore.ui.places import Places

__all__ = [
    "Path",
    "Query",
    "Shown",
    "change",
    "document",
    "documents",
    "media",
    "one",
    "plan",
    "shards",
    "whole_number",
]

Path = Mapping[str, Any]
Query = Mapping[str, str]
Shown = tuple[str, dict[str, Any]]

_CHANGED = 50
"""Documents of a change that are listed."""

_LISTED = 50
_HEALTHY = 20_000
"""Up to so many shards, what losing a place would cost is worked out without being asked for: it lists every file."""


def one(places: Places, path: Path, query: Query) -> Shown:
    """One dataset: its versions, lengths and sources."""
    dataset = _dataset(places, path, query)
    before = whole_number(query, "before", 0) or None
    steps = of.timeline(dataset, before=before)
    older = steps[-1].commit.version - 1 if steps and steps[-1].commit.version > 1 else None
    lengths, half = _tried(lambda: of.bars_of_lengths(dataset), ([], 0))
    return "dataset.html", _of(path, dataset) | {
        "steps": steps,
        "older": older,
        "lengths": lengths,
        "half": half,
        "sources": _tried(lambda: of.sources_of(dataset), []),
    }


def change(places: Places, path: Path, query: Query) -> Shown:
    """What one version added and removed."""
    dataset = _dataset(places, path, query)
    found = of.change_in(dataset, path["version"])
    rows = list(islice(found.documents(), _CHANGED)) if found is not None else []
    commit = dataset.log.read(path["version"])
    return "change.html", _of(path, dataset) | {"found": found, "rows": rows, "commit": commit}


def documents(places: Places, path: Path, query: Query) -> Shown:
    """Documents, all or those that are searched for."""
    dataset = _dataset(places, path, query)
    wanted = docs.Query(
        text=query.get("q", "").strip(),
        inside=bool(query.get("inside")),
        where=query.get("where", "").strip(),
        source=query.get("source", "").strip(),
    )
    at = (whole_number(query, "shard", 0), whole_number(query, "row", 0))
    found = docs.find(dataset, wanted, at=at)
    return "documents.html", _of(path, dataset) | {
        "query": wanted,
        "found": found,
        "total": int(dataset.segments.documents.sum()),
    }


def document(places: Places, path: Path, query: Query) -> Shown:
    """One document, as what it is."""
    dataset = _dataset(places, path, query)
    found = docs.show(dataset, path["shard"], path["row"])
    return "document.html", _of(path, dataset) | {"document": found, "info": dataset.segments.shard(path["shard"])}


def media(places: Places, path: Path, query: Query) -> tuple[bytes, str]:
    """Return the bytes of an image or a sound, and what they are."""
    return docs.blob(_dataset(places, path, query), path["shard"], path["row"], path["column"])


def shards(places: Places, path: Path, query: Query) -> Shown:
    """All shards as a map, some of them as a list, and what losing a place would cost."""
    dataset = _dataset(places, path, query)
    count = len(dataset.segments)
    start = min(whole_number(query, "start", 0), max(0, count - 1))
    listed = [(index, dataset.segments.shard(index)) for index in range(start, min(start + _LISTED, count))]
    asked = bool(query.get("health")) or count <= _HEALTHY
    return "shards.html", _of(path, dataset) | {
        "cells": of.shard_map(dataset),
        "listed": listed,
        "start": start,
        "page": _LISTED,
        "deleted": {shard.uid: dataset.deletions.rows(shard.uid).size for _, shard in listed},
        "health": _tried(lambda: health(dataset.storage), None) if asked else None,
        "asked": asked,
    }


def plan(places: Places, path: Path, query: Query) -> Shown:
    """Which shards the ranks of a run would read."""
    dataset = _dataset(places, path, query)
    asked = {
        name: whole_number(query, name, default)
        for name, default in (("ranks", 4), ("steps", 16), ("seq_len", 512), ("global_batch", 64), ("seed", 0))
    }
    found = of.planned(dataset, **asked)
    shown = sorted({shard for step in found for shard, _ in step.shards})
    return "plan.html", _of(path, dataset) | {
        "asked": asked,
        "planned": found,
        "shards": shown,
        "hues": {shard: round(360 * place / max(1, len(shown))) for place, shard in enumerate(shown)},
    }


def _of(path: Path, dataset: Dataset) -> dict[str, Any]:
    name = dataset.url.rstrip("/").rsplit("/", 1)[-1]
    return {"number": path["dataset"], "dataset": dataset, "name": name}


def _dataset(places: Places, path: Path, query: Query) -> Dataset:
    version = whole_number(query, "version", 0)
    return places.whole(path["dataset"], version or None)


def whole_number(query: Query, name: str, default: int) -> int:
    """Return the number that `query` has under `name`; `default` if it has none, or an empty one.

    Raises:
        ConfigError: it is no whole number.
    """
    text = query.get(name) or str(default)
    if not text.isdecimal():
        raise ConfigError("not a whole number", **{name: text}, hint="Give digits.")
    return int(text)


def _tried(make: Any, otherwise: Any) -> Any:
    """Return what `make` returns; if a file of the dataset is damaged or gone, `otherwise`: the rest of the page is shown."""
    try:
        return make()
    except DatastoreError:
        return otherwise

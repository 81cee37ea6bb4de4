"""Which datasets and runs there are: at the URLs that were named, or up to three folders below them.

Each gets a number, which its pages have in their addresses. Folders are looked through once, and again when somebody asks for the
first page; what was found keeps its number.
"""

import threading
from collections.abc import Sequence
from functools import partial
from typing import TypeVar

from datastore.dataset.log.keys import INFO_KEY
from datastore.dataset.snapshot import Dataset, open_dataset
from datastore.display import short_names
from datastore.errors import DatastoreError, MissingError
from datastore.storage.backends.local import LocalStorage
from datastore.storage.base import Storage
from datastore.storage.resolve import open_storage, places_below
from datastore.threads import in_thread
from datastore.training.run.folder import CONFIG_KEY, is_run
from datastore.ui.series import RunSeries

__all__ = ["Places", "Run"]

T = TypeVar("T")

_DEPTH = 3


class Run:
    """A run that is looked at."""

    def __init__(self, number: int, url: str) -> None:
        self.number = number
        self.url = url
        (self.name,) = short_names([url])
        """The end of its URL by which it is told from the other runs."""

        self.storage = open_storage(url)
        self.series = RunSeries(self.storage)


class Places:
    """The datasets and runs at `urls` and below; safe for several threads."""

    def __init__(self, urls: Sequence[str]) -> None:
        self._named = list(urls)
        self._datasets: list[str] = []
        self._open: dict[tuple[str, int], Dataset] = {}
        self._runs: dict[str, Run] = {}
        self._lock = threading.Lock()
        self._reading = threading.Lock()
        self.troubles: list[str] = []
        """Places that could not be looked at."""

    def look(self) -> None:
        """Look for what is new."""
        troubles = []
        for url in self._named:
            try:
                found = _below(url)
            except DatastoreError as error:
                troubles.append(f"{url}: {error}")
                continue
            if not found:
                troubles.append(f"{url}: neither a dataset nor a run, nor are there any below it")
            with self._lock:
                for kind, place in found:
                    if kind == "dataset" and place not in self._datasets:
                        self._datasets.append(place)
                    elif kind == "run" and place not in self._runs:
                        self._runs[place] = Run(len(self._runs), place)
        with self._lock:
            for run, name in zip(self._runs.values(), short_names([*self._runs]), strict=True):
                run.name = name
        self.troubles = troubles

    @property
    def datasets(self) -> list[str]:
        """The URLs of the datasets, by number."""
        return list(self._datasets)

    @property
    def runs(self) -> list[Run]:
        """The runs, by number."""
        return list(self._runs.values())

    def prepare(self) -> None:
        """Begin to read the manifests of all datasets, so that the first page of a large one need not wait for that."""
        for number in range(len(self._datasets)):
            in_thread(partial(self.whole, number), name="manifest", daemon=True)

    def whole(self, number: int, version: int | None = None) -> Dataset:
        """Return a dataset whose manifest has been read; otherwise as `dataset`.

        Raises:
            MissingError, CorruptError: a segment is gone or damaged.
        """
        found = self.dataset(number, version)
        with self._reading:  # Two pages at once do not read it twice.
            _ = found.segments
        return found

    def dataset(self, number: int, version: int | None = None) -> Dataset:
        """Return a dataset at its newest version, or at `version`; one that was opened before as it was.

        Raises:
            MissingError: there is none of that number, or no such version.
            DatastoreError: as `open_dataset`.
        """
        url = _at(self.datasets, number, "dataset")
        if version is None:
            found = open_dataset(url)
            version = found.version
        else:
            found = self._open.get((url, version)) or open_dataset(url, version=version)
        with self._lock:
            kept = self._open.setdefault((url, version), found)
            while len(self._open) > _KEPT:
                del self._open[next(iter(self._open))]
        return kept

    def run(self, number: int) -> Run:
        """Return a run.

        Raises:
            MissingError: there is none of that number.
        """
        return _at(self.runs, number, "run")


_KEPT = 8
"""Versions that stay open."""


def _at(items: Sequence[T], number: int, kind: str) -> T:
    if not 0 <= number < len(items):
        raise MissingError(f"there is no such {kind}", number=number, hint="Go back to the first page.")
    return items[number]


def _below(url: str) -> list[tuple[str, str]]:
    """Return the datasets and runs at and below `url`, each as its kind and its URL."""
    storage = open_storage(url)
    if not isinstance(storage, LocalStorage):  # There, all keys below would be listed.
        if _exists(storage, INFO_KEY):
            return [("dataset", url)]
        if is_run(storage):
            return [("run", url)]
    found = places_below(url, {INFO_KEY: lambda _: True, CONFIG_KEY: is_run}, depth=_DEPTH)
    return sorted(("dataset" if mark == INFO_KEY else "run", place) for place, mark in found)


def _exists(storage: Storage, key: str) -> bool:
    try:
        storage.stat(key)
    except MissingError:
        return False
    return True

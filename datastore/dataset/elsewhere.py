"""Work on a dataset in other processes: where it is goes with each piece of the work, and it is opened there once.

    crew = crew_of(dataset, target, engine)
    for number, answer in crew.spread(check_files, pieces, answer=list[Bad]): ...

    def check_files(order: bytes, tell: Tell) -> bytes:        # in any process
        dataset, files = received(order, list[File])
        return sent(...)

What is sent are documents, dataclasses and plain values.
"""

import os
import threading
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec

from datastore.dataset.snapshot import Dataset, open_dataset, split_reference
from datastore.document import Document, Version
from datastore.engines.engine import Engine, Function, Piece, spread
from datastore.errors import ConfigError
from datastore.storage.base import Storage

__all__ = ["Crew", "crew_of", "received", "sent"]

T = TypeVar("T")

_OWN = threading.local()
"""The dataset that a thread has opened last, and its place."""


class _Place(Document, frozen=True, kw_only=True):
    """A version of a dataset. Never stored: its URL may hold credentials."""

    url: str
    version: Version


class _Order(Document, frozen=True, kw_only=True):
    place: _Place
    item: msgspec.Raw


@dataclass(frozen=True, slots=True)
class Crew:
    """Who does the work, and where they find the dataset."""

    engine: Engine
    place: _Place

    def spread(
        self, function: Function, items: Iterable[tuple[Any, Mapping[str, str]]], *, answer: type[T]
    ) -> Iterator[tuple[int, T]]:
        """Yield the number of each of `items` and what `function` answers, as they are done.

        With an item goes what to call it if it goes wrong.

        Raises:
            DatastoreError: what `function` raised; or the engine gave up.
        """

        def pieces() -> Iterator[Piece]:
            for item, about in items:
                yield Piece(sent(_Order(place=self.place, item=msgspec.Raw(sent(item)))), about)

        for number, raw in spread(self.engine, function, pieces()):
            yield number, msgspec.msgpack.decode(raw, type=answer)


def crew_of(dataset: Dataset, target: object, engine: Engine) -> Crew:
    """Return a crew for `dataset`, which was opened as `target`: by that, if it is a URL, credentials too.

    Raises:
        ConfigError: only this process sees the dataset.
    """
    if dataset.url.startswith("memory://"):
        raise ConfigError("other processes cannot see memory://", hint="Do it without an engine.")
    named = dataset.url if isinstance(target, Dataset | Storage) else split_reference(os.fspath(str(target)))[0]
    return Crew(engine, _Place(url=named, version=dataset.version))


def received(order: bytes, kind: type[T]) -> tuple[Dataset, T]:
    """Return the dataset of an order, which is opened unless this thread has just had it, and the item.

    Raises:
        MissingError: there is none, or that version has expired.
        DatastoreError: as `open_dataset`.
    """
    found = msgspec.msgpack.decode(order, type=_Order)
    known: tuple[_Place, Dataset] | None = getattr(_OWN, "known", None)
    if known is None or known[0] != found.place:
        known = _OWN.known = (found.place, open_dataset(found.place.url, version=found.place.version))
    return known[1], msgspec.msgpack.decode(found.item, type=kind)


def sent(value: object) -> bytes:
    """Return `value`, a document, dataclass or plain value, as it goes from process to process."""
    return msgspec.msgpack.encode(value)

"""One dataset on several disks: each key lies on `copies` of the roots, and whoever reads or writes it sees one storage.

As many copies as roots are mirrors, one copy is a stripe; `placement` says which roots. What is not data lies on all of
them, and the first root decides: a commit is there when it is there.

- A read asks the next root when one fails, is slow, or lacks the key. That bytes are wrong is found by who knows their
  digest: it asks the other `copies`, and has the bad one written anew (`heal`).
- A write to a root that fails is made up for on the next root, or is done without if one copy is durable. That root
  has then fallen behind: a warning is logged, and `_behind/<its id>` on the others says so until `repair`. For what is
  not data it is asked last from then on, since it may not know what was deleted or replaced.
- While the first root is not there nothing can be written: two halves of a torn set must not go on by themselves.
  A root is there if it holds the key `guard`; the empty folder below which a disk is not mounted is not taken for it.

The price is a thread per call, and that writes take as long as the slowest root of theirs.
"""

import heapq
import logging
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import TypeVar

from typing_extensions import Buffer, override

from datastore.errors import ConflictError, DatastoreError, MissingError, StorageError
from datastore.storage.base import Root, Stat, Storage, check_key
from datastore.storage.errors import missing
from datastore.storage.hedging import Answers, Patience, all_answers, first_answer
from datastore.storage.rendezvous import Rules, rank_roots
from datastore.storage.statistics import OperationStatistics, add_statistics

__all__ = ["PlacedStorage"]

T = TypeVar("T")

Roots = Sequence[Root]
Urls = Sequence[str]

_AVOID_S = 30.0
"""How long a root that was slow is asked last."""

_LOGGER = logging.getLogger(__name__)


class PlacedStorage(Storage):
    """The bytes of a dataset on `roots`, the first of which decides. `behind` are the ids of those that have missed something."""

    def __init__(
        self,
        roots: Sequence[Root],
        rules: Rules,
        *,
        url: str = "",
        behind: Collection[str] = (),
        patience: Patience = Patience(),  # noqa: B008 - frozen
    ) -> None:
        self.rules = rules
        self.patience = patience
        self._roots = tuple(roots)
        self._behind = set(behind)
        self.healed: list[tuple[str, str]] = []
        """Key and URL of each copy that was written anew."""
        self._url = url or roots[0].storage.url
        self._ids = [root.id for root in roots]
        self._slow_until: dict[str, float] = {}
        self._told: set[str] = set()
        self._healing: set[str] = set()

    @override
    def __repr__(self) -> str:
        return f"PlacedStorage({[root.storage.url for root in self._roots]!r}, copies={self.rules.copies})"

    @property
    @override
    def url(self) -> str:
        """The root by which it was opened."""
        return self._url

    @property
    @override
    def exclusive(self) -> bool:
        return self._roots[0].storage.exclusive

    @override
    def get(self, key: str) -> bytes:
        return self._read(key, lambda storage: storage.get(key))

    @override
    def get_ranges(self, key: str, ranges: Sequence[tuple[int, int]]) -> list[bytes]:
        return self._read(key, lambda storage: storage.get_ranges(key, ranges))

    @override
    def read_into(self, key: str, start: int, target: Buffer) -> None:
        view = memoryview(target).cast("B")

        def read(storage: Storage) -> bytearray:
            # A root that answers when another has long been taken instead must not write into `target`.
            found = bytearray(len(view))
            storage.read_into(key, start, found)
            return found

        view[:] = self._read(key, read)

    @override
    def stat(self, key: str) -> Stat:
        return self._read(key, lambda storage: storage.stat(key))

    @override
    def put(self, key: str, *chunks: Buffer) -> None:
        first = self._decider(key)
        if not self.rules.is_data(key):
            self._write([first], lambda storage: storage.put(key, *chunks))
        self._spread(key, chunks, done=[] if self.rules.is_data(key) else [first])

    @override
    def put_new(self, key: str, *chunks: Buffer) -> None:
        first = self._decider(key)
        self._write([first], lambda storage: storage.put_new(key, *chunks))
        self._spread(key, chunks, done=[first])

    @override
    def delete(self, key: str) -> None:
        first = self._decider(key)
        others = [root for root in self._roots if root is not first]
        answers = self._try_all(others, lambda storage: storage.delete(key))
        for index, error in answers.errors.items():
            self._falls_behind(others[index], key, error)
        # Last, so that nobody who finds it gone here finds it there, and thinks that it was lost.
        self._write([first], lambda storage: storage.delete(key))

    @override
    def list(self, folder: str = "") -> Iterator[Stat]:
        data = not folder or self.rules.is_data(f"{folder}/")
        if folder:
            check_key(folder)
        roots = list(self._roots) if data else self._trusted()
        answers = self._try_all(roots, _nothing)
        failed = len(answers.errors)
        if failed and failed >= (self.rules.copies if data else len(roots)):
            raise next(iter(answers.errors.values()))
        lists = [_tagged(roots[index], folder) for index in sorted(answers.values)]
        for key, found in groupby(heapq.merge(*lists, key=lambda item: item[0].key), key=lambda item: item[0].key):
            ranks = {root.id: place for place, root in enumerate(self._order(key))}
            yield min(found, key=lambda item: ranks[item[1]])[0]

    @override
    def local_path(self, key: str) -> Path | None:
        check_key(key)
        for root in self._order(key):
            path = root.storage.local_path(key)
            if path is not None:
                return path
        return None

    @override
    def statistics(self) -> dict[str, OperationStatistics]:
        return add_statistics(root.storage.statistics() for root in self._roots)

    @override
    def clear_unfinished(self, *, before: float, dry_run: bool = False) -> Sequence[Stat]:
        found = self._try_all(self._roots, lambda storage: storage.clear_unfinished(before=before, dry_run=dry_run))
        return [stat for stats in found.values.values() for stat in stats]

    @override
    def copies(self, key: str) -> Sequence[Storage]:
        homes = self.homes(check_key(key))
        late = [] if self.rules.is_data(key) else [root for root in self._roots if root not in homes]
        return [root.storage for root in (*homes, *late)]

    @override
    def heal(self, key: str, is_good: Callable[[bytes], bool]) -> None:
        if key in self._healing or not self.rules.is_immutable(key):
            return
        self._healing.add(key)
        threading.Thread(target=self._heal, args=(key, is_good), name="datastore-heal", daemon=True).start()

    @override
    def roots(self) -> Roots:
        return self._roots

    @override
    def behind(self) -> Collection[str]:
        return self._behind

    @override
    def homes(self, key: str) -> Roots:
        ranked = self._ranked(key)
        return ranked[: self.rules.copies] if self.rules.is_data(key) else ranked

    @override
    def lost(self) -> Urls:
        answers = self._try_all(self._roots, _nothing)
        return [self._roots[index].storage.url for index in sorted(answers.errors)]

    def heal_now(self, key: str, is_good: Callable[[bytes], bool]) -> Urls:
        """Write the copies of `key` anew that are not good; return the URLs of their roots, none if no copy is good."""
        bad: list[Root] = []
        good: tuple[Root, bytes] | None = None
        homes = self.homes(key)
        for root in [*homes, *(root for root in self._ranked(key) if root not in homes)]:
            raw = self._good_bytes(root, key, is_good)
            if raw is None and root in homes:
                bad.append(root)
            elif raw is not None and good is None:
                good = root, raw
            if good is not None and root is homes[-1]:
                break
        if good is None:
            return []
        source, data = good
        answers = self._try_all(bad, lambda storage: storage.put(key, data))
        written = [bad[index] for index in sorted(answers.values)]
        if self._good_bytes(source, key, lambda _: True) is None:
            # Deleted while it was being copied: what was written is what should be gone.
            self._try_all(written, lambda storage: storage.delete(key))
            return []
        self.healed += [(key, root.storage.url) for root in written]
        return [root.storage.url for root in written]

    def _heal(self, key: str, is_good: Callable[[bytes], bool]) -> None:
        try:
            urls = self.heal_now(key, is_good)
            if urls:
                _LOGGER.warning("%s was damaged or gone at %s; it was written anew", key, ", ".join(urls))
        except DatastoreError as error:
            _LOGGER.warning("%s is damaged, and could not be written anew: %s", key, error)
        finally:
            self._healing.discard(key)

    def _good_bytes(self, root: Root, key: str, is_good: Callable[[bytes], bool]) -> bytes | None:
        raw = first_answer([partial(root.storage.get, key)], self.patience).values.get(0)
        return raw if raw is not None and is_good(raw) else None

    def _ranked(self, key: str) -> Roots:
        if self.rules.is_data(key):
            return [self._roots[index] for index in rank_roots(self._ids, key)]
        return self._trusted()

    def _order(self, key: str) -> Roots:
        """Return the roots to ask for `key`, those that were slow last."""
        now = time.monotonic()
        return sorted(self._ranked(key), key=lambda root: self._slow_until.get(root.id, 0.0) > now)

    def _trusted(self) -> Roots:
        """Return the roots that have missed nothing; the first is among them, for it decides."""
        return [root for root in self._roots if root is self._roots[0] or root.id not in self._behind]

    def _read(self, key: str, read: Callable[[Storage], T]) -> T:
        roots = self._order(check_key(key))
        answers = self._ask(roots, read)
        if not answers.values and not self.rules.is_data(key) and not any(map(_says_missing, answers.errors.values())):
            roots = [root for root in self._roots if root.id in self._behind] or roots
            answers = self._ask(roots, read)
        for index, value in answers.values.items():
            self._note_gap(key, [roots[other] for other in answers.errors if other < index])
            return value
        raise self._verdict(key, roots, answers)

    def _ask(self, roots: Sequence[Root], read: Callable[[Storage], T]) -> Answers[T]:
        answers = first_answer([partial(read, root.storage) for root in roots], self.patience)
        for index in answers.slow:
            self._slow_until[roots[index].id] = time.monotonic() + _AVOID_S
            self._tell(roots[index], "it does not answer in time; it is asked last for a while")
        return answers

    def _note_gap(self, key: str, roots: Sequence[Root]) -> None:
        """Another root had to be asked than `roots`; those of them that should have `key` get it again."""
        homes = {root.id for root in self.homes(key)}
        if any(root.id in homes for root in roots) and self.rules.is_immutable(key):
            for root in roots:
                self._tell(root, f"it could not give {key}; another root did")
            self.heal(key, lambda _: True)

    def _verdict(self, key: str, roots: Sequence[Root], answers: Answers[T]) -> DatastoreError:
        """Return the error for a key that no root gave: it is missing only if roots that are there say so."""
        absent = [roots[index] for index, error in answers.errors.items() if _says_missing(error)]
        checks = self._try_all(absent, _nothing)
        failed = [error for error in answers.errors.values() if not _says_missing(error)]
        failed += checks.errors.values()
        if not failed or (checks.values and not self.rules.is_data(key)):
            return missing(key=key, url=self._url)
        return failed[0]

    def _decider(self, key: str) -> Root:
        """Return the root that decides whether `key` is there; nothing is written without the first root of all."""
        check_key(key)
        answers = self._try_all(self._roots[:1], _nothing)
        for error in answers.errors.values():
            raise StorageError(
                "the first root of the dataset is not there, so nothing can be written",
                root=self._roots[0].storage.url,
                cause=str(error),
                hint="Mount it again; or, if its disk is gone, run `datastore repair URL --promote`.",
            ) from None
        return self._ranked(key)[0]

    def _spread(self, key: str, chunks: Sequence[Buffer], *, done: Sequence[Root]) -> None:
        """Write `key` to all roots that it should lie on, or others in their place, besides those that have it."""
        homes = self.homes(key)
        spare = [root for root in self._ranked(key) if root not in homes] if self.rules.is_data(key) else []
        todo = [root for root in homes if root not in done]
        if not self.rules.is_data(key):
            todo += [root for root in self._roots if root not in homes]  # Behind, and maybe back.
        written = len(done)
        failures: list[tuple[Root, DatastoreError]] = []
        while todo:
            answers = self._try_all(todo, lambda storage: storage.put(key, *chunks))
            failures += [(todo[index], error) for index, error in answers.errors.items()]
            written += len(answers.values)
            todo, spare = spare[: len(answers.errors)], spare[len(answers.errors) :]
        if not written:
            raise failures[0][1]
        for root, error in failures:
            self._falls_behind(root, key, error)

    def _write(self, roots: Sequence[Root], write: Callable[[Storage], None]) -> None:
        for error in self._try_all(roots, write).errors.values():
            raise error

    def _try_all(self, roots: Sequence[Root], call: Callable[[Storage], T]) -> Answers[T]:
        """Make `call` on each of `roots` that is there."""
        return all_answers([partial(self._guarded, root, call) for root in roots], self.patience.write_s)

    def _guarded(self, root: Root, call: Callable[[Storage], T]) -> T:
        if self.rules.guard:
            try:
                root.storage.stat(self.rules.guard)
            except MissingError:
                raise StorageError(
                    "a root of the dataset is not there",
                    root=root.storage.url,
                    hint="Mount its disk, or see `datastore repair`.",
                ) from None
        return call(root.storage)

    def _falls_behind(self, root: Root, key: str, error: DatastoreError) -> None:
        """Record that `root` has missed a write, so that `repair` finds it and readers do not believe it."""
        self._tell(root, f"it missed {key} ({error}); run `datastore repair` when it is back")
        self._behind.add(root.id)
        others = [other for other in self._roots if other is not root]
        marked = self._try_all(others, partial(_mark, key=self.rules.behind_key(root.id), text=f"missed {key}\n"))
        if others and not marked.values:
            raise error

    def _tell(self, root: Root, fact: str) -> None:
        if root.id not in self._told:
            self._told.add(root.id)
            _LOGGER.warning("root %s: %s", root.storage.url, fact)


def _tagged(root: Root, folder: str) -> Iterator[tuple[Stat, str]]:
    for stat in root.storage.list(folder):
        yield stat, root.id


def _says_missing(error: DatastoreError) -> bool:
    return isinstance(error, MissingError)


def _mark(storage: Storage, *, key: str, text: str) -> None:
    try:
        storage.put_new(key, text.encode())
    except ConflictError:
        return


def _nothing(_: Storage) -> None:
    """Ask for nothing but whether the root is there."""

"""A dataset on several disks: which those are stands in `datastore.json` on each of them, so any one opens it.

Each change of the places (a new disk, another first root) has a higher generation; a root that comes back with a
lower one has missed something, and its word on where the dataset lies does not count.
"""

import logging
import os
import uuid
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec

from datastore.dataset.log.identity import create_dataset, read_info
from datastore.dataset.log.keys import (
    BEHIND_FOLDER,
    INFO_KEY,
    PLACEMENT,
    PROBE_FOLDER,
    behind_key,
    commit_key,
    is_data,
    is_immutable,
)
from datastore.dataset.log.manifest import DatasetInfo, Placement, RootRef
from datastore.document import seal
from datastore.errors import ConfigError, ConflictError, FormatError, MissingError, whole_number
from datastore.storage.base import Root, Storage, probe_exclusive
from datastore.storage.hedging import Answers, all_answers
from datastore.storage.placed import PlacedStorage
from datastore.storage.rendezvous import Rules
from datastore.storage.resolve import open_storage
from datastore.storage.wrappers import Subfolder

__all__ = [
    "RootChange",
    "change_roots",
    "create_at",
    "open_roots",
    "place_dataset",
    "placement_rules",
    "same_place",
    "store_info",
]

_LOGGER = logging.getLogger(__name__)

_OPEN_S = 15.0
"""How long opening waits for a root; a disk that sleeps takes some ten seconds."""


def open_roots(place: str | os.PathLike[str] | Storage) -> tuple[Storage, DatasetInfo]:
    """Return the storage of the dataset at `place`, which is any of its roots, and its identity.

    Raises:
        MissingError: there is no dataset.
        FormatError: there is something else; or a newer version of this package is needed.
        CorruptError: `datastore.json` is damaged.
        ConfigError: the place is none of those that the dataset names: it was moved.
    """
    storage = place if isinstance(place, Storage) else open_storage(place)
    info = read_info(storage)
    if info.placement is None or len(storage.copies(INFO_KEY)) > 1:
        return storage, info
    return _assemble(storage, info)


def create_at(place: str | os.PathLike[str] | Storage) -> tuple[Storage, DatasetInfo]:
    """Return the storage of the dataset at `place`, which is made if it is not there, and its identity.

    Raises:
        DatastoreError: as `open_roots` and `create_dataset`.
    """
    try:
        return open_roots(place)
    except (MissingError, FormatError):  # Of what may be there before a dataset is, or may not, creating knows more.
        storage = place if isinstance(place, Storage) else open_storage(place)
        return storage, create_dataset(storage)


def _assemble(storage: Storage, info: DatasetInfo) -> tuple[Storage, DatasetInfo]:
    placement = _placement(info)
    roots = [
        Root(ref.id, storage if same_place(storage, ref.url) else open_storage(ref.url)) for ref in placement.roots
    ]
    found = _infos(roots)
    newest = max([info, *found.values.values()], key=lambda info: _placement(info).generation)
    if _placement(newest) != placement:
        return _assemble(storage, newest)
    if not any(root.storage is storage for root in roots):
        raise ConfigError(
            "this place is none of those that the dataset names",
            url=storage.url,
            roots=[ref.url for ref in placement.roots],
            hint="If one was moved, run `datastore repair URL --root OLD=NEW`; to make a copy, use `datastore copy`.",
        )
    behind = {roots[index].id for index, one in found.values.items() if _placement(one) != placement}
    marks = all_answers([partial(_marks, roots[index].storage) for index in found.values], _OPEN_S)
    behind.update(*marks.values.values())
    return PlacedStorage(roots, placement_rules(placement.copies), url=storage.url, behind=behind), newest


def placement_rules(copies: int, *, guard: str = INFO_KEY) -> Rules:
    """Return how the keys of a dataset with that many copies are placed."""
    return Rules(copies=copies, is_data=is_data, is_immutable=is_immutable, behind_key=behind_key, guard=guard)


def _infos(roots: Sequence[Root]) -> Answers[DatasetInfo]:
    """Return what the roots that are there say of the dataset."""
    found = all_answers([partial(read_info, root.storage) for root in roots], _OPEN_S)
    if len({info.uuid for info in found.values.values()}) > 1:
        raise FormatError(
            "one of its roots holds another dataset",
            roots={roots[index].storage.url: info.uuid for index, info in found.values.items()},
            hint="Check what is mounted there.",
        )
    return found


def _marks(storage: Storage) -> list[str]:
    return [stat.key.removeprefix(f"{BEHIND_FOLDER}/") for stat in storage.list(BEHIND_FOLDER)]


def place_dataset(url: str | os.PathLike[str], *, roots: Sequence[str], copies: int = 2) -> DatasetInfo:
    """Let the dataset at `url`, which is made if it is not there, lie there and on `roots`, each file on `copies` of them.

    What is there already does not move: run `repair` to have it copied to where it belongs. No writer may be at work.
    Given again it changes nothing; given with further roots or other copies, it adds those.

    Raises:
        ConfigError: a root is named twice, holds something, lies within another, or there are not as many as copies.
        ConflictError: a root belongs to another dataset.
    """
    places = _distinct([open_storage(url), *map(open_storage, roots)])
    copies = whole_number(copies, name="copies")
    if not 1 <= copies <= len(places):
        raise ConfigError(
            "there are not as many roots as copies",
            roots=len(places),
            copies=copies,
            hint="Give more of `roots`, or fewer `copies`.",
        )
    info = create_dataset(places[0], whole=False)
    known = list(info.placement.roots) if info.placement else []
    named = [(place, next((ref for ref in known if same_place(place, ref.url)), None)) for place in places]
    refs = [ref or RootRef(id=uuid.uuid4().hex, url=place.url) for place, ref in named]
    fresh = Placement(
        roots=(*known, *(ref for ref in refs if ref not in known)),
        copies=copies,
        generation=info.placement.generation + 1 if info.placement else 1,
    )
    for place in places[1:]:
        _has(place, info)
    if info.placement is None or (fresh.roots, fresh.copies) != (info.placement.roots, info.placement.copies):
        info = _placed(info, fresh)
    lost = {ref.id for place, ref in named if ref is not None and not _has(place, info)}
    for ref, place in zip(refs, places, strict=True):
        if ref.id in lost:
            _LOGGER.warning("root %s is not there; if its disk is new, run `datastore repair --recreate`", ref.url)
        else:
            store_info(place, info)
    return read_info(places[0])


@dataclass(frozen=True, slots=True)
class RootChange:
    """What `change_roots` has done."""

    url: str
    """A root by which the dataset can be opened."""

    info: DatasetInfo
    filled: frozenset[str]
    """Ids of the roots that are new, and have to be filled."""

    returned: frozenset[str]
    """Ids of those that had lost `datastore.json`, and nothing else."""

    late: Storage | None
    """The first root, if it is one of those: it counts only once `info` is stored there, after all commits."""


def change_roots(url: str, moves: Mapping[str, str], *, promote: bool, dry_run: bool) -> RootChange:
    """Let the roots that `moves` names be where it says, and the first that is there be the first of all if `promote`.

    Raises:
        ConfigError: a root is not one of the dataset's, or what is to be a root holds something else.
        DatastoreError: there is no dataset at `url`, nor anywhere it was moved to.
    """
    start = open_storage(url)
    info = read_info(start)
    if info.placement is None:
        if moves or promote:
            raise ConfigError("the dataset lies in one place", url=start.url, hint="See `datastore place`.")
        return RootChange(url, info, frozenset(), frozenset(), None)
    refs = _moved(info.placement.roots, {old: open_storage(new) for old, new in moves.items()})
    roots = [Root(ref.id, open_storage(ref.url)) for ref in refs]
    there = _infos(roots)
    info = max([info, *there.values.values()], key=lambda one: _placement(one).generation)
    present = [root for index, root in enumerate(roots) if index in there.values]
    named = {ref.id for ref in refs if any(same_place(open_storage(new), ref.url) for new in moves.values())}
    absent = [root for root in roots if root not in present]
    filled = [root for root in absent if root.id in named]
    # One that has lost nothing but `datastore.json` has missed nothing either, unless a mark says so.
    returned = [root for root in absent if root not in filled and present and _same_log(root, present[0])]
    present += returned
    if promote:
        refs = _promoted(refs, present)
    old = _placement(info)
    if refs[0] != old.roots[0] and present and not dry_run:
        info = msgspec.structs.replace(info, exclusive=probe_exclusive(Subfolder(present[0].storage, PROBE_FOLDER)))
    if refs != old.roots:
        info = _placed(info, Placement(roots=refs, copies=old.copies, generation=old.generation + 1))
    change = RootChange(
        url=present[0].storage.url if present else url,
        info=info,
        filled=frozenset(root.id for root in filled),
        returned=frozenset(root.id for root in returned),
        late=next((root.storage for root in filled if root.id == refs[0].id), None),
    )
    if not dry_run:
        _store(change, present, filled)
    return change


def _moved(refs: tuple[RootRef, ...], moves: Mapping[str, Storage]) -> tuple[RootRef, ...]:
    places = {ref.id: place for ref in refs for old, place in moves.items() if same_place(open_storage(old), ref.url)}
    if len(places) < len(moves):
        raise ConfigError(
            "a root is none of those that the dataset names",
            named=sorted(moves),
            roots=[ref.url for ref in refs],
            hint="Write OLD=NEW, with OLD as the dataset names it.",
        )
    return tuple(RootRef(id=ref.id, url=places[ref.id].url) if ref.id in places else ref for ref in refs)


def _same_log(root: Root, other: Root) -> bool:
    """Return whether a root without `datastore.json` has the log of this dataset: then nothing but that file is lost."""
    first = commit_key(1)
    answers = all_answers([partial(root.storage.get, first), partial(other.storage.get, first)], _OPEN_S)
    return len(answers.values) == 2 and answers.values[0] == answers.values[1]


def _promoted(refs: tuple[RootRef, ...], present: Sequence[Root]) -> tuple[RootRef, ...]:
    """Return `refs` with those that are there first, in their order."""
    ids = {root.id for root in present}
    return tuple(sorted(refs, key=lambda ref: ref.id not in ids))


def _store(change: RootChange, present: Sequence[Root], filled: Sequence[Root]) -> None:
    """Write what has changed: first that the new roots are behind, then where they are, to the first root first."""
    for root in filled:
        for other in present:
            other.storage.put(behind_key(root.id), b"a new disk\n")
    order = [ref.id for ref in _placement(change.info).roots]
    for root in sorted([*present, *filled], key=lambda root: order.index(root.id)):
        if root.storage is not change.late:
            store_info(root.storage, change.info)


def store_info(place: Storage, info: DatasetInfo) -> None:
    """Write `datastore.json` of one root."""
    place.put(INFO_KEY, seal(info))


def same_place(storage: Storage, url: str) -> bool:
    """Return whether `url` names the place of `storage`, maybe by another path."""
    if storage.url == url:
        return True
    if "://" in storage.url or "://" in url:
        return False
    with suppress(OSError):
        return Path(storage.url).samefile(url)
    return Path(storage.url).resolve() == Path(url).resolve()


def _distinct(places: list[Storage]) -> list[Storage]:
    for index, place in enumerate(places):
        for other in places[:index]:
            if same_place(place, other.url) or _within(place.url, other.url) or _within(other.url, place.url):
                raise ConfigError(
                    "a root is named twice, or lies within another",
                    root=place.url,
                    other=other.url,
                    hint="Name a folder on another disk.",
                )
    if len({"://" in place.url for place in places}) > 1:
        raise ConfigError(
            "some roots are folders of this machine, others are not",
            roots=[place.url for place in places],
            hint="Name roots of one kind.",
        )
    return places


def _within(url: str, other: str) -> bool:
    return url.startswith(f"{other.rstrip('/')}/")


def _has(place: Storage, info: DatasetInfo) -> bool:
    """Return whether the dataset is at `place`; refuse one that holds anything else."""
    try:
        there = read_info(place)
    except MissingError:
        return False
    if there.uuid != info.uuid:
        raise ConflictError(
            "the root belongs to another dataset", root=place.url, hint="Name an empty or a new folder."
        )
    return True


def _placed(info: DatasetInfo, placement: Placement) -> DatasetInfo:
    features = tuple(sorted({*info.features, PLACEMENT}))
    return msgspec.structs.replace(info, placement=placement, features=features)


def _placement(info: DatasetInfo) -> Placement:
    assert info.placement is not None
    return info.placement

"""The data of a run: which version of which dataset.

Documents may be deleted while a run goes on. It is bound to the shards it began with. When it goes on, it reads the newest version that still begins with them, and
what has been deleted in it is masked: every sample stays at its step, so nothing else changes. Each session records what it
read, so that what it consumed can be computed again. If `data.url` names a version, that one is read: what a resume names is
honoured if it has the run's shards, and refused if not. A run stays with the version it began with if deleted documents are
left out (`loader.deletions = "compact"`), which moves every sample after them.

The price: two runs of the same settings differ if documents were deleted in between, and one that was interrupted then
differs from one that was not. That is what a delete asks for.
"""

from collections.abc import Mapping
from typing import Any

import msgspec

from datastore.dataset.snapshot import Dataset, open_dataset, split_reference
from datastore.document import Document
from datastore.errors import MissingError, ResumeError
from datastore.loader.loader import Loader
from datastore.loader.place.state import shards_fingerprint
from datastore.loader.settings import DeletionMode
from datastore.training.run.split import Stretch

__all__ = [
    "ChangeableLoader",
    "DatasetRef",
    "Versions",
    "open_at",
    "ref_of",
    "version_to_read",
]


_MOVED = "Put the dataset of the run back, or resume with its URL (data.url, data.sources.NAME.url) set to where it lies now."


class DatasetRef(Document, frozen=True, kw_only=True):
    """A dataset at one version."""

    uuid: str
    version: int
    shards: int = 0
    """How many it has; 0 if that was not noted yet."""

    fingerprint: str = ""
    """Names them."""


class Versions(Document, frozen=True, kw_only=True):
    """What a session reads."""

    training: int = 0
    """0: there are several."""

    validation: int = 0
    """0: there is no other dataset for it."""

    sources: Mapping[str, int] = msgspec.field(default_factory=dict)


class ChangeableLoader:
    """The loader of a mixture as an item of a checkpoint: the weights may be others than when it was saved."""

    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def state_dict(self) -> dict[str, Any]:
        """Return where the loader stands."""
        return self._loader.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, with the weights that the loader has here."""
        self._loader.load_state_dict(state, reweigh=True)


def ref_of(dataset: Dataset) -> DatasetRef:
    """Return what binds a run to `dataset`."""
    shards = len(dataset.segments)
    fingerprint = shards_fingerprint(dataset.segments, shards=shards)
    return DatasetRef(uuid=dataset.uuid, version=dataset.version, shards=shards, fingerprint=fingerprint)


def version_to_read(url: str, ref: DatasetRef, *, deletions: DeletionMode) -> int:
    """Return the version that `url` names; if it names none, the newest that differs from `ref` by no more than deletions.

    That one may have later shards too; if there is none, it is `ref`'s own.

    Raises:
        MissingError: there is no dataset, or no such version or tag, any more.
        ResumeError: the named version cannot be that of the run.
    """
    base, name = split_reference(url)
    if name:
        return _named(url, ref, deletions=deletions)
    newest = _there(base)
    if deletions == "compact" or not ref.shards or newest.uuid != ref.uuid:
        return ref.version
    own = _readable(base, ref.version)
    found, beyond = own or newest, newest.version
    if _begins_with(newest, ref):
        found = newest
    else:
        # The versions that begin with the run's shards follow each other: the last one before the shards were replaced.
        low = ref.version
        while beyond - low > 1:
            middle = (low + beyond) // 2
            one = _readable(base, middle)
            if one is not None and not _begins_with(one, ref):
                beyond = middle
            else:
                low, found = middle, one or found
        if not _begins_with(found, ref):
            return ref.version
    unchanged = own is not None and own.commit.deletions == found.commit.deletions
    return ref.version if unchanged else found.version


def _named(url: str, ref: DatasetRef, *, deletions: DeletionMode) -> int:
    dataset = _there(url)
    other = dataset.uuid == ref.uuid and dataset.version != ref.version
    if other and (deletions == "compact" or not ref.shards):
        raise ResumeError(
            "the run cannot change to another version of its dataset",
            url=dataset.url,
            version=dataset.version,
            deletions=deletions,
            hint=f"Use version {ref.version}, or start a new run.",
        )
    return dataset.version  # `open_at` looks whether it has the shards of the run.


def open_at(url: str, ref: DatasetRef, *, version: int) -> Dataset:
    """Return the shards of `ref` as they are in `version`.

    Raises:
        MissingError: that version is not there any more.
        ResumeError: another dataset lies at the URL, or that version has other shards.
    """
    dataset = _there(split_reference(url)[0], version=version)
    if dataset.uuid != ref.uuid:
        raise ResumeError(
            "another dataset lies at this URL",
            url=dataset.url,
            expected_uuid=ref.uuid,
            found_uuid=dataset.uuid,
            hint="Put the dataset of the run back, or set data.url to where it lies now.",
        )
    if not ref.shards or version == ref.version:
        return dataset
    if not _begins_with(dataset, ref):
        raise ResumeError(
            "the version does not have the shards of the run",
            url=dataset.url,
            version=version,
            hint=f"Use version {ref.version}, or start a new run.",
        )
    if len(dataset.segments) == ref.shards:
        return dataset
    return Stretch(dataset, start=0, stop=int(dataset.segments.tokens[: ref.shards].sum()))


def _there(url: str, *, version: int | None = None) -> Dataset:
    """Return the dataset of a run; if there is none any more, the error says what to do with that run."""
    try:
        return open_dataset(url, version=version)
    except MissingError as error:
        if "version" not in error.values and "tag" not in error.values:
            error.hint = _MOVED
        raise


def _begins_with(dataset: Dataset, ref: DatasetRef) -> bool:
    segments = dataset.segments
    if dataset.kind == "records" and len(segments) != ref.shards:
        return False  # Rows are numbered through all shards, so more of them would be another choice of rows.
    return len(segments) >= ref.shards and shards_fingerprint(segments, shards=ref.shards) == ref.fingerprint


def _readable(url: str, version: int) -> Dataset | None:
    try:
        return open_dataset(url, version=version)
    except MissingError:
        return None

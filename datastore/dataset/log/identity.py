"""A dataset's identity: `datastore.json`, written once by whoever comes first."""

import itertools
import logging
import uuid
from contextlib import suppress

import msgspec

from datastore.dataset.log.commits import utc_now
from datastore.dataset.log.manifest import INFO_KEY, READABLE_FEATURES, DatasetInfo
from datastore.document import seal, unseal
from datastore.errors import ConfigError, ConflictError, FormatError, MissingError
from datastore.storage.base import Storage
from datastore.storage.probe import probe_exclusive
from datastore.storage.resolve import Subfolder
from datastore.storage.verified import first_sound

__all__ = ["PROBE_FOLDER", "create_dataset", "read_info", "require_free"]

PROBE_FOLDER = "_probe"

_EARLY = {"shards", "docs", "parity", "tokenizers", "ingests", PROBE_FOLDER}
"""Folders of ours that may be there before the dataset is: writers fill them first, or died before they made it."""

_LOOK_AT_KEYS = 1000
"""A place with as many files of ours and no other is taken for an unfinished dataset without looking further."""

_LOGGER = logging.getLogger(__name__)


def create_dataset(storage: Storage, *, whole: bool = True, like: DatasetInfo | None = None) -> DatasetInfo:
    """Return the dataset's identity, made now if there is none. Safe to call from several processes at once.

    What is made has the uuid of `like`, and all else that does not depend on the place; without it a new one.
    `storage` must be `whole`: all places of the dataset, as `open_roots` gives them, if it has several.

    Raises:
        ConfigError: the place holds something that is not a dataset, or is only one of the places of one.
        FormatError, CorruptError: the dataset that is there cannot be written by this version, or is damaged.
        StorageError: the place cannot be written.
    """
    info = _read(storage)
    if info is None:
        info = require_free(storage)
    if info is not None:
        return _checked(storage, info) if whole else info
    exclusive = probe_exclusive(Subfolder(storage, PROBE_FOLDER))
    if not exclusive:
        _LOGGER.warning(
            "%s does not keep put-if-absent: this dataset allows one writer at a time, and cannot enforce it",
            storage.url,
        )
    if like is None:
        info = DatasetInfo(uuid=uuid.uuid4().hex, created=utc_now(), exclusive=exclusive)
    else:
        info = msgspec.structs.replace(like, digest="", exclusive=exclusive)
    # If another process is faster, its uuid is the dataset's.
    with suppress(ConflictError):
        storage.put_new(INFO_KEY, seal(info))
    return read_info(storage)


def require_free(storage: Storage) -> DatasetInfo | None:
    """Return the identity of a dataset that was made there just now, or None if one can be.

    Raises:
        ConfigError: the place holds something that is not a dataset.
    """
    foreign = _foreign_key(storage)
    # It may be the dataset that another process has made since.
    info = _read(storage) if foreign else None
    if foreign and info is None:
        raise ConfigError(
            "the place holds something that is not a dataset",
            url=storage.url,
            found=foreign,
            hint="Name an empty or a new folder.",
        )
    return info


def _checked(storage: Storage, info: DatasetInfo) -> DatasetInfo:
    """Refuse to write to one place of several."""
    if info.placement is not None and len(storage.copies(INFO_KEY)) < len(info.placement.roots):
        raise ConfigError(
            "this is one of several places of the dataset, and must not be written to alone",
            url=storage.url,
            hint="Give the URL, or the storage of the dataset that `datastore.open` returns.",
        )
    return info


def read_info(storage: Storage) -> DatasetInfo:
    """Return the identity of the dataset in `storage`.

    Raises:
        MissingError: there is nothing, or only what a writer left that died before it made the dataset.
        FormatError: there is something else; or the dataset needs a newer version of this package.
        CorruptError: `datastore.json` is damaged.
    """
    info = _read(storage)
    if info is not None:
        return info
    foreign = _foreign_key(storage)
    if foreign:
        raise FormatError(
            "not a dataset: it has no datastore.json",
            url=storage.url,
            found=foreign,
            hint="Name the URL of a dataset.",
        )
    raise MissingError(
        "no dataset there", url=storage.url, hint="Check the URL, or make one with `datastore ingest SOURCE --to URL`."
    )


def _read(storage: Storage) -> DatasetInfo | None:
    try:
        info = first_sound(
            storage, INFO_KEY, lambda place: unseal(DatasetInfo, place.get(INFO_KEY), where=INFO_KEY), is_good=bool
        )
    except MissingError:
        return None
    unknown = sorted(set(info.features) - READABLE_FEATURES)
    if unknown:
        raise FormatError(
            "the dataset uses features that this version does not know",
            url=storage.url,
            unknown=unknown,
            hint="Install a newer datastore.",
        )
    return info


def _foreign_key(storage: Storage) -> str:
    """Return a key that no writer of a new dataset can have left, or ""."""
    with suppress(ConfigError):  # A web server lists nothing.
        keys = (stat.key for stat in itertools.islice(storage.list(), _LOOK_AT_KEYS))
        return next((key for key in keys if key.split("/")[0] not in _EARLY), "")
    return ""

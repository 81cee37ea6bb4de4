"""A dataset's identity: `datastore.json` for programs, written once by whoever comes first, and a README.md for people.

No reader depends on the card for people who find the folder.
"""

import itertools
import logging
import uuid
from contextlib import suppress

import msgspec

from datastore.dataset.log.keys import CARD_KEY, INFO_KEY, JOURNALS_FOLDER, PROBE_FOLDER, READABLE_FEATURES
from datastore.dataset.log.manifest import Commit, DatasetInfo
from datastore.document import seal, unseal
from datastore.errors import ConfigError, ConflictError, FormatError, MissingError
from datastore.host import utc_now
from datastore.storage.base import Storage, probe_exclusive
from datastore.storage.verified import first_sound
from datastore.storage.wrappers import Subfolder
from datastore.units import format_bytes, format_count

__all__ = ["card_text", "create_dataset", "read_info", "require_free", "write_card"]

_EARLY = {"shards", "docs", "parity", "tokenizers", JOURNALS_FOLDER, PROBE_FOLDER}
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


def card_text(info: DatasetInfo, commit: Commit) -> str:
    """Return the card of one version."""
    totals = commit.totals
    rows = [
        ("version", f"{commit.version} ({commit.operation}, {commit.time})"),
        ("holds", commit.kind),
        ("documents", f"{totals.documents:,}"),
        *([("deleted of them", f"{totals.deleted_documents:,}")] if totals.deleted_documents else []),
        *([("tokens", f"{totals.tokens:,} ({format_count(totals.tokens)})")] if commit.kind == "tokens" else []),
        ("shards", f"{totals.shards:,}"),
        ("size", format_bytes(totals.size_bytes)),
        *(
            [("tokenizer", f"`tokenizers/{commit.tokenizer.sha256}.json`, {commit.tokenizer.vocab_size:,} ids")]
            if commit.tokenizer
            else []
        ),
        ("uuid", f"`{info.uuid}`"),
        ("written by", commit.writer),
    ]
    table = "\n".join(f"| {name} | {value} |" for name, value in rows)
    return f"""# A dataset

| | |
|---|---|
{table}

Read it in Python:

    import datastore as ds  # noqa: E402

    dataset = ds.open("URL of this folder")

or with anything that reads Arrow and Parquet: `shards/**/*.arrow` are Arrow IPC files{_columns(commit)}.
Which of them belong to a version stands in `_log/` and `_segments/`; files that no version names are unfinished work.

Written at each commit; change anything in here and the next commit undoes it.
"""


def write_card(storage: Storage, info: DatasetInfo, commit: Commit) -> None:
    """Write the card of `commit`, replacing the one before."""
    storage.put_hint(CARD_KEY, card_text(info, commit).encode())


def _columns(commit: Commit) -> str:
    if commit.kind == "records":
        return ""
    return " with one row of `tokens` per document,\n`docs/**/*.parquet` say where each document comes from"

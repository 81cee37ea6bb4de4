"""Tags: names for versions. A tag is set once, unless it is replaced on purpose."""

import re

from datastore.dataset.log.commits import CommitLog
from datastore.dataset.log.keys import TAGS_FOLDER, tag_key
from datastore.dataset.log.manifest import Commit, Tag
from datastore.document import seal, unseal
from datastore.errors import ConfigError, ConflictError, CorruptError, MissingError
from datastore.host import utc_now
from datastore.storage.base import Storage
from datastore.storage.verified import first_sound

__all__ = ["list_tags", "read_tag", "read_tagged", "remove_tag", "set_tag"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def set_tag(storage: Storage, name: str, commit: Commit, *, replace: bool = False) -> Tag:
    """Give `commit` of the dataset in `storage` the name `name`; from then on it does not expire.

    Raises:
        ConfigError: not a valid name.
        MissingError: that version has expired, maybe in the same moment.
        ConflictError: the tag names another version, and `replace` is not set.
    """
    key = tag_key(_checked(name))
    log = CommitLog(storage)
    stored = log.stored(log.readable(commit).version)
    raw = seal(Tag(name=name, version=commit.version, commit_sha256=stored.sha256, time=utc_now()))
    tag = unseal(Tag, raw, where=key)
    try:
        storage.put(key, raw) if replace else storage.put_new(key, raw)
    except ConflictError:
        present = read_tag(storage, name)
        if (present.version, present.commit_sha256) != (tag.version, tag.commit_sha256):
            raise ConflictError(
                "the tag names another version",
                tag=name,
                version=present.version,
                hint="Choose another name, or move the tag: `replace`.",
            ) from None
        return present
    try:
        log.readable(commit)
    except MissingError:
        storage.delete(key)  # An expire came between: it did not see this tag.
        raise
    return tag


def read_tag(storage: Storage, name: str) -> Tag:
    """Return a tag.

    Raises:
        ConfigError: not a valid name.
        MissingError: there is no such tag; the message has those that there are.
        CorruptError: its file is damaged.
    """
    key = tag_key(_checked(name))
    try:
        tag = first_sound(storage, key, lambda place: unseal(Tag, place.get(key), where=key), is_good=bool)
    except MissingError:
        raise MissingError(
            "no such tag", url=storage.url, tag=name, tags=list_tags(storage)[:10], hint="Name a version or a tag."
        ) from None
    if tag.name != name:
        raise CorruptError(
            "a tag lies under another's name", where=key, found=tag.name, hint="Restore this file from a copy."
        )
    return tag


def read_tagged(storage: Storage, name: str) -> Commit:
    """Return the version that a tag names.

    Raises:
        ConfigError, MissingError, CorruptError: as `read_tag` and `CommitLog.stored`; also CorruptError if that
            version is not the one that was tagged.
    """
    tag = read_tag(storage, name)
    stored = CommitLog(storage).stored(tag.version)
    if stored.sha256 != tag.commit_sha256:
        raise CorruptError(
            "the version is not the one that was tagged",
            where=tag_key(name),
            version=tag.version,
            hint="Restore the tag or the commit from a copy.",
        )
    return stored.commit


def list_tags(storage: Storage) -> list[str]:
    """Return the names of all tags, sorted; on a web server, which cannot be listed, none."""
    try:
        names = [stat.key.removeprefix(f"{TAGS_FOLDER}/") for stat in storage.list(TAGS_FOLDER)]
    except ConfigError:
        return []
    return sorted(name.removesuffix(".json") for name in names if name.endswith(".json") and "/" not in name)


def remove_tag(storage: Storage, name: str) -> None:
    """Remove a tag; one that is not there is no error."""
    storage.delete(tag_key(_checked(name)))


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name) or name.isdecimal():
        raise ConfigError(
            "not a valid tag",
            tag=name,
            hint="Use letters, digits, '.', '_' and '-', at most 128, and not digits alone.",
        )
    return name

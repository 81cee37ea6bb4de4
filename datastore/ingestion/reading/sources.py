"""A source: a folder of text, source code and JSON lines, or one such file; local, or behind any URL.

A file is called `<name of the source>/<path below it>`, wherever the source lies, and known by its fingerprint: that
name, its size and its time. So a moved folder is the same source, and a touched file is a new one: reading every
byte to find out would cost as much as the ingest. What is left out is counted by reason; nothing vanishes silently.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from stat import S_ISDIR
from typing import Literal

import msgspec

from datastore.dataset.journal import Codec, SourceFile
from datastore.dataset.log.keys import INFO_KEY
from datastore.digest import digest_hex
from datastore.document import Document
from datastore.errors import ConfigError, MissingError
from datastore.ingestion.reading.listing import Globs, SkipReason, kind_of, odd_name, walk
from datastore.ingestion.settings import IngestSettings
from datastore.interop.formats import FORMATS
from datastore.storage.base import Stat, Storage
from datastore.storage.errors import ABSENT, explain
from datastore.storage.resolve import open_storage
from datastore.storage.urls import strip_credentials

__all__ = ["Listing", "Roots", "list_sources", "read_url"]


class Listing(Document, frozen=True, kw_only=True):
    """The files of all sources, sorted by path, and how many were left out for which reason."""

    files: tuple[SourceFile, ...]
    skipped: dict[str, int]
    shown: tuple[str, ...]
    """The sources without credentials."""


class Roots(Document, frozen=True, kw_only=True):
    """Where each source lies on this machine. Never stored: it may hold credentials."""

    folders: dict[str, str]
    """Name of the source -> URL of the folder, or for a single file of the folder that it is in."""

    def locate(self, path: str) -> tuple[str, str]:
        """Return the URL of a folder and the key below it for the file called `path`."""
        name, _, below = path.partition("/")
        return self.folders[name], below or name


def list_sources(sources: Sequence[str], settings: IngestSettings) -> tuple[Listing, Roots]:
    """Return the files of `sources`, in an order that depends on their names alone.

    Raises:
        ConfigError: there is no source; two have the same name; or none has a file to read.
        MissingError: a source does not exist.
        StorageError: a folder cannot be read.
    """
    if not sources:
        raise ConfigError("there is no source", hint="Name a folder, a text file or a .jsonl file.")
    folders: dict[str, str] = {}
    files: list[SourceFile] = []
    skipped: Counter[str] = Counter()
    for source in sources:
        name, url, found = _open(source, settings, skipped)
        if name in folders:
            raise ConfigError(
                "two sources have the same name",
                name=name,
                sources=[strip_credentials(each) for each in sources],
                hint="Ingest them one after the other, or name the folder above them.",
            )
        folders[name] = url
        files.extend(found)
    shown = tuple(strip_credentials(source) for source in sources)
    if not files:
        raise ConfigError(
            "the source is empty: it has no file to read",
            sources=list(shown),
            skipped=dict(skipped),
            hint="Name a folder with text in it, and check `include` and `exclude`; links in it are not followed.",
        )
    if not settings.format:  # Another format says itself in which order its files are.
        files.sort(key=lambda file: file.path)
    listing = Listing(files=tuple(files), skipped=dict(sorted((+skipped).items())), shown=shown)
    return listing, Roots(folders=folders)


def read_url(url: str) -> bytes:
    """Return the bytes of the one file at `url`.

    Raises:
        MissingError: there is no such file.
    """
    parent, name = _parent(url)
    try:
        return open_storage(parent).get(name)
    except MissingError:
        raise MissingError("no such file", file=strip_credentials(url), hint="Name a file that exists.") from None


def _open(source: str, settings: IngestSettings, skipped: Counter[str]) -> tuple[str, str, list[SourceFile]]:
    """Return the name of a source, the URL below which its files lie, and these."""
    if settings.format:
        return _tables(source, settings)
    storage = open_storage(source)
    local = Path(storage.url) if "://" not in storage.url else None
    if _is_file(source) if local is None else _is_local_file(local):
        if source.lower().endswith(".parquet"):
            return _tables(source, msgspec.structs.replace(settings, format="parquet"))
        # Through a link a file keeps the link's name, which says what is in it; caches link to files named by digest.
        return _lone_file(source if local is None else str(local), settings)
    local = local.resolve() if local is not None else None
    name = local.name if local is not None else source.rstrip("/").rpartition("/")[2]
    name = name or "root"
    stats = walk(local, Globs(settings), skipped) if local is not None else _remote(storage, Globs(settings), skipped)
    files = []
    for stat in stats:
        kind = kind_of(stat.key)
        if kind is None:
            skipped["binary"] += 1
        elif stat.size_bytes == 0:
            skipped["empty"] += 1
        else:
            files.append(_source_file(f"{name}/{stat.key}", stat, kind, settings))
    return name, source if local is None else str(local), files


def _tables(source: str, settings: IngestSettings) -> tuple[str, str, list[SourceFile]]:
    """Return name, URL and files of a source in the format of another library."""
    if settings.format == "megatron":  # It calls a pair of files by what their names have in common.
        source = f"{source.removesuffix('.idx').removesuffix('.bin')}.bin" if not _is_folder(source) else source
    if _is_file(source):
        url, name = _parent(source)
        storage, keys, folder = open_storage(url), [name], ""
    else:
        url = str(Path(source).expanduser().resolve()) if "://" not in source else source
        storage = open_storage(url)
        keys = FORMATS[settings.format].files(storage)
        folder = url.rstrip("/").rpartition("/")[2] or "root"
    found = []
    for key in keys:
        stat = storage.stat(key)
        facts = (stat.size_bytes, stat.modified, settings.format, settings.take, settings.text_key, settings.tokens_key)
        path = f"{folder}/{key}" if folder else key
        found.append(
            SourceFile(
                path=path,
                size_bytes=stat.size_bytes,
                modified=stat.modified,
                format=settings.format or "text",
                codec="",
                lone=not folder,
                fingerprint=digest_hex(msgspec.json.encode((path, *facts))),
            )
        )
    return folder or keys[0], url, found


def _is_folder(url: str) -> bool:
    return next(iter(open_storage(url).list()), None) is not None if not _is_file(url) else False


def _lone_file(source: str, settings: IngestSettings) -> tuple[str, str, list[SourceFile]]:
    parent, name = _parent(source)
    shown = strip_credentials(source)
    kind = kind_of(name)
    if kind is None:
        raise ConfigError(
            "this kind of file cannot be read",
            file=shown,
            hint="Name a text file, .jsonl, .jsonl.gz, .jsonl.zst or .parquet, or say its `format`.",
        )
    found = open_storage(parent).stat(name)
    if found.size_bytes == 0:
        raise ConfigError("the source is empty", file=shown, hint="Name a file with text in it.")
    return name, parent, [_source_file(name, found, kind, settings, lone=True)]


def _source_file(
    path: str, stat: Stat, kind: tuple[Literal["text", "jsonl"], Codec], settings: IngestSettings, *, lone: bool = False
) -> SourceFile:
    # What a document of it is belongs to what the file is: the same lines read by another key are other documents.
    how = settings.text_key if kind[0] == "jsonl" else settings.separator
    if settings.take != "text":
        how = f"{settings.take} {settings.tokens_key}"
    facts = (path, stat.size_bytes, stat.modified, kind[0], how)
    return SourceFile(
        path=path,
        size_bytes=stat.size_bytes,
        modified=stat.modified,
        format=kind[0],
        codec=kind[1],
        lone=lone,
        fingerprint=digest_hex(msgspec.json.encode(facts)),
    )


def _remote(storage: Storage, globs: Globs, skipped: Counter[str]) -> Iterator[Stat]:
    found = list(storage.list())
    if not found:
        raise MissingError("the source does not exist or is empty", source=storage.url, hint="Check the URL.")
    datasets = {stat.key.removesuffix(INFO_KEY) for stat in found if stat.key.rpartition("/")[2] == INFO_KEY}
    skipped["dataset"] += len(datasets)
    for stat in found:
        reason = _reason_to_skip(stat.key, globs)
        if any(folder in datasets for folder in _folders(stat.key)):
            continue
        if reason is not None:
            skipped[reason] += 1
        else:
            yield stat


def _reason_to_skip(key: str, globs: Globs) -> SkipReason | None:
    if any(part.startswith(".") for part in key.split("/")):
        return "hidden"
    if not globs.takes(key) or any(globs.prunes(folder[:-1]) for folder in _folders(key) if folder):
        return "excluded"
    return "odd_name" if odd_name(key) else None


def _folders(key: str) -> list[str]:
    """Return the folders that `key` is in: "" for the root, the others with a slash at the end."""
    parts = key.split("/")
    return ["", *("/".join(parts[:end]) + "/" for end in range(1, len(parts)))]


def _is_local_file(path: Path) -> bool:
    try:
        return not S_ISDIR(path.stat().st_mode)
    except OSError as error:
        if error.errno in ABSENT:
            raise MissingError(
                "the source does not exist", source=str(path), hint="Name a folder or file that exists."
            ) from None
        raise explain(error, key=path.name, url=str(path.parent)) from None


def _is_file(url: str) -> bool:
    try:
        parent, name = _parent(url)
        open_storage(parent).stat(name)
    except (MissingError, ConfigError):
        return False
    return True


def _parent(url: str) -> tuple[str, str]:
    """Return the URL of the folder that holds the file `url`, and its name in there."""
    parent, slash, name = url.rstrip("/").rpartition("/")
    if not name or parent.endswith("/"):
        raise ConfigError("not a file", url=strip_credentials(url), hint="Name a file.")
    if not slash:
        return ".", name
    return (parent or "/"), name

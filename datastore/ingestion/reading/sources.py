"""A source: a folder of text, source code and JSON lines, or one such file; local, or behind any URL.

A file is called `<name of the source>/<path below it>`, wherever the source lies, and known by its fingerprint: that
name, its size and its time. So a moved folder is the same source, and a touched file is a new one: reading every
byte to find out would cost as much as the ingest. What is left out is counted by reason; nothing vanishes silently.
"""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from stat import S_ISDIR
from typing import NamedTuple

import msgspec

from datastore.dataset.journal import SourceFile, SourceFormat
from datastore.digest import digest_hex
from datastore.document import Document
from datastore.errors import ConfigError, MissingError
from datastore.ingestion.reading.choice import choose
from datastore.ingestion.reading.content import Kind, look
from datastore.ingestion.reading.folders import ForeignFolder, foreign_folders, is_megatron_index
from datastore.ingestion.reading.gathered import ignored_below, is_zip, listed_files, zip_members, zip_url
from datastore.ingestion.reading.listing import Globs, kind_of, named_codec, split_glob, walk, walk_remote
from datastore.ingestion.reading.rows import is_table
from datastore.ingestion.reading.stored import stored_files
from datastore.ingestion.settings import IngestSettings, Take
from datastore.interop.formats import FORMATS
from datastore.storage.base import Stat, Storage
from datastore.storage.errors import ABSENT, explain
from datastore.storage.resolve import open_storage
from datastore.storage.urls import join_url, strip_credentials
from datastore.threads import in_parallel

__all__ = ["Listing", "Roots", "list_sources", "read_url"]


_LOGGER = logging.getLogger(__name__)


class Listing(Document, frozen=True, kw_only=True):
    """The files of all sources, sorted by path, and how many were left out for which reason."""

    files: tuple[SourceFile, ...]
    skipped: dict[str, int]
    shown: tuple[str, ...]
    """The sources without credentials."""

    take: Take
    """What is taken of them; never `auto`."""

    tokens_key: str


class Roots(Document, frozen=True, kw_only=True):
    """Where each source lies on this machine. Never stored: it may hold credentials."""

    folders: dict[str, str]
    """Name of the source -> URL of the folder, or for a single file of the folder that it is in. A folder in a source that another
    library wrote, `<name>/<path below it>`, is here, too: that library's files are named in there."""

    def locate(self, path: str) -> tuple[str, str]:
        """Return the URL of a folder and the key below it for the file called `path`."""
        parts = path.split("/")
        for end in range(len(parts) - 1, 0, -1):
            url = self.folders.get("/".join(parts[:end]))
            if url is not None:
                return url, "/".join(parts[end:])
        return self.folders[path], path


def list_sources(sources: Sequence[str], settings: IngestSettings, *, encodes: bool = False) -> tuple[Listing, Roots]:
    """Return the files of `sources`, in an order that depends on their names alone.

    `encodes` says that they go to a dataset of texts, or of tokens of texts.

    Raises:
        ConfigError: there is no source; two have the same name; or none has a file to read.
        MissingError: a source does not exist.
        StorageError: a folder cannot be read.
        CorruptError: a table, or the index of another library's folder, is damaged.
    """
    if not sources:
        raise ConfigError("there is no source", hint="Name a folder, a text file or a .jsonl file.")
    folders: dict[str, str] = {}
    found: list[tuple[tuple[str, int], SourceFile]] = []
    skipped: Counter[str] = Counter()
    for source in sources:
        opened = _open(source, settings, skipped)
        if opened.name in folders:
            raise ConfigError(
                "two sources have the same name",
                name=opened.name,
                sources=[strip_credentials(each) for each in sources],
                hint="Ingest them one after the other, or name the folder above them.",
            )
        folders |= {opened.name: opened.url, **opened.foreign}
        found += opened.files
    files = [file for _, file in sorted(found, key=lambda each: each[0])]
    shown = tuple(strip_credentials(source) for source in sources)
    if not files:
        raise ConfigError(
            "the source is empty: it has no file to read",
            sources=list(shown),
            skipped=dict(skipped),
            hint="Name a folder with text in it, and check `include` and `exclude`; links in it are not followed.",
        )
    roots = Roots(folders=folders)
    choice = choose(files, roots.locate, settings, encodes=encodes)
    if choice.left_out:
        skipped["no_text_column"] += len(choice.left_out)
        _LOGGER.warning(
            "tables without a column %r are left out: %d, the first is %s. Name the column by `text_key`, or `exclude` them",
            settings.text_key,
            len(choice.left_out),
            choice.left_out[0],
        )
    settings = msgspec.structs.replace(settings, take=choice.take, tokens_key=choice.tokens_key)
    left_out = frozenset(choice.left_out)
    listing = Listing(
        files=tuple(_with_fingerprint(file, settings) for file in files if file.path not in left_out),
        skipped=dict(sorted((+skipped).items())),
        shown=shown,
        take=choice.take,
        tokens_key=choice.tokens_key,
    )
    return listing, roots


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


class _Source(NamedTuple):
    """One source, opened."""

    name: str
    url: str
    """Of the folder below which its files lie."""

    files: list[tuple[tuple[str, int], SourceFile]]
    """Each with what it is sorted by: its path, or for the files of another library their folder and place in its index."""

    foreign: Mapping[str, str] = {}
    """Of folders in it that another library wrote: as `Roots.folders` has them."""


def _open(source: str, settings: IngestSettings, skipped: Counter[str]) -> _Source:
    """Return a source; its files have no fingerprint yet."""
    if settings.format == "datastore":
        name, shards = stored_files(source)
        return _Source(name, source, [((name, number), file) for number, file in enumerate(shards)])
    if settings.format and settings.format in FORMATS:
        return _tables(source, settings.format)
    if source.startswith("@"):
        return _list(source[1:], settings, skipped)
    source, takes = split_glob(source)
    storage = open_storage(source)
    local = Path(storage.url) if "://" not in storage.url else None
    if _is_file(source) if local is None else _is_local_file(local):
        # Through a link a file keeps the link's name, which says what is in it; caches link to files named by digest.
        where = source if local is None else str(local)
        return _zip(where, settings, skipped) if is_zip(where) else _lone_file(where, settings)
    url = source if local is None else str(local.resolve())
    globs = Globs(settings)
    ignored = ignored_below(Path(url)) if settings.gitignore and local is not None else None
    stats = list(
        walk(Path(url), globs, skipped, ignored=ignored) if local is not None else walk_remote(storage, globs, skipped)
    )
    found = stats if takes is None else [stat for stat in stats if takes(stat.key)]
    return _folder(url, storage, found, settings, skipped)


def _folder(
    url: str, storage: Storage, stats: Sequence[Stat], settings: IngestSettings, skipped: Counter[str]
) -> _Source:
    name = url.rstrip("/").rpartition("/")[2] or "root"
    foreign = list(foreign_folders(url, stats)) if not settings.format else []
    found = [
        ((f"{name}/{folder.below}", number), _source_file(f"{name}/{key}", storage.stat(key), Kind(folder.format, "")))
        for folder in foreign
        for number, key in enumerate(folder.files)
    ]
    apart = list(_apart(stats, foreign, skipped))
    zips = [(stat.key, _zip(join_url(url, stat.key), settings, skipped)) for stat in apart if is_zip(stat.key)]
    apart = [stat for stat in apart if not is_zip(stat.key)]
    for stat, kind in zip(apart, _look_at(storage, apart, settings), strict=True):
        path = f"{name}/{stat.key}"
        if kind is None:
            skipped["binary"] += 1
        elif kind != _PART:
            found.append(((path, 0), _source_file(path, stat, kind)))
    below = {f"{name}/{folder.below[:-1]}": join_url(url, folder.below) for folder in foreign if folder.below}
    for key, inner in zips:
        folder = f"{name}/{key.rpartition('/')[0]}".rstrip("/")
        below |= {f"{folder}/{inner.name}": inner.url, **{f"{folder}/{each}": at for each, at in inner.foreign.items()}}
        found += [
            ((f"{folder}/{path}", number), msgspec.structs.replace(file, path=f"{folder}/{file.path}"))
            for (path, number), file in inner.files
        ]
    return _Source(name, url, found, below)


def _list(where: str, settings: IngestSettings, skipped: Counter[str]) -> _Source:
    """Return the source that is a list of files."""
    named = listed_files(read_url(where), where=strip_credentials(where))
    storage = open_storage(named.url)
    return _folder(named.url, storage, [storage.stat(key) for key in named.keys], settings, skipped)


def _zip(where: str, settings: IngestSettings, skipped: Counter[str]) -> _Source:
    """Return the source that is a zip archive."""
    url = zip_url(where)
    storage = open_storage(url)
    if next(iter(storage.list()), None) is None:
        skipped["empty"] += 1
        return _Source(url.rpartition("/")[2], url, [])
    stats = list(zip_members(url, list(walk_remote(storage, Globs(settings), skipped)), skipped))
    return _folder(url, storage, stats, settings, skipped)


def _apart(stats: Sequence[Stat], foreign: Sequence[ForeignFolder], skipped: Counter[str]) -> Iterator[Stat]:
    """Yield the files that are in none of the folders `foreign`, and not empty."""
    folders = tuple(folder.below for folder in foreign)
    owned = {key for folder in foreign for key in (*folder.files, *folder.indices)}
    for stat in stats:
        if stat.key.startswith(folders):
            skipped["beside_dataset"] += stat.key not in owned
        elif stat.size_bytes == 0:
            skipped["empty" if kind_of(stat.key) is not None else "binary"] += 1
        else:
            yield stat


_PART = Kind("megatron", "gz")
"""Stands for a file that is read with another one: the index of a pair."""


def _look_at(storage: Storage, stats: Sequence[Stat], settings: IngestSettings) -> Iterator[Kind | None]:
    """Yield how each of these files is to be read."""
    names = {stat.key for stat in stats}
    stems = {key[:-4] for key in names if key.endswith(".idx") and f"{key[:-4]}.bin" in names}
    pairs = {stem for stem in stems if not settings.format and is_megatron_index(storage, f"{stem}.idx")}

    def of(stat: Stat) -> Kind | None:
        if stat.key[:-4] in pairs and stat.key.endswith((".bin", ".idx")):
            return Kind("megatron", "") if stat.key.endswith(".bin") else _PART
        return _as_told(stat.key, settings) if settings.format else look(storage, stat.key, stat.size_bytes)

    yield from in_parallel(of, stats)


def _as_told(key: str, settings: IngestSettings) -> Kind | None:
    """Return how to read a file of a format that the user has named, or None if its name says that it is something else."""
    named = kind_of(key)
    if named is None and not (codec := named_codec(key)):
        return None
    assert settings.format in {"text", "lines", "jsonl", "json", "warc"}
    return Kind(settings.format, named[1] if named is not None else codec)


def _tables(source: str, format: SourceFormat) -> _Source:  # noqa: A002 - what it is
    """Return a source in the format of another library; its files have no fingerprint yet."""
    if format == "megatron":  # It calls a pair of files by what their names have in common.
        source = f"{source.removesuffix('.idx').removesuffix('.bin')}.bin" if not _is_folder(source) else source
    if _is_file(source):
        url, name = _parent(source)
        storage, keys, folder = open_storage(url), [name], ""
    else:
        url = str(Path(source).expanduser().resolve()) if "://" not in source else source
        storage = open_storage(url)
        keys = FORMATS[format].files(storage)
        folder = url.rstrip("/").rpartition("/")[2] or "root"
    kind = Kind(format, "")
    paths = [(f"{folder}/{key}" if folder else key, storage.stat(key)) for key in keys]
    found = [
        ((folder or path, number), _source_file(path, stat, kind, lone=not folder))
        for number, (path, stat) in enumerate(paths)
    ]
    return _Source(folder or keys[0], url, found)


def _is_folder(url: str) -> bool:
    return next(iter(open_storage(url).list()), None) is not None if not _is_file(url) else False


def _lone_file(source: str, settings: IngestSettings) -> _Source:
    parent, name = _parent(source)
    shown = strip_credentials(source)
    storage = open_storage(parent)
    found = storage.stat(name)
    if found.size_bytes == 0 and kind_of(name) is not None:
        raise ConfigError("the source is empty", file=shown, hint="Name a file with text in it.")
    is_half = not settings.format and name.endswith((".bin", ".idx")) and _is_file(f"{source[:-4]}.idx")
    if is_half and is_megatron_index(storage, f"{name[:-4]}.idx"):
        return _tables(source, "megatron")
    kind = _as_told(name, settings) if settings.format else look(storage, name, found.size_bytes)
    if kind is None:
        raise ConfigError(
            "this kind of file cannot be read",
            file=shown,
            hint="Name a file of text, JSON, Parquet, Arrow, CSV or TSV, or say its `format`.",
        )
    return _Source(name, parent, [((name, 0), _source_file(name, found, kind, lone=True))])


def _source_file(path: str, stat: Stat, kind: Kind, *, lone: bool = False) -> SourceFile:
    return SourceFile(
        path=path,
        size_bytes=stat.size_bytes,
        modified=stat.modified,
        format=kind.format,
        codec=kind.codec if kind.format not in FORMATS else "",
        lone=lone,
        fingerprint="",
    )


def _with_fingerprint(file: SourceFile, settings: IngestSettings) -> SourceFile:
    """Return `file` as it is known to the dataset: what a document of it is belongs to what the file is.

    The same lines read by another key are other documents.
    """
    if file.format == "datastore":
        return file
    state = (file.path, file.size_bytes, file.modified, file.format)
    if is_table(file):
        facts: tuple[object, ...] = (*state, settings.take, settings.template or settings.text_key, settings.tokens_key)
    elif settings.take != "text":
        facts = (*state, f"{settings.take} {settings.tokens_key}")
    else:
        facts = (*state, _reading_of(file, settings))
    return msgspec.structs.replace(file, fingerprint=digest_hex(msgspec.json.encode(facts)))


def _reading_of(file: SourceFile, settings: IngestSettings) -> object:
    if file.format == "warc":
        return settings.html_text
    return settings.separator if file.format in {"text", "lines"} else settings.template or settings.text_key


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

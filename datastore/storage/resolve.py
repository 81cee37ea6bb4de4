"""From a URL, as a user types it, to the storage it names.

A plain path and `file:///path` are a folder of this machine, `memory://name` lives in this process, and every other
scheme goes to fsspec, which is imported only then. A URL below another one always names a part of the same bytes.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote

from datastore.errors import ConfigError
from datastore.storage.backends.local import LocalStorage
from datastore.storage.backends.memory import MemoryStorage
from datastore.storage.base import Storage
from datastore.storage.urls import split_url, strip_credentials
from datastore.storage.wrappers import Subfolder

__all__ = ["open_storage", "places_below"]

_ARCHIVE = re.compile(r"(.*?\.zip)(?:/(.*))?", re.IGNORECASE)
"""The archive on this machine, and the folder in it."""


def open_storage(url: str | os.PathLike[str]) -> Storage:
    """Return the storage that `url` names; nothing is read, written or connected to yet.

    Raises:
        ConfigError: the URL is empty or malformed, or no installed package knows its scheme.
        DependencyError: the scheme is known, but its package is not installed.
    """
    text = os.fspath(url)
    if not text.strip():
        raise ConfigError("the URL is empty", hint="Name a path or a URL.")
    scheme, rest = split_url(text)
    if "::" in rest and scheme != "zip":
        raise ConfigError(
            "chained URLs are not supported",
            url=strip_credentials(text),
            hint="Name the store itself: caching is built in.",
        )
    return _OPENERS.get(scheme, _open_fsspec)(text, rest)


def _open_local(url: str, rest: str) -> Storage:
    return LocalStorage(_file_path(url, rest) if "://" in url else Path(url).expanduser())


def _open_bucket(url: str, rest: str) -> Storage:
    if strip_credentials(url) != url:
        raise ConfigError(
            "the URL holds more than a bucket and a path",
            url=strip_credentials(url),
            hint="Put keys where the library looks for them (for S3: AWS_ACCESS_KEY_ID or ~/.aws/credentials).",
        )
    return _open_s3(url, rest) or _open_fsspec(url, rest)


def _open_s3(url: str, rest: str) -> Storage | None:
    """Return our own way to S3 if that is what the URL names and it knows all that s3fs is configured for."""
    if not url.lower().startswith("s3") or rest.startswith("arn:") or not find_spec("botocore"):
        return None
    from datastore.storage.backends.fsspec_storage import configured  # noqa: PLC0415 - fsspec takes 50 ms to import
    from datastore.storage.backends.s3 import S3Storage, understands  # noqa: PLC0415 - botocore comes with an extra

    options = configured("s3")
    return S3Storage(url, options) if understands(options) else None


def _open_web(url: str, _: str) -> Storage:
    from datastore.storage.backends.web import WebStorage  # noqa: PLC0415 - only where it is needed

    return WebStorage(url)


def _open_zip(url: str, rest: str) -> Storage:
    from datastore.storage.backends.zip_archive import ZipStorage  # noqa: PLC0415 - only where it is needed

    folder, chained, where = rest.partition("::")
    if not chained:
        found = _ARCHIVE.fullmatch(rest)
        where, folder = (found[1], found[2] or "") if found else ("", "")
    outer, _, name = where.rpartition("/")
    if not name:
        raise ConfigError(
            "the URL names no archive",
            url=strip_credentials(url),
            hint="Write zip:///PATH/NAME.zip, zip:///PATH/NAME.zip/FOLDER, or zip://FOLDER::URL.",
        )
    return ZipStorage(open_storage(outer or ("/" if where.startswith("/") else ".")), name, folder=folder.strip("/"))


def _open_fsspec(url: str, _: str) -> Storage:
    from datastore.storage.backends.fsspec_storage import FsspecStorage  # noqa: PLC0415 - fsspec takes 50 ms to import

    return FsspecStorage(url)


def _file_path(url: str, rest: str) -> Path:
    host, slash, path = rest.partition("/")
    if host not in {"", "localhost"} or not slash:
        raise ConfigError("a file URL has no host", url=url, hint="Write three slashes: file:///path, or a plain path.")
    return Path(unquote(f"/{path}"))


def _open_memory(url: str, rest: str) -> Storage:
    name, _, path = rest.strip("/").partition("/")
    if not name:
        raise ConfigError("the URL names nothing", url=url, hint="Write memory://NAME.")
    storage = MemoryStorage(name)
    return Subfolder(storage, path.strip("/")) if path.strip("/") else storage


_OPENERS: dict[str, Callable[[str, str], Storage]] = {
    "": _open_local,
    "file": _open_local,
    "local": _open_local,
    "memory": _open_memory,
    "http": _open_web,
    "https": _open_web,
    "zip": _open_zip,
    # Their libraries take `key:secret@` and `?query` for a part of the name, and would write to another place.
    **dict.fromkeys(("s3", "s3a", "gs", "gcs"), _open_bucket),
}
"""Scheme -> what opens the URL, given whole and without its scheme."""


def places_below(url: str, marks: Mapping[str, Callable[[Storage], bool]], *, depth: int) -> list[tuple[str, str]]:
    """Return the places at or up to `depth` folders below `url` that have a file of `marks`, each as its URL and that, sorted.

    What a mark leads to says whether the place is one. Local folders are walked, but not hidden ones, nor into one of those
    places; elsewhere every key below `url` is listed.
    """
    storage = open_storage(url)
    if isinstance(storage, LocalStorage):
        return sorted(_walk(Path(storage.url), marks, depth))
    marked = {
        (found.key.removesuffix(name).rstrip("/"), name)
        for found in storage.list()
        if (name := found.key.split("/")[-1]) in marks and found.key.count("/") <= depth
    }
    urls = [(f"{url.rstrip('/')}/{folder}".rstrip("/"), mark) for folder, mark in sorted(marked)]
    return [(each, mark) for each, mark in urls if marks[mark](open_storage(each))]


def _walk(folder: Path, marks: Mapping[str, Callable[[Storage], bool]], depth: int) -> Iterator[tuple[str, str]]:
    mark = next(
        (mark for mark, is_one in marks.items() if (folder / mark).is_file() and is_one(LocalStorage(folder))), None
    )
    if mark is not None:
        yield str(folder), mark
    elif depth:
        try:
            found = [entry for entry in os.scandir(folder) if entry.is_dir(follow_symlinks=False)]
        except OSError:
            return
        for each in found:
            if not each.name.startswith("."):
                yield from _walk(Path(each.path), marks, depth - 1)

"""Sources that are gathered from several places: a list of files, the members of a zip archive, what git does not ignore.

A list names one file in each line, as a shell would from the folder of the caller; the files are called after the folder that
they have in common. A zip archive is a folder of the name of the archive. Nothing is unpacked to disk, so names in it lead nowhere.
"""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from datastore.errors import ConfigError, DependencyError
from datastore.storage.base import Stat
from datastore.storage.resolve import open_storage
from datastore.storage.urls import strip_credentials

__all__ = ["Ignored", "Named", "ignored_below", "is_zip", "listed_files", "zip_members", "zip_url"]


class Named(NamedTuple):
    """The files of a list."""

    url: str
    """The folder that they have in common."""

    keys: tuple[str, ...]


def listed_files(raw: bytes, *, where: str) -> Named:
    """Return the files that the list `raw` names.

    Raises:
        ConfigError: it is no text, names nothing, or files on different storages.
    """
    try:
        lines = [line.removesuffix("\r") for line in raw.decode("utf-8-sig").split("\n")]
    except UnicodeDecodeError:
        raise ConfigError("the list of files is no text", list=where, hint="Write one path or URL a line.") from None
    names = list(dict.fromkeys(line for line in lines if line.strip()))
    if not names:
        raise ConfigError("the list of files names no file", list=where, hint="Write one path or URL a line.")
    remote = ["://" in name for name in names]
    paths = names if all(remote) else [str(Path(name).expanduser().absolute()) for name in names]
    schemes = {name.partition("://")[0] if is_url else "" for name, is_url in zip(names, remote, strict=True)}
    if len(schemes) > 1:
        raise ConfigError(
            "the files of a list lie on different storages",
            list=where,
            schemes=sorted(schemes),
            hint="Write a list for each, and name both.",
        )
    parts = [os.path.normpath(path).split("/") if not all(remote) else path.split("/") for path in paths]
    shared = 0
    while all(shared + 1 < len(each) and each[shared] == parts[0][shared] for each in parts):
        shared += 1
    if all(remote) and shared < 3:
        raise ConfigError(
            "the files of a list have no bucket in common",
            list=where,
            first=strip_credentials(names[0]),
            hint="Write a list for each, and name both.",
        )
    return Named("/".join(parts[0][:shared]) or "/", tuple("/".join(each[shared:]) for each in parts))


def is_zip(key: str) -> bool:
    """Return whether the file `key` is a zip archive, as its name says; many other kinds of files are zip archives, too."""
    return key.lower().endswith(".zip")


def zip_url(url: str) -> str:
    """Return the URL of the folder that the archive at `url` is."""
    return f"zip://::{url}" if "://" in url else f"zip://{url}"


def zip_members(url: str, found: Sequence[Stat], skipped: Counter[str]) -> Iterator[Stat]:
    """Yield those of the members `found` of the archive at `url` (of `zip_url`) that may be read.

    Raises:
        FormatError: it is no archive.
    """
    storage: Any = open_storage(url)
    odd, encrypted = storage.odd_files()
    skipped["odd_name"] += len(odd)
    secret = set(encrypted)
    for stat in found:
        reason = "encrypted" if stat.key in secret else "nested_archive" if is_zip(stat.key) else ""
        if reason:
            skipped[reason] += 1
        else:
            yield stat


class Ignored:
    """What the `.gitignore` files of a folder, and of those above it, say of what is below it."""

    def __init__(self, folder: Path, above: "Ignored | None" = None) -> None:
        self._folder = folder
        self._above = above
        path = folder / ".gitignore"
        self._spec = _spec(path.read_text("utf-8", "surrogateescape")) if path.is_file() else None

    def ignores(self, path: Path, *, is_folder: bool) -> bool:
        """Return whether git would not see `path`, the folders above it not being ignored."""
        said = self._says(path, is_folder=is_folder)
        if said is None:
            return self._above is not None and self._above.ignores(path, is_folder=is_folder)
        return said

    def _says(self, path: Path, *, is_folder: bool) -> bool | None:
        if self._spec is None:
            return None
        key = path.relative_to(self._folder).as_posix()
        return self._spec.check_file(f"{key}/" if is_folder else key).include  # type: ignore[no-any-return]


def ignored_below(root: Path) -> Ignored:
    """Return what is ignored in `root`: also by the folders above it, up to the one that holds `.git`.

    Raises:
        DependencyError: pathspec is not installed.
    """
    chain = [root, *root.parents]
    top = next((number for number, folder in enumerate(chain) if (folder / ".git").exists()), 0)
    found: Ignored | None = None
    for folder in reversed(chain[: top + 1]):
        found = Ignored(folder, found)
    assert found is not None, "the chain has the root"
    return found


def _spec(text: str) -> Any:
    try:
        from pathspec import GitIgnoreSpec  # noqa: PLC0415 - optional
    except ImportError:
        raise DependencyError(
            "pathspec is not installed", hint="pip install 'llm-datastore[code]', or leave out `gitignore`."
        ) from None
    return GitIgnoreSpec.from_lines(text.splitlines())

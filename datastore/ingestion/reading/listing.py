"""The files of a local folder, and what their names say: whether to take them, and how to read them.

Names decide only what they decide surely. A file that looks like text may still turn out binary when it is read.

Links are not followed: one that leads out could pull in anything the user may read, one that stays inside would give
the same text twice, and a loop would never end. The folder itself may be named through a link.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import Literal

from datastore.dataset.log.keys import INFO_KEY
from datastore.errors import ConfigError, MissingError
from datastore.formats.decompression import Codec
from datastore.ingestion.reading.gathered import Ignored
from datastore.ingestion.settings import IngestSettings
from datastore.storage.base import Stat, Storage, check_key
from datastore.storage.errors import explain

__all__ = ["Globs", "SkipReason", "kind_of", "named_codec", "odd_name", "split_glob", "walk", "walk_remote"]

SkipReason = Literal[
    "about_records",
    "beside_dataset",
    "binary",
    "dataset",
    "empty",
    "encrypted",
    "excluded",
    "hidden",
    "http_status",
    "ignored",
    "nested_archive",
    "no_text_column",
    "not_text",
    "odd_name",
    "outside_root",
    "revisit",
    "special_file",
    "symlink",
]
"""Why a file or folder, or a record of a WARC archive, is left out.

`beside_dataset` is what lies in the folder of another library's dataset and is not of it, as its index says.
`no_text_column` is a table among texts that has none. `dataset` is a folder of ours, perhaps the target itself. `odd_name` has bytes that are no UTF-8, a backslash or a
control character. `ignored` by git; `encrypted` and `nested_archive` are members of a zip. `symlink` leads to a file below the same root, which is read under its own name; `outside_root` to
one elsewhere, which is refused.

Of an archive: `about_records` say how it was made, and what was asked; a `revisit` stands for a page that another record has;
`http_status` is an answer that is no success; `not_text` is an image, say.
"""

_CODECS: dict[str, Codec] = {".gz": "gz", ".zst": "zst", ".bz2": "bz2", ".xz": "xz"}

_LINES = {".jsonl", ".ndjson"}

_COMPRESSED_TEXT = {".txt", ".md"}

_BINARY_SUFFIXES = """
    7z a arrow avi bin bmp bz2 class db dll dylib exe feather flac gif gz h5 ico jar jpeg jpg lib mkv mo mov mp3 mp4 msgpack
    npy npz o obj ogg onnx orc otf parquet pdf pkl png pt pth pyc pyd pyo rar safetensors so sqlite tar tgz tif tiff ttf
    wasm wav webm webp whl woff woff2 xz zip zst
"""

_BINARY = frozenset(f".{suffix}" for suffix in _BINARY_SUFFIXES.split())


def kind_of(name: str) -> tuple[Literal["text", "jsonl"], Codec] | None:
    """Return the format and compression of the file called `name`, or None if it is no text.

    >>> kind_of("part-7.jsonl.zst")
    ('jsonl', 'zst')
    >>> kind_of("Makefile")
    ('text', '')
    """
    path = PurePosixPath(name.lower())
    codec = named_codec(name)
    inner = path.with_suffix("").suffix if codec else path.suffix
    if inner in _LINES:
        return "jsonl", codec
    if path.suffix in _BINARY and not (codec and inner in _COMPRESSED_TEXT):
        return None
    return "text", codec


def named_codec(name: str) -> Codec:
    """Return how the file called `name` is compressed, as its name says."""
    return _CODECS.get(PurePosixPath(name.lower()).suffix, "")


def odd_name(key: str) -> bool:
    """Return whether `key` cannot be stored as the name of a source."""
    try:
        check_key(key).encode()
    except (ConfigError, UnicodeEncodeError):
        return True
    return False


class Globs:
    """`include` and `exclude`. A glob without `/` is matched with every name on the path, one with it with the path."""

    def __init__(self, settings: IngestSettings) -> None:
        self._include = settings.include
        self._exclude = settings.exclude

    def takes(self, key: str) -> bool:
        """Return whether the file `key` is wanted, its folders being so."""
        if any(_matches(key, glob) for glob in self._exclude):
            return False
        return not self._include or any(_matches(key, glob) or _below(key, glob) for glob in self._include)

    def prunes(self, folder: str) -> bool:
        """Return whether nothing below `folder` is wanted."""
        return any(_matches(folder, glob) for glob in self._exclude)


_GLOB = re.compile(r"[*?[]")

_GLOB_PARTS = re.compile(r"\*\*/|\*\*|\*|\?|\[!?\]?[^]]*\]")

_GLOB_MEANING = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}


def split_glob(source: str) -> tuple[str, Callable[[str], bool] | None]:
    """Return the folder in `source` that is no glob, and which keys below it are meant: None stands for all.

    `*` and `?` stop at a slash, `**` does not. A folder that matches is taken whole. A name that is there as it is written,
    with its brackets, is no glob.

    >>> folder, takes = split_glob("s3://bucket/books/**/part-?.jsonl")
    >>> folder
    's3://bucket/books'
    >>> [takes(key) for key in ("en/part-1.jsonl", "part-2.jsonl", "part-10.jsonl", "en/notes.txt")]
    [True, True, False, False]
    """
    scheme, mark, path = source.rpartition("://")
    # In a URL a question mark begins the query, and web servers list nothing.
    is_glob = "*" in path and scheme not in {"http", "https"} if mark else _GLOB.search(path) is not None
    if not is_glob or (not mark and Path(source).expanduser().exists()):
        return source, None
    parts = path.split("/")
    fixed = list(takewhile(lambda part: not _GLOB.search(part), parts))
    pattern = re.compile(f"{_expression('/'.join(parts[len(fixed) :]))}(?:/.*)?", re.DOTALL)
    folder = "/".join(fixed) or ("/" if path.startswith("/") else "" if mark else ".")
    return f"{scheme}{mark}{folder}", lambda key: pattern.fullmatch(key) is not None


def _expression(glob: str) -> str:
    """Return the regular expression of `glob`."""
    found, end = [], 0
    for match in _GLOB_PARTS.finditer(glob):
        part = match.group()
        found += [re.escape(glob[end : match.start()]), _GLOB_MEANING.get(part) or part.replace("[!", "[^", 1)]
        end = match.end()
    return "".join([*found, re.escape(glob[end:])])


def _matches(key: str, glob: str) -> bool:
    return fnmatchcase(key if "/" in glob else key.rpartition("/")[2], glob)


def _below(key: str, glob: str) -> bool:
    """Return whether a folder on the way to `key` matches."""
    parts = key.split("/")
    return any(_matches("/".join(parts[:end]), glob) for end in range(1, len(parts)))


def walk(
    root: Path, globs: Globs, skipped: Counter[str], below: str = "", *, ignored: Ignored | None = None
) -> Iterator[Stat]:
    """Yield the regular files below `root` (resolved) that `globs` takes and git does not ignore; count the others.

    Raises:
        MissingError, StorageError: a folder cannot be read.
    """
    try:
        with os.scandir(root / below) as found:
            entries = sorted(found, key=lambda entry: os.fsencode(entry.name))
    except OSError as error:
        raise explain(error, key=below or ".", url=str(root)) from None
    if any(entry.name == INFO_KEY for entry in entries):
        skipped["dataset"] += 1
        return
    for entry in entries:
        key = f"{below}/{entry.name}" if below else entry.name
        is_folder = entry.is_dir(follow_symlinks=False)
        reason = _reason_to_skip(entry, key, root, globs)
        if reason is None and ignored is not None and ignored.ignores(root / key, is_folder=is_folder):
            reason = "ignored"
        if reason is not None:
            skipped[reason] += 1
        elif is_folder:
            inner = Ignored(root / key, ignored) if ignored is not None else None
            yield from walk(root, globs, skipped, key, ignored=inner)
        else:
            facts = entry.stat(follow_symlinks=False)
            yield Stat(key=key, size_bytes=facts.st_size, modified=facts.st_mtime)


def _reason_to_skip(entry: "os.DirEntry[str]", key: str, root: Path, globs: Globs) -> SkipReason | None:
    folder = entry.is_dir(follow_symlinks=False)
    if entry.name.startswith("."):
        return "hidden"
    if globs.prunes(key) if folder else not globs.takes(key):
        return "excluded"
    if odd_name(key):
        return "odd_name"
    if entry.is_symlink():
        return "symlink" if _stays_inside(root, key) else "outside_root"
    return None if folder or entry.is_file(follow_symlinks=False) else "special_file"


def _stays_inside(root: Path, key: str) -> bool:
    try:
        return (root / key).resolve().is_relative_to(root)
    except (OSError, RuntimeError):  # A loop of links leads nowhere.
        return True


def walk_remote(storage: Storage, globs: Globs, skipped: Counter[str]) -> Iterator[Stat]:
    """Yield the files of `storage` that `globs` takes; count the others in `skipped`.

    Raises:
        MissingError: there is no file.
    """
    found = list(storage.list())
    if not found:
        raise MissingError("the source does not exist or is empty", source=storage.url, hint="Check the URL.")
    datasets = {stat.key.removesuffix(INFO_KEY) for stat in found if stat.key.rpartition("/")[2] == INFO_KEY}
    skipped["dataset"] += len(datasets)
    for stat in found:
        reason = _reason_for_key(stat.key, globs)
        if any(folder in datasets for folder in _folders(stat.key)):
            continue
        if reason is not None:
            skipped[reason] += 1
        else:
            yield stat


def _reason_for_key(key: str, globs: Globs) -> SkipReason | None:
    if any(part.startswith(".") for part in key.split("/")):
        return "hidden"
    if not globs.takes(key) or any(globs.prunes(folder[:-1]) for folder in _folders(key) if folder):
        return "excluded"
    return "odd_name" if odd_name(key) else None


def _folders(key: str) -> list[str]:
    """Return the folders that `key` is in: "" for the root, the others with a slash at the end."""
    parts = key.split("/")
    return ["", *("/".join(parts[:end]) + "/" for end in range(1, len(parts)))]

"""Leftovers of a killed writer on a remote backend: hidden files that were to be moved, and uploads without an end.

No listing of keys shows either, but both cost space; S3 keeps the parts of an upload for ever unless the bucket has a
rule that says otherwise.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import Any

from datastore.storage.base import Stat

__all__ = ["Unfinished", "find_hidden", "find_uploads", "time_of"]


@dataclass(frozen=True, slots=True)
class Unfinished:
    """A write that was begun: what is known of it, and how to remove it."""

    stat: Stat
    remove: Callable[[], object]


def find_hidden(fs: Any, root: str) -> list[Unfinished]:
    """Return the hidden files below `root` of an fsspec file system; a backend that replaces in one step has none."""
    fs.invalidate_cache()
    try:
        found = fs.find(root, detail=True)
    except FileNotFoundError:
        return []
    left = []
    for path, info in sorted(found.items()):
        name = path.rpartition("/")[2]
        if info["type"] == "file" and name.startswith(".") and name.endswith(".tmp"):
            stat = Stat(key=path[len(root) + 1 :], size_bytes=info["size"] or 0, modified=time_of(info))
            left.append(Unfinished(stat, partial(_remove, fs, path)))
    return left


def find_uploads(call: Callable[..., dict[str, Any]], root: str) -> list[Unfinished]:
    """Return the uploads in parts below `root` that nobody has completed, with the bytes they hold.

    `call` sends the named request to S3 and raises FileNotFoundError for what is not there.
    """
    bucket, _, prefix = root.partition("/")
    below = {"Bucket": bucket, "Prefix": f"{prefix}/" if prefix else ""}
    left = []
    page: dict[str, Any] = {}
    while True:
        page = call("list_multipart_uploads", **below, **page)
        for upload in page.get("Uploads", []):
            one = {"Bucket": bucket, "Key": upload["Key"], "UploadId": upload["UploadId"]}
            key = upload["Key"].removeprefix(below["Prefix"])
            stat = Stat(key=key, size_bytes=_uploaded_bytes(call, one), modified=upload["Initiated"].timestamp())
            left.append(Unfinished(stat, partial(_abort, call, one)))
        if not page.get("IsTruncated"):
            return left
        page = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page["NextUploadIdMarker"]}


def time_of(info: Mapping[str, Any]) -> float:
    """Return the time of writing that fsspec gives: backends disagree on the key and on the type.

    Whole seconds: a HEAD of S3 gives no more, and where a listing does (Ceph's), both must say the same.
    """
    for name in ("mtime", "LastModified", "last_modified", "updated", "modified", "created"):
        value = info.get(name)
        if isinstance(value, datetime):
            return value.timestamp() // 1
        if isinstance(value, int | float):
            return float(value) // 1
        if isinstance(value, str) and value:
            with suppress(ValueError):
                return datetime.fromisoformat(value).timestamp() // 1
    return 0.0


def _uploaded_bytes(call: Callable[..., dict[str, Any]], upload: Mapping[str, str]) -> int:
    """Return the size of the first thousand parts, which are all that writers of ours make."""
    try:
        return sum(part["Size"] for part in call("list_parts", **upload).get("Parts", []))
    except FileNotFoundError:  # Completed or aborted since.
        return 0


def _abort(call: Callable[..., dict[str, Any]], upload: Mapping[str, str]) -> None:
    with suppress(FileNotFoundError):
        call("abort_multipart_upload", **upload)


def _remove(fs: Any, path: str) -> None:
    with suppress(FileNotFoundError):
        fs.rm_file(path)

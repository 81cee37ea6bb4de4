"""What the kernel said, as an error of ours with a way out.

An `OSError` names an errno; a user needs to know what to do, and a caller whether to try again. Both stand here once,
for the local disk as for every fsspec backend that speaks errno.
"""

import errno
import os

from datastore.errors import ConflictError, MissingError, StorageError

__all__ = ["ABSENT", "conflict", "cut_short", "explain", "missing", "too_short"]

ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR}
"""What reading or removing says when there is no file of that name (a folder is not one)."""

_REASONS: dict[int | None, tuple[str, str]] = {
    errno.ENOSPC: ("the disk is full", "Free some space or choose another target, then run the same command again."),
    errno.EDQUOT: ("the disk quota is used up", "Free some space or ask for more, then run the same command again."),
    errno.EROFS: ("the file system is read-only", "Choose a target that can be written."),
    errno.EACCES: ("permission denied", "Check owner and mode of the folder, or the rights of your credentials."),
    errno.EPERM: ("operation not permitted", "Check owner, mode and attributes of the folder."),
    errno.EFBIG: ("the file would be larger than allowed", "Raise the file size limit (`ulimit -f`)."),
    errno.EMFILE: ("too many open files", "Raise the limit (`ulimit -n`)."),
    errno.ENFILE: ("too many open files on this machine", "Close some programs, then try again."),
    errno.ENAMETOOLONG: ("the name is too long for this file system", "Choose a shorter URL or name."),
    errno.EIO: ("the disk reported an error", "Check the disk; restore what it lost from a copy."),
    errno.EISDIR: ("there is a folder of that name", "Choose another name."),
    errno.ENOTDIR: ("part of the path is a file", "Choose another name."),
}

_TRANSIENT = {
    errno.EAGAIN,
    errno.EBUSY,
    errno.ECONNABORTED,
    errno.ECONNREFUSED,
    errno.ECONNRESET,
    errno.EHOSTUNREACH,
    errno.EMFILE,
    errno.ENETUNREACH,
    errno.ENFILE,
    errno.EPIPE,
    errno.ESTALE,
    errno.ETIMEDOUT,
}


def explain(error: OSError, *, key: str, url: str, writing: bool = False) -> MissingError | StorageError:
    """Return the error of ours for `error`; when reading, what is not there (or is a folder) is missing."""
    if not writing and error.errno in ABSENT:
        return missing(key=key, url=url)
    transient = error.errno in _TRANSIENT
    otherwise = "Try again." if transient else "Check the target and its disk."
    default = (os.strerror(error.errno) if error.errno else str(error), otherwise)
    fact, hint = _REASONS.get(error.errno, default)
    return StorageError(fact, key=key, url=url, transient=transient, hint=hint)


def missing(*, key: str, url: str) -> MissingError:
    """Return the error for a key that is not there."""
    return MissingError("no such key", key=key, url=url, hint="Check the URL and the name.")


def conflict(*, key: str, url: str) -> ConflictError:
    """Return the error for a `put_new` that came second."""
    return ConflictError("key already written", key=key, url=url, hint="Read it, then decide again.")


def too_short(*, key: str, url: str, wanted_bytes: int) -> StorageError:
    """Return the error for an object that ends before the bytes asked for."""
    return StorageError(
        "the object ends too early", key=key, url=url, wanted_bytes=wanted_bytes, hint="Restore it from a copy."
    )


def cut_short(*, key: str, url: str) -> StorageError:
    """Return the error for an answer that ended before its object did."""
    return StorageError("the answer was cut short", key=key, url=url, transient=True, hint="Try again.")

"""Give a finished file its final name unless that name is taken, in one step of the kernel.

`link(2)` is the verb: it fails if the name exists, whoever made it, and shows the whole file or nothing. Where a
file system has no hard links (FAT, some FUSE), `renameat2(2)` with RENAME_NOREPLACE does the same. Where neither
exists there is no such step, and `Unsupported` says so.

Source: open(2) on O_EXCL and NFS (the link count decides), link(2), renameat2(2).
"""

import ctypes
import errno
import os
import sys
from functools import cache
from typing import Protocol, cast

__all__ = ["Unsupported", "name_if_free"]

_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}
_NO_RENAME = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM}

_AT_FDCWD = -100
_RENAME_NOREPLACE = 1


class Unsupported(Exception):  # noqa: N818 - never leaves this package: the caller falls back
    """This file system can neither link nor rename without replacing."""


def name_if_free(staged: str, final: str) -> None:
    """Make the file `staged` appear as `final`; afterwards `staged` may or may not be there.

    Raises:
        FileExistsError: `final` is taken; it is untouched.
        Unsupported: this file system has no such step.
        OSError: anything else the kernel says.
    """
    try:
        os.link(staged, final)
    except FileExistsError:
        # Over NFS the answer to a link that succeeded can be lost, and its repetition fails: two names mean it is ours.
        if os.stat(staged).st_nlink != 2:
            raise
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        _rename_if_free(staged, final)


class _Rename(Protocol):
    def __call__(self, from_fd: int, source: bytes, to_fd: int, target: bytes, flags: int, /) -> int: ...


@cache
def _renameat2() -> _Rename | None:
    """Return the C library's function, if this platform has it."""
    if not sys.platform.startswith("linux"):
        return None
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return cast("_Rename | None", function)


def _rename_if_free(staged: str, final: str) -> None:
    rename = _renameat2()
    if rename is None:
        raise Unsupported
    if rename(_AT_FDCWD, os.fsencode(staged), _AT_FDCWD, os.fsencode(final), _RENAME_NOREPLACE) == 0:
        return
    code = ctypes.get_errno()
    if code in _NO_RENAME:
        raise Unsupported
    raise OSError(code, os.strerror(code), final)

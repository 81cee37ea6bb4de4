"""Errors of a kernel or a storage library as errors of ours: with a way out, and without a secret.

An `OSError` names an errno; a user needs to know what to do, and a caller whether to try again. Both stand here once,
for the local disk as for every fsspec backend that speaks errno.

Each fsspec backend has its own tree of errors (botocore, aiohttp, gcsfs, azure ...), and most are not installed here. So
they are told apart by what they carry - an errno, an HTTP status, the name of a base class - and never imported.

After a `put_new` whose answer was lost nobody knows whether it happened; such an error is `transient`, and its caller
reads the key back. Credentials that are missing, expired or wrong are told apart, and never transient.
"""

import errno
import os
import re
from collections.abc import Iterable

from datastore.errors import ConflictError, DatastoreError, MissingError, StorageError

__all__ = [
    "ABSENT",
    "TOO_SHORT",
    "conflict",
    "cut_short",
    "error_code",
    "explain",
    "http_status",
    "is_damage",
    "is_lost",
    "is_unreachable",
    "missing",
    "scrub",
    "too_short",
    "translate",
]

_NO_CREDENTIALS = {"DefaultCredentialsError", "NoCredentialsError", "PartialCredentialsError", "ProfileNotFound"}

_REFUSED_CREDENTIALS = {
    "AuthenticationException",
    "ClientAuthenticationError",
    "CredentialRetrievalError",
    "RefreshError",
}

_EXPIRED_CREDENTIALS = {"SSOError", "SSOTokenLoadError", "TokenRetrievalError", "UnauthorizedSSOTokenError"}
"""Names of base classes of errors."""

_EXPIRED_CODES = {"ExpiredToken", "ExpiredTokenException", "RequestExpired", "TokenRefreshRequired"}

_PASSING_CODES = {
    "IncompleteBody",
    "InternalError",
    "OperationAborted",
    "RequestTimeout",
    "ServiceUnavailable",
    "SlowDown",
    "XAmzContentSHA256Mismatch",
}
"""What S3 calls them. Some come with status 400. Source: Amazon S3 API Reference, Error Responses."""

_UNREACHABLE = {
    "ClientConnectorError",
    "ConnectError",
    "ConnectTimeout",
    "ConnectTimeoutError",
    "ConnectionRefusedError",
    "EndpointConnectionError",
    "NewConnectionError",
    "NoValidConnectionsError",
    "ServiceRequestError",
    "gaierror",
}

_NETWORK = {
    ("aiohttp", "ClientError"),
    ("azure", "ServiceRequestError"),
    ("azure", "ServiceResponseError"),
    ("botocore", "ConnectionError"),
    ("botocore", "HTTPClientError"),
    ("botocore", "IncompleteReadError"),
    ("botocore", "ResponseParserError"),
    ("gcsfs", "ChecksumError"),
    ("google", "TransportError"),
    ("http", "HTTPException"),
    ("httpx", "TransportError"),
    ("paramiko", "SSHException"),
    ("requests", "RequestException"),
    ("urllib3", "HTTPError"),
}
"""(top-level module, base class) of errors that mean the network, not the request."""

_PATH_ERRORS = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)

_CERTAIN = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG}
"""After these nothing was written, and trying again does not help."""

_BUSY = {408, 409, 425, 429}

_NOISE = re.compile(r" \(reached max retries: \d+\)")

_CREDENTIAL = re.compile(
    r"([\w-]*(?:signature|sig|token|secret|password|credential|key(?:id)?)=)[^&\s'\")]+", re.IGNORECASE
)


def translate(
    error: Exception, *, key: str, url: str, writing: bool = False, creating: bool = False, secrets: Iterable[str] = ()
) -> DatastoreError:
    """Return the error of ours for `error`.

    `creating` is a `put_new`: then every failure that does not prove that nothing was written is transient, which
    tells the caller to read the key back.
    """
    if isinstance(error, DatastoreError):
        return error
    status = http_status(error)
    if creating and (isinstance(error, FileExistsError) or status == 412):
        return conflict(key=key, url=url)
    if isinstance(error, _PATH_ERRORS) or status == 404:
        return _misplaced(error, key=key, url=url, writing=writing)
    denied = _denial(error, status)
    if denied is not None:
        return StorageError(denied[0], key=key, url=url, hint=denied[1])
    if isinstance(error, OSError) and error.errno in _CERTAIN:
        return explain(error, key=key, url=url, writing=writing)
    refused = status is not None and 400 <= status < 500
    transient = _is_passing(error, status) or (creating and not refused)
    hint = "Try again." if transient else "Check the URL, the endpoint and the rights there."
    return StorageError(_reason(error, secrets), key=key, url=url, transient=transient, hint=hint)


def http_status(error: BaseException) -> int | None:
    """Return the HTTP status that `error`, or what caused it, carries."""
    for candidate in (error, error.__cause__):
        response = getattr(candidate, "response", None)
        found = (
            response.get("ResponseMetadata", {}).get("HTTPStatusCode")
            if isinstance(response, dict)
            else getattr(response, "status_code", None)
        )
        for value in (found, *(getattr(candidate, name, None) for name in ("status", "status_code", "code"))):
            if isinstance(value, int | str) and str(value).isdigit() and 100 <= int(value) < 600:
                return int(value)
    return None


def error_code(error: BaseException) -> str:
    """Return the name that S3 gave to the error that `error`, or what caused it, carries; or ""."""
    for candidate in (error, error.__cause__):
        response = getattr(candidate, "response", None)
        if isinstance(response, dict):
            return str(response.get("Error", {}).get("Code", ""))
    return ""


def is_unreachable(error: BaseException) -> bool:
    """Return whether nothing can have answered: no such host, or nobody who listens there."""
    return bool(_UNREACHABLE & {name for found in (error, error.__cause__) if found for name in _names(found)})


def is_lost(error: BaseException) -> bool:
    """Return whether a connection that lasts is of no more use after this: it was closed, or is out of step."""
    return (
        isinstance(error, EOFError | ConnectionError)
        or "SSHException" in _names(error)
        or str(error) in {"Socket is closed", "size of packet exceeds limit"}
    )


def is_damage(error: StorageError) -> bool:
    """Return whether reading failed because the bytes are not there any more: a bad sector, an end too early.

    Not so if asking again may help, or somebody else, or asking elsewhere: then the bytes may well be sound.
    """
    return not error.transient and error.fact in _DAMAGE


def scrub(text: str, secrets: Iterable[str] = ()) -> str:
    """Return `text` on one line, without the secrets and without anything that looks like a signed query."""
    for secret in secrets:
        text = text.replace(secret, "***")
    return " ".join(_CREDENTIAL.sub(r"\1***", text).split()).rstrip(".")


def _misplaced(error: Exception, *, key: str, url: str, writing: bool) -> DatastoreError:
    if not writing:
        return missing(key=key, url=url)
    if "NoSuchUpload" in f"{error}{error.__cause__}":  # Completed twice: the first answer was lost.
        return StorageError(
            "the upload is gone", key=key, url=url, transient=True, hint="Read the key back, or try again."
        )
    if not isinstance(error, FileNotFoundError) and isinstance(error, _PATH_ERRORS):
        return StorageError("a file and a folder would share a name", key=key, url=url, hint="Choose another name.")
    return MissingError("nothing can be written there", key=key, url=url, hint="Make the bucket or folder first.")


def _denial(error: Exception, status: int | None) -> tuple[str, str] | None:
    """Return fact and hint if `error` is about who asks, or what he may do; trying again cannot help."""
    names, code = _names(error), error_code(error)
    if code in _EXPIRED_CODES or names & _EXPIRED_CREDENTIALS:
        return "the credentials have expired", "Renew them, then run the same command again."
    if code == "RequestTimeTooSkewed":
        return "access denied: the clock is wrong", "Set the clock of this machine; a signature is valid for minutes."
    if names & _NO_CREDENTIALS:
        return "no credentials were found", "Check the credentials: put them where the library for this URL looks."
    # gcsfs reports 403 as a bare OSError with this word; s3fs and adlfs raise PermissionError.
    forbidden = isinstance(error, PermissionError) or (
        isinstance(error, OSError) and str(error).startswith("Forbidden")
    )
    if forbidden or status in {401, 403} or names & _REFUSED_CREDENTIALS:
        return "access denied", "Check the credentials, and what they are allowed to do there."
    return None


def _is_passing(error: Exception, status: int | None) -> bool:
    if status is not None and (status in _BUSY or status >= 500):
        return True
    if error_code(error) in _PASSING_CODES:
        return True
    if isinstance(error, TimeoutError | ConnectionError) or is_unreachable(error) or is_lost(error):
        return True
    if isinstance(error, OSError) and error.errno is not None:
        # EREMOTEIO is what s3fs makes of an InternalError, EBUSY of SlowDown.
        return error.errno == errno.EREMOTEIO or bool(explain(error, key="", url="", writing=True).values["transient"])
    return any((kind.__module__.partition(".")[0], kind.__name__) in _NETWORK for kind in type(error).__mro__)


def _names(error: BaseException) -> set[str]:
    return {kind.__name__ for kind in type(error).__mro__}


def _reason(error: Exception, secrets: Iterable[str]) -> str:
    return f"the backend failed: {type(error).__name__}: {scrub(_NOISE.sub('', str(error)), secrets)}".removesuffix(
        ": "
    )


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

TOO_SHORT = "the object ends too early"
"""The fact of an error about bytes past the end."""

_DAMAGE = {
    _REASONS[errno.EIO][0],
    TOO_SHORT,
    *(os.strerror(code) for code in (errno.EBADMSG, errno.EUCLEAN, errno.ENODATA, errno.ENXIO)),
}
"""Facts of `explain` and `too_short`: checksums of the file system that differ are EBADMSG or EUCLEAN, media errors ENODATA."""

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
    return StorageError(TOO_SHORT, key=key, url=url, wanted_bytes=wanted_bytes, hint="Restore it from a copy.")


def cut_short(*, key: str, url: str) -> StorageError:
    """Return the error for an answer that ended before its object did."""
    return StorageError("the answer was cut short", key=key, url=url, transient=True, hint="Try again.")

"""URLs as text: join them, take them apart, and show them without their secrets."""

import os
import re
from collections.abc import Iterator, Mapping

__all__ = ["join_url", "secrets_of", "split_url", "strip_credentials"]

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
_NAMED_LOGIN = {"abfs", "abfss", "arrow_hdfs", "ftp", "hdfs", "oci", "sftp", "smb", "ssh", "webhdfs"}
"""Schemes whose URL needs the name before `@` (a user, a container); in all others whatever stands there is a secret."""

_SECRET_WORDS = ("auth", "key", "secret", "token", "password", "credential", "sas", "connection_string")


def join_url(url: str | os.PathLike[str], *parts: str) -> str:
    """Return the URL of `parts` below `url`.

    >>> join_url("s3://bucket/books/", "shards", "ab")
    's3://bucket/books/shards/ab'
    """
    base = os.fspath(url)
    trimmed = base.rstrip("/")
    if trimmed.endswith(":"):  # "s3://" or "file:///": the slashes are all there is.
        trimmed = base.removesuffix("/")
    return "/".join((trimmed, *(part.strip("/") for part in parts if part.strip("/")))) if any(parts) else base


def strip_credentials(url: str) -> str:
    """Return `url` without passwords, tokens and signatures, fit for messages and stored documents.

    >>> strip_credentials("https://me:secret@host/data?sig=abc")
    'https://host/data'
    """
    if "://" in url and "::" in url:
        return "::".join(strip_credentials(part) for part in url.split("::"))
    scheme, rest = split_url(url)
    if scheme in {"", "file", "local", "memory"}:
        return url
    host, slash, path = rest.partition("/")
    login, at, host = host.rpartition("@")
    user = login.partition(":")[0]
    shown = f"{user}@{host}" if at and user and scheme in _NAMED_LOGIN else host
    return re.split(r"[?#]", f"{url[: len(scheme)]}://{shown}{slash}{path}", maxsplit=1)[0]


def split_url(url: str) -> tuple[str, str]:
    """Return the scheme in lower case ("" for a plain path) and what follows `://`."""
    found = _SCHEME.match(url)
    return (found[1].lower(), url[found.end() :]) if found else ("", url)


def secrets_of(url: str, options: Mapping[str, object]) -> Iterator[str]:
    """Yield what must not show in a message, longest first."""
    login = url.partition("://")[2].partition("/")[0].rpartition("@")[0]
    found = {login, login.partition(":")[2], url.partition("?")[2], *_secret_options(options)}
    yield from sorted((text for text in found if len(text) > 3), key=len, reverse=True)


def _secret_options(options: Mapping[str, object]) -> Iterator[str]:
    for name, value in options.items():
        if isinstance(value, Mapping):
            yield from _secret_options(value)
        elif any(word in name.lower() for word in _SECRET_WORDS):
            yield from map(str, value) if isinstance(value, list | tuple) else (str(value),)

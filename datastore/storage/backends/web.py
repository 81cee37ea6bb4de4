"""Storage on any web server, to be read: a dataset that lies in a folder of one opens from its URL.

Nothing is asked of the server but files. If it knows ranges, blocks are read as they are needed; if not, every read starts at
byte 0, which works and is slow. There is no listing of the web, and no writing.

It is the standard library's `http.client` and no event loop: connections are kept, and bytes go from the socket into the
caller's buffer. Redirects are followed, and the proxy that the environment names is used.
"""

import base64
import os
import ssl
import weakref
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from email.utils import parsedate_to_datetime
from functools import cache
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from typing_extensions import override

from datastore.errors import ConfigError
from datastore.storage.base import ReadOnly, Stat, check_key
from datastore.storage.errors import cut_short, missing, too_short
from datastore.storage.ranges import fill_from
from datastore.storage.retry import Reading, RequestStorage, RetryPolicy
from datastore.storage.urls import secrets_of, strip_credentials

__all__ = ["WebStorage"]

_TIMEOUT_S = 30.0
_REDIRECTS = 5
_SKIPPED_BYTES = 2**20

Site = tuple[str, str]
"""Scheme and authority."""


class WebError(Exception):
    """The server answered with another status than a file comes with."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"HTTP {status} {reason}")
        self.status = status


class WebStorage(RequestStorage, ReadOnly):
    """The files below `http://host/path` or `https://host/path`; a query is sent with each request. Thread-safe, also after a fork."""

    def __init__(self, url: str, *, policy: RetryPolicy | None = None) -> None:
        parts = urlsplit(url)
        if not parts.hostname:
            raise ConfigError("the URL names no host", url=strip_credentials(url), hint="Write https://HOST/PATH.")
        self._parts = parts._replace(path=parts.path.rstrip("/"), fragment="")
        self._login = _basic(parts)
        super().__init__(url, policy=policy, secrets=secrets_of(url, {"password": self._login}))
        self._process = os.getpid()
        self._idle: defaultdict[Site, deque[HTTPConnection]] = defaultdict(deque)
        weakref.finalize(self, _close, self._idle)

    @override
    def get(self, key: str) -> bytes:
        return self._requests.run("get", check_key(key), lambda: self._get(key), sized=len)

    @override
    def list(self, folder: str = "") -> Iterator[Stat]:
        raise ConfigError(
            "a web server cannot be listed", url=self._url, hint="Name the dataset's own URL; or copy it to a disk."
        )

    @override
    def stat(self, key: str) -> Stat:
        return self._requests.run("stat", check_key(key), lambda: self._stat(key))

    def _get(self, key: str) -> bytes:
        answer, connection, site = self._ask("GET", key, {})
        with self._kept(connection, answer, site):
            return answer.read()

    def _stat(self, key: str) -> Stat:
        answer, connection, site = self._ask("HEAD", key, {})
        with self._kept(connection, answer, site):
            answer.read()
        modified = 0.0
        with suppress(TypeError, ValueError):
            modified = parsedate_to_datetime(answer.headers["Last-Modified"]).timestamp()
        return Stat(key=key, size_bytes=int(answer.headers.get("Content-Length", 0)), modified=modified)

    @override
    def _read(self, operation: Reading, key: str, start: int, view: memoryview) -> None:
        self._requests.run(operation, check_key(key), lambda: self._fill(key, start, view), sized=len(view))

    def _fill(self, key: str, start: int, view: memoryview) -> None:
        stop = start + len(view)
        try:
            answer, connection, site = self._ask("GET", key, {"Range": f"bytes={start}-{stop - 1}"})
        except WebError as error:
            if error.status == 416:
                raise too_short(key=key, url=self._url, wanted_bytes=stop) from None
            raise
        whole = answer.status != 206  # It does not know ranges: skip what comes before.
        total = answer.length if whole else _total_bytes(answer)
        with self._kept(connection, answer, site):
            if total is not None and total < stop:
                raise too_short(key=key, url=self._url, wanted_bytes=stop)
            if not (_skip(answer, start if whole else 0) and fill_from(answer, view)):
                raise cut_short(key=key, url=self._url)

    @contextmanager
    def _kept(self, connection: HTTPConnection, answer: HTTPResponse, site: Site) -> Iterator[None]:
        """Keep the connection if the block has read all that comes over it, else close it."""
        try:
            yield
        finally:
            if answer.isclosed() and connection.sock is not None:
                self._idle[site].append(connection)
            else:
                answer.close()
                connection.close()

    def _ask(self, method: str, key: str, headers: dict[str, str]) -> tuple[HTTPResponse, HTTPConnection, Site]:
        """Return the answer for a file that is there, not read yet, with the connection that it comes over."""
        target = self._parts._replace(path=f"{self._parts.path}/{quote(key)}")
        for _ in range(_REDIRECTS):
            site = target.scheme, target.netloc.rpartition("@")[2]
            login = {"Authorization": self._login} if self._login and site[1] == self._host else {}
            answer, connection = self._send(method, target, site, headers | login)
            if answer.status in {200, 206}:
                return answer, connection, site
            answer.close()
            connection.close()
            moved = answer.headers.get("Location") if 300 <= answer.status < 400 else None
            if answer.status in {404, 410}:
                raise missing(key=key, url=self._url)
            if moved is None:
                raise WebError(answer.status, answer.reason)
            before, target = target, urlsplit(urljoin(target.geturl(), moved))
            if target.path == f"{before.path}/":  # That is how a folder is answered.
                raise missing(key=key, url=self._url)
        raise WebError(answer.status, "too many redirects")

    @property
    def _host(self) -> str:
        return self._parts.netloc.rpartition("@")[2]

    def _send(
        self, method: str, target: SplitResult, site: Site, headers: dict[str, str]
    ) -> tuple[HTTPResponse, HTTPConnection]:
        """Send one request, on a connection that is kept if there is one; a kept one may have been closed meanwhile."""
        if self._process != os.getpid():
            self._process = os.getpid()
            _close(self._idle)
        path = target._replace(scheme="", netloc="").geturl() or "/"
        headers = {"Accept-Encoding": "identity", "User-Agent": "datastore", **headers}
        while True:
            try:
                connection, kept = self._idle[site].pop(), True
            except IndexError:
                connection, kept = _connect(site), False
            try:
                connection.request(method, _by_proxy(site, path), headers=headers)
                return connection.getresponse(), connection
            except (HTTPException, OSError):
                connection.close()
                if not kept:
                    raise


def _close(idle: defaultdict[Site, deque[HTTPConnection]]) -> None:
    for connections in idle.values():
        while connections:
            connections.pop().close()


def _connect(site: Site) -> HTTPConnection:
    scheme, authority = site
    proxy = _proxy(site)
    host = proxy.netloc.rpartition("@")[2] if proxy else authority
    if scheme == "http":
        return HTTPConnection(host, timeout=_TIMEOUT_S)
    connection = HTTPSConnection(host, timeout=_TIMEOUT_S, context=_tls())
    if proxy:
        login = _basic(proxy)
        connection.set_tunnel(authority, headers={"Proxy-Authorization": login} if login else {})
    return connection


def _by_proxy(site: Site, path: str) -> str:
    return f"http://{site[1]}{path}" if site[0] == "http" and _proxy(site) else path


def _proxy(site: Site) -> SplitResult | None:
    """Return the proxy that the environment names for this site."""
    scheme, authority = site
    found = getproxies().get(scheme)
    return urlsplit(found) if found and not proxy_bypass(authority) else None


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def _basic(parts: SplitResult) -> str:
    """Return the header that proves who asks, "" if the URL does not say it."""
    if not parts.username:
        return ""
    login = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return f"Basic {base64.b64encode(login.encode()).decode()}"


def _total_bytes(answer: HTTPResponse) -> int | None:
    total = answer.headers.get("Content-Range", "").rpartition("/")[2]
    return int(total) if total.isdecimal() else None


def _skip(answer: HTTPResponse, count: int) -> bool:
    """Read and drop `count` bytes; return whether there were as many."""
    buffer = memoryview(bytearray(min(count, _SKIPPED_BYTES)))
    while count:
        read = answer.readinto(buffer[:count])
        if not read:
            return False
        count -= read
    return True

"""One of fsspec's file systems, kept usable: connected when it is needed, after a fork and after a loss, and in turns.

Some libraries connect once and for all (paramiko's SSH), others for each request; some can be used by many threads at
once, others hand one thread's answer to another and then wait for ever. A table says which (`backends`).
"""

import os
import weakref
from collections.abc import Callable, Mapping
from contextlib import suppress
from threading import RLock
from typing import Any, TypeVar

import fsspec

from datastore.errors import ConfigError, DependencyError
from datastore.storage.backends.schemes import backend_of
from datastore.storage.foreign import is_lost
from datastore.storage.urls import strip_credentials

__all__ = ["Connection", "configured"]

T = TypeVar("T")


class Connection:
    """The file system of a URL. Thread-safe, also after a fork.

    Raises:
        ConfigError: the URL names nothing, or is of a kind that fsspec does not know.
        DependencyError: it knows the kind, but not without another package.
    """

    def __init__(self, url: str, options: Mapping[str, Any]) -> None:
        self.scheme = url.partition("://")[0].lower()
        self._raw_url, self._options = url, dict(options)
        self._backend = backend_of(self.scheme)
        self._process = -1
        self._turn = RLock()
        self._filesystem: Any = None
        self.root = self._find_root().rstrip("/")
        if not self.root and self._backend.replaces:
            raise ConfigError("the URL names nothing", url=strip_credentials(url), hint=f"Write {self.scheme}://NAME.")

    @property
    def fs(self) -> Any:
        """The file system; raises what its library raises when it cannot connect."""
        if self._process != os.getpid():
            own = {} if self._backend.threads else {"skip_instance_cache": True}
            self._filesystem = fsspec.core.url_to_fs(self._raw_url, **self._options, **own)[0]
            if own:
                weakref.finalize(self, _hang_up, self._filesystem)
            if hasattr(self._filesystem, "retries"):  # s3fs: one layer that repeats requests is enough.
                self._filesystem.retries = 1
            self._process = os.getpid()
        return self._filesystem

    def in_turn(self, call: Callable[[], T]) -> T:
        """Return what `call` returns, while no other thread uses the connection if it cannot be shared."""
        if self._backend.threads:
            return call()
        if self._process not in {-1, os.getpid()}:  # A thread that this process has not may have had the turn.
            self._turn, self._process = RLock(), -1
        with self._turn:
            try:
                return call()
            except Exception as error:
                if is_lost(error):  # The next try begins with a new one.
                    self._process = -1
                    _hang_up(self._filesystem)
                raise

    def _find_root(self) -> str:
        try:
            kind = fsspec.get_filesystem_class(self.scheme)
        except ImportError:
            raise DependencyError(
                "a package for this kind of URL is missing",
                url=strip_credentials(self._raw_url),
                hint=f"Run: pip install '{self._backend.requires or self.scheme}'.",
            ) from None
        except ValueError:
            raise ConfigError(
                "unknown kind of URL",
                url=strip_credentials(self._raw_url),
                scheme=self.scheme,
                hint="Use a path, s3://, gs:// or the like.",
            ) from None
        return str(kind._strip_protocol(self._raw_url))  # noqa: SLF001 - as `url_to_fs` does


def _hang_up(fs: Any) -> None:
    """Close a connection that lasts; its thread would keep it for as long as the process lives."""
    close = getattr(getattr(fs, "client", None), "close", None)
    if close is not None:
        with suppress(Exception):
            close()


def configured(scheme: str) -> dict[str, Any]:
    """Return the options that fsspec's own configuration (its files and variables) holds for a scheme."""
    return dict(fsspec.config.conf.get(scheme, {}))

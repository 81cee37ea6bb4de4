"""A folder behind a web server on loopback, over a link that is as slow as one likes: for tests of whatever reads from far away.

The link has a rate, which all connections share (a bucket that fills evenly), and a delay: each request waits that long for its
first byte, the first one of a connection twice as long. Every request is noted. The server can be told to hang.
"""

import http.server
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from typing_extensions import override

__all__ = ["Link", "Request", "Served", "round_trips", "serve_folder"]

_PIECE_BYTES = 2**16


@dataclass(frozen=True, slots=True)
class Link:
    """How slow it is; by default not at all."""

    bits_per_s: float = 0.0
    """0: as fast as it goes."""

    delay_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Request:
    """A request that was answered."""

    path: str
    start: int
    stop: int
    began: float
    ended: float


class Served:
    """A folder that is served, and what was asked for."""

    def __init__(self, folder: Path, link: Link) -> None:
        self.folder = folder
        self.link = link
        self.url = ""
        self.requests: list[Request] = []
        self.answers = threading.Event()
        """While it is not set, the server takes requests and does not answer."""
        self.answers.set()
        self._lock = threading.Lock()
        self._free_at = 0.0

    def pass_on(self, size_bytes: int) -> None:
        """Wait until so many bytes have gone over the link."""
        if not self.link.bits_per_s:
            return
        with self._lock:
            now = time.monotonic()
            self._free_at = max(self._free_at, now) + 8 * size_bytes / self.link.bits_per_s
            left_s = self._free_at - now
        wait(left_s)


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def __init__(self, served: Served, *arguments: Any) -> None:
        self._served = served
        self._greeted = False
        super().__init__(*arguments)

    @override
    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        """Answer with a file, or a range of it."""
        served, began = self._served, time.monotonic()
        wait(served.link.delay_s * (1 if self._greeted else 2))
        self._greeted = True
        served.answers.wait()
        path = served.folder / self.path.lstrip("/")
        if not path.is_file():
            self.send_error(404)
            return
        size = path.stat().st_size
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        start, stop = (int(wanted[1]), min(size, int(wanted[2]) + 1)) if wanted else (0, size)
        if wanted and start >= size:
            self.send_error(416)
            return
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{size}")
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        with path.open("rb") as file:
            file.seek(start)
            for at in range(start, stop, _PIECE_BYTES):
                piece = file.read(min(_PIECE_BYTES, stop - at))
                served.pass_on(len(piece))
                self.wfile.write(piece)
        served.requests.append(Request(self.path.lstrip("/"), start, stop, began, time.monotonic()))


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    @override
    def handle_error(self, request: Any, client_address: Any) -> None:
        pass


@contextmanager
def serve_folder(folder: Path, *, link: Link = Link()) -> Iterator[Served]:
    """Serve the files below `folder` until the end of the block."""
    served = Served(folder, link)
    with _Server(("127.0.0.1", 0), partial(_Handler, served)) as server:
        served.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield served
        finally:
            served.answers.set()
            server.shutdown()
            thread.join()


def round_trips(requests: list[Request]) -> int:
    """Return how many of `requests`, at most, came one after another: each began when the one before had ended."""
    ended, count = float("-inf"), 0
    for request in sorted(requests, key=lambda request: request.ended):
        if request.began >= ended:
            ended, count = request.ended, count + 1
    return count


def wait(seconds: float) -> None:
    """Do nothing for a while."""
    if seconds > 0:
        threading.Event().wait(seconds)

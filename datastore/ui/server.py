"""The process of `datastore ui`: a port of this machine, a token, and uvicorn."""

import secrets
import socket
from collections.abc import Callable, Sequence

from datastore.errors import ConfigError, DependencyError
from datastore.ui.places import Places

__all__ = ["serve"]


def serve(urls: Sequence[str], *, host: str = "127.0.0.1", port: int = 0, ready: Callable[[str], None]) -> None:
    """Serve the datasets and runs at `urls` until the process is interrupted; `ready` is told the address once it is open.

    Args:
        urls: Datasets, runs, and folders of both.
        host: The address to listen at. Anybody who can reach it and has the token may look.
        port: The port; 0: one that is free.
        ready: Gets the address to open, with its token.

    Raises:
        DependencyError: starlette, uvicorn or jinja2 is not installed.
        ConfigError: the port is taken, or the host is none of this machine; or there is nothing to show.
    """
    try:
        import jinja2  # noqa: F401, PLC0415 - comes with an extra
        import uvicorn  # noqa: PLC0415

        from datastore.ui.app import make_app  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise DependencyError(
            "the page in the browser needs a library",
            missing=error.name,
            hint="Install it: pip install 'llm-datastore[ui]'.",
        ) from None
    places = Places(urls)
    places.look()
    if places.troubles and not (places.datasets or places.runs):
        raise ConfigError(
            "there is nothing to show", reasons=places.troubles, hint="Name a dataset, a run, or a folder of them."
        )
    places.prepare()
    with _listening(host, port) as listener:
        number = listener.getsockname()[1]
        token = secrets.token_urlsafe(24)
        names = (
            {host, "127.0.0.1", "localhost", socket.gethostname()}
            if host not in {"127.0.0.1", "localhost"}
            else {"127.0.0.1", "localhost"}
        )
        app = make_app(places, token=token, hosts=frozenset(f"{name.lower()}:{number}" for name in names))
        shown = "127.0.0.1" if host in {"0.0.0.0", "::"} else host  # noqa: S104 - what the user asked for
        ready(f"http://{shown}:{number}/?token={token}")
        config = uvicorn.Config(app, log_level="error", access_log=False, lifespan="off", timeout_graceful_shutdown=1)
        uvicorn.Server(config).run(sockets=[listener])


def _listening(host: str, port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"the page cannot be served there: {error.strerror}",
            host=host,
            port=port,
            hint="Name another `port`, or a host of this machine.",
        ) from None
    return listener

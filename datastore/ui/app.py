"""Which page answers which address, and who may ask.

Read-only: every address is a GET, and nothing is written. Only who has the token is answered: it is in the first address, and in a
cookie from then on. A request must name this host, so that no page elsewhere can have a browser ask by another name; pages load
nothing from elsewhere, and may not be framed.
"""

import hmac
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import orjson
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.templating import Jinja2Templates
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from datastore.errors import ConfigError, DatastoreError, MissingError
from datastore.ui import dataset_pages, run_pages
from datastore.ui.places import Places
from datastore.units import format_bytes, format_count

__all__ = ["make_app"]

_HERE = Path(__file__).parent
_COOKIE = "datastore"

_HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; media-src 'self'; "
        "connect-src 'self'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
    ),
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "cache-control": "no-store",
}

Page = Callable[[Places, Mapping[str, Any], Mapping[str, str]], tuple[str, dict[str, Any]]]
"""From what there is, the parts of the address, and what stands behind its `?`, to a template and what it shows."""

Data = Callable[[Places, Mapping[str, Any], Mapping[str, str]], Any]
"""The same, to JSON or an answer of its own."""


def make_app(places: Places, *, token: str, hosts: frozenset[str]) -> Starlette:
    """Return the application; `hosts` are the names, with the port, under which it may be asked."""
    templates = _templates()

    def page(request: Request, make: Page) -> Response:
        status = 200
        try:
            name, shown = make(places, request.path_params, request.query_params)
        except DatastoreError as error:
            status = _status(error)
            name, shown = "error.html", {"error": error}
        return templates.TemplateResponse(request, name, shown | {"places": places}, status_code=status)

    def data(request: Request, make: Data) -> Response:
        try:
            found = make(places, request.path_params, request.query_params)
        except DatastoreError as error:
            return Response(orjson.dumps(error.as_dict(), default=str), _status(error), media_type="application/json")
        return found if isinstance(found, Response) else Response(orjson.dumps(found), media_type="application/json")

    routes = [
        *(_route(path, page, make) for path, make in _PAGES.items()),
        *(_route(path, data, make) for path, make in _DATA.items()),
        Mount("/static", StaticFiles(directory=_HERE / "static")),
    ]
    return Starlette(routes=routes, middleware=[Middleware(_Guard, token=token, hosts=hosts)])


def _route(path: str, respond: Callable[[Request, Any], Response], make: Any) -> Route:
    async def answer(request: Request) -> Response:
        return await run_in_threadpool(respond, request, make)  # It waits for disks, and others need not wait for it.

    return Route(path, answer, methods=["GET"])


def _templates() -> Jinja2Templates:
    templates = Jinja2Templates(directory=_HERE / "templates")
    templates.env.filters |= {
        "bytes": format_bytes,
        "count": format_count,
        "number": _number,
        "moment": lambda text: str(text)[:19].replace("T", " "),
    }
    templates.env.trim_blocks = templates.env.lstrip_blocks = True
    return templates


def _status(error: DatastoreError) -> int:
    return 404 if isinstance(error, MissingError) else 400 if isinstance(error, ConfigError) else 500


def _media(places: Places, path: Mapping[str, Any], query: Mapping[str, str]) -> Response:
    raw, kind = dataset_pages.media(places, path, query)
    return Response(raw, media_type=kind, headers={"content-security-policy": "default-src 'none'; sandbox"})


_PAGES: Mapping[str, Page] = {
    "/": run_pages.home,
    "/runs": run_pages.overview,
    "/runs/compare": run_pages.compare,
    "/runs/{run:int}": run_pages.one,
    "/runs/{run:int}/steps/{step:int}": run_pages.step,
    "/runs/{run:int}/checkpoints/{step:int}": run_pages.checkpoint,
    "/datasets/{dataset:int}": dataset_pages.one,
    "/datasets/{dataset:int}/versions/{version:int}": dataset_pages.change,
    "/datasets/{dataset:int}/documents": dataset_pages.documents,
    "/datasets/{dataset:int}/documents/{shard:int}/{row:int}": dataset_pages.document,
    "/datasets/{dataset:int}/shards": dataset_pages.shards,
    "/datasets/{dataset:int}/plan": dataset_pages.plan,
}

_DATA: Mapping[str, Data] = {
    "/data/lines": run_pages.line_data,
    "/datasets/{dataset:int}/media/{shard:int}/{row:int}/{column:path}": _media,
}


def _number(value: float | None) -> str:
    """Return a number as tables have it: whole ones with commas, others with some digits.

    >>> _number(1234567.0), _number(0.00012345), _number(None)
    ('1,234,567', '0.0001234', '')
    """
    if value is None:
        return ""
    if float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"


class _Guard:
    """Turns away who has no token, or asks for another host; adds the headers to every answer."""

    def __init__(self, app: ASGIApp, *, token: str, hosts: frozenset[str]) -> None:
        self._app = app
        self._token = token
        self._hosts = hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        respond: Callable[[Scope, Receive, Send], Awaitable[None]]
        given = request.query_params.get("token")
        if request.headers.get("host", "").lower() not in self._hosts:
            respond = Response("not a host of this page\n", 421)
        elif request.method not in {"GET", "HEAD"}:
            respond = Response("read-only\n", 405)
        elif given is not None and self._right(given):
            respond = RedirectResponse(str(request.url.remove_query_params("token")), 303)
            respond.set_cookie(_COOKIE, self._token, httponly=True, samesite="strict")
        elif self._right(request.cookies.get(_COOKIE, "")):
            respond = self._app
        else:
            respond = Response("open the address that `datastore ui` printed, with its token\n", 403)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                present = {name for name, _ in message["headers"]}
                extra = ((name.encode(), value.encode()) for name, value in _HEADERS.items())
                message["headers"] = [*message["headers"], *(each for each in extra if each[0] not in present)]
            await send(message)

        await respond(scope, receive, with_headers)

    def _right(self, token: str) -> bool:
        return hmac.compare_digest(token.encode(), self._token.encode())

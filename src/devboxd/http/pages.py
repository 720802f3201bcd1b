"""What the server tells without a key: a welcome, whether it is ready, and the description of its operations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from typing import Annotated

import msgspec
from starlette.responses import Response

import devboxd
from devboxd.errors import ApiError
from devboxd.http import docs_page, openapi
from devboxd.http.binding import Absent, Operation, Route
from devboxd.http.call import Call
from devboxd.http.document import Document, Readers

_KEY = "devboxd keys create"
_LINKS = ("/docs", "/openapi.json", "/healthz", "/metrics")


class Health(msgspec.Struct, frozen=True):
    """That the server is ready; one that is not answers an error."""

    status: str
    """Always ready. Example: `"ready"`"""


def routes(
    unready: Callable[[], ApiError | None], operations: Callable[[], Sequence[Operation]], absent: Sequence[Absent]
) -> list[Route]:
    """The rows of these pages. `unready` gives the error of a server that cannot run commands now, else None."""
    readers = Readers()
    described = Document(lambda: openapi.document(operations()), "application/json", readers, {})
    page = Document(lambda: docs_page.page(operations(), absent).encode(), "text/html", readers, docs_page.HEADERS)

    async def welcome(call: Call) -> Annotated[Response, "text/html", "text/plain"]:
        """Tell whether the server is ready, its version, and how to use it: a web page, or text for other clients."""
        address = f"{call.request.url.scheme}://{call.request.headers['host']}"
        state = f"not ready: {error.message}" if (error := unready()) is not None else "ready"
        lines = (
            "pip install runloop-api-client",
            f"export RUNLOOP_BASE_URL={address} RUNLOOP_API_KEY=ak_...",
            "python3 -c 'from runloop_api_client import Runloop; print(Runloop().devboxes.list().devboxes)'",
        )
        if "text/html" in call.request.headers.get("accept", ""):
            return Response(_welcome_page(state, lines), media_type="text/html", headers=docs_page.HEADERS)
        return Response(_welcome_text(state, lines, address), media_type="text/plain")

    async def healthz() -> Annotated[Health, 503]:
        """Tell whether the server is ready to run commands; 503 with the reason when it is not."""
        if (error := unready()) is not None:
            raise error
        return Health("ready")

    async def openapi_json(call: Call) -> Annotated[Response, "application/json", 503]:
        """Give the description of all operations as OpenAPI 3.1."""
        return await described.answer(call.request.scope["devboxd.headers"])

    async def docs(call: Call) -> Annotated[Response, "text/html", 503]:
        """Give the same description as one web page."""
        return await page.answer(call.request.scope["devboxd.headers"])

    return [
        Route("GET", "/", welcome, scope=""),
        Route("GET", "/healthz", healthz, scope=""),
        Route("GET", "/openapi.json", openapi_json, scope=""),
        Route("GET", "/docs", docs, scope=""),
    ]


def _welcome_page(state: str, lines: Sequence[str]) -> str:
    links = "".join(f'<a href="{path}">{path[1:]}</a>' for path in _LINKS)
    return docs_page.document(
        "devboxd",
        f"<h1>devboxd {escape(devboxd.__version__)}</h1><p>A server of devboxes: isolated Linux machines in which "
        f"programs run commands. It is <b>{escape(state)}</b>.</p><p>A key is made on the server, as root, by "
        f"<code>{_KEY}</code>. Then:</p><pre>{escape(chr(10).join(lines))}</pre><nav>{links}</nav>"
        "<p><small>/metrics needs the key as well.</small></p>",
    )


def _welcome_text(state: str, lines: Sequence[str], address: str) -> str:
    links = "\n".join(f"    {address}{path}" for path in _LINKS)
    return (
        f"devboxd {devboxd.__version__}: {state}\n\nA key is made on the server, as root, by `{_KEY}`. Then:\n\n"
        + "".join(f"    {line}\n" for line in lines)
        + f"\n{links}\n\n/metrics needs the key as well.\n"
    )

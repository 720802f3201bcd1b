"""A request as its handler sees it."""

from __future__ import annotations

from starlette.requests import Request

from devboxd.http.once import Once


class Call:
    """One request as its handler sees it: the caller's account, the raw request, the door to de-duplication."""

    __slots__ = ("account", "once", "request")

    def __init__(self, account: str, request: Request, once: Once) -> None:
        self.account = account
        self.request = request
        self.once = once

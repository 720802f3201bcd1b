"""The operations of the server, to be described and not to be called."""

from __future__ import annotations

import typing

from devboxd.http import pages
from devboxd.http.binding import Binding, Bracketed, Operation, Route
from devboxd.http.operation import Call
from devboxd.routes import ROUTES


def _operation(route: Route) -> Operation:
    """One whose services are none: it is only described."""
    hints = typing.get_type_hints(route.handler)
    services = {
        kind: None
        for name, kind in hints.items()
        if name not in ("body", "return") and kind not in (Call, Bracketed) and isinstance(kind, type)
        if kind.__module__.startswith("devboxd.")
    }
    return Operation(route, Binding(route.handler, route.path, Call, services))


_PAGES = pages.routes(lambda: None, lambda: [], ())
OPERATIONS = [_operation(route) for route in (*ROUTES, *_PAGES)]
"""All that is served, as it is described."""

"""The OpenAPI 3.1 description, made from the same table that serves.

What a handler answers is told by the annotation of its return: the type of the view, or `Response`; `Annotated` adds
to a Response its media type or the view that it carries, and codes of refusals that do not follow from the row.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Sequence
from typing import Any

import msgspec

import devboxd
from devboxd.http import parameters, schemas
from devboxd.http.answer import Error
from devboxd.http.binding import Operation, Parameter, Route

_REF = "#/components/schemas/{name}"
_JSON = "application/json"
_EVENTS = "text/event-stream"
_ERRORS = {
    400: (
        "The request is wrong; the message names what is",
        "cannot use the field 'code_mounts': it is not known here; leave it out",
    ),
    401: (
        "No valid key came with the request",
        "cannot let you in: authentication needs a key; send `Authorization: Bearer ak_...`",
    ),
    403: (
        "The user of the devbox may not do this",
        "cannot read /root/a: permission denied (os error 13): the devbox's user may not; choose a path that it owns",
    ),
    404: (
        "There is no such thing, or it is somebody else's",
        "cannot find the devbox dbx_0BwT25a4ESR05DXUEbW3kZ; check the id and the account of the key",
    ),
    408: (
        "The time for the body or for the wait is over; ask again",
        "cannot say yet that dbx_0BwT25a4ESR05DXUEbW3kZ is running; ask again",
    ),
    409: (
        "This was asked before in another form, and will not change",
        "cannot do this request: its x-request-id was used with another body; use a new one per request",
    ),
    413: (
        "The body or the file is too large",
        "cannot take a body of more than 16 MiB here; send less, or upload it as a file",
    ),
    415: (
        "The body is not application/json",
        "cannot read the body: its type is unknown; send it with `Content-Type: application/json`",
    ),
    421: (
        "The host name is not known here",
        "cannot serve the host 'evil.example': it is not known here; add its name to `domains`",
    ),
    429: (
        "A limit, which the message names, is reached; ask again later",
        "cannot take this request now: 3000 requests of this key are in flight, the most at once; ask again soon",
    ),
    500: (
        "A fault of the server; its log has the number that the message names",
        "cannot finish the request: a fault of the server, logged as err_0f1e2d3c4b5a",
    ),
    503: (
        "Not now; ask again, after `retry-after` seconds where that is told",
        "cannot serve now: the server is starting; ask again soon, /healthz tells when",
    ),
    504: (
        "A file of the devbox did not open in time",
        "cannot read /home/user/pipe: it kept us waiting for 10 s; look in the devbox at what holds it up",
    ),
    507: (
        "The disk of the devbox is full",
        "cannot write /home/user/big: no space left on device (os error 28): the disk is full; delete something",
    ),
}
"""By code: what it means, and a message."""
_ONCE = {
    "name": "x-request-id",
    "in": "header",
    "required": False,
    "description": "Repeated with the same id, a request is answered as the first one and not "
    "done again; without an id it is done each time.",
    "schema": {"type": "string", "examples": ["0b0d7c0e-2f0c-4c0e-9a52-6a1d3f3f6f0b"]},
}
_EVENT = {"type": "string", "enum": ["message", "error"], "default": "message", "examples": ["error"]}
TAGS = {
    "Devboxes": ("devboxes.api", "devboxes.evictions"),
    "Executions": ("executions.api",),
    "Files": ("access.api",),
    "Snapshots": ("devboxes.snapshot_api",),
    "Logs": ("devboxes.logs.api",),
    "Account": ("resources.accounts",),
    "Server": ("resources.metrics", "http.pages"),
}
_TAGS = {
    "Devboxes": "Isolated Linux machines: make, see, suspend, resume and end them.",
    "Executions": "Commands in devboxes, their input, output and exit codes.",
    "Files": "Files of devboxes.",
    "Snapshots": "Disks of devboxes that are kept, and from which new ones are made.",
    "Logs": "What happened in a devbox, in order.",
    "Account": "Whose key it is.",
    "Server": "How the server is, and what it can do.",
}
_ABOUT = (
    "A server of devboxes: isolated Linux machines in which programs run commands. Sizes are in bytes or GiB, times in "
    "seconds or milliseconds, as the name of a field says; moments are in Unix milliseconds. In a request null stands "
    "for what is left out."
)
"""The groups of operations in the order in which they are shown, and the modules of their handlers."""


def document(operations: Sequence[Operation]) -> bytes:
    """The whole document as JSON."""
    kinds = [kind for operation in operations for kind in (body_type(operation), answer_type(operation)) if kind]
    kinds.append(Error)
    found, components = schemas.of(kinds, _REF)
    by_kind = dict(zip(map(id, kinds), found, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.route.path, {})[operation.route.method.lower()] = _describe(operation, by_kind)
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {"title": "devboxd", "version": devboxd.__version__, "description": _ABOUT},
            "security": [{"key": []}],
            "tags": [{"name": name, "description": text} for name, text in _TAGS.items()],
            "paths": paths,
            "components": {
                "schemas": components,
                "responses": {f"Error{code}": _error(code, *words) for code, words in _ERRORS.items()},
                "securitySchemes": {
                    "key": {
                        "type": "http",
                        "scheme": "bearer",
                        "description": "A key: `devboxd keys create` makes one.",
                    }
                },
            },
        }
    )


def tag(route: Route) -> str:
    """The group to which an operation belongs."""
    module = route.handler.__module__.partition(".")[2]
    return next((name for name, modules in TAGS.items() if module in modules), "Other")


def summary(operation: Operation) -> tuple[str, str]:
    """The first paragraph of the handler's docstring, and the rest of it: Markdown, with an example in Python last."""
    first, _, rest = (inspect.getdoc(operation.route.handler) or "").partition("\n\n")
    return " ".join(first.split()), rest.strip()


def body_type(operation: Operation) -> Any:
    """The Struct of the body, of JSON or of a form, or None."""
    if operation.binding.body is None:
        return operation.route.form
    return next(part for part in _parts(operation.binding.body.kind) if part is not type(None))


def answer_type(operation: Operation) -> Any:
    """The Struct of the answer, or None."""
    return next((part for part in _parts(operation.binding.returns) if _is_struct(part)), None)


def media_types(operation: Operation) -> list[str]:
    """The types that an answer may have that is no error; the view belongs to the first, others are plain text."""
    return [part for part in _parts(operation.binding.returns) if isinstance(part, str)] or [_JSON]


def error_codes(operation: Operation) -> list[int]:
    """Every code of an error that the operation may answer."""
    route = operation.route
    codes = {400, 421, 500, *(part for part in _parts(operation.binding.returns) if isinstance(part, int))}
    if route.scope:
        codes |= {401, 503}
    if operation.binding.path_names:
        codes.add(404)
    if route.method != "GET":
        codes |= {408} if route.streamed else {408, 413, 415}
    if route.once:
        codes.add(409)
    return sorted(codes)


def _parts(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) or (kind,)


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _describe(operation: Operation, by_kind: dict[int, Any]) -> dict[str, Any]:
    head, text = summary(operation)
    described: dict[str, Any] = {
        "operationId": operation.name,
        "tags": [tag(operation.route)],
        "summary": head,
        "parameters": _parameters(operation),
        "responses": _responses(operation, by_kind),
    }
    if text:
        described["description"] = text
    if not operation.route.scope:
        described["security"] = []
    if (kind := body_type(operation)) is not None:
        described["requestBody"] = _body(operation, by_kind[id(kind)])
    return described


def _body(operation: Operation, schema: dict[str, Any]) -> dict[str, Any]:
    body, kind = operation.binding.body, body_type(operation)
    media = "multipart/form-data" if body is None else _JSON
    if body is not None and body.optional:
        schema = {"anyOf": [schema, {"type": "null"}]}
    return {
        "description": schemas.meaning(kind),
        "required": body is None or not body.optional,
        "content": {media: {"schema": schema, "example": dict(schemas.example(kind))}},
    }


def _parameters(operation: Operation) -> list[dict[str, Any]]:
    path = [_path(name) for name in operation.binding.path_names]
    inquired = [query(parameter) for parameter in operation.binding.query.values()]
    return [*path, *inquired, *([_ONCE] if operation.route.once else [])]


def _path(name: str) -> dict[str, Any]:
    text, example = parameters.PATH.get(name, ("", name))
    described = {"description": text, "schema": {"type": "string", "examples": [example]}}
    return {"name": name, "in": "path", "required": True, **described}


def query(parameter: Parameter) -> dict[str, Any]:
    """The description of one parameter of the query."""
    schema = msgspec.json.schema(parameter.kind)
    described = {"description": text} if (text := schema.pop("description", "")) else {}
    if not parameter.required:
        schema["default"] = parameter.default
    return {"name": parameter.name, "in": "query", "required": parameter.required, **described, "schema": schema}


def _responses(operation: Operation, by_kind: dict[int, Any]) -> dict[str, Any]:
    (media, *others), kind = media_types(operation), answer_type(operation)
    schema = {"type": "object" if media == _JSON else "string"} if kind is None else by_kind[id(kind)]
    if media == _EVENTS:
        schema = _event(schema)
    errors = {str(code): {"$ref": f"#/components/responses/Error{code}"} for code in error_codes(operation)}
    content = {media: {"schema": schema}, **{other: {"schema": {"type": "string"}} for other in others}}
    return {"200": {"description": _done(media, kind), "content": content}, **errors}


def _done(media: str, kind: Any) -> str:
    """What the answer of success is."""
    if media == _EVENTS:
        return f"Server-sent events, until there is no more to tell. Each carries: {schemas.meaning(kind)}"
    if kind is not None:
        return schemas.meaning(kind)
    return "It is done; the object is empty." if media == _JSON else "The content itself."


def _event(schema: dict[str, Any]) -> dict[str, Any]:
    """Each event carries one view; an event `error` carries an error and ends the stream."""
    data = {"anyOf": [schema, {"$ref": _REF.format(name="Error")}]}
    return {
        "type": "object",
        "required": ["data"],
        "properties": {
            "event": {**_EVENT, "description": "`error` before an error, which ends the stream; else left out."},
            "data": {
                "type": "string",
                "description": "What the event carries, as JSON in one line.",
                "examples": ['{"code":408,"message":"cannot go on with this stream: the server stops; open it again"}'],
                "contentMediaType": _JSON,
                "contentSchema": data,
            },
        },
    }


def _error(code: int, text: str, message: str) -> dict[str, Any]:
    shape = {"schema": {"$ref": _REF.format(name="Error")}, "example": {"code": code, "message": message}}
    return {"description": text, "content": {_JSON: shape}}

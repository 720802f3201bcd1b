"""The OpenAPI 3.1 description, made from the same table that serves."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Sequence
from typing import Any

import msgspec

import devboxd
from devboxd.http.binding import Operation, Parameter

_REF = "#/components/schemas/{name}"


def document(operations: Sequence[Operation]) -> bytes:
    """The whole document as JSON."""
    kinds = [kind for operation in operations for kind in (body_type(operation), answer_type(operation)) if kind]
    schemas, components = msgspec.json.schema_components(kinds, ref_template=_REF)
    by_kind = dict(zip(map(id, kinds), schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        paths.setdefault(operation.route.path, {})[operation.route.method.lower()] = _describe(operation, by_kind)
    return msgspec.json.encode(
        {
            "openapi": "3.1.0",
            "info": {"title": "devboxd", "version": devboxd.__version__},
            "security": [{"key": []}],
            "paths": paths,
            "components": {
                "schemas": {"Error": _ERROR, **components},
                "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            },
        }
    )


_ERROR = {
    "type": "object",
    "required": ["code", "message"],
    "properties": {"code": {"type": "integer"}, "message": {"type": "string"}},
}


def tag(operation: Operation) -> str:
    """The group of an operation: the folder of its handler, or the file's name within `resources`."""
    parts = operation.route.handler.__module__.split(".")
    if len(parts) > 2 and parts[1] == "resources":
        return parts[2]
    return "server" if parts[1:2] == ["http"] else parts[1] if len(parts) > 1 else parts[0]


def summary(operation: Operation) -> tuple[str, str]:
    """The first line of the handler's docstring, and the rest of it."""
    first, _, rest = (inspect.getdoc(operation.route.handler) or "").partition("\n")
    return first, rest.strip()


def body_type(operation: Operation) -> Any:
    """The Struct of the body, or None."""
    if operation.binding.body is None:
        return None
    return next(part for part in _parts(operation.binding.body.kind) if part is not type(None))


def answer_type(operation: Operation) -> Any:
    """The Struct of the answer, or None when the handler returns nothing or a response of its own."""
    structs = [part for part in _parts(operation.binding.returns) if _is_struct(part)]
    return structs[0] if structs else None


def _parts(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) or (kind,)


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _describe(operation: Operation, schemas: dict[int, Any]) -> dict[str, Any]:
    head, text = summary(operation)
    described: dict[str, Any] = {
        "operationId": f"{tag(operation)}.{operation.route.handler.__name__}",
        "tags": [tag(operation)],
        "summary": head,
        "parameters": _parameters(operation),
        "responses": _responses(operation, schemas),
    }
    if text:
        described["description"] = text
    if not operation.route.scope:
        described["security"] = []
    if (kind := body_type(operation)) is not None and operation.binding.body is not None:
        described["requestBody"] = {
            "required": not operation.binding.body.optional,
            "content": {"application/json": {"schema": schemas[id(kind)]}},
        }
    return described


def _parameters(operation: Operation) -> list[dict[str, Any]]:
    path = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in operation.binding.path_names
    ]
    query = [_query(parameter) for parameter in operation.binding.query.values()]
    once = {"name": "x-request-id", "in": "header", "required": False, "schema": {"type": "string"}}
    return [*path, *query, *([once] if operation.route.once else [])]


def _query(parameter: Parameter) -> dict[str, Any]:
    schema = msgspec.json.schema(parameter.kind)
    if not parameter.required and parameter.default is not None:
        schema["default"] = parameter.default
    return {"name": parameter.name, "in": "query", "required": parameter.required, "schema": schema}


def _responses(operation: Operation, schemas: dict[int, Any]) -> dict[str, Any]:
    error = {
        "description": "An error",
        "content": {"application/json": {"schema": {"$ref": _REF.format(name="Error")}}},
    }
    success: dict[str, Any] = {"description": "Done"}
    if (kind := answer_type(operation)) is not None:
        success["content"] = {"application/json": {"schema": schemas[id(kind)]}}
    elif operation.binding.returns in (None, type(None)):
        success["content"] = {"application/json": {"schema": {"type": "object"}}}
    return {"200": success, "default": error}

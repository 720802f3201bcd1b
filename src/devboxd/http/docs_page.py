"""The description of all operations as one web page: no script, no foreign asset, readable in a narrow window."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import Any

import msgspec

import devboxd
from devboxd.http import openapi
from devboxd.http.binding import Operation

HEADERS = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"}

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { margin-top: 2rem; border-bottom: 1px solid var(--line); }
nav a { display: inline-block; margin-right: .8rem; }
details { border: 1px solid var(--line); border-radius: .4rem; margin: .5rem 0; padding: .4rem .7rem; }
summary { cursor: pointer; overflow-wrap: anywhere; }
code, pre { font: 14px/1.45 ui-monospace, monospace; }
pre { background: var(--soft); border-radius: .4rem; overflow-x: auto; padding: .6rem; }
.method { display: inline-block; font-weight: 700; min-width: 3.6rem; }
.head { display: block; opacity: .8; }
"""


def page(operations: Sequence[Operation]) -> str:
    """The whole page."""
    groups: dict[str, list[Operation]] = {}
    for operation in operations:
        groups.setdefault(operation.group, []).append(operation)
    links = "".join(f'<a href="#{escape(name)}">{escape(name)}</a>' for name in groups)
    sections = "".join(_section(name, members) for name, members in groups.items())
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>devboxd API</title><style>{_STYLE}</style></head><body>"
        f"<h1>devboxd {escape(devboxd.__version__)}</h1>"
        "<p>Send the key of your account with each request as <code>Authorization: Bearer ak_...</code>. "
        'Errors are <code>{"code", "message"}</code>. As OpenAPI: <a href="/openapi.json">openapi.json</a>.</p>'
        f"<nav>{links}</nav>{sections}</body></html>"
    )


def _section(name: str, operations: Sequence[Operation]) -> str:
    return f'<h2 id="{escape(name)}">{escape(name)}</h2>' + "".join(map(_entry, operations))


def _entry(operation: Operation) -> str:
    head, text = openapi.summary(operation)
    route = operation.route
    parts = [f"<p>{escape(text)}</p>" if text else ""]
    if not route.scope:
        parts.append("<p>Needs no key.</p>")
    if route.once:
        parts.append("<p>Done once per <code>x-request-id</code>; a repeated request gets the same answer.</p>")
    if operation.binding.query:
        items = "".join(
            f"<li><code>{escape(parameter.name)}</code>: {escape(_schema_line(parameter.kind))}</li>"
            for parameter in operation.binding.query.values()
        )
        parts.append(f"<p>Query:</p><ul>{items}</ul>")
    for title, kind in (("Body", openapi.body_type(operation)), ("Answer", openapi.answer_type(operation))):
        if kind is not None:
            parts.append(f"<p>{title}:</p><pre>{escape(_schema(kind))}</pre>")
    return (
        f'<details><summary><span class="method">{escape(route.method)}</span><code>{escape(route.path)}</code>'
        f'<span class="head">{escape(head)}</span></summary>{"".join(parts)}</details>'
    )


def _schema_line(kind: Any) -> str:
    return msgspec.json.encode(msgspec.json.schema(kind)).decode()


def _schema(kind: Any) -> str:
    (schema,), components = msgspec.json.schema_components([kind], ref_template="{name}")
    name = schema.get("$ref", "")
    ordered = {name: components.pop(name)} | components if name in components else {"": schema}
    lines: list[str] = []
    for title, described in ordered.items():
        lines.append(title)
        required = described.get("required", [])
        for field, shape in described.get("properties", {}).items():
            lines.append(f"  {field}{'' if field in required else '?'}: {_kind(shape)}")
    return "\n".join(lines)


def _kind(shape: dict[str, Any]) -> str:
    if "$ref" in shape:
        return str(shape["$ref"])
    if "anyOf" in shape:
        return " | ".join(_kind(part) for part in shape["anyOf"])
    if "enum" in shape:
        return " | ".join(repr(value) for value in shape["enum"])
    if shape.get("type") == "array":
        return f"list of {_kind(shape.get('items', {}))}"
    if shape.get("type") == "object" and isinstance(shape.get("additionalProperties"), dict):
        return f"map of {_kind(shape['additionalProperties'])}"
    return str(shape.get("type", "any"))

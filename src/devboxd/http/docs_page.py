"""The description of all operations as one web page: no script, no foreign asset, readable in a narrow window."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from markdown_it import MarkdownIt

import devboxd
from devboxd.http import openapi, parameters, schemas
from devboxd.http.binding import Absent, Operation

HEADERS = {"content-security-policy": "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"}
STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { margin-top: 2rem; border-bottom: 1px solid var(--line); }
nav a { display: inline-block; margin-right: .8rem; }
details, .type { border: 1px solid var(--line); border-radius: .4rem; margin: .5rem 0; padding: .4rem .7rem; }
summary { cursor: pointer; overflow-wrap: anywhere; }
code, pre { font: 14px/1.45 ui-monospace, monospace; }
pre { background: var(--soft); border-radius: .4rem; overflow-x: auto; padding: .6rem; }
.method { display: inline-block; font-weight: 700; min-width: 3.6rem; }
.head { display: block; opacity: .8; } .head p { margin: 0; }
dt { margin-top: .6rem; overflow-wrap: anywhere; } dt small { opacity: .8; }
dd { margin: 0 0 0 1.2rem; } dd p { margin: 0; }
"""
_TYPE = "#type-{name}"
_markdown = MarkdownIt("commonmark", {"html": False})


def page(operations: Sequence[Operation], absent: Sequence[Absent] = ()) -> str:
    """The whole page: operations by group, the types that they share, and what this version lacks."""
    groups = {name: [entry for entry in operations if openapi.tag(entry.route) == name] for name in openapi.TAGS}
    groups["Other"] = [entry for entry in operations if openapi.tag(entry.route) == "Other"]
    shown = {name: members for name, members in groups.items() if members}
    titles = [*shown, "Types", *(["Not in this version"] if absent else [])]
    links = "".join(f'<a href="#{_anchor(name)}">{escape(name)}</a>' for name in titles)
    sections = "".join(_section(name, "".join(map(_entry, members))) for name, members in shown.items())
    return document(
        "devboxd API",
        f"<h1>devboxd {escape(devboxd.__version__)}</h1>"
        "<p>Send a key with each request as <code>Authorization: Bearer ak_...</code>. The official clients and the "
        "examples take it from <code>RUNLOOP_API_KEY</code>, and the address of this server from "
        "<code>RUNLOOP_BASE_URL</code>; in Python, <code>client = Runloop()</code>. Errors are "
        '<code>{"code", "message"}</code>. The same as OpenAPI: <a href="/openapi.json">openapi.json</a>.</p>'
        f"<nav>{links}</nav>{sections}{_types(operations)}{_lacking(absent)}",
    )


def document(title: str, body: str) -> str:
    """A page of this server with its style."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body>{body}</body></html>"
    )


def curl(operation: Operation) -> str:
    """A command line that does this operation with example values."""
    route = operation.route
    path = route.path
    for name in operation.binding.path_names:
        path = path.replace(f"{{{name}}}", parameters.PATH.get(name, ("", name))[1])
    words = ["curl"] if route.method == "GET" else [f"curl -X {route.method}"]
    words[0] += f' "$RUNLOOP_BASE_URL{path}"'
    if route.scope:
        words.append('-H "Authorization: Bearer $RUNLOOP_API_KEY"')
    if (kind := openapi.body_type(operation)) is not None:
        fields = list(schemas.example(kind))
        if operation.binding.body is None:
            words += [f"-F {shlex.quote(f'{name}={value}')}" for name, value in fields]
        else:
            words += ['-H "Content-Type: application/json"', f"-d {shlex.quote(json.dumps(dict(fields)))}"]
    return " \\\n  ".join(words)


def _anchor(name: str) -> str:
    return escape(name.lower().replace(" ", "-"))


def _section(name: str, content: str) -> str:
    return f'<h2 id="{_anchor(name)}">{escape(name)}</h2>{content}'


def _entry(operation: Operation) -> str:
    head, text = openapi.summary(operation)
    route = operation.route
    anchor = escape(operation.name)
    notes = [] if route.scope else ["Needs no key."]
    notes += ["Done once per `x-request-id`; a repeated request gets the same answer."] if route.once else []
    listed = "".join(
        _field(item["name"], {**item["schema"], "description": item.get("description", "")}, item["required"])
        for item in map(openapi.query, operation.binding.query.values())
    )
    parts = [
        f"<pre>{escape(curl(operation))}</pre>",
        _markdown.render(text),
        *(f"<p>{_markdown.renderInline(note)}</p>" for note in notes),
        f"<h4>Query</h4><dl>{listed}</dl>" if listed else "",
        _fields("Body", openapi.body_type(operation)),
        _reference("Answer", openapi.answer_type(operation)),
        f"<p>Errors: {', '.join(map(str, openapi.error_codes(operation)))}</p>",
    ]
    return (
        f'<details><summary><span class="method">{escape(route.method)}</span><code>{escape(route.path)}</code>'
        f'<span class="head">{_markdown.renderInline(head)}</span></summary><div id="{anchor}">'
        f'<p><a href="#{anchor}"><code>{anchor}</code></a></p>{"".join(parts)}</div></details>'
    )


def _fields(title: str, kind: type | None) -> str:
    if kind is None:
        return ""
    _, components = schemas.of([kind], _TYPE)
    return f"<h4>{title}</h4><dl>{_listed(components[kind.__name__])}</dl>"


def _reference(title: str, kind: type | None) -> str:
    return "" if kind is None else f'<p>{title}: <a href="#type-{kind.__name__}">{kind.__name__}</a></p>'


def _types(operations: Iterable[Operation]) -> str:
    answers = [kind for entry in operations if (kind := openapi.answer_type(entry)) is not None]
    bodies = [kind for entry in operations if (kind := openapi.body_type(entry)) is not None]
    _, components = schemas.of([*answers, *bodies], _TYPE)
    shown = "".join(
        f'<div class="type" id="type-{escape(name)}"><b>{escape(name)}</b>'
        f"{_markdown.render(described.get('description', ''))}<dl>{_listed(described)}</dl></div>"
        for name, described in components.items()
    )
    return _section("Types", shown)


def _listed(described: dict[str, Any]) -> str:
    required = described.get("required", ())
    return "".join(_field(name, shape, name in required) for name, shape in described.get("properties", {}).items())


def _field(name: str, shape: dict[str, Any], required: bool) -> str:
    facts = [_kind(shape), *(["required"] if required else [])]
    if shape.get("default") not in (None, {}, []):
        facts.append(f"default <code>{escape(json.dumps(shape['default']))}</code>")
    example = shape.get("examples", [None])[0]
    shown = "" if example is None else f"<p>Example: <code>{escape(json.dumps(example))}</code></p>"
    text = _markdown.render(shape.get("description", ""))
    return f"<dt><code>{escape(name)}</code> <small>{', '.join(facts)}</small></dt><dd>{text}{shown}</dd>"


def _kind(shape: dict[str, Any]) -> str:
    if "$ref" in shape:
        return f'<a href="{escape(shape["$ref"])}">{escape(shape["$ref"].removeprefix("#type-"))}</a>'
    if "anyOf" in shape:
        return " or ".join(_kind(part) for part in shape["anyOf"])
    if "enum" in shape:
        return " or ".join(f"<code>{escape(json.dumps(value))}</code>" for value in shape["enum"])
    if shape.get("type") == "array":
        return f"list of {_kind(shape.get('items', {}))}"
    if shape.get("type") == "object" and isinstance(shape.get("additionalProperties"), dict):
        return f"map of {_kind(shape['additionalProperties'])}"
    return escape(str(shape.get("type", "any")))


def _lacking(absent: Sequence[Absent]) -> str:
    if not absent:
        return ""
    reasons: dict[tuple[str, str], list[str]] = {}
    for row in absent:
        reasons.setdefault((row.why, row.instead), []).append(row.name)
    rows = "".join(
        f"<dt>{escape(why[:1].upper() + why[1:])}; instead, {_markdown.renderInline(instead)}.</dt>"
        f"<dd>{', '.join(f'<code>{escape(name)}</code>' for name in names)}</dd>"
        for (why, instead), names in reasons.items()
    )
    return _section("Not in this version", f"<p>These are answered by 501.</p><dl>{rows}</dl>")

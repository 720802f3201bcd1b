"""What the server tells of itself without a key: a welcome, and every operation with its fields and examples."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import runloop_api_client
from runloop_api_client import Runloop

from devboxd.http import docs_page, field_docs, openapi, parameters, schemas
from devboxd.http.binding import Absent
from devboxd.http.operation import Unready, build
from devboxd.routes import ROUTES
from devboxd.unimplemented import UNIMPLEMENTED
from support.operations import OPERATIONS
from support.web import Web

pytestmark = pytest.mark.anyio


KINDS = [kind for entry in OPERATIONS for kind in (openapi.body_type(entry), openapi.answer_type(entry)) if kind]


@pytest.mark.parametrize("kind", schemas.structs(KINDS), ids=lambda kind: kind.__name__)
def test_every_field_on_the_wire_says_what_it_means_with_an_example(kind: type) -> None:
    docs = field_docs.of(kind)
    described = schemas.of([kind], "{name}")[1][kind.__name__]
    for name, shape in described["properties"].items():
        assert name in docs, f"{kind.__name__}.{name} has no docstring"
        assert docs[name].text.endswith((".", "`")), f"{kind.__name__}.{name}: {docs[name].text}"
        assert docs[name].has_example or "$ref" in str(shape), f"{kind.__name__}.{name} has no example"
        assert shape["description"] == docs[name].text


def test_examples_are_what_their_fields_take() -> None:
    for kind in schemas.structs(KINDS):
        fields = {field.name: field.type for field in msgspec.structs.fields(kind)} if _is_struct(kind) else {}
        for name, doc in field_docs.of(kind).items():
            if doc.has_example and name in fields:
                msgspec.convert(doc.example, fields[name])


@pytest.mark.parametrize("entry", OPERATIONS, ids=lambda entry: f"{entry.name} {entry.route.path}")
def test_every_operation_has_parameters_with_meaning_and_examples_that_work(entry: Any) -> None:
    assert openapi.tag(entry.route) in openapi.TAGS
    for parameter in map(openapi.query, entry.binding.query.values()):
        assert parameter["description"]
        assert parameter["schema"]["examples"]
    for name in entry.binding.path_names:
        assert name in parameters.PATH
    subprocess.run(["sh", "-n", "-c", docs_page.curl(entry)], check=True)
    if not entry.route.scope:
        return  # what needs no key is no operation of the clients
    code = re.search(r"```python\n(.*)\n```", openapi.summary(entry)[1], re.DOTALL)
    assert code, "the handler's docstring has an example in Python"
    for chain in _chains(ast.parse(code[1])):
        found: Any = Runloop(base_url="http://127.0.0.1:9", bearer_token="ak_x")
        for name in chain:
            found = getattr(found, name)
        assert callable(found)


def _chains(tree: ast.Module) -> Iterator[list[str]]:
    """The attributes of `client` that are called."""
    calls = [node.func for node in ast.walk(tree) if isinstance(node, ast.Call)]
    for call in calls:
        names: list[str] = []
        node: ast.expr = call
        while isinstance(node, ast.Attribute):
            names.insert(0, node.attr)
            node = node.value
        if isinstance(node, ast.Name) and node.id == "client":
            yield names


def test_the_page_has_devboxes_first_an_anchor_for_each_operation_and_markdown_rendered() -> None:
    page = docs_page.page(OPERATIONS, UNIMPLEMENTED)
    assert re.findall(r'<h2 id="([^"]*)"', page)[:2] == ["devboxes", "executions"]
    anchors = re.findall(r'id="([^"]*)"', page)
    assert {entry.name for entry in OPERATIONS} <= set(anchors)
    assert len(set(anchors)) == len(anchors)
    assert len({entry.name for entry in OPERATIONS}) == len(OPERATIONS)
    assert "```" not in page
    assert "<code>send_std_in</code>" in page
    assert "<script" not in page
    references = set(re.findall(r'href="#([^"]+)"', page))
    assert references <= set(re.findall(r'id="([^"]+)"', page))


# What is not built


def _client_operations() -> set[tuple[str, str]]:
    """Method and path of each request that the published client can make, names in braces left out."""
    found = set()
    for path in (Path(runloop_api_client.__file__).parent / "resources").rglob("*.py"):
        for match in re.finditer(
            r'self\._(get|post|put|delete|get_api_list)\(\s*(?:path_template\(\s*)?f?"(/[^"]+)"', path.read_text()
        ):
            method = "GET" if match[1] == "get_api_list" else match[1].upper()
            found.add((method, _plain(match[2])))
    return found


def _plain(path: str) -> str:
    return re.sub(r"{\w*}", "{}", path)


def test_every_operation_of_the_published_client_is_served_or_refused_by_its_name() -> None:
    served = {(entry.method, _plain(entry.path)) for entry in ROUTES}
    refused = {(entry.method, entry.path) for entry in UNIMPLEMENTED}
    asked = _client_operations()
    assert len(asked) > 80
    assert asked <= served | refused, sorted(asked - served - refused)
    assert not served & refused
    assert len(UNIMPLEMENTED) == len(refused)


async def test_what_is_not_built_says_so_and_what_to_do_instead(web: Web) -> None:
    lacking = Absent("POST", "/v1/ships/{}", "ships.update", "ships are not built", "take a boat")
    web.app = build((), (web.store,), store=web.store, settings=web.settings, ready=lambda: None, absent=[lacking])
    client = await web.client()
    answer = await client.post("/v1/ships/1", json={"a": 1})
    assert answer.status_code == 501
    assert answer.headers["x-should-retry"] == "false"
    assert answer.json() == {
        "code": 501,
        "message": "cannot do ships.update: ships are not built in this version; instead, take a boat",
    }
    assert (await client.post("/v1/ships/1", headers={"authorization": ""})).status_code == 401
    assert (await client.get("/v1/ships/1")).status_code == 405
    assert "ships.update" in (await client.get("/docs")).text


# The welcome


async def test_a_browser_and_a_terminal_are_welcomed_with_this_servers_address(web: Web) -> None:
    client = await web.client("")
    text = (await client.get("/", headers={"authorization": ""})).text
    assert "ready" in text
    assert "RUNLOOP_BASE_URL=http://localhost" in text
    assert "devboxd keys create" in text
    assert max(map(len, text.splitlines())) < 120
    page = await client.get("/", headers={"authorization": "", "accept": "text/html,*/*"})
    assert page.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in page.headers["content-security-policy"]
    for link in ("/docs", "/metrics", "/healthz"):
        assert f'href="{link}"' in page.text


async def test_the_welcome_says_why_the_server_is_not_ready(web: Web) -> None:
    unready = Unready("the default image is being built: 40%", hold_s=0)
    web.app = build((), (web.store,), store=web.store, settings=web.settings, ready=lambda: unready)
    client = await web.client("")
    assert "not ready" in (await client.get("/")).text
    assert "40%" in (await client.get("/", headers={"accept": "text/html"})).text


def _is_struct(kind: type) -> bool:
    return issubclass(kind, msgspec.Struct)

"""The description of the API comes from the table that serves, complete and self-contained."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest

from devboxd.http import openapi
from devboxd.http.answer import Error
from support.operations import OPERATIONS
from support.web import ROUTES, Web

pytestmark = pytest.mark.anyio

PATCHED = ("UpdateDevbox.name", "UpdateDevbox.metadata")
"""What is left out of a patch stays as it is, which is no value."""
UNITS = r"_ms\b|_seconds\b|bytes?|seconds|gib|cores|percent|how many|exit code|\bid\b|processes|status of http"


async def document(web: Web) -> Any:
    client = await web.client("")
    return (await client.get("/openapi.json", headers={"authorization": ""})).json()


async def test_every_row_of_the_table_is_described(web: Web) -> None:
    described = await document(web)
    assert described["openapi"] == "3.1.0"
    for route in ROUTES:
        operation = described["paths"][route.path][route.method.lower()]
        assert operation["summary"]
        assert operation["tags"]
    names = [operation["operationId"] for path in described["paths"].values() for operation in path.values()]
    assert len(names) == len(set(names))


async def test_bodies_parameters_and_answers_have_their_shapes(web: Web) -> None:
    described = await document(web)
    made = described["paths"]["/v1/things"]["post"]
    assert made["requestBody"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Body"}
    assert made["responses"]["200"]["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/View"}
    assert made["description"] == "A second line for the description."
    assert described["components"]["schemas"]["Body"]["required"] == ["command"]
    look = {
        parameter["name"]: parameter for parameter in described["paths"]["/v1/things/{thing_id}"]["get"]["parameters"]
    }
    assert look["thing_id"]["in"] == "path"
    assert look["limit"]["schema"] == {"type": "integer", "default": 20}
    assert described["paths"]["/healthz"]["get"]["security"] == []
    references = set(re.findall(r"#/components/schemas/(\w+)", str(described)))
    assert references <= set(described["components"]["schemas"])


async def test_every_error_that_can_come_is_named(web: Web) -> None:
    described = await document(web)
    once = described["paths"]["/v1/things"]["post"]["responses"]
    assert set(once) == {"200", "400", "401", "408", "409", "413", "415", "421", "500", "503"}
    named = described["paths"]["/v1/things/{thing_id}"]["get"]["responses"]
    assert set(named) == {"200", "400", "401", "404", "421", "500", "503"}
    assert "503" in described["paths"]["/healthz"]["get"]["responses"]
    assert "401" not in described["paths"]["/healthz"]["get"]["responses"]
    for error in described["components"]["responses"].values():
        assert error["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Error"}


def _schemas(where: str, schema: Any) -> Iterator[tuple[str, Any]]:
    """Each property in a schema, and in those within it, with its place in words."""
    inner = [schema.get(name) for name in ("items", "additionalProperties", "contentSchema")]
    for part in (*schema.get("anyOf", ()), *(part for part in inner if isinstance(part, dict))):
        yield from _schemas(where, part)
    for name, shape in schema.get("properties", {}).items():
        yield f"{where}.{name}", {**shape, "optional": name not in schema.get("required", ())}
        yield from _schemas(f"{where}.{name}", shape)


def _contents(document: Any) -> Iterator[tuple[str, Any]]:
    """Each body and answer of the document, with its place in words."""
    for code, response in document["components"]["responses"].items():
        yield from ((code, content) for content in response["content"].values())
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            carriers = [operation.get("requestBody", {"content": {}}), *operation["responses"].values()]
            for carrier in carriers:
                yield from ((f"{method} {path}", content) for content in carrier.get("content", {}).values())


def test_everything_in_the_document_says_what_it_means() -> None:
    described = json.loads(openapi.document(OPERATIONS))
    assert described["info"]["description"]
    assert [tag["name"] for tag in described["tags"]] == list(openapi.TAGS)
    assert all(tag["description"] for tag in described["tags"])
    assert described["components"]["securitySchemes"]["key"]["description"]
    texts = {f"response {code}": body for code, body in described["components"]["responses"].items()}
    texts |= {f"schema {name}": schema for name, schema in described["components"]["schemas"].items()}
    for path, operations in described["paths"].items():
        for method, operation in operations.items():
            where = f"{method} {path}"
            assert operation["summary"], where
            assert operation.get("description") or operation["security"] == [], where
            carriers = {**operation["responses"], "body": operation.get("requestBody", {"$ref": "none"})}
            texts |= {f"{where} {name}": part for name, part in carriers.items() if "$ref" not in part}
            texts |= {f"{where} {part['name']}": part for part in operation["parameters"]}
    for where, part in texts.items():
        assert len(part["description"]) > 10, where
        assert "\n    " not in part["description"], f"{where}: the indentation of the source"


def test_every_property_has_a_meaning_an_example_and_a_default_where_it_may_be_left_out() -> None:
    described = json.loads(openapi.document(OPERATIONS))
    found = [item for name, schema in described["components"]["schemas"].items() for item in _schemas(name, schema)]
    found += [item for where, content in _contents(described) for item in _schemas(where, content["schema"])]
    assert len(found) > 180
    for where, shape in found:
        assert shape.get("description"), where
        assert shape.get("examples") or "$ref" in str(shape), where
        assert not shape["optional"] or "default" in shape or where in PATCHED, where
        if '"integer"' in json.dumps(shape) or '"number"' in json.dumps(shape):
            text = f"{where} {shape['description']}".lower()
            assert re.search(UNITS, text), f"{where} has no unit: {shape['description']}"


def test_every_parameter_has_an_example_and_a_default_where_it_may_be_left_out() -> None:
    described = json.loads(openapi.document(OPERATIONS))
    for path, operations in described["paths"].items():
        for parameter in (one for operation in operations.values() for one in operation["parameters"]):
            where = f"{path} {parameter['name']}"
            assert parameter["schema"]["examples"], where
            header = parameter["in"] == "header"  # what a header means that is not sent stands in its description
            assert parameter["required"] or header or "default" in parameter["schema"], where


def test_every_body_and_every_error_has_an_example_that_fits() -> None:
    described = json.loads(openapi.document(OPERATIONS))
    for where, content in _contents(described):
        if content["schema"] == {"$ref": "#/components/schemas/Error"}:
            error = msgspec.convert(content["example"], Error)
            assert where == f"Error{error.code}"
            assert re.fullmatch(r"cannot .*[;,:] .*", error.message), where
    for operation in OPERATIONS:
        if (kind := openapi.body_type(operation)) is not None:
            body = described["paths"][operation.route.path][operation.route.method.lower()]["requestBody"]
            (content,) = body["content"].values()
            assert content["example"], operation.name
            msgspec.convert(content["example"], kind)


async def test_errors_on_the_wire_are_what_is_described(web: Web) -> None:
    client = await web.client("")
    for path in ("/nothing", "/v1/accounts/me"):
        answer = await client.get(path)
        assert msgspec.convert(answer.json(), Error).code == answer.status_code
        assert set(answer.json()) == {"code", "message"}


async def test_the_page_needs_nothing_from_elsewhere(web: Web) -> None:
    client = await web.client("")
    answer = await client.get("/docs", headers={"authorization": ""})
    assert answer.headers["content-type"].startswith("text/html")
    assert "default-src 'none'" in answer.headers["content-security-policy"]
    for route in ROUTES:
        assert f"<code>{route.path}</code>" in answer.text
    assert "<script" not in answer.text
    assert not re.search(r'(src|href)="(https?:)?//', answer.text)
    assert 'name="viewport"' in answer.text

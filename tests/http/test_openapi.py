"""The description of the API comes from the table that serves, complete and self-contained."""

from __future__ import annotations

import re
from typing import Any

import pytest

from support.web import ROUTES, Web

pytestmark = pytest.mark.anyio


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

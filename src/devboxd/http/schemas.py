"""JSON schemas of the types on the wire, with what their fields mean and an example of each."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from devboxd.http import field_docs


def of(kinds: Sequence[Any], template: str) -> tuple[list[dict[str, Any]], dict[str, dict[str, Any]]]:
    """The schema of each type, and those of the Structs to which they refer by `template`, by name."""
    schemas, components = msgspec.json.schema_components(kinds, ref_template=template)
    for kind in structs(kinds):
        component = components[kind.__name__]
        component["description"] = inspect.getdoc(kind) or ""
        for name, field in field_docs.of(kind).items():
            shape = component["properties"][name]
            shape["description"] = field.text
            if field.has_example:
                shape["examples"] = [field.example]
    return list(schemas), components


def meaning(kind: type) -> str:
    """What a type is, in a sentence or two: the first paragraph of its docstring."""
    return " ".join((inspect.getdoc(kind) or "").partition("\n\n")[0].split())


def structs(kinds: Sequence[Any]) -> list[type]:
    """All Structs and dataclasses in these types, each once, the outer ones first."""
    found: dict[type, None] = {}
    pending = list(kinds)
    while pending:
        kind = pending.pop(0)
        if _has_fields(kind) and kind not in found:
            found[kind] = None
            pending.extend(typing.get_type_hints(kind, include_extras=True).values())
        pending.extend(typing.get_args(kind))
    return list(found)


def example(kind: type) -> Iterator[tuple[str, Any]]:
    """The fields of a body with which the least is asked for: those that it must have, or else the first."""
    docs = field_docs.of(kind)
    fields = [field for field in msgspec.structs.fields(kind) if field.name in docs and docs[field.name].has_example]
    for field in [field for field in fields if field.required] or fields[:1]:
        yield field.encode_name, docs[field.name].example


def _has_fields(kind: Any) -> bool:
    return isinstance(kind, type) and (issubclass(kind, msgspec.Struct) or dataclasses.is_dataclass(kind))

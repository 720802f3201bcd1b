"""What the fields of a type mean: the docstrings that stand below them, each with an example in JSON at its end."""

from __future__ import annotations

import ast
import inspect
import json
import re
import textwrap
from dataclasses import dataclass
from functools import cache
from typing import Any

_EXAMPLE = re.compile(r"\s*Example:\s*`(.+)`$", re.DOTALL)


@dataclass(frozen=True)
class FieldDoc:
    """What a field means, and the JSON value of its example where it has one."""

    text: str
    example: Any = None
    has_example: bool = False


@cache
def of(kind: type) -> dict[str, FieldDoc]:
    """The docs of all fields of a Struct or dataclass that have a docstring, by name."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    assert isinstance(definition, ast.ClassDef)
    found = {}
    for field, after in zip(definition.body, definition.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name) and (text := _text(after)):
            found[field.target.id] = _parsed(text)
    return found


def _text(statement: ast.stmt) -> str:
    value = statement.value if isinstance(statement, ast.Expr) else None
    return " ".join(str(value.value).split()) if isinstance(value, ast.Constant) else ""


def _parsed(text: str) -> FieldDoc:
    if (match := _EXAMPLE.search(text)) is None:
        return FieldDoc(text)
    return FieldDoc(text[: match.start()], json.loads(match[1]), has_example=True)

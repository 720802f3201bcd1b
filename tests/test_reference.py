"""The documents say what the program says, and name only what exists."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
_NAMED = re.compile(r"`([\w/]+\.(?:py|c))::([\w.]+)`")
_LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
_PLACES = ("src/devboxd", "src/devboxd/engine", "src/devboxd/executions", "tests", ".")


def _generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("generate_reference", ROOT / "scripts" / "generate_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "page",
    [*(f"reference/{n}.md" for n in ("settings", "cli", "operations")), "explanation/states.md", "../SPECIFICATION.md"],
)
def test_the_reference_is_up_to_date(page: str) -> None:
    generator = _generator()
    assert page in generator.PAGES
    assert page not in generator.outdated(), "run .venv/bin/python scripts/generate_reference.py and commit the result"


def test_links_lead_somewhere() -> None:
    broken = [
        f"{document.relative_to(ROOT)}: {link}"
        for document in DOCUMENTS
        for link in _LINK.findall(document.read_text())
        if not (document.parent / link).exists()
    ]
    assert not broken, "\n".join(broken)


def test_functions_and_tests_that_are_named_exist() -> None:
    missing = [
        f"{document.relative_to(ROOT)}: {file}::{name}"
        for document in DOCUMENTS
        for file, name in _NAMED.findall(document.read_text())
        if not any(_defines(text, name.rpartition(".")[2]) for text in _texts(file))
    ]
    assert not missing, "\n".join(missing)


def _texts(file: str) -> Iterator[str]:
    return ((ROOT / place / file).read_text() for place in _PLACES if (ROOT / place / file).is_file())


def _defines(text: str, name: str) -> bool:
    return re.search(rf"^\s*(?:(?:async )?def |class |void |){re.escape(name)}\b[(:\s]", text, re.MULTILINE) is not None

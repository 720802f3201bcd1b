"""What import-linter does not hold: no circles, no folder that reaches into the API of another, small files."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import devboxd

ROOT = Path(devboxd.__file__).parent


def modules() -> dict[str, ast.Module]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = ast.parse(path.read_text())
    return found


def imports(tree: ast.Module, known: set[str], *, at_start: bool = False) -> set[str]:
    """The package's modules that this one imports; `at_start` leaves out imports inside functions."""
    found: set[str] = set()
    for node in _statements(tree) if at_start else ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, "imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= names & known or {node.module}
    return {name for name in found if name.split(".")[0] == "devboxd" and name != "devboxd"}


def _statements(tree: ast.AST) -> Iterator[ast.AST]:
    """What is imported with the module, for types alone too: no bodies of functions."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        yield node
        yield from _statements(node)


def part(name: str) -> str:
    """The folder or file right under the package."""
    return name.split(".")[1] if "." in name else ""


def test_no_folder_imports_the_api_of_another() -> None:
    known = modules()
    wrong = [
        f"{name} imports {other}"
        for name, tree in known.items()
        for other in imports(tree, set(known))
        if other.endswith(".api") and part(name) != "routes" and other.rpartition(".")[0] != name.rpartition(".")[0]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_modules_import_each_other_in_a_circle() -> None:
    known = modules()
    graph = {name: imports(tree, set(known), at_start=True) & set(known) for name, tree in known.items()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in sorted(graph[name]):
                visit(other, (*path, name))
            done.add(name)

    for name in sorted(graph):
        visit(name, ())


def test_files_and_functions_stay_small() -> None:
    wrong = []
    for path in ROOT.rglob("*.py"):
        text = path.read_text()
        if (lines := text.count("\n")) >= 600:
            wrong.append(f"{path.name}: {lines} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
                size = node.end_lineno - node.lineno + 1
                if size > 60:
                    wrong.append(f"{path.name}: {node.name} has {size} lines")
    assert not wrong, "\n".join(wrong)

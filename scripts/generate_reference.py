"""Write docs/reference/settings.md, cli.md and operations.md from the program itself.

Usage: generate_reference.py [--check]. With --check nothing is written; the exit code is 1 when a page is out of date.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import msgspec

from devboxd import config
from devboxd.cli import cli
from devboxd.config import PREFIX, Settings
from devboxd.http import openapi
from devboxd.http.binding import Route
from devboxd.routes import ROUTES
from devboxd.unimplemented import UNIMPLEMENTED

FOLDER = Path(__file__).parent.parent / "docs" / "reference"
_MADE = "<!-- Made by scripts/generate_reference.py; do not edit. -->\n"
_WIDTH = 100


def settings() -> str:
    """The page on settings: one row each, in the order of the class."""
    (body,) = (
        node.body
        for node in ast.parse(inspect.getsource(config)).body
        if isinstance(node, ast.ClassDef) and node.name == Settings.__name__
    )
    words = {}
    for field, after in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant):
            words[ast.unparse(field.target)] = " ".join(str(after.value.value).split())
    rows = [
        f"| `{field.name}` | `{PREFIX}{field.name.upper()}` | {_value(field.default)} | {words[field.name]} |"
        for field in msgspec.structs.fields(Settings)
    ]
    return (
        "# Settings\n\n" + _MADE + "\nDefaults, then the file of settings, then the environment, then options of the "
        "command line; the later one wins. The\n"
        f"file is `{config.DEFAULT_FILE}`, or what `--config` or `{PREFIX}CONFIG` names, in TOML. Lists are arrays\n"
        "there, and text with commas in the environment. An unknown key or a value that does not fit stops the\n"
        "program, with exit code 2.\n\n"
        "| key in the file | in the environment | default | meaning |\n|---|---|---|---|\n" + "\n".join(rows) + "\n"
    )


def _value(default: Any) -> str:
    if default is None:
        return "unset"
    if default == ():
        return "empty"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    return f"`{default}`"


def command_line() -> str:
    """The page on the command line: what `--help` prints, for each command."""
    parts = [
        "# The command line\n\n" + _MADE + "\nExit codes: 0 for success, 2 for a refusal (by the command line, the "
        'machine or the server), which is one line on standard\nerror that begins with "cannot"; `doctor` ends with '
        "2 when `serve` would refuse, and `boxes exec` with\nthe exit code of its command.\n"
    ]
    parts += [f"\n## {name}\n\n```text\n{text}\n```\n" for name, text in _commands(cli, None, "devboxd")]
    return "".join(parts)


def _commands(command: click.Command, parent: click.Context | None, name: str) -> Iterator[tuple[str, str]]:
    settings = {**command.context_settings, "max_content_width": _WIDTH, "terminal_width": _WIDTH}
    with click.Context(command, info_name=name, parent=parent, **settings) as context:
        text = "\n".join(line.rstrip() for line in command.get_help(context).splitlines())
        yield context.command_path, text.rstrip()
        if isinstance(command, click.Group):
            for own in command.list_commands(context):
                inner = command.get_command(context, own)
                if inner is not None:
                    yield from _commands(inner, context, own)


def operations() -> str:
    """The page on operations: the route table with the first sentence of each handler."""
    parts = [
        "# Operations\n\n" + _MADE + "\nA running server shows the same table with all fields at `/docs`, and as "
        "OpenAPI 3.1 at `/openapi.json`. *Once*: repeated\nwith the same `x-request-id`, it is not done again. "
        "`GET /healthz` needs no key.\n"
    ]
    for tag in openapi.TAGS:
        rows = "".join(_row(route) for route in ROUTES if openapi.tag(route) == tag)
        if rows:
            parts.append(f"\n## {tag}\n\n| operation | what it does | once |\n|---|---|---|\n{rows}")
    parts.append("\n## Not in this version\n\nAnswered by 501, with what to do instead.\n")
    for why, group in itertools.groupby(UNIMPLEMENTED, key=lambda row: row.why):
        rows = "".join(f"| `{row.method} {row.path}` | {row.name} |\n" for row in group)
        parts.append(f"\n{why[:1].upper()}{why[1:]}:\n\n| operation | name |\n|---|---|\n{rows}")
    return "".join(parts)


def _row(route: Route) -> str:
    words = " ".join((inspect.getdoc(route.handler) or "").split("\n\n")[0].split())
    return f"| `{route.method} {route.path}` | {words.replace('|', chr(92) + '|')} | {'yes' if route.once else ''} |\n"


PAGES: dict[str, Callable[[], str]] = {
    "settings.md": settings,
    "cli.md": command_line,
    "operations.md": operations,
}


def outdated() -> list[str]:
    """The names of pages that are not as the program would write them now."""
    return [
        name
        for name, make in PAGES.items()
        if not (FOLDER / name).exists() or (FOLDER / name).read_text(encoding="utf-8") != make()
    ]


def main() -> int:
    """Write the pages, or only compare them."""
    stale = outdated()
    for name in stale:
        if "--check" not in sys.argv:
            (FOLDER / name).write_text(PAGES[name](), encoding="utf-8")
        print(f"{'out of date' if '--check' in sys.argv else 'written'}: docs/reference/{name}")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())

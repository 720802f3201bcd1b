"""Write what the documents say of the program from the program itself, and the index of the specification.

The pages: docs/reference/settings.md, cli.md, operations.md, docs/explanation/states.md, SPECIFICATION.md.

Usage: generate_reference.py [--check]. With --check nothing is written; the exit code is 1 when a page is out of date.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import msgspec

from devboxd import config
from devboxd.cli import cli
from devboxd.config import PREFIX, Settings
from devboxd.devboxes.states import TABLE, TERMINAL, WORK, Event, Refusal, Status, Transition
from devboxd.http import openapi
from devboxd.http.binding import Route
from devboxd.routes import ROUTES
from devboxd.unimplemented import UNIMPLEMENTED

FOLDER = Path(__file__).parent.parent / "docs"
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


def states() -> str:
    """The page on the states of a devbox: the diagram, the work of each status, and every pair of the table."""
    edges: dict[tuple[Status, Status], list[str]] = {}
    for event, row in TABLE.items():
        for status, found in row.items():
            if isinstance(found, Transition) and found.status is not status:
                edges.setdefault((status, found.status), []).append(event.value)
    arrows = "".join(f"    {was} --> {now}: {', '.join(events)}\n" for (was, now), events in edges.items())
    ends = "".join(f"    {status} --> [*]\n" for status in Status if status in TERMINAL)
    work = "".join(f"| `{status}` | {WORK[status].replace('_', ' ')} |\n" for status in Status)
    heads = " | ".join(f"`{status}`" for status in Status)
    rows = "".join(f"| {event.value} | {' | '.join(_pair(event, status) for status in Status)} |\n" for event in Event)
    return (
        "# The states of a devbox\n\n" + _MADE + "\nEvery change of a devbox is an event. `devboxes/states.py` says "
        "what it means in each status; `devboxes/changes.py` writes\nthat; `devboxes/supervisor.py` does the work of "
        "the status that comes of it. A server that was killed finds the status\nin the store and goes on with its "
        "work.\n\n"
        f"```mermaid\nstateDiagram-v2\n    [*] --> provisioning\n{arrows}{ends}```\n\n"
        f"| status | work of its supervisor |\n|---|---|\n{work}\n"
        "## Every pair\n\nA number is the status of the answer to a request that is refused; `=` changes nothing; an "
        "empty cell is an event that\nthe server never raises in that status, and InvalidTransition when it does.\n\n"
        f"| event | {heads} |\n|---|{'---|' * len(Status)}\n{rows}"
    )


def _pair(event: Event, status: Status) -> str:
    found = TABLE[event].get(status)
    if found is None:
        return ""
    if isinstance(found, Refusal):
        return str(found.code)
    return "=" if found.status is status else found.status.value


_ROW = re.compile(r"^\| [A-Z]+-\d+ \| .* \| (held|partly|unguarded)[^|]*\|$", re.MULTILINE)


def specification() -> str:
    """The index of the specification: its pages, and how many promises of each are held, partly held and unguarded."""
    parts = [
        "# Specification\n\n" + _MADE + "\nEvery promise of devboxd has a row with an id that stays, the test that "
        "fails when it is broken, and its status:\n\n- **held**: the tests would fail;\n- **partly**: they would not "
        "in the case that is named;\n- **unguarded**: no test would.\n\nTests are named by their path below `tests/`; "
        "`tests/test_reference.py` checks that each exists.\n\n"
        "| area | promises | held | partly | unguarded |\n|---|---|---|---|---|\n"
    ]
    total: Counter[str] = Counter()
    for page in sorted((FOLDER / "specification").glob("*.md")):
        text = page.read_text(encoding="utf-8")
        if counts := Counter(_ROW.findall(text)):
            title = text.partition("\n")[0].removeprefix("# ")
            parts.append(_counted(f"[{title}](docs/specification/{page.name})", counts))
            total += counts
    parts.append(_counted("**all**", total))
    return "".join(parts) + (
        "\nBeside these: [performance](docs/performance.md), the figures of `make bench` with their marks, missed ones "
        "too;\n[a whole machine](docs/specification/machine.md), what `make vm` saw in Debian 13 and 12;\n"
        "[open](docs/specification/open.md), what a careful user should know.\n"
    )


def _counted(name: str, counts: Counter[str]) -> str:
    figures = (counts.total(), counts["held"], counts["partly"], counts["unguarded"])
    return f"| {name} | {' | '.join(map(str, figures))} |\n"


PAGES: dict[str, Callable[[], str]] = {
    "../SPECIFICATION.md": specification,
    "reference/settings.md": settings,
    "reference/cli.md": command_line,
    "reference/operations.md": operations,
    "explanation/states.md": states,
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
        print(f"{'out of date' if '--check' in sys.argv else 'written'}: docs/{name}")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())

"""`devboxd doctor`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from devboxd.cli.options import as_json_option, config_option, load_settings, state_option
from devboxd.cli.printing import console as new_console

if TYPE_CHECKING:
    from devboxd.config import Settings
    from devboxd.doctor import Check


@click.command("doctor")
@as_json_option
@config_option
@state_option
def doctor(as_json: bool, config: Path | None, state: Path | None) -> None:
    """Check this machine.

    Tells what it offers, which walls are therefore up, and for each lack the cause and the cure.
    """
    sys.exit(run(load_settings(config, state=state), as_json))


def run(settings: Settings, as_json: bool) -> int:
    """Print all checks. The result is the exit code: 0, or 2 when `serve` would refuse."""
    from devboxd.doctor import checks

    found = checks(settings)
    if as_json:
        print(json.dumps([asdict(check) for check in found], indent=2))
    else:
        _show(found)
    return 2 if any(check.level == "error" for check in found) else 0


def _show(found: Iterable[Check]) -> None:
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    console = new_console()
    whole = not console.is_terminal  # one line for each thing that is said, for other programs
    signs = {"ok": ("ok", "green"), "warning": ("!", "yellow"), "error": ("x", "bold red")}
    counts = dict.fromkeys(signs, 0)
    for check in found:
        sign, style = signs[check.level]
        counts[check.level] += 1
        head = Text.assemble((check.name, "bold"), ": ", check.found)
        consequence = Text(check.consequence, style="dim")
        if whole:
            console.print(Text(f"{sign:>2} ") + head, Text("     ") + consequence, sep="\n", soft_wrap=True)
        else:
            grid = Table.grid()
            grid.add_row(Text(f"{sign:>2} ", style), head)
            console.print(grid, Padding(consequence, (0, 0, 0, 5)))
        if check.cure:
            # In one line, however long: it may be a command to be copied.
            console.print(Text.assemble(("     cure: ", "cyan"), check.cure), soft_wrap=True)
    end = "serve refuses to start" if counts["error"] else "serve can start here"
    console.print(
        f"\n{end}: {counts['ok']} ok, {counts['warning']} to know about, {counts['error']} in the way", soft_wrap=whole
    )

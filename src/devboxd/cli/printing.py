"""What commands print: tables, dates, sizes, progress and refusals."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import click

from devboxd.errors import SetupError

if TYPE_CHECKING:
    from rich.console import Console

T = TypeVar("T")
_LEAST = 12
"""Characters of the last column that a line shall hold, if it has so many."""


def say(text: str) -> int:
    """Print on standard error; the exit code of a refusal."""
    click.echo(text, err=True)
    return 2


def refuse(message: str) -> int:
    """Print why something was not done; the exit code.

    In one line, but for what another program said in lines of its own, which begin with two spaces.
    """
    quotes = any(line.startswith("  ") for line in message.splitlines())
    return say("\n".join(map(str.rstrip, message.splitlines())) if quotes else " ".join(message.split()))


def table(titles: tuple[str, ...], rows: Sequence[tuple[str, ...]], drop: Sequence[str] = ()) -> None:
    """Columns on a terminal; on a pipe one line per row, fields set apart by tabs, for other programs.

    Where the terminal is too narrow the columns `drop` are left out, the first one first; nothing is ever cut. The last
    column may go on in the next line.
    """
    shown = [tuple(printable(cell) for cell in row) for row in rows]
    if not sys.stdout.isatty():
        for row in shown:
            click.echo("\t".join(row))
        return
    widths = [max(map(len, column)) for column in zip(titles, *shown, strict=True)]
    kept = list(range(len(titles)))
    for title in drop:
        if sum(widths[number] + 2 for number in kept[:-1]) + min(widths[-1], _LEAST) > _columns():
            kept.remove(titles.index(title))
    for row in (titles, *shown):
        click.echo("  ".join(row[number].ljust(widths[number]) for number in kept).rstrip())


def _columns() -> int:
    from shutil import get_terminal_size

    return get_terminal_size().columns


def console(*, stderr: bool = False) -> Console:
    """A console for what needs more than lines; without colours where NO_COLOR asks for none."""
    from rich.console import Console

    class Plain(Console):
        """A console that leaves it to `main` what follows when nobody reads."""

        def on_broken_pipe(self) -> None:
            raise BrokenPipeError

    return Plain(stderr=stderr, highlight=False, color_system=None if os.environ.get("NO_COLOR") else "auto")


def printable(text: str, keep: str = "") -> str:
    """Names and output come from users and boxes: no escape sequence of theirs may reach the terminal."""
    return "".join(sign if sign.isprintable() or sign in keep else "\N{REPLACEMENT CHARACTER}" for sign in text)


def size(number: int | None) -> str:
    """Bytes for a person."""
    if number is None:
        return "-"
    from rich.filesize import decimal

    return decimal(number)


def date(time_ms: int) -> str:
    """Unix time in milliseconds as the local date and time."""
    from datetime import datetime

    return datetime.fromtimestamp(time_ms / 1000).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def with_progress(work: Callable[[Callable[[float, str], None]], Coroutine[Any, Any, T]]) -> T:
    """Do something that takes its time, with a bar on standard error."""
    import asyncio

    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from devboxd import logs
    from devboxd.engine.base import EngineError

    logs.configure("auto")
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    bar = Progress(*columns, console=console(stderr=True))
    task = bar.add_task("", total=1.0)

    def show(done: float, text: str) -> None:
        bar.start()  # only now: what is refused at once shows no progress
        bar.update(task, completed=done, description=text)

    try:
        return asyncio.run(work(show))
    except EngineError as error:
        raise SetupError(str(error)) from error
    finally:
        if bar.live.is_started:
            bar.stop()

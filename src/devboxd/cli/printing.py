"""What commands print: tables, dates, sizes, progress and refusals."""

from __future__ import annotations

import sys
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import click

from devboxd.errors import SetupError

T = TypeVar("T")


def say(text: str) -> int:
    """Print on standard error; the exit code of a refusal."""
    click.echo(text, err=True)
    return 2


def refuse(message: str) -> int:
    """Print why something was not done, in one line; the exit code."""
    return say(" ".join(message.split()))


def table(titles: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Columns on a terminal; on a pipe one line per row, fields set apart by tabs, for other programs."""
    if not sys.stdout.isatty():
        for row in rows:
            click.echo("\t".join(printable(cell) for cell in row))
        return
    from rich.console import Console
    from rich.table import Table

    shown = Table(*titles, box=None, pad_edge=False)
    for row in rows:
        shown.add_row(*(printable(cell).replace("[", r"\[") for cell in row))
    Console().print(shown)


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

    from rich.console import Console
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
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=1.0, visible=False)  # what is refused at once never showed progress

        def show(done: float, text: str) -> None:
            bar.update(task, completed=done, description=text, visible=True)

        try:
            return asyncio.run(work(show))
        except EngineError as error:
            raise SetupError(str(error)) from error

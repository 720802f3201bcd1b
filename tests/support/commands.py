"""`devboxd` as a process of its own, and the form of its refusals."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import click

from devboxd.cli import cli

NO_KEY = {"DEVBOXD_KEY": "", "RUNLOOP_API_KEY": "", "DEVBOXD_URL": "", "RUNLOOP_BASE_URL": ""}


def devboxd(*arguments: str, env: dict[str, str] | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
    options.setdefault("stdin", subprocess.DEVNULL if "input" not in options else None)
    return subprocess.run(
        [sys.executable, "-m", "devboxd.cli", *arguments], text=True, capture_output=True, timeout=120, check=False,
        env={**os.environ, **NO_KEY, "DEVBOXD_CONFIG": "/dev/null", **(env or {})}, **options,
    )  # fmt: skip


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    assert done.returncode == 2, done
    assert done.stdout == ""
    assert done.stderr.startswith("cannot "), done.stderr
    assert done.stderr.count("\n") == 1
    for word in words:
        assert word in done.stderr


def every_command() -> list[tuple[str, ...]]:
    """The words of each command and group of commands."""
    return list(_within(cli, ()))


def _within(command: click.Command, words: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    yield words
    for name, inner in getattr(command, "commands", {}).items():
        yield from _within(inner, (*words, name))

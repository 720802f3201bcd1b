"""The shapes of executions on the wire."""

from __future__ import annotations

from typing import Literal

import msgspec

from devboxd.executions.store import QUEUED, Execution


class Execute(msgspec.Struct, frozen=True):
    """Run a command and wait for a while; `command_id` is its handle and makes repeating safe."""

    command: str
    command_id: str | None = None
    optimistic_timeout: float | None = None
    shell_name: str | None = None
    attach_stdin: bool | None = None


class ExecuteAsync(msgspec.Struct, frozen=True):
    """Start a command; with `attach_stdin` it can be sent text."""

    command: str
    shell_name: str | None = None
    attach_stdin: bool | None = None


class ExecuteSync(msgspec.Struct, frozen=True):
    """Run a command to its end."""

    command: str
    shell_name: str | None = None
    attach_stdin: bool | None = None


class Kill(msgspec.Struct, frozen=True):
    """What to end: the launched process, or its whole process group."""

    kill_process_group: bool | None = None


class SendStdIn(msgspec.Struct, frozen=True):
    """Exactly one of a text that is not empty or a signal."""

    text: str | None = None
    signal: Literal["EOF", "INTERRUPT"] | None = None


class SendStdInResult(msgspec.Struct, frozen=True):
    """Whether the text or signal was taken: true means that it will be delivered, once and in order."""

    devbox_id: str
    execution_id: str
    success: bool


class ExecutionView(msgspec.Struct, frozen=True):
    """An execution as clients see it; output is the last lines so far, null while it is queued."""

    devbox_id: str
    execution_id: str
    status: str
    exit_status: int | None
    stdout: str | None
    stderr: str | None
    stdout_truncated: bool | None
    stderr_truncated: bool | None
    shell_name: str | None


class ExecutionDetailView(msgspec.Struct, frozen=True):
    """The outcome of a command that was waited for."""

    devbox_id: str
    stdout: str
    stderr: str
    exit_status: int
    shell_name: str | None = None


class Chunk(msgspec.Struct, frozen=True):
    """A piece of output; `offset` is the byte position of its first byte in the stream."""

    output: str
    offset: int


def view_of(row: Execution, out: str, err: str, out_cut: bool, err_cut: bool) -> ExecutionView:
    """The view of an execution with this output; one that is queued has none yet."""
    queued = row.status == QUEUED
    return ExecutionView(
        devbox_id=row.devbox_id,
        execution_id=row.handle,
        status=row.status,
        exit_status=row.exit_status,
        stdout=None if queued else out,
        stderr=None if queued else err,
        stdout_truncated=None if queued else out_cut,
        stderr_truncated=None if queued else err_cut,
        shell_name=row.shell_name,
    )

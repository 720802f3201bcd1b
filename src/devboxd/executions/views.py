"""The shapes of executions on the wire."""

from __future__ import annotations

from typing import Literal

import msgspec

from devboxd.executions.store import QUEUED, Execution


class Execute(msgspec.Struct, frozen=True):
    """Run a command and wait for a while; `command_id` is its handle and makes repeating safe."""

    command: str
    """The command, run by `bash -lc` as the user of the devbox in the home directory. At most 100 MB. Example: `"make
    test"`
    """
    command_id: str | None = None
    """Its handle, which the client makes up: the same one again gives the same execution. Example: `"cmd-1"`"""
    optimistic_timeout: float | None = None
    """Seconds that the answer is held for its end: at most 24. Null: 24. Example: `20`"""
    shell_name: str | None = None
    """The named shell in which it runs, one command at a time: its directory, variables and functions stay for the
    next. Null: a shell of its own. Example: `"main"`
    """
    attach_stdin: bool | None = None
    """Whether `send_std_in` can give it text. Without it the command meets the end of its stdin at once. Example:
    `false`
    """


class ExecuteAsync(msgspec.Struct, frozen=True):
    """Start a command; with `attach_stdin` it can be sent text."""

    command: str
    """The command, run by `bash -lc` as the user of the devbox in the home directory. At most 100 MB. Example: `"make
    test"`
    """
    shell_name: str | None = None
    """The named shell in which it runs, one command at a time: its directory, variables and functions stay for the
    next. Null: a shell of its own. Example: `"main"`
    """
    attach_stdin: bool | None = None
    """Whether `send_std_in` can give it text. Without it the command meets the end of its stdin at once. Example:
    `true`
    """


class ExecuteSync(msgspec.Struct, frozen=True):
    """Run a command to its end."""

    command: str
    """The command, run by `bash -lc` as the user of the devbox in the home directory. At most 100 MB. Example: `"make
    test"`
    """
    shell_name: str | None = None
    """The named shell in which it runs, one command at a time: its directory, variables and functions stay for the
    next. Null: a shell of its own. Example: `"main"`
    """
    attach_stdin: bool | None = None
    """Whether `send_std_in` can give it text. Without it the command meets the end of its stdin at once. Example:
    `false`
    """


class Kill(msgspec.Struct, frozen=True):
    """What to end: the command with all that it waits for, or its background jobs as well."""

    kill_process_group: bool | None = None
    """Whether its whole process group is ended, background jobs too. Null: they go on. Example: `true`"""


class SendStdIn(msgspec.Struct, frozen=True):
    """Exactly one of a text that is not empty, bytes that are not empty, or a signal."""

    text: str | None = None
    r"""Text, at most 8 MiB. Example: `"yes\n"`"""
    base64: str | None = None
    """Any bytes, in base64; an extension of this server. At most 8 MiB of them. Example: `"AP8K"`"""
    signal: Literal["EOF", "INTERRUPT"] | None = None
    """EOF ends its stdin; INTERRUPT is what Ctrl-C sends. Example: `"EOF"`"""


class SendStdInResult(msgspec.Struct, frozen=True):
    """Whether the text or signal was taken: true means that it will be delivered, once and in order."""

    devbox_id: str
    """The devbox. Example: `"dbx_0BwT25a4ESR05DXUEbW3kZ"`"""
    execution_id: str
    """The execution. Example: `"exe_0BwT25a4ESR05DXUEbW3kZ"`"""
    success: bool
    """Whether it was taken. Example: `true`"""


class ExecutionView(msgspec.Struct, frozen=True):
    """An execution as clients see it; output is the last lines so far, null while it is queued."""

    devbox_id: str
    """The devbox. Example: `"dbx_0BwT25a4ESR05DXUEbW3kZ"`"""
    execution_id: str
    """The id, by which all operations name it. Example: `"exe_0BwT25a4ESR05DXUEbW3kZ"`"""
    status: str
    """queued, running or completed. Example: `"completed"`"""
    exit_status: int | None
    """The exit code, 128 and the number for a signal; null until it has completed. Example: `0`"""
    stdout: str | None
    r"""The last lines of its standard output. Example: `"ok\n"`"""
    stderr: str | None
    """The last lines of its standard error. Example: `""`"""
    stdout_truncated: bool | None
    """Whether there is more than was told. Example: `false`"""
    stderr_truncated: bool | None
    """Whether there is more than was told. Example: `false`"""
    shell_name: str | None
    """The named shell in which it runs; null for one of its own. Example: `null`"""


class ExecutionDetailView(msgspec.Struct, frozen=True):
    """The outcome of a command that was waited for."""

    devbox_id: str
    """The devbox. Example: `"dbx_0BwT25a4ESR05DXUEbW3kZ"`"""
    stdout: str
    r"""Its standard output. Example: `"ok\n"`"""
    stderr: str
    """Its standard error. Example: `""`"""
    exit_status: int
    """The exit code, 128 and the number for a signal. Example: `0`"""
    shell_name: str | None = None
    """The named shell in which it ran; null for one of its own. Example: `null`"""


class Chunk(msgspec.Struct, frozen=True, omit_defaults=True):
    """A piece of output; `offset` is the byte position of its first byte in the stream."""

    output: str
    r"""Text; bytes that are no UTF-8 are replaced. Example: `"ok\n"`"""
    offset: int
    """Where its first byte stands in the stream, from 0. Example: `0`"""
    base64: str | None = None
    """With `encoding=base64`, an extension of this server: the bytes themselves, and `output` is empty. Example:
    `"b2sK"`
    """


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

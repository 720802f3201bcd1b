"""The operations on executions: each checks the devbox, then does one thing."""

from __future__ import annotations

import base64
from typing import Annotated

import msgspec
from starlette.responses import Response

from devboxd.errors import bad_request, timed_out
from devboxd.executions.directory import DevboxDirectory
from devboxd.executions.journals import Stream
from devboxd.executions.looking import Looking
from devboxd.executions.output import lines_wanted
from devboxd.executions.running import Executions
from devboxd.executions.store import COMPLETED, QUEUED, RUNNING, Execution
from devboxd.executions.views import (
    Chunk,
    Execute,
    ExecuteAsync,
    ExecuteSync,
    ExecutionDetailView,
    ExecutionView,
    Kill,
    SendStdIn,
    SendStdInResult,
)
from devboxd.http.operation import Call
from devboxd.http.parameters import Encoding, LastLines, Offset
from devboxd.http.streams import HELD_S, Places, events

_STATUSES = frozenset({QUEUED, RUNNING, COMPLETED})
_COMPLETED = frozenset({COMPLETED})
_WAIT_S = 25.0


class WaitForExecution(msgspec.Struct, frozen=True):
    """Which statuses end a wait, and after how many seconds it gives up."""

    statuses: list[str]
    """Statuses of which one ends the wait. Example: `["completed"]`"""
    timeout_seconds: float | None = None
    """Seconds after which the answer is 408: at most 24. Null: 24. Example: `20`"""


async def execute(
    devboxes: DevboxDirectory,
    executions: Executions,
    looking: Looking,
    call: Call,
    devbox_id: str,
    body: Execute,
    last_n: LastLines = None,
) -> Annotated[ExecutionView, 429]:
    """Run a command and wait at most `optimistic_timeout` seconds (24 at most) for its end; it is never stopped.

    ```python
    run = client.devboxes.execute(box.id, command="make test", command_id="cmd-1")
    ```
    """
    lines = lines_wanted(last_n)
    _no_stdin(body.attach_stdin)
    hold = _seconds(body.optimistic_timeout, _WAIT_S, "optimistic_timeout")
    await _usable(devboxes, call, devbox_id)
    row = await executions.start(
        devbox_id, body.command, handle=body.command_id, shell_name=body.shell_name, once=call.once
    )
    reached = await looking.reached(row, _COMPLETED, hold)
    return looking.view(reached or row, lines)


async def execute_async(
    devboxes: DevboxDirectory, executions: Executions, looking: Looking, call: Call, devbox_id: str, body: ExecuteAsync
) -> Annotated[ExecutionView, 429]:
    """Start a command and return at once; with `attach_stdin` it reads what send_std_in gives it.

    ```python
    run = client.devboxes.execute_async(box.id, command="make test", attach_stdin=True)
    ```
    """
    await _usable(devboxes, call, devbox_id)
    row = await executions.start(
        devbox_id,
        body.command,
        shell_name=body.shell_name,
        attach_stdin=bool(body.attach_stdin),
        once=call.once,
        answers=True,
    )
    return looking.view(row, lines_wanted(None))


async def execute_sync(
    devboxes: DevboxDirectory, executions: Executions, looking: Looking, call: Call, devbox_id: str, body: ExecuteSync
) -> Annotated[ExecutionDetailView, 429]:
    """Run a command to its end, however long that takes.

    ```python
    result = client.devboxes.execute_sync(box.id, command="make test")
    ```
    """
    _no_stdin(body.attach_stdin)
    await _usable(devboxes, call, devbox_id)
    row = await executions.start(devbox_id, body.command, shell_name=body.shell_name, once=call.once)
    return looking.detail(await looking.completed(row))


async def retrieve_execution(
    devboxes: DevboxDirectory,
    looking: Looking,
    call: Call,
    devbox_id: str,
    execution_id: str,
    last_n: LastLines = None,
) -> ExecutionView:
    """The execution with its last lines of output so far.

    ```python
    run = client.devboxes.executions.retrieve(run.execution_id, devbox_id=box.id)
    ```
    """
    lines = lines_wanted(last_n)
    return looking.view(await _find(devboxes, looking, call, devbox_id, execution_id), lines)


async def wait_for_execution(
    devboxes: DevboxDirectory,
    looking: Looking,
    call: Call,
    devbox_id: str,
    execution_id: str,
    body: WaitForExecution,
    last_n: LastLines = None,
) -> ExecutionView:
    """Hold the answer until the execution has one of the statuses; 408 when the time is over first.

    ```python
    run = client.devboxes.executions.await_completed(run.execution_id, devbox_id=box.id)
    ```
    """
    lines = lines_wanted(last_n)
    wanted = frozenset(body.statuses)
    if not wanted or not wanted <= _STATUSES:
        raise bad_request("cannot wait for these statuses: give at least one of queued, running, completed")
    hold = _seconds(body.timeout_seconds, _WAIT_S, "timeout_seconds")
    row = await _find(devboxes, looking, call, devbox_id, execution_id)
    reached = await looking.reached(row, wanted, hold)
    if reached is None:
        raise timed_out(f"cannot say yet that {execution_id} is {' or '.join(sorted(wanted))}; ask again")
    return looking.view(reached, lines)


async def kill_execution(
    devboxes: DevboxDirectory,
    executions: Executions,
    looking: Looking,
    call: Call,
    devbox_id: str,
    execution_id: str,
    body: Kill | None = None,
) -> ExecutionView:
    """End a command and all that it waits for: SIGTERM, after 5 s SIGKILL. One that has completed stays as it is.

    ```python
    client.devboxes.executions.kill(run.execution_id, devbox_id=box.id)
    ```
    """
    row = await _find(devboxes, looking, call, devbox_id, execution_id)
    await executions.kill(row, bool(body is not None and body.kill_process_group))
    row = await _find(devboxes, looking, call, devbox_id, execution_id)
    return looking.view(row, lines_wanted(None))


async def send_std_in(
    devboxes: DevboxDirectory,
    executions: Executions,
    looking: Looking,
    call: Call,
    devbox_id: str,
    execution_id: str,
    body: SendStdIn,
) -> SendStdInResult:
    """Give a running execution text, the end of its stdin (EOF) or an interrupt (SIGINT to its group).

    Bytes that are no text go as `base64`, an extension of this server.

    ```python
    client.devboxes.executions.send_std_in(run.execution_id, devbox_id=box.id, text="yes\\n")
    ```
    """
    if sum(map(bool, (body.signal, body.text, body.base64))) != 1:
        raise bad_request(
            "cannot send to stdin: give exactly one of `text` and `base64` (not empty) and `signal` (EOF or INTERRUPT)"
        )
    content = _bytes(body.base64) if body.base64 else body.text
    row = await _find(devboxes, looking, call, devbox_id, execution_id)
    success = await executions.stdin.send(row, content, body.signal, call.once)
    return SendStdInResult(devbox_id, row.handle, success)


async def stream_stdout_updates(
    devboxes: DevboxDirectory,
    looking: Looking,
    places: Places,
    call: Call,
    devbox_id: str,
    execution_id: str,
    offset: Offset = None,
    encoding: Encoding = None,
) -> Annotated[Response, "text/event-stream", Chunk, 429]:
    """Events with the standard output from byte `offset` on, until the execution has completed.

    ```python
    for chunk in client.devboxes.executions.stream_stdout_updates(run.execution_id, devbox_id=box.id):
        print(chunk.output, end="")
    ```
    """
    return await _stream(devboxes, looking, places, call, devbox_id, execution_id, "stdout", offset, encoding)


async def stream_stderr_updates(
    devboxes: DevboxDirectory,
    looking: Looking,
    places: Places,
    call: Call,
    devbox_id: str,
    execution_id: str,
    offset: Offset = None,
    encoding: Encoding = None,
) -> Annotated[Response, "text/event-stream", Chunk, 429]:
    """Events with the standard error from byte `offset` on, until the execution has completed.

    ```python
    for chunk in client.devboxes.executions.stream_stderr_updates(run.execution_id, devbox_id=box.id):
        print(chunk.output, end="")
    ```
    """
    return await _stream(devboxes, looking, places, call, devbox_id, execution_id, "stderr", offset, encoding)


async def _stream(
    devboxes: DevboxDirectory,
    looking: Looking,
    places: Places,
    call: Call,
    devbox_id: str,
    execution_id: str,
    stream: Stream,
    offset: str | None,
    encoding: str | None,
) -> Response:
    start = offset or "0"
    if not (start.isascii() and start.isdigit() and len(start) <= 18):
        raise bad_request(f"cannot use {start[:64]!r} as offset: the position of a byte, from 0")
    if encoding not in (None, "", "text", "base64"):
        raise bad_request(f"cannot send output as {encoding[:64]!r}: encoding is text or base64")
    row = await _find(devboxes, looking, call, devbox_id, execution_id)
    return events(looking.stream(row, stream, int(start), encoding == "base64"), places)


async def _find(
    devboxes: DevboxDirectory, looking: Looking, call: Call, devbox_id: str, execution_id: str
) -> Execution:
    await devboxes.get(call.account, devbox_id)
    return await looking.get(devbox_id, execution_id)


async def _usable(devboxes: DevboxDirectory, call: Call, devbox_id: str) -> None:
    """Check that the devbox can run commands. A request that has begun one already is answered even after its end."""
    if call.once.ref is None:
        await devboxes.usable(call.account, devbox_id)
    else:
        await devboxes.get(call.account, devbox_id)


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError:  # of other characters than ASCII, too
        raise bad_request("cannot send to stdin: `base64` is not valid base64 (RFC 4648, with its padding)") from None


def _no_stdin(attach: bool | None) -> None:
    if attach:
        raise bad_request("cannot attach stdin to a command that is waited for: use execute_async")


def _seconds(asked: float | None, default: float, field: str) -> float:
    if asked is not None and not asked >= 0:
        raise bad_request(f"cannot wait {asked:g} s: {field} is a number of seconds from 0")
    return min(default if asked is None else asked, HELD_S)

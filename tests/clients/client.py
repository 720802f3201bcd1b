"""Cases that a published Python client runs against a server; `client.py CASE` in that client's environment.

The server's address and key come from the variables that the client reads itself, the devbox from DEVBOX.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import httpx
import runloop_api_client
from runloop_api_client import AsyncRunloop, Runloop
from runloop_api_client.sdk import RunloopSDK

BOX = os.environ.get("DEVBOX", "")
BINARY = bytes(range(256)) * 4096 + b"\r\n\0end"


def lifecycle(client: Runloop) -> None:
    box = client.devboxes.create_and_await_running(
        name="from the client",
        metadata={"purpose": "test"},
        environment_variables={"COLOUR": "green"},
        launch_parameters={"resource_size_request": "X_SMALL", "launch_commands": ["echo launched > launched"]},
    )
    try:
        assert box.status == "running"
        view = client.devboxes.retrieve(box.id)
        assert (view.id, view.name, view.metadata) == (box.id, "from the client", {"purpose": "test"})
        assert [item.status for item in view.state_transitions][-1] == "running"
        assert view.launch_parameters.resource_size_request == "X_SMALL"
        assert client.devboxes.read_file_contents(box.id, file_path="launched") == "launched\n"
        assert run(client, "echo $COLOUR", box.id) == "green\n"
        view = client.devboxes.update(box.id, name="renamed")
        assert (view.name, view.metadata) == ("renamed", {"purpose": "test"})
        assert client.devboxes.update(box.id, metadata={}).metadata == {}
        assert client.devboxes.keep_alive(box.id) is not None
        assert client.devboxes.await_running(box.id).status == "running"
    finally:
        view = client.devboxes.shutdown(box.id)
    assert view.status == "shutdown"
    view = client.devboxes.retrieve(box.id)
    assert (view.status, view.shutdown_reason) == ("shutdown", "api_shutdown")


def create_and_wait_apart(client: Runloop) -> None:
    box = client.devboxes.create()
    assert box.status in ("provisioning", "initializing", "running")
    assert client.devboxes.await_running(box.id).status == "running"
    assert client.devboxes.shutdown(box.id).status == "shutdown"


def lists(client: Runloop) -> None:
    first = client.devboxes.create(name="first")
    second = client.devboxes.create(name="second")
    found = [box.id for box in client.devboxes.list(limit=1000)]
    assert found.index(second.id) < found.index(first.id), "newest first"
    page = client.devboxes.list(limit=1)
    assert page.has_more
    assert len(page.devboxes) == 1
    walked = []
    for box in client.devboxes.list(limit=1):
        walked.append(box.id)
        if box.id == first.id:
            break
    assert walked[-1] == first.id
    assert len(walked) == len(set(walked))
    client.devboxes.await_running(first.id)
    client.devboxes.shutdown(first.id)
    assert first.id not in [box.id for box in client.devboxes.list(status="running", limit=1000)]
    assert first.id in [box.id for box in client.devboxes.list(status="shutdown", limit=1000)]
    client.devboxes.shutdown(second.id)


def execute(client: Runloop) -> None:
    view = client.devboxes.execute_and_await_completion(BOX, command="echo out; echo err >&2; exit 42")
    assert (view.status, view.exit_status, view.stdout, view.stderr) == ("completed", 42, "out\n", "err\n")
    view = client.devboxes.execute_and_await_completion(BOX, command="true")
    assert (view.exit_status, view.stdout, view.stderr) == (0, "", "")
    view = client.devboxes.execute_and_await_completion(BOX, command="sleep 2; echo late", optimistic_timeout=1)
    assert view.stdout == "late\n"
    view = client.devboxes.execute_and_await_completion(BOX, command="seq 1000", last_n="3")
    assert (view.stdout, view.stdout_truncated) == ("998\n999\n1000\n", True)


def execute_once(client: Runloop) -> None:
    """The same command_id is the same execution, however often it is sent."""
    command_id = str(uuid.uuid4())
    views = [
        client.devboxes.execute(BOX, command=f"echo x >> {command_id}; cat {command_id}", command_id=command_id)
        for _ in range(3)
    ]
    assert len({view.execution_id for view in views}) == 1
    assert [view.stdout for view in views] == ["x\n"] * 3


def execute_sync(client: Runloop) -> None:
    view = client.devboxes.execute_sync(BOX, command="echo out; echo err >&2; exit 3")
    assert (view.exit_status, view.stdout, view.stderr) == (3, "out\n", "err\n")


def stdin(client: Runloop) -> None:
    execution = client.devboxes.execute_async(BOX, command="cat; echo end >&2", attach_stdin=True)
    ids = {"execution_id": execution.execution_id, "devbox_id": BOX}
    for text in ("first\n", "zweites ü\n", "x" * 100_000 + "\n"):
        assert client.devboxes.executions.send_std_in(**ids, text=text).success
    assert client.devboxes.executions.send_std_in(**ids, signal="EOF").success
    view = client.devboxes.executions.await_completed(execution.execution_id, devbox_id=BOX)
    assert view.stdout == "first\nzweites ü\n" + "x" * 100_000 + "\n"
    assert (view.stderr, view.exit_status) == ("end\n", 0)
    assert not client.devboxes.executions.send_std_in(**ids, text="too late").success


def interrupt(client: Runloop) -> None:
    execution = client.devboxes.execute_async(BOX, command="sleep 60", attach_stdin=True)
    sent = client.devboxes.executions.send_std_in(execution.execution_id, devbox_id=BOX, signal="INTERRUPT")
    assert sent.success
    view = client.devboxes.executions.await_completed(execution.execution_id, devbox_id=BOX)
    assert view.exit_status == 130


def streams(client: Runloop) -> None:
    """Both streams are live: what is sent is read back before more is sent."""
    command = 'while read -r line; do echo "out $line"; echo "err $line" >&2; done'
    execution = client.devboxes.execute_async(BOX, command=command, attach_stdin=True)
    ids = {"execution_id": execution.execution_id, "devbox_id": BOX}
    out = iter(client.devboxes.executions.stream_stdout_updates(**ids))
    err = iter(client.devboxes.executions.stream_stderr_updates(**ids))
    for turn in range(5):
        begun = time.monotonic()
        client.devboxes.executions.send_std_in(**ids, text=f"{turn} é\n")
        assert _line(out) == f"out {turn} é\n"
        assert _line(err) == f"err {turn} é\n"
        assert time.monotonic() - begun < 1, "a stream must not wait for more"
    client.devboxes.executions.send_std_in(**ids, signal="EOF")
    assert "".join(chunk.output for chunk in out) == ""
    assert "".join(chunk.output for chunk in err) == ""
    whole = "".join(f"out {turn} é\n" for turn in range(5))
    again = client.devboxes.executions.stream_stdout_updates(**ids)
    assert "".join(chunk.output for chunk in again) == whole, "a finished stream can be read again"
    rest = client.devboxes.executions.stream_stdout_updates(**ids, offset="9")
    assert "".join(chunk.output for chunk in rest) == whole.encode()[9:].decode()


def large_output(client: Runloop) -> None:
    execution = client.devboxes.execute_async(BOX, command="seq 200000; seq 1000 >&2")
    ids = {"execution_id": execution.execution_id, "devbox_id": BOX}
    text = "".join(chunk.output for chunk in client.devboxes.executions.stream_stdout_updates(**ids))
    assert text == "".join(f"{n}\n" for n in range(1, 200_001))
    view = client.devboxes.executions.await_completed(execution.execution_id, devbox_id=BOX)
    assert view.stdout == "".join(f"{n}\n" for n in range(199_901, 200_001)), "the last hundred lines"
    assert (view.stdout_truncated, view.stderr_truncated) == (True, True)


def kill(client: Runloop) -> None:
    execution = client.devboxes.execute_async(BOX, command="echo up; exec sleep 60")
    ids = {"execution_id": execution.execution_id, "devbox_id": BOX}
    assert _line(iter(client.devboxes.executions.stream_stdout_updates(**ids))) == "up\n"
    assert client.devboxes.executions.retrieve(**ids).status == "running"
    client.devboxes.executions.kill(**ids)
    view = client.devboxes.executions.await_completed(execution.execution_id, devbox_id=BOX)
    assert (view.exit_status, view.stdout) == (143, "up\n")
    client.devboxes.executions.kill(**ids)
    mark = f"6{uuid.uuid4().int % 10**6:06}"
    execution = client.devboxes.execute_async(BOX, command=f"sleep {mark} & sleep {mark}; true")
    ids["execution_id"] = execution.execution_id
    client.devboxes.executions.kill(**ids, kill_process_group=True)
    assert client.devboxes.executions.await_completed(execution.execution_id, devbox_id=BOX).status == "completed"
    assert run(client, f"pgrep -x -f 'sleep {mark}' || echo none") == "none\n", "the whole group is gone"


def named_shell(client: Runloop) -> None:
    shell = f"shell-{uuid.uuid4()}"
    sdk = RunloopSDK(bearer_token=client.bearer_token, base_url=str(client.base_url))
    living = sdk.devbox.from_id(BOX).shell(shell)
    living.exec("cd /tmp; export COLOUR=green; greet() { echo hello $1; }")
    assert living.exec("pwd; echo $COLOUR; greet you").stdout() == "/tmp\ngreen\nhello you\n"
    assert living.exec("exit 3").exit_code == 3
    assert living.exec("pwd; echo $COLOUR").stdout() == "/tmp\ngreen\n"
    order = [living.exec_async(f"sleep 0.2; echo {n} >> order-{shell}; cat order-{shell}") for n in range(3)]
    assert order[2].get_state().status in ("queued", "running")
    assert [execution.result().stdout() for execution in order] == ["0\n", "0\n1\n", "0\n1\n2\n"]
    view = client.devboxes.execute_and_await_completion(BOX, command="pwd", shell_name=f"other-{shell}")
    assert (view.stdout, view.shell_name) == ("/home/user\n", f"other-{shell}")
    view = client.devboxes.execute_async(BOX, command="cat", shell_name=shell, attach_stdin=True)
    client.devboxes.executions.send_std_in(view.execution_id, devbox_id=BOX, text="fed\n")
    client.devboxes.executions.send_std_in(view.execution_id, devbox_id=BOX, signal="EOF")
    assert client.devboxes.executions.await_completed(view.execution_id, devbox_id=BOX).stdout == "fed\n"


def files(client: Runloop) -> None:
    folder = f"files-{uuid.uuid4()}"
    for text in ("", "plain", "line\n", "ümlaut \u2028 ✓\r\n\ttab"):
        client.devboxes.write_file_contents(BOX, file_path=f"{folder}/deep/text", contents=text)
        assert client.devboxes.read_file_contents(BOX, file_path=f"~/{folder}/deep/text") == text
        assert client.devboxes.read_file_contents(BOX, file_path=f"/home/user/{folder}/deep/text") == text
    with tempfile.TemporaryDirectory() as name:
        local = Path(name, "local")
        local.write_bytes(BINARY)
        client.devboxes.upload_file(BOX, path=f"~/{folder}/binary", file=local)
        assert client.devboxes.download_file(BOX, path=f"{folder}/binary").read() == BINARY
    assert run(client, f"stat -c '%U %a %s' {folder}/binary") == f"user 644 {len(BINARY)}\n"
    client.devboxes.upload_file(BOX, path=f"/tmp/{folder}", file=("name", b""))
    assert client.devboxes.download_file(BOX, path=f"/tmp/{folder}").read() == b""


def errors(client: Runloop) -> None:
    unknown = "dbx_" + "0" * 21
    for call, kind, code in (
        (lambda: client.devboxes.retrieve(unknown), runloop_api_client.NotFoundError, 404),
        (lambda: client.devboxes.retrieve("dbx_nonexistent12345"), runloop_api_client.BadRequestError, 400),
        (lambda: client.devboxes.create(name=5), runloop_api_client.BadRequestError, 400),  # type: ignore[arg-type]
        (lambda: client.devboxes.read_file_contents(BOX, file_path="missing"), runloop_api_client.NotFoundError, 404),
        (lambda: client.devboxes.execute_async(BOX, command=""), runloop_api_client.BadRequestError, 400),
        (lambda: Runloop(bearer_token="ak_wrong").devboxes.list(), runloop_api_client.AuthenticationError, 401),
    ):
        error = _refusal(call, kind)
        assert error.status_code == code
        assert isinstance(error.body, dict)
        assert error.body["message"].startswith("cannot ")


def _refusal(
    call: Callable[[], object], kind: type[runloop_api_client.APIStatusError]
) -> runloop_api_client.APIStatusError:
    try:
        call()
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} was expected")


def wait_ends(client: Runloop) -> None:
    """A wait that runs out is the client's own error, after about the time that was asked for."""
    from runloop_api_client.lib.polling import PollingConfig, PollingTimeout

    execution = client.devboxes.execute_async(BOX, command="sleep 30")
    begun = time.monotonic()
    try:
        client.devboxes.executions.await_completed(
            execution.execution_id, devbox_id=BOX, polling_config=PollingConfig(timeout_seconds=2)
        )
    except PollingTimeout:
        assert 1.5 < time.monotonic() - begun < 6
    else:
        raise AssertionError("the wait should have run out")
    client.devboxes.executions.kill(execution.execution_id, devbox_id=BOX)


def sdk_callbacks(client: Runloop) -> None:
    sdk = RunloopSDK(bearer_token=client.bearer_token, base_url=str(client.base_url))
    box = sdk.devbox.from_id(BOX)
    out: list[str] = []
    err: list[str] = []
    both: list[str] = []
    command = "for i in 1 2 3; do echo out$i; echo err$i >&2; sleep 0.3; done; exit 5"
    result = box.cmd.exec(command, stdout=out.append, stderr=err.append, output=both.append)
    assert (result.exit_code, result.success) == (5, False)
    assert "".join(out) == result.stdout() == "out1\nout2\nout3\n"
    assert "".join(err) == result.stderr() == "err1\nerr2\nerr3\n"
    assert sorted("".join(both).split()) == sorted("".join(out + err).split())
    assert box.cmd.exec("seq 2000").stdout().split() == [str(n) for n in range(1, 2001)]


def many_at_once(client: Runloop) -> None:
    async def main() -> None:
        async with AsyncRunloop() as many:
            calls = [many.devboxes.execute_and_await_completion(BOX, command=f"sleep 0.2; echo {n}") for n in range(40)]
            views = await asyncio.gather(*calls)
            assert [view.stdout for view in views] == [f"{n}\n" for n in range(40)]

    asyncio.run(main())


def follow(client: Runloop) -> None:
    """Follow the stream of EXECUTION into standard output, however often the server goes away.

    The client opens a stream again by itself after a 408. When the connection is cut it raises instead; then this
    opens the stream again at the offset of the last chunk, as the client itself would have done.
    """
    offset = "0"
    finished = threading.Event()
    while not finished.is_set():
        try:
            for chunk in client.devboxes.executions.stream_stdout_updates(
                os.environ["EXECUTION"], devbox_id=BOX, offset=offset
            ):
                offset = str(chunk.offset)
                sys.stdout.write(chunk.output)
                sys.stdout.flush()
            finished.set()
        except httpx.TransportError:
            sys.stderr.write("cut\n")


def run(client: Runloop, command: str, box: str = BOX) -> str:
    view = client.devboxes.execute_and_await_completion(box, command=command)
    assert view.exit_status == 0, view
    return view.stdout or ""


def _line(stream: object) -> str:
    """The next line of a stream, however it was cut into chunks."""
    text = ""
    while not text.endswith("\n"):
        text += next(stream).output  # type: ignore[call-overload]
    return text


CASES: dict[str, Callable[[Runloop], None]] = {
    function.__name__: function
    for function in (
        lifecycle,
        create_and_wait_apart,
        lists,
        execute,
        execute_once,
        execute_sync,
        stdin,
        interrupt,
        streams,
        large_output,
        kill,
        named_shell,
        files,
        errors,
        wait_ends,
        sdk_callbacks,
        many_at_once,
        follow,
    )
}

if __name__ == "__main__":
    with Runloop() as connected:
        CASES[sys.argv[1]](connected)

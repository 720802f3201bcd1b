"""Whatever happens to the server, what was started goes on, and nothing that it said or was told is lost or doubled."""

from __future__ import annotations

import os
import signal
import subprocess
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.api import Api
from support.reader import Reader
from support.server import Server, free_port
from support.until import until

pytestmark = pytest.mark.box

COUNT = 'for i in $(seq 1 {n}); do echo "line $i of some output"; sleep 0.005; done'


COUNT_ON = "i=0; until [ -e /tmp/enough ]; do i=$((i + 1)); echo line $i of some output; sleep 0.01; done"


def _counted(lines: int) -> str:
    return "".join(f"line {i} of some output\n" for i in range(1, lines + 1))


def _lives(mark: str) -> bool:
    """Whether a process with this word in its command line runs on the machine, in a box or not."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if mark.encode() in path.read_bytes():
                return True
        except OSError:
            continue
    return False


def test_nothing_is_lost_when_the_server_is_killed(own_server: Server) -> None:
    """One box: a command fed before and after, one that counts, one that ends meanwhile, one that had ended."""
    mark = str(uuid.uuid4())
    with own_server.api() as api:
        box = api.create()
        ended = api.start(box, "echo done; echo warned >&2; exit 3")
        api.wait(box, ended)
        fed = api.start(box, "cat; exit 4", attach_stdin=True)
        assert api.send(box, fed, "before\n")
        counting = api.start(box, COUNT.format(n=800))
        meanwhile = api.start(box, f": {mark}; sleep 2; echo bye; exit 7")
        reader = Reader(own_server, box, counting).until(lambda r: r.position > 500)
    own_server.kill()
    assert reader.wait() == "cut"
    until(lambda: not _lives(mark))
    own_server.start(120)
    with own_server.api() as api:
        assert api.box(box)["status"] == "running"
        again = Reader(own_server, box, counting, offset=reader.position)
        view = api.wait(box, meanwhile)
        assert (view["exit_status"], view["stdout"]) == (7, "bye\n")
        assert api.send(box, fed, "after\n")
        assert api.send(box, fed, signal="EOF")
        view = api.wait(box, fed)
        assert (view["exit_status"], view["stdout"]) == (4, "before\nafter\n")
        view = api.execution(box, ended)
        assert (view["exit_status"], view["stdout"], view["stderr"]) == (3, "done\n", "warned\n")
        assert again.wait(60) == "clean"
        assert reader.text + again.text == _counted(800)
        assert api.wait(box, counting)["exit_status"] == 0
        assert api.streamed(box, counting) == _counted(800)


def test_killed_again_and_again(own_server: Server) -> None:
    """A stream that follows over five lives of the server reads each byte once, stdin arrives once and in order."""
    with own_server.api() as api:
        box = api.create()
        echo = api.start(box, "cat", attach_stdin=True)
        counting = api.start(
            box, "i=0; until [ -e /tmp/enough ]; do i=$((i + 1)); echo line $i of some output; sleep 0.01; done"
        )
    text, position = "", 0
    for life in range(5):
        with own_server.api() as api:
            assert api.send(box, echo, f"life {life}\n")
        reader = Reader(own_server, box, counting, offset=position)
        reader.until(lambda r: bool(r.text))
        own_server.restart()
        reader.wait()
        text, position = text + reader.text, reader.position
    with own_server.api() as api:
        api.run(box, "touch /tmp/enough")
        text += api.streamed(box, counting, offset=position)
        assert text == _counted(text.count("\n"))
        assert api.send(box, echo, signal="EOF")
        assert api.wait(box, echo)["stdout"] == "".join(f"life {life}\n" for life in range(5))


def test_a_client_that_opens_again_at_the_last_offset_doubles_nothing(own_server: Server) -> None:
    """The published clients do not compute where they were: they name the offset of the last event they saw."""
    with own_server.api() as api:
        box = api.create()
        execution = api.start(box, "echo first; read line; echo $line", attach_stdin=True)
        reader = Reader(own_server, box, execution)
        reader.until(lambda r: bool(r.events) and r.events[-1].output == "" and r.text == "first\n")
        own_server.restart()
        reader.wait()
        again = Reader(own_server, box, execution, offset=reader.last_offset)
        assert api.send(box, execution, "second\n")
        assert again.wait() == "clean"
        assert reader.text + again.text == "first\nsecond\n"


def test_clients_that_come_before_a_devbox_is_attached_again_miss_nothing(own_server: Server) -> None:
    """A server that is back serves at once; a devbox whose agent is slow to answer must not leave streams silent."""
    with own_server.api() as api:
        box = api.create()
        execution = api.start(box, "echo first; read line; echo $line", attach_stdin=True)
        Reader(own_server, box, execution).until(lambda r: r.text == "first\n")
        own_server.kill()
        agent = own_server.agent(box)
        os.kill(agent, signal.SIGSTOP)
        try:
            own_server.start(60)
            reader = Reader(own_server, box, execution)
            held = _Held(own_server, f"/v1/devboxes/{box}/executions/{execution}/wait_for_status")
            assert held.sent.wait(10)
            assert api.execution(box, execution)["status"] == "running"
        finally:
            os.kill(agent, signal.SIGCONT)
        until(lambda: api.http.post(f"/v1/devboxes/{box}/execute_sync", json={"command": "true"}).status_code == 200)
        assert api.send(box, execution, "second\n")
    assert reader.wait() == "clean"
    assert reader.text == "first\nsecond\n"
    held.thread.join(30)
    assert held.answer is not None
    assert (held.answer.status_code, held.answer.json().get("status")) == (200, "completed")


def test_a_named_shell_goes_on_with_its_queue(own_server: Server) -> None:
    with own_server.api() as api:
        box = api.create()
        shell = {"shell_name": "work"}
        api.run(box, "cd /tmp; export COLOUR=green", **shell)
        queued = [
            api.start(box, "while [ ! -e go ]; do sleep 0.1; done; echo gone", **shell),
            api.start(box, "pwd; echo $COLOUR; cd /var", **shell),
            api.start(box, "exit 3", **shell),
            api.start(box, "pwd; echo $COLOUR", **shell),
        ]
        until(lambda: api.execution(box, queued[0])["status"] == "running")
        assert api.execution(box, queued[1])["status"] == "queued"
    own_server.restart()
    with own_server.api() as api:
        assert [api.execution(box, execution)["status"] for execution in queued] == ["running", *["queued"] * 3]
        api.write(box, "/tmp/go", "")
        views = [api.wait(box, execution) for execution in queued]
        assert [view["stdout"] for view in views] == ["gone\n", "/tmp\ngreen\n", "", "/var\ngreen\n"]
        assert [view["exit_status"] for view in views] == [0, 0, 3, 0]


def test_a_kill_of_a_group_is_finished_by_the_next_server(own_server: Server) -> None:
    """The server dies between the end of the leader and the SIGKILL for those who do not obey."""
    stubborn = "(trap '' TERM; while :; do sleep 0.1; done) >/dev/null 2>&1 & echo $!; wait; echo no"
    with own_server.api() as api:
        box = api.create()
        spared = api.output(box, "sleep 86 >/dev/null 2>&1 & echo $!").strip()
        execution = api.start(box, stubborn)
        with api.stream(box, execution) as events:
            child = next(events).output.strip()
        path = f"/v1/devboxes/{box}/executions/{execution}/kill"
        assert api.call("POST", path, {"kill_process_group": True})["exit_status"] == 143
    own_server.restart()
    with own_server.api() as api:
        assert api.run(box, f"while kill -0 {child} 2>/dev/null; do sleep 0.1; done")["exit_status"] == 0
        assert api.run(box, f"kill -0 {spared}")["exit_status"] == 0, "nobody asked for its end"


def test_a_life_that_ends_while_the_server_is_down(own_server: Server) -> None:
    with own_server.api() as api:
        short = api.create(launch_parameters={"keep_alive_time_seconds": 4})
        program = api.create(entrypoint="sleep 3")
        other = api.create()
        deadline = api.box(short)["create_time_ms"] / 1000 + 4.5
    own_server.kill()
    time.sleep(max(0.0, deadline - time.time()))
    own_server.start(120)
    with own_server.api() as api:
        view = api.wait_box(short, "shutdown", seconds=15)
        assert view["shutdown_reason"] == "keep_alive_timeout"
        view = api.wait_box(program, "shutdown", seconds=15)
        assert view["shutdown_reason"] == "entrypoint_exit"
        assert view["end_time_ms"] >= view["create_time_ms"]
        assert api.box(other)["status"] == "running"


def _request(identity: str) -> dict[str, Any]:
    return {"headers": {"x-request-id": identity}}


def test_a_request_that_is_repeated_after_a_kill_has_its_effect_once(own_server: Server) -> None:
    ids = [str(uuid.uuid4()) for _ in range(4)]
    with own_server.api() as api:
        box = api.call("POST", "/v1/devboxes", {"name": "once"}, **_request(ids[0]))["id"]
        api.wait_box(box, "running")
        path = f"/v1/devboxes/{box}"
        body = {"command": "echo ran >> log; cat", "attach_stdin": True}
        execution = api.call("POST", f"{path}/execute_async", body, **_request(ids[1]))["execution_id"]
        assert api.send(box, execution, "once\n", **_request(ids[2]))
    own_server.restart()
    with own_server.api() as api:
        assert api.call("POST", "/v1/devboxes", {"name": "once"}, **_request(ids[0]))["id"] == box
        again = api.call("POST", f"{path}/execute_async", body, **_request(ids[1]))
        assert again["execution_id"] == execution
        assert api.send(box, execution, "once\n", **_request(ids[2]))
        assert api.send(box, execution, signal="EOF", **_request(ids[3]))
        assert api.wait(box, execution)["stdout"] == "once\n"
        assert api.read(box, "log") == "ran\n"
        assert len(api.boxes()) == 1
        answer = api.http.post("/v1/devboxes", json={"name": "twice"}, headers={"x-request-id": ids[0]})
        assert answer.status_code == 409
        assert answer.headers["x-should-retry"] == "false"
        assert len(api.boxes()) == 1


def test_the_same_command_id_is_the_same_execution_after_a_kill(own_server: Server) -> None:
    body = {"command": "echo ran >> log; sleep 1; cat log", "command_id": str(uuid.uuid4()), "optimistic_timeout": 0}
    with own_server.api() as api:
        box = api.create()
        first = api.call("POST", f"/v1/devboxes/{box}/execute", body)
    own_server.restart()
    with own_server.api() as api:
        second = api.call("POST", f"/v1/devboxes/{box}/execute", {**body, "optimistic_timeout": 20})
        assert second["execution_id"] == first["execution_id"]
        assert api.wait(box, first["execution_id"])["stdout"] == "ran\n"


@pytest.mark.parametrize("milliseconds", [0, 5, 20, 60, 150])
def test_a_kill_in_the_middle_of_a_create_makes_one_devbox_or_none(own_server: Server, milliseconds: int) -> None:
    identity = str(uuid.uuid4())

    def create() -> None:
        with own_server.api() as api:
            try:
                api.call("POST", "/v1/devboxes/create_and_await_running", {"name": "half"}, **_request(identity))
            except httpx.TransportError:
                return

    sender = threading.Thread(target=create)
    sender.start()
    time.sleep(milliseconds / 1000)
    own_server.kill()
    sender.join()
    own_server.start(120)
    with own_server.api() as api:
        view = api.call("POST", "/v1/devboxes/create_and_await_running", {"name": "half"}, **_request(identity))
        live = [box for box in api.boxes() if box["status"] not in ("failure", "shutdown")]
        assert [box["id"] for box in live] in ([view["id"]], [])
        assert len(api.boxes()) == 1
        if live:
            assert api.output(api.wait_box(view["id"], "running")["id"], "echo whole") == "whole\n"
        else:
            assert view["status"] == "failure", "a devbox that the kill broke says so"


def test_sigterm_ends_within_five_seconds_and_the_boxes_go_on(own_server: Server) -> None:
    with own_server.api() as api:
        box = api.create()
        execution = api.start(box, "echo first; read line; echo $line", attach_stdin=True)
        readers = [Reader(own_server, box, execution, which) for which in ("stdout", "stdout", "stderr")]
        for reader in readers[:2]:
            reader.until(lambda r: r.text == "first\n")
        waits = [_Held(own_server, path) for path in _held_paths(box, execution)]
        for held in waits:
            held.sent.wait(10)
        time.sleep(0.3)  # until the server holds them: nothing outside of it can tell
        pid = own_server.pid
        took = own_server.terminate()
    assert took < 5, took
    assert not Path(f"/proc/{pid}").exists()
    for reader in readers:
        assert reader.wait() == "408"
        assert reader.events[-1].data["message"].startswith("cannot ")
    for reader in readers[:2]:
        assert reader.last_offset == len("first\n"), "the end position was told before the end"
    for held in waits:
        held.thread.join(10)
        assert held.answer is not None, "a held request was cut off"
        assert (held.answer.status_code, held.answer.headers.get("x-should-retry")) == (408, "true")
    own_server.start(120)
    with own_server.api() as api:
        again = Reader(own_server, box, execution, offset=readers[0].last_offset)
        assert api.send(box, execution, "second\n")
        assert again.wait() == "clean"
        assert readers[0].text + again.text == "first\nsecond\n"
        assert api.box(box)["status"] == "running"


class _Held:
    """A request that the server holds, sent in a thread."""

    def __init__(self, server: Server, path: str) -> None:
        self.answer: httpx.Response | None = None
        self.sent = threading.Event()
        self.thread = threading.Thread(target=self._ask, args=(server, path), daemon=True)
        self.thread.start()

    def _ask(self, server: Server, path: str) -> None:
        status = "completed" if "executions" in path else "shutdown"
        with server.api() as api:
            self.sent.set()
            try:
                self.answer = api.http.post(path, json={"statuses": [status], "timeout_seconds": 20})
            except httpx.TransportError:
                return


def _held_paths(box: str, execution: str) -> list[str]:
    return [f"/v1/devboxes/{box}/wait_for_status", f"/v1/devboxes/{box}/executions/{execution}/wait_for_status"]


def test_an_upload_that_a_kill_cuts_leaves_the_old_content(own_server: Server) -> None:
    with own_server.api() as api:
        box = api.create()
        api.upload(box, "precious", b"old")
        going = threading.Event()

        def pieces() -> Any:
            yield b'--b\r\ncontent-disposition: form-data; name="path"\r\n\r\nprecious\r\n'
            yield b'--b\r\ncontent-disposition: form-data; name="file"; filename="f"\r\n\r\n'
            for _ in range(10_000):
                yield b"n" * 100_000
                going.set()

        def upload() -> None:
            kind = {"content-type": "multipart/form-data; boundary=b"}
            with own_server.api() as sender, pytest.raises(httpx.TransportError):
                sender.http.post(f"/v1/devboxes/{box}/upload_file", content=pieces(), headers=kind)

        thread = threading.Thread(target=upload)
        thread.start()
        assert going.wait(10)
        own_server.restart()
        thread.join(10)
    with own_server.api() as api:
        assert api.download(box, "precious") == b"old"
        assert api.output(box, "ls -A | grep -c precious") == "1\n", "no temporary file stays behind"


def test_a_second_server_on_the_same_state_refuses_and_names_the_first(own_server: Server) -> None:
    command = [own_server.program, "serve", "--port", str(free_port()), "--state", own_server.state]
    second = subprocess.run(
        command, capture_output=True, text=True, timeout=30, env=own_server.environment(), check=False
    )
    assert second.returncode == 2
    assert str(own_server.pid) in second.stderr
    assert "cannot " in second.stderr
    with own_server.api() as api:
        assert api.boxes() == []


def test_a_kill_frees_the_port_at_once(own_server: Server) -> None:
    with own_server.api() as api:
        box = api.create()
        execution = api.start(box, "sleep 60")
        reader = Reader(own_server, box, execution)
    own_server.kill()
    with pytest.raises(httpx.ConnectError):
        httpx.get(own_server.url + "/healthz")
    assert reader.wait() == "cut"


def test_keys_are_made_and_revoked_while_the_server_runs(own_server: Server) -> None:
    state = str(own_server.state)
    printed = own_server.command("keys", "create", "--name", "second", "--state", state)
    key = printed.strip()
    assert printed == key + "\n"
    assert key.startswith("ak_")
    with Api(own_server.url, key) as second:
        assert second.boxes() == []
    listed = own_server.command("keys", "list", "--state", state)
    assert key not in listed
    (identity,) = (line.split("\t")[0] for line in listed.splitlines() if "\tsecond\t" in line)
    own_server.command("keys", "revoke", identity, "--state", state)
    with Api(own_server.url, key) as second:
        second.refused("GET", "/v1/devboxes", 401)

"""What happens at bad moments: the agent's connection breaks, the server or a devbox ends while something begins."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sqlite3
import struct
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from support.api import Api
from support.reader import Reader
from support.server import Server
from support.until import until

pytestmark = pytest.mark.box


def _folder(server: Server, box: str) -> Path:
    return server.boxes / box


def _steal(server: Server, box: str) -> None:
    """Connect to the box's agent as a newer server would: the older connection is closed."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as thief:
        folder = os.open(_folder(server, box), os.O_PATH)
        try:
            thief.connect(f"/proc/self/fd/{folder}/agent.sock")
        finally:
            os.close(folder)
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # the server was quick to take it back
            thief.send(struct.pack("<IIII", 1, 1, 1, 1))
            thief.recv(64)


@contextlib.contextmanager
def _silent(server: Server, box: str) -> Iterator[None]:
    """The box's agent says nothing meanwhile; its commands go on."""
    pid = int((_folder(server, box) / "pid").read_text())
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def _inside(server: Server, box: str, *command: str) -> bool:
    """Run a program in the box without its agent; whether it succeeded."""
    pid = (_folder(server, box) / "pid").read_text().strip()
    return subprocess.run(["nsenter", "-t", pid, "-a", *command], timeout=20, check=False).returncode == 0


def _post(server: Server, path: str, body: Any, request_id: str | None = None) -> httpx.Response:
    with server.api() as api:
        headers = {} if request_id is None else {"x-request-id": request_id}
        return api.http.post(path, json=body, headers=headers)


@pytest.fixture
def side() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(16) as pool:
        yield pool


# -- the connection to an agent breaks


def test_waits_and_streams_outlive_a_broken_connection_to_the_agent(
    api: Api, box: str, server: Server, side: ThreadPoolExecutor
) -> None:
    command = "echo begun; until [ -e /tmp/broken ]; do sleep 0.05; done; cat; exit 7"
    execution = api.start(box, command, attach_stdin=True)
    held = side.submit(_post, server, f"/v1/devboxes/{box}/execute_sync", {"command": command})
    shell = {"shell_name": "breaks"}
    first = api.start(box, "until [ -e /tmp/broken ]; do sleep 0.05; done; echo one", **shell)
    second = api.start(box, "echo two", **shell)
    reader = Reader(server, box, execution).until(lambda r: r.text == "begun\n")
    for _ in range(3):
        _steal(server, box)
        until(lambda: api.output(box, "echo back") == "back\n")
    assert api.send(box, execution, "told\n")
    assert api.send(box, execution, signal="EOF")
    api.write(box, "/tmp/broken", "")
    assert api.wait(box, execution)["exit_status"] == 7
    assert reader.wait() == "clean"
    assert reader.text == "begun\ntold\n"
    assert held.result(20).json()["exit_status"] == 7
    assert [api.wait(box, one)["stdout"] for one in (first, second)] == ["one\n", "two\n"]


def test_commands_that_begin_while_the_connection_breaks_run_once(
    api: Api, box: str, server: Server, side: ThreadPoolExecutor
) -> None:
    def start(number: int) -> str:
        while True:
            body = {"command": f"echo {number} >> /tmp/once; echo {number}"}
            answer = _post(server, f"/v1/devboxes/{box}/execute_async", body, f"once-{box}-{number}")
            if answer.status_code == 200:
                return str(answer.json()["execution_id"])
            assert answer.status_code == 503, answer.text

    started = [side.submit(start, number) for number in range(60)]
    while not all(future.done() for future in started):
        _steal(server, box)
        time.sleep(0.03)  # a server that is never left alone gives the devbox up
    for number, future in enumerate(started):
        view = api.wait(box, future.result())
        assert (view["exit_status"], view["stdout"]) == (0, f"{number}\n")
    until(lambda: _post(server, f"/v1/devboxes/{box}/read_file_contents", {"file_path": "/tmp/once"}).is_success)
    assert sorted(api.read(box, "/tmp/once").split()) == sorted(str(number) for number in range(60))


# -- the server is new and an agent does not answer yet


def test_what_is_asked_before_the_agent_answers_is_answered_then(own_server: Server, side: ThreadPoolExecutor) -> None:
    wait = "touch /tmp/here.$$; until [ -e /tmp/go ]; do sleep 0.05; done; echo over; exit 7"
    request = str(uuid.uuid4())
    with own_server.api() as api:
        box = api.create()
        path = f"/v1/devboxes/{box}"
        execution = api.start(box, wait)
        victim = api.start(box, "sleep 600")
        fed = api.start(box, "cat", attach_stdin=True)
        lost = side.submit(_post, own_server, f"{path}/execute_sync", {"command": wait}, request)
        until(lambda: api.output(box, "ls /tmp | grep -c here || :") == "2\n")
    own_server.kill()
    with pytest.raises(httpx.TransportError):
        lost.result(10)
    with _silent(own_server, box):
        own_server.start(120)
        reader = Reader(own_server, box, execution)
        again = side.submit(_post, own_server, f"{path}/execute_sync", {"command": wait}, request)
        killed = side.submit(_post, own_server, f"{path}/executions/{victim}/kill", {})
        sent = side.submit(_post, own_server, f"{path}/executions/{fed}/send_std_in", {"text": "later\n"})
        begun = time.monotonic()
        short = {"statuses": ["completed"], "timeout_seconds": 1}
        assert _post(own_server, f"{path}/executions/{execution}/wait_for_status", short).status_code == 408
        assert time.monotonic() - begun > 0.9, "a wait is held, or its client spins"
        assert _inside(own_server, box, "touch", "/tmp/go")
    assert again.result(30).json()["exit_status"] == 7
    assert killed.result(30).status_code == 200
    assert sent.result(30).json()["success"] is True
    assert reader.wait() == "clean"
    assert reader.text == "over\n"
    with own_server.api() as api:
        assert api.wait(box, victim)["exit_status"] == 143
        assert api.send(box, fed, signal="EOF")
        assert api.wait(box, fed)["stdout"] == "later\n"


def test_a_stream_of_a_devbox_that_is_being_freed_ends(own_server: Server) -> None:
    with own_server.api() as api:
        box = api.create()
        execution = api.start(box, "echo said; sleep 600")
        until(lambda: bool(api.execution(box, execution)["stdout"]))
    own_server.kill()
    with contextlib.closing(sqlite3.connect(own_server.state / "devboxd.db")) as store, store:
        store.execute("UPDATE devboxes SET deadline_ms = 0")
    own_server.start(120)
    reader = Reader(own_server, box, execution)
    assert reader.wait() == "clean"
    assert reader.text == "said\n"
    with own_server.api() as api:
        assert api.execution(box, execution)["exit_status"] == 137


# -- a devbox ends while commands begin


def test_commands_that_begin_while_their_devbox_ends_complete(
    api: Api, server: Server, side: ThreadPoolExecutor
) -> None:
    box = api.create()
    ends = threading.Event()

    def start(number: int) -> list[str]:
        found = []
        shell = {"shell_name": "s"} if number % 4 == 0 else {}
        with server.api() as own:
            while True:
                answer = own.http.post(f"/v1/devboxes/{box}/execute_async", json={"command": "sleep 600", **shell})
                if answer.status_code == 200:
                    found.append(answer.json()["execution_id"])
                elif answer.status_code != 429:
                    assert answer.status_code in (400, 503), answer.text
                    return found
                if len(found) == 3:
                    ends.set()

    started = [side.submit(start, number) for number in range(8)]
    assert ends.wait(20)
    api.shutdown(box)
    executions = [execution for future in started for execution in future.result(60)]
    assert executions
    for execution in executions:
        assert api.wait(box, execution, 20)["status"] == "completed"


# -- stdin


def test_text_for_a_command_that_waits_in_a_queue_arrives(own_server: Server) -> None:
    with own_server.api() as api:
        box = api.create()
        shell = {"shell_name": "fed", "attach_stdin": True}
        first = api.start(box, "cat; echo first", **shell)
        second = api.start(box, "cat; echo second", **shell)
        third = api.start(box, "cat; echo third", **shell)
        for execution, text in ((second, "two\n"), (third, "three\n")):
            assert api.execution(box, execution)["status"] == "queued"
            assert api.send(box, execution, text)
            assert api.send(box, execution, signal="EOF")
        assert api.send(box, first, signal="EOF")
        assert api.wait(box, second)["stdout"] == "two\nsecond\n"
        assert api.wait(box, third)["stdout"] == "three\nthird\n"
        first = api.start(box, "cat; echo first", **shell)
        second = api.start(box, "cat; echo second", **shell)
        assert api.send(box, second, "kept\n")
    own_server.restart()
    with own_server.api() as api:
        assert api.send(box, second, signal="EOF")
        assert api.send(box, first, signal="EOF")
        assert api.wait(box, second)["stdout"] == "kept\nsecond\n"


def test_text_that_is_sent_again_after_its_command_has_ended_was_taken(own_server: Server) -> None:
    request = str(uuid.uuid4())
    with own_server.api() as api:
        box = api.create()
        execution = api.start(box, "head -n 1", attach_stdin=True)
        body = {"text": "once\n"}
        path = f"/v1/devboxes/{box}/executions/{execution}/send_std_in"
        assert _post(own_server, path, body, request).json()["success"] is True
        api.wait(box, execution)
    own_server.kill()
    # As if the kill had come between the commit of the text and that of the answer.
    with contextlib.closing(sqlite3.connect(own_server.state / "devboxd.db")) as store, store:
        store.execute("UPDATE requests SET answer = NULL, status = NULL WHERE CAST(answer AS TEXT) LIKE '%success%'")
        (bound,) = store.execute("SELECT count(*) FROM requests WHERE ref LIKE 'exe%' AND answer IS NULL").fetchone()
        assert bound == 1
    own_server.start(120)
    assert _post(own_server, path, body, request).json()["success"] is True


def test_a_spool_is_gone_when_its_command_has_ended(api: Api, box: str, server: Server) -> None:
    execution = api.start(box, "head -c 1", attach_stdin=True)
    assert api.send(box, execution, "x" * 3_000_000)
    api.wait(box, execution)
    spools = server.state / "journals" / box
    until(lambda: not (spools / f"{execution}.stdin").exists(), 5)


# -- answers


def test_a_command_that_was_waited_for_is_told_after_its_devbox_has_ended(
    own_server: Server, side: ThreadPoolExecutor
) -> None:
    request = str(uuid.uuid4())
    with own_server.api() as api:
        box = api.create()
        path = f"/v1/devboxes/{box}/execute_sync"
        body = {"command": "echo said; touch /tmp/there; sleep 600"}
        held = side.submit(_post, own_server, path, body, request)
        until(lambda: _inside(own_server, box, "test", "-e", "/tmp/there"))
    own_server.kill()
    with pytest.raises(httpx.TransportError):
        held.result(10)
    own_server.start(120)
    with own_server.api() as api:
        api.shutdown(box)
    answer = _post(own_server, path, body, request)
    assert answer.status_code == 200, answer.text
    assert (answer.json()["exit_status"], answer.json()["stdout"]) == (137, "said\n")


def test_one_command_id_at_the_same_time_is_one_execution_and_leaves_no_files(
    api: Api, box: str, server: Server, side: ThreadPoolExecutor
) -> None:
    journals = server.state / "journals" / box
    body = {"command": "echo x", "command_id": str(uuid.uuid4()), "optimistic_timeout": 10}
    api.run(box, "true")
    before = len(list(journals.iterdir()))
    answers = [side.submit(_post, server, f"/v1/devboxes/{box}/execute", body) for _ in range(12)]
    assert {answer.result().json()["execution_id"] for answer in answers} == {body["command_id"]}
    assert len(list(journals.iterdir())) == before + 2


def test_a_command_whose_files_cannot_be_made_is_refused_and_leaves_nothing(own_server: Server) -> None:
    with own_server.api() as api:
        box = api.create()
        api.run(box, "true")
        journals = own_server.state / "journals" / box
        subprocess.run(["chattr", "+i", journals], check=True)
        try:
            message = api.refused("POST", f"/v1/devboxes/{box}/execute_async", 503, {"command": "true"})
            assert "disk" in message
        finally:
            subprocess.run(["chattr", "-i", journals], check=True)
        assert len(list(journals.iterdir())) == 2
        assert api.output(box, "echo again") == "again\n"


# -- SIGTERM


def test_a_stream_that_never_rests_is_told_of_the_end_of_the_server(own_server: Server) -> None:
    with own_server.api() as api:
        box = api.create()
        execution = api.start(box, "yes 0123456789")
        reader = Reader(own_server, box, execution).until(lambda r: r.position > 1_000_000)
        assert own_server.terminate() < 5
    assert reader.wait() == "408"
    assert reader.last_offset == reader.position, "the end position was told before the end"
    own_server.start(120)
    with own_server.api() as api:
        api.call("POST", f"/v1/devboxes/{box}/executions/{execution}/kill", {})


def test_sigterm_is_quick_with_many_commands_and_streams(own_server: Server, side: ThreadPoolExecutor) -> None:
    with own_server.api() as api:
        boxes = [api.create() for _ in range(2)]
        executions = [(box, api.start(box, "echo said; sleep 60")) for box in boxes for _ in range(200)]
        readers = [Reader(own_server, box, execution) for box, execution in executions[::4]]
        for reader in readers:
            reader.until(lambda r: r.text == "said\n")
        held = [
            side.submit(_post, own_server, f"/v1/devboxes/{box}/execute_sync", {"command": "sleep 61"}) for box in boxes
        ]
        until(lambda: api.output(boxes[1], "pgrep -c -f [s]leep.61 || :") == "1\n")
        before = own_server.descriptors()
        assert own_server.terminate() < 5
    assert {reader.wait() for reader in readers} == {"408"}
    assert {future.result(10).status_code for future in held} == {503}
    own_server.start(120)
    with own_server.api() as api:
        for box, execution in executions[::50]:
            assert api.execution(box, execution)["status"] == "running"
        assert own_server.descriptors() < before
        for box in boxes:
            api.shutdown(box)
        for box, execution in executions[::50]:
            assert api.wait(box, execution)["exit_status"] == 137

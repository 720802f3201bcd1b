"""The log of a devbox as it grows: what a list gives, and then every line once, until the devbox has ended."""

from __future__ import annotations

import socket
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devboxd.devboxes.logs.tail import whole_lines
from support.api import Api
from support.reader import LogReader
from support.server import Server

pytestmark = pytest.mark.box


def logs(api: Api, box: str, **query: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = api.call("GET", f"/v1/devboxes/{box}/logs", params=query)["logs"]
    return found


def kill(api: Api, box: str, execution: str) -> None:
    api.call("POST", f"/v1/devboxes/{box}/executions/{execution}/kill", {})


@given(st.binary(max_size=200), st.integers(1, 200))
def test_only_whole_lines_are_taken(data: bytes, most: int) -> None:
    data = data[:most]
    used = whole_lines(data, most)
    if b"\n" in data:
        assert data[:used].endswith(b"\n")
        assert b"\n" not in data[used:]
    elif len(data) < most:
        assert used == 0
    else:
        assert used >= len(data) - 3, "at most a part of a character is left"


def test_a_tail_begins_with_the_list_and_ends_with_the_devbox(api: Api, server: Server) -> None:
    box = api.create(launch_parameters={"launch_commands": ["echo made"]})
    api.run(box, "echo before; echo bad >&2")
    listed = logs(api, box)
    tail = LogReader(server, box).until(lambda t: len(t.events) >= len(listed))
    assert tail.entries == listed
    ended = api.run(box, "echo after; exit 4", shell_name="work")["execution_id"]
    tail.until(lambda t: any(e["cmd_id"] == ended and e["exit_code"] == 4 for e in t.entries))
    tail.until(lambda t: "after" in t.messages)
    running = api.start(box, "echo started; sleep 600")
    tail.until(lambda t: "started" in t.messages)
    api.shutdown(box)
    assert tail.wait() == "clean"
    assert "the devbox is shutdown: api_shutdown" in tail.messages
    assert [e["exit_code"] for e in tail.entries if e["cmd_id"] == running and e["cmd"]][-1] == 137
    again = LogReader(server, box)
    assert again.wait() == "clean"
    assert again.entries == logs(api, box)


def test_every_line_is_told_once_whatever_runs_side_by_side(api: Api, server: Server) -> None:
    box = api.create()
    held = [api.start(box, f"echo {n}-a; read x; echo {n}-b", attach_stdin=True) for n in range(3)]
    held += [api.start(box, "printf part; read x; echo ial", attach_stdin=True)]
    while api.execution(box, held[3])["stdout"] != "part":
        pass
    tail = LogReader(server, box).until(lambda t: "part" not in t.messages and "2-a" in t.messages)
    with ThreadPoolExecutor(8) as pool:
        runs = [pool.submit(api.run, box, f"for i in $(seq 40); do echo run-{n}-$i; done") for n in range(60)]
        executions = [run.result()["execution_id"] for run in runs]
    for execution in held:
        assert api.send(box, execution, text="go\n")
        api.wait(box, execution)
    api.shutdown(box)
    assert tail.wait() == "clean"
    for number, execution in enumerate(executions):
        own = [entry for entry in tail.entries if entry["cmd_id"] == execution]
        lines = [entry["message"] for entry in own if entry["cmd"] is None]
        assert lines == [f"run-{number}-{i}" for i in range(1, 41)]
        assert [entry["exit_code"] for entry in own if entry["cmd"]] in ([0], [None, 0])
    spoken = [[e["message"] for e in tail.entries if e["cmd_id"] == one and e["cmd"] is None] for one in held]
    assert spoken == [["0-a", "0-b"], ["1-a", "1-b"], ["2-a", "2-b"], ["partial"]]


def test_filters_leave_the_rest_out(api: Api, server: Server, box: str) -> None:
    one = api.start(box, "read x; echo one", attach_stdin=True)
    by_id = LogReader(server, box, execution_id=one).until(lambda t: bool(t.entries))
    by_shell = LogReader(server, box, shell_name="mine")
    api.run(box, "echo other")
    api.run(box, "echo mine", shell_name="mine")
    by_shell.until(lambda t: "mine" in t.messages)
    assert api.send(box, one, text="go\n")
    assert by_id.wait() == "clean", "nothing more can come of an execution that has ended"
    assert by_id.messages == ["-> read x; echo one", "one", "-> read x; echo one"]
    assert {entry["shell_name"] for entry in by_shell.entries} == {"mine"}
    api.refused("GET", f"/v1/devboxes/{box}/logs/tail?execution_id=unknown", 404)
    api.refused("GET", "/v1/devboxes/dbx_000000000000000000000/logs/tail", 404)


def test_a_long_line_comes_in_pieces(api: Api, server: Server, box: str) -> None:
    one = api.start(box, "read x; for i in $(seq 40000); do printf 'äb'; done; echo; echo end", attach_stdin=True)
    tail = LogReader(server, box, execution_id=one).until(lambda t: bool(t.entries))
    assert api.send(box, one, text="go\n")
    assert tail.wait() == "clean"
    pieces = [entry["message"] for entry in tail.entries if entry["cmd"] is None]
    assert "".join(pieces) == "äb" * 40000 + "end"
    assert all(len(piece.encode()) <= 16 * 1024 for piece in pieces)


def test_a_tail_ends_early_when_the_server_stops_and_begins_anew(own_server: Server) -> None:
    with own_server.api() as api:
        box = api.create()
        writer = api.start(box, "while echo tick; do read -t 0.05 x < <(sleep 1) || true; done")
        tail = LogReader(own_server, box).until(lambda t: "tick" in t.messages)
        own_server.terminate()
        assert tail.wait() == "408"
        assert tail.events[-1].name == "error"
        own_server.start(120)
        again = LogReader(own_server, box).until(lambda t: t.messages.count("tick") > tail.messages.count("tick"))
        own_server.kill()
        assert again.wait() == "cut"
        own_server.start(120)
        kill(api, box, writer)


def test_a_slow_reader_costs_the_server_no_memory(own_server: Server) -> None:
    with own_server.api() as api:
        box = api.create()
        with socket.create_connection(("127.0.0.1", own_server.port)) as slow:
            slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            lines = (
                f"GET /v1/devboxes/{box}/logs/tail HTTP/1.1",
                "Host: localhost",
                f"Authorization: Bearer {own_server.key}",
            )
            slow.sendall("".join(f"{line}\r\n" for line in (*lines, "")).encode())
            assert slow.recv(15) == b"HTTP/1.1 200 OK"
            api.run(box, "seq 1000")
            before = own_server.memory()
            api.run(box, "seq 10000000", seconds=120)
            assert own_server.memory() - before < 64 << 20, "78 MB were written, and nobody read them"
        api.shutdown(box)


def test_an_oom_kill_is_told_while_it_is_watched(api: Api, server: Server) -> None:
    box = api.create(launch_parameters={"resource_size_request": "X_SMALL"})
    tail = LogReader(server, box)
    assert api.run(box, "python3 -c 'x = bytearray(3 << 30)'")["exit_status"] == 137
    tail.until(lambda t: any(entry["source"] == "kmsg" for entry in t.entries))
    api.shutdown(box)
    assert tail.wait() == "clean"

"""What remains of devboxes that ended: for how long, and what a start says about those it does not find again."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import time
from pathlib import Path

import pytest

from devboxd.store.db import FILE_NAME
from support.api import Api
from support.disks import upper
from support.leftovers import leftovers, remove_all
from support.reader import Reader
from support.runtime import Runtime
from support.server import Server

pytestmark = pytest.mark.box
_GOING_DOWN = "the host shuts down; its processes end, its disk is kept: resume it"


def first_processes(server: Server) -> list[int]:
    """The pids on the host of pid 1 of each box of this server."""
    return [json.loads(path.read_text())["pid"] for path in server.boxes.glob("*/box.json")]


def test_after_the_retention_executions_and_journals_are_gone() -> None:
    server = Server(retention_seconds="0")
    try:
        with server.start().api() as api:
            box = api.create()
            execution = api.run(box, "echo kept for a while")["execution_id"]
            api.shutdown(box)
            assert api.execution(box, execution)["stdout"] == "kept for a while\n"
            journals = server.state / "journals" / box
            assert journals.exists()
            server.restart()
            api.wait_box(box, "shutdown")
            while journals.exists():
                assert server.running()
            api.refused("GET", f"/v1/devboxes/{box}/executions/{execution}", 404)
            assert api.box(box)["status"] == "shutdown"
    finally:
        server.stop()


def test_a_box_whose_first_process_died_says_so(own_server: Server) -> None:
    """All that its commands wrote stays readable, whoever waits is told, and its neighbour notices nothing."""
    with own_server.api() as api:
        box, neighbour = api.create(), api.create()
        done = api.run(box, "echo done; exit 3")["execution_id"]
        execution = api.start(box, "cat; sleep 80", attach_stdin=True)
        assert api.send(box, execution, "before\n")
        shell = [api.start(box, command, shell_name="work") for command in ("echo first; sleep 80", "echo never")]
        reader = Reader(own_server, box, execution).until(lambda r: r.text == "before\n")
        Reader(own_server, box, shell[0]).until(lambda r: r.text == "first\n")
        os.kill(own_server.agent(box), signal.SIGKILL)
        view = api.wait_box(box, "failure")
        assert view["failure_reason"] == "execution_failed"
        assert "its first process ended with status 137" in view["state_transitions"][-1]["failure_reason"]
        assert (reader.wait(), reader.text) == ("clean", "before\n")
        assert api.send(box, execution, "after\n") is False
        assert "ended" in api.refused("POST", f"/v1/devboxes/{box}/execute_async", 400, {"command": "true"})
        own_server.restart()
    with own_server.api() as api:
        assert _outcomes(api, box, [done, execution, *shell]) == [
            (3, "done\n"), (137, "before\n"), (137, "first\n"), (137, "")
        ]  # fmt: skip
        assert api.streamed(box, execution) == "before\n"
        assert api.output(neighbour, "echo on") == "on\n"


def test_boxes_whose_first_process_dies_while_they_are_prepared_say_so(api: Api, server: Server) -> None:
    """Whichever step it cuts short: none of them is the reason."""
    body = {
        "file_mounts": {f"/tmp/{number}": "x" * 100_000 for number in range(30)},
        "launch_parameters": {"launch_commands": ["true"] * 30},
    }
    for number in range(8):
        box = api.call("POST", "/v1/devboxes", body)["id"]
        api.wait_box(box, "initializing")
        time.sleep(0.02 * number)  # the step is what varies here
        os.kill(server.agent(box), signal.SIGKILL)
        view = api.wait_box(box, "failure")
        assert view["failure_reason"] == "execution_failed", view["state_transitions"][-1]
        assert "its first process ended with status 137" in view["state_transitions"][-1]["failure_reason"]


def test_a_box_whose_first_process_died_while_the_server_was_down_says_so(own_server: Server) -> None:
    with own_server.api() as api:
        box, neighbour = api.create(), api.create()
        execution = api.start(box, "echo before; sleep 80")
        Reader(own_server, box, execution).until(lambda r: r.text == "before\n")
    agent = own_server.agent(box)
    own_server.kill()
    os.kill(agent, signal.SIGKILL)
    own_server.start()
    with own_server.api() as api:
        reason = api.wait_box(box, "failure")["state_transitions"][-1]["failure_reason"]
        assert reason == "its first process ended while the server was down"
        assert _outcomes(api, box, [execution]) == [(137, "before\n")]
        assert api.output(neighbour, "echo on") == "on\n"


def test_a_resume_whose_first_process_died_while_the_server_was_down_keeps_the_disk(own_server: Server) -> None:
    with own_server.api() as api:
        box = api.create(launch_parameters={"launch_commands": ["test ! -e slow || sleep 80"]})
        api.run(box, "echo kept >file; touch slow")
        api.call("POST", f"/v1/devboxes/{box}/suspend")
        api.wait_box(box, "suspended")
        api.call("POST", f"/v1/devboxes/{box}/resume")
        api.wait_box(box, "initializing")
    agent = own_server.agent(box)
    own_server.kill()
    os.kill(agent, signal.SIGKILL)
    own_server.start()
    with own_server.api() as api:
        view = api.wait_box(box, "suspended", "failure")
        assert view["status"] == "suspended", view
        assert "its first process ended while the server was down" in view["state_transitions"][-1]["failure_reason"]
    with upper(own_server.state, box) as folder:
        assert (folder / "home/user/file").read_text() == "kept\n"


def test_a_box_whose_runtime_is_killed_in_the_middle_of_its_making_says_so(tmp_path: Path) -> None:
    runtime = Runtime("crun", tmp_path)
    server = Server(runtime=str(runtime.path))
    try:
        with server.start().api() as api:
            runtime.plan(0.004)
            box = api.call("POST", "/v1/devboxes")["id"]
            view = api.wait_box(box, "failure")
            assert view["failure_reason"] == "health_check_failed"
            assert "was ended by signal 9" in view["state_transitions"][-1]["failure_reason"]
            runtime.plan("whole")
            assert api.output(api.create(), "echo whole") == "whole\n"
    finally:
        server.stop()


def _outcomes(api: Api, box: str, executions: list[str]) -> list[tuple[int, str]]:
    views = [api.wait(box, execution) for execution in executions]
    return [(view["exit_status"], view["stdout"]) for view in views]


def _restart_the_machine(server: Server) -> None:
    """Simulated: everything of a killed server is gone from the machine but its state, which knows another run."""
    pids = first_processes(server)
    server.kill()
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    remove_all(server.state)
    assert leftovers(server.state) == []
    (server.state / "boot-id").write_text("another run\n")


def _found(server: Server) -> list[tuple[int, int, str | None]]:
    """What each start said about devboxes of earlier servers: living, ended meanwhile, and what came between."""
    lines = [json.loads(line) for line in server.log.read_text().splitlines() if line.startswith("{")]
    found = [line for line in lines if line["event"] == "devboxes of an earlier server"]
    return [(line["live"], line["ended_meanwhile"], line["interruption"]) for line in found]


def test_a_reboot_of_the_host_ends_processes_and_keeps_disks(own_server: Server) -> None:
    with own_server.api() as api:
        ended = api.create()
        kept = api.run(ended, "echo kept")["execution_id"]
        api.shutdown(ended)
        box = api.create()
        done = api.run(box, "echo done; echo kept >file; exit 3")["execution_id"]
        execution = api.start(box, "cat; sleep 81", attach_stdin=True)
        assert api.send(box, execution, "before\n")
        shell = [api.start(box, command, shell_name="work") for command in ("echo first; sleep 81", "echo never")]
        Reader(own_server, box, execution).until(lambda r: r.text == "before\n")
        Reader(own_server, box, shell[0]).until(lambda r: r.text == "first\n")
        launching = api.call("POST", "/v1/devboxes", {"launch_parameters": {"launch_commands": ["sleep 82"]}})["id"]
        api.wait_box(launching, "initializing")
    _restart_the_machine(own_server)
    own_server.launch()
    deadline = time.monotonic() + 60
    while (own_server.state / "boot-id").read_text() == "another run\n":
        assert time.monotonic() < deadline, own_server.tail()
    own_server.restart()  # killed as soon as it took note: whatever it did not finish is finished now
    with own_server.api() as api:
        for one in (box, launching):
            view = api.wait_box(one, "suspended")
            assert "the host was restarted" in view["state_transitions"][-1]["failure_reason"]
        assert _outcomes(api, box, [done, execution, *shell]) == [
            (3, "done\n"), (137, "before\n"), (137, "first\n"), (137, "")
        ]  # fmt: skip
        assert (api.box(ended)["status"], _outcomes(api, ended, [kept])) == ("shutdown", [(0, "kept\n")])
        assert api.output(api.create(), "echo fresh") == "fresh\n"
        api.call("POST", f"/v1/devboxes/{box}/resume")
        api.wait_box(box, "running")
        assert api.output(box, "cat file") == "kept\n"
    assert _found(own_server) == [(0, 0, None), (0, 2, "the host was restarted"), (0, 0, None)]


def _living(pids: list[int]) -> list[int]:
    """Those that have not ended, whether or not anything took note of it."""
    states = {pid: Path(f"/proc/{pid}/stat") for pid in pids}
    return [pid for pid, stat in states.items() if stat.exists() and ") Z " not in stat.read_text()]


def _systemd(server: Server, *told: str) -> None:
    """Let `systemctl` say this to the server about shutdown.target."""
    program = server.folder / "bin" / "systemctl"
    program.parent.mkdir(exist_ok=True)
    lines = "".join(f"echo {line}\n" for line in told)
    program.write_text(f'#!/bin/sh\n[ "$*" = "show --property=ActiveState,Job shutdown.target" ] || exit 1\n{lines}')
    program.chmod(0o755)
    server.settings["PATH"] = f"{program.parent}:{os.environ['PATH']}"


def test_a_machine_that_goes_down_puts_devboxes_to_sleep_first(own_server: Server) -> None:
    _systemd(own_server, "ActiveState=inactive", "Job=271")
    own_server.terminate()
    own_server.launch()
    own_server.wait_ready()
    with own_server.api() as api:
        box, other = api.create(), api.create()
        api.output(box, "cd /tmp; export KEPT=yes; echo kept >file", shell_name="work")
        execution = api.start(box, "trap '' TERM; echo up; while :; do sleep 1; done")
        Reader(own_server, box, execution).until(lambda r: r.text == "up\n")
    pids = first_processes(own_server)
    assert own_server.terminate() < 10
    assert (len(pids), _living(pids)) == (2, [])
    _systemd(own_server, "ActiveState=inactive")
    (own_server.state / "boot-id").write_text("another run\n")
    own_server.start()
    with own_server.api() as api:
        for one in (box, other):
            view = api.box(one)
            assert view["status"] == "suspended"
            told = [step.get("failure_reason") for step in view["state_transitions"]]
            assert [text for text in told if text] == [_GOING_DOWN]
            logs = api.call("GET", f"/v1/devboxes/{one}/logs")["logs"]
            assert any(_GOING_DOWN in entry["message"] for entry in logs)
        assert _outcomes(api, box, [execution]) == [(137, "up\n")]
        api.call("POST", f"/v1/devboxes/{box}/resume")
        api.wait_box(box, "running")
        assert api.output(box, "pwd; echo $KEPT; cat file", shell_name="work") == "/tmp\nyes\nkept\n"
    pids = first_processes(own_server)
    own_server.terminate()  # the service alone: devboxes go on
    assert (len(pids), _living(pids)) == (1, pids)


def test_a_machine_goes_down_in_time_though_nothing_can_be_written_down(own_server: Server) -> None:
    """What could not be told the store ends all the same, and the next server finds it by its disk."""
    _systemd(own_server, "ActiveState=active")
    own_server.settings["DEVBOXD_WARM_BOXES"] = "1"
    own_server.terminate()
    own_server.start()
    with own_server.api() as api:
        box = api.create()
        api.output(box, "echo kept >file; sync")
    agent = own_server.agent(box)
    locked = sqlite3.connect(own_server.state / FILE_NAME, isolation_level=None)
    locked.execute("BEGIN IMMEDIATE")
    took = own_server.terminate(60)
    locked.close()
    assert took < 30, own_server.tail()
    assert _living([agent]) == []
    _systemd(own_server, "ActiveState=inactive")
    (own_server.state / "boot-id").write_text("another run\n")
    own_server.start()
    with own_server.api() as api:
        assert "the host was restarted" in api.wake(box)["state_transitions"][-1]["failure_reason"]
        assert api.output(box, "cat file") == "kept\n"


def test_an_end_that_comes_while_the_server_stops_is_judged_by_the_next_one(own_server: Server) -> None:
    """Where no systemd tells, a machine that goes down ends devboxes and server at once."""
    with own_server.api() as api:
        box = api.create()
        api.output(box, "echo kept >file")
    pids = first_processes(own_server)
    os.kill(own_server.agent(box), signal.SIGTERM)
    own_server.terminate()
    assert (len(pids), _living(pids)) == (1, [])
    (own_server.state / "boot-id").write_text("another run\n")
    own_server.start()
    with own_server.api() as api:
        assert "the host was restarted" in api.wake(box)["state_transitions"][-1]["failure_reason"]
        assert api.output(box, "cat file") == "kept\n"


def test_a_reboot_that_took_the_disk_fails_the_box_with_that_reason(own_server: Server) -> None:
    with own_server.api() as api:
        box = api.create()
    _restart_the_machine(own_server)
    for name in ("pool.btrfs", "disks"):  # what a disk of the machine in memory leaves behind
        subprocess.run(["rm", "-rf", own_server.state / name], check=True)
    own_server.restart()
    with own_server.api() as api:
        view = api.wait_box(box, "failure")
        assert view["failure_reason"] == "execution_failed"
        reason = view["state_transitions"][-1]["failure_reason"]
        assert reason == "the host was restarted, and the devbox ended with that"
    assert not (own_server.state / "disks" / box).exists(), "its disk is freed"

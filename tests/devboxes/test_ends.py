"""What remains of devboxes that ended: for how long, and what a start says about those it does not find again."""

from __future__ import annotations

import json
import os
import signal

import pytest

from support.server import Server

pytestmark = pytest.mark.box


def first_processes(server: Server) -> list[int]:
    """The pids on the host of pid 1 of each box of this server."""
    return [json.loads(path.read_text())["pid"] for path in server.state.glob("boxes/*/box.json")]


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
    with own_server.api() as api:
        box = api.create()
        execution = api.start(box, "echo before; sleep 80")
        with api.stream(box, execution) as events:
            next(events)
        (pid,) = first_processes(own_server)
        os.kill(pid, signal.SIGKILL)
        view = api.wait_box(box, "failure")
        assert view["failure_reason"] == "execution_failed"
        assert "first process" in view["state_transitions"][-1]["failure_reason"]
        ended = api.wait(box, execution)
        assert (ended["exit_status"], ended["stdout"]) == (137, "before\n")


def test_a_reboot_of_the_host_fails_its_boxes_with_that_reason(own_server: Server) -> None:
    """Simulated: no box lives any more, and the state folder remembers another run of the machine."""
    with own_server.api() as api:
        box = api.create()
        execution = api.start(box, "echo before; sleep 81")
        with api.stream(box, execution) as events:
            next(events)
        pids = first_processes(own_server)
        own_server.kill()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        (own_server.state / "boot-id").write_text("another run\n")
        own_server.start()
        view = api.wait_box(box, "failure")
        assert "restarted" in view["state_transitions"][-1]["failure_reason"]
        ended = api.wait(box, execution)
        assert (ended["exit_status"], ended["stdout"]) == (137, "before\n")
        assert api.output(api.create(), "echo fresh") == "fresh\n"

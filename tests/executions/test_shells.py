"""Named shells and kills in real boxes: what an interrupt and a kill reach, and how many shells there may be."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from support.api import Api
from support.server import Server

pytestmark = pytest.mark.box


def _begun(api: Api, box: str, command: str, **options: object) -> str:
    """Start a command that says when it has come far enough."""
    execution = api.start(box, command, **options)
    with api.stream(box, execution) as events:
        next(events)
    return execution


def _seen(api: Api, box: str, command: str) -> None:
    api.output(box, f"until pgrep -fx '{command}'; do sleep 0.01; done >/dev/null")


def _gone(api: Api, box: str, command: str) -> None:
    api.output(box, f"while pgrep -fx '{command}'; do sleep 0.05; done >/dev/null")


def test_an_interrupt_ends_a_substitution(api: Api, box: str) -> None:
    execution = _begun(api, box, "echo on; x=$(sleep 125; true); echo got", shell_name="sub", attach_stdin=True)
    _seen(api, box, "sleep 125")
    assert api.send(box, execution, signal="INTERRUPT")
    view = api.wait(box, execution)
    assert (view["exit_status"], view["stdout"]) == (130, "on\n")
    _gone(api, box, "sleep 125")


@pytest.mark.parametrize("command", ["x=$(sleep 126; true)", "cat <(sleep 126)"])
def test_a_kill_ends_substitutions(api: Api, box: str, command: str) -> None:
    execution = _begun(api, box, f"echo on; {command}; echo no", shell_name=command)
    _seen(api, box, "sleep 126")
    view = api.call("POST", f"/v1/devboxes/{box}/executions/{execution}/kill")
    assert (view["exit_status"], view["stdout"]) == (143, "on\n")
    _gone(api, box, "sleep 126")


@pytest.mark.parametrize("shell", [{}, {"shell_name": "stubborn"}])
def test_a_kill_of_the_group_insists_though_nothing_of_it_is_held_and_the_server_dies(
    own_server: Server, shell: dict[str, object]
) -> None:
    with own_server.api() as api:
        box = api.create()
        stubborn = "bash -c \"trap '' TERM; sleep 127; sleep 128\" >/dev/null 2>&1"
        command = f"echo on; {stubborn}; true" if shell else f"echo on; {stubborn} & sleep 60"
        execution = _begun(api, box, command, **shell)
        _seen(api, box, "sleep 127")
        body = {"kill_process_group": True}
        assert api.call("POST", f"/v1/devboxes/{box}/executions/{execution}/kill", body)["exit_status"] == 143
        own_server.kill()
    own_server.start()
    with own_server.api() as api:
        _gone(api, box, "sleep 12[78]")


def test_idle_shells_make_room(own_server: Server) -> None:
    with own_server.api() as api:
        box = api.create(launch_parameters={"resource_size_request": "MEDIUM"})
        first = "cd /usr; export KEPT=yes; lost=1; sleep 129 >/dev/null 2>&1 &"
        api.run(box, first, shell_name="s0")
        for number in range(1, 36):
            assert api.run(box, f"echo {number}", shell_name=f"s{number}")["stdout"] == f"{number}\n"
        assert int(api.output(box, "pgrep -cx bash")) <= 33
        assert api.run(box, "pwd; echo $KEPT ${lost-none}", shell_name="s0")["stdout"] == "/usr\nyes none\n"
        _seen(api, box, "sleep 129")


def test_past_the_most_shells_at_work_429_asks_to_come_again(own_server: Server) -> None:
    with own_server.api() as api:
        box = api.create(launch_parameters={"resource_size_request": "MEDIUM"})
        running = [_begun(api, box, "echo on; cat", shell_name=f"w{n}", attach_stdin=True) for n in range(32)]
        path = f"/v1/devboxes/{box}/execute_async"
        answer = api.http.post(path, json={"command": "true", "shell_name": "more"})
        assert (answer.status_code, answer.headers.get("x-should-retry")) != (429, "false")
        assert answer.status_code == 429
        assert "32" in answer.json()["message"]
        api.send(box, running[0], signal="EOF")
        api.wait(box, running[0])
        assert api.run(box, "echo here", shell_name="more")["stdout"] == "here\n"


def test_a_box_full_of_held_output_refuses_before_anything_begins(own_server: Server) -> None:
    """What ended commands left running holds their pipes, and the agent has room for so many only."""
    with own_server.api() as api:
        box = api.create(launch_parameters={"resource_size_request": "LARGE"})  # of 2048 processes

        def leave_one_running(_: int) -> httpx.Response:
            return api.http.post(f"/v1/devboxes/{box}/execute_sync", json={"command": "sleep 900 & echo $?"})

        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(leave_one_running, range(1100)))
        refused = [answer for answer in answers if answer.status_code == 429]
        begun = [answer.json()["stdout"] for answer in answers if answer.status_code == 200]
        assert begun == ["0\n"] * (1100 - len(refused))
        assert 1000 <= len(begun) <= 1024
        assert all("holds the output" in answer.json()["message"] for answer in refused)


@pytest.mark.parametrize("fatal", [": ${NOPE:?msg}", "set -u; echo $nope"])
def test_an_error_that_ends_a_shell_is_told_by_the_next_command(api: Api, box: str, fatal: str) -> None:
    api.run(box, "x=5; export y=6", shell_name=fatal)
    assert api.run(box, fatal, shell_name=fatal)["exit_status"] == 127
    view = api.run(box, "echo ${x-none} $y", shell_name=fatal)
    assert (view["exit_status"], view["stdout"]) == (0, "none 6\n")
    assert view["stderr"].startswith("devboxd: the command before ended the named shell with 127;")
    assert api.run(box, "exit 3", shell_name=fatal)["stderr"] == ""
    assert api.run(box, "true", shell_name=fatal)["stderr"] == ""


def test_a_profile_that_keeps_bash_from_a_command_fails_it(api: Api) -> None:
    """It must not be taken for a success: nothing was run."""
    box = api.create()
    api.write(box, ".bash_profile", "ulimit -n 6\n")
    view = api.run(box, "echo run", shell_name="s")
    assert (view["exit_status"], view["stdout"]) == (126, ""), view
    assert "it was not run" in view["stderr"], view
    api.write(box, ".bash_profile", "")
    assert api.run(box, "echo run", shell_name="s")["stdout"] == "run\n"
    api.shutdown(box)


@pytest.mark.parametrize(
    ("harm", "cure"),
    [
        ("sudo chmod 700 /run", "sudo chmod 755 /run"),
        ("sudo mkdir -p /run/devboxd/x; sudo chmod 700 /run/devboxd/x", "sudo chmod 711 /run/devboxd/x"),
        ("sudo rm /dev/fd", "sudo ln -s /proc/self/fd /dev/fd"),
    ],
)
def test_a_command_that_a_shell_cannot_read_fails_and_says_so(api: Api, harm: str, cure: str) -> None:
    box = api.create()
    api.output(box, harm)
    for _ in range(2):
        view = api.run(box, "echo run", shell_name="s")
        assert (view["exit_status"], view["stdout"]) == (126, ""), view
        assert "it was not run" in view["stderr"], view
    api.run(box, cure)
    assert api.run(box, "echo run", shell_name="s")["stdout"] == "run\n"
    api.shutdown(box)

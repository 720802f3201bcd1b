"""Devboxes over HTTP: from create to their end."""

from __future__ import annotations

import time
import uuid

import pytest

from support.api import Api
from support.server import Server

pytestmark = pytest.mark.box


def statuses(view: dict[str, object]) -> list[str]:
    return [transition["status"] for transition in view["state_transitions"]]


def test_create_answers_at_once_and_passes_through_its_states(api: Api) -> None:
    view = api.call("POST", "/v1/devboxes", {"name": "a box", "metadata": {"team": "x"}})
    assert (view["status"], view["name"], view["metadata"]) == ("provisioning", "a box", {"team": "x"})
    assert (view["end_time_ms"], view["tunnel"], view["capabilities"]) == (None, None, [])
    view = api.wait_box(view["id"], "running")
    assert statuses(view) == ["provisioning", "initializing", "running"]
    times = [transition["transition_time_ms"] for transition in view["state_transitions"]]
    assert times == sorted(times)
    ended = api.shutdown(view["id"])
    assert (ended["status"], ended["shutdown_reason"]) == ("shutdown", "api_shutdown")
    assert ended["end_time_ms"] >= times[-1]
    assert api.box(view["id"])["status"] == "shutdown"
    assert api.shutdown(view["id"])["status"] == "shutdown"


def test_environment_files_and_launch_commands_come_before_running(api: Api) -> None:
    box = api.create(
        environment_variables={"COLOUR": "blue green"},
        file_mounts={"notes/a.txt": "mounted", "/tmp/b.txt": "b", "/etc/owned-by-root.conf": "c"},
        launch_parameters={
            "launch_commands": ["cat notes/a.txt > seen", "echo $COLOUR >> seen"],
            "resource_size_request": "X_SMALL",
        },
    )
    assert api.output(box, "cat seen /etc/owned-by-root.conf; stat -c %U notes/a.txt") == "mountedblue green\ncuser\n"
    assert api.box(box)["launch_parameters"]["resource_size_request"] == "X_SMALL"
    api.shutdown(box)


def test_a_failing_launch_command_fails_the_box_with_its_output(api: Api) -> None:
    view = api.call(
        "POST",
        "/v1/devboxes/create_and_await_running",
        {"launch_parameters": {"launch_commands": ["true", "echo so it goes >&2; exit 9", "touch never"]}},
    )
    assert (view["status"], view["failure_reason"]) == ("failure", "execution_failed")
    reason = view["state_transitions"][-1]["failure_reason"]
    assert "2 of 3" in reason
    assert "so it goes" in reason
    assert "9" in reason
    assert view["end_time_ms"]


def test_too_little_memory_fails_a_launch_with_its_reason(api: Api) -> None:
    hungry = "python3 -c 'x = bytearray(2 << 30); print(len(x))'"
    view = api.call(
        "POST",
        "/v1/devboxes/create_and_await_running",
        {"launch_parameters": {"launch_commands": [hungry], "resource_size_request": "X_SMALL"}},
    )
    assert (view["status"], view["failure_reason"]) == ("failure", "out_of_memory")


def test_too_little_memory_ends_a_command_and_not_its_box(api: Api) -> None:
    box = api.create(launch_parameters={"resource_size_request": "X_SMALL"})
    view = api.run(box, "python3 -c 'x = bytearray(2 << 30)'")
    assert view["exit_status"] == 137
    assert api.output(box, "echo alive") == "alive\n"
    api.shutdown(box)


def test_the_entrypoint_ends_the_box(api: Api) -> None:
    view = api.call("POST", "/v1/devboxes", {"entrypoint": "until [ -e /tmp/leave ]; do sleep 0.02; done"})
    api.wait_box(view["id"], "running")
    api.output(view["id"], "touch /tmp/leave; sleep 0")
    view = api.wait_box(view["id"], "shutdown")
    assert view["shutdown_reason"] == "entrypoint_exit"


def test_the_deadline_ends_the_box_and_keep_alive_moves_it(api: Api) -> None:
    box = api.create(launch_parameters={"keep_alive_time_seconds": 2})
    created = api.box(box)["create_time_ms"]
    while time.time() * 1000 < created + 1500:
        assert api.call("POST", f"/v1/devboxes/{box}/keep_alive") == {}
    view = api.wait_box(box, "shutdown")
    assert view["shutdown_reason"] == "keep_alive_timeout"
    assert view["end_time_ms"] >= created + 3000
    api.refused("POST", f"/v1/devboxes/{box}/keep_alive", 400)


def test_a_box_can_be_shut_down_before_it_runs(api: Api) -> None:
    view = api.call("POST", "/v1/devboxes", {"launch_parameters": {"launch_commands": ["sleep 60"]}})
    assert api.shutdown(view["id"])["status"] == "shutdown"


def test_root_and_other_users(api: Api) -> None:
    root = api.create(launch_parameters={"user_parameters": {"username": "root", "uid": 0}})
    assert api.output(root, "id -u; pwd") == "0\n/root\n"
    api.shutdown(root)
    other = api.create(launch_parameters={"user_parameters": {"username": "dana", "uid": 1234}}, file_mounts={"f": "x"})
    assert api.output(other, "id -un; id -u; pwd; stat -c %U f; sudo id -u") == "dana\n1234\n/home/dana\ndana\n0\n"
    api.shutdown(other)
    renamed = api.create(launch_parameters={"user_parameters": {"username": "kim", "uid": 1000}})
    assert api.output(renamed, "id -un; pwd; sudo id -u") == "kim\n/home/kim\n0\n"
    api.shutdown(renamed)


def test_update_is_a_patch(api: Api, box: str) -> None:
    path = f"/v1/devboxes/{box}"
    view = api.call("POST", path, {"name": "new", "metadata": {"a": "1"}})
    assert (view["name"], view["metadata"]) == ("new", {"a": "1"})
    assert api.call("POST", path, {"metadata": {"b": "2"}})["name"] == "new"
    assert api.call("POST", path, {"name": ""})["name"] is None
    assert api.call("POST", path, {"metadata": {}})["metadata"] == {}


def test_a_repeated_update_undoes_nothing(own_server: Server) -> None:
    """Who got no answer asks again, perhaps after somebody else's change."""
    with own_server.api() as api:
        box = api.create()
        snapshot = api.call("POST", f"/v1/devboxes/{box}/snapshot_disk")["id"]
        paths = (f"/v1/devboxes/{box}", f"/v1/devboxes/disk_snapshots/{snapshot}")
        headers = {"x-request-id": str(uuid.uuid4())}
        first = [api.call("POST", path, {"name": "first"}, headers=headers) for path in paths]
        for path in paths:
            api.call("POST", path, {"name": "second"})
        assert [api.call("POST", path, {"name": "first"}, headers=headers) for path in paths] == first
        own_server.kill()
    own_server.start()
    with own_server.api() as api:
        assert api.call("POST", paths[0], {"name": "first"}, headers=headers) == first[0]
        assert api.call("POST", paths[1], {"name": "first"}, headers=headers)["id"] == snapshot
        assert api.box(box)["name"] == "second"
        assert api.call("GET", f"{paths[1]}/status")["snapshot"]["name"] == "second"


def test_lists_walk_newest_first(own_server: Server) -> None:
    with own_server.api() as api:
        made = [api.call("POST", "/v1/devboxes", {"name": str(i)})["id"] for i in range(5)]
        for box in made:
            api.wait_box(box, "running")
        first = api.call("GET", "/v1/devboxes", params={"limit": 2})
        assert [box["id"] for box in first["devboxes"]] == made[:2:-1]
        assert (first["has_more"], first["total_count"]) == (True, 5)
        rest = api.call("GET", "/v1/devboxes", params={"limit": 3, "starting_after": made[3]})
        assert [box["id"] for box in rest["devboxes"]] == made[2::-1]
        assert rest["has_more"] is False
        uncounted = api.call("GET", "/v1/devboxes", params={"include_total_count": "false"})
        assert uncounted["total_count"] is None
        api.shutdown(made[0])
        assert [box["id"] for box in api.boxes(status="shutdown")] == made[:1]
        assert [box["id"] for box in api.boxes(status="running")] == made[:0:-1]


def test_waits_hold_and_end(api: Api, box: str) -> None:
    path = f"/v1/devboxes/{box}/wait_for_status"
    assert api.call("POST", path, {"statuses": ["running"]})["id"] == box
    begun = time.monotonic()
    answer = api.http.post(path, json={"statuses": ["suspended"], "timeout_seconds": 0.25})
    assert (answer.status_code, answer.headers["x-should-retry"]) == (408, "true")
    assert time.monotonic() - begun >= 0.25


def test_a_wait_for_what_can_never_be_is_held_too(api: Api) -> None:
    """Clients answer 408 by asking again, without a pause."""
    box = api.create()
    execution = api.run(box, "true")["execution_id"]
    api.shutdown(box)
    with api.events(f"/v1/devboxes/{box}/logs/tail", {}) as events:
        list(events)  # it ends when the devbox is freed
    path = f"/v1/devboxes/{box}"
    for waited, status in ((path, "running"), (f"{path}/executions/{execution}", "queued")):
        begun = time.monotonic()
        body = {"statuses": [status], "timeout_seconds": 0.5}
        answer = api.http.post(f"{waited}/wait_for_status", json=body)
        assert (answer.status_code, answer.headers["x-should-retry"]) == (408, "true")
        assert time.monotonic() - begun >= 0.5
    assert api.call("POST", f"{path}/wait_for_status", {"statuses": ["shutdown"]})["status"] == "shutdown"


def test_a_create_is_done_once_per_request(api: Api) -> None:
    headers = {"x-request-id": str(uuid.uuid4())}
    first = api.http.post("/v1/devboxes", json={"name": "once"}, headers=headers).json()
    again = api.http.post("/v1/devboxes", json={"name": "once"}, headers=headers).json()
    assert first["id"] == again["id"]
    other = api.http.post("/v1/devboxes", json={"name": "twice"}, headers=headers)
    assert (other.status_code, other.headers["x-should-retry"]) == (409, "false")
    api.shutdown(first["id"])


def test_an_ended_box_refuses_use_and_keeps_its_executions(api: Api) -> None:
    box = api.create()
    done = api.run(box, "echo kept")
    open_end = api.start(box, "echo partial; sleep 100")
    with api.stream(box, open_end) as events:
        next(events)
    api.shutdown(box)
    assert "ended" in api.refused("POST", f"/v1/devboxes/{box}/execute_async", 400, {"command": "echo"})
    assert api.execution(box, done["execution_id"])["stdout"] == "kept\n"
    view = api.wait(box, open_end)
    assert (view["exit_status"], view["stdout"]) == (137, "partial\n")
    assert api.streamed(box, open_end) == "partial\n"

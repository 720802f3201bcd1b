"""The logs of a devbox: what its commands said, bounded, also after its end."""

from __future__ import annotations

from typing import Any

import pytest

from support.api import Api
from support.server import Server

pytestmark = pytest.mark.box


def logs(api: Api, box: str, **query: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = api.call("GET", f"/v1/devboxes/{box}/logs", params=query)["logs"]
    return found


def messages(entries: list[dict[str, Any]]) -> list[str]:
    return [entry["message"] for entry in entries]


def test_each_command_with_its_lines_oldest_first(api: Api) -> None:
    box = api.create(launch_parameters={"launch_commands": ["echo made"]}, entrypoint="echo serving; sleep 600")
    first = api.run(box, "echo one; echo two; echo bad >&2; exit 3")["execution_id"]
    second = api.run(box, "printf 'no end'", shell_name="work")["execution_id"]
    found = logs(api, box)
    assert {"-> echo made", "made", "-> echo serving; sleep 600"} < set(messages(found))
    assert {entry["source"] for entry in found} == {"setup_commands", "entrypoint", "exec", "stats"}
    own = [entry for entry in found if entry["source"] == "exec"]
    assert messages(own) == [
        "-> echo one; echo two; echo bad >&2; exit 3", "one", "two", "bad", "-> printf 'no end'", "no end"
    ]  # fmt: skip
    assert [entry["cmd_id"] for entry in own] == [first] * 4 + [second] * 2
    assert [entry["level"] for entry in own[:4]] == ["info", "info", "info", "error"]
    assert (own[0]["exit_code"], own[0]["cmd"]) == (3, "echo one; echo two; echo bad >&2; exit 3")
    assert [entry["timestamp_ms"] for entry in found] == sorted(entry["timestamp_ms"] for entry in found)
    assert messages(logs(api, box, execution_id=first)) == messages(own)[:4]
    assert messages(logs(api, box, shell_name="work")) == messages(own)[4:]
    assert logs(api, box, shell_name="other") == []
    api.shutdown(box)
    assert messages(logs(api, box, execution_id=second)) == messages(own)[4:]


def test_a_running_command_shows_its_lines_so_far(api: Api, box: str) -> None:
    execution = api.start(box, "echo soon; sleep 600")
    while "soon" not in messages(logs(api, box, execution_id=execution)):
        pass
    assert logs(api, box, execution_id=execution)[0]["exit_code"] is None
    api.call("POST", f"/v1/devboxes/{box}/executions/{execution}/kill", {})


def test_logs_are_bounded_and_keep_the_newest(api: Api, box: str) -> None:
    api.run(box, ": " + "x" * 300_000)
    api.run(box, "seq 1 3000")
    found = logs(api, box)
    assert len(found) == 1000
    assert messages(found)[-1] == "3000"
    api.run(box, "head -c 900000 /dev/zero | tr '\\0' a; echo; head -c 900000 /dev/zero | tr '\\0' b")
    found = logs(api, box)
    assert messages(found)[-2:] == ["..." + "a" * 16384, "..." + "b" * 16384]
    assert "3000" in messages(found), "a long line leaves room for what was before it"
    api.run(box, "for i in $(seq 200); do head -c 16000 /dev/zero | tr '\\0' c; echo; done")
    assert 1 << 19 < sum(len(message) for message in messages(logs(api, box))) <= 1 << 20
    for number in range(3):
        api.run(box, f": {number} " + "x" * 300_000)
    assert all(len(message) < 2000 for message in messages(logs(api, box)[-3:]))


@pytest.mark.parametrize("size", [1_000_000, 1 << 20, 3 << 20])
def test_a_line_of_a_megabyte_hides_nothing_of_others(api: Api, box: str, size: int) -> None:
    api.run(box, f"echo early of {size}")
    command = f"head -c {size} /dev/zero | tr '\\0' ä; echo; echo after >&2"
    own = api.run(box, command)["execution_id"]
    api.run(box, "echo late")
    found = messages(logs(api, box))
    assert found[-2:] == ["-> echo late", "late"]
    assert f"early of {size}" in found
    told = messages(logs(api, box, execution_id=own))
    assert (told[0], told[-1]) == (f"-> {command}", "after")
    assert told[-2].startswith("...")
    assert 16_000 < len(told[-2].encode()) <= 3 + 16_384


def test_unknown_things_have_no_logs(api: Api, box: str) -> None:
    api.refused("GET", f"/v1/devboxes/{box}/logs?execution_id=unknown", 404)
    api.refused("GET", "/v1/devboxes/dbx_000000000000000000000/logs", 404)


def test_the_states_of_a_devbox_are_told_with_their_reasons(api: Api) -> None:
    box = api.create()
    api.run(box, "echo work")
    api.shutdown(box)
    found = logs(api, box)
    states = [entry for entry in found if entry["source"] == "stats"]
    assert [entry["message"].removeprefix("the devbox is ") for entry in states] == [
        "provisioning", "initializing", "running", "shutdown: api_shutdown"
    ]  # fmt: skip
    times = [step["transition_time_ms"] for step in api.box(box)["state_transitions"]]
    assert [entry["timestamp_ms"] for entry in states] == times
    assert all(entry["cmd_id"] is None and entry["level"] == "info" for entry in states)
    assert messages(found)[-1] == "the devbox is shutdown: api_shutdown"
    assert messages(found).index("work") > messages(found).index("the devbox is running")
    failing = {"launch_commands": ["exit 7"]}
    failed = api.call("POST", "/v1/devboxes", {"launch_parameters": failing})["id"]
    api.wait_box(failed, "failure")
    last = logs(api, failed)[-1]
    assert last["level"] == "error"
    assert last["message"].startswith("the devbox is failure: ")
    assert api.box(failed)["failure_reason"] in last["message"]
    assert api.box(failed)["state_transitions"][-1]["failure_reason"] in last["message"]


def test_processes_killed_for_lack_of_memory_are_told_once(own_server: Server) -> None:
    with own_server.api() as api:
        box = api.create(launch_parameters={"resource_size_request": "X_SMALL"})
        greedy = "python3 -c 'x = bytearray(3 << 30)'"
        assert api.run(box, greedy)["exit_status"] == 137
        (told,) = [entry for entry in logs(api, box) if entry["source"] == "kmsg"]
        assert (told["level"], told["message"]) == (
            "error", "the kernel killed a process for lack of memory: 1 GiB were not enough"
        )  # fmt: skip
        own_server.restart()
        assert [entry for entry in logs(api, box) if entry["source"] == "kmsg"] == [told]
        api.call("POST", f"/v1/devboxes/{box}/suspend")
        api.wait_box(box, "suspended")
        assert [entry for entry in logs(api, box) if entry["source"] == "kmsg"] == [told]
        api.call("POST", f"/v1/devboxes/{box}/resume")
        api.wait_box(box, "running")
        second = api.run(box, greedy)
        assert second["exit_status"] == 137
        api.shutdown(box)
        found = logs(api, box)
        assert [entry["message"] for entry in found if entry["source"] == "kmsg"] == [told["message"]] * 2
        assert not [e for e in logs(api, box, execution_id=second["execution_id"]) if e["source"] in ("kmsg", "stats")]

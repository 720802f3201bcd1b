"""The usage of a devbox: exact over suspends and restarts, and what it uses at this moment."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devboxd.devboxes.states import Status
from devboxd.devboxes.store import Devbox
from devboxd.devboxes.usage import spans, used
from devboxd.devboxes.views import LaunchParameters, StateTransition
from support.api import Api
from support.server import Server

_MIB = 1 << 20
gaps = st.integers(0, 10_000_000)


def devbox(transitions: list[StateTransition], end: int | None, launch: LaunchParameters) -> Devbox:
    return Devbox(
        id="dbx_1", account_id="acc_1", name=None, status=Status(transitions[-1].status),
        create_time_ms=transitions[0].transition_time_ms, end_time_ms=end, deadline_ms=0, failure_reason=None,
        shutdown_reason=None, transitions=transitions, metadata={}, launch_parameters=launch, environment={},
        file_mounts={}, entrypoint=None, prepared=True, disk_freed=False, swept=False,
    )  # fmt: skip


def history(start: int, steps: list[tuple[str, int]]) -> tuple[list[StateTransition], int]:
    """Transitions from statuses and how long each lasted, and when the last one was over."""
    found = []
    for status, lasted in steps:
        found.append(StateTransition(status, start))
        start += lasted
    return found, start


@given(
    st.integers(0, 1 << 45),
    st.lists(st.tuples(st.sampled_from(["provisioning", "running", "suspended"]), gaps), min_size=1),
)
def test_what_was_not_suspended_was_active(start: int, steps: list[tuple[str, int]]) -> None:
    transitions, end = history(start, steps)
    awake = sum(lasted for status, lasted in steps if status != "suspended")
    assert spans(transitions, end) == (awake, end - start)


@given(st.lists(st.tuples(st.sampled_from(["running", "suspended"]), st.integers(-10_000, 10_000)), min_size=1))
def test_a_clock_that_is_set_back_gives_no_nonsense(steps: list[tuple[str, int]]) -> None:
    transitions, end = history(1 << 40, steps)
    active, elapsed = spans(transitions, end)
    assert 0 <= active <= elapsed


@given(st.lists(st.tuples(st.sampled_from(["running", "suspended"]), gaps), min_size=1), gaps, gaps)
def test_usage_never_shrinks_and_stops_at_the_end(steps: list[tuple[str, int]], more: int, after: int) -> None:
    transitions, last = history(1 << 40, steps)
    launch = LaunchParameters(resource_size_request="LARGE")
    early, late = (used(devbox(transitions, None, launch), last + time) for time in (0, more))
    names = ("total_active_seconds", "total_elapsed_seconds", "vcpu_seconds", "memory_gb_seconds", "disk_gb_seconds")
    for name in names:
        assert 0 <= getattr(early, name) <= getattr(late, name)
    ended = [*transitions, StateTransition("shutdown", last + more)]
    whole = used(devbox(ended, last + more, launch), last + more + after)
    assert [getattr(whole, name) for name in names] == [getattr(late, name) for name in names]
    assert (whole.status, whole.end_time_ms) == ("shutdown", last + more)


def test_the_sums_follow_the_size() -> None:
    transitions, now = history(5_000, [("provisioning", 400), ("running", 10_700), ("suspended", 20_000)])
    view = used(devbox(transitions, None, LaunchParameters(resource_size_request="X_SMALL")), now)
    assert (view.total_active_seconds, view.total_elapsed_seconds) == (11, 31)
    assert (view.vcpu_seconds, view.memory_gb_seconds, view.disk_gb_seconds) == (5, 11, 31 * 4)
    assert (view.start_time_ms, view.end_time_ms, view.live) == (5_000, None, None)


def usage(api: Api, box: str) -> dict[str, Any]:
    found: dict[str, Any] = api.call("GET", f"/v1/devboxes/{box}/usage")
    return found


@pytest.mark.box
def test_live_figures_tell_what_commands_do(api: Api) -> None:
    box = api.create(launch_parameters={"resource_size_request": "SMALL"})
    before = usage(api, box)
    assert (before["id"], before["status"], before["end_time_ms"]) == (box, "running", None)
    api.output(box, "python3 -c 'x = bytearray(300 << 20); sum(range(5_000_000))'")
    holder = api.start(box, "sleep 600")
    after = usage(api, box)["live"]
    assert after["cpu_seconds"] > before["live"]["cpu_seconds"] + 0.02
    assert after["memory_peak_bytes"] > 300 * _MIB
    assert 0 < after["memory_bytes"] < after["memory_peak_bytes"]
    assert after["pids"] >= 2, "the agent and a sleep"
    api.call("POST", f"/v1/devboxes/{box}/executions/{holder}/kill", {})
    api.output(box, "python3 -c 'import socket; s = socket.socket(2, 2); s.sendto(bytes(1000), (\"192.0.2.1\", 9))'")
    assert usage(api, box)["live"]["network_out_bytes"] >= after["network_out_bytes"] + 1000
    assert isinstance(after["network_in_bytes"], int)
    api.shutdown(box)
    ended = usage(api, box)
    assert ended["live"] is None
    assert ended["status"] == "shutdown"
    assert ended["end_time_ms"] == api.box(box)["end_time_ms"]
    assert usage(api, box) == ended, "what has ended uses nothing more"
    api.refused("GET", "/v1/devboxes/dbx_000000000000000000000/usage", 404)


@pytest.mark.box
def test_a_restart_of_the_server_changes_no_sum(own_server: Server) -> None:
    with own_server.api() as api:
        box = api.create()
        before = usage(api, box)
        own_server.restart()
        after = usage(api, box)
        assert after["start_time_ms"] == before["start_time_ms"]
        elapsed = after["total_elapsed_seconds"]
        assert elapsed == after["total_active_seconds"] >= before["total_elapsed_seconds"]
        assert after["live"]["cpu_seconds"] >= before["live"]["cpu_seconds"] > 0, "the box went on"


@pytest.mark.box
def test_a_devbox_that_sleeps_uses_its_disk_alone(api: Api) -> None:
    box = api.create()
    api.call("POST", f"/v1/devboxes/{box}/suspend")
    api.wait_box(box, "suspended")
    first = usage(api, box)
    assert (first["status"], first["live"]) == ("suspended", None)
    while (later := usage(api, box))["total_elapsed_seconds"] < first["total_elapsed_seconds"] + 2:
        pass
    assert later["total_active_seconds"] == first["total_active_seconds"]
    assert later["vcpu_seconds"] == first["vcpu_seconds"]
    assert later["disk_gb_seconds"] > first["disk_gb_seconds"]
    api.call("POST", f"/v1/devboxes/{box}/resume")
    api.wait_box(box, "running")
    awake = usage(api, box)
    assert awake["live"]["pids"] > 0
    assert awake["total_active_seconds"] < awake["total_elapsed_seconds"]
    api.shutdown(box)

"""When a devbox is idle, by a clock of the test's own; and what its policy then does, on real ones."""

from __future__ import annotations

import contextlib
import sqlite3
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devboxd.devboxes.idle import CPU_SHARE, Idle, Signs
from devboxd.store.db import FILE_NAME
from support.api import Api
from support.reader import Reader
from support.server import Server

QUIET = Signs(0, (), 0, 0.0)
SIGNS = st.builds(
    Signs,
    commands=st.integers(0, 2),
    uses=st.sampled_from([(), ("stream",), ("file transfer", "stream")]),
    touched_ms=st.integers(0, 200_000),
    cpu_share=st.floats(0, 2),
    snapshot=st.booleans(),
)


@pytest.mark.parametrize(
    ("signs", "word"),
    [
        (Signs(1, (), 0, 0.0), "1 running command"),
        (Signs(2, (), 0, 0.0), "2 running commands"),
        (Signs(0, ("stream",), 0, 0.0), "an open stream"),
        (Signs(0, (), 0, 0.5), "50% of a processor"),
        (Signs(0, (), 0, 0.0, snapshot=True), "a snapshot that is being taken"),
    ],
)
def test_work_keeps_it_awake_and_is_named(signs: Signs, word: str) -> None:
    assert word in signs.reasons()[0]
    assert Idle(5).look(10_000, signs) == Idle(None)


def test_it_is_idle_since_the_first_quiet_look_or_the_last_request() -> None:
    idle = Idle(None).look(10_000, QUIET)
    assert idle.left_s(10_000, 60) == 60
    assert idle.look(50_000, QUIET).left_s(50_000, 60) == 20
    assert idle.look(70_000, QUIET).left_s(70_000, 60) == 0
    touched = idle.look(50_000, Signs(0, (), 45_000, CPU_SHARE))
    assert touched.left_s(50_000, 60) == 55


def test_a_clock_that_was_set_back_starts_the_time_anew() -> None:
    assert Idle(90_000).look(10_000, QUIET) == Idle(10_000)


@given(st.lists(st.tuples(st.integers(1, 30_000), SIGNS), max_size=30))
def test_it_is_never_due_before_it_was_quiet_for_as_long(looks: list[tuple[int, Signs]]) -> None:
    now, idle, quiet_since = 0, Idle(None), None
    for step, signs in looks:
        now += step
        idle = idle.look(now, signs)
        if signs.reasons():
            quiet_since = None
        elif quiet_since is None:
            quiet_since = now
        if idle.left_s(now, 60) == 0:
            assert quiet_since is not None
            assert now - quiet_since >= 60_000
            assert now - min(signs.touched_ms, now) >= 60_000


@pytest.mark.box
def test_an_idle_devbox_is_suspended_and_a_used_one_is_not(api: Api) -> None:
    policy = {"idle_time_seconds": 1, "on_idle": "suspend"}
    box = api.create(launch_parameters={"after_idle": policy})
    execution = api.start(box, "sleep 2.5; echo worked")
    assert api.wait(box, execution)["stdout"] == "worked\n", "it was awake all the time"
    api.wait_box(box, "suspended")
    api.call("POST", f"/v1/devboxes/{box}/resume")
    api.wait_box(box, "running")
    api.wait_box(box, "suspended")
    api.shutdown(box)


@pytest.mark.box
def test_an_idle_devbox_is_shut_down_and_says_so(api: Api) -> None:
    policy = {"idle_time_seconds": 1, "on_idle": "shutdown"}
    box = api.create(launch_parameters={"lifecycle": {"after_idle": policy}})
    view = api.wait_box(box, "shutdown")
    assert view["shutdown_reason"] == "idle"


@pytest.mark.box
def test_an_open_stream_and_processes_at_work_keep_it_awake(api: Api, server: Server) -> None:
    policy = {"idle_time_seconds": 1, "on_idle": "shutdown"}
    box = api.create(launch_parameters={"after_idle": policy})
    # a daemon of which no execution knows any more
    api.run(box, "setsid timeout 3 sh -c 'while :; do :; done' >/dev/null 2>&1 & echo $!")
    worked = api.start(box, "while pgrep -x timeout >/dev/null; do sleep 0.1; done; echo over")
    Reader(server, box, worked).until(lambda reader: reader.text == "over\n")
    assert api.box(box)["status"] == "running"
    assert api.wait_box(box, "shutdown")["shutdown_reason"] == "idle"


@pytest.mark.box
def test_usage_names_what_keeps_it_awake(api: Api) -> None:
    def awake(reasons: list[str]) -> None:
        deadline = time.monotonic() + 30
        while (found := api.call("GET", f"/v1/devboxes/{box}/usage")["awake"]) != reasons:
            assert time.monotonic() < deadline, found
            time.sleep(0.05)

    box = api.create(launch_parameters={"after_idle": {"idle_time_seconds": 600, "on_idle": "shutdown"}})
    runs = [api.start(box, "sleep 1000") for _ in range(2)]
    awake(["2 running commands"])
    with api.stream(box, runs[0]):
        awake(["2 running commands", "an open stream"])
    api.call("POST", f"/v1/devboxes/{box}/executions/{runs[0]}/kill")
    awake(["1 running command"])
    api.call("POST", f"/v1/devboxes/{box}/suspend")
    api.wait_box(box, "suspended")
    awake([])
    api.call("POST", f"/v1/devboxes/{box}/resume")
    api.wait_box(box, "running")
    awake([])
    api.shutdown(box)


@pytest.mark.box
def test_the_time_begins_anew_with_each_start(api: Api, server: Server) -> None:
    policy = {"idle_time_seconds": 60, "on_idle": "shutdown"}
    box = api.create(launch_parameters={"after_idle": policy})
    deadline = time.monotonic() + 30
    while not any(box in line and "devbox idle" in line for line in server.log.read_text().splitlines()):
        assert time.monotonic() < deadline, server.tail()
        time.sleep(0.02)
    assert idle_since(server, box) is not None
    api.call("POST", f"/v1/devboxes/{box}/suspend")
    api.wait_box(box, "suspended")
    assert idle_since(server, box) is None, "a resume would find the time over"
    api.shutdown(box)


def idle_since(server: Server, box: str) -> int | None:
    """What a server that starts now would go on from."""
    with contextlib.closing(sqlite3.connect(server.state / FILE_NAME)) as store:
        (since,) = store.execute("SELECT idle_since_ms FROM devboxes WHERE id = ?", [box]).fetchone()
    found: int | None = since
    return found


@pytest.mark.box
def test_the_time_goes_on_over_a_restart_of_the_server(own_server: Server) -> None:
    policy = {"idle_time_seconds": 3, "on_idle": "shutdown"}
    with own_server.api() as api:
        box = api.create(launch_parameters={"after_idle": policy})
    own_server.kill()
    own_server.start()
    with own_server.api() as api:
        assert api.wait_box(box, "shutdown")["shutdown_reason"] == "idle"

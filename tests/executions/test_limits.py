"""Bounds of executions: how many run at once, and how much of their output is kept."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.api import Api
from support.server import Server

pytestmark = pytest.mark.box


@pytest.fixture(scope="module")
def small() -> Iterator[Api]:
    """A server that runs three commands in a box and keeps 100,000 bytes of a stream."""
    server = Server(executions_per_box="3", journal_cap_bytes="100000")
    try:
        with server.start().api() as api:
            yield api
    finally:
        server.stop()


def test_past_the_bound_429_names_the_limit(small: Api) -> None:
    box = small.create()
    running = [small.start(box, "sleep 70") for _ in range(3)]
    message = small.refused("POST", f"/v1/devboxes/{box}/execute_async", 429, {"command": "echo four"})
    assert "3" in message
    small.call("POST", f"/v1/devboxes/{box}/executions/{running[0]}/kill")
    assert small.output(box, "echo four") == "four\n"
    small.shutdown(box)


def test_past_the_cap_output_is_cut_and_the_command_goes_on(small: Api) -> None:
    box = small.create()
    execution = small.start(box, "head -c 300000 /dev/zero | tr '\\0' x; echo fine >&2; exit 4")
    view = small.wait(box, execution)
    assert (view["exit_status"], view["stderr"]) == (4, "fine\n")
    assert (view["stdout_truncated"], view["stderr_truncated"]) == (True, False)
    assert small.streamed(box, execution) == "x" * 100_000
    assert small.execution(box, execution, last_n="1")["stdout"] == "x" * 100_000
    small.shutdown(box)


def test_all_output_of_a_devbox_together_is_bounded() -> None:
    """Past the bound 64 KiB of each stream are kept of every command, and commands go on as before."""
    server = Server(journals_per_box_bytes="4000000", journal_cap_bytes="1000000")
    try:
        with server.start().api() as api:
            box, other = api.create(), api.create()
            kept = [len(api.streamed(box, _wrote(api, box))) for _ in range(40)]
            assert kept[0] == 500_000
            assert kept[-1] == 65536
            assert sum(kept) < 4_000_000 + 40 * 65536
            assert len(api.streamed(other, _wrote(api, other))) == 500_000
    finally:
        server.stop()


def _wrote(api: Api, box: str) -> str:
    view = api.run(box, "head -c 900000 /dev/zero | tr '\\0' x")
    assert (view["exit_status"], view["stdout_truncated"]) == (0, True)
    return str(view["execution_id"])

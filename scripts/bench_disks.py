"""Figures of disks and sleep: snapshots of much, devboxes from them, suspend and resume."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from bench_client import Line, quantile, times
from bench_figure import Figure

from support.server import Server

if TYPE_CHECKING:
    from bench import Bench

_ROUNDS = 10
_MANY = "mkdir many && head -c 200000000 /dev/urandom | split -b 10000 -a 4 --additional-suffix=.x - many/"
_MUCH = "head -c 1000000000 /dev/urandom >much"


def snapshots(bench: Bench) -> Iterator[Figure]:
    """200 MB in 20,000 files, while the devbox runs; then devboxes from the snapshot."""
    with bench.line() as line:
        box = bench.create()
        bench.execute(line, box, _MANY)
        taken: list[str] = []
        found = times(lambda: taken.append(line.json("POST", f"/v1/devboxes/{box}/snapshot_disk", {})["id"]), _ROUNDS)
        yield _figure("live snapshot of 200 MB in 20,000 files", 100, 10, found)
        made: list[str] = []

        def once() -> None:
            made.append(line.json("POST", "/v1/devboxes/create_and_await_running", {"snapshot_id": taken[0]})["id"])
            bench.execute(line, made[-1])

        found = []
        for _ in range(_ROUNDS):
            found += times(once, 1)
            time.sleep(0.1)  # as people ask: now and then
        yield _figure("devbox from that snapshot to the end of its first command", 40, 20, found)
        bench.end([*made, box])
        for snapshot in taken:
            line.call("POST", f"/v1/devboxes/disk_snapshots/{snapshot}/delete", {})


def _figure(work: str, must: float, aim: float, found: list[float]) -> Figure:
    return Figure(f"{work}, p50", "ms", must, aim, quantile(sorted(found), 0.5), None, "")


def sleep(bench: Bench) -> Iterator[Figure]:
    """Suspend and resume of a devbox with 1 GB on its disk; then with its memory kept."""
    with bench.line() as line:
        box = bench.create()
        bench.execute(line, box, _MUCH)
        pairs = [_slept(bench, line, box) for _ in range(_ROUNDS)]
        bench.end([box])
    yield _figure("suspend of a devbox with 1 GB changed", 500, 100, [one for one, _ in pairs])
    yield _figure("resume of it to the end of the first command", 60, 20, [one for _, one in pairs])
    server = Server(suspend_keep_memory_seconds="600", warm_boxes="2").start()
    try:
        keeping = type(bench)(server)
        with keeping.line() as line:
            pairs = [_slept(keeping, line, keeping.box) for _ in range(_ROUNDS)]
    finally:
        server.stop()
    found = [one for _, one in pairs]
    yield _figure("resume from memory to the end of a command", 10, 3, found)


def _slept(bench: Bench, line: Line, box: str) -> tuple[float, float]:
    """Milliseconds of a suspend, and of a resume with a command."""

    def step(verb: str, status: str) -> Any:
        line.call("POST", f"/v1/devboxes/{box}/{verb}", {})
        return line.call("POST", f"/v1/devboxes/{box}/wait_for_status", {"statuses": [status]})

    def woken() -> None:
        step("resume", "running")
        bench.execute(line, box)

    return times(lambda: step("suspend", "suspended"), 1)[0], times(woken, 1)[0]

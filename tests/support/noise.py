"""Devboxes that take all they can get, each in a way of its own, and what a neighbour feels of it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from support.api import Api
from support.leftovers import CGROUPS
from support.server import Server

_SIZE = {"resource_size_request": "CUSTOM_SIZE", "custom_cpu_cores": 2, "custom_gb_memory": 4}
_BEGUN = "the noise has begun"
_MEMORY = """
import os
while True:
    if (child := os.fork()) == 0:
        kept = []
        while True:
            kept.append(b"x" * (1 << 24))
    os.waitpid(child, 0)
"""
_DESCRIPTORS = """
import os, resource
hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
def fill():
    kept = []
    try:
        while True:
            kept.extend(os.pipe())
    except OSError:
        os._exit(0)
while True:
    for _ in range(200):
        if os.fork() == 0:
            fill()
    for _ in range(200):
        os.wait()
"""
NOISES = {
    "burns CPU": "for n in $(seq 16); do while :; do :; done & done; wait",
    "takes all memory": f"exec python3 -c '{_MEMORY}'",
    "forks without end": "f() { f | f & }; while :; do f; done 2>/dev/null",
    "prints 10 GB": "while :; do yes 'ten gigabytes of this' | head -c 10G; done",
    "opens every descriptor": f"exec python3 -c '{_DESCRIPTORS}'",
    "never reads its stdin": "exec sleep infinity",
}


@contextlib.contextmanager
def noise(api: Api, kind: str) -> Iterator[str]:
    """A devbox that makes this noise while the block lasts; its id. At the end all of it is gone."""
    box = api.create(name=kind, launch_parameters=_SIZE)
    try:
        execution = api.start(box, f"echo {_BEGUN}; {NOISES[kind]}", attach_stdin=True)
        with api.stream(box, execution) as events:
            assert _BEGUN in next(event.output for event in events if event.output)
        if kind == "never reads its stdin":
            while api.send(box, execution, "x" * (1 << 20)):
                pass
        yield box
    finally:
        api.shutdown(box)
        for _ in range(600):
            if not any(CGROUPS.glob(f"**/boxes/{box}")):
                break
            time.sleep(0.1)  # the kernel tells nobody when the last process of a group has gone
        else:
            raise AssertionError(f"{box} is still there")


@dataclass(frozen=True)
class Figures:
    """What `measure` found: seconds of each `execute` in the quiet and in the noisy phases, and bytes of the server."""

    quiet: list[float]
    noisy: list[float]
    level: int
    most: int

    @property
    def ratio(self) -> float:
        """The p95 of the noisy phases, of the quiet ones being 1."""
        return p95(self.noisy) / p95(self.quiet)


def measure(server: Server, api: Api, neighbour: str, kind: str, *, rounds: int, seconds: float) -> Figures:
    """Quiet and noisy phases by turns, of so many seconds each. Every command must give its right output."""
    quiet: list[float] = []
    noisy: list[float] = []
    ask(api, neighbour, seconds)
    level = most = memory(server)
    for _ in range(rounds):
        quiet += ask(api, neighbour, seconds)
        with noise(api, kind):
            for _ in range(4):
                noisy += ask(api, neighbour, seconds / 4)
                most = max(most, memory(server))
    return Figures(quiet, noisy, level, most)


def ask(api: Api, box: str, seconds: float) -> list[float]:
    """Run one command after the other for a while, at least ten; the seconds that each took."""
    took: list[float] = []
    end = time.monotonic() + seconds
    while (begun := time.monotonic()) < end or len(took) < 10:
        command_id = f"c{time.monotonic_ns()}"
        body = {"command": f"echo {command_id}", "command_id": command_id}
        view = api.call("POST", f"/v1/devboxes/{box}/execute", body)
        if view["status"] != "completed":
            view = api.wait(box, view["execution_id"])
        took.append(time.monotonic() - begun)
        assert (view["status"], view["exit_status"], view["stdout"]) == ("completed", 0, f"{command_id}\n"), view
    return took


def p95(values: list[float]) -> float:
    """What 95 of 100 values do not exceed."""
    return sorted(values)[int(len(values) * 0.95)]


def memory(server: Server) -> int:
    """Bytes of memory that the server holds and nobody else does."""
    rows = Path(f"/proc/{server.pid}/smaps_rollup").read_text().splitlines()
    return 1024 * sum(int(row.split()[1]) for row in rows if row.startswith("Private_"))

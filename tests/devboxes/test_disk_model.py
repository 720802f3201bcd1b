"""Disks and snapshots against a model: what the model knows is what each of them holds, whatever happened before.

DISK_STEPS=4000 goes on for longer; CRASH_SEED repeats a run.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.disks import READY
from support.server import Server
from support.tree import PREPARE, Tree, changes, differences, read_tree

STEPS = int(os.environ.get("DISK_STEPS", "16"))
"""How many things happen to disks, in each of two ways to sleep."""
_A_ROUND = 45
"""So many steps on, everything is compared, ended and begun anew."""
_MOST = 4
_HASTY = 0.08
_SNAPSHOTS = "/v1/devboxes/disk_snapshots"
_LAUNCH = {"launch_commands": [PREPARE]}
pytestmark = [pytest.mark.box, pytest.mark.timeout(300 + 10 * STEPS)]


@pytest.mark.parametrize("keep", ["0", "600"], ids=["processes end asleep", "memory is kept asleep"])
def test_each_disk_and_snapshot_holds_what_the_model_knows(keep: str) -> None:
    seed = f"{os.environ['CRASH_SEED']}/{keep}"
    server = Server(suspend_keep_memory_seconds=keep)
    try:
        server.start()
        for number in range(0, STEPS, _A_ROUND):
            disks = Disks(server, random.Random(f"{seed}/{number}"))
            for _ in range(min(_A_ROUND, STEPS - number)):
                disks.step()
            disks.end()
    finally:
        server.stop()


class Disks:
    """Devboxes and snapshots of a server, each with the tree that it must have. Every step is printed."""

    def __init__(self, server: Server, chance: random.Random) -> None:
        self._server = server
        self._chance = chance
        self._api = server.api()
        self._running: dict[str, Tree] = {}
        self._asleep: dict[str, Tree] = {}
        self._snapshots: dict[str, Tree] = {}
        self._ended: list[str] = []
        first = self._api.create(launch_parameters=_LAUNCH)
        self._fresh = read_tree(self._api, first)
        self._running[first] = dict(self._fresh)

    def step(self) -> None:
        """Let something happen by chance, and compare whom it happened to."""
        room = len(self._running) + len(self._asleep) < _MOST
        acts: list[tuple[int, Callable[[], None], bool]] = [
            (1, self._create, room),
            (4, self._fork, room and bool(self._snapshots)),
            (8, self._change, bool(self._running)),
            (4, self._snapshot, bool(self._running) and len(self._snapshots) < 2 * _MOST),
            (3, self._suspend, bool(self._running)),
            (4, self._resume, bool(self._asleep)),
            (1, self._shutdown, not room),
            (2, self._delete, len(self._snapshots) > 1),
        ]
        possible = [(weight, act) for weight, act, may in acts if may] or [(1, self._create)]
        (act,) = self._chance.choices([act for _, act in possible], [weight for weight, _ in possible])
        act()
        for box in self._some(self._running):
            self._compare(box)

    def end(self) -> None:
        """Compare everything, end all devboxes, delete all snapshots; nothing of them is left."""
        for box in list(self._asleep):
            self._ask(f"/v1/devboxes/{box}/resume")
            self._api.wait_box(box, "running")
            self._running[box] = self._asleep.pop(box)
        for snapshot, tree in self._snapshots.items():
            forks = [self._api.create(snapshot_id=snapshot, launch_parameters=_LAUNCH)]
            self._api.output(forks[0], changes(dict(tree), self._chance, 3))
            forks.append(self._api.create(snapshot_id=snapshot, launch_parameters=_LAUNCH))
            self._say("compare", snapshot, "by", forks[1])
            assert (found := differences(self._api, forks[1], tree)) == "", f"{snapshot}, seen by {forks[1]}:\n{found}"
            self._ended += [str(self._api.shutdown(fork)["id"]) for fork in forks]
        for box in list(self._running):
            self._compare(box)
            self._shutdown(box)
        for snapshot in list(self._snapshots):
            self._ask(f"{_SNAPSHOTS}/{snapshot}/delete")
        for box in self._ended:
            assert self._api.box(box)["status"] == "shutdown", f"{box} was shut down"
        folder, deadline = self._server.state / "disks", time.monotonic() + 60
        while (left := [name for name in _names(folder) if not name.startswith(READY)]) and time.monotonic() < deadline:
            time.sleep(0.05)  # what ended is removed in the background
        assert not left, "disks of nobody"
        self._api.http.close()

    # what happens

    def _create(self) -> None:
        self._begun(self._ask("/v1/devboxes", {"launch_parameters": _LAUNCH}), dict(self._fresh))

    def _fork(self) -> None:
        (snapshot,) = self._some(self._snapshots)
        body = {"snapshot_id": snapshot, "launch_parameters": _LAUNCH}
        self._begun(self._ask("/v1/devboxes", body), dict(self._snapshots[snapshot]))

    def _begun(self, view: Any, tree: Tree) -> None:
        self._maybe_crash()
        self._reach(view["id"], "running")
        self._running[view["id"]] = tree
        self._compare(view["id"])

    def _change(self) -> None:
        (box,) = self._some(self._running)
        command = changes(self._running[box], self._chance, self._chance.randrange(1, 7))
        execution = self._ask(f"/v1/devboxes/{box}/execute_async", {"command": command})["execution_id"]
        self._maybe_crash()
        view = self._api.wait(box, execution)
        assert view["exit_status"] == 0, view

    def _snapshot(self) -> None:
        """One or some at once; at a crash each is taken or not."""
        (box,) = self._some(self._running)
        path = f"/v1/devboxes/{box}/snapshot_disk_async"
        begun = [self._ask(path, {})["id"] for _ in range(self._chance.randrange(1, 3))]
        crashed = self._maybe_crash()
        for snapshot in begun:
            told = self._settled(snapshot)
            if crashed and told["status"] == "error":
                assert told["error_message"], told
                self._say(snapshot, "ended as", told["error_message"])
            else:
                assert told["status"] == "complete", told
                self._snapshots[snapshot] = dict(self._running[box])

    def _suspend(self) -> None:
        (box,) = self._some(self._running)
        self._ask(f"/v1/devboxes/{box}/suspend")
        self._asleep[box] = self._running.pop(box)
        self._maybe_crash()
        self._reach(box, "suspended")

    def _resume(self) -> None:
        (box,) = self._some(self._asleep)
        self._ask(f"/v1/devboxes/{box}/resume")
        self._running[box] = self._asleep.pop(box)
        self._maybe_crash()
        self._reach(box, "running")
        self._compare(box)

    def _shutdown(self, box: str | None = None) -> None:
        """Of one that runs or sleeps."""
        box = box or self._some({**self._running, **self._asleep})[0]
        self._ask(f"/v1/devboxes/{box}/shutdown")
        self._running.pop(box, None)
        self._asleep.pop(box, None)
        self._ended.append(box)
        self._maybe_crash()

    def _delete(self) -> None:
        """Also while its last box is being made: then it waits for that."""
        (snapshot,) = self._some(self._snapshots)
        self._ask(f"{_SNAPSHOTS}/{snapshot}/delete")
        del self._snapshots[snapshot]
        self._maybe_crash()
        assert self._settled(snapshot)["status"] == "deleted"

    # means

    def _some(self, of: dict[str, Tree]) -> list[str]:
        return [self._chance.choice(list(of))] if of else []

    def _ask(self, path: str, body: Any = None) -> Any:
        view = self._api.call("POST", path, body)
        self._say(path, body or "", "->", (view or {}).get("id") or (view or {}).get("execution_id") or "")
        return view

    def _maybe_crash(self) -> bool:
        """At times the server dies at once after its answer, or a moment later."""
        if self._chance.random() >= _HASTY:
            return False
        time.sleep(self._chance.choice([0, 0, 0.01, 0.03]))  # the moment is what varies here
        self._say("crash")
        self._api.http.close()
        self._server.restart()
        self._api = self._server.api()
        return True

    def _reach(self, box: str, status: str) -> None:
        assert self._api.wait_box(box, status, "failure")["status"] == status, self._api.box(box)

    def _settled(self, snapshot: str) -> Any:
        deadline = time.monotonic() + 60
        while (told := self._api.call("GET", f"{_SNAPSHOTS}/{snapshot}/status"))["status"] == "in_progress":
            assert time.monotonic() < deadline, f"{snapshot} is never settled"
            time.sleep(0.01)  # it has no operation that waits
        return told

    def _compare(self, box: str) -> None:
        assert (found := differences(self._api, box, self._running[box])) == "", f"{box}:\n{found}"

    def _say(self, *words: Any) -> None:
        print(f"{time.strftime('%H:%M:%S')}", *words)


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())

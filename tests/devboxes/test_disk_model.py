"""Disks against a model that knows what each must hold, whatever is made, kept, forked, put to sleep, ended or killed.

`MODEL_STEPS` makes it longer, CRASH_SEED repeats a run.
"""

from __future__ import annotations

import hashlib
import os
import random
import shlex
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from support.api import Api
from support.server import Server

STEPS = int(os.environ.get("MODEL_STEPS", "70"))
pytestmark = [pytest.mark.box, pytest.mark.timeout(120 + 5 * STEPS)]
SNAPSHOTS = "/v1/devboxes/disk_snapshots"
PLACES = ("/tmp/m", "/home/user/m", "/opt/m")
MOST = 4

Files = dict[str, str]
"""Paths and what stands there: the content of a file, or `-> target` of a link."""


@dataclass
class Model:
    """What there is, and what it must hold."""

    running: dict[str, Files] = field(default_factory=dict)
    asleep: dict[str, Files] = field(default_factory=dict)
    kept: dict[str, Files] = field(default_factory=dict)


class Walk:
    """One random sequence of steps on a server."""

    def __init__(self, server: Server, api: Api, seed: str) -> None:
        self._server = server
        self._api = api
        self._chance = random.Random(seed)
        self.model = Model()
        self.done: list[str] = []

    def step(self) -> None:
        """Any step that is possible now."""
        model, chance = self.model, self._chance
        steps: list[tuple[int, Callable[[], str], bool]] = [
            (3, self.create, len(model.running) + len(model.asleep) < MOST),
            (8, self.change, bool(model.running)),
            (4, self.snapshot, bool(model.running) and len(model.kept) < 2 * MOST),
            (3, self.suspend, bool(model.running)),
            (4, self.resume, bool(model.asleep)),
            (1, self.shutdown, bool(model.running or model.asleep)),
            (2, self.delete, bool(model.kept)),
            (1, self.crash, True),
        ]
        possible = [(weight, act) for weight, act, may in steps if may]
        (act,) = chance.choices([act for _, act in possible], [weight for weight, _ in possible])
        self.done.append(act())

    def create(self) -> str:
        source = self._chance.choice([None, *self.model.kept])
        box = self._api.create(**({"snapshot_id": source} if source else {}))
        if source is None:
            self._api.run(box, f"sudo install -d -o user {' '.join(PLACES)}")
        self.model.running[box] = dict(self.model.kept[source]) if source else {}
        self._compare(box)
        return f"create {box} from {source}"

    def change(self) -> str:
        box = self._chance.choice(list(self.model.running))
        files = self.model.running[box]
        lines = [self._changed(files) for _ in range(self._chance.randint(1, 12))]
        view = self._api.run(box, "set -e\n" + "\n".join(lines))
        assert view["exit_status"] == 0, (lines, view)
        if self._chance.random() < 0.3:
            self._compare(box)
        return f"change {box}: {lines}"

    def _changed(self, files: Files) -> str:
        """One change, made in the model; the command for it."""
        chance, plain = self._chance, [path for path in files if not files[path].startswith("-> ")]
        kind = chance.choice(["write", "write", "append", "rename", "delete", "link"])
        if kind == "append" and plain:
            path, more = chance.choice(plain), f"more {chance.random()}\n" * chance.randint(1, 2000)
            files[path] += more
            return f"printf %s {shlex.quote(more)} >>{path}"
        if kind == "delete" and files:
            path = chance.choice(list(files))
            del files[path]
            return f"rm {path}"
        target = f"{chance.choice(PLACES)}/{'/'.join(chance.choice('abc') for _ in range(chance.randint(0, 3)))}/{kind}"
        target = f"{os.path.normpath(target)}{chance.randint(0, 5)}"
        begin = f"mkdir -p {os.path.dirname(target)}; rm -f {target}; "
        if kind == "rename" and files:
            path = chance.choice(list(files))
            content = files.pop(path)
            files[target] = content
            return f"mkdir -p {os.path.dirname(target)}; [ {path} = {target} ] || mv -fT {path} {target}"
        if kind == "link":
            files[target] = "-> /etc/passwd"
            return begin + f"ln -s /etc/passwd {target}"
        files[target] = f"{chance.random()}\n" * chance.choice([0, 1, 10, 3000])
        return begin + f"printf %s {shlex.quote(files[target])} >{target}"

    def snapshot(self) -> str:
        box = self._chance.choice(list(self.model.running))
        taken = str(self._api.call("POST", f"/v1/devboxes/{box}/snapshot_disk", {})["id"])
        self.model.kept[taken] = dict(self.model.running[box])
        return f"snapshot {taken} of {box}"

    def suspend(self) -> str:
        box = self._chance.choice(list(self.model.running))
        self._api.call("POST", f"/v1/devboxes/{box}/suspend")
        if self._chance.random() < 0.8:
            self._api.wait_box(box, "suspended")
        self.model.asleep[box] = self.model.running.pop(box)
        return f"suspend {box}"

    def resume(self) -> str:
        box = self._chance.choice(list(self.model.asleep))
        self._api.wait_box(box, "suspended")
        self._api.call("POST", f"/v1/devboxes/{box}/resume")
        self._api.wait_box(box, "running")
        self.model.running[box] = self.model.asleep.pop(box)
        self._compare(box)
        return f"resume {box}"

    def shutdown(self) -> str:
        box = self._chance.choice([*self.model.running, *self.model.asleep])
        if box in self.model.asleep:
            self._api.wait_box(box, "suspended")
        self._api.shutdown(box)
        self.model.running.pop(box, None)
        self.model.asleep.pop(box, None)
        return f"shutdown {box}"

    def delete(self) -> str:
        snapshot = self._chance.choice(list(self.model.kept))
        self._api.call("POST", f"{SNAPSHOTS}/{snapshot}/delete")
        del self.model.kept[snapshot]
        return f"delete {snapshot}"

    def crash(self) -> str:
        self._server.restart()
        for box in self.model.running:
            self._api.wait_box(box, "running")
        return "crash"

    def finish(self) -> None:
        """Compare all that there is: every disk, and a disk from every snapshot."""
        for box in list(self.model.running):
            self._compare(box)
            self._api.shutdown(box)
        for box, files in self.model.asleep.items():
            self._api.wait_box(box, "suspended")
            self._api.call("POST", f"/v1/devboxes/{box}/resume")
            self._api.wait_box(box, "running")
            self.model.running[box] = files
            self._compare(box)
            self._api.shutdown(box)
        for snapshot, files in self.model.kept.items():
            box = self._api.create(snapshot_id=snapshot)
            self.model.running[box] = files
            self._compare(box)
            self._api.shutdown(box)

    def _compare(self, box: str) -> None:
        all_of = f"find {' '.join(PLACES)}"
        find = f"{all_of} -type f -exec sha256sum {{}} +; {all_of} -type l -printf '-> %l  %p\\n'"
        execution = self._api.start(box, find)
        found = self._api.streamed(box, execution).splitlines()  # a view ends with its last 100 lines
        wanted = map(_line, self.model.running[box].items())
        assert sorted(found) == sorted(wanted), f"{box} after\n" + "\n".join(step[:200] for step in self.done)


def _line(entry: tuple[str, str]) -> str:
    path, content = entry
    return f"{content if content.startswith('-> ') else hashlib.sha256(content.encode()).hexdigest()}  {path}"


def test_every_disk_holds_what_was_written_to_it(own_server: Server) -> None:
    seed = os.environ["CRASH_SEED"]
    with own_server.api() as api:
        walk = Walk(own_server, api, seed)
        for _ in range(STEPS):
            walk.step()
        walk.finish()
        left = {path.name for path in (own_server.state / "disks").iterdir() if path.name.startswith("snp_")}
        assert left == set(walk.model.kept), "a snapshot was lost, or one that was deleted is still there"

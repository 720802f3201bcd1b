"""A load of clients who know what they must find afterwards: for tests that end the server at a bad moment.

`Load.check` compares every byte and exit code with what the commands really wrote.
"""

from __future__ import annotations

import contextlib
import random
import threading
import uuid
from collections.abc import Callable
from functools import partial

import httpx

from support import casualties
from support.actor import COME_AGAIN, PATIENCE_S, SNAPSHOTS, Actor, Client, Notes, Started
from support.api import Api
from support.server import Server

_OUTSTANDING = 6
_UPLOAD = 300_000
_KEPT = 6


class Load:
    """Clients at work in threads of their own, from the beginning of the block until its end."""

    def __init__(self, server: Server, seed: str) -> None:
        self.notes = Notes()
        self._server = server
        self._seed = seed
        self._stop = threading.Event()
        self._faults: list[BaseException] = []
        self._threads: list[threading.Thread] = []
        self._done: dict[str, int] = {}

    def __enter__(self) -> Load:
        client = Client(self._server)
        self.box = client.ask("/v1/devboxes", {"name": f"load {self._seed}"})["id"]
        client.wait(f"/v1/devboxes/{self.box}", "running")
        acts = {
            "commands": _commands,
            "more commands": _commands,
            "feeder": _feed,
            "other feeder": _feed,
            "shell": _shell,
            "maker": _make,
            "other maker": _make,
            "writer": _write,
            "follower": _follow,
            "keeper": _keep,
            "sleeper": _sleep,
            "killer of runtimes": casualties.kill_runtime,
            **{f"killer while {moment}": partial(casualties.kill_agent, moment) for moment in casualties.MOMENTS},
        }
        for name, act in acts.items():
            thread = threading.Thread(target=self._work, args=(name, act), name=name, daemon=True)
            self._threads.append(thread)
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * PATIENCE_S)
            assert not thread.is_alive(), f"the {thread.name} never finished"

    def _work(self, name: str, act: Callable[[Actor], None]) -> None:
        try:
            actor = Actor(name, Client(self._server), self.box, self.notes, random.Random(f"{self._seed}/{name}"))
            while not self._stop.is_set():
                act(actor)
                self._done[name] = actor.number
        except BaseException as fault:
            self._faults.append(fault)

    def check(self) -> int:
        """Compare all that was confirmed with what happened, while the server is up; how many executions there were.

        Ends the devbox of the load afterwards.
        """
        assert not self._faults, f"a client found a fault: {self._faults!r}"
        assert len(self._done) == len(self._threads), f"some did nothing at all: {self._done}"
        with self._server.api() as api:
            for started in self.notes.executions:
                _check_execution(api, started)
            for path, names in self.notes.names.items():
                found = api.read(self.box, path).split()
                assert found == names or sorted(found) == sorted(names), f"{path}: {found} instead of {names}"
            for path, content in self.notes.files.items():
                assert api.download(self.box, path) == content, path
            left = api.output(self.box, "find ~ /tmp -name '.devboxd-*'")
            assert left == "", f"temporary files of uploads: {left}"
            self._check_boxes(api)
            self._check_disks(api)
            casualties.check(api, self._server, self.notes.dead)
            spools = list((self._server.state / "journals" / self.box).glob("*.stdin"))
            assert spools == [], "texts that nobody will read any more"
            api.shutdown(self.box)
        return len(self.notes.executions)

    def _check_boxes(self, api: Api) -> None:
        views = {view["id"]: view for view in api.boxes()}
        names = [view["name"] for view in views.values()]
        for name, box in self.notes.boxes.items():
            assert names.count(name) == 1, f"{names.count(name)} devboxes are called {name}"
            assert (views[box]["status"], views[box]["shutdown_reason"]) == ("shutdown", "api_shutdown"), views[box]
        assert sorted(self.notes.ended) == sorted(self.notes.boxes.values())

    def _check_disks(self, api: Api) -> None:
        """Each diary is whole, in its devbox and in devboxes from snapshots; no other snapshot is left."""
        for snapshot, lines in self.notes.snapshots.items():
            box = api.create(snapshot_id=snapshot)
            assert api.streamed(box, api.start(box, "cat diary")).splitlines() == lines, snapshot
            api.shutdown(box)
        for box, lines in self.notes.diaries.items():
            assert api.streamed(box, api.start(box, "cat diary")).splitlines() == lines, box
            found = api.call("GET", SNAPSHOTS, params={"devbox_id": box, "limit": 1000})["snapshots"]
            assert {view["id"] for view in found} == {s for s in self.notes.snapshots if self.notes.sources[s] == box}
            api.shutdown(box)
        for snapshot in self.notes.snapshots:
            api.call("POST", f"{SNAPSHOTS}/{snapshot}/delete")


def _check_execution(api: Api, started: Started) -> None:
    view = api.wait(started.box, started.id)
    what = f"{started.id} ({started.command[:200]}): {view}"
    assert view["exit_status"] == started.status, what
    assert api.streamed(started.box, started.id) == started.stdout(), what
    assert api.streamed(started.box, started.id, "stderr") == started.stderr(), what


def _some(chance: random.Random, most: float) -> int:
    """A size: small ones and large ones are equally likely."""
    return int(10 ** chance.uniform(0, most))


def _commands(actor: Actor) -> None:
    """Start a command with much or little output, at once or bit by bit; wait when many are open."""
    word, chance = actor.word(), actor.chance
    lines, errors, status = _some(chance, 4.8), _some(chance, 3), chance.randrange(256)
    command = f"seq -f {word}-%.0f {{}} {{}}; seq {errors} >&2; exit {status}"
    if chance.random() < 0.5:
        pieces = chance.randrange(2, 8)
        lines = max(lines // pieces, 1) * pieces
        each = lines // pieces
        several = "".join(f"seq -f {word}-%.0f {n * each + 1} {(n + 1) * each}; sleep 0.1; " for n in range(pieces))
        command = f"{several}seq {errors} >&2; exit {status}"
    else:
        command = command.format(1, lines)
    started = Started(actor.box, "", command, status, (f"{word}-", lines), None, errors)
    actor.open.append(actor.start(started, word, f"ran-{actor.name.replace(' ', '-')}"))
    if len(actor.open) == _OUTSTANDING:
        actor.wait(actor.open.pop(0))


def _feed(actor: Actor) -> None:
    """Give a command its stdin piece by piece; the box keeps a copy of its own as a witness."""
    word, chance = actor.word(), actor.chance
    status = chance.randrange(256)
    started = Started(actor.box, "", f"tee copy-{word}; exit {status}", status, fed=[])
    actor.start(started, word, f"ran-{actor.name.replace(' ', '-')}", attach_stdin=True)
    path = f"{actor.path}/executions/{started.id}/send_std_in"
    assert started.fed is not None
    for number in range(chance.randrange(1, 10)):
        text = f"{number} of {word} " + "é" * _some(chance, 5) + "\n"
        assert actor.client.ask(path, {"text": text})["success"] is True, started
        started.fed.append(text)
    assert actor.client.ask(path, {"signal": "EOF"})["success"] is True, started
    actor.notes.files[f"copy-{word}"] = started.stdout().encode()


def _shell(actor: Actor) -> None:
    """Queue some commands in a named shell, which counts them."""
    for _ in range(actor.chance.randrange(1, 5)):
        word = actor.word()
        started = Started(actor.box, "", f"n=$((n + 1)); seq -f {word}-%.0f $n", 0, (f"{word}-", actor.number))
        actor.open.append(actor.start(started, word, "ran-shell", shell_name="counter"))
    while actor.open:
        actor.wait(actor.open.pop(0))


def _make(actor: Actor) -> None:
    """Make a devbox, use it and end it."""
    word = f"{actor.word()} of {actor.box}"
    body = {"name": word, "launch_parameters": {"launch_commands": ["echo launched-1 >> launches"]}}
    box = actor.client.ask("/v1/devboxes", body)["id"]
    actor.notes.boxes[word] = box
    view = actor.client.wait(f"/v1/devboxes/{box}", "running", "failure")
    assert view["status"] == "running", view
    started = Started(box, "", "cat launches; exit 5", 5, ("launched-", 1))
    actor.wait(actor.start(started, "ran", "ran"))
    assert actor.client.ask(f"/v1/devboxes/{box}/shutdown")["status"] == "shutdown"
    actor.notes.ended.append(box)


def _write_diary(actor: Actor) -> list[str]:
    """Write a line into the diary of the actor's own devbox, which is made when there is none; the whole diary."""
    word = actor.word()
    if actor.own is None:
        view = actor.client.ask("/v1/devboxes", {"name": f"{actor.name} of {actor.box}"})
        actor.own = str(view["id"])
        actor.client.wait(f"/v1/devboxes/{actor.own}", "running")
        actor.notes.diaries[actor.own] = []
    view = actor.client.ask(f"/v1/devboxes/{actor.own}/execute_async", {"command": f"echo {word} >>diary"})
    ended = actor.client.wait(f"/v1/devboxes/{actor.own}/executions/{view['execution_id']}", "completed")
    assert ended["exit_status"] == 0, ended
    actor.notes.diaries[actor.own].append(word)
    return actor.notes.diaries[actor.own]


def _keep(actor: Actor) -> None:
    """Keep the disk as it is; a snapshot is complete in the end, or says why not. Old ones are deleted."""
    lines = list(_write_diary(actor))
    assert actor.own is not None
    actor.keep(actor.own, lines)
    if len(actor.notes.snapshots) > _KEPT:
        old = actor.chance.choice(list(actor.notes.snapshots))
        del actor.notes.snapshots[old]
        actor.client.ask(f"{SNAPSHOTS}/{old}/delete")


def _sleep(actor: Actor) -> None:
    """Put a devbox to sleep and wake it up; its disk stays."""
    _write_diary(actor)
    for verb, status in (("suspend", "suspended"), ("resume", "running")):
        path = f"/v1/devboxes/{actor.own}"
        actor.client.ask(f"{path}/{verb}")
        assert actor.client.wait(path, status)["status"] == status


def _write(actor: Actor) -> None:
    """Replace a file again and again: what was confirmed last is there."""
    path = f"file-{actor.chance.randrange(3)}"
    content = f"{actor.word()} ".encode() * (actor.chance.randrange(_UPLOAD) + 1)
    headers = {"x-request-id": str(uuid.uuid4())}
    for _ in actor.client.tries():
        with contextlib.suppress(httpx.TransportError):
            answer = actor.client.api.http.post(
                f"{actor.path}/upload_file", data={"path": path}, files={"file": ("f", content)}, headers=headers
            )
            if answer.status_code not in COME_AGAIN:
                assert answer.status_code == 200, answer.text
                actor.notes.files[path] = content
                return


def _follow(actor: Actor) -> None:
    """Read the output of a slow command as it comes, over every death of the server."""
    word = actor.word()
    command = f"for i in $(seq 200); do echo {word}-$i; sleep 0.01; done"
    started = actor.start(Started(actor.box, "", command, 0, (f"{word}-", 200)), word, "ran-follower")
    assert actor.client.follow(actor.box, started.id) == started.stdout()
    actor.wait(started)

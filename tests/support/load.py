"""A load of clients who know what they must find afterwards: for tests that end the server at a bad moment.

Each client repeats a request under its id until it is answered, as the published clients do, and notes what was
confirmed. `Load.check` then compares every byte and exit code with what the commands really wrote.
"""

from __future__ import annotations

import contextlib
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from support.api import Api
from support.server import Server

PATIENCE_S = 120.0
_COME_AGAIN = (408, 503)
_OUTSTANDING = 6
_UPLOAD = 300_000
_SNAPSHOTS = "/v1/devboxes/disk_snapshots"
_KEPT = 6


@dataclass
class Started:
    """A confirmed execution, and what it must show in the end."""

    box: str
    id: str
    command: str
    status: int
    out: tuple[str, int] = ("", 0)
    """A word and how many numbered lines of it stand in stdout."""
    fed: list[str] | None = None
    """What was confirmed as taken on stdin, which stdout repeats."""
    err: int = 0
    """How many numbers stand in stderr."""
    completed: bool = False
    """The API said so."""

    def stdout(self) -> str:
        """Every byte that the command wrote."""
        return "".join(self.fed) if self.fed is not None else counted(*self.out)

    def stderr(self) -> str:
        return counted("", self.err)


@dataclass
class Notes:
    """All that was confirmed so far: one thread adds to each list, anybody may look at any time."""

    boxes: dict[str, str] = field(default_factory=dict)
    """Devboxes by the names that were asked for."""
    ended: list[str] = field(default_factory=list)
    """Devboxes whose shutdown was confirmed."""
    executions: list[Started] = field(default_factory=list)
    names: dict[str, list[str]] = field(default_factory=dict)
    """The words that commands wrote into a file of the box, by the path of the file, in the order of their start."""
    files: dict[str, bytes] = field(default_factory=dict)
    """The contents of files that were uploaded, by path."""
    diaries: dict[str, list[str]] = field(default_factory=dict)
    """What devboxes that are kept or put to sleep wrote down, line by line."""
    snapshots: dict[str, list[str]] = field(default_factory=dict)
    """The diaries of complete snapshots."""
    sources: dict[str, str] = field(default_factory=dict)
    """The devboxes of snapshots."""


def counted(word: str, lines: int) -> str:
    """What `seq` prints for a word."""
    return "".join(f"{word}{i}\n" for i in range(1, lines + 1))


class Client:
    """One client of a server that comes and goes."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self.api: Api = server.api()

    def look(self, path: str) -> Any:
        """GET until it is answered; the decoded answer."""
        for _ in self._tries():
            with contextlib.suppress(httpx.TransportError):
                answer = self.api.http.get(path)
                if answer.status_code not in _COME_AGAIN:
                    assert answer.status_code == 200, f"{path}: {answer.status_code} {answer.text[:500]}"
                    return answer.json()
        raise AssertionError(f"{path} was not answered in {PATIENCE_S} s")

    def ask(self, path: str, body: Any = None, **options: Any) -> Any:
        """POST until it is answered, always under the same id; the decoded answer."""
        headers = {"x-request-id": str(uuid.uuid4())}
        for _ in self._tries():
            with contextlib.suppress(httpx.TransportError):
                answer = self.api.http.post(path, json=body, headers=headers, **options)
                if answer.status_code not in _COME_AGAIN:
                    assert answer.status_code == 200, f"{path}: {answer.status_code} {answer.text[:500]}"
                    return answer.json()
        raise AssertionError(f"{path} was not answered in {PATIENCE_S} s")

    def wait(self, path: str, *statuses: str) -> Any:
        """Wait until a devbox or an execution is in one of these statuses."""
        return self.ask(f"{path}/wait_for_status", {"statuses": list(statuses), "timeout_seconds": 5})

    def follow(self, box: str, execution: str, which: str = "stdout") -> str:
        """A whole stream, opened again where it broke, as a client does that counts bytes."""
        text, position = "", 0
        for _ in self._tries():
            with contextlib.suppress(httpx.TransportError, _AskedAgain):
                with self._stream(box, execution, which, position) as events:
                    for event in events:
                        text, position = text + event.output, event.end
                return text
        raise AssertionError(f"the {which} of {execution} did not end in {PATIENCE_S} s")

    @contextlib.contextmanager
    def _stream(self, box: str, execution: str, which: str, offset: int) -> Iterator[Any]:
        try:
            stream = self.api.stream(box, execution, which, offset)
            events = stream.__enter__()
        except AssertionError as refused:
            raise _AskedAgain from refused
        try:
            yield events
        finally:
            stream.__exit__(None, None, None)

    def _tries(self) -> Iterator[None]:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            yield
            time.sleep(0.02)  # nobody listens, or somebody asked for patience


class _AskedAgain(Exception):
    """The server said: not now."""


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
            found = api.call("GET", _SNAPSHOTS, params={"devbox_id": box, "limit": 1000})["snapshots"]
            assert {view["id"] for view in found} == {s for s in self.notes.snapshots if self.notes.sources[s] == box}
            api.shutdown(box)
        for snapshot in self.notes.snapshots:
            api.call("POST", f"{_SNAPSHOTS}/{snapshot}/delete")


def _check_execution(api: Api, started: Started) -> None:
    view = api.wait(started.box, started.id)
    what = f"{started.id} ({started.command[:200]}): {view}"
    assert view["exit_status"] == started.status, what
    assert api.streamed(started.box, started.id) == started.stdout(), what
    assert api.streamed(started.box, started.id, "stderr") == started.stderr(), what


@dataclass
class Actor:
    """Who does one kind of thing again and again."""

    name: str
    client: Client
    box: str
    notes: Notes
    chance: random.Random
    number: int = 0
    own: str | None = None
    """A devbox that nobody else uses."""
    open: list[Started] = field(default_factory=list)

    @property
    def path(self) -> str:
        return f"/v1/devboxes/{self.box}"

    def word(self) -> str:
        """A word that nobody else uses."""
        self.number += 1
        return f"{self.name.replace(' ', '-')}-{self.number}"

    def start(self, started: Started, word: str, file: str, **body: Any) -> Started:
        """Start a command that leaves its word in a file, which shows that it ran once."""
        command = f"echo {word} >> {file}; {started.command}"
        view = self.client.ask(f"/v1/devboxes/{started.box}/execute_async", {"command": command, **body})
        started.id = view["execution_id"]
        if started.box == self.box:
            self.notes.names.setdefault(file, []).append(word)
        self.notes.executions.append(started)
        return started

    def wait(self, started: Started) -> None:
        view = self.client.wait(f"/v1/devboxes/{started.box}/executions/{started.id}", "completed")
        assert view["exit_status"] == started.status, f"{started}: {view}"
        started.completed = True


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
    snapshot = actor.client.ask(f"/v1/devboxes/{actor.own}/snapshot_disk_async", {})["id"]
    seen: dict[str, Any] = {"status": "in_progress"}
    while seen["status"] == "in_progress":
        seen = actor.client.look(f"{_SNAPSHOTS}/{snapshot}/status")
    if seen["status"] == "complete":
        assert actor.own is not None
        actor.notes.sources[snapshot] = actor.own
        actor.notes.snapshots[snapshot] = lines
    else:
        assert (seen["status"], bool(seen["error_message"])) == ("error", True), seen
    if len(actor.notes.snapshots) > _KEPT:
        old = actor.chance.choice(list(actor.notes.snapshots))
        del actor.notes.snapshots[old]
        actor.client.ask(f"{_SNAPSHOTS}/{old}/delete")


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
    for _ in actor.client._tries():
        with contextlib.suppress(httpx.TransportError):
            answer = actor.client.api.http.post(
                f"{actor.path}/upload_file", data={"path": path}, files={"file": ("f", content)}, headers=headers
            )
            if answer.status_code not in _COME_AGAIN:
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

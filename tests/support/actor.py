"""A client of the load: it repeats a request until it is answered, and notes what was confirmed."""

from __future__ import annotations

import contextlib
import random
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from support.api import Api
from support.server import Server

PATIENCE_S = 120.0
COME_AGAIN = (408, 503)
SNAPSHOTS = "/v1/devboxes/disk_snapshots"


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
class Dead:
    """A devbox whose first process or runtime was killed, and what must be left of it."""

    box: str
    moment: str
    diary: list[str] = field(default_factory=list)
    """Lines on its disk, where that is not lost."""


@dataclass
class Notes:
    """All that was confirmed so far: anybody may look at any time."""

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
    dead: list[Dead] = field(default_factory=list)


def counted(word: str, lines: int) -> str:
    """What `seq` prints for a word."""
    return "".join(f"{word}{i}\n" for i in range(1, lines + 1))


class Client:
    """One client of a server that comes and goes."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.api: Api = server.api()

    def look(self, path: str) -> Any:
        """GET until it is answered; the decoded answer."""
        for _ in self.tries():
            with contextlib.suppress(httpx.TransportError):
                answer = self.api.http.get(path)
                if answer.status_code not in COME_AGAIN:
                    assert answer.status_code == 200, f"{path}: {answer.status_code} {answer.text[:500]}"
                    return answer.json()
        raise AssertionError(f"{path} was not answered in {PATIENCE_S} s")

    def ask(self, path: str, body: Any = None, **options: Any) -> Any:
        """POST until it is answered, always under the same id; the decoded answer."""
        headers = {"x-request-id": str(uuid.uuid4())}
        for _ in self.tries():
            with contextlib.suppress(httpx.TransportError):
                answer = self.api.http.post(path, json=body, headers=headers, **options)
                if answer.status_code not in COME_AGAIN:
                    assert answer.status_code == 200, f"{path}: {answer.status_code} {answer.text[:500]}"
                    return answer.json()
        raise AssertionError(f"{path} was not answered in {PATIENCE_S} s")

    def wait(self, path: str, *statuses: str) -> Any:
        """Wait until a devbox or an execution is in one of these statuses."""
        return self.ask(f"{path}/wait_for_status", {"statuses": list(statuses), "timeout_seconds": 5})

    def follow(self, box: str, execution: str, enough: str | None = None) -> str:
        """The whole stdout, or `enough` of it, opened again where it broke, as a client does that counts bytes."""
        text, position = "", 0
        for _ in self.tries():
            with contextlib.suppress(httpx.TransportError, _AskedAgain):
                with self._stream(box, execution, position) as events:
                    for event in events:
                        text, position = text + event.output, event.end
                        if text == enough:
                            break
                return text
        raise AssertionError(f"the stdout of {execution} did not end in {PATIENCE_S} s")

    @contextlib.contextmanager
    def _stream(self, box: str, execution: str, offset: int) -> Iterator[Any]:
        try:
            stream = self.api.stream(box, execution, "stdout", offset)
            events = stream.__enter__()
        except AssertionError as refused:
            raise _AskedAgain from refused
        try:
            yield events
        finally:
            stream.__exit__(None, None, None)

    def tries(self) -> Iterator[None]:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            yield
            time.sleep(0.02)  # nobody listens, or somebody asked for patience


class _AskedAgain(Exception):
    """The server said: not now."""


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

    def keep(self, box: str, diary: list[str]) -> None:
        """Keep the disk of a devbox with this diary: a snapshot is complete in the end, or says why not."""
        snapshot = self.client.ask(f"/v1/devboxes/{box}/snapshot_disk_async", {})["id"]
        seen: dict[str, Any] = {"status": "in_progress"}
        while seen["status"] == "in_progress":
            seen = self.client.look(f"{SNAPSHOTS}/{snapshot}/status")
        if seen["status"] == "complete":
            self.notes.sources[snapshot] = box
            self.notes.snapshots[snapshot] = diary
        else:
            assert (seen["status"], bool(seen["error_message"])) == ("error", True), seen

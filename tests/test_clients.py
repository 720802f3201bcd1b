"""The published clients against a real server: every generation works, and streams survive the server."""

from __future__ import annotations

import os
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pytest

from support import environments
from support.server import Server

pytestmark = [pytest.mark.box, pytest.mark.clients, pytest.mark.timeout(600)]

CLIENTS = Path(__file__).parent / "clients"
PYTHON_CASES = [
    "lifecycle",
    "create_and_wait_apart",
    "lists",
    "execute",
    "execute_once",
    "execute_sync",
    "stdin",
    "interrupt",
    "streams",
    "large_output",
    "kill",
    "named_shell",
    "files",
    "errors",
    "wait_ends",
    "sdk_callbacks",
    "many_at_once",
]
NPM_CASES = [
    "lifecycle",
    "execute",
    "stdin",
    "streams",
    "large_output",
    "kill",
    "named_shell",
    "files",
    "errors",
    "many_at_once",
]
NAMES = [*environments.PYTHON_VERSIONS, "npm"]


def _command(name: str, case: str) -> list[str]:
    """How a client runs one of its cases; skips with the reason when this machine cannot."""
    if name == "npm":
        if (reason := environments.no_node()) is not None:
            pytest.skip(reason)
        return ["node", str(CLIENTS / "client.mjs"), str(environments.npm_client()), case]
    return [str(environments.python_client(name)), str(CLIENTS / "client.py"), case]


def _environment(server: Server, box: str, **more: str) -> dict[str, str]:
    return {**os.environ, "RUNLOOP_BASE_URL": server.url, "RUNLOOP_API_KEY": server.key, "DEVBOX": box, **more}


def _run(name: str, case: str, server: Server, box: str) -> None:
    done = subprocess.run(
        _command(name, case), capture_output=True, text=True, timeout=180, env=_environment(server, box), check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]


@pytest.mark.parametrize("version", environments.OLD_PYTHON_VERSIONS)
def test_python_that_is_older(version: str, server: Server) -> None:
    command = [str(environments.python_client(version)), "-W", "ignore", str(CLIENTS / "oldest.py")]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=180, env=_environment(server, ""), check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-8000:]


@pytest.mark.parametrize("case", PYTHON_CASES)
@pytest.mark.parametrize("version", environments.PYTHON_VERSIONS)
def test_python(version: str, case: str, server: Server, box: str) -> None:
    if case == "named_shell" and version.startswith("3"):
        pytest.skip("this generation of the client has no named shells")
    _run(version, case, server, box)


@pytest.mark.parametrize("case", NPM_CASES)
def test_npm(case: str, server: Server, box: str) -> None:
    _run("npm", case, server, box)


class Follower:
    """A client that follows a stream in a process of its own; its output is read as it comes."""

    def __init__(self, name: str, server: Server, box: str, execution: str, **more: str) -> None:
        self.text = ""
        environment = _environment(server, box, EXECUTION=execution, **more)
        self._process = subprocess.Popen(
            _command(name, "follow"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        assert self._process.stdout is not None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read, args=(self._process.stdout,), daemon=True)
        self._thread.start()

    def until(self, check: Callable[[str], bool], seconds: float = 30) -> None:
        """Return when something is true of the text so far."""
        with self._changed:
            done = self._changed.wait_for(lambda: check(self.text), seconds)
        assert done, f"not in {seconds} s: {self.text[-500:]!r}"

    def end(self, seconds: float = 60) -> str:
        """Wait for the end of the client, which must be a good one; all that it received."""
        try:
            status = self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the client hangs after {self.text[-500:]!r}") from None
        self._thread.join()
        assert self._process.stderr is not None
        assert status == 0, self._process.stderr.read()[-4000:]
        return self.text

    def close(self) -> None:
        """End the client if it still runs."""
        self._process.kill()
        self._process.wait()
        self._thread.join()

    def _read(self, source: IO[str]) -> None:
        for line in source:
            with self._changed:
                self.text += line
                self._changed.notify_all()


@pytest.fixture
def follow(own_server: Server) -> Iterator[Callable[..., Follower]]:
    """Start followers that end with the test."""
    followers: list[Follower] = []

    def start(name: str, box: str, execution: str, **more: str) -> Follower:
        _command(name, "follow")
        followers.append(Follower(name, own_server, box, execution, **more))
        return followers[-1]

    yield start
    for follower in followers:
        follower.close()


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_goes_on_over_a_graceful_restart(
    name: str, own_server: Server, follow: Callable[..., Follower]
) -> None:
    """The client notices nothing: it opens the stream again by itself and joins what it got."""
    with own_server.api() as api:
        box = api.create()
        execution = api.start(box, "echo first; read line; echo $line; seq 5000", attach_stdin=True)
        follower = follow(name, box, execution, ONCE="yes")
        follower.until(lambda text: text == "first\n")
    own_server.terminate()
    own_server.start(120)
    with own_server.api() as api:
        assert api.send(box, execution, "second\n")
    assert follower.end() == "first\nsecond\n" + "".join(f"{n}\n" for n in range(1, 5001))


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_goes_on_over_a_restart_in_the_middle_of_output(
    name: str, own_server: Server, follow: Callable[..., Follower]
) -> None:
    command = "for i in $(seq 1 1500); do echo line $i; sleep 0.005; done"
    with own_server.api() as api:
        box = api.create()
        execution = api.start(box, command)
        follower = follow(name, box, execution, ONCE="yes")
        follower.until(lambda text: "line 50\n" in text)
    own_server.terminate()
    own_server.start(120)
    assert follower.end() == "".join(f"line {n}\n" for n in range(1, 1501))


@pytest.mark.parametrize("name", NAMES)
def test_a_stream_that_a_kill_cuts_is_opened_again_at_its_last_offset(
    name: str, own_server: Server, follow: Callable[..., Follower]
) -> None:
    with own_server.api() as api:
        box = api.create()
        execution = api.start(box, "echo first; read line; echo $line; read line; echo $line", attach_stdin=True)
        follower = follow(name, box, execution)
        follower.until(lambda text: text == "first\n")
    own_server.restart()
    with own_server.api() as api:
        assert api.send(box, execution, "second\n")
        follower.until(lambda text: text == "first\nsecond\n", 60)
    own_server.restart()
    with own_server.api() as api:
        assert api.send(box, execution, "third\n")
    assert follower.end() == "first\nsecond\nthird\n"

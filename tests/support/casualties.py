"""Devboxes that die in the middle of the load: their first process is killed, or the runtime that makes them.

Also single commands that a test ends from outside.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from devboxd.engine import linux
from support.actor import Actor, Dead, Started
from support.api import Api
from support.disks import upper
from support.leftovers import groups
from support.server import Server

MOMENTS = ("beginning", "running", "resuming")
"""In the life of a devbox, when its first process is killed."""
MAKING = "making"
"""The moment in which the runtime is."""
_PATIENCE_S = 30.0
_MOST_S = 0.02
"""Somewhat more than the runtime takes on a quiet machine."""


def end_sleeps(box: str, *seconds: str) -> None:
    """End the processes `sleep <seconds>` of a box, which run or are about to."""
    left = set(seconds)
    deadline = time.monotonic() + _PATIENCE_S
    while left:
        assert time.monotonic() < deadline, f"{left} do not run"
        for members in groups(f"*/boxes/{box}/cgroup.procs"):
            for pid in map(int, members.read_text().split()):
                with contextlib.suppress(OSError):
                    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
                    if words[0] == "sleep" and words[1] in left:
                        os.kill(pid, signal.SIGKILL)
                        left.remove(words[1])


def kill_agent(moment: str, actor: Actor) -> None:
    """Make a devbox and kill its first process at this moment of its life."""
    word, chance = actor.word(), actor.chance
    launch = "sleep 1000" if moment == "beginning" else "test ! -e slow || sleep 1000"
    box = _make(actor, {"launch_commands": [launch]})
    path = f"/v1/devboxes/{box}"
    dead = Dead(box, moment)
    if moment == "beginning":
        actor.client.wait(path, "initializing")
    else:
        actor.client.wait(path, "running")
        dead.diary = _used(actor, box, word)
    if moment == "resuming":
        for verb, status in (("suspend", "suspended"), ("resume", "initializing")):
            actor.client.ask(f"{path}/{verb}")
            actor.client.wait(path, status)
    time.sleep(chance.uniform(0, 0.2))  # the moment is what varies here
    _kill_first_process(actor.client.server, box)
    expected = "suspended" if moment == "resuming" else "failure"
    view = actor.client.wait(path, "failure", "suspended")
    assert (view["status"], view["failure_reason"]) == (expected, _reason(expected)), view
    assert view["state_transitions"][-1]["failure_reason"].startswith("its first process ended"), view
    actor.notes.dead.append(dead)


def kill_runtime(actor: Actor) -> None:
    """Make devboxes until the runtime was killed in the middle of one, which says so."""
    while not _killed_in_time(actor):
        pass


def _killed_in_time(actor: Actor) -> bool:
    """Not when the runtime had done its work already, or when a new server made the devbox again."""
    actor.word()
    box = _make(actor, {})
    was_killed = _kill_runtime(actor.client.server, box, actor.chance.uniform(0, _MOST_S))
    view = actor.client.wait(f"/v1/devboxes/{box}", "running", "failure")
    if view["status"] == "running":
        assert actor.client.ask(f"/v1/devboxes/{box}/shutdown")["status"] == "shutdown"
        return False
    assert was_killed, view
    assert view["failure_reason"] == "health_check_failed", view
    assert "was ended by signal 9" in view["state_transitions"][-1]["failure_reason"], view
    actor.notes.dead.append(Dead(box, MAKING))
    return True


def check(api: Api, server: Server, dead: list[Dead]) -> None:
    """What is shown of each, and that nothing of it stays on the machine."""
    for one in dead:
        if one.moment == "resuming":
            assert api.box(one.box)["status"] == "suspended", one
            with upper(server.state, one.box) as folder:
                found = (folder / "home/user/diary").read_text()
            assert found.splitlines() == one.diary, one
            api.shutdown(one.box)
        else:
            assert api.box(one.box)["status"] == "failure", one
    with contextlib.closing(sqlite3.connect(server.state / "devboxd.db")) as store:
        for one in dead:
            _check_ends(store, one)
    for one in dead:
        _check_gone(server, one)


def _reason(status: str) -> str | None:
    """What a view names as the reason, besides its words; a devbox that sleeps has not failed."""
    return "execution_failed" if status == "failure" else None


def _make(actor: Actor, launch: dict[str, Any]) -> str:
    body = {"name": f"{actor.name} {actor.number} of {actor.box}", "launch_parameters": launch}
    return str(actor.client.ask("/v1/devboxes", body)["id"])


def _used(actor: Actor, box: str, word: str) -> list[str]:
    """Run a command to its end that writes a diary, keep it sometimes, leave another running; the diary."""
    most = actor.chance.randrange(1, 1000)
    command = f"seq -f {word}-%.0f {most} | tee diary; touch slow; exit 3"
    written = Started(box, "", command, 3, (f"{word}-", most))
    actor.wait(actor.start(written, word, "ran"))
    diary = written.stdout().splitlines()
    if actor.chance.random() < 0.5:
        actor.keep(box, diary)
    command = f"seq -f {word}-%.0f {most}; sleep 1000"
    left = actor.start(Started(box, "", command, 128 + signal.SIGKILL, (f"{word}-", most)), word, "ran")
    assert actor.client.follow(box, left.id, enough=left.stdout()) == left.stdout()
    return diary


def _kill_first_process(server: Server, box: str) -> None:
    record = json.loads((server.boxes / box / "box.json").read_text())
    with _held(record["pid"]) as pidfd:
        assert linux.start_time(record["pid"]) == record["started"], f"{box} has ended by itself"
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)


def _kill_runtime(server: Server, box: str, seconds: float) -> bool:
    """Kill the runtime so many seconds into its work for a devbox; whether it was found."""
    made = server.boxes / box / "box.json"
    deadline = time.monotonic() + _PATIENCE_S
    while not made.exists() and time.monotonic() < deadline:
        for pid in _children(server.pid):
            with contextlib.suppress(OSError), _held(pid) as pidfd:
                words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
                if b"--bundle" in words and box.encode() in words:
                    time.sleep(seconds)  # the moment is what varies here
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                    return True
        time.sleep(0.001)
    return False


def _children(pid: int) -> list[int]:
    """Of a process that may end meanwhile, as its threads may."""
    found = []
    with contextlib.suppress(OSError):
        for thread in os.listdir(f"/proc/{pid}/task"):
            with contextlib.suppress(OSError):
                found += [int(word) for word in Path(f"/proc/{pid}/task/{thread}/children").read_text().split()]
    return found


@contextlib.contextmanager
def _held(pid: int) -> Iterator[int]:
    pidfd = os.pidfd_open(pid)
    try:
        yield pidfd
    finally:
        os.close(pidfd)


def _check_ends(store: sqlite3.Connection, dead: Dead) -> None:
    """Each execution that was cut short says why."""
    query = "SELECT error FROM executions WHERE devbox_id = ? AND exit_status = ?"
    for (error,) in store.execute(query, [dead.box, 128 + signal.SIGKILL]):
        assert error in ("the devbox has ended (failure)", "the devbox was suspended"), (dead, error)


def _check_gone(server: Server, dead: Dead) -> None:
    """The server frees a devbox right after it has told its end."""
    deadline = time.monotonic() + _PATIENCE_S
    folders = (server.boxes / dead.box, server.state / "disks" / dead.box)
    while left := [*filter(Path.exists, folders), *server.cgroups(dead.box)]:
        assert time.monotonic() < deadline, f"{left} of {dead}"
        time.sleep(0.02)

"""Boxes whose first process is hostile: each harms itself alone, its requests end in time, and the server stays well.

The agent is replaced by `support/hostile.py`, as by somebody who has taken over pid 1 of a box.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from support import hostile
from support.api import Api, JsonObject
from support.server import Server

pytestmark = [pytest.mark.box, pytest.mark.timeout(600)]

CAP = 4 << 20
MEMORY_KIB = 16 << 10
IN_TIME_S = 60.0
"""Far above every bound, far below for ever."""
HELD_S, SLACK_S = 25, 10
"""When an answer must have left at last, and what a loaded machine may add."""
SCRIPT = Path(hostile.__file__)


class Scene:
    """A server, an honest box that was there before, and hostile ones."""

    def __init__(self, server: Server, api: Api) -> None:
        self.server = server
        self.api = api
        self.neighbour = api.create(name="neighbour")
        api.write(self.neighbour, "file", "contents")
        self.ended = api.run(self.neighbour, "echo before; exit 3")["execution_id"]
        self.running = api.start(self.neighbour, "cat", attach_stdin=True)
        self.views = self._views()
        for _ in range(3):  # what is imported and opened at first use is not counted below
            self.healthy()

    def _views(self) -> list[JsonObject]:
        return [self.api.execution(self.neighbour, name) for name in (self.ended, self.running)]

    def begin(self, *modes: str, **body: object) -> list[str]:
        """Begin to create a box for each mode; their ids."""
        (agent,) = (self.server.state / "agent").iterdir()
        honest = agent.read_bytes()
        made = []
        try:
            for mode in modes:
                self._replace(agent, SCRIPT.read_bytes() + f'\nmain("{mode}")\n'.encode())
                made.append(self.api.call("POST", "/v1/devboxes", {"name": mode[:60], **body})["id"])
                self._executed(made[-1])
        finally:
            self._replace(agent, honest)
        return made

    def _executed(self, box: str) -> None:
        """Wait until the box runs its agent, or has failed: one that never speaks is not waited for."""
        deadline = time.monotonic() + IN_TIME_S
        while not (self.server.boxes / box / "box.json").exists() and self.api.box(box)["status"] != "failure":
            assert time.monotonic() < deadline, "the box does not begin"

    def _replace(self, agent: Path, content: bytes) -> None:
        new = self.server.folder / "agent.new"
        new.write_bytes(content)
        new.chmod(0o755)
        new.replace(agent)

    @contextmanager
    def boxes(self, *modes: str) -> Iterator[list[str]]:
        """Running boxes of these modes, which are gone afterwards, with nothing left behind in the server."""
        with self.unharmed():
            made = self.begin(*modes)
            for box in made:
                self.api.wait_box(box, "running")
            yield made
            for box in made:
                self.api.shutdown(box)

    @contextmanager
    def box(self, mode: str) -> Iterator[str]:
        """One running box, as `boxes`."""
        with self.boxes(mode) as made:
            yield made[0]

    @contextmanager
    def unharmed(self) -> Iterator[None]:
        """What the block does costs the server no memory, descriptors or threads, and the neighbour nothing."""
        memory, (files, threads) = self._memory(), self._open()
        yield
        self.healthy()
        deadline = time.monotonic() + IN_TIME_S
        while (now := self._open()) > (files, threads):  # boxes are freed in the background
            assert time.monotonic() < deadline, f"descriptors and threads: {files, threads} before, {now} after"
        assert self._memory() - memory < MEMORY_KIB

    def healthy(self) -> None:
        """The server answers, and the neighbour is as it was."""
        assert httpx.get(self.server.url + "/healthz", timeout=5).status_code == 200
        assert self.api.output(self.neighbour, "echo fine") == "fine\n"
        assert self.api.read(self.neighbour, "file") == "contents"
        assert self._views() == self.views

    def why(self, box: str) -> str:
        """Wait until the box has failed; the reason in words."""
        view = self.api.wait_box(box, "failure", seconds=IN_TIME_S)
        assert view["failure_reason"] == "health_check_failed"
        return str(view["state_transitions"][-1]["failure_reason"])

    def provoke(self, box: str) -> list[str]:
        """Start commands until the box has failed; those that were taken."""
        taken = []
        deadline = time.monotonic() + IN_TIME_S
        with self.server.api() as api:
            while api.box(box)["status"] == "running":
                assert time.monotonic() < deadline, "the box lives on"
                answer = api.http.post(f"/v1/devboxes/{box}/execute_async", json={"command": "true"})
                assert answer.status_code in (200, 400, 503), answer.text
                if answer.status_code == 200:
                    taken.append(str(answer.json()["execution_id"]))
        return taken

    def _memory(self) -> int:
        status = Path(f"/proc/{self.server.pid}/status").read_text()
        return int(status.partition("RssAnon:")[2].split()[0])

    def held_up(self) -> int:
        """How many threads of the server wait for the close of a socket."""
        return sum(map(_closes, Path(f"/proc/{self.server.pid}/task").iterdir()))

    def _open(self) -> tuple[int, int]:
        return self.server.descriptors(), self.held_up()


def _closes(thread: Path) -> bool:
    try:
        return "tcp_close" in (thread / "stack").read_text()
    except OSError:
        return False


@pytest.fixture(scope="module")
def scene() -> Iterator[Scene]:
    server = Server(journal_cap_bytes=str(CAP))
    try:
        with server.start().api() as api:
            made = Scene(server, api)
            yield made
            assert api.send(made.neighbour, made.running, "still the same")
            assert api.send(made.neighbour, made.running, signal="EOF")
            assert api.wait(made.neighbour, made.running)["stdout"] == "still the same"
    finally:
        server.stop()


# -- whoever speaks wrongly loses the connection, and at last the box --


BREACHES = {
    "frames": {
        "spawn_noise": "cannot read a frame",
        "spawn_long_frame": "a frame that is too long",
        "spawn_cut_frame": "it is too short",
        "spawn_unknown_verb": "no answer has the number 99",
        "spawn_impossible_length": "a text of 4294967295 bytes",
        "spawn_impossible_status": "status or flags are none",
    },
    "answers": {
        "spawn_unknown_tag": "a request that nobody made",
        "spawn_answered_twice": "a request that nobody made",
        "spawn_answered_with_a_descriptor": "a descriptor that was not asked for",
        "spawn_entries_that_nobody_asked_for": "not asked for",
    },
    "descriptors": {
        "spawn_five_descriptors": "it came with 5 descriptors",
        "spawn_all_descriptors_that_fit": "it came with 253 descriptors",
        "spawn_lingering_sockets": "it came with 12 descriptors",
        "spawn_lingering_sockets_that_nobody_reads": "it is too short",
    },
    "ends": {
        "spawn_end_of_nothing": "the end of what does not run",
        "spawn_end_told_twice": "the end of what does not run",
        "spawn_end_at_once ack_end_told_again": "the end of what does not run",
    },
}


@pytest.mark.parametrize("kind", BREACHES)
def test_an_agent_that_breaks_the_protocol_is_given_up(scene: Scene, kind: str) -> None:
    with scene.boxes(*BREACHES[kind]) as boxes, ThreadPoolExecutor(len(boxes)) as pool:
        commands = list(pool.map(scene.provoke, boxes))
        for box, taken, why in zip(boxes, commands, BREACHES[kind].values(), strict=True):
            reason = scene.why(box)
            assert reason.startswith("its agent breaks the protocol")
            assert why in reason
            assert taken
            assert {scene.api.wait(box, command)["exit_status"] for command in taken} <= {3, 137}


def test_an_agent_that_ends_every_connection_is_not_asked_without_end(scene: Scene) -> None:
    """It writes a byte into the journal each time that it is told the command."""
    with ThreadPoolExecutor() as pool, scene.box("spawn_empty_frame") as box, scene.server.api() as api:
        begun = time.monotonic()
        pool.submit(api.http.post, f"/v1/devboxes/{box}/execute_async", json={"command": "true"})
        for _ in range(10):
            scene.healthy()
        told = sum(path.stat().st_size for path in (scene.server.state / "journals" / box).iterdir())
        assert 1 < told < 2 + 10 * (time.monotonic() - begun)


def test_an_end_of_a_command_of_another_box_ends_nothing(scene: Scene) -> None:
    """The neighbour's command runs: `Scene.healthy` and the end of the fixture look after it."""
    with scene.box("spawn_end_of_another_box") as box:
        for _ in range(4):
            scene.api.start(box, scene.running)
        scene.provoke(box)
        assert "the end of what does not run" in scene.why(box)


def test_the_first_end_counts(scene: Scene) -> None:
    with scene.boxes("spawn_end_at_once", "spawn_end_before_the_start", "spawn_end_told_twice") as boxes:
        for box in boxes:
            assert scene.api.run(box, "true")["exit_status"] == 3


@pytest.mark.parametrize(
    ("claimed", "stdout"), [(0, ""), (3, "123"), (6, "12345"), (2**63, "12345"), (2**64 - 1, "12345")]
)
def test_lengths_are_not_believed(scene: Scene, claimed: int, stdout: str) -> None:
    with scene.box("spawn_lengths") as box:
        view = scene.api.run(box, str(claimed))
        assert (view["stdout"], view["stderr"]) == (stdout, "")
        assert scene.api.streamed(box, view["execution_id"]) == "12345"


# -- whoever says too much, or nothing --


def test_a_flood_of_events_is_read_at_a_bounded_pace(scene: Scene) -> None:
    """The server has time for others, and writes no line into its log for each."""
    with scene.box("spawn_flood_of_stalls") as box:
        before = scene.server.log.stat().st_size
        scene.api.start(box, "true")
        for _ in range(10):
            scene.healthy()
        assert scene.server.log.stat().st_size - before < MEMORY_KIB << 5
        assert scene.api.box(box)["status"] == "running"


def test_an_agent_that_cannot_be_used_ends_the_box(scene: Scene) -> None:
    faults = {
        "silent_hello": "does not answer",
        "silent_list": "it did not answer a request in time",
        "hello_of_another_generation": "cannot speak generation 7",
        "hello_flood_of_ends": "the end of what does not run",
        "list_without_end": "not asked for, or is too long",
        "list_of_a_huge_count": "not as long as it says",
        "list_that_starts_for_ever": "begin for ever",
        "deaf": "refused",
    }
    with scene.unharmed():
        boxes = scene.begin(*faults)
        for box, why in zip(boxes, faults.values(), strict=True):
            assert why in scene.why(box)


def test_silence_keeps_nobody_waiting(scene: Scene) -> None:
    """Each request is answered although the agent never does, sooner than the patience of clients ends."""
    with scene.boxes(
        "silent_spawn", "silent_read", "silent_write", "silent_rename", "silent_stdin", "silent_end",
        "read_dumb_pipe", "write_full_pipe",
    ) as boxes:  # fmt: skip
        spawn, read, write, rename, stdin, signal, dumb, full = boxes
        cat, sleep = scene.api.start(stdin, "cat", attach_stdin=True), scene.api.start(signal, "sleep 100")
        requests: list[tuple[int, str, JsonObject]] = [
            (200, f"{spawn}/execute_async", {"command": "true"}),
            (503, f"{read}/read_file_contents", {"file_path": "any"}),
            (503, f"{write}/write_file_contents", {"file_path": "any", "contents": ""}),
            (503, f"{rename}/write_file_contents", {"file_path": "any", "contents": ""}),
            (503, f"{stdin}/executions/{cat}/send_std_in", {"text": "any"}),
            (503, f"{signal}/executions/{sleep}/kill", {}),
            (504, f"{dumb}/read_file_contents", {"file_path": "any"}),
            (504, f"{full}/write_file_contents", {"file_path": "any", "contents": "x" * 1_000_000}),
        ]

        def ask(request: tuple[int, str, JsonObject]) -> None:
            with scene.server.api() as api:
                answer = api.http.post(f"/v1/devboxes/{request[1]}", json=request[2])
                assert answer.status_code == request[0], answer.text

        begun = time.monotonic()
        with ThreadPoolExecutor(len(requests)) as pool:
            list(pool.map(ask, requests))
        assert time.monotonic() - begun < HELD_S + SLACK_S
        assert {scene.api.box(box)["status"] for box in boxes} == {"running"}


def test_a_position_in_stdin_past_its_end_is_not_believed(scene: Scene) -> None:
    with scene.box("stdin_far_ahead") as box:
        execution = scene.api.start(box, "cat", attach_stdin=True)
        assert all(scene.api.send(box, execution, "x" * 1_000_000) for _ in range(3))
        assert scene.api.send(box, execution, signal="EOF")


# -- descriptors and files --


def test_what_is_no_file_is_refused(scene: Scene) -> None:
    things = [
        "fifo", "/tmp", "/dev/null", "/dev/zero", "/proc/self/status", "/proc/self/ns/net", "/sys/kernel/mm",
        "terminal", "epoll", "unopened", "write-only", "lingering", "socket-1-1", "socket-2-2", "socket-16-3",
    ]  # fmt: skip
    with scene.box("read_whatever") as box:
        for thing in things:
            answer = scene.api.http.post(f"/v1/devboxes/{box}/read_file_contents", json={"file_path": thing})
            assert answer.status_code == 400, thing
            assert "not a regular file" in answer.json()["message"], thing
        assert "root" in scene.api.read(box, "/etc/passwd")


def test_sockets_whose_close_waits_hold_up_nobody(scene: Scene) -> None:
    """More of them than the server has threads for files, each of which would be busy for an hour."""
    with scene.box("read_whatever") as box:
        for _ in range(40):
            path = f"/v1/devboxes/{box}/read_file_contents"
            scene.api.refused("POST", path, 400, {"file_path": "lingering"})
        scene.healthy()
        deadline = time.monotonic() + IN_TIME_S
        while scene.held_up():
            assert time.monotonic() < deadline, "the box decides how long threads of the server wait"


def test_an_answer_without_a_descriptor(scene: Scene) -> None:
    with scene.box("read_without_a_descriptor") as box:
        message = scene.api.refused("POST", f"/v1/devboxes/{box}/read_file_contents", 503, {"file_path": "any"})
        assert "does not answer" in message


def test_a_file_that_shrinks_cuts_the_download(scene: Scene) -> None:
    with scene.box("read_slippery spawn_shrinks") as box:
        path = f"/v1/devboxes/{box}/download_file"

        def download() -> None:
            with scene.api.http.stream("POST", path, json={"path": "any"}) as answer:
                for number, _ in enumerate(answer.iter_bytes(1 << 20)):
                    if number == 0:
                        scene.api.start(box, "true")

        with pytest.raises(httpx.RemoteProtocolError):
            download()


def test_a_pipe_without_end_is_cut_at_the_limit(scene: Scene) -> None:
    with scene.box("read_endless_pipe") as box, pytest.raises(httpx.RemoteProtocolError):
        scene.api.read(box, "any")


# -- journals --


@pytest.mark.parametrize("mode", ["spawn_past_the_cap", "spawn_behind_the_end"])
def test_a_journal_past_its_cap_ends_the_box(scene: Scene, mode: str) -> None:
    with scene.box(mode) as box:
        execution = scene.api.start(box, "true")
        assert "grew past the limit" in scene.why(box)
        view = scene.api.wait(box, execution)
        assert view["exit_status"] == 137
        journals = scene.server.state / "journals" / box
        deadline = time.monotonic() + IN_TIME_S
        while sum(path.stat().st_blocks * 512 for path in journals.iterdir()) > CAP + 65536:
            assert time.monotonic() < deadline, "what is over the cap stays on the disk"
        assert sum(path.stat().st_size for path in journals.iterdir()) in (CAP, 5)


def test_what_a_journal_holds_stays(scene: Scene) -> None:
    with scene.box("spawn_rewrites") as box:
        view = scene.api.run(box, "true")
        first, *attempts, last = view["stdout"].splitlines()
        assert (first, last) == ("before", "after")
        assert [name for name, _, end in (line.partition(": ") for line in attempts)] == list(hostile.attempts(0))
        assert not [line for line in attempts if line.endswith(": done")]


def test_what_is_appended_after_the_end_is_not_part_of_it(scene: Scene) -> None:
    with scene.box("spawn_goes_on_after_the_end") as box:
        views = [scene.api.run(box, "true") for _ in range(4)]
        for view in views:
            assert scene.api.execution(box, view["execution_id"])["stdout"] == "in time\n"

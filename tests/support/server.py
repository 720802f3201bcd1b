"""A real server in a process of its own, with a state folder that nobody else uses."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

from support.api import Api
from support.leftovers import claim_of, groups, leftovers

PROGRAM = Path(sys.executable).with_name("devboxd")
READY_S = 900.0
"""Longest start: the first one on a machine builds the default image."""


class Server:
    """`devboxd serve` as a child process. `url` and `key` stay the same over restarts."""

    def __init__(self, program: Path = PROGRAM, **settings: str) -> None:
        self.program = program
        self.folder = Path(tempfile.mkdtemp(prefix="devboxd-test-", dir="/var/tmp"))
        self.state = self.folder / "state"
        self.log = self.folder / "log"
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.key = ""
        self.umask = -1
        """The mask with which the process is started; -1: that of the tests."""
        self.settings = {f"DEVBOXD_{name.upper()}": value for name, value in settings.items()}
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def pid(self) -> int:
        """The process that was started; everything else of the server must die with it."""
        assert self._process is not None, "the server was not started"
        return self._process.pid

    def launch(self) -> None:
        """Start the process and return at once."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [self.program, "serve", "--port", str(self.port), "--state", self.state],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self.environment(),
                umask=self.umask,
            )

    def start(self, seconds: float = READY_S) -> Server:
        """Start the process and return when it can run commands."""
        self.launch()
        self.wait_ready(seconds)
        if not self.key:
            self.key = self.command("keys", "create", "--name", "tests", "--state", str(self.state)).strip()
        return self

    def environment(self) -> dict[str, str]:
        """The environment of every devboxd process of this server."""
        return {**os.environ, "DEVBOXD_POOL_SIZE": "2", "DEVBOXD_WARM_BOXES": "0", **self.settings}

    def command(self, *arguments: str) -> str:
        """Run `devboxd ...`; its standard output."""
        done = subprocess.run(
            [self.program, *arguments], capture_output=True, text=True, env=self.environment(), timeout=60, check=False
        )
        assert done.returncode == 0, f"devboxd {' '.join(arguments)} failed: {done.stderr}"
        return done.stdout

    def wait_ready(self, seconds: float = READY_S) -> None:
        """Return when /healthz answers 200; fail with the end of the log when it never does."""
        deadline = time.monotonic() + seconds
        last = "no answer"
        while time.monotonic() < deadline:
            assert self.running(), f"the server ended with {self._process and self._process.returncode}: {self.tail()}"
            try:
                answer = httpx.get(self.url + "/healthz", timeout=5)
                if answer.status_code == 200:
                    return
                last = f"{answer.status_code} {answer.text}"
            except httpx.TransportError as error:
                last = repr(error)
            time.sleep(0.05)
        raise AssertionError(f"the server was not ready after {seconds} s ({last}): {self.tail()}")

    def running(self) -> bool:
        """Whether the process lives."""
        return self._process is not None and self._process.poll() is None

    def kill(self) -> None:
        """SIGKILL, as the kernel or an operator in need would do; the port must be free at once."""
        self._signal(signal.SIGKILL, 10)

    def terminate(self, seconds: float = 30) -> float:
        """SIGTERM; the seconds that it took to end. Fails when it did not end in time."""
        begun = time.monotonic()
        self._signal(signal.SIGTERM, seconds)
        return time.monotonic() - begun

    def restart(self) -> None:
        """SIGKILL and a start on the same state and port."""
        self.kill()
        self.start(120)

    def api(self) -> Api:
        """A client with this server's key; the caller closes it."""
        return Api(self.url, self.key)

    def descriptors(self) -> int:
        """How many file descriptors the server has open."""
        return len(os.listdir(f"/proc/{self.pid}/fd"))

    def memory(self) -> int:
        """Bytes of memory that are the server's own."""
        return own_memory(self.pid)

    def agent(self, box: str) -> int:
        """The pid on this machine of a devbox's first process."""
        for members in groups(f"*/boxes/{box}/cgroup.procs"):
            for pid in map(int, members.read_text().split()):
                names = Path(f"/proc/{pid}/status").read_text().partition("NSpid:")[2].split("\n")[0]
                if names.split()[-1] == "1":
                    return pid
        raise AssertionError(f"{box} has no first process")

    @property
    def boxes(self) -> Path:
        """The folder with one folder for each box that has a trace on the machine."""
        claim = claim_of(self.state)
        assert claim is not None, "the server has no claim"
        return claim / "boxes"

    def cgroups(self, box: str) -> list[Path]:
        """All files of the cgroups of a box."""
        return groups(f"*/boxes/{box}/*")

    def tail(self) -> str:
        """The last lines that the server wrote."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-40:]) if self.log.exists() else ""

    def stop(self) -> None:
        """Shut all boxes down, end the server, remove its state, and fail when anything is left on the machine."""
        try:
            self._end()
        finally:
            if self.running():
                self.kill()
        problems = leftovers(self.state)
        # Journals of ended boxes are kept for a while, and can only be appended to until somebody allows more.
        subprocess.run(["chattr", "-R", "-f", "-a", self.folder], timeout=60, check=False)
        with contextlib.suppress(OSError):
            shutil.rmtree(self.folder)
        if self.folder.exists():
            problems.append(f"{self.folder} cannot be removed")
        assert not problems, "left behind: " + "; ".join(problems)

    def _end(self) -> None:
        if not self.running():
            if not self.state.exists() or not self.key:
                return
            self.start(120)
        with self.api() as api:
            for box in api.boxes():
                if box["status"] not in ("shutdown", "failure"):
                    api.shutdown(box["id"])
        self.terminate()

    def _signal(self, number: signal.Signals, seconds: float) -> None:
        assert self._process is not None
        self._process.send_signal(number)
        self._process.wait(seconds)


def own_memory(pid: int) -> int:
    """Bytes of memory that a process does not share with files."""
    return int(Path(f"/proc/{pid}/status").read_text().partition("RssAnon:")[2].split()[0]) << 10


def free_port() -> int:
    """A port of this machine that nobody listens on, for now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port

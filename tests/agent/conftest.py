"""A real agent as pid 1 of its own pid, mount and network namespaces, without any container runtime."""

import asyncio
import inspect
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from devboxd.agent import agent_binary
from devboxd.agent.client import AgentClient, ExitEvent
from devboxd.agent.protocol import encode_record

CAP = 1 << 30

# The agent is opened before the mounts: the checkout may lie below what they cover.
_START = r"""
exec {BINARY}<"$AGENT" || exit 69
mount -t tmpfs tmpfs /run && mkdir /run/devboxd && mount -t tmpfs tmpfs /tmp || exit 70
cat <&"$BINARY" >/run/devboxd/devboxd-init && chmod 755 /run/devboxd/devboxd-init && exec {BINARY}<&- || exit 70
mount -t devpts -o newinstance,ptmxmode=666,mode=620,gid=5 devpts /dev/pts && ip link set lo up || exit 71
[ -z "$AGENT_SETUP" ] || eval "$AGENT_SETUP" || exit 72
exec env -i ${ASAN_OPTIONS:+"ASAN_OPTIONS=$ASAN_OPTIONS"} /run/devboxd/devboxd-init 3<&"$LISTENER" {LISTENER}<&-
"""


@dataclass
class Result:
    """What a command left behind."""

    stdout: bytes
    stderr: bytes
    exit: ExitEvent


class Session:
    """One connection to the agent, with what it has told so far."""

    def __init__(self, box: "Box") -> None:
        self.box = box
        self.client: AgentClient
        self.exits: dict[str, asyncio.Queue[ExitEvent]] = {}
        self.stalls: asyncio.Queue[tuple[str, int]] = asyncio.Queue()
        self.closed = asyncio.Event()

    def _queue(self, key: str) -> asyncio.Queue[ExitEvent]:
        return self.exits.setdefault(key, asyncio.Queue())

    async def open(self) -> "Session":
        self.client = await AgentClient.connect(
            self.box.path,
            on_exit=lambda event: self._queue(event.key).put_nowait(event),
            on_stall=lambda key, number: self.stalls.put_nowait((key, number)),
            on_closed=self.closed.set,
        )
        return self

    async def exited(self, key: str, seconds: float = 60) -> ExitEvent:
        async with asyncio.timeout(seconds):
            return await self._queue(key).get()

    async def until(self, condition: Callable[[], object], seconds: float = 30) -> None:
        """Wait for what only looking can tell; the condition may be a coroutine function."""
        async with asyncio.timeout(seconds):
            while True:
                found = condition()
                if await found if inspect.isawaitable(found) else found:
                    return
                await asyncio.sleep(0.01)

    async def has(self, key: str, data: bytes, stream: str = "out") -> None:
        """Wait until the journal holds exactly this."""
        await self.until(lambda: self.box.output(key, stream) == data)

    async def start(
        self, key: str, argv: list[str], *, cap: int = CAP, stdin: bool = False, env=None, directory="/",
        user="root", script=b"",
    ) -> int:  # fmt: skip
        record = encode_record(argv, {"PATH": "/usr/bin:/bin", **(env or {})}, directory, user, script)
        out, err = self.box.journal(key, "out"), self.box.journal(key, "err")
        spool = self.box.spool(key) if stdin else None
        try:
            return await self.client.spawn(key, record, out, err, spool, cap)
        finally:
            for fd in (out, err, *([spool] if spool is not None else [])):
                os.close(fd)

    async def run(self, key: str, command: str, **options) -> Result:
        """Run by bash, wait for the end, acknowledge."""
        await self.start(key, ["bash", "-c", command], **options)
        event = await self.exited(key)
        await self.client.ack(key)
        return Result(self.box.output(key, "out"), self.box.output(key, "err"), event)

    async def start_shell(self, key: str, user: str = "root") -> int:
        driver = (Path(__file__).parent / "driver.sh").read_text()
        record = encode_record(["bash", "-c", driver], {"PATH": "/usr/bin:/bin"}, "/tmp", user)
        return await self.client.shell(key, record)

    async def start_in(self, shell: str, key: str, command: str, *, stdin: bool = False, cap: int = CAP) -> None:
        out, err = self.box.journal(key, "out"), self.box.journal(key, "err")
        spool = self.box.spool(key) if stdin else None
        try:
            await self.client.run(shell, key, command.encode(), out, err, spool, cap)
        finally:
            for fd in (out, err, *([spool] if spool is not None else [])):
                os.close(fd)

    async def run_in(self, shell: str, key: str, command: str, **options) -> Result:
        await self.start_in(shell, key, command, **options)
        event = await self.exited(key)
        await self.client.ack(key)
        return Result(self.box.output(key, "out"), self.box.output(key, "err"), event)


class Box:
    """The agent's process and the folder of its journals."""

    def __init__(self, setup: str = "", binary: Path | None = None) -> None:
        chosen = os.environ.get("DEVBOXD_AGENT")
        self.binary = binary or (Path(chosen) if chosen else agent_binary())
        self.folder = Path(tempfile.mkdtemp(prefix="devboxd-agent-", dir="/var/tmp"))
        self.folder.chmod(0o755)
        self.path = self.folder / "agent.sock"
        self.journals = self.folder / "journals"
        self.journals.mkdir()
        self.sessions: list[Session] = []
        self.ended = False
        """Whether its end was wanted."""
        self._setup = setup
        self._start()

    def _start(self) -> None:
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(str(self.path))
        listener.listen(16)
        fd = listener.fileno()
        environment = {**os.environ, "AGENT": str(self.binary), "LISTENER": str(fd), "AGENT_SETUP": self._setup}
        environment["ASAN_OPTIONS"] = "detect_leaks=0:abort_on_error=1:handle_abort=1"
        self.log = (self.folder / "log").open("wb+")
        self.process = subprocess.Popen(
            ["unshare", "--pid", "--mount", "--net", "--fork", "--kill-child", "--mount-proc", "bash", "-c",
             _START.replace("{LISTENER}", str(fd))],
            pass_fds=[fd], env=environment, stdin=subprocess.DEVNULL, stdout=self.log, stderr=self.log,
            start_new_session=True,
        )  # fmt: skip
        listener.close()

    @property
    def pid(self) -> int:
        """The agent's pid as the host sees it."""
        task = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
        return int(task.read_text().split()[0])

    def said(self) -> str:
        """What the agent printed: nothing, unless a sanitizer found something."""
        return (self.folder / "log").read_text(errors="replace")

    async def session(self) -> Session:
        session = await Session(self).open()
        self.sessions.append(session)
        return session

    def journal(self, key: str, stream: str) -> int:
        return os.open(self.journals / f"{key}.{stream}", os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def spool(self, key: str) -> int:
        path = self.journals / f"{key}.in"
        path.touch()
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def feed(self, key: str, data: bytes) -> int:
        """Append to the spool and return its length."""
        with (self.journals / f"{key}.in").open("ab") as file:
            file.write(data)
        return (self.journals / f"{key}.in").stat().st_size

    def output(self, key: str, stream: str) -> bytes:
        return (self.journals / f"{key}.{stream}").read_bytes()

    async def stop(self) -> None:
        if not self.folder.exists():
            return
        for session in self.sessions:
            await session.client.close()
        alive = self.process.poll() is None
        self.process.kill()
        self.process.wait()
        said = self.said()
        self.log.close()
        shutil.rmtree(self.folder)
        assert alive or self.ended, f"the agent ended: {said}"
        assert said == ""


def box_reason() -> str | None:
    if os.geteuid() != 0:
        return "the agent's tests need root, for namespaces"
    return None


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
async def box(anyio_backend) -> AsyncIterator[Box]:
    if reason := box_reason():
        pytest.skip(reason)
    made = Box()
    yield made
    await made.stop()


@pytest.fixture
async def session(box: Box) -> Session:
    return await box.session()


@pytest.fixture
async def make_box(anyio_backend) -> AsyncIterator:
    """Make a box whose namespaces a few lines of bash prepare."""
    if reason := box_reason():
        pytest.skip(reason)
    made: list[Box] = []

    async def make(setup: str = "") -> Box:
        made.append(Box(setup))
        return made[-1]

    yield make
    for one in made:
        await one.stop()

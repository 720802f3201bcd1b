"""Slots: a user namespace with ids of its own that owns a network namespace, made ahead of the box that will use it.

A waiting slot is held by descriptors alone and a started box holds its own namespaces, so a server that dies leaves
nothing mounted behind.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import subprocess
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import structlog

from devboxd.concurrency.threads import finished
from devboxd.engine.base import EngineError
from devboxd.engine.instance import IDS_PER_BOX, Instance
from devboxd.engine.network import Link, Network

_log = structlog.get_logger(__name__)


@dataclass(frozen=True)
class Slot:
    """Namespaces that belong to nobody yet. `close` once a box uses them, or nobody will."""

    index: int
    user: int
    net: int
    link: Link

    @property
    def user_path(self) -> str:
        """The user namespace as a path for other processes, for as long as the slot is open."""
        return f"/proc/{os.getpid()}/fd/{self.user}"

    @property
    def net_path(self) -> str:
        """The network namespace as a path for other processes, for as long as the slot is open."""
        return f"/proc/{os.getpid()}/fd/{self.net}"

    def close(self) -> None:
        """Let go of the namespaces; they end unless a box holds them."""
        os.close(self.user)
        os.close(self.net)


class Slots:
    """All slots of an instance: those ready, those of boxes, and the indexes left over."""

    def __init__(self, instance: Instance, network: Network, size: int) -> None:
        self._instance = instance
        self._network = network
        self._size = size
        self._free: deque[int] = deque()
        self._used: set[int] = set()
        self._ready: deque[Slot] = deque()
        self._wanted = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._filler: asyncio.Task[None] | None = None

    async def open(self, used: set[int]) -> None:
        """Begin to fill the pool; `used` are the indexes of boxes, and of those that rest."""
        self._used = set(used)
        self._free.extend(index for index in range(self._instance.slots) if index not in used)
        self._wanted.set()
        self._filler = asyncio.create_task(self._fill(), name="slots")

    async def close(self) -> None:
        """End the filling and give back what nobody took."""
        if self._filler is not None:
            self._filler.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._filler
        while self._ready:
            slot = self._ready.popleft()
            slot.close()
            await self._network.detach(slot.index)

    async def take(self, kept: int | None = None) -> Slot:
        """A slot for a box: the one that it kept, or a new one, at once when one is ready.

        Raises EngineError when all are used or none can be made.
        """
        if kept is not None:
            self._used.add(kept)
            return await self._prepare(kept)
        while not self._ready and not self._free and not self._idle.is_set():
            await self._idle.wait()  # the last free slot is being prepared at this moment
        slot = self._ready.popleft() if self._ready else await self._prepare_free()
        self._used.add(slot.index)
        self._wanted.set()
        return slot

    async def rest(self, index: int) -> None:
        """The box of this slot is gone, and comes back to it."""
        await self._network.detach(index)

    async def release(self, index: int) -> None:
        """The box of this slot is gone; a second time is harmless. Its ids are used again after all others."""
        if index not in self._used:
            return
        self._used.remove(index)
        await self._network.detach(index)
        self._free.append(index)
        self._wanted.set()

    async def _fill(self) -> None:
        while True:
            await self._wanted.wait()
            self._wanted.clear()
            try:
                while len(self._ready) < self._size and self._free:
                    self._idle.clear()
                    self._ready.append(await self._prepare_free())
                    self._idle.set()
            except Exception as error:  # the next box tries by itself and reports
                _log.warning("cannot prepare namespaces for a box", reason=str(error))
            finally:
                self._idle.set()

    async def _prepare_free(self) -> Slot:
        if not self._free:
            raise EngineError(
                f"cannot make another devbox: all {self._instance.slots} slots of this server are used; "
                "shut some down, or start a second server with another --state"
            )
        index = self._free.popleft()
        try:
            return await self._prepare(index)
        except BaseException:
            self._free.append(index)
            raise

    async def _prepare(self, index: int) -> Slot:
        made: list[int] = []
        """Filled by the thread: what it returned would be lost with a caller that is cancelled meanwhile."""
        try:
            await finished(lambda: made.extend(_make_namespaces(self._instance.uid_base(index))))
            user, net = made
            link = await self._network.attach(index, Path(f"/proc/{os.getpid()}/fd/{net}"))
        except BaseException:
            for descriptor in made:
                os.close(descriptor)
            await self._network.detach(index)
            raise
        return Slot(index, user, net, link)


def _make_namespaces(first_uid: int) -> tuple[int, int]:
    """Descriptors of a new user namespace, ids mapped, and of the network namespace that it owns.

    A helper process makes them and ends when told; its echo shows that it has become a member. It runs as the slot's
    first id, and so owns the user namespace: whatever the kernel counts by user (inotify, message queues, signals,
    timers, locked memory, namespaces) adds up there for all users of the box, and never at root of the host.
    """
    pipe = subprocess.PIPE
    command = _as_owner(first_uid, "unshare", "--user", "--net", "cat")
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0, close_fds=False) as helper:
        assert helper.stdin is not None and helper.stdout is not None and helper.stderr is not None  # noqa: PT018
        with contextlib.suppress(BrokenPipeError):
            helper.stdin.write(b"x")
        if not helper.stdout.read(1):
            raise EngineError(
                f"cannot make namespaces for a box: {helper.stderr.read().decode(errors='replace').strip()}; "
                "allow them with sysctl user.max_user_namespaces and user.max_net_namespaces"
            )
        return _adopt(helper.pid, first_uid)


def _as_owner(uid: int, *command: str) -> list[str]:
    """A command run as this uid and gid, with all that this server may have of what is counted by user.

    The kernel remembers the helper's soft limits as what all users of the namespace may have together.
    """
    names = ("MEMLOCK", "MSGQUEUE", "NPROC", "SIGPENDING")
    hard = {name: resource.getrlimit(getattr(resource, f"RLIMIT_{name}"))[1] for name in names}
    limits = [f"--{name.lower()}={most if most >= 0 else 'unlimited'}" for name, most in hard.items()]
    return ["prlimit", *limits, "setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", *command]


def _adopt(pid: int, first_uid: int) -> tuple[int, int]:
    with contextlib.ExitStack() as opened:
        descriptors = []
        for name in ("user", "net"):
            descriptors.append(os.open(f"/proc/{pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC))
            opened.callback(os.close, descriptors[-1])
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{pid}/{name}").write_text(f"0 {first_uid} {IDS_PER_BOX}\n")
        opened.pop_all()
        return descriptors[0], descriptors[1]

"""A real engine on a state folder, and boxes in which a test runs commands through the agent."""

from __future__ import annotations

import asyncio
import os
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path

from devboxd.agent import protocol
from devboxd.agent.client import AgentClient, ExitEvent
from devboxd.config import Settings
from devboxd.engine import instance, linux
from devboxd.engine.base import BoxSpec, Image, Resources
from devboxd.engine.network import Network
from devboxd.engine.oci import OciEngine
from devboxd.ids import new_id
from support.disks import READY, upper, volumes_of
from support.leftovers import groups


@dataclass(frozen=True)
class Result:
    """What a command in a box did."""

    status: int
    out: str
    err: str


class Box:
    """A box made by a test, and the connection to its agent."""

    def __init__(self, engine: OciEngine, box_id: str, owner: instance.Instance) -> None:
        self.engine = engine
        self.id = box_id
        self.folder = owner.directory / "boxes" / box_id
        self.state = owner.state
        self._ends: dict[str, asyncio.Future[ExitEvent]] = {}
        self._client: AgentClient | None = None

    @property
    def pid(self) -> int:
        return int((self.folder / "pid").read_text())

    def upper(self) -> AbstractContextManager[Path]:
        """What its disk holds over the image, for the length of a block."""
        return upper(self.state, self.id)

    async def run(self, *command: str, user: str = "root", env: dict[str, str] | None = None) -> Result:
        """Run a program to its end."""
        if self._client is None:
            self._client = await AgentClient.connect(
                self.engine.agent_socket(self.id),
                on_exit=lambda event: self._ends[event.key].set_result(event),
                on_stall=lambda key, number: None,
                on_closed=lambda: None,
            )
        key = new_id("exn")
        self._ends[key] = asyncio.get_running_loop().create_future()
        outputs = [os.memfd_create(name) for name in ("out", "err")]
        try:
            record = protocol.encode_record(command, env or {}, "/", user)
            await self._client.spawn(key, record, outputs[0], outputs[1], None, 1 << 20)
            async with asyncio.timeout(60):
                end = await self._ends[key]
            await self._client.ack(key)
            out, err = (os.pread(output, 1 << 20, 0).decode(errors="replace") for output in outputs)
            return Result(end.status, out, err)
        finally:
            for output in outputs:
                os.close(output)

    async def sh(self, script: str, user: str = "root") -> str:
        """The output of a script, which must succeed."""
        result = await self.run("bash", "-c", script, user=user)
        assert result.status == 0, result
        return result.out.strip()

    async def close(self) -> None:
        if self._client is not None:
            await self._client.close()
            self._client = None


class Host:
    """One server's engine, which can be closed and opened again on the same state folder.

    As a context manager it is open during the block, and its boxes are gone afterwards.
    """

    def __init__(self, image: Image, state: Path, **settings: object) -> None:
        self.image = image
        self.settings = Settings(state=state, pool_size=1, **settings)  # type: ignore[arg-type]
        self.boxes: list[Box] = []

    async def __aenter__(self) -> Host:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.destroy_all()
        await self.close()

    async def open(self, slots: int = instance.SLOTS) -> None:
        self.instance = replace(instance.claim(self.settings.state), slots=slots)
        self.engine = OciEngine(self.settings, self.instance, Network(self.settings, self.instance))
        await self.engine.open()

    async def close(self) -> None:
        for box in self.boxes:
            await box.close()
        await self.engine.close()
        self.instance.close()

    async def destroy_all(self) -> None:
        for box_id in await self.engine.boxes():
            await self.engine.destroy(box_id)

    def spec(self, resources: Resources | None = None) -> BoxSpec:
        box_id = new_id("dbx")
        return BoxSpec(box_id, f"devbox-{box_id[-8:].lower()}", self.image, resources or Resources(1.0, 512 << 20, 256))

    async def box(self, resources: Resources | None = None) -> Box:
        spec = self.spec(resources)
        await self.engine.create(spec)
        return self.known(spec.box_id)

    def known(self, box_id: str) -> Box:
        """A box that the engine has already."""
        self.boxes.append(Box(self.engine, box_id, self.instance))
        return self.boxes[-1]

    def leftovers(self) -> list[str]:
        """Everything on the machine that carries this instance's name or lies in its state folder, but for lxcfs."""
        mark = f"devboxd-{self.instance.id}/boxes/dbx_"
        found = [str(path) for path in groups(f"{self.instance.id}/boxes/[!.]*/")]
        found += [line for line in Path("/proc/self/mountinfo").read_text().splitlines() if "dbx_" in line]
        for name in os.listdir("/proc"):
            if name.isdigit() and linux.start_time(int(name)) is not None:  # the dead wait for the host's init
                try:
                    if mark in Path("/proc", name, "cgroup").read_text():
                        found.append(f"process {name}")
                except OSError:
                    continue
        own = self.instance.directory
        folders = [own / "boxes", self.instance.state / "disks", own / "runtime"]
        found += [str(path) for folder in folders if folder.exists() for path in folder.iterdir()]
        return [name for name in found if not Path(name).name.startswith(READY)] + volumes_of(self.instance.state)

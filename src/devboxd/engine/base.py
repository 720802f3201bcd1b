"""What the server asks of an engine, whatever isolates the boxes underneath."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

FULL = 0.02
"""A disk of which less than this share can be written is called full: large writes are refused before small ones."""


@dataclass(frozen=True)
class Image:
    """A root file system: its layers, lowest last, each a folder whose ids on disk start at 0."""

    name: str
    layers: tuple[Path, ...]


@dataclass(frozen=True)
class Resources:
    """Limits of a box, never reservations."""

    cpu_cores: float
    memory_bytes: int
    pids: int = 1024
    disk_bytes: int = 4 << 30


@dataclass(frozen=True)
class BoxSpec:
    """All that decides what a box is. No secret and no environment of commands is part of it."""

    box_id: str
    hostname: str
    image: Image
    resources: Resources
    snapshot_id: str | None = None
    """Where its disk begins, when that is not the image alone."""


@dataclass(frozen=True)
class BoxEnd:
    """Why a box's pid 1 is gone: `oom` when the kernel killed for lack of memory, `status` as a shell shows it."""

    oom: bool
    status: int | None


@dataclass(frozen=True)
class Stall:
    """The share of the last ten seconds, in percent, in which some processes, or all of them, waited for something."""

    some: float
    """Percent of the time in which some waited. Example: `1.5`"""
    full: float | None
    """Percent of the time in which all waited; null for processors. Example: `0.0`"""


@dataclass(frozen=True)
class Figures:
    """What a living box uses, since it was started last where it is a sum. None: this machine does not tell.

    Memory is what its limit counts: with the files that the kernel keeps for it and would give up. `pressure` is by
    cpu, memory and io.
    """

    cpu_seconds: float | None
    """Seconds of processors. Example: `12.5`"""
    memory_bytes: int | None
    """Bytes of memory. Example: `104857600`"""
    memory_peak_bytes: int | None
    """The most bytes of memory so far. Example: `209715200`"""
    pids: int | None
    """Processes and threads. Example: `12`"""
    network_in_bytes: int | None = None
    """Bytes that it received. Example: `4096`"""
    network_out_bytes: int | None = None
    """Bytes that it sent. Example: `4096`"""
    disk_bytes: int | None = None
    """Bytes on its disk. Example: `104857600`"""
    pressure: dict[str, Stall] | None = None
    """How much it waits, by cpu, memory and io; null under cgroups version 1."""


class Engine(Protocol):
    """Boxes that outlive the server. Every method may be called again after a crash; none leaves half a box."""

    async def open(self, kept: Collection[str] = ()) -> None:
        """Claim this machine's ranges under a lock, remove what dead servers left behind, fill the pools.

        `kept` are the boxes whose disks stay, whatever became of the boxes themselves.
        """

    async def close(self) -> None:
        """Give back pools and locks; living boxes stay."""

    async def create(self, spec: BoxSpec) -> None:
        """Make and start a box; when this returns, its agent accepts at `agent_socket`. Raises EngineError.

        A box that was stopped starts from the disk that it left.
        """

    async def stop(self, box_id: str) -> None:
        """Kill everything in the box and free what it held but its disk and its address. Unknown boxes are no error."""

    async def resize(self, box_id: str, resources: Resources) -> None:
        """Give a living box other limits. Raises EngineError."""

    async def freeze(self, box_id: str) -> None:
        """Stop all processes of a box where they are; they keep their memory. Raises EngineError."""

    async def thaw(self, box_id: str) -> None:
        """Let them go on."""

    async def snapshot(self, box_id: str, snapshot_id: str) -> None:
        """Keep the disk of a box as it is at this instant. Raises EngineError."""

    async def snapshot_size(self, snapshot_id: str) -> int:
        """Bytes that it holds over its image; may take a while. Raises EngineError."""

    async def snapshot_digest(self, snapshot_id: str) -> str:
        """SHA-256 over all that it holds, in hexadecimal; may take long. Raises EngineError."""

    async def delete_snapshot(self, snapshot_id: str) -> None:
        """Delete it; boxes that began from it stay as they are. An unknown one is no error."""

    async def snapshots(self) -> set[str]:
        """The snapshots that are whole."""

    def has_disk(self, box_id: str) -> bool:
        """Whether the disk of a box is there, and whole."""

    def disk_used(self, name: str) -> int | None:
        """Bytes on the disk of a box, or in a snapshot, over its image; None where that is not known."""

    def disk_room(self, box_id: str) -> float | None:
        """The share of a living box's disk that it can still write, from 0 to 1; None where there is no bound."""

    def cpu_seconds(self, box_id: str) -> float:
        """Processor time that the box has used so far; 0 for unknown boxes."""

    @property
    def disks_held(self) -> bool:
        """Whether no box can write to its disk now, because the machine has no room."""

    @property
    def trouble(self) -> str | None:
        """Why no box can write to its disk, whatever room there is; None when all is well."""

    def entrances(self, box_id: str) -> list[Path]:
        """The files into which a process with one thread writes 0 to enter the box's cgroups."""

    def short_of(self) -> str | None:
        """Why the machine has no room for another box, None when it has."""

    async def short_for(self, name: str) -> str | None:
        """Why there is no room for a snapshot of a living box, to start a stopped one, or for one from a snapshot."""

    async def destroy(self, box_id: str) -> None:
        """Kill everything in the box and free all that it held, its disk too. Unknown boxes are no error."""

    async def boxes(self) -> dict[str, bool]:
        """The boxes of this engine that have any trace on the machine, and whether their pid 1 lives."""

    async def wait(self, box_id: str) -> BoxEnd:
        """Return when the box's pid 1 has ended; at once when it already has. Cancelling is harmless."""

    def agent_socket(self, box_id: str) -> Path:
        """The socket of the box's agent."""

    def figures(self, box_id: str) -> Figures | None:
        """What a box uses now; None when it does not live. Reads a few files: for a thread."""

    def oom_kills(self, box_id: str) -> int:
        """How many processes of the box the kernel has killed for lack of memory so far."""

    def hoarders(self) -> dict[str, str]:
        """The boxes that are to be ended, and in words why: what they take of the machine has no bound of its own."""


class EngineError(Exception):
    """The machine refused; the text says what was tried, why it failed and what helps."""

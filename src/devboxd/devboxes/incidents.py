"""What the kernel did to a devbox, for its log: processes killed for lack of memory, and a disk that is full.

Incidents lie in a file beside the devbox's journals and go with them after the retention. The kernel only counts, so
somebody has to look: the server does now and then, before a log is shown, and when a devbox ends.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
import structlog
from prometheus_client.metrics_core import Metric

from devboxd.concurrency.clock import now_ms
from devboxd.devboxes.states import LIVE
from devboxd.devboxes.store import Devbox
from devboxd.devboxes.views import GIB, resources
from devboxd.engine.base import FULL, Engine, Resources
from devboxd.metrics import counter

_log = structlog.get_logger()
MOST = 200
"""How many incidents of a devbox are kept, the newest."""
_ROOM = 0.1
"""The share that can be written at which a disk that was full has room again."""


class Incident(msgspec.Struct, frozen=True):
    """`kills`: how many processes the kernel had killed by then since the `boot`-th start of the devbox."""

    time_ms: int
    kind: Literal["oom", "disk_full", "disk_room"]
    message: str
    kills: int = 0
    boot: int = 0


@dataclass(frozen=True)
class _Seen:
    """What a look found."""

    boot: int
    kills: int
    full: bool


class Incidents:
    """The incidents of all devboxes. Every method may be called from any thread."""

    def __init__(self, engine: Engine, folder: Path) -> None:
        """`folder` has a folder for each devbox, or gets one."""
        self._engine = engine
        self._folder = folder
        self._lock = threading.Lock()
        self._seen: dict[str, _Seen] = {}
        self._oom_kills = 0

    def collect(self) -> Iterator[Metric]:
        """The metric of processes that were killed for lack of memory since this server was started."""
        text = "Processes of devboxes that the kernel killed for lack of memory"
        yield counter("devboxd_oom_kills", text, {(): self._oom_kills})

    def of(self, devbox_id: str) -> list[Incident]:
        """The incidents of a devbox that are known, oldest first."""
        try:
            return msgspec.json.decode(self._path(devbox_id).read_bytes(), type=list[Incident])
        except (FileNotFoundError, msgspec.DecodeError):
            return []

    def look(self, devboxes: Iterable[Devbox]) -> list[str]:
        """Write down what happened in these devboxes since the last look; the ids of those where something did."""
        with self._lock:
            return [devbox.id for devbox in devboxes if self._look(devbox)]

    def _look(self, devbox: Devbox) -> bool:
        seen = self._seen.pop(devbox.id, None)
        if seen is None or seen.boot != devbox.boots:
            seen = _remembered(self.of(devbox.id), devbox.boots)
        size = resources(devbox.launch_parameters)
        used = self._engine.disk_used(devbox.id) or 0
        room = self._engine.disk_room(devbox.id)
        full = seen.full if room is None else room < (_ROOM if seen.full else FULL)
        held = ""
        if (trouble := self._engine.trouble) is not None:
            held = f"the storage of the host has failed, nothing can be written: {trouble}"
        elif self._engine.disks_held:
            held = "the disk of the host is full: nothing can be written until there is room on it"
        now = _Seen(devbox.boots, max(seen.kills, self._engine.oom_kills(devbox.id)), full or bool(held))
        fresh = news(seen, now, size, used, held)
        try:
            if fresh:
                self._keep(devbox.id, [*self.of(devbox.id), *fresh][-MOST:])
        except OSError as error:
            _log.error("cannot write down what happened in a devbox", id=devbox.id, error=str(error))
            return False
        self._oom_kills += now.kills - seen.kills
        if devbox.status in LIVE:
            self._seen[devbox.id] = now
        return bool(fresh)

    def _keep(self, devbox_id: str, incidents: list[Incident]) -> None:
        """All of them, or none of the new ones after a crash."""
        path = self._path(devbox_id)
        path.parent.mkdir(mode=0o700, exist_ok=True)
        new = path.with_suffix(".new")
        with open(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as file:
            file.write(msgspec.json.encode(incidents))
        new.rename(path)

    def _path(self, devbox_id: str) -> Path:
        return self._folder / devbox_id / "incidents"


def news(seen: _Seen, now: _Seen, size: Resources, used: int, held: str = "") -> list[Incident]:
    """What is to be told between two looks. `used`: bytes on the disk; `held`: why the machine itself takes no more."""
    found = []
    if (kills := now.kills - seen.kills) > 0:
        processes = "a process" if kills == 1 else f"{kills} processes"
        text = f"the kernel killed {processes} for lack of memory: {size.memory_bytes / GIB:g} GiB were not enough"
        found.append(Incident(now_ms(), "oom", text, now.kills, now.boot))
    if now.full != seen.full:
        share = f"{used / GIB:.2f} of {size.disk_bytes / GIB:g} GiB are used"
        text = f"the disk is full: {share}; delete files" if now.full else f"the disk has room again: {share}"
        if held:
            text = f"{held}; {share}"
        found.append(Incident(now_ms(), "disk_full" if now.full else "disk_room", text))
    return found


def _remembered(known: list[Incident], boot: int) -> _Seen:
    """What an earlier server, or a look before a suspend, had seen. The kernel counts anew after each start."""
    kills = [incident.kills for incident in known if incident.kind == "oom" and incident.boot == boot]
    disk = [incident.kind for incident in known if incident.kind != "oom"]
    return _Seen(boot, max(kills, default=0), disk[-1:] == ["disk_full"])

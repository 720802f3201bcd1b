"""Who waits when boxes want more than the machine has: those that use the most let the others go first.

Equal weights alone would share the processors as fairly, but a process that wakes up for a millisecond would wait for
the end of somebody's turn each time, and six wake up for one command.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Collection, Mapping

import structlog

from devboxd.engine.blocking import finished
from devboxd.engine.cgroups import Cgroups

_log = structlog.get_logger(__name__)
_LOOK_S = 0.25
_CROWDED = 0.5
"""Of all processors: below this, whoever wakes up finds one that is free."""


def behind(used: Mapping[str, float], before: Collection[str]) -> set[str]:
    """Which boxes let the others go first: half as much as the busiest leads there, less than a quarter out again.

    A box that gets nothing any more, because many others are busy, is soon no longer among them. `used`: what each has
    used lately, in any unit. `before`: who let the others go first until now.
    """
    most = max(used.values(), default=0.0)
    return {box for box, amount in used.items() if amount > 0 and amount >= most * (0.25 if box in before else 0.5)}


class Turns:
    """Looks at the processor time of the boxes, and lets the kernel make those wait whose turn it is not."""

    def __init__(self, cgroups: Cgroups) -> None:
        self._cgroups = cgroups
        self._looked = self._total = 0.0
        self._seconds: dict[str, float] = {}
        self._behind: set[str] = set()

    async def keep(self) -> None:
        """Do so without end, for at most a twentieth of the time; not at all on a kernel before 5.15."""
        if not self._cgroups.defers:
            return
        self._behind = self._cgroups.boxes()  # a server before this one may have left them there
        while True:
            begun = time.monotonic()
            try:
                await finished(self.look)
            except OSError as error:
                _log.error("cannot give boxes their turns; tried again at the next look", error=str(error))
            await asyncio.sleep(max(_LOOK_S, 20 * (time.monotonic() - begun)))

    def look(self) -> None:
        """Choose by what each box has used since the last look."""
        now, total = time.monotonic(), self._cgroups.cpu_seconds()
        room = _CROWDED * (os.cpu_count() or 1) * (now - self._looked)
        seconds: dict[str, float] = {}
        if total - self._total > room:
            seconds = {box: self._cgroups.cpu_seconds(box) for box in self._cgroups.boxes()}
        used = {box: amount - self._seconds[box] for box, amount in seconds.items() if box in self._seconds}
        chosen = behind(used, self._behind)
        if bool(chosen) is not bool(self._behind):
            self._cgroups.crowd(bool(chosen))
        for box in chosen ^ self._behind:
            self._cgroups.defer(box, box in chosen)
        self._looked, self._total, self._seconds, self._behind = now, total, seconds, chosen

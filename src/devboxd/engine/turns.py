"""Who waits when boxes want more than the machine has: those that use the most let the others go first.

Equal weights alone would share the processors as fairly, but a process that wakes up for a millisecond would wait for
the end of somebody's turn each time, and six wake up for one command. Nor is the order alone enough: a kernel
that has to choose between one that is idle and one that has just run may take the idle one, and looks again only at its
next tick.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import time
from collections.abc import Collection, Mapping
from functools import partial

import structlog

from devboxd.agent import pulse_binary
from devboxd.concurrency.threads import finished
from devboxd.engine.cgroups import Cgroups

_log = structlog.get_logger(__name__)
_LOOK_S = 0.25
_WATCH_S = 0.05
"""Between two looks while there is room: who suddenly takes all shall not disturb others for long."""
_CROWDED = 0.4
"""Of all processors: below this, whoever wakes up finds one that is free."""


def behind(used: Mapping[str, float], before: Collection[str]) -> set[str]:
    """Which boxes let the others go first: three fifths of what the busiest uses leads there, less than half out again.

    A box that gets nothing any more, because many others are busy, is soon no longer among them. `used`: what each has
    used lately, in any unit. `before`: who let the others go first until now.
    """
    most = max(used.values(), default=0.0)
    return {box for box, amount in used.items() if amount > 0 and amount >= most * (0.5 if box in before else 0.6)}


class Turns:
    """Looks at the processor time of the boxes, and lets the kernel make those wait whose turn it is not."""

    def __init__(self, cgroups: Cgroups) -> None:
        self._cgroups = cgroups
        self._looked = self._total = 0.0
        self._seconds: dict[str, float] = {}
        self._behind: set[str] = set()
        self._pulse: subprocess.Popen[bytes] | None = None

    async def keep(self) -> None:
        """Do so without end, for at most a twentieth of the time; not at all on a kernel before 5.15."""
        if not self._cgroups.defers:
            return
        self._behind = self._cgroups.boxes()  # a server before this one may have left them there
        try:
            while True:
                begun = time.monotonic()
                try:
                    if (crowded := self.crowded()) or self._behind:
                        await finished(partial(self.choose, crowded))
                except OSError as error:
                    _log.error("cannot give boxes their turns; tried again at the next look", error=str(error))
                pause = _LOOK_S if self._behind else _WATCH_S
                await asyncio.sleep(max(pause, 20 * (time.monotonic() - begun)))
        finally:
            self._beat(False)

    def crowded(self) -> bool:
        """Whether boxes took so much since the last look that who wakes up may find no processor free. Raises OSError.

        It reads one file.
        """
        now, total = time.monotonic(), self._cgroups.cpu_seconds()
        room = _CROWDED * (os.cpu_count() or 1) * (now - self._looked)
        crowded = total - self._total > room
        self._looked, self._total = now, total
        if not crowded:
            self._seconds = {}
        return crowded

    def choose(self, crowded: bool) -> None:
        """Make those wait that used the most since the last look; while it is not `crowded`, nobody. Raises OSError."""
        seconds = {box: self._cgroups.cpu_seconds(box) for box in self._cgroups.boxes()} if crowded else {}
        used = {box: amount - self._seconds[box] for box, amount in seconds.items() if box in self._seconds}
        chosen = behind(used, self._behind)
        for box in chosen ^ self._behind:
            self._cgroups.defer(box, box in chosen)
        if bool(chosen) is not bool(self._behind):
            self._cgroups.crowd(bool(chosen))
        self._behind, self._seconds = chosen, seconds
        if not chosen or any(amount > 0 for box, amount in used.items() if box not in chosen):
            self._beat(bool(chosen))

    def _beat(self, on: bool) -> None:
        """Let the kernel ask a thousand times a second, on each processor, who shall run. Raises OSError.

        That takes a hundredth of the processors, so it begins when somebody is there to be let go first.
        """
        if on and self._pulse is None:
            command, null = (pulse_binary(), self._cgroups.root_processes), subprocess.DEVNULL
            self._pulse = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=null, stderr=null, close_fds=False)
        elif not on and self._pulse is not None:
            pulse, self._pulse = self._pulse, None
            pulse.communicate()

"""When a devbox is idle: nothing that a person would call work goes on in it. Pure; the clock is the caller's."""

from __future__ import annotations

from dataclasses import dataclass

CPU_SHARE = 0.02
"""Use of one processor, over a look, below which a devbox does nothing worth mentioning."""


@dataclass(frozen=True)
class Signs:
    """What was seen of a devbox in one look."""

    commands: int
    """Executions that run, but for the entrypoint, which a server of web pages may be."""
    uses: tuple[str, ...]
    """Connections and transfers that are open, by kind."""
    touched_ms: int
    """When it was last asked for something, in Unix milliseconds."""
    cpu_share: float
    """Processors used since the last look."""
    snapshot: bool = False
    """One is being taken of it."""

    def reasons(self) -> tuple[str, ...]:
        """What keeps the devbox awake, in words; nothing when it is idle."""
        found = [f"{self.commands} running command{'s' * (self.commands != 1)}"] if self.commands else []
        found += [f"an open {kind}" for kind in self.uses]
        found += ["a snapshot that is being taken"] if self.snapshot else []
        if self.cpu_share > CPU_SHARE:
            found.append(f"processes that use {self.cpu_share:.0%} of a processor")
        return tuple(found)


@dataclass(frozen=True)
class Idle:
    """Since when a devbox is idle, None while it is not."""

    since_ms: int | None

    def look(self, now_ms: int, signs: Signs) -> Idle:
        """What is so after a look. A clock that was set back starts the time anew."""
        if signs.reasons():
            return Idle(None)
        begun = now_ms if self.since_ms is None or self.since_ms > now_ms else self.since_ms
        return Idle(min(now_ms, max(begun, signs.touched_ms)))

    def left_s(self, now_ms: int, limit_s: float) -> float:
        """Seconds until it has been idle for `limit_s`; nothing of it passes while it is not."""
        return limit_s if self.since_ms is None else max(0.0, self.since_ms / 1000 + limit_s - now_ms / 1000)

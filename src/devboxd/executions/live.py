"""Executions that have not completed."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from devboxd.executions.journals import Spool
from devboxd.executions.store import Execution


@dataclass(eq=False)
class LiveExecution:
    """An execution that has not completed: its row, and the events of those that wait for it."""

    row: Execution
    committed: bool = True
    """Whether the row is in the store; nothing may be done with the command before."""
    killed: bool = False
    """A kill was asked for: a command of which the agent was not told yet never starts."""
    ending: bool = False
    told: asyncio.Event = field(default_factory=asyncio.Event)
    """The agent knows the command, or never will."""
    done: asyncio.Event = field(default_factory=asyncio.Event)
    wakes: set[asyncio.Event] = field(default_factory=set)
    stdin: asyncio.Lock = field(default_factory=asyncio.Lock)
    spool: Spool | None = None
    position: int = 0

    def changed(self, row: Execution) -> None:
        """Take the new row and wake what waits for a change."""
        self.row = row
        for event in self.wakes:
            event.set()

    def ended(self) -> None:
        """Release what waits for the agent's knowledge or for the end."""
        self.told.set()
        self.done.set()

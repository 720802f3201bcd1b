"""Warm boxes: made from the default image ahead of the devbox that will use them, so that a create need not wait.

A warm box is an empty one: it has an id, and nothing else of a devbox yet. The devbox that takes it gets its id, its
own limits, and everything else as any devbox does after its box has started. One that nobody took goes with its server.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping

import structlog

from devboxd.devboxes.prepare import DEFAULT_USER
from devboxd.devboxes.supervisor import hostname
from devboxd.devboxes.views import LaunchParameters, resources
from devboxd.engine.base import BoxSpec, Engine, EngineError, Image
from devboxd.executions.rehearsal import rehearse
from devboxd.http.streams import wait
from devboxd.ids import new_id

_log = structlog.get_logger()
_AGAIN_S = 10.0
_REST_S = 0.05
"""How long nobody has taken a box before another one is made: who creates devboxes has the processors for that."""


class Warm:
    """At most `size` boxes that wait, filled up in the background by `fill`. A command is rehearsed in each."""

    def __init__(
        self, engine: Engine, image: Callable[[], Image | None], environment: Mapping[str, str], size: int
    ) -> None:
        self._engine = engine
        self._image = image
        self._environment = environment
        self._size = size
        self._ready: deque[str] = deque()
        self._wanted = asyncio.Event()
        self._taken_at = -_REST_S

    @property
    def ready(self) -> int:
        """How many wait."""
        return len(self._ready)

    def take(self) -> str | None:
        """The id of a box that waits, None when there is none. From now on it belongs to the caller."""
        self._wanted.set()
        self._taken_at = time.monotonic()
        return self._ready.popleft() if self._ready else None

    async def fill(self) -> None:
        """Keep the number up, without end."""
        while True:
            self._wanted.clear()
            while len(self._ready) < self._size and self._engine.short_of() is None:
                await self._rest()
                if not await self._make():
                    await asyncio.sleep(_AGAIN_S)
            await self._wanted.wait()

    async def _rest(self) -> None:
        """Return when nobody has taken a box for a while, or none waits any more."""
        while self._ready and (left := self._taken_at + _REST_S - time.monotonic()) > 0:
            self._wanted.clear()
            await wait(self._wanted, left)

    async def close(self) -> None:
        """End those that wait."""
        self._size = 0
        while self._ready:
            await self._end(self._ready.popleft())

    async def _make(self) -> bool:
        image = self._image()
        if image is None:
            return False
        box_id = new_id("dbx")
        try:
            await self._engine.create(BoxSpec(box_id, hostname(box_id), image, resources(LaunchParameters())))
            await rehearse(self._engine.agent_socket(box_id), DEFAULT_USER[0], self._environment)
        except EngineError as error:
            _log.warning("cannot make a box ahead", error=str(error))
            return False
        except BaseException:
            await self._end(box_id)
            raise
        self._ready.append(box_id)
        return True

    async def _end(self, box_id: str) -> None:
        try:
            await self._engine.destroy(box_id)
        except EngineError as error:
            _log.error("cannot end a box that waited; the next server does", box=box_id, error=str(error))

"""Warm boxes: made from the default image ahead of the devbox that will use them, so that a create need not wait.

A warm box is an empty one: it has an id and a size, and nothing else of a devbox yet. A devbox of that size takes its
id, and gets everything else as any devbox does after its box has started. What a size fixes at the start (the file
system of the disk, /dev/shm, resource limits) cannot all be changed later, so no devbox takes a box of another size.
A box that no devbox took goes with its server.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence

import structlog
from prometheus_client.metrics_core import Metric

from devboxd.concurrency.waits import wait
from devboxd.devboxes.prepare import DEFAULT_USER
from devboxd.devboxes.supervisor import hostname
from devboxd.devboxes.views import LaunchParameters, resources
from devboxd.engine.base import BoxSpec, Engine, EngineError, Image, Resources
from devboxd.executions.rehearsal import rehearse
from devboxd.ids import new_id
from devboxd.metrics import gauge

_log = structlog.get_logger()
_AGAIN_S = 10.0
_REST_S = 0.05
"""How long nobody has taken a box before another one is made: who creates devboxes has the processors for that."""


_ASKED = 16
"""So many creates decide together which sizes the next boxes get."""


def sizes(asked: Sequence[Resources], number: int) -> list[Resources]:
    """The sizes of `number` boxes that wait, in the order of their making, by the sizes asked for so far, oldest first.

    Each size has the share of the boxes that it has of `asked` (D'Hondt); of equal claims the latest counts.
    """
    latest = {size: position for position, size in enumerate(asked)}
    claims = [
        (count / share, latest[size], size) for size, count in Counter(asked).items() for share in range(1, number + 1)
    ]
    return [size for _, _, size in sorted(claims, key=lambda claim: claim[:2], reverse=True)[:number]]


class Warm:
    """At most `size` boxes that wait, filled up in the background by `fill`. A command is rehearsed in each."""

    def __init__(
        self, engine: Engine, image: Callable[[], Image | None], environment: Mapping[str, str], size: int
    ) -> None:
        self._engine = engine
        self._image = image
        self._environment = environment
        self._size = size
        self._ready: dict[str, Resources] = {}
        self._asked = deque([resources(LaunchParameters())], maxlen=_ASKED)
        self._wanted = asyncio.Event()
        self._taken_at = -_REST_S

    @property
    def ready(self) -> int:
        """How many wait."""
        return len(self._ready)

    def collect(self) -> Iterator[Metric]:
        """The metric of the boxes that wait."""
        yield gauge("devboxd_warm_boxes", "Boxes that wait for a create", {(): self.ready})

    def take(self, size: Resources) -> str | None:
        """The id of a box of this size that waits, None when there is none. From now on it belongs to the caller."""
        self._asked.append(size)
        self._wanted.set()
        self._taken_at = time.monotonic()
        found = next((box_id for box_id, ready in self._ready.items() if ready == size), None)
        if found is not None:
            del self._ready[found]
        return found

    async def fill(self) -> None:
        """Keep the number up, without end."""
        while True:
            self._wanted.clear()
            while self._missing() is not None and self._engine.short_of() is None:
                await self._rest()
                if (size := self._missing()) is None:
                    break
                await self._make_room()
                if not await self._make(size):
                    await asyncio.sleep(_AGAIN_S)
            await self._wanted.wait()

    def _missing(self) -> Resources | None:
        """The size of the next box to make, None when all are there."""
        left = Counter(self._ready.values())
        for size in sizes(self._asked, self._size):
            if not left[size]:
                return size
            left[size] -= 1
        return None

    async def _make_room(self) -> None:
        """End boxes of sizes that are not asked for any more, where another one has no place else."""
        while len(self._ready) >= self._size:
            over = Counter(self._ready.values()) - Counter(sizes(self._asked, self._size))
            box_id = next(box_id for box_id, size in self._ready.items() if over[size])
            del self._ready[box_id]
            await self._end(box_id)

    async def _rest(self) -> None:
        """Return when nobody has taken a box for a while, or none waits any more."""
        while self._ready and (left := self._taken_at + _REST_S - time.monotonic()) > 0:
            self._wanted.clear()
            await wait(self._wanted, left)

    async def close(self) -> None:
        """End those that wait."""
        self._size = 0
        while self._ready:
            await self._end(self._ready.popitem()[0])

    async def _make(self, size: Resources) -> bool:
        image = self._image()
        if image is None:
            return False
        box_id = new_id("dbx")
        try:
            await self._engine.create(BoxSpec(box_id, hostname(box_id), image, size))
            await rehearse(self._engine.agent_socket(box_id), DEFAULT_USER[0], self._environment)
        except EngineError as error:
            _log.warning("cannot make a box ahead", error=str(error))
            return False
        except BaseException:
            await self._end(box_id)
            raise
        self._ready[box_id] = size
        return True

    async def _end(self, box_id: str) -> None:
        try:
            await self._engine.destroy(box_id)
        except EngineError as error:
            _log.error("cannot end a box that waited; the next server does", box=box_id, error=str(error))

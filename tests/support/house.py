"""Everything that keeps devboxes, in the process of a test: real boxes, a real store, and a clock that a test sets."""

from __future__ import annotations

import asyncio
import hashlib
import math
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import msgspec

from devboxd import services
from devboxd.concurrency.clock import Clock
from devboxd.config import Settings
from devboxd.devboxes.states import Event
from devboxd.devboxes.store import Devbox
from devboxd.devboxes.views import CreateDevbox
from devboxd.engine import instance
from devboxd.engine.base import Image
from devboxd.http.once import Once

ACCOUNT = "acc_test"
_PATIENCE_S = 60.0


class SetClock(Clock):
    """Stands still until it is moved; then everybody who waits by it looks at each moment that it waited for."""

    def __init__(self, now: int) -> None:
        self._now = now
        self._waits: dict[asyncio.Task[Any], tuple[int, asyncio.Event]] = {}
        self._known: set[asyncio.Task[Any]] = set()
        self._busy: set[asyncio.Task[Any]] = set()
        self._quiet = asyncio.Event()
        self._more = asyncio.Event()

    def now_ms(self) -> int:
        return self._now

    def seconds(self) -> float:
        return self._now / 1000

    async def wait(self, event: asyncio.Event, seconds: float) -> bool:
        task = asyncio.current_task()
        assert task is not None
        if task not in self._known:
            self._known.add(task)
            task.add_done_callback(self._done)
        wake = asyncio.Event()
        self._waits[task] = (self._now + max(1, math.ceil(seconds * 1000 - 1e-6)), wake)
        self._more.set()
        self._done(task)
        waits = [asyncio.ensure_future(one.wait()) for one in (event, wake)]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            del self._waits[task]
            for one in waits:
                one.cancel()
            await asyncio.gather(*waits, return_exceptions=True)
        return event.is_set()

    async def move(self, seconds: float) -> None:
        """Let so much time pass; returns when all who had to look have looked, and wait again or are done."""
        end = self._now + round(seconds * 1000)
        while (due := min((due for due, _ in self._waits.values()), default=end)) <= end:
            self._now = max(self._now, due)
            await self._look()
            if due == end:
                break
        self._now = end

    async def awaited(self, number: int) -> None:
        """Return when so many wait by it."""
        while len(self._waits) < number:
            self._more.clear()
            await self._more.wait()

    def jump(self, seconds: float) -> None:
        """Set the clock, as an operator does, while nobody looks."""
        self._now += round(seconds * 1000)

    async def _look(self) -> None:
        for task, (due, wake) in self._waits.items():
            if due <= self._now and not wake.is_set():
                self._busy.add(task)
                wake.set()
        self._quiet.clear()
        if self._busy:
            await self._quiet.wait()

    def _done(self, task: asyncio.Task[Any]) -> None:
        self._busy.discard(task)
        if not self._busy:
            self._quiet.set()


class House:
    """One server's devboxes, without HTTP. As a context manager it is open during the block; its boxes go on after."""

    def __init__(self, image: Image, state: Path, clock: Clock, **settings: Any) -> None:
        self._image = image
        self._settings = Settings(state=state, pool_size=1, warm_boxes=0, executions_per_box=100, **settings)
        self._clock = clock
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> House:
        try:
            await self._open()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def _open(self) -> None:
        """As the server does it."""
        settings, stack = self._settings, self._stack
        claimed = instance.claim(settings.state)
        stack.callback(claimed.close)
        parts = await stack.enter_async_context(services.build(settings, claimed, self, self._clock))
        self.store, self.engine, self.devboxes, self.executions = (
            parts.store, parts.engine, parts.devboxes, parts.executions
        )  # fmt: skip
        await self.engine.open(await self.devboxes.kept())
        stack.push_async_callback(self.engine.close)
        stack.push_async_callback(self.devboxes.close)
        await self.devboxes.open(interruption=None)

    def default(self) -> Image:
        """The image of every devbox."""
        return self._image

    def named(self, _: str) -> Image:
        """The same for every name."""
        return self._image

    async def create(self, **body: Any) -> str:
        """A running devbox; its id."""
        devbox = await self.devboxes.create(ACCOUNT, msgspec.convert(body, CreateDevbox), Once(None, hashlib.sha256()))
        return (await self.reached(devbox.id, "running")).id

    async def ask(self, box: str, event: Event) -> None:
        await self.devboxes.ask(ACCOUNT, box, event)

    async def get(self, box: str) -> Devbox:
        return await self.devboxes.get(ACCOUNT, box)

    async def reached(self, box: str, status: str) -> Devbox:
        """The devbox as soon as it has this status."""
        found = await self.devboxes.reached(await self.get(box), frozenset({status}), _PATIENCE_S)
        assert found is not None, await self.get(box)
        return found

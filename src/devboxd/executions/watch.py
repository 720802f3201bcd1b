"""Wake readers when a journal grows: one inotify instance for the whole server, no help from the boxes needed."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

from asyncinotify import Inotify, Mask, Watch


class Watcher:
    """Sets events when watched files are written. `run` must be running; it has one owner (the app)."""

    def __init__(self) -> None:
        self._inotify = Inotify()
        self._watches: dict[Path, tuple[Watch, set[asyncio.Event]]] = {}

    async def run(self) -> None:
        """Deliver until cancelled."""
        with self._inotify:
            async for event in self._inotify:
                if event.mask & Mask.Q_OVERFLOW:
                    for _, waiting in self._watches.values():
                        _set(waiting)
                elif event.watch is not None and (entry := self._watches.get(event.watch.path)) is not None:
                    _set(entry[1])

    @contextlib.contextmanager
    def watching(self, path: Path, event: asyncio.Event) -> Iterator[bool]:
        """Set `event` after each write to `path` while the block lasts; False when it cannot be watched."""
        entry = self._watches.get(path)
        if entry is None:
            try:
                entry = (self._inotify.add_watch(path, Mask.MODIFY), set())
            except OSError:
                yield False
                return
            self._watches[path] = entry
        watch, waiting = entry
        waiting.add(event)
        try:
            yield True
        finally:
            waiting.discard(event)
            if not waiting:
                del self._watches[path]
                with contextlib.suppress(OSError):
                    self._inotify.rm_watch(watch)


def _set(events: set[asyncio.Event]) -> None:
    for event in events:
        event.set()

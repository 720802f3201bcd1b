"""A stream read in a thread of its own, while the test does something to the server."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, Self

import httpx

from support.api import Event
from support.server import Server


class Reader:
    """Reads a stream from a position until it ends somehow; `wait` tells how."""

    def __init__(
        self, server: Server, box: str, execution: str, which: str = "stdout", offset: int | None = None
    ) -> None:
        query = {} if offset is None else {"offset": str(offset)}
        self._begin(server, f"/v1/devboxes/{box}/executions/{execution}/stream_{which}_updates", query)

    def _begin(self, server: Server, path: str, query: dict[str, str]) -> None:
        self.events: list[Event] = []
        self.how = ""
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._read, args=(server, path, query), daemon=True)
        self._thread.start()

    @property
    def text(self) -> str:
        """All output so far."""
        return "".join(event.output for event in self.events if event.name == "message")

    @property
    def position(self) -> int:
        """Where to open the stream again, for a client that computes it."""
        messages = [event for event in self.events if event.name == "message"]
        return messages[-1].end if messages else 0

    @property
    def last_offset(self) -> int | None:
        """Where the published clients open the stream again."""
        messages = [event for event in self.events if event.name == "message"]
        return messages[-1].offset if messages else None

    def until(self, check: Callable[[Self], bool], seconds: float = 30) -> Self:
        """Return when something is true of what was read; fail when it does not become so in time."""
        with self._changed:
            done = self._changed.wait_for(lambda: check(self) or self.how, seconds)
        assert done, f"not in {seconds} s; read so far: {self.text[-500:]!r}"
        assert check(self), f"the stream ended ({self.how}) after {self.text[-500:]!r}"
        return self

    def wait(self, seconds: float = 30) -> str:
        """Wait for the end: `clean`, `408` as an error event, or `cut` when the connection broke."""
        self._thread.join(seconds)
        assert not self._thread.is_alive(), f"the stream did not end in {seconds} s"
        return self.how

    def _read(self, server: Server, path: str, query: dict[str, str]) -> None:
        how = "cut"
        try:
            with server.api() as api, api.events(path, query) as found:
                how = "clean"
                for event in found:
                    with self._changed:
                        self.events.append(event)
                        self._changed.notify_all()
                    if event.name == "error":
                        how = str(event.data["code"])
        except (httpx.TransportError, AssertionError) as error:
            how = f"cut: {error!r}" if isinstance(error, AssertionError) else "cut"
        finally:
            with self._changed:
                self.how = how
                self._changed.notify_all()


class LogReader(Reader):
    """Reads the log of a devbox as it grows."""

    def __init__(self, server: Server, box: str, **query: str) -> None:
        self._begin(server, f"/v1/devboxes/{box}/logs/tail", query)

    @property
    def entries(self) -> list[dict[str, Any]]:
        """All entries so far."""
        return [event.data for event in self.events if event.name == "message"]

    @property
    def messages(self) -> list[str]:
        """Their messages."""
        return [entry["message"] for entry in self.entries]

    @property
    def text(self) -> str:
        """All messages so far, a line each."""
        return "".join(f"{message}\n" for message in self.messages)

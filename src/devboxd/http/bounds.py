"""How much each key may hold of the server at once: requests in flight, and bytes of bodies and answers in memory."""

from __future__ import annotations

from types import TracebackType

from devboxd.errors import ApiError

REQUESTS_PER_KEY = 3000
"""Requests in flight, waits and streams among them: thousands of devboxes with one key, and places left for others."""
MEMORY_PER_KEY = 512 << 20
MEMORY = 1 << 30
"""Bytes of bodies and of answers that are being sent, of all keys together."""
RETRY_S = 1


class _Share:
    """What one key holds."""

    __slots__ = ("memory", "requests")

    def __init__(self) -> None:
        self.requests = 0
        self.memory = 0


class Bounds:
    """What all keys hold."""

    def __init__(self) -> None:
        self._shares: dict[str, _Share] = {}
        self.memory = 0
        """Bytes that all keys hold."""

    def admit(self, key: str) -> Held:
        """Count one more request of this key; it counts until what is returned is left. Raises ApiError 429.

        Requests without a key, "", have bounds of their own, so that /healthz is always answered.
        """
        share = self._shares.get(key)
        if share is None:
            share = self._shares[key] = _Share()
        if key and share.requests >= REQUESTS_PER_KEY:
            raise _too_many(f"{REQUESTS_PER_KEY} requests of this key are in flight, the most at once")
        share.requests += 1
        return Held(self, key, share)

    def take(self, share: _Share, size: int) -> None:
        """Count this many bytes. Raises ApiError 429 when there is no room for them."""
        if share.memory + size > MEMORY_PER_KEY:
            raise _too_many(f"large bodies and answers of this key fill {MEMORY_PER_KEY >> 20} MiB, the most at once")
        if self.memory + size > MEMORY:
            raise _too_many(f"large bodies and answers fill {MEMORY >> 20} MiB, the most at once")
        share.memory += size
        self.memory += size

    def release(self, key: str, share: _Share, size: int) -> None:
        """A request of this key ends, which held this many bytes."""
        self.memory -= size
        share.memory -= size
        share.requests -= 1
        if not share.requests:
            del self._shares[key]


class Held:
    """What one request holds, until the block ends."""

    __slots__ = ("_bounds", "_key", "_memory", "_share")

    def __init__(self, bounds: Bounds, key: str, share: _Share) -> None:
        self._bounds = bounds
        self._key = key
        self._share = share
        self._memory = 0

    def take(self, size: int) -> None:
        """Hold this many bytes more. Raises ApiError 429."""
        self._bounds.take(self._share, size)
        self._memory += size

    def __enter__(self) -> Held:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bounds.release(self._key, self._share, self._memory)


def _too_many(reason: str) -> ApiError:
    return ApiError(429, f"cannot take this request now: {reason}; ask again soon", retry=True, retry_after=RETRY_S)

"""Requests with an effect are done once: the same x-request-id is answered again, not performed again."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

import msgspec
import structlog
from sqlalchemy import Connection, bindparam, delete, select
from sqlalchemy.dialects.sqlite import insert
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive

from devboxd.concurrency.clock import now_ms
from devboxd.concurrency.tasks import Tasks
from devboxd.errors import ApiError, conflict, timed_out
from devboxd.http.answer import JSON, Answer, of_error
from devboxd.store.db import Store
from devboxd.store.schema import requests
from devboxd.store.statement import Statement

T = TypeVar("T")
KEPT_SECONDS = 24 * 3600
"""How long an answer can be had again."""
ANSWER_LIMIT = 1 << 20
"""Larger answers are not stored."""
BOUND_LIMIT = 64 << 10
"""The same for a request that is bound to a reference, from which its handler renders the answer again."""
STOPPING_S = 5
"""When clients of a stopping server shall come again: a connection that is refused makes some of them hang."""
_SWEEP_SECONDS = 60.0
_SWEEP_ROWS = 500
_LATE_S = 0.05
"""For how long answers are collected that can be rendered again, before they are stored together."""
_LATE_MAX = 256

_log = structlog.get_logger()
_find = Statement(
    select(requests.c.body_hash, requests.c.ref, requests.c.status, requests.c.headers, requests.c.answer).where(
        requests.c.key == bindparam("key")
    )
)
_new = insert(requests)
_put = Statement(
    _new.on_conflict_do_update(
        index_elements=[requests.c.key], set_={column.name: _new.excluded[column.name] for column in requests.c}
    )
)
_old = select(requests.c.key).where(requests.c.create_time_ms < bindparam("before")).limit(_SWEEP_ROWS)
_sweep = delete(requests).where(requests.c.key.in_(_old))


class Fingerprint(Protocol):
    """The hash of a body; of a streamed one it is final only when the body has been read to its end."""

    def hexdigest(self) -> str:
        """The hash in hexadecimal digits."""


class StreamFingerprint:
    """Hashes a body while it passes by. A multipart boundary does not count: clients choose a new one each time."""

    def __init__(self, receive: Receive, boundary: bytes, stall_seconds: float) -> None:
        self._receive = receive
        self._boundary = boundary
        self._stall_seconds = stall_seconds
        self._hash = hashlib.sha256()
        self._tail = b""
        self._ended = False

    async def receive(self) -> Message:
        """The next message of the body. A client that sends nothing for the stall time counts as gone."""
        try:
            async with asyncio.timeout(self._stall_seconds):
                message = await self._receive()
        except TimeoutError:
            return {"type": "http.disconnect"}
        if message["type"] == "http.request":
            self._feed(message.get("body", b""))
            self._ended = not message.get("more_body", False)
        return message

    async def rest(self) -> None:
        """Read and hash what is left of the body. Raises ClientDisconnect when it never ends."""
        while not self._ended:
            if (await self.receive())["type"] == "http.disconnect":
                raise ClientDisconnect

    def hexdigest(self) -> str:
        """The hash of all that was read so far."""
        final = self._hash.copy()
        final.update(self._tail)
        return final.hexdigest()

    def _feed(self, chunk: bytes) -> None:
        if not self._boundary:
            self._hash.update(chunk)
            return
        data = self._tail + chunk
        start = 0
        while (found := data.find(self._boundary, start)) >= 0:
            self._hash.update(data[start:found])
            start = found + len(self._boundary)
        keep = max(start, len(data) - len(self._boundary) + 1)
        self._hash.update(data[start:keep])
        self._tail = data[keep:]


class Row(NamedTuple):
    """What the store has of a request: its body's hash, what it made, and its answer once that is known."""

    body_hash: str
    ref: str | None
    status: int | None
    headers: str | None
    answer: bytes | None

    def put(self, connection: Connection, key: str) -> None:
        """Write it."""
        _put.run(connection, {"key": key, "create_time_ms": now_ms(), **self._asdict()})


class Once:
    """The handler's side: what this request has already begun, and the place to note what it begins now."""

    __slots__ = ("_fingerprint", "_key", "answer", "bound", "ref")

    def __init__(self, key: str | None, fingerprint: Fingerprint) -> None:
        self._key = key
        self._fingerprint = fingerprint
        self.ref: str | None = None
        """Set when this same request was bound before and has no stored answer: resume or render that thing."""
        self.answer: bytes | None = None
        """The answer that was bound, if any; it is what goes out."""
        self.bound: str | None = None
        """What this request made, now or before."""

    def bind(self, connection: Connection, ref: str, answer: bytes | None = None) -> None:
        """Note in the effect's own transaction that this request made `ref`, with its answer when that is known.

        `answer` is the JSON of a 200. In a streamed operation call it when the body has been read to its end.
        Without an x-request-id this does nothing.
        """
        if self._key is None:
            return
        if answer is not None and len(answer) > BOUND_LIMIT:
            answer = None
        self.answer = answer
        self.bound = ref
        status = None if answer is None else 200
        Row(self._fingerprint.hexdigest(), ref, status, None, answer).put(connection, self._key)


Work = Callable[[Once], Awaitable[Answer]]


@dataclass(frozen=True, slots=True)
class _Running:
    fingerprint: Fingerprint
    task: asyncio.Task[Answer]


class Desk:
    """Runs requests with an effect as tasks of its own, so that a client that vanishes does not cut them short."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._running: dict[str, _Running] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._background = Tasks()
        self._late: dict[str, Row] = {}
        self._flushing = asyncio.Lock()
        self._next_sweep = 0.0
        self._stopping = False

    async def answer(self, key: str | None, body: Fingerprint, work: Work) -> Answer:
        """Do `work` once per key: a second request waits for the first or gets its stored answer.

        Another body under the same key is a conflict. Errors are not stored. Raises ApiError.
        """
        streamed = isinstance(body, StreamFingerprint)
        while key is not None and (first := self._running.get(key)) is not None:
            if not streamed and first.fingerprint.hexdigest() != body.hexdigest():
                raise _other_body()
            answer = await asyncio.shield(first.task)
            if not streamed:
                return answer
            if answer.status < 400:
                await _finish(body)
                if first.fingerprint.hexdigest() != body.hexdigest():
                    raise _other_body()
                return answer
            self._forget(key, first)  # it failed, and its own callback may not have come yet
        if self._stopping:
            raise _stopping()
        task = self._own(asyncio.get_running_loop().create_task(self._do(key, body, work)))
        if key is not None:
            running = self._running[key] = _Running(body, task)
            task.add_done_callback(lambda _: self._forget(key, running))
        return await asyncio.shield(task)

    def _forget(self, key: str, running: _Running) -> None:
        if self._running.get(key) is running:
            del self._running[key]

    async def drain(self, grace_seconds: float) -> None:
        """Refuse new work, let what runs finish within the grace, then cancel and await the rest."""
        self._stopping = True
        if self._tasks:
            _, late = await asyncio.wait(set(self._tasks), timeout=grace_seconds)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        await self._flush()

    def _own(self, task: asyncio.Task[T]) -> asyncio.Task[T]:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _do(self, key: str | None, body: Fingerprint, work: Work) -> Answer:
        try:
            return await self._do_or_replay(key, body, work)
        except ClientDisconnect:
            return of_error(timed_out("cannot finish the request: its body ended early; send it again"))
        except ApiError as error:
            return of_error(error)
        except asyncio.CancelledError:
            if not self._stopping:
                raise
            return of_error(_stopping())

    async def _do_or_replay(self, key: str | None, body: Fingerprint, work: Work) -> Answer:
        once = Once(key, body)
        if key is None:
            return await work(once)
        row = self._late.get(key) or await self._store.read(lambda c: _find.one(c, {"key": key}))
        if row is not None:
            row = Row(*row)
            await _finish(body)
            if row.body_hash != body.hexdigest():
                raise _other_body()
            if row.answer is not None:
                return _stored(row)
            once.ref = once.bound = row.ref
        answer = await work(once)
        if answer.status < 400:
            await _finish(body)
            if once.answer is not None:
                answer = Answer(200, once.answer)
            await self._keep(key, body, once, answer)
            self._sweep_now_and_then()
        return answer

    async def _keep(self, key: str, body: Fingerprint, once: Once, answer: Answer) -> None:
        """Store the answer, soon where it could be rendered again: then nothing is lost when the server dies before.

        When storing fails the client gets the answer all the same: the effect has happened.
        """
        limit = BOUND_LIMIT if once.bound else ANSWER_LIMIT
        if len(answer.body) > limit or (once.answer is not None and not isinstance(body, StreamFingerprint)):
            return
        row = Row(body.hexdigest(), once.bound, answer.status, _headers_text(answer), answer.body)
        if once.bound is None or len(self._late) >= _LATE_MAX:
            await self._put({key: row})
            return
        if not self._late:
            self._store_late()
        self._late[key] = row

    def _store_late(self) -> None:
        self._own(self._background.start(self._flush_soon(), "storing of answers"))

    async def _flush_soon(self) -> None:
        # Not a wait for something: the time in which answers are collected, which drain cuts short.
        await asyncio.sleep(_LATE_S)
        await self._flush()

    async def _flush(self) -> None:
        async with self._flushing:
            late = dict(self._late)
            try:
                if late:
                    await self._put(late, synced=False)
            except asyncio.CancelledError:
                late = {}  # drain stores them
                raise
            finally:  # also after a fault: these are rendered again when asked for, and others shall be stored
                for key in late:
                    del self._late[key]
                if self._late and not self._stopping:
                    self._store_late()

    async def _put(self, rows: Mapping[str, Row], *, synced: bool = True) -> None:
        def put(connection: Connection) -> None:
            for key, row in rows.items():
                row.put(connection, key)

        try:
            await self._store.write(put, synced=synced)
        except ApiError as error:
            _log.error("once.answer_not_stored", reason=error.message)

    def _sweep_now_and_then(self) -> None:
        if (now := time.monotonic()) >= self._next_sweep and not self._stopping:
            self._next_sweep = now + _SWEEP_SECONDS
            self._own(self._background.start(self._sweep(), "sweep of old answers"))

    async def _sweep(self) -> None:
        before = now_ms() - KEPT_SECONDS * 1000
        try:
            while await self._store.write(lambda c: c.execute(_sweep, {"before": before}).rowcount) == _SWEEP_ROWS:
                pass
        except ApiError as error:
            _log.warning("once.sweep_failed", reason=error.message)


def request_key(account: str, method: str, path: str, query: bytes, request_id: bytes) -> str | None:
    """The key of a request, or None when it carries no x-request-id."""
    if not request_id:
        return None
    parts = (account.encode(), method.encode(), path.encode(errors="surrogateescape"), query, request_id)
    return hashlib.sha256(b"".join(len(part).to_bytes(8, "big") + part for part in parts)).hexdigest()


async def _finish(body: Fingerprint) -> None:
    if isinstance(body, StreamFingerprint):
        await body.rest()


def _stored(row: Row) -> Answer:
    body, status = row.answer or b"", row.status or 200
    if row.headers is None:
        return Answer(status, body)
    pairs = msgspec.json.decode(row.headers, type=list[tuple[str, str]])
    return Answer(status, body, tuple((k.encode("latin-1"), v.encode("latin-1")) for k, v in pairs))


def _headers_text(answer: Answer) -> str | None:
    if answer.headers == JSON:
        return None
    return msgspec.json.encode([(k.decode("latin-1"), v.decode("latin-1")) for k, v in answer.headers]).decode()


def _other_body() -> ApiError:
    return conflict("cannot do this request: its x-request-id was used with another body; use a new one per request")


def _stopping() -> ApiError:
    return ApiError(
        503, "cannot finish the request: the server is stopping; ask again", retry=True, retry_after=STOPPING_S
    )

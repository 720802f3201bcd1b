"""SQLite behind two functions: `read`, inline on a connection of its own, and `write`, one thread with group commit."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import structlog
from prometheus_client.metrics_core import Metric
from sqlalchemy import Connection, create_engine, event
from sqlalchemy.engine import URL, Engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import NullPool

from devboxd.errors import ApiError, SetupError
from devboxd.metrics import counter

T = TypeVar("T")

FILE_NAME = "devboxd.db"
"""Name of the store in the state folder."""
HEAD = "0004"
"""The newest revision that this program knows; a test compares it with the migrations."""

_BATCH = 256
_QUEUE = 2048
_BUSY_SECONDS = 10.0
_PRAGMAS = (
    "journal_mode=WAL",
    "synchronous=FULL",
    "foreign_keys=ON",
    "journal_size_limit=67108864",
    "temp_store=MEMORY",
)
_HOST_FAULTS = {
    sqlite3.SQLITE_BUSY,
    sqlite3.SQLITE_LOCKED,
    sqlite3.SQLITE_NOMEM,
    sqlite3.SQLITE_READONLY,
    sqlite3.SQLITE_IOERR,
    sqlite3.SQLITE_CORRUPT,
    sqlite3.SQLITE_FULL,
    sqlite3.SQLITE_CANTOPEN,
    sqlite3.SQLITE_NOTADB,
}
"""Codes that speak of the machine, not of the statement; they become StoreError."""

_log = structlog.get_logger()


class StoreError(ApiError):
    """503: the store cannot be read or written now (a full disk, for example); nothing of the call was kept."""

    def __init__(self, message: str) -> None:
        super().__init__(503, message, retry=True)


class TakenError(Exception):
    """A value that must be unique is in the store already; nothing of the call was kept."""


class _Job(Generic[T]):
    __slots__ = ("error", "fn", "future", "loop", "result", "synced")

    def __init__(self, fn: Callable[[Connection], T], loop: asyncio.AbstractEventLoop, synced: bool) -> None:
        self.fn = fn
        self.synced = synced
        self.loop = loop
        self.future: asyncio.Future[T] = loop.create_future()
        self.result: T | None = None
        self.error: BaseException | None = None


class Store:
    """The store of one state folder. Several processes may have it open; each of them writes through one thread."""

    def __init__(self, path: Path, engine: Engine) -> None:
        self.path = path
        self._engine = engine
        self._reader = engine.connect()
        self._reader.exec_driver_sql("PRAGMA query_only=ON")
        self._writer = engine.connect()
        self._raw = cast(sqlite3.Connection, self._writer.connection.driver_connection)
        self._queue: queue.SimpleQueue[_Job[Any] | None] = queue.SimpleQueue()
        self._synced = True
        self._writes = 0
        self._commits = 0
        self._room = asyncio.Semaphore(_QUEUE)
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="store-writer", daemon=True)
        self._thread.start()

    def collect(self) -> Iterator[Metric]:
        """The metrics of what this process has written."""
        yield counter("devboxd_store_writes", "Changes of the store", {(): self._writes})
        yield counter("devboxd_store_commits", "Transactions that they shared", {(): self._commits})

    @classmethod
    def open(cls, path: Path) -> Store:
        """Open the store, making or migrating it first. Raises SetupError when it is newer than the program."""
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
            engine = _engine(path)
            with _lock(path):
                _migrate(path, engine)
            return cls(path, engine)
        except (OSError, DBAPIError) as error:
            reason = error.orig if isinstance(error, DBAPIError) else error
            raise SetupError(
                f"cannot open the store {path}: {reason}; check the folder, its disk and rights"
            ) from error

    async def read(self, fn: Callable[[Connection], T]) -> T:
        """Call `fn` at once, in this thread: for point reads and short lists. It sees all confirmed writes.

        `fn` must be short and must not write. All that it selects comes from one snapshot.
        """
        if self._closed:
            raise StoreError("cannot read the store: it is closed")
        raw = cast(sqlite3.Connection, self._reader.connection.driver_connection)
        try:
            cursor = raw.execute("BEGIN")
            try:
                return fn(self._reader)
            finally:
                cursor.execute("COMMIT")
        except (DBAPIError, sqlite3.Error) as error:
            with contextlib.suppress(sqlite3.Error):  # what a failing disk left open
                raw.rollback()
            raise _translate(error, "read", self.path) from error

    async def write(self, fn: Callable[[Connection], T], *, synced: bool = True) -> T:
        """Call `fn` in the writer thread and return its result after the commit that holds it.

        A commit outlives the death of every process at once. It outlives a power failure when it is `synced`, and
        else from the next synced one or the next checkpoint on; the order of commits is kept in either case.
        An exception of `fn` undoes only what `fn` did and is raised here. Cancelling the caller does not cancel the
        write. `fn` may share its transaction with others, so it must not begin, commit or roll back by itself.
        Raises StoreError when the disk refuses; the next write may succeed again. Raises TakenError.
        """
        await self._room.acquire()
        if self._closed:
            self._room.release()
            raise StoreError("cannot write to the store: it is closed")
        job = _Job(fn, asyncio.get_running_loop(), synced)
        self._queue.put(job)
        return await job.future

    def close(self) -> None:
        """Finish the writes that were accepted, then close the file."""
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        self._thread.join()
        self._reader.close()
        self._writer.close()
        self._engine.dispose()

    def _work(self) -> None:
        running = True
        while running:
            batch, running = self._next_batch()
            if batch:
                self._commit(batch)
                for job in batch:
                    self._report(job)

    def _next_batch(self) -> tuple[list[_Job[Any]], bool]:
        batch: list[_Job[Any]] = []
        job = self._queue.get()
        while job is not None:
            batch.append(job)
            if len(batch) == _BATCH:
                return batch, True
            try:
                job = self._queue.get_nowait()
            except queue.Empty:
                return batch, True
        return batch, False

    def _commit(self, batch: list[_Job[Any]]) -> None:
        try:
            self._sync(any(job.synced for job in batch))
            self._raw.execute("BEGIN IMMEDIATE")
            for job in batch:
                self._perform(job)
            self._raw.execute("COMMIT")
            self._writes += len(batch)
            self._commits += 1
        except Exception as error:
            with contextlib.suppress(sqlite3.Error):
                if self._raw.in_transaction:
                    self._raw.execute("ROLLBACK")
            refusal = _translate(error, "write to", self.path)
            _log.error("store.write_failed", reason=str(refusal), jobs=len(batch))
            for job in batch:
                job.error = job.error or refusal

    def _sync(self, synced: bool) -> None:
        """Whether the next commits wait for the disk."""
        if synced is not self._synced:
            self._raw.execute(f"PRAGMA synchronous={'FULL' if synced else 'NORMAL'}").close()
            self._synced = synced

    def _perform(self, job: _Job[Any]) -> None:
        """Run one job in a savepoint. Raises only when SQLite has given up the whole transaction."""
        self._raw.execute("SAVEPOINT job")
        try:
            job.result = job.fn(self._writer)
        except Exception as error:
            job.error = _translate(error, "write to", self.path)
            if not self._raw.in_transaction:
                raise
            self._raw.execute("ROLLBACK TO job")
        self._raw.execute("RELEASE job")

    def _report(self, job: _Job[Any]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop that asked is closed: nobody waits any more
            job.loop.call_soon_threadsafe(self._resolve, job)

    def _resolve(self, job: _Job[Any]) -> None:
        self._room.release()
        if job.future.done():
            if job.error is not None:
                _log.warning("store.write_failed_unseen", reason=str(job.error))
        elif job.error is None:
            job.future.set_result(job.result)
        elif isinstance(job.error, StopIteration):  # a future refuses it
            job.future.set_exception(RuntimeError("StopIteration"))
        else:
            job.future.set_exception(job.error)


def _translate(error: Exception, verb: str, path: Path) -> Exception:
    cause = error.orig if isinstance(error, DBAPIError) else error
    if getattr(cause, "sqlite_errorcode", 0) & 0xFF in _HOST_FAULTS:
        return StoreError(
            f"cannot {verb} the store {path.name}: {cause}; free space on its disk or check it, then retry"
        )
    if isinstance(cause, sqlite3.IntegrityError):
        return TakenError(str(cause))
    return error


def _engine(path: Path) -> Engine:
    engine = create_engine(
        URL.create("sqlite", database=str(path)),
        poolclass=NullPool,
        hide_parameters=True,  # values of users have no place in messages and logs
        isolation_level="AUTOCOMMIT",  # transactions are begun and ended here, by name
        connect_args={"check_same_thread": False, "timeout": _BUSY_SECONDS, "cached_statements": 512},
    )
    event.listen(engine, "connect", _prepare)
    return engine


def _prepare(raw: sqlite3.Connection, _record: object) -> None:
    for pragma in _PRAGMAS:
        raw.execute(f"PRAGMA {pragma}").close()


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process at a time looks at the revision and migrates."""
    with open(
        path.with_name(path.name + ".lock"), "ab", opener=lambda name, flags: os.open(name, flags, 0o600)
    ) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _migrate(path: Path, engine: Engine) -> None:
    with engine.connect() as connection:
        current = _revision(connection)
        if current == HEAD:
            return
        from devboxd.store.migrations import known, upgrade  # Alembic takes a while to import

        if current is not None and current not in known():
            raise SetupError(
                f"cannot open the store {path}: a newer devboxd wrote it (revision {current}, this one knows {HEAD});"
                " install that version again or restore an older copy of the store"
            )
        if current is not None:
            before = path.with_name(f"{path.name}.before-{HEAD}")
            copy(cast(sqlite3.Connection, connection.connection.driver_connection), before)
            _log.info("store.migrating", revision=current, to=HEAD, copy=str(before))
        connection.exec_driver_sql("BEGIN IMMEDIATE")
        try:
            upgrade(connection)
        except BaseException:
            connection.exec_driver_sql("ROLLBACK")
            raise
        connection.exec_driver_sql("COMMIT")


def _revision(connection: Connection) -> str | None:
    tables = connection.exec_driver_sql("SELECT name FROM sqlite_master WHERE type = 'table'").scalars().all()
    if "alembic_version" in tables:
        return cast("str | None", connection.exec_driver_sql("SELECT version_num FROM alembic_version").scalar())
    return None


def copy(source: sqlite3.Connection, target: Path) -> None:
    """Write a store as it is at one instant into a file, whoever writes it meanwhile."""
    os.close(os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600))
    with contextlib.closing(sqlite3.connect(target)) as written:
        source.backup(written)

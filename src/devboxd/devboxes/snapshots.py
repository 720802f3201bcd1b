"""Snapshots of disks: taken at one instant, kept until somebody deletes them, independent of where they came from."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import structlog
from prometheus_client.metrics_core import Metric
from sqlalchemy import Connection

from devboxd.concurrency.clock import now_ms
from devboxd.concurrency.tasks import Tasks
from devboxd.devboxes import snapshot_store as rows
from devboxd.devboxes import store as devbox_rows
from devboxd.devboxes.changes import Life
from devboxd.devboxes.lifecycle import Devboxes
from devboxd.devboxes.snapshot_store import COMPLETE, DELETED, ERROR, IN_PROGRESS, Snapshot
from devboxd.devboxes.states import Event
from devboxd.engine.base import Engine, EngineError
from devboxd.errors import ApiError, conflict, not_found, refuse_when, timed_out
from devboxd.http.once import Once
from devboxd.http.streams import HELD_S
from devboxd.ids import check_id, new_id
from devboxd.metrics import counter
from devboxd.store.db import Store
from devboxd.store.retry import retry_until_stored

_log = structlog.get_logger()


class Snapshots:
    """All snapshots of all accounts."""

    def __init__(self, store: Store, engine: Engine, devboxes: Devboxes) -> None:
        self._store = store
        self._engine = engine
        self._devboxes = devboxes
        self._taking: dict[str, asyncio.Task[None]] = {}
        self._digests: dict[str, asyncio.Task[str]] = {}
        self._one_digest = asyncio.Semaphore(1)
        self._tasks = Tasks()
        self._finished: Counter[tuple[str, ...]] = Counter({(COMPLETE,): 0, (ERROR,): 0})

    def collect(self) -> Iterator[Metric]:
        """The metric of the snapshots that were finished since the server was started."""
        text = "Snapshots that are complete or have failed (error)"
        yield counter("devboxd_snapshots", text, self._finished, "status")

    async def open(self) -> None:
        """Settle what an earlier server had begun, and remove what no row wants."""
        found = await self._engine.snapshots()
        for snapshot in await self._store.read(rows.unfinished):
            whole = snapshot.id in found
            await self._finish(snapshot, None if whole else "the server ended while it was taken; take another")
        for snapshot_id in found - await self._store.read(rows.wanted):
            self._tasks.start(self._engine.delete_snapshot(snapshot_id), f"remove {snapshot_id}")

    async def close(self) -> None:
        """Stop what goes on in the background; the next server settles it."""
        await self._tasks.close()

    async def take(
        self, account: str, devbox_id: str, name: str | None, message: str | None, metadata: dict[str, str], once: Once
    ) -> Snapshot:
        """Begin a snapshot of a running devbox; it is committed and `in_progress`. Raises 400 for other states."""
        if once.ref is not None:
            return await self.get(account, once.ref)
        await self._devboxes.life(account, devbox_id, Event.SNAPSHOT_ASKED)
        refuse_when("take a snapshot", self._engine.short_of() or await self._engine.short_for(devbox_id))
        life = await self._devboxes.life(account, devbox_id, Event.SNAPSHOT_ASKED)  # which may have changed meanwhile
        devbox = life.devbox
        snapshot = Snapshot(
            new_id("snp"), account, devbox_id, devbox.image, name, message, metadata, IN_PROGRESS, None, None,
            None, now_ms(),
        )  # fmt: skip

        def insert(connection: Connection) -> None:
            rows.add(connection, snapshot)
            once.bind(connection, snapshot.id)

        life.snapshots.add(snapshot.id)
        try:
            await self._store.write(insert)
        except BaseException:
            life.snapshots.discard(snapshot.id)
            life.update(life.devbox)
            raise
        self._taking[snapshot.id] = self._tasks.start(self._work(life, snapshot), f"snapshot {snapshot.id}")
        return snapshot

    async def taken(self, account: str, snapshot_id: str) -> Snapshot:
        """The snapshot when it is in progress no more. Raises 500 that says why when it failed."""
        if (task := self._taking.get(snapshot_id)) is not None:
            await asyncio.wait({task})
        snapshot = await self.get(account, snapshot_id)
        if snapshot.status == ERROR:
            raise ApiError(500, f"cannot take the snapshot {snapshot_id}: {snapshot.error}", retry=False)
        return snapshot

    async def get(self, account: str, snapshot_id: str) -> Snapshot:
        """The snapshot, also a deleted one. Raises 400 for a malformed id, 404 for an unknown or foreign one."""
        check_id("snp", snapshot_id, "snapshot")
        snapshot = await self._store.read(lambda c: rows.get(c, snapshot_id))
        if snapshot is None or snapshot.account_id != account:
            raise not_found(f"cannot find the snapshot {snapshot_id}; check the id and the account of the key")
        return snapshot

    async def page(
        self,
        account: str,
        devbox_id: str | None,
        metadata: Mapping[str, Sequence[str]],
        starting_after: str | None,
        limit: int,
        count: bool,
    ) -> tuple[list[Snapshot], bool, int | None]:
        """A page of snapshots, newest first: (snapshots, whether more follow, how many match)."""
        return await self._store.read(
            lambda c: rows.page(c, account, devbox_id, metadata, starting_after, limit, count)
        )

    async def keys(self, account: str) -> list[str]:
        """All keys of metadata."""
        return await self._store.read(lambda c: rows.keys(c, account))

    async def values_of(self, account: str, key: str) -> list[str]:
        """All values of one key."""
        return await self._store.read(lambda c: rows.values_of(c, account, key))

    async def update(self, account: str, snapshot_id: str, once: Once, **values: Any) -> Snapshot:
        """Write name, commit message or metadata. Raises 404 for one that is deleted.

        A repeat does not undo what others changed since.
        """
        snapshot = await self.get(account, snapshot_id)
        if once.ref is not None:
            return snapshot
        if snapshot.status == DELETED:
            raise not_found(f"cannot change the snapshot {snapshot_id}: it was deleted")
        if not values:
            return snapshot

        def change(connection: Connection) -> Snapshot:
            once.bind(connection, snapshot_id)
            return rows.change(connection, snapshot, **values)

        return await self._store.write(change)

    async def digested(self, snapshot: Snapshot) -> Snapshot:
        """A complete snapshot with the digest of what it holds, made when somebody first asks. Raises as `verify`."""
        return snapshot if snapshot.manifest_digest else (await self.verify(snapshot))[0]

    async def verify(self, snapshot: Snapshot) -> tuple[Snapshot, str]:
        """A complete snapshot with its digest, and the digest of what it holds now: the same, unless bytes were lost.

        Raises 404 for one that is deleted, 409 for others, 408 that asks to come again while it is being read, and 500
        when it cannot be read.
        """
        if snapshot.status == DELETED:
            raise not_found(f"cannot read the snapshot {snapshot.id}: it was deleted")
        if snapshot.status != COMPLETE:
            raise conflict(f"cannot read the snapshot {snapshot.id}: it is {snapshot.status}, not complete")
        if (task := self._digests.get(snapshot.id)) is None:
            task = self._digests[snapshot.id] = self._tasks.start(self._digest(snapshot.id), f"read {snapshot.id}")
        await asyncio.wait({task}, timeout=HELD_S)
        if not task.done():
            raise timed_out(f"cannot tell the digest of {snapshot.id} yet: all of it is being read; ask again")
        self._digests.pop(snapshot.id, None)
        try:
            found = await task
        except EngineError as error:
            raise ApiError(500, f"cannot verify the snapshot {snapshot.id}: {error}", retry=False) from error
        if snapshot.manifest_digest is None:
            snapshot = await self._store.write(lambda c: rows.change(c, snapshot, manifest_digest=found))
        return snapshot, found

    async def _digest(self, snapshot_id: str) -> str:
        async with self._one_digest:
            return await self._engine.snapshot_digest(snapshot_id)

    async def delete(self, account: str, snapshot_id: str) -> None:
        """Delete a snapshot; one that is deleted already stays so. Raises 409 while it is taken or begun from."""
        snapshot = await self.get(account, snapshot_id)
        if snapshot.status == IN_PROGRESS:
            raise conflict(
                f"cannot delete the snapshot {snapshot_id} while it is being taken; wait until it is complete"
            )
        if snapshot.status != DELETED:
            await self._store.write(partial(_mark_deleted, snapshot=snapshot))
        self._digests.pop(snapshot_id, None)
        await self._engine.delete_snapshot(snapshot_id)

    async def _work(self, life: Life, snapshot: Snapshot) -> None:
        error = None
        try:
            try:
                await self._engine.snapshot(snapshot.devbox_id, snapshot.id)
            except EngineError as failed:
                error = str(failed)
            except Exception as fault:
                _log.error("a snapshot failed", id=snapshot.id, exc_info=fault)
                error = f"a fault of the server: {fault}"
            await self._finish(snapshot, error)
        finally:
            life.snapshots.discard(snapshot.id)
            life.update(life.devbox)
            del self._taking[snapshot.id]

    async def _finish(self, snapshot: Snapshot, error: str | None) -> None:
        size = None
        if error is None:
            try:
                size = await self._engine.snapshot_size(snapshot.id)
            except EngineError as unknown:
                _log.warning("the size of a snapshot is not known", id=snapshot.id, error=str(unknown))
        status = ERROR if error else COMPLETE
        change = partial(rows.change, snapshot=snapshot, status=status, error=error, size_bytes=size)
        await retry_until_stored(lambda: self._store.write(change), f"the end of {snapshot.id}")
        self._finished[(status,)] += 1
        _log.info("snapshot", id=snapshot.id, devbox=snapshot.devbox_id, status=status, error=error)


def _mark_deleted(connection: Connection, snapshot: Snapshot) -> None:
    """In the transaction that shows nobody begins from it: who begins later is refused by its own."""
    if devbox_rows.made_from(connection, snapshot.id):
        raise ApiError(
            409, f"cannot delete the snapshot {snapshot.id}: a devbox is being made from it; try again", retry=True
        )
    rows.change(connection, snapshot, status=DELETED)

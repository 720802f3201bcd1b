"""The operations on snapshots of disks."""

from __future__ import annotations

import msgspec

from devboxd.devboxes.snapshot_store import COMPLETE, ERROR, Snapshot
from devboxd.devboxes.snapshots import Snapshots
from devboxd.devboxes.views import check_labels
from devboxd.errors import bad_request
from devboxd.http.binding import Bracketed
from devboxd.http.operation import Call
from devboxd.ids import check_id

_MAX_PAGE = 5000
_MAX_MESSAGE = 1000


class SnapshotView(msgspec.Struct, frozen=True):
    """A snapshot; `size_bytes` is what it holds over its image, once that is known."""

    id: str
    name: str | None
    create_time_ms: int
    metadata: dict[str, str]
    source_devbox_id: str
    source_blueprint_id: str | None
    commit_message: str | None
    size_bytes: int | None
    manifest_digest: str | None
    """SHA-256 of all that it holds, in hexadecimal, once somebody has asked for it."""


class SnapshotListView(msgspec.Struct, frozen=True):
    """A page of snapshots, newest first."""

    snapshots: list[SnapshotView]
    has_more: bool
    total_count: int | None


class SnapshotStatusView(msgspec.Struct, frozen=True):
    """How far a snapshot is: in_progress, complete, error or deleted."""

    status: str
    snapshot: SnapshotView | None
    error_message: str | None


class VerifiedView(msgspec.Struct, frozen=True):
    """Whether a snapshot still holds what it held when its digest was first told."""

    id: str
    intact: bool
    manifest_digest: str
    found_digest: str


class TakeSnapshot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a new snapshot is labelled with; the message has at most 1000 characters."""

    name: str | None = None
    metadata: dict[str, str] | None = None
    commit_message: str | None = None


class UpdateSnapshot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is absent or null stays; an empty value clears; metadata is replaced as a whole."""

    name: str | None = None
    metadata: dict[str, str] | None = None
    commit_message: str | None = None


class MetadataKeysView(msgspec.Struct, frozen=True):
    """Keys that are in use."""

    keys: list[str]


class MetadataValuesView(msgspec.Struct, frozen=True):
    """Values that a key has."""

    key: str
    values: list[str]


async def snapshot_disk(
    snapshots: Snapshots, call: Call, devbox_id: str, body: TakeSnapshot | None = None
) -> SnapshotView:
    """Keep the disk as it is at this instant, without stopping what runs; the answer comes when it is complete."""
    begun = await _take(snapshots, call, devbox_id, body)
    return _view(await snapshots.taken(call.account, begun.id))


async def snapshot_disk_async(
    snapshots: Snapshots, call: Call, devbox_id: str, body: TakeSnapshot | None = None
) -> SnapshotView:
    """The same, answered at once; the operation `status` tells when it is complete."""
    return _view(await _take(snapshots, call, devbox_id, body))


async def _take(snapshots: Snapshots, call: Call, devbox_id: str, body: TakeSnapshot | None) -> Snapshot:
    asked = body or TakeSnapshot()
    _check(asked.name, asked.metadata, asked.commit_message)
    return await snapshots.take(
        call.account, devbox_id, asked.name or None, asked.commit_message or None, asked.metadata or {}, call.once
    )


async def snapshot_status(
    snapshots: Snapshots, call: Call, snapshot_id: str, include_manifest_digest: bool = False
) -> SnapshotStatusView:
    """How far a snapshot is, and the snapshot once it is complete; with its digest if asked. A deleted one is so."""
    snapshot = await snapshots.get(call.account, snapshot_id)
    if include_manifest_digest and snapshot.status == COMPLETE:
        snapshot = await snapshots.digested(snapshot)
    shown = _view(snapshot) if snapshot.status == COMPLETE else None
    return SnapshotStatusView(snapshot.status, shown, snapshot.error if snapshot.status == ERROR else None)


async def list_snapshots(
    snapshots: Snapshots,
    call: Call,
    metadata: Bracketed,
    devbox_id: str | None = None,
    source_blueprint_id: str | None = None,
    limit: int = 20,
    starting_after: str | None = None,
    include_total_count: bool = True,
) -> SnapshotListView:
    """A page of the account's snapshots, newest first, all or those of a devbox or with these metadata."""
    _check_page(limit, starting_after)
    if devbox_id:
        check_id("dbx", devbox_id, "devbox")
    if source_blueprint_id:
        return SnapshotListView([], False, 0 if include_total_count else None)
    page, more, total = await snapshots.page(
        call.account, devbox_id or None, metadata, starting_after or None, limit, include_total_count
    )
    return SnapshotListView([_view(snapshot) for snapshot in page], more, total)


async def list_public_snapshots(
    limit: int = 20, starting_after: str | None = None, include_total_count: bool = True
) -> SnapshotListView:
    """Snapshots that belong to nobody: this server has none."""
    _check_page(limit, starting_after)
    return SnapshotListView([], False, 0 if include_total_count else None)


async def snapshot_metadata_keys(snapshots: Snapshots, call: Call) -> MetadataKeysView:
    """The keys of the metadata of all snapshots."""
    return MetadataKeysView(await snapshots.keys(call.account))


async def snapshot_metadata_values(snapshots: Snapshots, call: Call, key: str) -> MetadataValuesView:
    """The values that one key has in the metadata of all snapshots."""
    return MetadataValuesView(key, await snapshots.values_of(call.account, key))


async def public_snapshot_metadata_keys() -> MetadataKeysView:
    """The keys of the metadata of public snapshots: none."""
    return MetadataKeysView([])


async def public_snapshot_metadata_values(key: str) -> MetadataValuesView:
    """The values of a key of public snapshots: none."""
    return MetadataValuesView(key, [])


async def update_snapshot(
    snapshots: Snapshots, call: Call, snapshot_id: str, body: UpdateSnapshot | None = None
) -> SnapshotView:
    """Change name, commit message or metadata: what is absent stays, an empty value clears."""
    asked = body or UpdateSnapshot()
    _check(asked.name, asked.metadata, asked.commit_message)
    given = {name: value for name, value in msgspec.structs.asdict(asked).items() if value is not None}
    values = {name: value or ({} if name == "metadata" else None) for name, value in given.items()}
    return _view(await snapshots.update(call.account, snapshot_id, call.once, **values))


async def verify_snapshot(snapshots: Snapshots, call: Call, snapshot_id: str) -> VerifiedView:
    """Read all of a complete snapshot again and compare its digest with the one that was told first."""
    snapshot, found = await snapshots.verify(await snapshots.get(call.account, snapshot_id))
    return VerifiedView(snapshot.id, found == snapshot.manifest_digest, snapshot.manifest_digest or "", found)


async def delete_snapshot(snapshots: Snapshots, call: Call, snapshot_id: str) -> None:
    """Delete a snapshot; devboxes and snapshots that came from it stay as they are."""
    await snapshots.delete(call.account, snapshot_id)


def _check_page(limit: int, starting_after: str | None) -> None:
    if not 1 <= limit <= _MAX_PAGE:
        raise bad_request(f"cannot list {limit} snapshots: limit is 1 to {_MAX_PAGE}")
    if starting_after:
        check_id("snp", starting_after, "snapshot")


def _check(name: str | None, metadata: dict[str, str] | None, message: str | None) -> None:
    check_labels(name, metadata)
    if message is not None and len(message) > _MAX_MESSAGE:
        raise bad_request(
            f"cannot keep a commit_message of {len(message)} characters: at most {_MAX_MESSAGE} are kept; shorten it"
        )


def _view(snapshot: Snapshot) -> SnapshotView:
    return SnapshotView(
        snapshot.id, snapshot.name, snapshot.create_time_ms, snapshot.metadata, snapshot.devbox_id, None,
        snapshot.commit_message, snapshot.size_bytes, snapshot.manifest_digest,
    )  # fmt: skip

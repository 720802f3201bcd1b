"""The operations on snapshots of disks."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta

from devboxd.devboxes.snapshot_store import COMPLETE, ERROR, Snapshot
from devboxd.devboxes.snapshots import Snapshots
from devboxd.devboxes.views import check_labels
from devboxd.errors import bad_request
from devboxd.http.binding import Bracketed
from devboxd.http.operation import Call
from devboxd.http.parameters import IncludeTotalCount, Limit, StartingAfter
from devboxd.ids import check_id

_OfDevbox = Annotated[
    str | None, Meta(description="Only those of this devbox.", examples=["dbx_0BwT25a4ESR05DXUEbW3kZ"])
]
_OfBlueprint = Annotated[
    str | None, Meta(description="Only those of devboxes of this blueprint: none in this version.", examples=[None])
]
_WithDigest = Annotated[
    bool, Meta(description="Whether `manifest_digest` is worked out, which reads all.", examples=[False])
]
_MAX_PAGE = 5000
_MAX_MESSAGE = 1000


class SnapshotView(msgspec.Struct, frozen=True):
    """A snapshot; `size_bytes` is what it holds over its image, once that is known."""

    id: str
    """The id, by which all operations name it. Example: `"snp_0BwT25a4ESR05DXUEbW3kZ"`"""
    name: str | None
    """The name that it was given. Example: `"with-tools"`"""
    create_time_ms: int
    """When it was asked for, in Unix milliseconds. Example: `1764352800000`"""
    metadata: dict[str, str]
    """Its labels. Example: `{"team": "search"}`"""
    source_devbox_id: str
    """The devbox whose disk it holds. Example: `"dbx_0BwT25a4ESR05DXUEbW3kZ"`"""
    source_blueprint_id: str | None
    """Always null in this version. Example: `null`"""
    commit_message: str | None
    """The message that it was given. Example: `"Python and pytest"`"""
    size_bytes: int | None
    """Bytes that it holds over its image, once that is known. Example: `104857600`"""
    manifest_digest: str | None
    """SHA-256 of all that it holds, in hexadecimal, once it was asked for. Example: `"9f86d081884c7d65"`"""


class SnapshotListView(msgspec.Struct, frozen=True):
    """A page of snapshots, newest first."""

    snapshots: list[SnapshotView]
    """The snapshots of this page."""
    has_more: bool
    """Whether there are others; `starting_after` with the last id gives them. Example: `false`"""
    total_count: int | None
    """How many there are in all pages; null unless it was asked for. Example: `1`"""


class SnapshotStatusView(msgspec.Struct, frozen=True):
    """How far a snapshot is: in_progress, complete, error or deleted."""

    status: str
    """in_progress, complete, error or deleted. Example: `"complete"`"""
    snapshot: SnapshotView | None
    """The snapshot, once it is complete."""
    error_message: str | None
    """Why it failed; null where it did not. Example: `null`"""


class VerifiedView(msgspec.Struct, frozen=True):
    """Whether a snapshot still holds what it held when its digest was first told."""

    id: str
    """The snapshot. Example: `"snp_0BwT25a4ESR05DXUEbW3kZ"`"""
    intact: bool
    """Whether both digests are the same. Example: `true`"""
    manifest_digest: str
    """SHA-256 that was told first, in hexadecimal. Example: `"9f86d081884c7d65"`"""
    found_digest: str
    """SHA-256 of what it holds now, in hexadecimal. Example: `"9f86d081884c7d65"`"""


class TakeSnapshot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a new snapshot is labelled with; the message has at most 1000 characters."""

    name: str | None = None
    """A name for people; it need not be the only one of its kind. At most 1024 characters. Example: `"with-tools"`"""
    metadata: dict[str, str] | None = None
    """Labels: at most 1024 keys of 1 to 1024 characters, values of at most 16,384. Example: `{"team": "search"}`"""
    commit_message: str | None = None
    """What it is for, at most 1000 characters. Example: `"Python and pytest"`"""


class UpdateSnapshot(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is absent or null stays; an empty value clears; metadata is replaced as a whole."""

    name: str | None = None
    """A name for people; it need not be the only one of its kind. At most 1024 characters. Empty: none. Example:
    `"renamed"`
    """
    metadata: dict[str, str] | None = None
    """Replaces all labels. Labels: at most 1024 keys of 1 to 1024 characters, values of at most 16,384. Example:
    `{"team": "search"}`
    """
    commit_message: str | None = None
    """What it is for, at most 1000 characters. Empty: none. Example: `"Python and pytest"`"""


class MetadataKeysView(msgspec.Struct, frozen=True):
    """Keys that are in use."""

    keys: list[str]
    """The keys, in order. Example: `["team"]`"""


class MetadataValuesView(msgspec.Struct, frozen=True):
    """Values that a key has."""

    key: str
    """The key. Example: `"team"`"""
    values: list[str]
    """Its values, in order. Example: `["search"]`"""


async def snapshot_disk(
    snapshots: Snapshots, call: Call, devbox_id: str, body: TakeSnapshot | None = None
) -> SnapshotView:
    """Keep the disk as it is at this instant, without stopping what runs; the answer comes when it is complete.

    ```python
    snapshot = client.devboxes.snapshot_disk(box.id, name="with-tools")
    ```
    """
    begun = await _take(snapshots, call, devbox_id, body)
    return _view(await snapshots.taken(call.account, begun.id))


async def snapshot_disk_async(
    snapshots: Snapshots, call: Call, devbox_id: str, body: TakeSnapshot | None = None
) -> SnapshotView:
    """The same, answered at once; the operation `status` tells when it is complete.

    ```python
    snapshot = client.devboxes.snapshot_disk_async(box.id, name="with-tools")
    ```
    """
    return _view(await _take(snapshots, call, devbox_id, body))


async def _take(snapshots: Snapshots, call: Call, devbox_id: str, body: TakeSnapshot | None) -> Snapshot:
    asked = body or TakeSnapshot()
    _check(asked.name, asked.metadata, asked.commit_message)
    return await snapshots.take(
        call.account, devbox_id, asked.name or None, asked.commit_message or None, asked.metadata or {}, call.once
    )


async def snapshot_status(
    snapshots: Snapshots, call: Call, snapshot_id: str, include_manifest_digest: _WithDigest = False
) -> SnapshotStatusView:
    """How far a snapshot is, and the snapshot once it is complete; with its digest if asked. A deleted one is so.

    ```python
    snapshot = client.devboxes.disk_snapshots.query_status(snapshot.id)
    ```
    """
    snapshot = await snapshots.get(call.account, snapshot_id)
    if include_manifest_digest and snapshot.status == COMPLETE:
        snapshot = await snapshots.digested(snapshot)
    shown = _view(snapshot) if snapshot.status == COMPLETE else None
    return SnapshotStatusView(snapshot.status, shown, snapshot.error if snapshot.status == ERROR else None)


async def list_snapshots(
    snapshots: Snapshots,
    call: Call,
    metadata: Bracketed,
    devbox_id: _OfDevbox = None,
    source_blueprint_id: _OfBlueprint = None,
    limit: Limit = 20,
    starting_after: StartingAfter = None,
    include_total_count: IncludeTotalCount = True,
) -> SnapshotListView:
    """A page of the account's snapshots, newest first, all or those of a devbox or with these metadata.

    ```python
    snapshots = client.devboxes.disk_snapshots.list(devbox_id=box.id)
    ```
    """
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
    limit: Limit = 20, starting_after: StartingAfter = None, include_total_count: IncludeTotalCount = True
) -> SnapshotListView:
    """Snapshots that belong to nobody: this server has none.

    ```python
    answer = client.get("/v1/devboxes/disk_snapshots/list_public", cast_to=object)
    ```
    """
    _check_page(limit, starting_after)
    return SnapshotListView([], False, 0 if include_total_count else None)


async def snapshot_metadata_keys(snapshots: Snapshots, call: Call) -> MetadataKeysView:
    """The keys of the metadata of all snapshots.

    ```python
    answer = client.get("/v1/devboxes/disk_snapshots/metadata/keys", cast_to=object)
    ```
    """
    return MetadataKeysView(await snapshots.keys(call.account))


async def snapshot_metadata_values(snapshots: Snapshots, call: Call, key: str) -> MetadataValuesView:
    """The values that one key has in the metadata of all snapshots.

    ```python
    answer = client.get("/v1/devboxes/disk_snapshots/metadata/keys/team/values", cast_to=object)
    ```
    """
    return MetadataValuesView(key, await snapshots.values_of(call.account, key))


async def public_snapshot_metadata_keys() -> MetadataKeysView:
    """The keys of the metadata of public snapshots: none.

    ```python
    answer = client.get("/v1/devboxes/disk_snapshots/public/metadata/keys", cast_to=object)
    ```
    """
    return MetadataKeysView([])


async def public_snapshot_metadata_values(key: str) -> MetadataValuesView:
    """The values of a key of public snapshots: none.

    ```python
    answer = client.get("/v1/devboxes/disk_snapshots/public/metadata/keys/team/values", cast_to=object)
    ```
    """
    return MetadataValuesView(key, [])


async def update_snapshot(
    snapshots: Snapshots, call: Call, snapshot_id: str, body: UpdateSnapshot | None = None
) -> SnapshotView:
    """Change name, commit message or metadata: what is absent stays, an empty value clears.

    ```python
    client.devboxes.disk_snapshots.update(snapshot.id, name="renamed")
    ```
    """
    asked = body or UpdateSnapshot()
    _check(asked.name, asked.metadata, asked.commit_message)
    given = {name: value for name, value in msgspec.structs.asdict(asked).items() if value is not None}
    values = {name: value or ({} if name == "metadata" else None) for name, value in given.items()}
    return _view(await snapshots.update(call.account, snapshot_id, call.once, **values))


async def verify_snapshot(snapshots: Snapshots, call: Call, snapshot_id: str) -> VerifiedView:
    """Read all of a complete snapshot again and compare its digest with the one that was told first.

    ```python
    answer = client.post(f"/v1/devboxes/disk_snapshots/{snapshot.id}/verify", cast_to=object)
    ```
    """
    snapshot, found = await snapshots.verify(await snapshots.get(call.account, snapshot_id))
    return VerifiedView(snapshot.id, found == snapshot.manifest_digest, snapshot.manifest_digest or "", found)


async def delete_snapshot(snapshots: Snapshots, call: Call, snapshot_id: str) -> None:
    """Delete a snapshot; devboxes and snapshots that came from it stay as they are.

    ```python
    client.devboxes.disk_snapshots.delete(snapshot.id)
    ```
    """
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

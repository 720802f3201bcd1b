"""The account and its keys. Only the hash of a key is stored; the key itself is shown once."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import msgspec
import structlog
from sqlalchemy import Connection, bindparam, insert, select, update

from devboxd.concurrency.clock import now_ms
from devboxd.errors import not_found
from devboxd.http.guard import hash_key
from devboxd.http.operation import Call
from devboxd.ids import check_id, new_id
from devboxd.store.db import Store
from devboxd.store.schema import accounts, keys

FIRST_KEY_FILE = "first-key"

_log = structlog.get_logger()
_first_account = select(accounts.c.id).order_by(accounts.c.id).limit(1)
_account = select(accounts).where(accounts.c.id == bindparam("account_id"))
_all_keys = select(keys).order_by(keys.c.id)
_insert_account = insert(accounts)
_insert_key = insert(keys)
_revoke = (
    update(keys)
    .where(keys.c.id == bindparam("key_id"), keys.c.revoke_time_ms.is_(None))
    .values(revoke_time_ms=bindparam("now"))
)
_known_key = select(keys.c.id).where(keys.c.id == bindparam("key_id"))


class Billing(msgspec.Struct, frozen=True):
    """Nobody is billed; the published clients want the field all the same."""

    account_billing_type: str = "UNRECOGNIZED"
    """Always UNRECOGNIZED. Example: `"UNRECOGNIZED"`"""


class AccountView(msgspec.Struct, frozen=True):
    """An account as clients see it."""

    id: str
    """The account. Example: `"acc_0BwT25a4ESR05DXUEbW3kZ"`"""
    name: str
    """Its name. Example: `"default"`"""
    created_at: str
    """When it was made, in UTC. Example: `"2026-11-28T17:00:00.000Z"`"""
    account_status: str = "ACCOUNT_STATUS_ENABLED"
    """Always the same. Example: `"ACCOUNT_STATUS_ENABLED"`"""
    tier: str = "ACCOUNT_TIER_ENTERPRISE"
    """Always the same. Example: `"ACCOUNT_TIER_ENTERPRISE"`"""
    billing: Billing = Billing()
    """Accepted for clients that read it."""


class KeyView(msgspec.Struct, frozen=True):
    """A key without its secret. Times are Unix milliseconds."""

    id: str
    name: str
    create_time_ms: int
    expires_at_ms: int | None
    revoke_time_ms: int | None


async def me(store: Store, call: Call) -> AccountView:
    """Give the account of the key that is used.

    ```python
    account = client.accounts.me()
    ```
    """
    row = await store.read(lambda connection: connection.execute(_account, {"account_id": call.account}).one())
    created = datetime.fromtimestamp(row.create_time_ms / 1000, UTC)
    return AccountView(row.id, row.name, created.isoformat(timespec="milliseconds").replace("+00:00", "Z"))


async def create_key(store: Store, name: str) -> str:
    """Make a key for the account, which is made with its first key; returns the secret, kept nowhere else."""
    secret = _new_secret()
    await store.write(lambda connection: _add_key(connection, secret, name))
    return secret


async def list_keys(store: Store) -> list[KeyView]:
    """All keys, oldest first, revoked ones too."""
    rows = await store.read(lambda connection: connection.execute(_all_keys).all())
    return [KeyView(row.id, row.name, row.create_time_ms, row.expires_at_ms, row.revoke_time_ms) for row in rows]


async def revoke_key(store: Store, key_id: str) -> None:
    """End a key at once, in running servers too. Raises ApiError for an unknown id; revoking twice is no error."""
    check_id("key", key_id, "key")

    def revoke(connection: Connection) -> None:
        if connection.execute(_known_key, {"key_id": key_id}).first() is None:
            raise not_found(f"cannot revoke {key_id}: there is no such key; `devboxd keys list` shows them")
        connection.execute(_revoke, {"key_id": key_id, "now": now_ms()})

    await store.write(revoke)


async def first_start(store: Store, state: Path) -> None:
    """Make the account and its first key when there is none; show the key on a terminal, else keep it in a file.

    The file is `first-key` in the state folder, mode 0600. Logs tell its path only.
    """
    secret = _new_secret()

    def make(connection: Connection) -> bool:
        if connection.execute(_first_account).first() is not None:
            return False
        _add_key(connection, secret, "first")
        return True

    if sys.stderr.isatty():
        if await store.write(make):
            sys.stderr.write(f"\nThe first key, shown only now:\n\n    {secret}\n\n")
        return
    await _first_key_to_file(store, make, secret, state / FIRST_KEY_FILE)


async def _first_key_to_file(store: Store, make: Callable[[Connection], bool], secret: str, path: Path) -> None:
    """The file comes first: a crash in between leaves a key that opens nothing, never one that nobody knows."""
    if await store.read(lambda connection: connection.execute(_first_account).first()) is not None:
        return
    partial = path.with_suffix(".new")
    _write_private(partial, secret + "\n")
    if await store.write(make):
        os.replace(partial, path)
        _log.info("keys.first_key_written", path=str(path))
    else:
        partial.unlink()


def _write_private(path: Path, text: str) -> None:
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _add_key(connection: Connection, secret: str, name: str) -> None:
    now = now_ms()
    if (account_id := connection.execute(_first_account).scalar()) is None:
        account_id = new_id("acc")
        connection.execute(_insert_account, {"id": account_id, "name": "default", "create_time_ms": now})
    connection.execute(
        _insert_key,
        {"id": new_id("key"), "account_id": account_id, "name": name, "hash": hash_key(secret), "create_time_ms": now},
    )


def _new_secret() -> str:
    return "ak_" + secrets.token_urlsafe(32)

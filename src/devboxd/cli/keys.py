"""`devboxd keys`: make, list and revoke keys, in the store itself."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from devboxd.cli.options import as_json_option, config_option, load_settings, state_option
from devboxd.cli.printing import date, table
from devboxd.errors import SetupError
from devboxd.path_errors import AS_ROOT

if TYPE_CHECKING:
    from devboxd.store.db import Store


@click.group()
def keys() -> None:
    """Make, list and revoke keys.

    All of it works while the server runs.
    """


@keys.command("create")
@click.option("--name", default="", metavar="NAME", help="A word for yourself about what the key is for.")
@state_option
@config_option
def keys_create(name: str, state: Path | None, config: Path | None) -> None:
    """Make a key and print it.

    Standard output holds the key alone. It is shown this once: the store keeps only its hash.
    """
    from devboxd.resources import accounts

    click.echo(_with_store(config, state, lambda store: accounts.create_key(store, name)))


@keys.command("list")
@as_json_option
@state_option
@config_option
def keys_list(as_json: bool, state: Path | None, config: Path | None) -> None:
    """List the keys, oldest first.

    Their secrets are not kept and cannot be shown.
    """
    from devboxd.resources import accounts

    found = _with_store(config, state, accounts.list_keys)
    if as_json:
        import msgspec

        click.echo(msgspec.json.encode(found).decode())
        return
    rows = [(key.id, key.name, date(key.create_time_ms), "revoked" if key.revoke_time_ms else "") for key in found]
    table(("id", "name", "made", ""), rows, drop=("made",))


@keys.command("revoke")
@click.argument("key_id", metavar="ID")
@state_option
@config_option
def keys_revoke(key_id: str, state: Path | None, config: Path | None) -> None:
    """End a key.

    From now on it opens nothing, also at a running server.
    """
    from devboxd.resources import accounts

    _with_store(config, state, lambda store: accounts.revoke_key(store, key_id))


def _with_store(config: Path | None, state: Path | None, action: Callable[[Store], Any]) -> Any:
    import asyncio

    from devboxd import logs
    from devboxd.store.db import FILE_NAME, Store

    logs.configure("auto")
    folder = load_settings(config, state=state).state
    try:
        used = stat.S_ISREG(os.stat(folder / FILE_NAME).st_mode)
    except OSError as error:
        used = error.errno == errno.EACCES
    if used and not os.access(folder, os.W_OK | os.X_OK):
        raise SetupError(f"cannot open {folder}: permission denied; {AS_ROOT}, or as the owner of the folder")
    if not used:
        raise SetupError(
            f"cannot use {folder}: no server has used this folder; name the right one with --state, or start the server"
            " first, which makes a key as well"
        )
    store = Store.open(folder / FILE_NAME)
    try:
        return asyncio.run(action(store))
    finally:
        store.close()

"""`devboxd storage`: see, grow and check the pool of disks."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from devboxd.cli.options import as_json_option, config_option, load_settings, state_option


@click.group()
def storage() -> None:
    """See, grow and check the storage.

    That is where disks and snapshots lie. On the server's machine, as root, while the server runs or not.
    """


@storage.command("status")
@as_json_option
@config_option
@state_option
def storage_status(as_json: bool, config: Path | None, state: Path | None) -> None:
    """Show its kind, size and content.

    The exit code is 1 when nothing can be written to it; the reason comes first.
    """
    from dataclasses import asdict

    from devboxd import storage as module

    found = module.status(load_settings(config, state=state).state)
    if as_json:
        click.echo(json.dumps(asdict(found)))
    for name, text in () if as_json else module.lines(found):
        click.echo(f"{name:<12} {text}")
    sys.exit(1 if found.trouble else 0)


@storage.command("grow")
@click.argument("size", metavar="SIZE")
@config_option
@state_option
def storage_grow(size: str, config: Path | None, state: Path | None) -> None:
    """Let it hold SIZE, such as 64G.

    It grows by itself when little is left; this is for those who want to know at once that there is room.
    """
    from devboxd import storage as module

    module.grow(load_settings(config, state=state).state, size)


@storage.command("check")
@config_option
@state_option
def storage_check(config: Path | None, state: Path | None) -> None:
    """Look for damage.

    That takes a while. While a server runs every block of the pool's own is read and compared with its checksum; else
    the structure is checked. What disks hold has no checksums: see `devboxd snapshot verify`. Nothing is repaired. The
    exit code is 1 when there is damage. Storage that cannot be written is not looked at: see `devboxd storage status`.
    """
    from devboxd import storage as module

    sys.exit(module.check(load_settings(config, state=state).state))


@storage.command("recover")
@config_option
@state_option
def storage_recover(config: Path | None, state: Path | None) -> None:
    """Make broken storage usable again.

    For when no server runs; `serve` does the same when it starts. Devboxes that run are ended, for they hold on to what
    is broken; their disks stay, and they are suspended when a server runs again. Nothing happens to storage that works.

    Where the disk below cannot be written at all, that is what is told, with exit code 2: nothing of devboxd holds on
    to it then, so it can be unmounted, checked and mounted again.
    """
    from devboxd import logs
    from devboxd import storage as module

    logs.configure("auto")
    kept = module.recover(load_settings(config, state=state))
    if kept is None:
        click.echo("the storage works; nothing was to be done")
        return
    click.echo("the storage works again; these are suspended, and can be resumed once a server runs:")
    for box in sorted(kept):
        click.echo(box)

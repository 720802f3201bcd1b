"""`devboxd snapshot`: see and verify the snapshots of a server."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from devboxd.cli import completion
from devboxd.cli.options import all_pages, find_box, find_remote, remote_options
from devboxd.cli.printing import date, size, table

_READING_SECONDS = 3600.0
"""How long one snapshot may be read: its answer comes when all of it was."""


@click.group()
def snapshot() -> None:
    """See and verify snapshots.

    Through the API of a server, so from any machine.
    """


@snapshot.command("list")
@click.option("--devbox", metavar="BOX", shell_complete=completion.box_names, help="Only snapshots of this box.")
@remote_options
def snapshot_list(devbox: str | None, url: str | None, key_file: Path | None, as_json: bool) -> None:
    """List the snapshots, newest first."""
    remote = find_remote(url, key_file)
    query = {"devbox_id": find_box(remote, devbox, ended=True)} if devbox else {}
    found = all_pages(remote, "/v1/devboxes/disk_snapshots", "snapshots", query)
    if as_json:
        click.echo(json.dumps(found))
        return
    rows = [
        (one["id"], date(one["create_time_ms"]), size(one["size_bytes"]), one["source_devbox_id"], one["name"] or "")
        for one in found
    ]
    table(("id", "taken", "size", "devbox", "name"), rows, drop=("taken", "size", "devbox"))


@snapshot.command("verify")
@remote_options
@click.argument("snapshot_ids", metavar="ID...", nargs=-1, required=True, shell_complete=completion.snapshot_ids)
def snapshot_verify(snapshot_ids: tuple[str, ...], url: str | None, key_file: Path | None, as_json: bool) -> None:
    """Tell whether snapshots are intact.

    All of each is read. The digest (SHA-256 over names, owners, modes, times, attributes and contents) is compared with
    the one that was made when somebody asked first. The exit code is 1 when one differs.
    """
    remote = find_remote(url, key_file).patient(_READING_SECONDS)
    found = [remote.call("POST", f"/v1/devboxes/disk_snapshots/{name}/verify", {}) for name in snapshot_ids]
    if as_json:
        click.echo(json.dumps(found))
    else:
        rows = [(one["id"], "intact" if one["intact"] else "CHANGED", one["found_digest"]) for one in found]
        table(("id", "", "sha256"), rows)
    sys.exit(0 if all(one["intact"] for one in found) else 1)

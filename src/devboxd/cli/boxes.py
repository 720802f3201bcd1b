"""`devboxd boxes`: see and use the boxes of a server."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path

import click

from devboxd.cli.options import all_pages, find_remote, remote_options
from devboxd.cli.printing import date, printable, table


@click.group()
def boxes() -> None:
    """See and use the boxes of a server.

    Through its API, so from any machine.
    """


@boxes.command("list")
@click.option("--status", metavar="STATUS", help="Only boxes in this state, such as running.")
@remote_options
def boxes_list(status: str | None, url: str | None, key_file: Path | None, as_json: bool) -> None:
    """List the boxes, newest first."""
    found = all_pages(find_remote(url, key_file), "/v1/devboxes", "devboxes", {"status": status} if status else {})
    if as_json:
        click.echo(json.dumps(found))
        return
    rows = [(box["id"], box["status"], date(box["create_time_ms"]), box.get("name") or "") for box in found]
    table(("id", "status", "made", "name"), rows)


@boxes.command("exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@remote_options
@click.argument("box_id", metavar="ID")
@click.argument("words", nargs=-1, required=True, metavar="-- CMD...", type=click.UNPROCESSED)
def boxes_exec(box_id: str, words: tuple[str, ...], url: str | None, key_file: Path | None, as_json: bool) -> None:
    """Run a command in a box.

    Its output is shown as it comes, and its exit code is this command's. One word is taken as a line for the box's
    bash, several as a command and its arguments. Standard input is passed on when it is a file or pipe.
    With --json the outcome is printed at the end.

    \b
    devboxd boxes exec ID -- ls -l /
    devboxd boxes exec ID -- 'cd /tmp && ls | wc -l'
    """
    from devboxd.remote_exec import execute

    words = words[1:] if words[0] == "--" else words
    if not words:
        raise click.UsageError("a command is missing")
    command = words[0] if len(words) == 1 else shlex.join(words)
    sys.exit(execute(find_remote(url, key_file), box_id, command, as_json))


@boxes.command("logs")
@remote_options
@click.argument("box_id", metavar="ID")
def boxes_logs(box_id: str, url: str | None, key_file: Path | None, as_json: bool) -> None:
    """Print a box's logs."""
    logs = find_remote(url, key_file).call("GET", f"/v1/devboxes/{box_id}/logs")["logs"]
    if as_json:
        click.echo(json.dumps(logs))
        return
    for line in logs:
        text = (line.get("message") or "").rstrip()
        if sys.stdout.isatty():
            text = printable(text.replace("\r\n", "\n"), keep="\n\t")
        click.echo(f"{date(line['timestamp_ms'])} {line.get('source') or '-'} {text}")


@boxes.command("shutdown")
@click.option("--all", "every", is_flag=True, help="All boxes that have not ended.")
@remote_options
@click.argument("box_ids", metavar="[ID]...", nargs=-1)
def boxes_shutdown(
    box_ids: tuple[str, ...], every: bool, url: str | None, key_file: Path | None, as_json: bool
) -> None:
    """End boxes and free their disks."""
    if every == bool(box_ids):
        raise click.UsageError("name boxes by their ids, or give --all")
    remote = find_remote(url, key_file)
    if every:
        ended = ("shutdown", "failure")
        box_ids = tuple(
            box["id"] for box in all_pages(remote, "/v1/devboxes", "devboxes", {}) if box["status"] not in ended
        )
    for box_id in box_ids:
        remote.call("POST", f"/v1/devboxes/{box_id}/shutdown", {})
        if not as_json:
            click.echo(box_id)
    if as_json:
        click.echo(json.dumps(list(box_ids)))

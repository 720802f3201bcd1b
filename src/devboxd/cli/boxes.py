"""`devboxd boxes`: see and use the boxes of a server."""

from __future__ import annotations

import json
import math
import re
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from devboxd.cli.completion import box_names, sizes, snapshot_ids, statuses
from devboxd.cli.options import ENDED, all_pages, find_box, find_remote, remote_options
from devboxd.cli.printing import date, printable, table
from devboxd.errors import ApiError, SetupError

if TYPE_CHECKING:
    from devboxd.remote import Remote


@click.group()
def boxes() -> None:
    """Make, use and see the boxes of a server.

    Through its API, so from any machine. BOX is an id or a name; of several that have the same name, the newest that
    lives.
    """


_OPTIONS = {
    "custom_cpu_cores": "--cpus",
    "custom_gb_memory": "--memory",
    "custom_disk_size": "--disk",
    "resource_size_request": "--size",
    "keep_alive_time_seconds": "--lifetime",
    "environment_variables": "--env",
    "snapshot_id": "--snapshot",
    "entrypoint": "--entrypoint",
    "file_mounts": "`devboxd boxes cp`",
}
_FIELD = re.compile(rf"(?:the field )?'?\b(?:launch_parameters\.)?({'|'.join(_OPTIONS)})\b'?")

_box = click.argument("box", metavar="BOX", shell_complete=box_names)
_several = click.argument("names", metavar="BOX...", nargs=-1, required=True, shell_complete=box_names)
_no_wait = click.option("--no-wait", is_flag=True, help="Return as soon as the server has taken it.")
_size = click.option("--size", metavar="SIZE", shell_complete=sizes, help="Such as X_SMALL, SMALL or LARGE.")
_variables = click.option(
    "--env", "variables", multiple=True, metavar="NAME=VALUE", help="For its commands; again for more."
)
_name = click.option("--name", metavar="NAME", help="A name for it; several may have the same.")


@boxes.command("list")
@click.option("--all", "every", is_flag=True, help="Also those that have ended.")
@click.option("--status", metavar="STATUS", shell_complete=statuses, help="Only boxes in this state, such as running.")
@remote_options
def boxes_list(every: bool, status: str | None, url: str | None, key_file: Path | None, as_json: bool) -> None:
    """List the boxes that live, newest first."""
    found = all_pages(find_remote(url, key_file), "/v1/devboxes", "devboxes", {"status": status} if status else {})
    found = [box for box in found if every or status or box["status"] not in ENDED]
    if as_json:
        click.echo(json.dumps(found))
        return
    rows = [(box["id"], box["status"], date(box["create_time_ms"]), box.get("name") or "") for box in found]
    table(("id", "status", "made", "name"), rows, drop=("made", "status"))


@boxes.command("create")
@_name
@_size
@click.option("--cpus", type=float, metavar="N", help="For a size of its own: 0.5, 1 or an even number up to 16.")
@click.option("--memory", type=int, metavar="GIB", help="1 or an even number up to 64; 2 to 8 for each processor.")
@click.option("--disk", type=int, metavar="GIB", help="An even number up to 64; 4 if not given.")
@click.option("--snapshot", metavar="ID", shell_complete=snapshot_ids, help="Begin from this snapshot.")
@_variables
@click.option("--metadata", multiple=True, metavar="KEY=VALUE", help="A label; may be given again.")
@click.option("--lifetime", type=int, metavar="SECONDS", help="How long it lives; 3600 if not given, at most 172800.")
@click.option("--entrypoint", metavar="COMMAND", help="A command that runs as long as the box.")
@_no_wait
@remote_options
def boxes_create(url: str | None, key_file: Path | None, as_json: bool, no_wait: bool, **asked: Any) -> None:
    """Make a box.

    Its id is printed once it runs.
    """
    launch = _launch(asked["size"], asked["cpus"], asked["memory"], asked["disk"])
    body = {
        "name": asked["name"],
        "snapshot_id": asked["snapshot"],
        "entrypoint": asked["entrypoint"],
        "environment_variables": _pairs("--env", asked["variables"]),
        "metadata": _pairs("--metadata", asked["metadata"]),
        "launch_parameters": {**launch, "keep_alive_time_seconds": asked["lifetime"]},
    }
    _print(_created(find_remote(url, key_file), body, wait=not no_wait), as_json)


def _launch(size: str | None, cpus: float | None, memory: int | None, disk: int | None) -> dict[str, Any]:
    custom = {"custom_cpu_cores": cpus, "custom_gb_memory": memory, "custom_disk_size": disk}
    given = {name: value for name, value in custom.items() if value is not None}
    own = bool(given) or (size or "").upper() == "CUSTOM_SIZE"
    if size and given and size.upper() != "CUSTOM_SIZE":
        raise click.UsageError(f"--size {size} has processors, memory and disk already; leave it out, or the others")
    if own and (cpus is None or memory is None):
        raise click.UsageError("a box of a size of its own needs both --cpus and --memory")
    if cpus is not None and not math.isfinite(cpus):
        raise click.UsageError(f"--cpus {cpus} is no number of processors; give 0.5, 1 or an even number up to 16")
    size = size or ("CUSTOM_SIZE" if own else None)
    return {**({"resource_size_request": size.upper()} if size else {}), **given}


def _pairs(option: str, given: Sequence[str]) -> dict[str, str]:
    found = {}
    for text in given:
        name, equals, value = text.partition("=")
        if not equals:
            raise click.UsageError(f"{option} {text[:40]!r} has no =; give NAME=VALUE")
        found[name] = value
    return found


def _created(remote: Remote, body: dict[str, Any], *, wait: bool) -> dict[str, Any]:
    try:
        view: dict[str, Any] = remote.call("POST", "/v1/devboxes", body)
    except ApiError as error:
        raise ApiError(error.code, _in_options(error.message)) from error
    return _reached(remote, view["id"], "running") if wait else view


def _in_options(message: str) -> str:
    """A refusal of a create in the words of this command, which names options where the API names fields."""
    return _FIELD.sub(lambda found: _OPTIONS[found[1]], message)


def _reached(remote: Remote, box_id: str, status: str) -> dict[str, Any]:
    """The view of a box once it has this status. Raises SetupError when it has ended instead."""
    try:
        body = {"statuses": [status, *ENDED]}
        view: dict[str, Any] = remote.call("POST", f"/v1/devboxes/{box_id}/wait_for_status", body)
    except KeyboardInterrupt:
        click.echo(f"{box_id} goes on; `devboxd boxes shutdown {box_id}` ends it", err=True)
        raise
    if view["status"] != status:
        reasons = [step.get("failure_reason") for step in view["state_transitions"] if step.get("failure_reason")]
        why = (reasons or [view.get("failure_reason") or view.get("shutdown_reason") or view["status"]])[-1]
        raise SetupError(f"cannot wait until {box_id} is {status}: it has ended: {printable(str(why))}")
    return view


def _print(view: dict[str, Any], as_json: bool) -> None:
    click.echo(json.dumps(view) if as_json else view["id"])


@boxes.command("suspend")
@_no_wait
@remote_options
@_several
def boxes_suspend(names: tuple[str, ...], no_wait: bool, url: str | None, key_file: Path | None, as_json: bool) -> None:
    """Put boxes to sleep.

    Their processes end; their disks are kept.
    """
    _change(find_remote(url, key_file), names, "suspend", None if no_wait else "suspended", as_json)


@boxes.command("resume")
@_no_wait
@remote_options
@_several
def boxes_resume(names: tuple[str, ...], no_wait: bool, url: str | None, key_file: Path | None, as_json: bool) -> None:
    """Wake boxes that sleep."""
    _change(find_remote(url, key_file), names, "resume", None if no_wait else "running", as_json)


def _change(remote: Remote, names: Sequence[str], verb: str, status: str | None, as_json: bool) -> None:
    """Ask it for all boxes, then wait for each; ids are printed as they are done."""
    asked = [remote.call("POST", f"/v1/devboxes/{find_box(remote, name)}/{verb}", {}) for name in names]
    views = []
    for view in asked:
        views.append(_reached(remote, view["id"], status) if status else view)
        if not as_json:
            click.echo(view["id"])
    if as_json:
        click.echo(json.dumps(views))


@boxes.command("snapshot")
@_name
@remote_options
@_box
def boxes_snapshot(box: str, name: str | None, url: str | None, key_file: Path | None, as_json: bool) -> None:
    """Keep the disk of a box as a snapshot.

    Its id is printed when it is complete. What runs in the box goes on.
    """
    remote = find_remote(url, key_file)
    _print(remote.call("POST", f"/v1/devboxes/{find_box(remote, box)}/snapshot_disk", {"name": name}), as_json)


@boxes.command("fork")
@_name
@_size
@_variables
@remote_options
@_box
def boxes_fork(
    box: str,
    name: str | None,
    size: str | None,
    variables: tuple[str, ...],
    url: str | None,
    key_file: Path | None,
    as_json: bool,
) -> None:
    """Make a box from the disk of another.

    Its id is printed once it runs. It begins with the same launch parameters and variables, and with a size and further
    variables of its own if they are given. What runs in the other one goes on there, and its entrypoint is not begun
    here. The snapshot in between is deleted.
    """
    remote = find_remote(url, key_file)
    source = remote.call("GET", f"/v1/devboxes/{find_box(remote, box)}")
    launch = source["launch_parameters"]
    if size:
        launch = {key: value for key, value in launch.items() if not key.startswith("custom_")}
        launch["resource_size_request"] = size.upper()
    own = {"environment_of": source["id"], "environment_variables": _pairs("--env", variables)}
    kept = remote.call("POST", f"/v1/devboxes/{source['id']}/snapshot_disk", {"name": f"fork of {source['id']}"})
    try:
        body = {"name": name, "snapshot_id": kept["id"], "launch_parameters": launch, **own}
        view = _created(remote, body, wait=True)
    finally:
        try:
            remote.call("POST", f"/v1/devboxes/disk_snapshots/{kept['id']}/delete", {})
        except ApiError as error:
            click.echo(f"the snapshot {kept['id']} stays: {error}", err=True)
    _print(view, as_json)


class _Exec(click.Command):
    """Takes its options also between BOX and `--`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        end = args.index("--") if "--" in args else 0
        with_value = {o for p in self.params if isinstance(p, click.Option) and not p.is_flag for o in p.opts}
        box = 0
        while box < end and args[box].startswith("-"):
            box += 2 if args[box] in with_value else 1
        if box + 1 < end and args[box + 1].startswith("-"):
            args = [*args[:box], *args[box + 1 : end], args[box], *args[end:]]
        return super().parse_args(ctx, args)


@boxes.command("exec", cls=_Exec, context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@remote_options
@_box
@click.argument("words", nargs=-1, required=True, metavar="-- CMD...", type=click.UNPROCESSED)
def boxes_exec(box: str, words: tuple[str, ...], url: str | None, key_file: Path | None, as_json: bool) -> None:
    """Run a command in a box.

    Its output is shown as it comes, and its exit code is this command's. One word is taken as a line for the box's
    bash, several as a command and its arguments. Standard input is passed on when it is a file or pipe; bytes pass
    unchanged in both directions. Ctrl-C interrupts the command, a second one kills it. When input or output cannot be
    passed on, the command is killed and the exit code is 2. With --json the outcome is printed at the end.

    \b
    devboxd boxes exec BOX -- ls -l /
    devboxd boxes exec BOX -- 'cd /tmp && ls | wc -l'
    """
    from devboxd.remote_exec import execute

    words = words[1:] if words[0] == "--" else words
    if not words:
        raise click.UsageError("a command is missing")
    command = words[0] if len(words) == 1 else shlex.join(words)
    remote = find_remote(url, key_file)
    sys.exit(execute(remote, find_box(remote, box), command, as_json))


@boxes.command("logs")
@click.option("-f", "--follow", is_flag=True, help="Go on with new lines until the box has ended.")
@remote_options
@_box
def boxes_logs(box: str, follow: bool, url: str | None, key_file: Path | None, as_json: bool) -> None:
    """Print a box's logs.

    With --follow and --json one line of JSON for each entry.
    """
    remote = find_remote(url, key_file)
    path = f"/v1/devboxes/{find_box(remote, box, ended=True)}/logs"
    if follow:
        for entry in remote.entries(f"{path}/tail"):
            click.echo(json.dumps(entry) if as_json else _line(entry))
        return
    logs = remote.call("GET", path)["logs"]
    if as_json:
        click.echo(json.dumps(logs))
        return
    for entry in logs:
        click.echo(_line(entry))


def _line(entry: dict[str, Any]) -> str:
    text = (entry.get("message") or "").rstrip()
    if sys.stdout.isatty():
        text = printable(text.replace("\r\n", "\n"), keep="\n\t")
    return f"{date(entry['timestamp_ms'])} {entry.get('source') or '-'} {text}"


@boxes.command("shutdown")
@click.option("--all", "every", is_flag=True, help="All boxes that have not ended.")
@remote_options
@click.argument("names", metavar="[BOX]...", nargs=-1, shell_complete=box_names)
def boxes_shutdown(names: tuple[str, ...], every: bool, url: str | None, key_file: Path | None, as_json: bool) -> None:
    """End boxes and free their disks."""
    if every == bool(names):
        raise click.UsageError("name boxes, or give --all")
    remote = find_remote(url, key_file)
    if every:
        found = all_pages(remote, "/v1/devboxes", "devboxes", {})
        box_ids = [box["id"] for box in found if box["status"] not in ENDED]
    else:
        box_ids = [find_box(remote, name) for name in names]
    for box_id in box_ids:
        remote.call("POST", f"/v1/devboxes/{box_id}/shutdown", {})
        if not as_json:
            click.echo(box_id)
    if as_json:
        click.echo(json.dumps(box_ids))

"""The command line. Modules are imported where they are used: `--help` and the client commands start fast."""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import click

from devboxd import __version__
from devboxd.errors import ApiError, SetupError

if TYPE_CHECKING:
    from devboxd.config import Settings
    from devboxd.remote import Remote
    from devboxd.store.db import Store

T = TypeVar("T")
Command = Callable[..., None]

_LOOPBACK = ("127.", "localhost", "::1")
_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def main() -> NoReturn:
    """Run the command line. Every refusal is one line on standard error that begins with "cannot"; exit code 2."""
    try:
        sys.exit(cli.main(standalone_mode=False, prog_name="devboxd"))
    except click.exceptions.NoArgsIsHelpError as error:
        sys.exit(_say(error.ctx.get_help() if error.ctx else ""))
    except click.ClickException as error:
        sys.exit(_refuse(_usage_words(error)))
    except (SetupError, ApiError) as error:
        sys.exit(_refuse(str(error)))
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
        sys.exit(141)


def _say(text: str) -> int:
    click.echo(text, err=True)
    return 2


def _refuse(message: str) -> int:
    return _say(" ".join(message.split()))


def _usage_words(error: click.ClickException) -> str:
    reason = error.format_message().rstrip(".")
    where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "devboxd"
    return f"cannot run this command: {reason[:1].lower()}{reason[1:]}; see `{where} --help`"


def _settings(config: Path | None = None, **overrides: Any) -> Settings:
    from devboxd import config as module

    return module.load(overrides, file=config)


_state = click.option(
    "--state",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The server's folder; /var/lib/devboxd if not given.",
)
_config = click.option(
    "--config",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Settings as TOML; /etc/devboxd/devboxd.toml if not given.",
)
_domains = click.option(
    "--domain",
    "domains",
    multiple=True,
    metavar="NAME",
    help="Further host name under which clients reach the server; may be given again.",
)
_as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group(context_settings=_CONTEXT)
@click.version_option(__version__, prog_name="devboxd", message="%(prog)s %(version)s")
def cli() -> None:
    """Isolated Linux machines for agents, on your own hardware.

    Start the server with `devboxd serve`, make a key with `devboxd keys create`, and point a Runloop client or
    `devboxd boxes` at it.
    """


@cli.command()
@click.option("--host", metavar="ADDR", help="Address to listen on; 127.0.0.1 if not given.")
@click.option("--port", type=click.IntRange(1, 65535), metavar="N", help="Port to listen on; 8080 if not given.")
@_domains
@_state
@_config
def serve(
    host: str | None, port: int | None, domains: tuple[str, ...], state: Path | None, config: Path | None
) -> None:
    """Run the server until SIGTERM.

    Boxes live on when it ends, and are attached again when it starts.

    Every setting may also stand in the file of settings, or in the environment as DEVBOXD_NAME.
    """
    settings = _settings(config, host=host, port=port, domains=domains or None, state=state)
    if os.geteuid() != 0:
        raise SetupError(
            "cannot serve: boxes are made of namespaces and mounts, which only root may make; run it as root"
            " (`devboxd systemd-unit` prints a unit)"
        )
    from devboxd import doctor, logs
    from devboxd.backup import check_not_cut
    from devboxd.engine.reserve import Reserve

    logs.configure(settings.log_format)
    check_not_cut(settings.state)
    if settings.state.is_dir():
        Reserve(settings.state).give_up_if_full()
    if refusals := list(doctor.required(settings)):
        for refusal in refusals:
            _refuse(str(refusal))
        sys.exit(2)
    if not settings.host.startswith(_LOOPBACK):
        click.echo(_exposure(settings), err=True)
    from devboxd import app

    sys.exit(app.run(settings))


def _exposure(settings: Settings) -> str:
    names = ", ".join(settings.domains) or "none yet"
    return (
        f"Listening on {settings.host}: whoever reaches port {settings.port} of this machine and has a key can run\n"
        "commands in boxes. Keys and data cross the network unencrypted: put a proxy with TLS in front of it.\n"
        f"Clients are served under the host names of the setting `domains` ({names}) and loopback names only."
    )


@cli.group()
def keys() -> None:
    """Make, list and revoke keys.

    All of it works while the server runs.
    """


@keys.command("create")
@click.option("--name", default="", metavar="NAME", help="A word for yourself about what the key is for.")
@_state
@_config
def keys_create(name: str, state: Path | None, config: Path | None) -> None:
    """Make a key and print it.

    Standard output holds the key alone. It is shown this once: the store keeps only its hash.
    """
    from devboxd.resources import accounts

    click.echo(_with_store(config, state, lambda store: accounts.create_key(store, name)))


@keys.command("list")
@_as_json
@_state
@_config
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
    rows = [(key.id, key.name, _date(key.create_time_ms), "revoked" if key.revoke_time_ms else "") for key in found]
    _table(("id", "name", "made", ""), rows)


@keys.command("revoke")
@click.argument("key_id", metavar="ID")
@_state
@_config
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
    store = Store.open(_settings(config, state=state).state / FILE_NAME)
    try:
        return asyncio.run(action(store))
    finally:
        store.close()


@cli.command("doctor")
@_as_json
@_config
@_state
def doctor_command(as_json: bool, config: Path | None, state: Path | None) -> None:
    """Check this machine.

    Tells what it offers, which walls are therefore up, and for each lack the cause and the cure.
    """
    from devboxd import doctor

    sys.exit(doctor.run(_settings(config, state=state), as_json))


@cli.group()
def image() -> None:
    """Build the image of boxes."""


@image.command("build")
@_config
def image_build(config: Path | None) -> None:
    """Build the default image now, if it is missing.

    The server does the same at its first start.
    """
    from devboxd.engine.images import Images

    click.echo(_shown(Images(_settings(config)).ensure_default).name)


def _shown(work: Callable[[Callable[[float, str], None]], Coroutine[Any, Any, T]]) -> T:
    """Do something that takes its time, with a bar on standard error."""
    import asyncio

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    from devboxd import logs
    from devboxd.engine.base import EngineError

    logs.configure("auto")
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=1.0, visible=False)  # what is refused at once never showed progress

        def show(done: float, text: str) -> None:
            bar.update(task, completed=done, description=text, visible=True)

        try:
            return asyncio.run(work(show))
        except EngineError as error:
            raise SetupError(str(error)) from error


@cli.group()
def storage() -> None:
    """See, grow and check the storage.

    That is where disks and snapshots lie. On the server's machine, as root, while the server runs or not.
    """


@storage.command("status")
@_as_json
@_config
@_state
def storage_status(as_json: bool, config: Path | None, state: Path | None) -> None:
    """Show its kind, size and content."""
    from dataclasses import asdict

    from devboxd import storage as module

    found = module.status(_settings(config, state=state).state)
    if as_json:
        click.echo(json.dumps(asdict(found)))
        return
    for name, text in module.lines(found):
        click.echo(f"{name:<12} {text}")


@storage.command("grow")
@click.argument("size", metavar="SIZE")
@_config
@_state
def storage_grow(size: str, config: Path | None, state: Path | None) -> None:
    """Let it hold SIZE, such as 64G.

    It grows by itself when little is left; this is for those who want to know at once that there is room.
    """
    from devboxd import storage as module

    module.grow(_settings(config, state=state).state, size)


@storage.command("check")
@_config
@_state
def storage_check(config: Path | None, state: Path | None) -> None:
    """Look for damage.

    That takes a while. While a server runs every block of the pool's own is read and compared with its checksum; else
    the structure is checked. What disks hold has no checksums: see `devboxd snapshot verify`. Nothing is repaired. The
    exit code is 1 when there is damage.
    """
    from devboxd import storage as module

    sys.exit(module.check(_settings(config, state=state).state))


_folder = click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
_secrets = click.option(
    "--secrets",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="A folder apart from the backup for what opens other things; left out if not given.",
)


@cli.command("backup")
@_folder
@_secrets
@_config
@_state
def backup_command(folder: Path, secrets: Path | None, config: Path | None, state: Path | None) -> None:
    """Write a backup into DIR.

    On the server's machine, as root, while the server runs or not. DIR must be empty or missing. It then holds the
    store, the output of executions, the disks of devboxes, snapshots, and the images that they lie on, each as of one
    instant. The exit code is 1 when something had to be left out.
    """
    from devboxd import backup as module

    contents = _shown(lambda tell: module.backup(_settings(config, state=state), folder, secrets, tell))
    missing = {name: why for name, why in contents.left_out.items() if why != module.DELETED}
    sys.exit(_missing("left out", missing))


@cli.command("restore")
@_folder
@_secrets
@_config
@_state
def restore_command(folder: Path, secrets: Path | None, config: Path | None, state: Path | None) -> None:
    """Make a server's folder out of a backup.

    The folder must be empty or missing; name another one with --state. Devboxes that ran are suspended afterwards, for
    their processes are not in the backup. The exit code is 1 when something could not be brought back.
    """
    from devboxd import backup as module

    lost = _shown(lambda tell: module.restore(_settings(config, state=state), folder, secrets, tell))
    sys.exit(_missing("not restored", lost))


def _missing(fate: str, names: dict[str, str]) -> int:
    for name, why in names.items():
        click.echo(f"{fate}: {name}: {why}", err=True)
    return 1 if names else 0


@cli.command("systemd-unit")
@click.option("--host", metavar="ADDR", help="As of `serve`.")
@click.option("--port", type=click.IntRange(1, 65535), metavar="N", help="As of `serve`.")
@_domains
@_state
@_config
def systemd_unit(domains: tuple[str, ...], **options: Any) -> None:
    """Print a systemd unit.

    It runs this installation; for example:

    \b
    devboxd systemd-unit > /etc/systemd/system/devboxd.service
    """
    from devboxd import systemd

    words = [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]
    words += [word for name in domains for word in ("--domain", name)]
    click.echo(systemd.unit(words), nl=False)


def _remote_options(command: Command) -> Command:
    url = click.option("--url", metavar="URL", help="The server; else DEVBOXD_URL or RUNLOOP_BASE_URL.")
    key = click.option(
        "--key-file",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="File with the key; else DEVBOXD_KEY or RUNLOOP_API_KEY.",
    )
    return url(key(_as_json(command)))


def _remote(url: str | None, key_file: Path | None) -> Remote:
    from devboxd.remote import Remote

    return Remote.find(url, key_file)


@cli.group()
def boxes() -> None:
    """See and use the boxes of a server.

    Through its API, so from any machine.
    """


@boxes.command("list")
@click.option("--status", metavar="STATUS", help="Only boxes in this state, such as running.")
@_remote_options
def boxes_list(status: str | None, url: str | None, key_file: Path | None, as_json: bool) -> None:
    """List the boxes, newest first."""
    found = _all(_remote(url, key_file), "/v1/devboxes", "devboxes", {"status": status} if status else {})
    if as_json:
        click.echo(json.dumps(found))
        return
    rows = [(box["id"], box["status"], _date(box["create_time_ms"]), box.get("name") or "") for box in found]
    _table(("id", "status", "made", "name"), rows)


def _all(remote: Remote, path: str, name: str, query: dict[str, Any]) -> list[dict[str, Any]]:
    """All pages of a list."""
    found: list[dict[str, Any]] = []
    more = True
    while more:
        after = {"starting_after": found[-1]["id"]} if found else {}
        answer = remote.call("GET", path, query={"limit": 500, **query, **after})
        found += answer[name]
        more = bool(answer["has_more"] and answer[name])
    return found


@boxes.command("exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@_remote_options
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
    sys.exit(execute(_remote(url, key_file), box_id, command, as_json))


@boxes.command("logs")
@_remote_options
@click.argument("box_id", metavar="ID")
def boxes_logs(box_id: str, url: str | None, key_file: Path | None, as_json: bool) -> None:
    """Print a box's logs."""
    logs = _remote(url, key_file).call("GET", f"/v1/devboxes/{box_id}/logs")["logs"]
    if as_json:
        click.echo(json.dumps(logs))
        return
    for line in logs:
        text = (line.get("message") or "").rstrip()
        if sys.stdout.isatty():
            text = _printable(text.replace("\r\n", "\n"), keep="\n\t")
        click.echo(f"{_date(line['timestamp_ms'])} {line.get('source') or '-'} {text}")


@boxes.command("shutdown")
@click.option("--all", "every", is_flag=True, help="All boxes that have not ended.")
@_remote_options
@click.argument("box_ids", metavar="[ID]...", nargs=-1)
def boxes_shutdown(
    box_ids: tuple[str, ...], every: bool, url: str | None, key_file: Path | None, as_json: bool
) -> None:
    """End boxes and free their disks."""
    if every == bool(box_ids):
        raise click.UsageError("name boxes by their ids, or give --all")
    remote = _remote(url, key_file)
    if every:
        ended = ("shutdown", "failure")
        box_ids = tuple(box["id"] for box in _all(remote, "/v1/devboxes", "devboxes", {}) if box["status"] not in ended)
    for box_id in box_ids:
        remote.call("POST", f"/v1/devboxes/{box_id}/shutdown", {})
        if not as_json:
            click.echo(box_id)
    if as_json:
        click.echo(json.dumps(list(box_ids)))


@cli.group()
def snapshot() -> None:
    """See and verify snapshots.

    Through the API of a server, so from any machine.
    """


@snapshot.command("list")
@click.option("--devbox", metavar="ID", help="Only snapshots of this devbox.")
@_remote_options
def snapshot_list(devbox: str | None, url: str | None, key_file: Path | None, as_json: bool) -> None:
    """List the snapshots, newest first."""
    query = {"devbox_id": devbox} if devbox else {}
    found = _all(_remote(url, key_file), "/v1/devboxes/disk_snapshots", "snapshots", query)
    if as_json:
        click.echo(json.dumps(found))
        return
    rows = [
        (one["id"], _date(one["create_time_ms"]), _size(one["size_bytes"]), one["source_devbox_id"], one["name"] or "")
        for one in found
    ]
    _table(("id", "taken", "size", "devbox", "name"), rows)


@snapshot.command("verify")
@_remote_options
@click.argument("snapshot_ids", metavar="[ID]...", nargs=-1, required=True)
def snapshot_verify(snapshot_ids: tuple[str, ...], url: str | None, key_file: Path | None, as_json: bool) -> None:
    """Tell whether snapshots are intact.

    All of each is read. The digest (SHA-256 over names, owners, modes, times, attributes and contents) is compared with
    the one that was made when somebody asked first. The exit code is 1 when one differs.
    """
    remote = _remote(url, key_file)
    found = [remote.call("POST", f"/v1/devboxes/disk_snapshots/{name}/verify", {}) for name in snapshot_ids]
    if as_json:
        click.echo(json.dumps(found))
    else:
        rows = [(one["id"], "intact" if one["intact"] else "CHANGED", one["found_digest"]) for one in found]
        _table(("id", "", "sha256"), rows)
    sys.exit(0 if all(one["intact"] for one in found) else 1)


def _size(number: int | None) -> str:
    """Bytes for a person."""
    if number is None:
        return "-"
    from rich.filesize import decimal

    return decimal(number)


def _date(time_ms: int) -> str:
    from datetime import datetime

    return datetime.fromtimestamp(time_ms / 1000).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _table(titles: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Columns on a terminal; on a pipe one line per row, fields set apart by tabs, for other programs."""
    if not sys.stdout.isatty():
        for row in rows:
            click.echo("\t".join(_printable(cell) for cell in row))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(*titles, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*(_printable(cell).replace("[", r"\[") for cell in row))
    Console().print(table)


def _printable(text: str, keep: str = "") -> str:
    """Names and output come from users and boxes: no escape sequence of theirs may reach the terminal."""
    return "".join(sign if sign.isprintable() or sign in keep else "\N{REPLACEMENT CHARACTER}" for sign in text)


if __name__ == "__main__":
    main()

"""`devboxd backup` and `devboxd restore`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from devboxd.cli.options import FilePath, config_option, load_settings, state_option
from devboxd.cli.printing import with_progress

_folder = click.argument("folder", metavar="DIR", type=FilePath("folder"))
_secrets = click.option(
    "--secrets",
    type=FilePath("folder"),
    metavar="DIR",
    help="A folder apart from the backup for what opens other things; left out if not given.",
)


@click.command("backup")
@_folder
@_secrets
@config_option
@state_option
def backup_command(folder: Path, secrets: Path | None, config: Path | None, state: Path | None) -> None:
    """Write a backup into DIR.

    On the server's machine, as root, while the server runs or not. DIR must be empty or missing. It then holds the
    store, the output of executions, the disks of devboxes, snapshots, and the images that they lie on, each as of one
    instant. The exit code is 1 when something had to be left out.
    """
    from devboxd import backup as module

    contents = with_progress(lambda tell: module.backup(load_settings(config, state=state), folder, secrets, tell))
    missing = {name: why for name, why in contents.left_out.items() if why != module.DELETED}
    sys.exit(_missing("left out", missing))


@click.command("restore")
@_folder
@_secrets
@config_option
@state_option
def restore_command(folder: Path, secrets: Path | None, config: Path | None, state: Path | None) -> None:
    """Make a server's folder out of a backup.

    The folder must be empty or missing; name another one with --state. Devboxes that ran are suspended afterwards, for
    their processes are not in the backup. The exit code is 1 when something could not be brought back.
    """
    from devboxd import backup as module

    lost = with_progress(lambda tell: module.restore(load_settings(config, state=state), folder, secrets, tell))
    sys.exit(_missing("not restored", lost))


def _missing(fate: str, names: dict[str, str]) -> int:
    for name, why in names.items():
        click.echo(f"{fate}: {name}: {why}", err=True)
    return 1 if names else 0

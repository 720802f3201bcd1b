"""The server and its machine: `serve`, `systemd-unit`, `image`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from devboxd.cli.options import config_option, domains_option, load_settings, state_option
from devboxd.cli.printing import refuse, with_progress
from devboxd.errors import SetupError
from devboxd.path_errors import AS_ROOT

if TYPE_CHECKING:
    from devboxd.config import Settings

_LOOPBACK = ("127.", "localhost", "::1")


class _WithSettings(click.Command):
    """A command whose help ends with the names of all settings."""

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write them."""
        from devboxd.config import DEFAULT_FILE, PREFIX, Settings

        with formatter.section("Settings"):
            formatter.write_text(
                f"Keys of {DEFAULT_FILE}, and in capitals after {PREFIX} variables of the environment; what each means"
                " and its default stand in docs/reference/settings.md:"
            )
            formatter.write_paragraph()
            formatter.write_text(", ".join(Settings.__struct_fields__))


@click.command(cls=_WithSettings)
@click.option("--host", metavar="ADDR", help="Address to listen on; 127.0.0.1 if not given.")
@click.option("--port", type=click.IntRange(1, 65535), metavar="N", help="Port to listen on; 8080 if not given.")
@domains_option
@state_option
@config_option
def serve(
    host: str | None, port: int | None, domains: tuple[str, ...], state: Path | None, config: Path | None
) -> None:
    """Run the server until SIGTERM.

    Boxes live on when it ends, and are attached again when it starts.

    Options win over the environment, that over the file of settings.
    """
    settings = load_settings(config, host=host, port=port, domains=domains or None, state=state)
    if os.geteuid() != 0:
        raise SetupError(
            "cannot serve: boxes are made of namespaces and mounts, which only root may make; "
            f"{AS_ROOT} (`devboxd systemd-unit` prints a unit)"
        )
    from devboxd import app, logs
    from devboxd.http.listening import listen

    logs.configure(settings.log_format)
    with listen(settings.host, settings.port) as listener:  # before anything is made or tried
        _check_machine(settings)
        if not settings.host.startswith(_LOOPBACK):
            click.echo(_exposure(settings), err=True)
        sys.exit(app.run(settings, listener))


def _check_machine(settings: Settings) -> None:
    """End with 2 and every reason for which the server cannot start here."""
    from devboxd import doctor, storage
    from devboxd.backup import check_not_cut
    from devboxd.engine.reserve import Reserve

    storage.refuse_unwritable(settings, "serve")
    check_not_cut(settings.state)
    if settings.state.is_dir():
        Reserve(settings.state).give_up_if_full()
    if refusals := list(doctor.required(settings)):
        for refusal in refusals:
            refuse(str(refusal))
        sys.exit(2)


def _exposure(settings: Settings) -> str:
    names = ", ".join(settings.domains) or "none yet"
    return (
        f"Listening on {settings.host}: whoever reaches port {settings.port} of this machine and has a key can run\n"
        "commands in boxes. Keys and data cross the network unencrypted: put a proxy with TLS in front of it.\n"
        f"Clients are served under the host names of the setting `domains` ({names}) and loopback names only."
    )


@click.command("systemd-unit")
@click.option("--host", metavar="ADDR", help="As of `serve`.")
@click.option("--port", type=click.IntRange(1, 65535), metavar="N", help="As of `serve`.")
@domains_option
@state_option
@config_option
def systemd_unit(domains: tuple[str, ...], **options: Any) -> None:
    """Print a systemd unit.

    It runs this installation; for example:

    \b
    devboxd systemd-unit > /etc/systemd/system/devboxd.service
    """
    from devboxd import systemd

    given = {name: value.absolute() if isinstance(value, Path) else value for name, value in options.items() if value}
    words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    words += [word for name in domains for word in ("--domain", name)]
    click.echo(systemd.unit(words), nl=False)


@click.group()
def image() -> None:
    """Build the image of boxes."""


@image.command("build")
@config_option
def image_build(config: Path | None) -> None:
    """Build the default image now, if it is missing.

    The server does the same at its first start.
    """
    from devboxd.engine.images import Images

    if os.geteuid() != 0:
        raise SetupError(f"cannot build the image: only root may make its files; {AS_ROOT}")
    click.echo(with_progress(Images(load_settings(config)).ensure_default).name)

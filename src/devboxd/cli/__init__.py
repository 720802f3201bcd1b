"""The command line. Modules are imported where they are used: `--help` and the client commands start fast."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

import click

from devboxd import __version__
from devboxd.cli import backup, boxes, completion, copying, doctor, keys, server, snapshots, storage
from devboxd.cli.printing import refuse, say
from devboxd.errors import ApiError, SetupError
from devboxd.path_errors import explained, shown

_CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}


def main() -> NoReturn:
    """Run the command line. Every refusal is one line on standard error that begins with "cannot"; exit code 2."""
    try:
        _open_streams()
        _run()
        sys.stdout.flush()
        sys.exit(0)
    except click.exceptions.NoArgsIsHelpError as error:
        sys.exit(say(error.ctx.get_help() if error.ctx else ""))
    except click.ClickException as error:
        sys.exit(refuse(_usage_words(error)))
    except (SetupError, ApiError) as error:
        sys.exit(refuse(str(error)))
    except (click.Abort, KeyboardInterrupt):
        say("stopped, as Ctrl-C asked")
        sys.exit(130)
    except BrokenPipeError:
        _write_no_more()
        sys.exit(141)
    except OSError as error:
        _write_no_more()
        sys.exit(refuse(f"cannot go on: {f'{shown(error.filename)}: ' if error.filename else ''}{explained(error)}"))


def _run() -> None:
    if "_DEVBOXD_COMPLETE" in os.environ:  # a shell asks what comes next
        cli.main(prog_name="devboxd")
    try:  # not by `cli.main`, which has words of its own for Ctrl-C and for output that nobody reads
        with cli.make_context("devboxd", sys.argv[1:]) as context:
            cli.invoke(context)
    except click.exceptions.Exit as done:
        if done.exit_code:
            sys.exit(done.exit_code)


def _open_streams() -> None:
    """Stand in for standard streams that the caller has closed, but for output, which would be lost."""
    if sys.stdout is None:
        raise SetupError("cannot run without standard output: it is closed; send it to a file or to /dev/null")
    if sys.stdin is None:
        sys.stdin = open(os.devnull)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115


def _write_no_more() -> None:
    """Standard output takes nothing any more, and the interpreter flushes once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _usage_words(error: click.ClickException) -> str:
    reason = error.format_message().rstrip(".")
    where = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx else "devboxd"
    return f"cannot run this command: {reason[:1].lower()}{reason[1:]}; see `{where} --help`"


@click.group(context_settings=_CONTEXT)
@click.version_option(__version__, prog_name="devboxd", message="%(prog)s %(version)s")
def cli() -> None:
    """Isolated Linux machines for agents, on your own hardware.

    Start the server with `devboxd serve`, make a key with `devboxd keys create`, and point a Runloop client or
    `devboxd boxes` at it.
    """


for _command in (
    *(server.serve, server.systemd_unit, doctor.doctor, server.image, storage.storage),
    *(completion.completion, keys.keys, boxes.boxes, snapshots.snapshot, backup.backup_command, backup.restore_command),
):
    cli.add_command(_command)
boxes.boxes.add_command(copying.boxes_cp)

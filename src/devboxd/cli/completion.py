"""`devboxd completion`, and what completes ids and names while a command is being typed."""

from __future__ import annotations

from typing import Any

import click
from click.shell_completion import CompletionItem, get_completion_class

from devboxd.cli.options import ENDED, all_pages, find_remote
from devboxd.errors import ApiError, SetupError

_SECONDS = 2.0
"""How long the server is waited for; a shell that completes nothing is better than one that hangs."""


def box_names(context: click.Context, _: click.Parameter, begun: str) -> list[CompletionItem]:
    """The ids and names of living boxes that begin so; none when the server does not answer."""
    boxes = [box for box in _listed(context, "/v1/devboxes", "devboxes") if box["status"] not in ENDED]
    items = [CompletionItem(box["id"], help=box.get("name") or box["status"]) for box in boxes]
    names = sorted({box["name"] for box in boxes if box.get("name")})
    items = [CompletionItem(name, help="name") for name in names if name.isprintable()] + items
    return [item for item in items if item.value.startswith(begun)]


def snapshot_ids(context: click.Context, _: click.Parameter, begun: str) -> list[CompletionItem]:
    """The ids of snapshots that begin so; none when the server does not answer."""
    found = _listed(context, "/v1/devboxes/disk_snapshots", "snapshots")
    items = [CompletionItem(one["id"], help=one.get("name") or "") for one in found]
    return [item for item in items if item.value.startswith(begun)]


def box_or_file(context: click.Context, parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """A box, or a path here, which the shell completes."""
    return [CompletionItem(begun, type="file"), *box_names(context, parameter, begun)]


def sizes(_: click.Context, __: click.Parameter, begun: str) -> list[CompletionItem]:
    """The sizes that begin so, in capitals or not, with what they are."""
    from typing import get_args

    from devboxd.devboxes.views import SIZES, Size

    about = {name: f"{cpus:g} cores, {memory} GiB, disk {disk} GiB" for name, (cpus, memory, disk) in SIZES.items()}
    items = [CompletionItem(name, help=about.get(name, "of --cpus and --memory")) for name in get_args(Size)]
    return [item for item in items if item.value.startswith(begun.upper())]


def statuses(_: click.Context, __: click.Parameter, begun: str) -> list[CompletionItem]:
    """The statuses of boxes that begin so."""
    from devboxd.devboxes.states import Status

    return [CompletionItem(str(status)) for status in Status if status.startswith(begun)]


def _listed(context: click.Context, path: str, name: str) -> list[dict[str, Any]]:
    try:
        remote = find_remote(context.params.get("url"), context.params.get("key_file"))
        return all_pages(remote.patient(_SECONDS), path, name, {})
    except (SetupError, ApiError):
        return []


@click.command("completion")
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
@click.pass_context
def completion(context: click.Context, shell: str) -> None:
    """Print the completion for a shell.

    It completes commands, options, sizes and statuses, and ids and names by asking the server. Put it into one of these
    files:

    \b
    bash: /etc/bash_completion.d/devboxd
    zsh:  ~/.zfunc/_devboxd, with ~/.zfunc in fpath
    fish: ~/.config/fish/completions/devboxd.fish
    """
    kind = get_completion_class(shell)
    assert kind is not None
    root = context.find_root()
    click.echo(kind(root.command, {}, "devboxd", "_DEVBOXD_COMPLETE").source())

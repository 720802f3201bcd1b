"""Options that several commands share, and what they stand for: settings, and a server to call."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from devboxd.errors import SetupError
from devboxd.path_errors import Wanted, check

if TYPE_CHECKING:
    from devboxd.config import Settings
    from devboxd.remote import Remote

Command = Callable[..., None]
ENDED = ("shutdown", "failure")
"""The statuses of boxes that live no more."""
_ID = re.compile(r"dbx_\w+")


class FilePath(click.Path):
    """A path of the wanted kind that is not empty: an empty one would mean the folder in which the command runs."""

    def __init__(self, wanted: Wanted) -> None:
        super().__init__(path_type=Path, readable=False)  # a missing permission is told in words of its own
        self._wanted = wanted

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The path. Raises BadParameter, and SetupError for one that can never be right."""
        if value == "":
            self.fail("the path is empty", param, ctx)
        if param is not None:
            check(Path(value), self._wanted, param.get_error_hint(ctx).strip("'") if ctx else str(param.name))
        return super().convert(value, param, ctx)


state_option = click.option(
    "--state",
    type=FilePath("folder"),
    metavar="DIR",
    help="The server's folder; /var/lib/devboxd if not given.",
)
config_option = click.option(
    "--config",
    type=FilePath("file"),
    metavar="FILE",
    help="Settings as TOML; /etc/devboxd/devboxd.toml if not given.",
)
domains_option = click.option(
    "--domain",
    "domains",
    multiple=True,
    metavar="NAME",
    help="Further host name under which clients reach the server; may be given again.",
)
as_json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def remote_options(command: Command) -> Command:
    """The options of every command that prints what a server says: `--url`, `--key-file` and `--json`."""
    return server_options(as_json_option(command))


def server_options(command: Command) -> Command:
    """The options that name a server: `--url` and `--key-file`."""
    url = click.option("--url", metavar="URL", help="The server; else DEVBOXD_URL or RUNLOOP_BASE_URL.")
    key = click.option(
        "--key-file",
        type=FilePath("file"),
        metavar="FILE",
        help="File with the key; else DEVBOXD_KEY or RUNLOOP_API_KEY.",
    )
    return url(key(command))


def load_settings(config: Path | None = None, **overrides: Any) -> Settings:
    """The settings from all their sources; options that were not given are None. Raises SetupError."""
    from devboxd import config as module

    return module.load(overrides, file=config)


def find_remote(url: str | None, key_file: Path | None) -> Remote:
    """The server of the options, else of the environment. Raises SetupError without a key."""
    from devboxd.remote import Remote

    return Remote.find(url, key_file)


def find_box(remote: Remote, text: str, *, ended: bool = False) -> str:
    """The id of the devbox that is meant: by its id, or by its name, of which the newest living one is taken.

    With `ended` the newest that has ended, where none of the name lives. Raises SetupError when there is none.
    """
    if _ID.fullmatch(text):
        return text
    same = [box for box in all_pages(remote, "/v1/devboxes", "devboxes", {}) if box.get("name") == text]
    living = [box["id"] for box in same if box["status"] not in ENDED]
    if len(living) > 1:
        click.echo(f"{len(living)} living boxes have the name {text!r}; the newest is taken: {living[0]}", err=True)
    found = living or [box["id"] for box in same if ended]
    if not found:
        raise SetupError(f"cannot find a living box with the id or name {text!r}; `devboxd boxes list` shows them")
    return str(found[0])


def all_pages(remote: Remote, path: str, name: str, query: dict[str, Any]) -> list[dict[str, Any]]:
    """All pages of a list."""
    found: list[dict[str, Any]] = []
    more = True
    while more:
        after = {"starting_after": found[-1]["id"]} if found else {}
        answer = remote.call("GET", path, query={"limit": 500, **query, **after})
        found += answer[name]
        more = bool(answer["has_more"] and answer[name])
    return found

"""Options that several commands share, and what they stand for: settings, and a server to call."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from devboxd.config import Settings
    from devboxd.remote import Remote

Command = Callable[..., None]


state_option = click.option(
    "--state",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="The server's folder; /var/lib/devboxd if not given.",
)
config_option = click.option(
    "--config",
    type=click.Path(path_type=Path),
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
    """The options of every command that calls a server: `--url`, `--key-file` and `--json`."""
    url = click.option("--url", metavar="URL", help="The server; else DEVBOXD_URL or RUNLOOP_BASE_URL.")
    key = click.option(
        "--key-file",
        type=click.Path(path_type=Path),
        metavar="FILE",
        help="File with the key; else DEVBOXD_KEY or RUNLOOP_API_KEY.",
    )
    return url(key(as_json_option(command)))


def load_settings(config: Path | None = None, **overrides: Any) -> Settings:
    """The settings from all their sources; options that were not given are None. Raises SetupError."""
    from devboxd import config as module

    return module.load(overrides, file=config)


def find_remote(url: str | None, key_file: Path | None) -> Remote:
    """The server of the options, else of the environment. Raises SetupError without a key."""
    from devboxd.remote import Remote

    return Remote.find(url, key_file)


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

"""systemd: the unit for `devboxd serve`, and the word to systemd that the server is ready."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

_UNIT = """\
[Unit]
Description=devboxd, a server of devboxes
After=network-online.target
Wants=network-online.target

[Service]
Type=notify
ExecStart={command}
Restart=always
RestartSec=1
# A stop or restart ends the server alone: the boxes live on and are attached again.
KillMode=process
TimeoutStopSec=15
# The first start may build the default image.
TimeoutStartSec=1800
# The boxes' cgroups belong to devboxd, and a box that runs out of memory is no reason to stop the server.
Delegate=yes
OOMPolicy=continue
TasksMax=infinity
LimitNOFILE=1048576
# A core file of the server would hold keys and what boxes send; nothing it writes is for other users.
LimitCORE=0
UMask=0077
StateDirectory=devboxd
StateDirectoryMode=0700

[Install]
WantedBy=multi-user.target
"""


def unit(arguments: list[str]) -> str:
    """The text of the unit that runs this installation's `devboxd serve` with these arguments."""
    program = Path(sys.argv[0]).absolute()
    command = [str(program)] if os.access(program, os.X_OK) else [sys.executable, "-m", "devboxd.cli"]
    return _UNIT.format(command=" ".join(_quoted(part) for part in [*command, "serve", *arguments]))


def _quoted(part: str) -> str:
    """A word of ExecStart: `%` and `$` mean something there, and spaces need quotes."""
    escaped = part.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%").replace("$", "$$")
    return f'"{escaped}"' if not part or any(sign in part for sign in " \t;'\"\\") else escaped


def notify(message: str, environ: Mapping[str, str] = os.environ) -> bool:
    """Tell systemd, `READY=1` for example; False when it does not listen, which is no error."""
    address = environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if address.startswith("@"):
        address = "\0" + address[1:]
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        try:
            channel.sendto(message.encode(), address)
        except OSError:
            return False
    return True

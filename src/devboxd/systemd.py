"""systemd: the unit for `devboxd serve`, what the server tells systemd, and what it asks."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

_ASK_S = 8.0
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
# A server whose event loop stands still this long is started anew. It holds nothing up before it is ready.
WatchdogSec=60
# A stop or restart ends the server alone: the boxes live on and are attached again. When the whole system goes down,
# the server asks systemd for that, and puts them to sleep first.
KillMode=process
TimeoutStopSec=45
# The first start may build the default image.
TimeoutStartSec=1800
# The boxes' cgroups belong to devboxd, and a box that runs out of memory is no reason to stop the server.
Delegate=yes
OOMPolicy=continue
TasksMax=infinity
LimitNOFILE=1048576
# A core file of the server would hold keys and what boxes send; nothing it writes is for other users. Boxes inherit
# the limit: by 1 no program of the host is started for a core either, which 0 would not keep from that.
LimitCORE=1
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


async def watchdog(environ: Mapping[str, str] = os.environ) -> None:
    """Tell systemd that the event loop turns, thrice in the time after which it would lose patience.

    Returns at once where systemd does not ask this process for that.
    """
    patience_s = int(environ.get("WATCHDOG_USEC", "0")) / 1e6
    while patience_s and environ.get("WATCHDOG_PID", str(os.getpid())) == str(os.getpid()):
        notify("WATCHDOG=1", environ)
        await asyncio.sleep(patience_s / 3)


def started(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether systemd started this program, perhaps by a script, and no login or job of another service did.

    Those have sessions of their own, also where they share the cgroup of the service that began them.
    """
    return environ.get("SYSTEMD_EXEC_PID") == str(os.getsid(0))


def machine_stops(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether systemd takes the whole machine down, to halt or to start it anew; False where there is no systemd.

    Every way down goes through shutdown.target, which waits in the queue until services like this one have stopped.
    """
    command = ["systemctl", "show", "--property=ActiveState,Job", "shutdown.target"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=_ASK_S, check=False, env=dict(environ))
    except (OSError, subprocess.TimeoutExpired):
        return False
    shown = dict(line.partition("=")[::2] for line in told.stdout.splitlines())
    return shown.get("ActiveState") == "active" or shown.get("Job", "") not in ("", "0")

"""The bounds that disks get when their server dies: by a process that waits for that and does nothing else."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from pathlib import Path

_WAIT = """
echo $$ >"$1"
while read -r line; do last=$line; done
for pair in $last; do echo "${pair#*=}" >"/sys/fs/ext4/${pair%=*}/reserved_clusters"; done
"""
"""The pipe ends with the server, however that ends. A line that was cut counts for nothing: the one before does."""
_COARSE = 256
"""Blocks; what differs by less is not told anew."""


class Fallback:
    """The process of one server, from the first bounds that it is told.

    It enters the cgroup whose file of processes this is: what kills all of the server's unit shall leave it alive.
    """

    def __init__(self, processes: Path) -> None:
        self._processes = processes
        self._process: subprocess.Popen[bytes] | None = None
        self._told: dict[str, int] = {}

    def tell(self, kept: Mapping[str, int]) -> None:
        """Have these blocks kept back on these devices of disks, once the server is dead. Raises OSError.

        Where the process has died meanwhile there is another one.
        """
        coarse = {device: blocks // _COARSE for device, blocks in kept.items()}
        lives = self._process is not None and self._process.poll() is None
        if lives and coarse == self._told:
            return
        if not lives:
            null, command = subprocess.DEVNULL, ("/bin/sh", "-c", _WAIT, "sh", self._processes)
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=null, stderr=null, start_new_session=True
            )
        if self._process is not None and self._process.stdin is not None:
            line = " ".join(f"{device}={blocks}" for device, blocks in kept.items())
            self._process.stdin.write(f"{line}\n".encode())
            self._process.stdin.flush()
        self._told = coarse

    def close(self) -> None:
        """Let the bounds hold now."""
        if self._process is not None:
            self._process.communicate()
            self._process, self._told = None, {}

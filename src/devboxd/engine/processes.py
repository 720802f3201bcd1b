"""Programs that work for the server: what they say is bounded, and none outlives who asked for it."""

from __future__ import annotations

import asyncio
import os
import select
import shutil
import socket
import subprocess
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Sequence

from devboxd.engine.base import EngineError
from devboxd.path_errors import reason

MOST_MEMORY = 1 << 30
"""Bytes of addresses for each program: as much as the smallest box has, for what boxes nest makes programs grow."""
_SAID = 4096
BOUNDED = ("nice", "choom", "--adjust", "500", "--", "prlimit", f"--as={MOST_MEMORY}", "--")
"""The kernel takes such a program before the server, whose place in that order it would inherit."""


def which(program: str) -> str | None:
    """A program's path, also where PATH lacks the folders of root."""
    return shutil.which(program, path=os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin")


async def piped(*commands: Sequence[str], what: str) -> bytes:
    """Run programs, each of which reads what the one before writes; what the last one writes. Raises EngineError.

    Each has at most `MOST_MEMORY`, whatever it reads.
    """
    running: list[Process] = []
    above: int = DEVNULL
    try:
        try:
            for number, command in enumerate(commands):
                reading, writing = (DEVNULL, PIPE) if number == len(commands) - 1 else os.pipe()
                try:
                    running.append(
                        await asyncio.create_subprocess_exec(
                            *BOUNDED, *command, stdin=above, stdout=writing, stderr=PIPE
                        )
                    )
                finally:
                    _close(above, writing)
                    above = reading
        finally:
            _close(above)
        output = running[-1].stdout
        found, *said = await asyncio.gather(output.read() if output else _nothing(), *map(_end_of, running))
        await asyncio.gather(*(process.wait() for process in running))
    except OSError as error:
        raise EngineError(f"cannot {what}: {reason(error)}; {', '.join(c[0] for c in commands)} are needed") from error
    finally:
        for process in running:
            if process.returncode is None:
                process.kill()
                await process.wait()
    if any(process.returncode for process in running):
        words = [line for text in said for line in text.decode(errors="replace").strip().splitlines()[-1:]]
        raise EngineError(f"cannot {what}: {'; '.join(words) or 'no reason was given'}")
    return found


def _close(*descriptors: int) -> None:
    for descriptor in descriptors:
        if descriptor >= 0:
            os.close(descriptor)


async def _nothing() -> bytes:
    return b""


async def _end_of(process: Process) -> bytes:
    """The end of what a process says: it quotes names that a box has chosen, as many as the box likes."""
    end = b""
    while process.stderr is not None and (more := await process.stderr.read(_SAID)):
        end = (end + more)[-_SAID:]
    return end


def run_for(seconds: float, command: list[str], stdin: socket.socket, environment: dict[str, str]) -> int | None:
    """Run a program without outputs; its status, or None when it was killed for taking too long.

    By its pidfd: a wait with a timeout would poll. What it began is in the cgroup of its box, and ends with that.
    """
    null = subprocess.DEVNULL
    process = subprocess.Popen(command, stdin=stdin.fileno(), stdout=null, stderr=null, env=environment)
    pidfd = os.pidfd_open(process.pid)
    try:
        ended = select.poll()  # select() knows no descriptors past 1023
        ended.register(pidfd, select.POLLIN)
        in_time = bool(ended.poll(1000 * seconds))
        if not in_time:
            process.kill()
    finally:
        os.close(pidfd)
    status = process.wait()
    return status if in_time else None

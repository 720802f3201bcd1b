"""A rehearsal in a box that waits: the first command of its devbox shall find everything looked up and loaded.

A box has mounts of its own, so the kernel looks up each program, library and profile anew in each: half of the time
that a first command takes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

import structlog

from devboxd.agent import messages
from devboxd.agent.client import AgentClient, AgentError
from devboxd.agent.protocol import ProtocolError, encode_record
from devboxd.executions.shells import READ_SCRIPT, command_script

_log = structlog.get_logger()
_KEY = "rehearsal"
_PATIENCE_S = 10.0
_MOST_BYTES = 4096


async def rehearse(socket: Path, user: str, environment: Mapping[str, str]) -> None:
    """Run a command that does nothing as commands are run; a box in which that fails is none the worse for it."""
    ended = asyncio.Event()
    try:
        async with asyncio.timeout(_PATIENCE_S):
            agent = await AgentClient.connect(
                socket,
                on_exit=lambda _: ended.set(),
                on_stall=lambda _, __: None,
                on_closed=ended.set,
            )
            try:
                await agent.list()
                record = encode_record(
                    ["bash", "-lc", READ_SCRIPT], environment, user=user, script=command_script(b":")
                )
                with messages.memory("stdout", b"") as stdout, messages.memory("stderr", b"") as stderr:
                    await agent.spawn(_KEY, record, stdout, stderr, None, _MOST_BYTES)
                    await ended.wait()
                await agent.ack(_KEY)
            finally:
                await agent.close()
    except (AgentError, ProtocolError, OSError, TimeoutError) as error:
        _log.warning("a command cannot be rehearsed", socket=str(socket), error=str(error))

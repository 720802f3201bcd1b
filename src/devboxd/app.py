"""The server: its parts started in one visible order, and stopped in the reverse of it.

The port is bound first, so that clients of a server that was restarted find it at once and are told to wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import signal
import socket
from collections.abc import AsyncIterator, Coroutine
from contextlib import AsyncExitStack
from typing import Any

import structlog
import uvloop

from devboxd import boot, services, systemd
from devboxd.concurrency.tasks import Tasks
from devboxd.config import Settings
from devboxd.devboxes.lifecycle import Devboxes
from devboxd.engine.base import EngineError
from devboxd.engine.images import Images
from devboxd.engine.instance import Instance, claim
from devboxd.errors import SetupError
from devboxd.http.guard import bracketed
from devboxd.http.listening import HttpServer
from devboxd.http.once import STOPPING_S
from devboxd.http.operation import Application, Unready, build
from devboxd.http.streams import Closing
from devboxd.resources.accounts import first_start
from devboxd.resources.metrics import ServerMetrics
from devboxd.routes import ROUTES
from devboxd.services import Services
from devboxd.unimplemented import UNIMPLEMENTED

_log = structlog.get_logger()
_LINGER_S = 1.0
"""How long a stopping server still answers, so that clients that come back at once are told to wait."""
_DRAIN_S = 1.5
_SLEEP_S = 5.0
"""How long devboxes may take to fall asleep when the machine stops; what still runs then is ended."""
_M_MMAP_THRESHOLD = -3
_LARGE = 256 * 1024


class Readiness:
    """Why the server cannot run commands now; `state` is None when it can."""

    def __init__(self) -> None:
        self.state: Unready | None = None
        self._tenths = 0
        self.starting("the server is starting")

    def starting(self, reason: str) -> None:
        """Clients shall ask again and again."""
        self.state = Unready(reason, hold_s=1.0)

    def stopping(self) -> None:
        """Clients shall come again when the next server may be there."""
        self.state = Unready("the server stops; it is back soon", hold_s=0.5, retry_after=STOPPING_S)

    def progress(self, done: float, text: str) -> None:
        """Show how far the default image has come; the log tells each tenth."""
        self.starting(f"the default image is being built: {done:.0%}, {text}")
        if done < 1 and int(done * 10) >= self._tenths:
            self._tenths = int(done * 10) + 1
            _log.info("the default image is being built, once for this machine", done=f"{done:.0%}", step=text)


def _give_memory_back() -> None:
    """Let the C library return large pieces to the kernel at once, whatever sizes came before (glibc only)."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE)


def run(settings: Settings, listener: socket.socket) -> int:
    """Serve on this socket until SIGTERM or SIGINT; the boxes go on. Returns the exit code.

    Raises SetupError when the folder is not to be had, or the machine refuses what boxes need.
    """
    _give_memory_back()
    instance = claim(settings.state)
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve(settings, instance, listener))
    except EngineError as error:
        raise SetupError(str(error)) from error
    finally:
        instance.close()
    return 0


async def _serve(settings: Settings, instance: Instance, listener: socket.socket) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with AsyncExitStack() as stack:
        background = Tasks()
        stack.push_async_callback(background.close)
        background.start(systemd.watchdog(), "systemd's watchdog")
        images = Images(settings)
        parts = await stack.enter_async_context(services.build(settings, instance, images))
        ready, engine = Readiness(), parts.engine
        parts.metrics.register(
            ServerMetrics(settings.state, lambda: ready.state is None, lambda: engine.trouble is None)
        )
        application = build(
            ROUTES,
            parts.all(),
            store=parts.store,
            settings=settings,
            ready=lambda: ready.state,
            healthy=lambda: ready.state or (Unready(engine.trouble, hold_s=1.0) if engine.trouble else None),
            requests=parts.requests,
            absent=UNIMPLEMENTED,
        )
        await first_start(parts.store, settings.state)
        async with _listening(listener, application, parts.closing, ready) as serving:
            await _until_stopped(stop, serving, _start(settings, images, parts, ready, stack))
            systemd.notify("STOPPING=1")
            _log.info("stopping")


async def _until_stopped(
    stop: asyncio.Event, serving: asyncio.Future[object], start: Coroutine[Any, Any, object]
) -> None:
    """Start, and return when the server shall stop. Raises what ended the start or the serving."""
    starting: asyncio.Future[object] = asyncio.ensure_future(start)
    stopping: asyncio.Future[object] = asyncio.ensure_future(stop.wait())
    try:
        await asyncio.wait({starting, stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
        if starting.done():
            starting.result()
            await asyncio.wait({stopping, serving}, return_when=asyncio.FIRST_COMPLETED)
        if serving.done():
            serving.result()
    finally:
        starting.cancel()
        stopping.cancel()
        await asyncio.gather(starting, stopping, return_exceptions=True)


async def _start(settings: Settings, images: Images, parts: Services, ready: Readiness, stack: AsyncExitStack) -> None:
    """Everything between a bound port and the first command: image, engine, reconciliation."""
    await images.ensure_default(ready.progress)
    ready.starting("the server is starting: it looks for the boxes that live")
    await parts.engine.open(await parts.devboxes.kept())
    stack.push_async_callback(parts.engine.close)
    stack.push_async_callback(_part, parts.devboxes)
    stack.push_async_callback(parts.snapshots.close)
    await parts.devboxes.open(boot.interruption(settings.state))
    await parts.snapshots.open()
    boot.remember(settings.state)
    ready.state = None
    systemd.notify("READY=1")
    _log.info("ready", url=f"http://{bracketed(settings.host)}:{settings.port}", state=str(settings.state))


async def _part(devboxes: Devboxes) -> None:
    """Leave the boxes, which go on for the next server; but not where the machine itself stops."""
    if await asyncio.to_thread(systemd.machine_stops):
        await devboxes.sleep("the host shuts down; its processes end, its disk is kept: resume it", _SLEEP_S)
    else:
        await devboxes.close()


@contextlib.asynccontextmanager
async def _listening(
    listener: socket.socket, application: Application, closing: Closing, ready: Readiness
) -> AsyncIterator[asyncio.Future[object]]:
    """Serve HTTP during the block; afterwards end streams and held answers in order, then close the port."""
    server = HttpServer(application, listener)
    serving: asyncio.Future[object] = asyncio.ensure_future(server.run())
    try:
        yield serving
    finally:
        ready.stopping()
        closing.begin()
        # The linger is not a wait for something: it is the time in which clients come back.
        await asyncio.gather(application.drain(_DRAIN_S), asyncio.sleep(_LINGER_S))
        listener.close()
        server.stop()  # type: ignore[no-untyped-call]
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(1):
                await serving
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)

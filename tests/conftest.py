"""Fixtures of all tests: a real server for each worker, real boxes, a small client."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import uvloop

from support.api import Api
from support.server import Server

_SEED = "CRASH_SEED"
"""Names the seed of tests that vary moments by chance; workers inherit it."""
_MAKES_BOXES = {"server", "own_server", "box", "api"}


def pytest_configure() -> None:
    """A new seed each run, unless one is to be repeated; the event loop of the server, which lacks what others have.

    Signals as on a terminal: what begins the tests in the background has some ignored, and programs inherit that.
    """
    for number in (signal.SIGHUP, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())
    os.environ.setdefault(_SEED, str(secrets.randbits(32)))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how to repeat this run."""
    terminalreporter.write_line(f"{_SEED}={os.environ[_SEED]} repeats the moments that this run chose by chance")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests that make boxes; without root they are skipped, with the reason in words."""
    for item in items:
        if _MAKES_BOXES & set(getattr(item, "fixturenames", ())):
            item.add_marker("box")
        if os.geteuid() != 0 and item.get_closest_marker("box"):
            item.add_marker(pytest.mark.skip(reason="making boxes needs root"))


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """A folder of the test's own that goes with it, also when it fails: a pool of disks in it takes gigabytes."""
    folder = Path(tempfile.mkdtemp(prefix="devboxd-")).resolve()
    try:
        yield folder
    finally:
        subprocess.run(["chattr", "-R", "-f", "-a", folder], check=False)  # journals can only be appended to
        shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="session")
def server() -> Iterator[Server]:
    """A running server for all tests of a worker: do not stop it, see `own_server`."""
    server = Server()
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture
def own_server() -> Iterator[Server]:
    """A running server for one test, which may kill and restart it."""
    server = Server()
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture(scope="session")
def api(server: Server) -> Iterator[Api]:
    """A client of the worker's server."""
    with server.api() as client:
        yield client


@pytest.fixture(scope="module")
def box(api: Api) -> Iterator[str]:
    """The id of a running devbox that the tests of a module share."""
    identity = api.create(name="shared by a module's tests")
    yield identity
    api.shutdown(identity)

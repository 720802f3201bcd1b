"""A real engine with a state folder, an instance and a network of its own, with each runtime."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from devboxd.config import Settings
from devboxd.engine.base import Image
from devboxd.engine.images import Images
from devboxd.engine.oci import OciEngine
from support.engine import Box, Host
from support.world import World

PROBE = Path(__file__).with_name("probe.c")


@pytest.fixture(scope="session")
def probe() -> Iterator[Path]:
    """A layer with a static program that makes single system calls."""
    with tempfile.TemporaryDirectory() as folder:
        layer = Path(folder)
        layer.chmod(0o755)
        target = f"{os.uname().machine}-linux-musl"
        compiler = [sys.executable, "-m", "ziglang", "cc", "-target", target, "-static", "-O1"]
        subprocess.run([*compiler, "-o", str(layer / "probe"), str(PROBE)], check=True)
        yield layer


@pytest.fixture(scope="session")
async def image(probe: Path) -> Image:
    """The default image with the probe on top."""
    default = await Images(Settings()).ensure_default(lambda done, text: None)
    return Image("test", (probe, *default.layers))


@pytest.fixture(params=["crun", "runc"], scope="session")
def runtime(request: pytest.FixtureRequest) -> str:
    if shutil.which(request.param) is None:
        pytest.skip(f"{request.param} is not installed")
    return str(request.param)


@pytest.fixture
async def host(image: Image, runtime: str, tmp_path: Path) -> AsyncIterator[Host]:
    """An engine of the test's own."""
    async with Host(image, tmp_path / "state", runtime=runtime) as host:
        yield host


@pytest.fixture
async def engine(host: Host) -> OciEngine:
    return host.engine


@pytest.fixture(scope="module")
async def shared(image: Image, runtime: str) -> AsyncIterator[Box]:
    """A box that the tests of a module share; its gigabytes of disk go with the module, whatever failed."""
    with tempfile.TemporaryDirectory(prefix="devboxd-shared-", dir="/var/tmp") as folder:
        async with Host(image, Path(folder) / "state", runtime=runtime) as host:
            yield await host.box()


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def world(tmp_path: Path, stack: contextlib.ExitStack) -> World:
    """A host with a network of its own."""
    return World(tmp_path, stack)

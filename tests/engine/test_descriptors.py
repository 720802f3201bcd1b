"""A server with hundreds of boxes has more descriptors than select() can name."""

from __future__ import annotations

import resource
import socket
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from devboxd.engine import processes

OPEN = 1100


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """So many are open that the next one has a number past 1023."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(limits[0], OPEN + 500), limits[1]))
    with ExitStack() as opened:
        for _ in range(OPEN):
            opened.enter_context(open("/dev/null"))
        yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.usefixtures("many_descriptors")
def test_the_runtime_is_awaited_however_many_descriptors_are_open() -> None:
    left, right = socket.socketpair()
    with left, right:
        assert processes.run_for(10, ["/bin/sh", "-c", "exit 3"], left, {}) == 3

"""A devbox that takes all it can get disturbs no neighbour and does not swell the server. How slow it makes them is
measured by scripts/bench_neighbours.py, because a time is no matter of right and wrong."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from support.api import Api
from support.noise import NOISES, measure
from support.server import Server

pytestmark = pytest.mark.box

MIB = 1 << 20


@pytest.fixture(scope="module")
def quiet_server() -> Iterator[Server]:
    """A server that nobody else asks, so that its memory says something; a small cap is reached by a few seconds."""
    server = Server(journal_cap_bytes=str(64 * MIB))
    try:
        yield server.start()
    finally:
        server.stop()


@pytest.fixture(scope="module")
def asking(quiet_server: Server) -> Iterator[Api]:
    with quiet_server.api() as api:
        yield api


@pytest.fixture(scope="module")
def neighbour(asking: Api) -> str:
    return asking.create(name="neighbour")


@pytest.mark.parametrize("kind", NOISES)
def test_beside_a_noisy_devbox_commands_succeed_and_the_server_keeps_its_size(
    quiet_server: Server, asking: Api, neighbour: str, kind: str
) -> None:
    """Every command of the neighbour gives its right output, or `measure` fails."""
    figures = measure(quiet_server, asking, neighbour, kind, rounds=1, seconds=0.4)
    assert len(figures.noisy) >= 40
    assert figures.most - figures.level <= 16 * MIB

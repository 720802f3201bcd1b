"""The OCI runtime is killed in the middle of a create: no half box, nothing left, and the next box is whole."""

from __future__ import annotations

import os
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from devboxd.engine.base import EngineError, Image
from support.engine import Host
from support.runtime import Runtime

pytestmark = [pytest.mark.box, pytest.mark.anyio]
_MOMENTS = 12
_LONGEST_S = {"crun": 0.02, "runc": 0.06}
"""Somewhat more than a create takes."""


@pytest.fixture
def killed(runtime: str, tmp_path: Path) -> Runtime:
    return Runtime(runtime, tmp_path)


@pytest.fixture
async def host(image: Image, killed: Runtime, tmp_path: Path) -> AsyncIterator[Host]:
    async with Host(image, tmp_path / "state", runtime=str(killed.path)) as host:
        yield host


async def test_a_runtime_that_is_killed_leaves_no_half_box(host: Host, killed: Runtime, runtime: str) -> None:
    chance = random.Random(os.environ["CRASH_SEED"])
    neighbour = await host.box()
    whole = host.leftovers()
    moments = [chance.uniform(0, _LONGEST_S[runtime]) for _ in range(_MOMENTS)]
    for moment in ("before", "after", *moments):
        killed.plan(moment)
        with pytest.raises(EngineError, match=rf"cannot start the box dbx_.*: {runtime}.* was ended by signal 9"):
            await host.box()
        assert sorted(host.leftovers()) == sorted(whole), f"{moment} s into its work"
    killed.plan("whole")
    assert await (await host.box()).sh("echo whole") == "whole"
    assert await neighbour.sh("echo on") == "on"

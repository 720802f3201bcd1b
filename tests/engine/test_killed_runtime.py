"""The OCI runtime is killed in the middle of a create: no half box, nothing left, and the next box is whole."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
from pathlib import Path

import pytest

from devboxd.engine.base import EngineError, Image
from support.engine import Host
from support.leftovers import descriptors
from support.runtime import Runtime

pytestmark = [pytest.mark.box, pytest.mark.anyio]
_MOMENTS = 12
_LONGEST_S = {"crun": 0.02, "runc": 0.06}
"""Somewhat more than a create takes."""


async def test_a_runtime_that_is_killed_leaves_no_half_box(image: Image, runtime: str, tmp_path: Path) -> None:
    chance = random.Random(os.environ["CRASH_SEED"])
    killed = Runtime(runtime, tmp_path)
    held = _namespaces()
    async with Host(image, tmp_path / "state", runtime=str(killed.path)) as host:
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
        links = f"dbx{host.instance.id}"
    assert _namespaces() == held
    assert [name for name in os.listdir("/sys/class/net") if name.startswith(links)] == []


async def test_runtimes_that_hang_are_ended_and_hold_up_no_other_box(image: Image, tmp_path: Path) -> None:
    hangs = Runtime("crun", tmp_path)
    async with Host(image, tmp_path / "state", runtime=str(hangs.path)) as host:
        whole = host.leftovers()
        hangs.plan("never")
        stuck = [asyncio.create_task(host.box()) for _ in range(2 * (os.cpu_count() or 1))]
        while len(list(host.instance.directory.glob("boxes/*/pid"))) < len(stuck):  # noqa: ASYNC110
            await asyncio.sleep(0.01)  # the files of a program that tells nobody
        hangs.plan("whole")
        late = await host.box()
        assert await late.sh("echo whole") == "whole"
        assert not any(task.done() for task in stuck), "the box waited until they had ended"
        for task in stuck:
            with pytest.raises(EngineError, match="takes longer than 10 s"):
                await task
        await host.destroy_all()
        assert sorted(host.leftovers()) == sorted(whole)
        assert _running(hangs.path) == []


async def test_a_kernel_without_room_for_filters_is_asked_again(image: Image, runtime: str, tmp_path: Path) -> None:
    full = Runtime(runtime, tmp_path)
    async with Host(image, tmp_path / "state", runtime=str(full.path)) as host:
        full.plan("full")
        assert await (await host.box()).sh("echo whole") == "whole"


def _running(program: Path) -> list[str]:
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if str(program) in Path("/proc", pid, "cmdline").read_text():
                found.append(pid)
    return found


def _namespaces() -> list[str]:
    """Namespaces that the server keeps alive; those of a box that was never made have no process."""
    return sorted(target for target in descriptors("self").values() if target.startswith(("net:[", "user:[", "mnt:[")))

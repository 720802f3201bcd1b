"""Which boxes let the others go first: by figures, in files as a kernel shows them, and by the kernel itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devboxd.agent import pulse_binary
from devboxd.engine import cgroups
from devboxd.engine.turns import Turns, behind
from support.engine import Host
from support.until import eventually

_AMOUNTS = st.dictionaries(st.sampled_from("abcdef"), st.floats(0, 64), min_size=1)


@pytest.mark.parametrize(
    ("used", "before", "chosen"),
    [
        ({}, "", ""),
        ({"a": 0.0, "b": 0.0}, "", ""),
        ({"a": 2.0, "b": 0.4}, "", "a"),
        ({"a": 1.0, "b": 0.6, "c": 0.4}, "", "ab"),
        ({"a": 1.0, "b": 0.5}, "b", "ab"),
        ({"a": 1.0, "b": 0.4}, "b", "a"),
        ({"b": 1.0}, "a", "b"),
    ],
)
def test_those_that_use_most_let_the_others_go_first(used: dict[str, float], before: str, chosen: str) -> None:
    assert behind(used, before) == set(chosen)


@given(_AMOUNTS, st.sets(st.sampled_from("abcdef")))
def test_the_busiest_is_among_them_and_who_gets_little_is_not(used: dict[str, float], before: set[str]) -> None:
    chosen, most = behind(used, before), max(used.values())
    assert chosen == {box for box in used if used[box] and (box in chosen)}
    for box, amount in used.items():
        assert box in chosen or amount < most * 0.6 or not amount
        assert box not in chosen or amount >= most / 2


@given(_AMOUNTS, st.sets(st.sampled_from("abcdef")))
def test_the_same_figures_again_change_nothing(used: dict[str, float], before: set[str]) -> None:
    chosen = behind(used, before)
    assert behind(used, chosen) == chosen


@pytest.fixture
def groups(tmp_path: Path) -> cgroups.Cgroups:
    """Version 2 in plain files, with the boxes `busy` and `calm`."""
    (tmp_path / "cgroup.controllers").write_text("cpu memory pids")
    for name in ("", "busy", "calm"):
        folder = tmp_path / "devboxd-t/boxes" / name
        folder.mkdir(parents=True)
        (folder / "cpu.idle").write_text("0")
    return cgroups.find("t", tmp_path)


def uses(groups: cgroups.Cgroups, busy: float, calm: float) -> None:
    """Set the seconds that the boxes have used so far."""
    for box, seconds in (("busy", busy), ("calm", calm), ("", busy + calm)):
        (groups.tops()[0] / "boxes" / box / "cpu.stat").write_text(f"usage_usec {int(seconds * 1e6)}\n")


def marks(groups: cgroups.Cgroups) -> str:
    return "".join((groups.tops()[0] / "boxes" / box / "cpu.idle").read_text() for box in ("busy", "calm"))


def beat_on(turns: Turns) -> set[int]:
    """The processors on each of which a process of the pulse wakes up, as soon as it is on all or none."""
    processors = os.sched_getaffinity(0)
    deadline = time.monotonic() + 30
    while True:
        found = {processor for one in map(_affinity, _children(turns)) if len(one) == 1 for processor in one}
        if turns._pulse is None or found == processors:
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.01)


def _children(turns: Turns) -> list[int]:
    found = []
    for path in Path("/proc").glob("[0-9]*/stat") if turns._pulse is not None else ():
        with contextlib.suppress(OSError):
            parent = int(path.read_text().rpartition(") ")[2].split()[1])
            found += [int(path.parent.name)] if parent == turns._pulse.pid else []
    return found


def _affinity(pid: int) -> set[int]:
    with contextlib.suppress(OSError):
        return os.sched_getaffinity(pid)
    return set()


def look(turns: Turns) -> None:
    turns.choose(turns.crowded())


@pytest.fixture
def turns(groups: cgroups.Cgroups) -> Iterator[Turns]:
    turns = Turns(groups)
    yield turns
    turns.choose(crowded=False)


def test_a_box_is_behind_while_processors_are_wanted(groups: cgroups.Cgroups, turns: Turns) -> None:
    uses(groups, 100, 1)
    look(turns)
    for busy, calm, found, beats in [
        (1000, 2, "00", False),
        (2000, 2, "10", False),  # nobody is there to be let go first
        (3000, 3, "10", True),
        (4000, 1004, "11", True),
        (4000, 1004, "00", False),
    ]:
        uses(groups, busy, calm)
        look(turns)
        assert marks(groups) == found
        assert bool(beat_on(turns)) == beats


def test_a_pulse_can_end_at_any_moment() -> None:
    """Also while it is still starting: who ends it waits for that."""
    for number in range(40):
        command = (pulse_binary(), "/dev/null")
        with subprocess.Popen(command, stdin=subprocess.PIPE) as pulse:
            time.sleep(0.0001 * number)  # the moment is what varies here
            pulse.communicate(timeout=30)
        assert pulse.returncode == 0


def test_a_box_that_goes_is_forgotten(groups: cgroups.Cgroups, turns: Turns) -> None:
    for busy in (0, 1000, 2000):
        uses(groups, busy, 0)
        look(turns)
    assert marks(groups) == "10"
    box = groups.tops()[0] / "boxes/busy"
    for file in box.iterdir():
        file.unlink()
    box.rmdir()
    (groups.tops()[0] / "boxes/cpu.stat").write_text("usage_usec 9000000000\n")
    look(turns)
    look(turns)


@pytest.mark.anyio
async def test_a_kernel_without_idle_groups_gets_no_order(groups: cgroups.Cgroups) -> None:
    for file in groups.tops()[0].glob("boxes/**/cpu.idle"):
        file.unlink()
    await Turns(groups).keep()


@pytest.mark.anyio
@pytest.mark.box
async def test_a_box_that_burns_waits_for_the_others_until_it_stops(host: Host) -> None:
    """`order` is what the kernel has been told, of all boxes, of this one and of one that does nothing."""
    folder = cgroups.find(host.instance.id).tops()[0] / "boxes"
    if not (folder / "cpu.idle").exists():
        pytest.skip("this kernel has no idle groups")
    burner, other = await host.box(), await host.box()

    def order() -> list[str]:
        return [(folder / name / "cpu.idle").read_text().strip() for name in ("", burner.id, other.id)]

    assert order() == ["0", "0", "0"]
    await burner.sh("for n in 1 2 3 4; do { while :; do :; done & } ; done >/dev/null 2>&1")
    await eventually(lambda: order() == ["1", "1", "0"])
    assert await other.sh("echo on") == "on"
    await burner.sh("kill -9 -1 || :")
    await eventually(lambda: order() == ["0", "0", "0"])


@pytest.mark.anyio
async def test_a_look_that_fails_is_not_the_last(groups: cgroups.Cgroups, monkeypatch: pytest.MonkeyPatch) -> None:
    turns, looked = Turns(groups), asyncio.Event()

    def again() -> bool:
        looked.set()
        return False

    def fail() -> bool:
        monkeypatch.setattr(turns, "crowded", again)
        raise OSError("no")

    monkeypatch.setattr(turns, "crowded", fail)
    keeping = asyncio.create_task(turns.keep())
    try:
        async with asyncio.timeout(30):
            await looked.wait()
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)

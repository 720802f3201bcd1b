"""When a devbox ends or sleeps by itself: real ones, by a clock of the test's own, without waiting for any of it."""

from __future__ import annotations

import asyncio
import hashlib
import os
import select
import signal
import subprocess
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from devboxd.config import Settings
from devboxd.devboxes import store as rows
from devboxd.devboxes.changes import Life
from devboxd.devboxes.snapshot_store import COMPLETE
from devboxd.devboxes.snapshots import Snapshots
from devboxd.devboxes.states import Event, Work
from devboxd.engine.base import BoxSpec, Image
from devboxd.engine.images import Images
from devboxd.executions import store as execution_rows
from devboxd.http.once import Once
from devboxd.store.db import StoreError
from support.casualties import end_sleeps
from support.engine import Host
from support.house import ACCOUNT, House, SetClock

pytestmark = [pytest.mark.box, pytest.mark.anyio]
NOON_MS = 1_800_000_000_000
LIFE_S = 3600
IDLE_S = 1800
LOOK_S = 5
"""A devbox is looked at so often at least; it is idle from such a look on."""


@pytest.fixture(scope="session")
async def image() -> Image:
    return await Images(Settings()).ensure_default(lambda done, text: None)


@pytest.fixture
async def clock() -> SetClock:
    return SetClock(NOON_MS)


@pytest.fixture
async def state(image: Image, tmp_path: Path) -> AsyncIterator[Path]:
    """A state folder, whose boxes are gone afterwards."""
    yield tmp_path / "state"
    async with Host(image, tmp_path / "state"):
        pass  # it takes all boxes with it
    await asyncio.to_thread(subprocess.run, ["chattr", "-R", "-f", "-a", tmp_path], check=False)


@pytest.fixture
async def house(image: Image, clock: SetClock, state: Path) -> AsyncIterator[House]:
    async with House(image, state, clock) as house:
        yield house


def after_idle(what: str) -> dict[str, Any]:
    return {"idle_time_seconds": IDLE_S, "on_idle": what}


async def outcome(house: House, box: str) -> tuple[str, str | None, str | None]:
    devbox = await house.get(box)
    return devbox.status, devbox.shutdown_reason, devbox.failure_reason


RUNS = ("running", None, None)
SLEEPS = ("suspended", None, None)


async def test_it_ends_at_its_deadline_and_not_before(house: House, clock: SetClock) -> None:
    default, short = await house.create(), await house.create(launch_parameters={"keep_alive_time_seconds": 60})
    await clock.move(59.999)
    assert await outcome(house, short) == RUNS
    await clock.move(0.001)
    ended = await house.reached(short, "shutdown")
    assert (ended.shutdown_reason, ended.end_time_ms) == ("keep_alive_timeout", NOON_MS + 60_000)
    await clock.move(LIFE_S - 60.001)
    assert await outcome(house, default) == RUNS
    await clock.move(0.001)
    ended = await house.reached(default, "shutdown")
    assert (ended.shutdown_reason, ended.end_time_ms) == ("keep_alive_timeout", NOON_MS + 1000 * LIFE_S)


async def test_keep_alive_gives_it_the_whole_time_again(house: House, clock: SetClock) -> None:
    box = await house.create(launch_parameters={"keep_alive_time_seconds": 60})
    for _ in range(3):
        await clock.move(59)
        await house.ask(box, Event.KEEP_ALIVE_ASKED)
    await clock.move(59.999)
    assert await outcome(house, box) == RUNS
    await clock.move(0.001)
    ended = await house.reached(box, "shutdown")
    assert (ended.shutdown_reason, ended.end_time_ms) == ("keep_alive_timeout", NOON_MS + 3 * 59_000 + 60_000)


async def test_asleep_no_deadline_counts_and_a_resume_gives_the_whole_time(house: House, clock: SetClock) -> None:
    box = await house.create()
    await clock.move(LIFE_S - 1)
    await house.ask(box, Event.SUSPEND_ASKED)
    await house.reached(box, "suspended")
    await clock.move(10 * LIFE_S)
    assert await outcome(house, box) == SLEEPS
    await house.ask(box, Event.RESUME_ASKED)
    await house.reached(box, "running")
    await clock.move(LIFE_S - 0.001)
    assert await outcome(house, box) == RUNS
    await clock.move(0.001)
    assert (await house.reached(box, "shutdown")).shutdown_reason == "keep_alive_timeout"


@pytest.mark.parametrize("place", ["after_idle", "lifecycle"])
async def test_an_idle_one_is_shut_down(house: House, clock: SetClock, place: str) -> None:
    """Its deadline does not count beside the policy."""
    policy = after_idle("shutdown")
    launch = {place: policy if place == "after_idle" else {"after_idle": policy}}
    box = await house.create(launch_parameters={"keep_alive_time_seconds": 60, **launch})
    await clock.move(IDLE_S - 0.001)
    assert await outcome(house, box) == RUNS
    await clock.move(0.001 + LOOK_S)
    ended = await house.reached(box, "shutdown")
    assert ended.shutdown_reason == "idle"
    assert ended.end_time_ms is not None
    assert 1000 * IDLE_S <= ended.end_time_ms - NOON_MS <= 1000 * (IDLE_S + LOOK_S)


@pytest.mark.parametrize("place", ["after_idle", "lifecycle"])
async def test_an_idle_one_is_suspended_and_again_after_each_resume(house: House, clock: SetClock, place: str) -> None:
    policy = after_idle("suspend")
    launch = {place: policy if place == "after_idle" else {"after_idle": policy}}
    box = await house.create(launch_parameters=launch)
    for _ in range(2):
        await clock.move(IDLE_S - 0.001)
        assert await outcome(house, box) == RUNS
        await clock.move(0.001 + LOOK_S)
        await house.reached(box, "suspended")
        await clock.move(10 * IDLE_S)
        assert await outcome(house, box) == SLEEPS
        await house.ask(box, Event.RESUME_ASKED)
        await house.reached(box, "running")


async def ends_after_the_whole_idle_time(house: House, clock: SetClock, box: str) -> None:
    """From now on, by its policy, and not a moment before."""
    asked = clock.now_ms()
    await clock.move(IDLE_S - 0.001)
    assert await outcome(house, box) == RUNS
    await clock.move(0.001 + LOOK_S)
    ended = await house.reached(box, "shutdown")
    assert (ended.shutdown_reason, ended.end_time_ms) == ("idle", asked + 1000 * IDLE_S)


async def test_keep_alive_begins_the_idle_time_anew(house: House, clock: SetClock) -> None:
    box = await house.create(launch_parameters={"after_idle": after_idle("shutdown")})
    for _ in range(3):
        await clock.move(IDLE_S - 1)
        await house.ask(box, Event.KEEP_ALIVE_ASKED)
    await ends_after_the_whole_idle_time(house, clock, box)


async def test_a_snapshot_begins_the_idle_time_anew(house: House, clock: SetClock) -> None:
    box = await house.create(launch_parameters={"after_idle": after_idle("shutdown")})
    snapshots = Snapshots(house.store, house.engine, house.devboxes)
    await clock.move(IDLE_S - 1)
    taken = await snapshots.take(ACCOUNT, box, None, None, {}, Once(None, hashlib.sha256()))
    assert (await snapshots.taken(ACCOUNT, taken.id)).status == "complete"
    await ends_after_the_whole_idle_time(house, clock, box)
    await snapshots.delete(ACCOUNT, taken.id)
    await snapshots.close()


async def test_a_deadline_holds_while_no_server_runs(image: Image, clock: SetClock, state: Path) -> None:
    """A first start finds time left, and a second one none."""
    async with House(image, state, clock) as house:
        early, late = await house.create(), await house.create()
    clock.jump(LIFE_S - 1)
    async with House(image, state, clock) as house:
        assert await outcome(house, early) == await outcome(house, late) == RUNS
        await house.ask(late, Event.KEEP_ALIVE_ASKED)
    clock.jump(1)
    async with House(image, state, clock) as house:
        ended = await house.reached(early, "shutdown")
        assert (ended.shutdown_reason, ended.end_time_ms) == ("keep_alive_timeout", NOON_MS + 1000 * LIFE_S)
        await clock.awaited(1)
        await clock.move(LIFE_S - 1.001)
        assert await outcome(house, late) == RUNS
        await clock.move(0.001)
        assert (await house.reached(late, "shutdown")).shutdown_reason == "keep_alive_timeout"


@pytest.mark.parametrize(
    ("what", "status", "reason"), [("shutdown", "shutdown", "idle"), ("suspend", "suspended", None)]
)
async def test_idle_time_goes_on_while_no_server_runs(
    image: Image, clock: SetClock, state: Path, what: str, status: str, reason: str | None
) -> None:
    """What was used, or kept alive, before the server went has the whole time again; also right before."""
    launch = {"after_idle": after_idle(what)}
    async with House(image, state, clock) as house:
        unused, used, kept = [await house.create(launch_parameters=launch) for _ in range(3)]
        await clock.move(IDLE_S - 2 * LOOK_S)
        await house.devboxes.usable(ACCOUNT, used)
        await clock.move(LOOK_S)
        await house.ask(kept, Event.KEEP_ALIVE_ASKED)
    clock.jump(3 * LOOK_S)
    async with House(image, state, clock) as house:
        await clock.awaited(6)
        await clock.move(LOOK_S)
        assert (await house.reached(unused, status)).shutdown_reason == reason
        assert await outcome(house, used) == await outcome(house, kept) == RUNS
        await clock.move(IDLE_S)
        for box in (used, kept):
            assert (await house.reached(box, status)).shutdown_reason == reason


async def test_no_end_by_itself_cuts_a_snapshot_short(
    house: House, clock: SetClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither a deadline nor an idle policy: both wait until it is complete."""
    ended = await house.create(launch_parameters={"keep_alive_time_seconds": 60})
    asleep = await house.create(launch_parameters={"after_idle": after_idle("suspend")})
    snapshots = Snapshots(house.store, house.engine, house.devboxes)
    snapshot, taken = house.engine.snapshot, asyncio.Event()

    async def late(*names: str) -> None:
        await taken.wait()
        await snapshot(*names)

    monkeypatch.setattr(house.engine, "snapshot", late)
    once = Once(None, hashlib.sha256())
    begun = [await snapshots.take(ACCOUNT, box, None, None, {}, once) for box in (ended, asleep)]
    await clock.move(2 * IDLE_S)
    assert [await outcome(house, box) for box in (ended, asleep)] == [RUNS, RUNS]
    taken.set()
    for one in begun:
        assert (await snapshots.taken(ACCOUNT, one.id)).status == COMPLETE
    assert (await house.reached(ended, "shutdown")).shutdown_reason == "keep_alive_timeout"
    await clock.move(IDLE_S + LOOK_S)
    assert (await house.reached(asleep, "suspended")).failure_reason is None
    await snapshots.close()


async def test_an_end_that_was_told_just_before_the_box_ends_counts(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    box = await house.create()
    row = await house.executions.start(box, "sleep 7303; exit 7")
    in_service, record, stop = house.executions.box(box), house.engine._record(box), house.engine.stop
    assert in_service is not None
    assert record is not None
    agent = in_service.agent

    async def stopping(box_id: str) -> None:
        monkeypatch.setattr(house.engine, "stop", stop)
        end_sleeps(box_id, "7303")
        select.select([agent._socket], [], [], 60)  # without a turn for whoever would read it
        pidfd = os.pidfd_open(record.pid)
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        select.select([pidfd], [], [], 60)
        os.close(pidfd)
        await stop(box_id)

    monkeypatch.setattr(house.engine, "stop", stopping)
    await house.ask(box, Event.SUSPEND_ASKED)
    await house.reached(box, "suspended")
    found = await house.store.read(lambda connection: execution_rows.by_id(connection, row.id))
    assert found is not None
    assert (found.status, found.exit_status) == ("completed", 7)


async def test_one_that_cannot_be_written_down_leaves_no_box(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its box is made while its row is written."""
    kept = await house.create()
    made, removed = asyncio.Event(), asyncio.Event()
    create, destroy, write = house.engine.create, house.engine.destroy, house.store.write

    async def creating(spec: BoxSpec) -> None:
        await create(spec)
        made.set()

    async def destroying(box: str) -> None:
        await destroy(box)
        removed.set()

    async def refusing(*_: Any, **__: Any) -> Any:
        await made.wait()
        raise StoreError("cannot write to the store: a disk that is full")

    monkeypatch.setattr(house.engine, "create", creating)
    monkeypatch.setattr(house.engine, "destroy", destroying)
    monkeypatch.setattr(house.store, "write", refusing)
    with pytest.raises(StoreError, match="a disk that is full"):
        await house.create()
    monkeypatch.setattr(house.store, "write", write)
    counted = next(family for family in house.devboxes.collect() if family.name == "devboxd_devboxes")
    assert {sample.labels["status"]: sample.value for sample in counted.samples if sample.value} == {"running": 1}
    await removed.wait()
    assert set(await house.engine.boxes()) == {kept}


async def test_nothing_of_one_is_written_before_its_row(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    attached = asyncio.Event()
    attach, write = house.executions.attach, house.store.write

    async def attaching(*arguments: Any) -> None:
        await attach(*arguments)
        attached.set()

    async def late(*arguments: Any, **options: Any) -> Any:
        monkeypatch.setattr(house.store, "write", write)
        await attached.wait()
        for _ in range(100):
            await asyncio.sleep(0)  # a turn for whoever would write too early
        return await write(*arguments, **options)

    monkeypatch.setattr(house.executions, "attach", attaching)
    monkeypatch.setattr(house.store, "write", late)
    box = await house.create()
    row = await house.store.read(lambda connection: rows.get(connection, box))
    assert row == await house.get(box)
    assert row is not None
    assert [step.status for step in row.transitions] == ["provisioning", "initializing", "running"]


async def test_each_work_of_the_table_is_performed_once(house: House) -> None:
    """In one life with everything in it, by the real supervisor; the server wrote each effect once, too."""
    performed: Counter[Work] = Counter()
    performers = house.devboxes._supervisor.performers
    for work, perform in list(performers.items()):

        async def counted(life: Life, work: Work = work, perform: Any = perform) -> None:
            performed[work] += 1
            await perform(life)

        performers[work] = counted
    box = await house.create(file_mounts={"f": "x"}, entrypoint="sleep 1000")
    await house.ask(box, Event.SUSPEND_ASKED)
    await house.reached(box, "suspended")
    before = dict.fromkeys([Work.BOOT, Work.PREPARE, Work.RUN_ENTRYPOINT, Work.SUSPEND], 1)
    assert {work: performed[work] for work in before} == before
    assert (await house.get(box)).boots == 0
    await house.ask(box, Event.RESUME_ASKED)
    await house.reached(box, "running")
    assert (await house.get(box)).boots == 1
    await house.ask(box, Event.SHUTDOWN_ASKED)
    while not (await house.get(box)).disk_freed:  # noqa: ASYNC110 (nothing is told when a disk is free)
        await asyncio.sleep(0.01)
    assert performed == Counter(
        {Work.BOOT: 2, Work.PREPARE: 1, Work.RUN_ENTRYPOINT: 2, Work.SUSPEND: 1, Work.STAY_SUSPENDED: 1, Work.FREE: 1}
    )

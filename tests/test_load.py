"""Many of everything: executions in one box, executions in the store, devboxes one after the other."""

from __future__ import annotations

import asyncio
import os
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from functools import partial
from typing import Any

import msgspec
import pytest
from sqlalchemy import Connection, insert

from devboxd.devboxes import store as devboxes
from devboxd.devboxes.states import Status
from devboxd.devboxes.store import Devbox
from devboxd.devboxes.views import LaunchParameters, StateTransition
from devboxd.executions.store import Execution
from devboxd.ids import new_id
from devboxd.store.db import FILE_NAME, Store
from devboxd.store.schema import executions
from support.api import Api
from support.disks import READY, volumes_of
from support.leftovers import descriptors, leftovers
from support.raw import exchange, request
from support.server import Server, own_memory
from support.until import until

pytestmark = [pytest.mark.box, pytest.mark.timeout(1800)]

MIB = 1 << 20
MANY = int(os.environ.get("MANY", "3000"))
"""Executions in one box; `MANY=10000` is the whole of it."""
CHURN = int(os.environ.get("CHURN", "150"))
"""Rounds of create, execute and shutdown; `CHURN=2000` is the whole of it."""
AT_ONCE = 16
PER_BOX = 256


@pytest.fixture(scope="module")
def loaded() -> Iterator[Server]:
    """A server for these tests alone: its memory and descriptors are counted."""
    server = Server()
    try:
        yield server.start()
    finally:
        server.stop()


async def _each(server: Server, bodies: list[tuple[str, Any]], at_once: int) -> list[tuple[int, Any]]:
    """POST all of these, so many at once, each worker on a connection of its own; the answers in their order."""
    answers: list[tuple[int, Any]] = [(0, None)] * len(bodies)
    numbers = iter(range(len(bodies)))

    async def work() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        for number in numbers:
            path, body = bodies[number]
            answers[number] = await exchange(reader, writer, request(server, "POST", path, body))
        writer.close()

    await asyncio.gather(*(work() for _ in range(at_once)))
    return answers


# in one box


def test_thousands_of_executions_in_one_box(loaded: Server) -> None:
    with loaded.api() as api:
        box = api.create()
        agent = loaded.agent(box)
        path = f"/v1/devboxes/{box}/execute"
        asyncio.run(_executed(loaded, path, 500))
        files = [loaded.descriptors(), len(os.listdir(f"/proc/{agent}/fd"))]
        memory = [loaded.memory(), own_memory(agent)]
        begun = time.monotonic()
        identities = asyncio.run(_executed(loaded, path, MANY))
        took = time.monotonic() - begun
        grown = [loaded.memory() - memory[0], own_memory(agent) - memory[1]]
        print(
            f"{MANY} executions: {MANY / took:.0f} per second, server {grown[0] >> 10} KiB, agent {grown[1] >> 10} KiB"
        )
        until(lambda: loaded.descriptors() <= files[0] + 1, "descriptors of the server come back")
        assert len(os.listdir(f"/proc/{agent}/fd")) == files[1]
        assert grown[0] < 16 * MIB
        assert grown[1] < MIB
        for number in (0, MANY // 2, MANY - 1):
            assert api.execution(box, identities[number])["stdout"] == f"{number}\n"
        logs = api.call("GET", f"/v1/devboxes/{box}/logs")["logs"]
        assert len(logs) == 1000
        assert {entry["cmd_id"] for entry in logs} <= set(identities[-600:])
        api.shutdown(box)


async def _executed(server: Server, path: str, count: int) -> list[str]:
    """Run so many commands, and check each; their ids, in the order of their commands."""
    bodies = [(path, {"command": f"echo {n}; exit {n % 100}"}) for n in range(count)]
    answers = await _each(server, bodies, AT_ONCE)
    for number, (status, view) in enumerate(answers):
        assert status == 200, view
        assert (view["status"], view["stdout"], view["exit_status"]) == ("completed", f"{number}\n", number % 100)
    return [view["execution_id"] for _, view in answers]


def test_five_hundred_at_once_start_up_to_the_limit_and_none_is_lost(loaded: Server) -> None:
    with loaded.api() as api:
        box = api.create()
        api.output(box, "mkfifo gate")
        path = f"/v1/devboxes/{box}/execute_async"
        bodies = [(path, {"command": f"read _ < gate; echo {number}"}) for number in range(500)]
        answers = asyncio.run(_each(loaded, bodies, 500))
        begun = {number: view["execution_id"] for number, (status, view) in enumerate(answers) if status == 200}
        refused = [view for status, view in answers if status != 200]
        assert len(begun) == PER_BOX
        for error in refused:
            assert error["code"] == 429, error
            assert f"{PER_BOX} run there, the limit" in error["message"]
        api.call("POST", f"/v1/devboxes/{box}/executions/{begun[max(begun)]}/kill")
        killed = begun.pop(max(begun))
        assert api.wait(box, killed)["exit_status"] == 143
        api.output(box, ": > gate")
        for number, execution in begun.items():
            view = api.wait(box, execution)
            assert (view["stdout"], view["exit_status"]) == (f"{number}\n", 0)
        assert api.output(box, "echo there is room") == "there is room\n"
        api.shutdown(box)


# in the store


def test_what_has_ended_slows_nothing_down(own_server: Server) -> None:
    """The same answers with 1,000 and 100,000 executions; what each took is printed, `store/test_plans.py` holds it."""
    with own_server.api() as api:
        account = api.call("GET", "/v1/accounts/me")["id"]
        box = api.create(name="the living one")
        first = api.run(box, "echo first")["execution_id"]
    for added, in_all in ((1000, 1000), (99_000, 100_000)):
        own_server.terminate()
        newest = asyncio.run(_remembered(own_server, account, box, added))
        begun = time.perf_counter()
        own_server.start(120)
        took = {"start": time.perf_counter() - begun}
        with own_server.api() as api:
            took |= _asked(api, box, first, newest, 1 + in_all // 100)
        print(in_all, {what: f"{1000 * seconds:.1f} ms" for what, seconds in took.items()})


def _asked(api: Api, box: str, first: str, newest: str, boxes: int) -> dict[str, float]:
    """The median time of each question, whose answer must be right."""
    took: dict[str, float] = {}

    def ask(what: str, method: str, path: str, body: Any = None, **query: str) -> Any:
        times, answer = [], None
        for _ in range(5):
            begun = time.perf_counter()
            answer = api.call(method, path, body, params=query)
            times.append(time.perf_counter() - begun)
        took[what] = statistics.median(times)
        return answer

    path = f"/v1/devboxes/{box}"
    assert ask("execute", "POST", path + "/execute", {"command": "echo new"})["stdout"] == "new\n"
    assert ask("retrieve", "GET", f"{path}/executions/{newest}")["exit_status"] == 7
    assert ask("retrieve the first", "GET", f"{path}/executions/{first}")["stdout"] == "first\n"
    assert [entry["message"] for entry in ask("logs", "GET", path + "/logs")["logs"][-2:]] == ["-> echo new", "new"]
    rare = ask("logs of a shell", "GET", path + "/logs", shell_name="rare")["logs"]
    assert {entry["message"] for entry in rare} == {"-> echo 1"}
    assert ask("list", "GET", "/v1/devboxes")["total_count"] == boxes
    running = ask("list running", "GET", "/v1/devboxes", status="running")["devboxes"]
    assert [view["id"] for view in running] == [box]
    return took


async def _remembered(server: Server, account: str, box: str, count: int) -> str:
    """Put ended executions into the store of a server that is down, half of them in `box`; the id of the newest."""
    store = Store.open(server.state / FILE_NAME)
    try:
        others = [_ended_devbox(account) for _ in range(count // 100)]
        ended = [_ended_execution(box if n % 2 else others[n % len(others)].id, n) for n in range(count)]
        await store.write(lambda c: [devboxes.add(c, other) for other in others])
        for start in range(0, count, 5000):
            await store.write(partial(_insert, [msgspec.structs.asdict(row) for row in ended[start : start + 5000]]))
    finally:
        store.close()
    return ended[-1].handle


def _insert(values: list[dict[str, Any]], connection: Connection) -> None:
    connection.execute(insert(executions), values)


def _ended_devbox(account: str) -> Devbox:
    return Devbox(
        new_id("dbx"), account, "ended", Status.SHUTDOWN, 1, _now(), 3, None, "api_shutdown",
        [StateTransition("shutdown", 2)], {}, LaunchParameters(), {}, {}, None, True, True, False,
    )  # fmt: skip


def _ended_execution(box: str, number: int) -> Execution:
    own, shell = new_id("exe"), "rare" if number == 1 else "common" if number % 3 == 0 else None
    return Execution(
        own, box, own, "user", f"echo {number}", shell, False, "completed",
        7, None, 0, 0, False, False, 0, False, _now(), _now(),
    )  # fmt: skip


def _now() -> int:
    return time.time_ns() // 1_000_000


# one after the other


def test_devboxes_that_come_and_go_leave_nothing(loaded: Server) -> None:
    """Descriptors, mounts, cgroups, links, namespaces and memory are as after the first of them."""
    asyncio.run(_churned(loaded, 20))
    before, memory = _settled(loaded), loaded.memory()
    begun = time.monotonic()
    asyncio.run(_churned(loaded, CHURN))
    took, after = time.monotonic() - begun, _settled(loaded)
    grown = loaded.memory() - memory
    print(f"{CHURN} devboxes in {took:.0f} s: {after}, memory {grown / MIB:+.1f} MiB")
    assert after == before
    assert grown < 16 * MIB


async def _churned(server: Server, rounds: int) -> None:
    numbers = iter(range(rounds))

    async def work() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)

        async def post(path: str, body: Any = None) -> Any:
            status, view = await exchange(reader, writer, request(server, "POST", path, body))
            assert status == 200, view
            return view

        for number in numbers:
            view = await post("/v1/devboxes/create_and_await_running", {})
            path = f"/v1/devboxes/{view['id']}"
            while view["status"] != "running":
                view = await post(path + "/wait_for_status", {"statuses": ["running"]})
            view = await post(path + "/execute", {"command": f"echo {number}"})
            assert view["stdout"] == f"{number}\n"
            await post(path + "/shutdown")
        writer.close()

    await asyncio.gather(*(work() for _ in range(4)))


def _settled(server: Server) -> dict[str, int]:
    """What is held once all devboxes are freed and the pool is full: it does not change any more."""
    held: list[dict[str, int]] = []
    until(lambda: not os.listdir(server.boxes), "all devboxes are freed", 120)
    until(lambda: held.append(_held(server)) or (len(held) > 10 and len({str(h) for h in held[-10:]}) == 1), "at rest")
    return held[-1]


def _held(server: Server) -> dict[str, int]:
    """How much of each kind the server has on the machine."""
    kinds = Counter(text.split()[0] for text in leftovers(server.state))
    targets = descriptors(server.pid).values()
    return {
        **kinds,
        "descriptors": len(targets),
        "namespaces": len({target for target in targets if target.startswith(("net:", "user:", "mnt:"))}),
        "disks": sum(not name.startswith(READY) for name in os.listdir(server.state / "disks")),
        "volumes": len(volumes_of(server.state)),
    }

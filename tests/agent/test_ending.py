"""END of an execution: whom a kill takes along, whom it spares, and that the EXIT comes after the last of them."""

from pathlib import Path

import pytest

from devboxd.agent.protocol import Scope

pytestmark = [pytest.mark.anyio, pytest.mark.box]

WAITED, SPARED = "sleep 5361", "sleep 5362"
_PYTHON = f"""python3 -c '
import subprocess
subprocess.Popen("{SPARED}".split(), stdout=-3, stderr=-3, start_new_session=True)
subprocess.run(["sh", "-c", "{WAITED}; true"])'"""
_RESETS = f"""python3 -c '
import signal, subprocess
subprocess.run(
    "{SPARED}".split(), stdout=-3, stderr=-3,
    preexec_fn=lambda: [signal.signal(n, signal.SIG_DFL) for n in (signal.SIGINT, signal.SIGQUIT)]
)'"""


async def look(session, command: str) -> bytes:
    session.looks = getattr(session, "looks", 0) + 1
    return (await session.run(f"look-{session.looks}", command)).stdout


async def alive(session, line: str) -> bool:
    return await look(session, f"ps -A -o args= | grep -x '{line}'; true") != b""


async def begun(session, line: str) -> None:
    async def there() -> bool:
        return await alive(session, line)

    await session.until(there)


@pytest.mark.parametrize("scope", [Scope.PROCESS, Scope.GROUP])
@pytest.mark.parametrize(
    "command",
    [
        f"{WAITED}; true",
        f"({WAITED}; true); true",
        f"(true | ({WAITED}; true)) | cat; true",
        f"x=$({WAITED}; true); true",
        f"cat <({WAITED}); true",
        f"sh -c 'sh -c \"{WAITED}; true\"; true'; true",
        f"bash -c 'trap \"exit 3\" TERM; {WAITED}; true'; true",
        "echo 5361 | xargs -n 1 sleep; true",
        f"timeout 100 sh -c '{WAITED}; true'; true",
        f"find /etc/passwd -exec {WAITED} ';'; true",
        f"set -m; {WAITED}; true",
        f"trap '' INT; {WAITED}; true",
        f"{_PYTHON}; true",
        f"exec {_PYTHON}",
    ],
)
async def test_it_takes_along_what_the_command_waits_for(session, command, scope):
    await session.start("one", ["bash", "-c", command])
    await begun(session, WAITED)
    await session.client.end("one", scope, 60)
    assert (await session.exited("one")).status == 143
    assert not await alive(session, WAITED)
    assert await alive(session, SPARED) == ("start_new_session" in command)


@pytest.mark.parametrize(
    "job",
    [
        f"{SPARED} >/dev/null 2>&1 &",
        f"({SPARED}; true) &",
        f"({SPARED} &);",
        f"{_RESETS} &",
        f"nohup sh -c '{SPARED}; true' &",
        f"sh -c '{SPARED} & wait' >/dev/null &",
        f"setsid {SPARED} &",
    ],
)
async def test_it_spares_jobs_in_the_background(session, job):
    await session.start("one", ["bash", "-c", f"{job} sh -c '{WAITED}; true'; true"])
    await begun(session, SPARED)
    await begun(session, WAITED)
    await session.client.end("one", Scope.PROCESS, 60)
    assert (await session.exited("one")).status == 143
    assert await alive(session, SPARED)
    assert not await alive(session, WAITED)


async def test_last_words_of_what_it_takes_along_belong_to_the_command(session):
    child = "trap 'sleep 0.5; echo bye; exit' TERM; echo ready; while :; do sleep 0.01; done"
    await session.start("one", ["bash", "-c", f'bash -c "{child}"; true'])
    await session.has("one", b"ready\n")
    await session.client.end("one", Scope.PROCESS, 60)
    event = await session.exited("one")
    assert (event.status, event.stdout_length) == (143, len("ready\nbye\n"))


async def test_it_insists_on_what_outlives_the_command(session):
    """Also on what that has begun since."""
    child = f"trap '' TERM; sleep 5360; {WAITED}; true"
    await session.start("one", ["bash", "-c", f'bash -c "{child}"; true'])
    await begun(session, "sleep 5360")
    await session.client.end("one", Scope.PROCESS, 1.5)
    await look(session, "pkill -KILL -fx 'sleep 5360'; true")
    await begun(session, WAITED)
    assert (await session.exited("one")).status == 143
    assert not await alive(session, WAITED)


async def test_what_the_command_has_begun_in_the_grace_ends_with_it(session):
    command = f"trap '' TERM; echo ready; (trap - TERM; exec sleep 5360); {WAITED}; true"
    await session.start("one", ["bash", "-c", command])
    await begun(session, "sleep 5360")
    await session.client.end("one", Scope.PROCESS, 1)
    assert (await session.exited("one")).status == 137
    assert not await alive(session, WAITED)


@pytest.mark.parametrize("scope", [Scope.PROCESS, Scope.GROUP])
async def test_where_no_process_can_be_made_the_command_or_its_group_ends(make_box, scope):
    box = await make_box()
    session = await box.session()
    group = Path("/sys/fs/cgroup/pids") / box.folder.name
    if not group.parent.is_dir():
        pytest.skip("this machine has no cgroup of version 1 for pids")
    group.mkdir()
    try:
        await session.start("one", ["bash", "-c", f"trap '' TERM; echo ready; {WAITED}; true"])
        await session.has("one", b"ready\n")
        (group / "cgroup.procs").write_text(str(box.pid))
        (group / "pids.max").write_text("1")
        await session.client.end("one", scope, 0.1)
        assert (await session.exited("one")).status == 137
    finally:
        await box.stop()
        await session.until(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()

"""The life of boxes, with each runtime: made, watched, taken over by the next server, removed without a trace."""

# ruff: noqa: ASYNC221, ASYNC240

from __future__ import annotations

import asyncio
import errno
import json
import os
import random
import resource
import signal
import stat
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from devboxd.engine import cgroups, disks, namespaces, oci
from devboxd.engine.base import EngineError, Image, Resources
from devboxd.errors import SetupError
from support.disk import small_disk
from support.disks import READY, volumes_of
from support.engine import Host
from support.leftovers import descriptors

pytestmark = [pytest.mark.anyio, pytest.mark.box]


async def test_agent_answers_when_create_returns(host: Host) -> None:
    box = await host.box()
    assert await box.sh("id -u; id -u user; cat /proc/1/comm") == "0\n1000\ninit"


async def test_destroy_leaves_nothing(host: Host) -> None:
    box = await host.box()
    await box.sh("sleep 1000 & disown; mkdir /a; touch /a/b")
    assert await host.engine.boxes() == {box.id: True}
    await host.engine.destroy(box.id)
    assert await host.engine.boxes() == {}
    assert host.leftovers() == []


async def test_where_room_is_scarce_nothing_holds_the_disk_of_a_box_that_is_gone(host: Host) -> None:
    """The program that bounds disks once the server is dead starts with the first box then."""
    with small_disk(4096) as disk:
        async with Host(host.image, disk.folder / "state", runtime=host.settings.runtime) as other:
            box = await other.box(Resources(1.0, 512 << 20, 256, disk_bytes=64 << 30))
            children = " ".join(file.read_text() for file in Path("/proc/self/task").glob("*/children")).split()
            assert any(b"reserved_clusters" in Path("/proc", pid, "cmdline").read_bytes() for pid in children)
            await other.engine.destroy(box.id)
            assert other.leftovers() == []


async def test_destroying_twice_at_once_and_again_is_no_error(host: Host) -> None:
    box = await host.box()
    await asyncio.gather(host.engine.destroy(box.id), host.engine.destroy(box.id))
    await host.engine.destroy(box.id)
    await host.engine.destroy("dbx_never_made")
    one, two = await asyncio.gather(host.box(), host.box())
    assert await one.sh("cat /proc/self/uid_map") != await two.sh("cat /proc/self/uid_map")


async def test_a_full_server_says_so_and_uses_slots_again(image: Image, runtime: str, tmp_path: Path) -> None:
    host = Host(image, tmp_path / "state", runtime=runtime)
    await host.open(slots=2)
    try:
        one, two = await host.box(), await host.box()
        with pytest.raises(EngineError, match="cannot make another devbox: all 2 slots of this server are used"):
            await host.box()
        uid = await two.sh("cat /proc/self/uid_map")
        await host.engine.destroy(two.id)
        assert await (await host.box()).sh("cat /proc/self/uid_map") == uid
        assert await one.sh("echo on") == "on"
    finally:
        await host.destroy_all()
        await host.close()


async def test_create_again_keeps_a_living_box(host: Host) -> None:
    spec = host.spec()
    await host.engine.create(spec)
    pid = (host.instance.directory / "boxes" / spec.box_id / "pid").read_text()
    await host.engine.create(spec)
    assert (host.instance.directory / "boxes" / spec.box_id / "pid").read_text() == pid


async def test_no_mount_of_a_box_is_on_the_host(host: Host) -> None:
    await host.box()
    marks = (str(host.instance.state), f"{host.instance.directory}/")
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    own = {str(host.instance.state / "disks"), str(host.instance.directory / "lxcfs")}
    assert {point for point in points if point.startswith(marks)} <= own


async def test_nothing_of_the_server_is_open_in_pid_1(host: Host) -> None:
    box = await host.box()
    opened = descriptors(box.pid)
    assert {opened.pop(name) for name in "012"} == {"/dev/null"}
    assert opened.pop("3").startswith("socket:")
    own = set(descriptors("self").values())
    assert not own & {target for target in opened.values() if not target.startswith("anon_inode:")}


async def test_names_and_resolver_belong_to_the_box_and_root_may_edit_them(host: Host) -> None:
    box = await host.box()
    name = await box.sh("hostname")
    assert name.startswith("devbox-")
    assert await box.sh("cat /etc/hostname") == name
    assert await box.sh(f"getent hosts {name} localhost | wc -l") == "2"
    assert "nameserver" in await box.sh("cat /etc/resolv.conf")
    await box.sh("for f in hosts hostname resolv.conf; do echo x >/tmp/x && mv /tmp/x /etc/$f; done")
    assert await box.sh("cat /etc/hosts /etc/resolv.conf") == "x\nx"


async def test_sudo_works(host: Host) -> None:
    box = await host.box()
    result = await box.run("sudo", "-n", "id", "-u", user="user")
    assert (result.status, result.out, result.err) == (0, "0\n", "")


async def test_ids_on_disk_start_at_0_and_the_image_is_untouched(host: Host) -> None:
    one, two = await host.box(), await host.box()
    await one.sh("echo hi >/root/mine; echo user >>/etc/passwd; su user -c 'touch /home/user/his'; rm /usr/bin/env")
    with one.upper() as upper:
        assert (upper / "root/mine").stat().st_uid == 0
        assert (upper / "home/user/his").stat().st_uid == 1000
        assert (upper / "home/user/his").stat().st_gid == 1000
    assert (
        await two.sh("ls /usr/bin/env /root; tail -n1 /etc/passwd | grep -c '^user$' || true")
        == "/usr/bin/env\n\n/root:\n0"
    )


async def test_upper_layers_of_an_image_win(host: Host, tmp_path: Path) -> None:
    top = tmp_path / "top"
    (top / "etc").mkdir(parents=True)
    (top / "etc/debian_version").write_text("top\n")
    host.image = replace(host.image, layers=(top, *host.image.layers))
    box = await host.box()
    assert await box.sh("cat /etc/debian_version; /probe native") == "top"


async def test_a_setuid_file_of_a_box_is_inert_on_the_host(host: Host) -> None:
    box = await host.box()
    await box.sh("cp /probe /suid && chmod 4755 /suid")
    with box.upper() as upper:
        file = upper / "suid"
        assert file.stat().st_mode & stat.S_ISUID
        assert file.stat().st_uid == 0
        assert host.instance.state.stat().st_mode & 0o777 == 0o700
        flags = os.statvfs(file).f_flag
        assert flags & os.ST_NOSUID
        assert flags & os.ST_NODEV
        with pytest.raises(PermissionError):
            subprocess.run([file], user=65534, group=65534, extra_groups=(), check=False)


async def test_secrets_are_only_in_the_command(host: Host) -> None:
    box = await host.box()
    result = await box.run("printenv", "TOKEN", env={"TOKEN": "hunter2-secret"})
    assert result.out == "hunter2-secret\n"
    with box.upper() as upper:
        command = ["grep", "-ra", "hunter2-secret", upper, host.instance.directory]
        assert subprocess.run(command, capture_output=True, check=False).stdout == b""
    assert b"hunter2" not in Path(f"/proc/{box.pid}/environ").read_bytes()


async def test_agent_is_a_copy_of_its_own_that_the_box_cannot_change(host: Host) -> None:
    box, other = await host.box(), await host.box()
    (kept,) = (host.instance.state / "agent").iterdir()
    copies = [Path(f"/proc/{pid}/root/run/devboxd/init") for pid in (box.pid, other.pid)]
    assert [copy.read_bytes() for copy in copies] == [kept.read_bytes()] * 2
    assert len({copy.stat().st_dev for copy in (kept, *copies)}) == 3
    result = await box.run("bash", "-c", "echo x >/run/devboxd/init")
    assert result.status != 0
    assert (await box.run("rm", "-f", "/run/devboxd/init")).status != 0


async def test_wait_tells_how_pid_1_ended(host: Host) -> None:
    box = await host.box()
    waiting = asyncio.ensure_future(host.engine.wait(box.id))
    cancelled = asyncio.ensure_future(host.engine.wait(box.id))
    await asyncio.sleep(0)
    cancelled.cancel()
    os.kill(box.pid, signal.SIGKILL)
    end = await asyncio.wait_for(waiting, 20)
    assert (end.oom, end.status) == (False, 137)
    assert not (await asyncio.wait_for(host.engine.wait(box.id), 20)).oom
    assert await host.engine.boxes() == {box.id: False}
    await host.engine.create(replace(host.spec(), box_id=box.id))
    assert await host.engine.boxes() == {box.id: True}


async def test_who_stops_a_box_does_not_write_its_disk(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That takes as long as the disk: a process of its own does it, and a box may go on from the disk meanwhile."""
    box = await host.box()
    slow = tmp_path / "slow" / "sync"
    slow.parent.mkdir()
    slow.write_text(f'#!/bin/sh\nwhile [ ! -e {tmp_path}/go ]; do sleep 0.01; done\nexec /bin/sync "$@"\n')
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", f"{slow.parent}:{os.environ['PATH']}")
    await box.sh("echo kept >/kept")
    await host.engine.stop(box.id)
    assert len(volumes_of(host.instance.state)) == 1, "it is still written"
    await host.engine.create(replace(host.spec(), box_id=box.id))
    again = host.known(box.id)
    assert await again.sh("cat /kept") == "kept"
    (tmp_path / "go").touch()
    await again.close()
    await host.engine.stop(box.id)
    while volumes_of(host.instance.state):
        await asyncio.to_thread(time.sleep, 0.01)
    await host.engine.destroy(box.id)


async def test_wait_for_an_unknown_box_returns_at_once(host: Host) -> None:
    end = await host.engine.wait("dbx_unknown")
    assert (end.oom, end.status) == (False, None)


async def test_memory_limit_kills_a_command_and_not_the_agent(host: Host) -> None:
    box = await host.box(Resources(1.0, 64 << 20, 256))
    assert host.engine.oom_kills(box.id) == 0
    result = await box.run("python3", "-c", "x = bytearray(200 << 20)")
    assert result.status == 137
    assert host.engine.oom_kills(box.id) == 1
    assert await box.sh("echo alive") == "alive"


async def test_process_limit_holds(host: Host) -> None:
    box = await host.box(Resources(1.0, 256 << 20, 40))
    script = """
import os, time
n = 0
try:
    while os.fork():
        n += 1
    time.sleep(30)
except OSError as error:
    print(n < 40, error.errno)
"""
    result = await box.run("python3", "-c", script)
    assert result.out == "True 11\n"


async def test_cpu_limit_holds(host: Host) -> None:
    box = await host.box(Resources(0.2, 256 << 20, 64))
    script = """import time; t, used = time.monotonic(), time.process_time()
while time.monotonic() - t < 1: pass
print(time.process_time() - used)"""
    result = await box.run("python3", "-c", script)
    assert 0.05 < float(result.out) < 0.4


async def test_boxes_outlive_the_engine_and_the_next_one_takes_over(host: Host) -> None:
    living, dead, busy = await host.box(), await host.box(), await host.box()
    uid = await living.sh("cat /proc/self/uid_map")
    await host.close()
    os.kill(dead.pid, signal.SIGKILL)
    await host.open()
    assert await host.engine.boxes() == {living.id: True, dead.id: False, busy.id: True}
    assert not (await asyncio.wait_for(host.engine.wait(dead.id), 10)).oom
    living.engine = host.engine
    assert await living.sh("cat /proc/self/uid_map") == uid
    fresh = [await host.box() for _ in range(3)]
    maps = {await box.sh("cat /proc/self/uid_map") for box in fresh}
    assert len(maps | {uid}) == 4
    waiting = asyncio.ensure_future(host.engine.wait(busy.id))
    await host.destroy_all()
    await asyncio.wait_for(waiting, 10)
    assert host.leftovers() == []


async def test_two_engines_do_not_disturb_each_other(host: Host, tmp_path: Path) -> None:
    async with Host(host.image, tmp_path / "other", runtime=host.settings.runtime) as other:
        one, two = await host.box(), await other.box()
        maps = [int((await box.sh("cat /proc/self/uid_map")).split()[1]) for box in (one, two)]
        for start, owner in zip(maps, (host, other), strict=True):
            first = owner.instance.uid_base(0)
            assert first <= start < first + 65536 * owner.instance.slots
        assert abs(host.instance.first_uid - other.instance.first_uid) >= 65536 * host.instance.slots
        assert await other.engine.boxes() == {two.id: True}
    assert await one.sh("echo here") == "here"
    claims = [path.read_text() for path in other.instance.directory.parent.glob("*/claim")]
    assert not any(str(other.instance.state) in claim for claim in claims)


async def test_a_reboot_leaves_a_trace_and_no_claim_on_a_process(host: Host) -> None:
    box = await host.box()
    await host.close()
    record = json.loads((box.folder / "box.json").read_text())
    (box.folder / "box.json").write_text(json.dumps(record | {"boot": "another"}))
    await host.open()
    assert await host.engine.boxes() == {box.id: False}
    await host.engine.destroy(box.id)
    assert host.leftovers() == []


async def test_a_long_path_of_the_state_folder_is_no_matter(host: Host, tmp_path: Path) -> None:
    state = tmp_path / ("long" * 30) / ("folder" * 20)
    async with Host(host.image, state, runtime=host.settings.runtime) as other:
        assert await (await other.box()).sh("echo hi") == "hi"


async def test_a_disk_nested_beyond_all_paths_is_deleted(host: Host) -> None:
    box = await host.box()
    script = "import os\nfor n in range(6000):\n  os.mkdir('d'); os.chdir('d')"
    assert (await box.run("python3", "-c", script)).status == 0
    await host.engine.destroy(box.id)
    assert host.leftovers() == []


async def test_a_failed_start_is_explained_and_leaves_nothing(host: Host, tmp_path: Path) -> None:
    image = host.image
    host.image = replace(image, layers=(tmp_path / "missing",))
    with pytest.raises(EngineError, match=r"cannot make the box dbx_.*missing"):
        await host.box()
    (tmp_path / "file").write_text("")
    (tmp_path / "odd" / "run").mkdir(parents=True)
    (tmp_path / "odd" / "run" / "devboxd").write_text("")
    (tmp_path / "odd" / "proc").write_text("")
    host.image = replace(image, layers=(tmp_path / "odd",))
    with pytest.raises(EngineError, match=r"cannot start the box dbx_.* said: .*proc"):
        await host.box()
    assert host.leftovers() == []
    host.image = image
    assert await (await host.box()).sh("echo on") == "on"


async def test_a_missing_runtime_is_a_setup_error(host: Host) -> None:
    other = Host(host.image, host.settings.state.with_name("other"), runtime="no-such-runtime")
    with pytest.raises(SetupError, match="cannot find the OCI runtime 'no-such-runtime'; install"):
        await other.open()
    other.instance.close()


async def test_namespaces_that_are_made_when_a_create_is_cancelled_are_let_go(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    slots = namespaces.Slots(host.instance, host.engine._network, 0)
    await slots.open(set(range(10)))  # those that the engine may use
    loop, begun, make = asyncio.get_running_loop(), asyncio.Event(), namespaces._make_namespaces

    def making(first_uid: int) -> tuple[int, int]:
        loop.call_soon_threadsafe(begun.set)
        return make(first_uid)

    def held() -> list[str]:
        return sorted(target for target in descriptors("self").values() if target.startswith(("net:[", "user:[")))

    while len(before := held()) < 2:  # those of the slot that the engine has ready
        await asyncio.to_thread(time.sleep, 0.01)
    monkeypatch.setattr(namespaces, "_make_namespaces", making)
    taking = asyncio.create_task(slots.take())
    await begun.wait()
    taking.cancel()
    await asyncio.wait({taking})
    assert taking.cancelled()
    assert held() == before
    await slots.close()


def _whole(host: Host) -> list[str]:
    names = sorted(path.name for path in (host.instance.state / "disks").iterdir())
    return [name for name in names if not name.startswith(READY)] + volumes_of(host.instance.state)


async def test_a_disk_that_cannot_be_made_leaves_nothing(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    source = await host.box()
    await host.engine.snapshot(source.id, "snp_1")
    whole = _whole(host)

    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "a disk that is broken")

    monkeypatch.setattr(disks, "_put", refuse)
    for snapshot in (None, "snp_1"):
        with pytest.raises(EngineError, match="a disk that is broken"):
            await host.engine.create(replace(host.spec(), snapshot_id=snapshot))
    assert _whole(host) == whole
    await host.engine.delete_snapshot("snp_1")


async def test_cancelling_create_leaves_nothing(host: Host) -> None:
    for delay in (0.0, 0.002, 0.005, 0.01, 0.02, 0.04):
        making = asyncio.ensure_future(host.engine.create(host.spec()))
        await asyncio.wait({making}, timeout=delay)
        making.cancel()
        if await asyncio.gather(making, return_exceptions=True) != [None]:
            assert await host.engine.boxes() == {}
        await host.destroy_all()
    assert host.leftovers() == []


_MAKER = """
import asyncio, os, sys
from pathlib import Path
from devboxd.engine.base import Image
from support.engine import Host
def tell(line):
    os.write(1, line.encode() + b"\\n")  # one write: a line is whole or not there, whenever the end comes
sys.stdout = sys.stderr  # for the log
async def main():
    host = Host(Image("test", tuple(map(Path, sys.argv[3:]))), Path(sys.argv[1]), runtime=sys.argv[2])
    await host.open()
    tell("open")
    while True:
        box = await host.box()
        tell(f"made {box.id}")
        if len(host.boxes) % 2 == 0:
            tell(f"going {box.id}")
            await host.engine.destroy(box.id)
asyncio.run(main())
"""


async def test_a_server_killed_at_any_moment_leaves_only_whole_boxes(host: Host, tmp_path: Path) -> None:
    chance = random.Random(4)
    other = Host(host.image, tmp_path / "other", runtime=host.settings.runtime)
    for _ in range(6):
        words = [str(tmp_path / "other"), host.settings.runtime, *map(str, host.image.layers)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        maker = await asyncio.create_subprocess_exec(
            sys.executable, "-c", _MAKER, *words, stdout=asyncio.subprocess.PIPE, env=environment
        )
        assert maker.stdout is not None
        assert await maker.stdout.readline() == b"open\n"
        await asyncio.sleep(chance.uniform(0, 0.2))  # the moment is the thing that varies here
        maker.kill()
        told = [line.decode().split() for line in (await maker.stdout.read()).splitlines()]
        await maker.wait()
        await other.open()
        try:
            found = await other.engine.boxes()
            going = {line[1] for line in told if line[0] == "going"}
            whole = {line[1] for line in told if line[0] == "made"} - going
            assert {box_id: found.get(box_id) for box_id in whole} == dict.fromkeys(whole, True)
            for box_id in (box_id for box_id, lives in found.items() if lives):
                await asyncio.wait_for(other.known(box_id).sh("true"), 20)
        finally:
            await other.destroy_all()
            left = other.leftovers()
            await other.close()
        assert left == []


class Unified(cgroups.Version2):
    """Version 2 beside version 1: without controllers, but a real hierarchy to enter and to kill in."""

    def __init__(self, instance: str, pace: int) -> None:
        super().__init__(instance, cgroups.ROOT / "unified", pace)

    def show_unified(self) -> None:
        cgroups.Version1(self.name, cgroups.ROOT).show_unified()


@pytest.mark.skipif(not (cgroups.ROOT / "unified").is_dir(), reason="this machine has version 2 alone, or not at all")
async def test_boxes_live_in_version_2(image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "find", Unified)
    async with Host(image, tmp_path / "state") as host:
        box = await host.box()
        assert f"0::/devboxd-{host.instance.id}/boxes/{box.id}\n" in Path(f"/proc/{box.pid}/cgroup").read_text()
        assert (await box.sh("grep 0:: /proc/self/cgroup")) == "0::/"
        assert (await box.sh("cat /sys/fs/cgroup/cgroup.events")).startswith("populated 1")
        assert (
            await box.sh("grep -c ' /sys/fs/cgroup' /proc/self/mountinfo; stat -f -c %T /sys/fs/cgroup")
            == "1\ncgroup2fs"
        )
        assert await box.sh("find /sys/fs/cgroup -mindepth 1 -type d") == ""
        await host.engine.destroy(box.id)
        assert host.leftovers() == []


async def test_a_pace_is_refused_where_no_disk_lies_below(
    image: Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oci, "below", lambda folder: set())
    host = Host(image, tmp_path / "state", disk_bytes_per_second=1 << 20)
    with pytest.raises(SetupError, match=r"cannot keep disk_bytes_per_second: neither .* is on a disk"):
        await host.open()
    host.instance.close()


async def test_no_limit_is_inherited(host: Host) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (600, hard))
    try:
        box = await host.box()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert await box.sh("ulimit -n") == str(min(65536, hard))

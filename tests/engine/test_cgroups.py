"""Limits by cgroups: version 2 on a tree written by hand and on the machine's own, version 1 for real."""

from __future__ import annotations

import asyncio
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from devboxd.engine import cgroups
from devboxd.engine.base import Resources
from devboxd.errors import SetupError

SIZE = Resources(1.5, 3 << 30, 100)
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="cgroups need root")


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A version 2 hierarchy as a kernel shows it, in plain files: the folders of instance `t` and of box `b`.

    The server is at its root, wherever the tests run.
    """
    monkeypatch.setattr(cgroups, "own_cgroup", lambda hierarchy, controller: tmp_path)
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io memory hugetlb pids rdma misc\n")
    for name in ("", "devboxd-t", "devboxd-t/server", "devboxd-t/boxes", "devboxd-t/boxes/b"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "cgroup.subtree_control").write_text("")
        (folder / "cgroup.procs").write_text("")
        if name:
            (folder / "cpu.weight").write_text("100\n")
            (folder / "memory.swap.max").write_text("max\n")
            (folder / "memory.events").write_text("low 0\nhigh 0\nmax 31\noom 3\noom_kill 2\noom_group_kill 0\n")
    return tmp_path


def test_a_box_may_pass_to_its_cgroup_whatever_the_umask(tree: Path) -> None:
    """Version 2 lets the runtime mount the box's cgroup only where every folder above it is open to all."""
    folders = [tree / name for name in ("devboxd-t", "devboxd-t/server", "devboxd-t/boxes", "devboxd-t/boxes/b")]
    for folder in folders:
        folder.chmod(0o700)
    groups = cgroups.find("t", tree)
    groups.open()
    groups.create("b", SIZE)
    assert [folder.stat().st_mode & 0o777 for folder in folders] == [0o755] * 4


def test_version_2_writes_its_limits(tree: Path) -> None:
    groups = cgroups.find("t", tree)
    assert isinstance(groups, cgroups.Version2)
    groups.enable()
    for name in ("", "devboxd-t", "devboxd-t/boxes"):
        assert (tree / name / "cgroup.subtree_control").read_text() == "+cpu +memory +pids"
    (tree / "devboxd-t/boxes/cgroup.subtree_control").write_text("cpu memory pids\n")
    groups.create("b", SIZE)
    box = tree / "devboxd-t/boxes/b"
    found = {name: (box / name).read_text() for name in ("cpu.max", "memory.max", "memory.swap.max", "pids.max")}
    assert found == {
        "cpu.max": "150000 100000",
        "memory.max": str(3 << 30),
        "memory.swap.max": "0",
        "pids.max": "100",
    }
    assert (box / "memory.oom.group").read_text() == "0"
    assert groups.oom_kills("b") == 2
    assert groups.oom_kills("unknown") == 0
    assert groups.entrances("b") == [box / "cgroup.procs"]
    assert groups.boxes() == {"b"}


def test_version_2_writes_the_pace_for_each_disk(tree: Path) -> None:
    groups = cgroups.find("t", tree, pace=5 << 20)
    groups.enable()
    assert (tree / "devboxd-t/boxes/cgroup.subtree_control").read_text() == "+cpu +memory +pids +io"
    groups.disks = ["7:0"]
    groups.create("b", SIZE)
    assert (tree / "devboxd-t/boxes/b/io.max").read_text() == "7:0 rbps=5242880 wbps=5242880"


def test_a_pace_that_no_controller_keeps_is_refused(tmp_path: Path) -> None:
    (tmp_path / "cgroup.controllers").write_text("cpu memory pids")
    cgroups.find("t", tmp_path)
    with pytest.raises(SetupError, match="cannot keep disk_bytes_per_second: .* set it to 0"):
        cgroups.find("t", tmp_path, pace=1 << 20)


def test_version_2_gives_the_server_ten_times_the_weight(tree: Path) -> None:
    groups = cgroups.find("t", tree)
    groups.open()
    assert (tree / "devboxd-t/server/cpu.weight").read_text() == "1000"
    assert (tree / "devboxd-t/server/cgroup.procs").read_text() == str(os.getpid())
    assert (tree / "devboxd-t/boxes/cpu.weight").read_text() == "100\n"


def test_version_2_lets_the_server_run_at_once_beside_a_crowd(tree: Path) -> None:
    """An idle group has a weight of 0.3, so 3 is ten times as much."""
    (tree / "devboxd-t/boxes/cpu.idle").write_text("1\n")
    groups = cgroups.find("t", tree)
    groups.open()
    for crowded, idle, weight in ((None, "0", "1000"), (True, "1", "3"), (False, "0", "1000")):
        if crowded is not None:
            groups.crowd(crowded)
        assert (tree / "devboxd-t/boxes/cpu.idle").read_text() == idle
        assert (tree / "devboxd-t/server/cpu.weight").read_text() == weight


@pytest.fixture
def service(tree: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cgroup of a service, in which the server begins."""
    folder = tree / "system.slice/some.service"
    monkeypatch.setattr(cgroups, "own_cgroup", lambda hierarchy, controller: folder)
    return folder


@pytest.mark.parametrize("environment", [{}, {"SYSTEMD_EXEC_PID": "1"}])
def test_a_server_that_a_login_began_leaves_the_service_of_that(
    tree: Path, service: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]
) -> None:
    """Without a session of systemd's own a login by ssh is in ssh.service, where the server would be one of many."""
    monkeypatch.delenv("SYSTEMD_EXEC_PID", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    cgroups.find("t", tree).open()
    assert (tree / "devboxd-t/server/cgroup.procs").read_text() == str(os.getpid())
    assert (tree / "devboxd-t/server/cpu.weight").read_text() == "1000"
    assert (tree / "devboxd-t/cpu.weight").read_text() == "100\n"


def test_a_server_that_systemd_began_stays_in_its_service(
    tree: Path, service: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its boxes are not idle: they would get nothing while anything else on the machine is busy."""
    (tree / "devboxd-t/boxes/cpu.idle").write_text("0\n")
    monkeypatch.setenv("SYSTEMD_EXEC_PID", str(os.getsid(0)))
    groups = cgroups.find("t", tree)
    groups.open()
    groups.crowd(True)
    assert (tree / "devboxd-t/cpu.weight").read_text() == "10"
    assert (tree / "devboxd-t/boxes/cpu.idle").read_text() == "0\n"
    assert (tree / "devboxd-t/server/cgroup.procs").read_text() == ""


@pytest.mark.parametrize("offered", ["cpu pids", ""])
def test_a_machine_without_controllers_is_refused(tmp_path: Path, offered: str) -> None:
    (tmp_path / "cgroup.controllers").write_text(offered)
    with pytest.raises(SetupError, match=r"cannot limit boxes: .* for .*memory"):
        cgroups.find("t", tmp_path)
    with pytest.raises(SetupError, match="cannot limit boxes"):
        cgroups.find("t", tmp_path / "missing")


@pytest.fixture
def real(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[cgroups.Cgroups]:
    """The machine's own cgroups of a version, with an instance name of this test's own, as for a server in a shell."""
    monkeypatch.delenv("SYSTEMD_EXEC_PID", raising=False)
    name = f"x{os.getpid()}"
    root = cgroups.ROOT
    groups: cgroups.Cgroups
    if request.param == 2:
        root = root if (root / "cgroup.controllers").exists() else root / "unified"
        groups = cgroups.Version2(name, root)
    else:
        groups = cgroups.Version1(name, root)
    if not (root / ("cgroup.procs" if request.param == 2 else "memory")).exists():
        pytest.skip(f"this machine has no cgroups of version {request.param}")
    home = Path("/proc/self/cgroup").read_text()
    groups.open()
    yield groups
    asyncio.run(groups.remove("b"))
    groups.close()
    assert not any((hierarchy / f"devboxd-{name}").exists() for hierarchy in groups.hierarchies())
    assert Path("/proc/self/cgroup").read_text() == home


def enter(groups: cgroups.Cgroups, box_id: str, *command: str) -> subprocess.Popen[bytes]:
    script = 'for f in $ENTRANCES; do echo 0 >$f || exit 1; done; echo in; exec "$@"'
    environment = os.environ | {"ENTRANCES": " ".join(map(str, groups.entrances(box_id)))}
    process = subprocess.Popen(["sh", "-c", script, "sh", *command], env=environment, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"in\n"
    return process


@needs_root
@pytest.mark.anyio
@pytest.mark.parametrize("real", [1, 2], indirect=True)
async def test_removing_kills_all_that_is_inside(real: cgroups.Cgroups) -> None:
    real.create("b", SIZE)
    with enter(real, "b", "sh", "-c", "trap '' TERM INT; sleep 1000 & sleep 1000 & wait") as process:
        assert real.boxes() == {"b"}
        await real.remove("b")
        assert process.wait() == -9
    assert real.boxes() == set()
    await real.remove("b")


@needs_root
@pytest.mark.parametrize("real", [1], indirect=True)
def test_version_1_writes_its_limits(real: cgroups.Cgroups) -> None:
    real.create("b", SIZE)

    def value(name: str) -> str:
        controller = name.split(".")[0]
        return (real.root / controller / real.name / "boxes/b" / name).read_text().strip()

    assert [value("cpu.cfs_quota_us"), value("cpu.cfs_period_us")] == ["150000", "100000"]
    assert value("memory.limit_in_bytes") == str(3 << 30)
    assert value("memory.memsw.limit_in_bytes") == str(3 << 30)
    assert value("pids.max") == "100"
    assert real.oom_kills("b") == 0


@needs_root
@pytest.mark.parametrize("real", [2], indirect=True)
def test_a_kernel_takes_the_limits_of_version_2(real: cgroups.Cgroups) -> None:
    if "memory" not in (real.root / "cgroup.controllers").read_text():
        pytest.skip("this machine binds no controllers to version 2; `make vm` runs this on one that does")
    real.create("b", SIZE)
    box = real.tops()[0] / "boxes" / "b"
    wanted = {"cpu.max": "150000 100000", "memory.max": str(3 << 30), "memory.swap.max": "0", "pids.max": "100"}
    assert {name: (box / name).read_text().strip() for name in wanted} == wanted
    assert (real.tops()[0] / "server/cpu.weight").read_text() == "1000\n"


@needs_root
@pytest.mark.parametrize("real", [1], indirect=True)
def test_version_1_gives_the_server_ten_times_the_weight(real: cgroups.Cgroups) -> None:
    top = real.tops()[0]
    assert (top / "server/cpu.shares").read_text() == "10240\n"
    assert (top / "boxes/cpu.shares").read_text() == "1024\n"
    if real.defers:
        real.crowd(True)
        assert [(top / name / "cpu.shares").read_text() for name in ("server", "boxes")] == ["30\n", "3\n"]
        real.crowd(False)
        assert [(top / name / "cpu.shares").read_text() for name in ("server", "boxes")] == ["10240\n", "1024\n"]
    assert str(os.getpid()) in (top / "server/cgroup.procs").read_text().split()

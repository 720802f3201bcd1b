"""Claims of one machine: nothing shared by two servers, nothing kept for nobody."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from devboxd.engine import instance
from devboxd.engine.cgroups import ROOT, own_cgroup
from devboxd.engine.instance import Instance
from devboxd.errors import SetupError


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def etc(tmp_path: Path) -> Path:
    folder = tmp_path / "etc"
    folder.mkdir()
    (folder / "subuid").write_text("ann:100000:65536\n")
    (folder / "passwd").write_text("root:x:0:0:root:/root:/bin/bash\n")
    return folder


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids that no real server of this machine has: whether boxes live is looked up in the machine's cgroups."""
    monkeypatch.setattr(instance, "_NAMES", tuple(f"{letter}{os.getpid() % 1000:03}" for letter in "abcd"))


def numbers(one: Instance) -> set[int]:
    return {one.uid_base(0), one.uid_base(one.slots - 1) + 65535}


def test_two_state_folders_share_nothing(tmp_path: Path, run: Path, etc: Path) -> None:
    one = instance.claim(tmp_path / "one", run, etc)
    two = instance.claim(tmp_path / "two", run, etc)
    assert one.id != two.id
    assert max(numbers(one)) < min(numbers(two))
    assert not one.subnet.overlaps(two.subnet)
    assert one.directory != two.directory


def claim_with_box(state: Path, run: Path, etc: Path) -> instance.Instance:
    made = instance.claim(state, run, etc)
    (made.directory / "boxes" / "dbx_1").mkdir(parents=True)
    return made


def test_second_server_on_a_state_folder_names_the_first(tmp_path: Path, run: Path, etc: Path) -> None:
    first = claim_with_box(tmp_path / "one", run, etc)
    with pytest.raises(SetupError, match=f"cannot use the state folder .* pid {os.getpid()} uses it"):
        instance.claim(tmp_path / "one", run, etc)
    first.close()
    assert instance.claim(tmp_path / "one", run, etc) == first


def test_killed_server_frees_its_folder_and_the_next_one_gets_the_same_share(
    tmp_path: Path, run: Path, etc: Path
) -> None:
    program = (
        "import sys, pathlib; from devboxd.engine import instance; a, b, c = map(pathlib.Path, sys.argv[1:]);"
        "i = instance.claim(a, b, c); print(i.id, i.first_uid, i.subnet, flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", program, str(tmp_path / "one"), str(run), str(etc)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout is not None
        told = server.stdout.readline().split()
        with pytest.raises(SetupError, match=f"pid {server.pid} uses it"):
            instance.claim(tmp_path / "one", run, etc)
        server.kill()
    again = instance.claim(tmp_path / "one", run, etc)
    assert told == [again.id, str(again.first_uid), str(again.subnet)]


def test_claim_of_a_dead_server_is_kept_for_its_state_folder(tmp_path: Path, run: Path, etc: Path) -> None:
    first = claim_with_box(tmp_path / "one", run, etc)
    first.close()
    other = instance.claim(tmp_path / "two", run, etc)
    assert other.id != first.id


@pytest.mark.usefixtures("names")
def test_claim_without_state_folder_is_given_away(tmp_path: Path, run: Path, etc: Path) -> None:
    first = claim_with_box(tmp_path / "one", run, etc)
    first.close()
    (tmp_path / "one").rename(tmp_path / "moved")
    second = instance.claim(tmp_path / "two", run, etc)
    assert second.id == first.id
    assert not (tmp_path / "moved" / "lock").samefile(tmp_path / "two" / "lock")


@pytest.mark.skipif(os.geteuid() != 0, reason="a network namespace needs root")
def test_addresses_of_an_abandoned_claim_are_free_again(tmp_path: Path, run: Path, etc: Path) -> None:
    script = """
import os, sys
from pathlib import Path
from devboxd.engine import instance
from devboxd.engine.nettools import ip, run
instance._NAMES = (f"a{os.getpid() % 1000:03}",)
folder, at, etc = map(Path, sys.argv[1:])
ip("link set lo up")
for number in range(9):
    state = folder / str(number)
    one = instance.claim(state, at, etc)
    ip(f"route replace {one.subnet} dev lo", f"rule add priority 9 to {one.subnet} lookup 56099")
    (one.directory / "boxes" / "dbx_1").mkdir(parents=True)
    one.close()
    state.rename(folder / f"gone {number}")
print(len(run("ip", "route", "list", "dev", "lo").splitlines()), run("ip", "rule", "list").count("lookup 56099"))
"""
    command = ("unshare", "--net", sys.executable, "-c", script, tmp_path, run, etc)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.stdout, done.stderr) == ("1 1\n", ""), "nine servers were killed, and only the last one left a trace"


@pytest.mark.skipif(os.geteuid() != 0, reason="a network namespace needs root")
def test_addresses_in_use_are_left_alone_and_those_that_lead_nowhere_are_not(
    tmp_path: Path, run: Path, etc: Path
) -> None:
    script = """
import os, sys
from pathlib import Path
from devboxd.engine import instance
from devboxd.engine.nettools import ip
instance._NAMES = tuple(f"{letter}{os.getpid() % 1000:03}" for letter in "ab")
folder, at, etc = map(Path, sys.argv[1:])
ip("link set lo up", "link add used type veth peer name peer", "link set used up")
def free(name):
    one = instance.claim(folder / name, at, etc)
    one.close()
    return one.subnet
for network in instance._NETWORKS:
    ip(f"route add {network[0]}/22 dev lo")
first = free("two")
for network in instance._NETWORKS:
    ip(f"route replace {network[0]}/22 dev used")
second = free("three")
for network in instance._NETWORKS:
    ip(f"route add {network} dev used")
print(first, second, flush=True)
free("four")
"""
    command = ("unshare", "--net", sys.executable, "-c", script, tmp_path, run, etc)
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.stdout == "198.18.0.0/22 198.18.4.0/22\n", done.stderr
    assert "cannot find free addresses for boxes: this host has routes into all of 198.18.0.0/16" in done.stderr


@pytest.mark.usefixtures("names")
def test_claim_without_state_folder_is_kept_while_a_box_lives(tmp_path: Path, run: Path, etc: Path) -> None:
    first = claim_with_box(tmp_path / "one", run, etc)
    first.close()
    (tmp_path / "one").rename(tmp_path / "moved")
    group = own_cgroup(ROOT / "pids" if (ROOT / "pids").exists() else ROOT, "pids") / f"t{os.getpid()}"
    box = group / f"devboxd-{first.id}" / "box"
    box.mkdir(parents=True)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
        (box / "cgroup.procs").write_text(str(process.pid))
        second = instance.claim(tmp_path / "two", run, etc)
    box.rmdir()
    box.parent.rmdir()
    group.rmdir()
    assert second.id != first.id


def test_claim_is_released_when_nothing_is_to_be_kept(tmp_path: Path, run: Path, etc: Path) -> None:
    first = instance.claim(tmp_path / "one", run, etc)
    first.close()
    assert not first.directory.exists()
    assert (etc / "subuid").read_text() == "ann:100000:65536\n"


def test_claim_of_a_living_server_is_kept_though_its_state_folder_was_removed(
    tmp_path: Path, run: Path, etc: Path
) -> None:
    first = instance.claim(tmp_path / "one", run, etc)
    (tmp_path / "one").rename(tmp_path / "moved")
    assert instance.claim(tmp_path / "two", run, etc).id != first.id


@pytest.mark.parametrize(
    ("file", "line"),
    [
        ("subuid", "bob:{}:10"),
        ("subgid", "bob:{}:10"),
        ("passwd", "bob:x:{}:100:Bob:/home/bob:/bin/sh"),
        ("group", "bob:x:{}:"),
    ],
)
def test_ids_of_others_are_avoided(tmp_path: Path, run: Path, etc: Path, file: str, line: str) -> None:
    with (etc / file).open("a") as accounts:
        accounts.write(line.format((1 << 29) + 70000) + "\nbroken:line\n\n")
    one = instance.claim(tmp_path / "one", run, etc)
    assert one.uid_base(0) > (1 << 29) + 70009


@pytest.mark.usefixtures("names")
def test_ranges_are_registered_and_foreign_lines_stay(tmp_path: Path, run: Path, etc: Path) -> None:
    one = instance.claim(tmp_path / "one", run, etc)
    line = f"devboxd-{one.id}:{one.uid_base(0)}:{one.slots * 65536}\n"
    assert (etc / "subuid").read_text() == "ann:100000:65536\n" + line
    assert (etc / "subgid").read_text() == line
    one.close()
    (tmp_path / "one").rename(tmp_path / "moved")
    two = instance.claim(tmp_path / "two", run, etc)
    assert (etc / "subuid").read_text() == f"ann:100000:65536\ndevboxd-{two.id}:{two.uid_base(0)}:{1 << 26}\n"


def test_the_lock_of_account_tools_is_respected(
    tmp_path: Path, run: Path, etc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instance, "_LOCK_PAUSE_SECONDS", 0.001)
    lock = etc / "subuid.lock"
    lock.write_text(f"{os.getpid()}\0")
    with pytest.raises(SetupError, match=r"cannot register the boxes' ids in .*subuid: .*subuid.lock"):
        instance.claim(tmp_path / "one", run, etc)
    assert (etc / "subuid").read_text() == "ann:100000:65536\n"
    ended = subprocess.Popen(["true"])
    ended.wait()
    lock.write_text(f"{ended.pid}\0")
    instance.claim(tmp_path / "one", run, etc)
    assert not lock.exists()


def test_folders_are_for_root_alone(tmp_path: Path, run: Path, etc: Path) -> None:
    (tmp_path / "one").mkdir(mode=0o755)
    one = instance.claim(tmp_path / "one", run, etc)
    assert one.state.stat().st_mode & 0o777 == 0o700
    assert {p.stat().st_mode & 0o777 for p in (run, one.directory)} == {0o711}
    assert (one.directory / "claim").stat().st_mode & 0o777 == 0o600


def test_slots_have_bounds(tmp_path: Path, run: Path, etc: Path) -> None:
    one = instance.claim(tmp_path / "one", run, etc)
    with pytest.raises(ValueError, match="slot 1024"):
        one.uid_base(one.slots)

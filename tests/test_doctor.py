"""What doctor finds on this machine, and on machines that lack something."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from devboxd import doctor, probes
from devboxd.cli import doctor as printed
from devboxd.config import Settings
from devboxd.engine import lxcfs
from devboxd.engine.netns import inside

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="really tries what only root may do")


def by_name(settings: Settings) -> dict[str, doctor.Check]:
    return {check.name: check for check in doctor.checks(settings)}


@needs_root
def test_a_machine_that_runs_these_tests_can_serve(tmp_path: Path) -> None:
    settings = Settings(state=tmp_path / "not" / "yet")
    assert doctor.required(settings) == []
    found = by_name(settings)
    for name in (
        "OCI runtime",
        "Seccomp",
        "Cgroups",
        "Namespaces",
        "Overlay and mapped ids",
        "Nftables",
        "State folder",
    ):
        assert found[name].level == "ok", found[name]
    assert not (tmp_path / "not").exists()
    assert list(tmp_path.iterdir()) == []


def test_it_says_what_is_not_promised() -> None:
    found = by_name(Settings())
    assert "those of the local network included" in found["Network"].consequence
    assert "shared with all boxes" in found["Kernel"].found
    assert by_name(Settings(deny_cidrs=("10.0.0.0/8",)))["Network"].level == "ok"
    assert by_name(Settings(nested_user_namespaces=True))["Kernel"].level == "warning"


def test_it_says_what_boxes_are_not_told_without_lxcfs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lxcfs, "which", lambda name: None)
    check = by_name(Settings())["Figures in boxes"]
    assert (check.level, "free, top" in check.consequence, "lxcfs" in check.cure) == ("warning", True, True)
    monkeypatch.setattr(lxcfs, "lack", lambda: None)
    assert by_name(Settings())["Figures in boxes"].level == "ok"


def test_each_lack_has_its_consequence_and_its_cure(tmp_path: Path) -> None:
    settings = Settings(runtime=str(tmp_path / "crun"), allow_endpoints=("127.0.0.1:80",))
    lacks = {check.name: check for check in doctor.required(settings)}
    assert {"OCI runtime", "Settings"} <= set(lacks)
    for check in doctor.checks(settings):
        assert check.found, check
        assert check.consequence, check
        assert bool(check.cure) == (check.level != "ok"), check
    text = str(lacks["OCI runtime"])
    assert text.startswith("cannot serve: OCI runtime: ")
    assert "apt-get install crun" in text


@pytest.mark.parametrize(
    "wrong", [{"dns_servers": ("foo",)}, {"deny_cidrs": ("foo",)}, {"allow_endpoints": ("foo",)}], ids=str
)
def test_a_setting_of_the_wrong_form_is_one_lack_among_all_checks(wrong: dict[str, Any]) -> None:
    found = doctor.checks(Settings(**wrong))
    (lack,) = [check for check in found if "'foo'" in check.found]
    assert (lack.name, lack.level) == ("Settings", "error")
    assert found[-1].name == "Kernel", "the other checks are made too"


@pytest.mark.parametrize("kind", ["nfs4", "cifs", "fuse.sshfs", "overlay"])
def test_a_state_folder_that_cannot_keep_promises_is_refused(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes, "file_system", lambda _: (kind, "/srv"))
    (refusal,) = (check for check in doctor.required(Settings(state=Path("/srv/x"))) if check.name == "State folder")
    assert kind in refusal.found
    assert "--state" in refusal.cure


@needs_root
def test_mounts_are_told_apart(tmp_path: Path) -> None:
    """A real overlay and a real tmpfs below it, in a mount namespace that ends with the question."""
    program = "import sys, pathlib, devboxd.probes as p; print(*p.file_system(pathlib.Path(sys.argv[1])))"
    for name in ("l", "u", "w", "m"):
        (tmp_path / name).mkdir()
    mounts = (
        f"cd {tmp_path} && mount -t overlay none -o lowerdir=l,upperdir=u,workdir=w m && mkdir 'm/a b' && "
        'mount -t tmpfs none "m/a b" && for x in m/y m-y "m/a b/z/z"; do "$0" -c "$1" "$PWD/$x"; done'
    )
    command = ["unshare", "--mount", "sh", "-c", mounts, sys.executable, program]
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    assert out[0] == f"overlay {tmp_path}/m"
    assert out[2] == f"tmpfs {tmp_path}/m/a b"
    assert not out[1].startswith(("overlay", "tmpfs"))


@pytest.fixture
def netns() -> Iterator[Path]:
    name = f"devboxd-doctor-{os.getpid()}"
    subprocess.run(["ip", "netns", "add", name], check=True)
    yield Path("/run/netns") / name
    subprocess.run(["ip", "netns", "delete", name], check=True)


@pytest.mark.parametrize(
    ("file", "few", "enough", "check"),
    [
        ("fs/file-max", 2_466_186, 9223372036854775807, "File table"),
        ("fs/inotify/max_user_instances", 64, 128, "File watching"),
        ("fs/inotify/max_user_watches", 8192, 1048576, "File watching"),
        ("kernel/pid_max", 32768, 4194304, "Processes"),
        ("kernel/pty/max", 4096, 65536, "Terminals"),
        ("net/core/bpf_jit_limit", 264241152, 1 << 30, "Filters of calls"),
        ("debug/exception-trace", 1, 0, "Kernel log"),
    ],
)
def test_limits_of_the_host_that_one_box_can_use_up_are_told_with_their_cure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, few: int, enough: int, check: str
) -> None:
    monkeypatch.setattr(doctor, "_SYS", tmp_path)
    names = ("fs/file-max", "fs/inotify/max_user_instances", "fs/inotify/max_user_watches", "kernel/pid_max")
    for name in (*names, "kernel/pty/max", "net/core/bpf_jit_limit"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"{1 << 40}\n")
    (tmp_path / "debug").mkdir()
    (tmp_path / file).write_text(f"{few}\n")
    found = by_name(Settings())[check]
    assert found.level == "warning"
    assert str(few) in found.found
    assert re.match(r"sysctl -w ([\w./-]+=\d+ )+\| tee /etc/sysctl.d/90-devboxd-\w+\.conf  # ", found.cure)
    assert file.replace("/", ".") in found.cure
    (tmp_path / file).write_text(f"{enough}\n")
    assert by_name(Settings())[check].level == "ok"


def test_sizes_larger_than_the_machine_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": 1 << 21, "SC_PAGE_SIZE": 4096}[name])
    found = by_name(Settings())["Memory"]
    assert (found.level, found.found) == ("warning", "8 GiB of memory, 4 processors")
    assert "X_LARGE, XX_LARGE promise more than there is" in found.consequence
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.setattr(os, "sysconf", lambda name: {"SC_PHYS_PAGES": 1 << 25, "SC_PAGE_SIZE": 4096}[name])
    assert by_name(Settings())["Memory"].level == "ok"


@needs_root
def test_plain_folders_are_told_with_what_a_snapshot_costs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def storage() -> doctor.Check:
        return by_name(Settings(state=tmp_path / "state", cache=tmp_path / "cache"))["Storage"]

    monkeypatch.setattr(probes, "file_system", lambda _: ("ext4", "/srv"))
    assert storage().level == "ok"
    (tmp_path / "state" / "disks" / "dbx_1").mkdir(parents=True)
    assert storage().level == "warning"
    assert re.search(
        r"stops its box while it copies, here about \d+\.\d s for each 10,000 files", storage().consequence
    )
    (tmp_path / "state" / "pool.btrfs").touch()
    assert storage().level == "ok"


@needs_root
def test_a_firewall_that_drops_forwarded_packets_is_found(netns: Path) -> None:
    def change(rules: str) -> Callable[[], list[str]]:
        def work() -> list[str]:
            subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=True)
            return probes.forward_blockers()

        return work

    docker = "table ip filter { chain FORWARD { type filter hook forward priority filter; policy %s; }; }\n"
    assert inside(netns, change(docker % "accept")) == []
    assert inside(netns, change(docker % "drop")) == ["nftables ip filter FORWARD"]
    assert "nftables inet firewalld" in inside(netns, change("table inet firewalld {}\n"))


def test_json_and_text_say_the_same(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    found = doctor.checks(Settings())
    monkeypatch.setattr(doctor, "checks", lambda _: found)
    code = printed.run(Settings(), as_json=False)
    text = capsys.readouterr().out
    assert printed.run(Settings(), as_json=True) == code
    rows = json.loads(capsys.readouterr().out)
    assert {"name", "level", "found", "consequence", "cure"} == set(rows[0])
    for row in rows:
        assert row["name"] in text
        for part in (row["found"], row["consequence"], row["cure"]):
            assert any(line.endswith(part) for line in text.splitlines()), "nothing is wrapped away from a terminal"


def test_without_root_it_tells_what_it_could_not_check(tmp_path: Path) -> None:
    rows = as_nobody(Settings(cache=tmp_path / "cache"))
    assert rows["Root"]["level"] == "warning"
    assert rows["Kernel"]["level"] == "ok"
    assert "Nftables" not in rows
    assert rows["Cgroups"]["level"] == "ok"


def as_nobody(settings: Settings) -> dict[str, Any]:
    """The checks as a child without any privilege sees them; a fork, because that user may not read Python itself."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        if os.geteuid() == 0:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        found = {check.name: {"level": check.level, "found": check.found} for check in doctor.checks(settings)}
        os.write(writing, json.dumps(found).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        rows = json.loads(answer.read() or "{}")
    assert os.waitpid(child, 0)[1] == 0
    return dict(rows)


@needs_root
@pytest.mark.parametrize("arguments", [(), ("--json",)])
def test_a_stranger_is_told_what_can_be_seen(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    """Not root, in a window of 40 columns, and neither state nor cache may be looked into."""
    closed = tmp_path / "closed"
    (closed / "state").mkdir(parents=True)
    closed.chmod(0o700)
    done = _as_stranger(closed, "--state", str(closed / "state"), *arguments)
    assert done.stderr == ""
    assert done.returncode in (0, 2)
    if arguments:
        assert {"Root", "State folder", "Network"} <= {check["name"] for check in json.loads(done.stdout)}
    else:
        assert "     cure: run it again with sudo" in done.stdout.splitlines()


@needs_root
def test_settings_that_a_stranger_may_not_read_are_told_in_one_line(tmp_path: Path) -> None:
    closed = tmp_path / "closed"
    closed.mkdir(mode=0o700)
    (closed / "devboxd.toml").touch()
    for file in (closed / "devboxd.toml", tmp_path / "own.toml"):
        file.touch(mode=0o600)
        done = _as_stranger(closed, "--config", str(file))
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(f"cannot read the settings in {file}: permission denied")
        assert done.stderr.count("\n") == 1


def _as_stranger(cache: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`devboxd doctor` as nobody, who may not be able to read this checkout: everything is imported before."""
    code = (
        "import os, sys, encodings.unicode_escape, rich.console, rich.padding, rich.text, devboxd.doctor;"
        "from devboxd.cli import main; os.setgroups([]); os.setgid(65534); os.setuid(65534);"
        "sys.argv = ['devboxd', 'doctor', *sys.argv[1:]]; main()"
    )
    environment = {**os.environ, "COLUMNS": "40", "DEVBOXD_CONFIG": "/dev/null", "DEVBOXD_CACHE": str(cache)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def test_a_read_only_disk_is_told_as_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mock of the one fact: to make a disk read-only takes root and a disk."""
    real = os.statvfs(tmp_path)

    class ReadOnly:
        f_flag = real.f_flag | os.ST_RDONLY

    monkeypatch.setattr(os, "statvfs", lambda _: ReadOnly)
    found = doctor._space(Settings(state=tmp_path))
    assert (found.level, "is read-only" in found.found) == ("error", True)


@pytest.mark.parametrize(
    "wrong",
    [
        {"domains": ("https://devboxes.example.com",)},
        {"domains": ("devboxes.example.com:8080",)},
        {"domains": ("*.example.com",)},
        {"domains": ("two words",)},
        {"domains": ("ok.example.com", "x" * 64 + ".example.com")},
        {"domains": ("\N{LATIN SMALL LETTER E WITH ACUTE}" * 300,)},
        {"domains": ("",)},
        {"cors_origins": ("app.example.com",)},
        {"cors_origins": ("https://app.example.com/",)},
        {"cors_origins": ("https://App.example.com",)},
        {"cors_origins": ("https://app.example.com:99999",)},
        {"cors_origins": ("*",)},
        {"cors_origins": ("null",)},
        {"cors_origins": ("https://",)},
        {"dns_servers": ("dns.example.com",)},
        {"deny_cidrs": ("10.0.0.0/33",)},
        {"allow_endpoints": ("192.0.2.1",)},
        {"apt_mirror": "mirror.example.com/debian"},
        {"apt_mirror": "http://a/debian http://b/security http://c"},
        {"pip_index_url": "https://[::1"},
        {"npm_registry": "file:///srv/npm"},
        {"ca_certificates": (Path("/nowhere.crt"),)},
    ],
    ids=str,
)
def test_a_setting_that_the_server_cannot_use_is_an_error_of_doctor(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    found = [check for check in doctor.checks(Settings(**wrong)) if check.name == "Settings"]
    assert [check.level for check in found] == ["error"]
    assert name in found[0].found or "CA certificate" in found[0].found
    assert re.match(r"cannot (use|read) ", found[0].found)


def test_every_wrong_setting_is_told_at_once() -> None:
    wrong = Settings(domains=("a b",), cors_origins=("x",), deny_cidrs=("y",))
    assert len([check for check in doctor.checks(wrong) if check.name == "Settings"]) == 3


def test_right_settings_are_taken() -> None:
    right = Settings(
        domains=(
            "devboxes.example.com",
            "box_1",
            "10.0.0.7",
            "[fd00::7]",
            "b\N{LATIN SMALL LETTER U WITH DIAERESIS}cher.example",
        ),
        cors_origins=("https://app.example.com", "http://localhost:3000", "http://[::1]:3000", "https://10.0.0.7"),
        apt_mirror="http://mirror.example.com/debian https://mirror.example.com/security",
        pip_index_url="https://user:word@pip.example.com/simple",
        npm_registry="https://npm.example.com:8443/",
    )
    assert not [check for check in doctor.checks(right) if check.name == "Settings"]


@pytest.mark.parametrize(
    ("options", "hidden"), [("rw", False), ("rw,hidepid=invisible", True), ("rw,hidepid=0", False)]
)
def test_it_says_who_sees_the_commands_of_boxes(options: str, hidden: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    line = f"23 28 0:21 / /proc rw,nosuid - proc proc {options}\n"
    monkeypatch.setattr(probes, "_text", lambda path: line)
    assert probes.processes_hidden() is hidden
    check = doctor._process_list()
    assert ("hidepid=invisible" in check.consequence) is not hidden


def test_a_narrow_terminal_shows_it_in_columns() -> None:
    command = f"stty cols 60; {sys.executable} -m devboxd.cli doctor; [ $? -lt 3 ]"
    environment = {**os.environ, "NO_COLOR": "1", "DEVBOXD_CONFIG": "/dev/null"}
    done = subprocess.run(
        ["script", "-qec", command, "/dev/null"],
        env={name: value for name, value in environment.items() if name != "COLUMNS"},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    lines = [line.rstrip() for line in done.stdout.splitlines()]
    *findings, _, end = lines
    assert end.startswith("serve ")
    for line in findings:
        assert re.match(r"(ok| !| x|  ) \S|     \S", line), line
        assert len(line) <= 60 or line.startswith("     cure: "), "only what is to be copied is longer"

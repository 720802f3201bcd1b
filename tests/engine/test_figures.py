"""What a box uses: version 2 on a recorded tree, version 1 on the machine's own."""

from __future__ import annotations

from pathlib import Path

import pytest

from devboxd.engine import cgroups, figures
from devboxd.engine.base import Figures, Stall

_RECORDED = {
    "cpu.stat": "usage_usec 2500000\nuser_usec 2000000\nsystem_usec 500000\nnr_periods 12\nnr_throttled 3\n",
    "memory.current": "7340032\n",
    "memory.peak": "9437184\n",
    "pids.current": "4\n",
    "cpu.pressure": "some avg10=12.50 avg60=3.00 avg300=0.70 total=91823\n",
    "memory.pressure": "some avg10=1.25 avg60=0.00 avg300=0.00 total=5\n"
    "full avg10=0.75 avg60=0.00 avg300=0.00 total=2\n",
}


@pytest.fixture
def box(tmp_path: Path) -> Path:
    """A version 2 hierarchy with the box `b` of instance `t`, as a kernel shows it, in plain files."""
    (tmp_path / "cgroup.controllers").write_text("cpu memory pids\n")
    folder = tmp_path / "devboxd-t/boxes/b"
    folder.mkdir(parents=True)
    for name, text in _RECORDED.items():
        (folder / name).write_text(text)
    return folder


def test_version_2_is_read(box: Path, tmp_path: Path) -> None:
    assert cgroups.find("t", tmp_path).figures("b") == Figures(
        cpu_seconds=2.5,
        memory_bytes=7 << 20,
        memory_peak_bytes=9 << 20,
        pids=4,
        pressure={"cpu": Stall(12.5, None), "memory": Stall(1.25, 0.75)},
    )


def test_what_an_older_kernel_does_not_tell_is_unknown(box: Path, tmp_path: Path) -> None:
    for name in ("memory.peak", "cpu.pressure", "memory.pressure"):
        (box / name).unlink()
    (box / "io.pressure").write_text("")
    found = cgroups.find("t", tmp_path).figures("b")
    assert (found.memory_bytes, found.memory_peak_bytes, found.pressure) == (7 << 20, None, None)
    assert cgroups.find("t", tmp_path).figures("unknown") == Figures(None, None, None, None)


def test_version_1_is_read(tmp_path: Path) -> None:
    for name in ("cpu", "cpuacct", "memory", "pids"):
        (tmp_path / name / "devboxd-t/boxes/b").mkdir(parents=True)
    (tmp_path / "cpuacct/devboxd-t/boxes/b/cpuacct.usage").write_text("1500000000\n")
    (tmp_path / "memory/devboxd-t/boxes/b/memory.usage_in_bytes").write_text("4096\n")
    (tmp_path / "memory/devboxd-t/boxes/b/memory.max_usage_in_bytes").write_text("8192\n")
    (tmp_path / "pids/devboxd-t/boxes/b/pids.current").write_text("3\n")
    assert cgroups.find("t", tmp_path).figures("b") == Figures(1.5, 4096, 8192, 3)


def test_traffic_is_seen_from_the_box() -> None:
    (into, out_of), (later, _) = figures.traffic("lo"), figures.traffic("lo")
    assert into is not None
    assert out_of is not None
    assert later is not None
    assert into <= out_of <= later, "the loopback gets what it sends, also while others send"
    assert figures.traffic("no-such-link") == (None, None)

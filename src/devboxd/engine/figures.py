"""What a living box uses at this moment, read from files of the kernel; None stands for what it does not tell."""

from __future__ import annotations

from pathlib import Path

from devboxd.engine.base import Figures, Stall

_LINKS = Path("/sys/class/net")
_PRESSURES = ("cpu", "memory", "io")


def of_version_1(cpu: Path, memory: Path, pids: Path) -> Figures:
    """From the box's folders in the hierarchies of cpuacct, memory and pids. There is no pressure of a cgroup here."""
    used = number(cpu / "cpuacct.usage")
    return Figures(
        cpu_seconds=None if used is None else used / 1e9,
        memory_bytes=number(memory / "memory.usage_in_bytes"),
        memory_peak_bytes=number(memory / "memory.max_usage_in_bytes"),
        pids=number(pids / "pids.current"),
    )


def of_version_2(box: Path) -> Figures:
    """From the box's one folder. Older kernels have no memory.peak, and some no pressure."""
    used = words(box / "cpu.stat").get("usage_usec")
    stalls = {name: stall for name in _PRESSURES if (stall := pressure(box / f"{name}.pressure")) is not None}
    return Figures(
        cpu_seconds=None if used is None else int(used) / 1e6,
        memory_bytes=number(box / "memory.current"),
        memory_peak_bytes=number(box / "memory.peak"),
        pids=number(box / "pids.current"),
        pressure=stalls or None,
    )


def traffic(interface: str) -> tuple[int | None, int | None]:
    """Bytes that went into a box and out of it, by the host's end of its link: what that sends, the box receives."""
    statistics = _LINKS / interface / "statistics"
    return number(statistics / "tx_bytes"), number(statistics / "rx_bytes")


def number(file: Path) -> int | None:
    """The one number in a file."""
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None


def words(file: Path) -> dict[str, str]:
    """A file of lines that are a name and a value; empty when there is none."""
    try:
        return dict(line.split(" ", 1) for line in file.read_text().splitlines())
    except (OSError, ValueError):
        return {}


def pressure(file: Path) -> Stall | None:
    """The means over ten seconds. Kernels without PSI have no file, or one that cannot be read."""
    rows = words(file)
    try:
        means = {name: float(dict(pair.split("=") for pair in row.split())["avg10"]) for name, row in rows.items()}
        return Stall(means["some"], means.get("full"))
    except (KeyError, ValueError):
        return None

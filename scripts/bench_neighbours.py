"""How much a devbox that takes all it can get slows `execute` in the devbox beside it, and swells the server.

And for how long boxes are cut off when somebody deletes the network wall.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support.leftovers import claim_of
from support.noise import DISK_NOISES, NOISES, WRITE, Figures, measure, p95
from support.server import Server


def neighbours(server: Server, *, rounds: int = 5, seconds: float = 1.0) -> dict[str, Figures]:
    """The figures of every kind of noise, on a running server; for disks also of a command that syncs a file."""
    with server.api() as api:
        box = api.create(name="neighbour")
        asked = [(kind, kind, "") for kind in NOISES | DISK_NOISES]
        asked += [(f"{kind}, sync", kind, WRITE) for kind in DISK_NOISES]
        found = {
            name: measure(server, api, box, kind, rounds=rounds, seconds=seconds, work=work)
            for name, kind, work in asked
        }
        api.shutdown(box)
    return found


def repairs(server: Server, times: int = 20) -> list[float]:
    """Seconds from the deletion of the network wall by another program until it is there again, each time."""
    claim = claim_of(server.state)
    assert claim is not None, "the server has no claim"
    table = ("table", "inet", f"devboxd_{claim.name}")
    found = []
    for _ in range(times):
        subprocess.run(("nft", "delete", *table), check=True)
        begun = time.perf_counter()
        while subprocess.run(("nft", "list", *table), capture_output=True, check=False).returncode:
            assert time.perf_counter() - begun < 60, "the network wall stays away"
        found.append(time.perf_counter() - begun)
    return found


def main() -> None:
    """Measure on a server of its own and print a table."""
    server = Server()
    try:
        took = repairs(server.start())
        print(f"the network wall is up again after {statistics.median(took) * 1e3:.0f} ms", end=" ")
        print(f"({min(took) * 1e3:.0f} to {max(took) * 1e3:.0f})")
        for kind, figures in neighbours(server).items():
            quiet, noisy = p95(figures.quiet) * 1e3, p95(figures.noisy) * 1e3
            grown = (figures.most - figures.level) / (1 << 20)
            print(f"{kind:30} p95 {quiet:6.1f} ms quiet, {noisy:6.1f} ms beside it, x {figures.ratio:4.1f}", end=", ")
            print(f"at most {max(figures.quiet) * 1e3:.0f} and {max(figures.noisy) * 1e3:.0f} ms", end="; ")
            print(f"the server {grown:+5.1f} MiB; {figures.others:.2f} processors for others")
    finally:
        server.stop()


if __name__ == "__main__":
    main()

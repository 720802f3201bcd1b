"""How much a devbox that takes all it can get slows `execute` in the devbox beside it, and swells the server."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support.noise import NOISES, Figures, measure, p95
from support.server import Server


def neighbours(server: Server, *, rounds: int = 5, seconds: float = 1.0) -> dict[str, Figures]:
    """The figures of every kind of noise, on a running server."""
    with server.api() as api:
        box = api.create(name="neighbour")
        found = {kind: measure(server, api, box, kind, rounds=rounds, seconds=seconds) for kind in NOISES}
        api.shutdown(box)
    return found


def main() -> None:
    """Measure on a server of its own and print a table."""
    server = Server()
    try:
        for kind, figures in neighbours(server.start()).items():
            quiet, noisy = p95(figures.quiet) * 1e3, p95(figures.noisy) * 1e3
            grown = (figures.most - figures.level) / (1 << 20)
            print(f"{kind:24} p95 {quiet:6.1f} ms quiet, {noisy:6.1f} ms beside it, x {figures.ratio:4.1f}", end="; ")
            print(f"the server {grown:+5.1f} MiB")
    finally:
        server.stop()


if __name__ == "__main__":
    main()

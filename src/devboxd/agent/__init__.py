"""The agent `devboxd-init`, pid 1 of each box: its binary, its protocol, and the client that speaks it.

Beside it lies the other program that is compiled, `devboxd-pulse` of `engine/turns.py`.
"""

import platform
from pathlib import Path

_ARCHITECTURES = {"x86_64": "x86_64", "amd64": "x86_64", "aarch64": "aarch64", "arm64": "aarch64"}


def agent_binary() -> Path:
    """Return the agent built for this machine's architecture; raise FileNotFoundError when it was not built."""
    return _binary("devboxd-init")


def pulse_binary() -> Path:
    """Return the program `devboxd-pulse`; raise as `agent_binary`."""
    return _binary("devboxd-pulse")


def _binary(program: str) -> Path:
    machine = platform.machine().lower()
    path = Path(__file__).parent / "bin" / f"{program}-{_ARCHITECTURES.get(machine, machine)}"
    if not path.is_file():
        raise FileNotFoundError(f"cannot find {path}: run make setup")
    return path

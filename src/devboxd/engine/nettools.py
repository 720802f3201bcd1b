"""The programs `ip` and `nft`, run with many commands at once; a failure says what they said."""

from __future__ import annotations

import subprocess

from devboxd.engine.base import EngineError
from devboxd.engine.processes import which

_PACKAGES = {"ip": "iproute2", "nft": "nftables"}


def ip(*commands: str, force: bool = False) -> None:
    """Commands of `ip`, one after the other; `force` goes on after one that fails. Raises EngineError."""
    run("ip", *(["-force"] if force else []), "-batch", "-", text="\n".join(commands) + "\n")


def nft(rules: str) -> None:
    """Commands of `nft` in one transaction. Raises EngineError."""
    run("nft", "-f", "-", text=rules)


def run(name: str, *arguments: str, text: str = "") -> str:
    """Run `ip` or `nft` with `text` as its input; its output. Raises EngineError."""
    program = which(name)
    if program is None:
        raise EngineError(f"cannot set up the network: {name} is missing; install the package {_PACKAGES[name]}")
    # All descriptors of the server close at an exec by themselves; to go through thousands of them first takes long.
    done = subprocess.run(
        [program, *arguments], input=text, text=True, capture_output=True, check=False, close_fds=False
    )
    if done.returncode != 0:
        said = "; ".join(done.stderr.strip().splitlines()[:3])
        raise EngineError(f"cannot set up the network: {name} said: {said}; `devboxd doctor` shows what is missing")
    return done.stdout

"""The demo keeps its last promise, whenever somebody has seen enough of it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from support.leftovers import claim_of, groups, leftovers

pytestmark = pytest.mark.box

SCRIPT = Path(__file__).parent.parent / "scripts" / "demo.py"


def _state(pid: int) -> Path:
    """The state folder of the server that the demo with this pid started last."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        words = Path("/proc", child, "cmdline").read_bytes().decode().split("\0")
        if "serve" in words:
            return Path(words[words.index("--state") + 1])
    raise AssertionError("the demo runs no server")


@pytest.mark.parametrize("line", ["create a devbox", "SIGKILL"])
def test_an_interrupted_demo_leaves_nothing(line: str) -> None:
    """Once with a living server, once with a dead one; both times there is a box."""
    command = [sys.executable, SCRIPT]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as demo:
        assert demo.stdout is not None
        state, shown = None, ""
        for text in demo.stdout:
            shown += text
            if "make a key" in text:
                state = _state(demo.pid)
            if line in text:
                break
        assert state is not None, shown
        claim = claim_of(state)
        assert claim is not None, shown
        assert groups(f"{claim.name}/boxes/*"), "there is no box to be left"
        demo.send_signal(signal.SIGINT)
        shown += demo.communicate(timeout=120)[0]
        assert demo.returncode == 128 + signal.SIGINT, shown
    assert not state.exists()
    assert not claim.exists()
    assert leftovers(state) == []
    assert not groups(f"{claim.name}/boxes/*")

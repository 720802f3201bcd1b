"""The wheel is all that a user installs: it carries the agent for both architectures, and nothing of a checkout."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_the_wheel_carries_the_agent(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", tmp_path],
        cwd=ROOT,
        check=True,
        capture_output=True,
        timeout=170,
    )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
        for architecture, machine in (("x86_64", 62), ("aarch64", 183)):
            for program in ("devboxd-init", "devboxd-pulse"):
                binary = packed.read(f"devboxd/agent/bin/{program}-{architecture}")
                assert binary[:4] == b"\x7fELF"
                assert int.from_bytes(binary[18:20], "little") == machine
                assert b"ld-linux" not in binary
                assert b"ld-musl" not in binary
    assert "devboxd/store/migrations/versions/0001_first.py" in names or any("/versions/0001" in n for n in names)
    assert not [name for name in names if name.startswith(("tests/", "scripts/")) or name.endswith(".pyc")]

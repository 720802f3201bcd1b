"""What set-up does beside packages, tried with its own lines."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def linked(folder: Path, what: str = "image") -> str:
    """Run the lines of scripts/setup that make the link, with another place for it; what they say."""
    lines = (ROOT / "scripts" / "setup").read_text().partition("\nlink=")[2].partition("\nfi\n")[0]
    script = f'say() {{ printf "%s\\n" "$*"; }}; set -eu; what={what}; link={lines}\nfi'
    script = script.replace("/usr/local/bin", str(folder))
    done = subprocess.run(["sh", "-c", script], cwd=folder / "checkout", capture_output=True, text=True, check=True)
    assert done.stderr == ""
    return done.stdout


def test_a_link_on_path_is_made_said_and_never_put_over_something_else(tmp_path: Path) -> None:
    program = tmp_path / "checkout" / ".venv" / "bin" / "devboxd"
    program.parent.mkdir(parents=True)
    program.touch()
    link = tmp_path / "devboxd"
    assert linked(tmp_path, "base") == linked(tmp_path, "test") == ""
    assert not link.exists()
    assert linked(tmp_path).startswith(f"made the link {link}")
    assert link.resolve() == program
    assert linked(tmp_path) == "", "nothing is done twice"
    link.unlink()
    link.write_text("another program")
    assert "left as it is" in linked(tmp_path)
    assert link.read_text() == "another program"
    link.unlink()
    link.symlink_to("/nonexistent")
    assert "left as it is" in linked(tmp_path)

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


def test_a_link_of_another_checkout_is_told_with_what_to_do_and_replaced_once_that_is_gone(tmp_path: Path) -> None:
    own, other = (tmp_path / name / ".venv" / "bin" / "devboxd" for name in ("checkout", "an other"))
    for program in (own, other):
        program.parent.mkdir(parents=True)
        program.touch()
    link = tmp_path / "devboxd"
    link.symlink_to(other)
    said = linked(tmp_path)
    assert f"another installation, {other}" in said
    assert link.resolve() == other
    subprocess.run(["sh", "-c", said.strip().rpartition("mean it: ")[2]], check=True)
    assert link.resolve() == own
    assert linked(tmp_path) == ""
    link.unlink()
    link.symlink_to(other)
    other.unlink()
    said = linked(tmp_path)
    assert f"of the checkout {tmp_path / 'an other'}, which is gone" in said
    assert f"made the link {link}" in said
    assert link.resolve() == own


def installed(folder: Path, pip: str) -> subprocess.CompletedProcess[bytes]:
    """What `install` of scripts/setup does with this program in the place of pip, on a terminal."""
    lines = (ROOT / "scripts" / "setup").read_text().partition("\ninstall() {")[2].partition("\n}\n")[0]
    python = folder / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True, exist_ok=True)
    python.write_text(f"#!/bin/sh\n{pip}\n")
    python.chmod(0o755)
    (folder / ".make").mkdir(exist_ok=True)
    (folder / "run").write_text(f"set -eu\ninstall() {{{lines}\n}}\ninstall x\necho went on\n")
    return subprocess.run(
        ["script", "-qec", "sh ./run", "/dev/null"],
        cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, timeout=60, check=False,
    )  # fmt: skip


def test_pip_is_seen_at_work_and_its_failure_ends_set_up(tmp_path: Path) -> None:
    good = installed(tmp_path, 'echo "Collecting one"; echo "  hash"; echo "Downloading two.whl (3 kB)"')
    assert good.returncode == 0, good
    assert b"Collecting one" in good.stdout
    assert b"Downloading two.whl" in good.stdout
    assert b"hash" not in good.stdout
    assert b"went on" in good.stdout
    bad = installed(tmp_path, 'echo "Collecting one"; echo "no matching distribution" >&2; exit 1')
    assert bad.returncode != 0
    assert b"no matching distribution" in bad.stdout
    assert b"went on" not in bad.stdout

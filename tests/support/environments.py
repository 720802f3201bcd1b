"""Interpreters outside the checkout: of published clients, each made once per machine, and for commands of boxes."""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "devboxd" / "clients"
PYTHON_VERSIONS = ("1.32.0", "2.0.0", "3.0.0")
OLD_PYTHON_VERSIONS = ("0.16.0", "0.40.0", "1.0.0")
NPM_VERSION = "^1.32.0"
PYTHON = os.path.realpath(sys.executable)
"""For commands that need no packages, also where a mount hides the checkout."""


def python_client(version: str) -> Path:
    """The interpreter of an environment that has `runloop-api-client` of this version."""
    return python_environment(f"python-{version}", [f"runloop-api-client=={version}"])


def python_environment(name: str, requirements: Sequence[str]) -> Path:
    """The interpreter of a virtual environment with these requirements, made when it is missing."""

    def make(folder: Path) -> None:
        uv = Path(sys.executable).with_name("uv")
        if uv.exists():
            _run(str(uv), "venv", "-q", "--python", sys.executable, str(folder))
            _run(str(uv), "pip", "install", "-q", "--python", str(folder / "bin/python"), *requirements)
        else:
            _run(sys.executable, "-m", "venv", str(folder))
            _run(str(folder / "bin/pip"), "install", "-q", *requirements)

    return _made_once(name, make) / "bin" / "python"


def npm_client() -> Path:
    """A folder whose node_modules has `@runloop/api-client`, the newest of its first generation."""

    def make(folder: Path) -> None:
        folder.mkdir()
        (folder / "package.json").write_text('{"private": true}\n')
        _run("npm", "install", "--prefix", str(folder), "--no-audit", "--no-fund", f"@runloop/api-client@{NPM_VERSION}")

    return _made_once(f"npm-{NPM_VERSION.lstrip('^')}", make)


def no_node() -> str | None:
    """Why the npm client cannot be tested here, or None."""
    missing = [name for name in ("node", "npm") if shutil.which(name) is None]
    return f"the npm client needs {' and '.join(missing)}, which this machine lacks" if missing else None


def _made_once(name: str, make: Callable[[Path], None]) -> Path:
    """The folder of this name; a file lock lets one process make it, and it counts as made only when complete."""
    CACHE.mkdir(parents=True, exist_ok=True)
    folder = CACHE / name
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            make(folder)
            (folder / "complete").touch()
    return folder


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"cannot run {' '.join(command)}: {done.stdout}{done.stderr}")

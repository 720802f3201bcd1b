"""Builds the agent `devboxd-init` and `devboxd-pulse`: as a hook of hatchling, or in place by `python hatch_build.py`.

The binaries land in src/devboxd/agent/bin, static, one for each architecture; ziglang compiles them, so that nobody
needs a compiler. With CC set that compiler is used, for this machine's architecture alone.
"""

import hashlib
import os
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.resolve()
PROGRAMS = {"devboxd-init": ROOT / "agent", "devboxd-pulse": ROOT / "pulse"}
"""The folder with the sources of each."""
BINARIES = ROOT / "src" / "devboxd" / "agent" / "bin"
ARCHITECTURES = ("x86_64", "aarch64")
FLAGS = ("-std=c11", "-D_GNU_SOURCE", "-static", "-Os", "-s", "-Wall", "-Wextra", "-Werror")


def compilers() -> dict[str, list[str]]:
    """Return the compiler's command for each architecture that can be built."""
    own = os.environ.get("CC")
    if own:
        machine = {"amd64": "x86_64", "arm64": "aarch64"}.get(platform.machine().lower(), platform.machine().lower())
        return {machine: shlex.split(own)}
    zig = [sys.executable, "-m", "ziglang", "cc", "-target"]
    return {name: [*zig, f"{name}-linux-musl"] for name in ARCHITECTURES}


def fingerprint(command: list[str], files: list[Path]) -> str:
    """Return a hash of everything that decides the binary, but for the place of the Python that runs ziglang."""
    digest = hashlib.sha256(repr([*command[1:], *FLAGS]).encode())
    digest.update(command[0].encode() if os.environ.get("CC") else _zig_version())
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


def _zig_version() -> bytes:
    from importlib.metadata import version

    return version("ziglang").encode()


@contextmanager
def zig_environment() -> Iterator[dict[str, str]]:
    """Yield an environment in which ziglang has a cache, also without a home."""
    if "ZIG_GLOBAL_CACHE_DIR" in os.environ:
        yield dict(os.environ)
        return
    with tempfile.TemporaryDirectory(prefix="devboxd-build-") as folder:
        home = os.environ.get("XDG_CACHE_HOME") or (os.environ.get("HOME") and os.environ["HOME"] + "/.cache")
        cache = Path(home or folder) / "devboxd-build"
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError:
            cache = Path(folder)
        yield {**os.environ, "ZIG_GLOBAL_CACHE_DIR": str(cache), "ZIG_LOCAL_CACHE_DIR": str(cache)}


def compile_program(command: list[str], files: list[Path], target: Path) -> None:
    """Compile to a temporary name and rename, for the old binary may be running."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    arguments = [*command, *FLAGS, "-o", str(temporary), *(str(f) for f in files if f.suffix == ".c")]
    try:
        with zig_environment() as environment:
            result = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
        if result.returncode != 0:
            raise SystemExit(f"cannot build {target.name}: {shlex.join(arguments)} failed\n{result.stderr}")
        temporary.chmod(0o755)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def build() -> list[Path]:
    """Build what is not up to date and return all binaries."""
    BINARIES.mkdir(parents=True, exist_ok=True)
    built = []
    for program, sources in PROGRAMS.items():
        files = sorted([*sources.glob("*.c"), *sources.glob("*.h")])
        for architecture, command in compilers().items():
            target = BINARIES / f"{program}-{architecture}"
            stamp = BINARIES / f".{target.name}.stamp"
            wanted = fingerprint(command, files)
            if not target.is_file() or not stamp.is_file() or stamp.read_text() != wanted:
                compile_program(command, files, target)
                stamp.write_text(wanted)
            built.append(target)
    return built


try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ModuleNotFoundError:  # called as a script, where hatchling need not be installed
    pass
else:

    class CustomBuildHook(BuildHookInterface):  # type: ignore[type-arg]
        """Builds the programs before a wheel, editable ones included, and puts them into the wheel."""

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            """Called by hatchling before the wheel is packed."""
            for binary in build():
                build_data["artifacts"].append(str(binary.relative_to(ROOT)))


if __name__ == "__main__":
    for path in build():
        print(path)

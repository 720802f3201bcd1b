"""Run the published Python client's own live tests against a fresh server and say which pass.

Exit status 0: every test passed or stands in tests/conformance/not-yet-supported.txt, and none of those passed.
1: otherwise. A test that is listed and passes has to be taken off the list, which so only ever shrinks.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from support.environments import CACHE, python_environment  # noqa: E402
from support.server import Server  # noqa: E402

VERSION = "3.0.0"
LIST = ROOT / "tests" / "conformance" / "not-yet-supported.txt"
RUN_S = 540
TOOLS = ("pyright", "mypy", "ruff", "pytest-cov")
"""Development tools of the client that its tests do not need."""


def main() -> int:
    """Run everything; the exit status."""
    begun = time.monotonic()
    source = client_source()
    interpreter = python_environment(f"conformance-{VERSION}", requirements(source))
    listed = read_list(LIST)
    print(f"conformance: live tests of runloop-api-client {VERSION}, {len(listed)} listed as not yet supported")
    server = Server()
    try:
        outcomes = run_tests(source, interpreter, server.start(), listed)
    finally:
        server.stop()
    status = report(outcomes, listed)
    print(f"conformance: {time.monotonic() - begun:.0f} s")
    return status


def client_source() -> Path:
    """The unpacked source distribution of the client, downloaded once."""
    folder = CACHE / f"runloop_api_client-{VERSION}"
    if not (folder / "tests").is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as name:
            wanted = f"runloop-api-client=={VERSION}"
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", ":all:", "-d", name]
            subprocess.run([*command, wanted], check=True, timeout=300)
            (archive,) = Path(name).glob("*.tar.gz")
            with tarfile.open(archive) as packed:
                packed.extractall(CACHE, filter="data")
    return folder


def requirements(source: Path) -> list[str]:
    """The client itself and what its own description says that its tests need."""
    described = tomllib.loads((source / "pyproject.toml").read_text())
    needed = [str(text) for text in described["dependency-groups"]["dev"]]
    return [str(source), *(text for text in needed if not text.startswith(TOOLS))]


def read_list(path: Path) -> dict[str, str]:
    """Test name to reason; a reason is the comment line above its tests."""
    listed, reason = {}, ""
    for line in path.read_text().splitlines():
        if line.startswith("#"):
            reason = line.removeprefix("#").strip()
        elif line.strip():
            listed[line.strip()] = reason
    return listed


def run_tests(source: Path, interpreter: Path, server: Server, listed: Iterable[str]) -> dict[str, tuple[str, str]]:
    """Name to outcome and reason, of every test that was collected."""
    with tempfile.TemporaryDirectory() as name:
        result = Path(name, "result.json")
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("RUNLOOP_")},
            "RUNLOOP_BASE_URL": server.url,
            "RUNLOOP_API_KEY": server.key,
            "RUN_EXAMPLE_LIVE_TESTS": "1",
            "CONFORMANCE_LISTED": "\n".join(listed),
            "CONFORMANCE_RESULT": str(result),
            "PYTHONPATH": str(LIST.parent),
        }
        command = [interpreter, "-m", "pytest", "-o", "addopts=", "-o", "filterwarnings=default", "-p", "plugin"]
        command += ["-q", "--tb=short", "-n", "4", "--dist=loadfile", "--timeout=120", "tests/smoketests"]
        with subprocess.Popen(
            [str(word) for word in command],
            cwd=source,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        ) as running:
            try:
                output, _ = running.communicate(timeout=RUN_S)
            except subprocess.TimeoutExpired:
                running.terminate()
                output, _ = running.communicate()
        if not result.exists():
            raise SystemExit(f"cannot tell how the tests ended (more than {RUN_S} s?):\n{output.decode()[-8000:]}")
        (Path(tempfile.gettempdir()) / f"devboxd-conformance-{os.getuid()}.log").write_bytes(output)
        found: dict[str, tuple[str, str]] = json.loads(result.read_text())
        return found


def report(outcomes: Mapping[str, tuple[str, str]], listed: Mapping[str, str]) -> int:
    """Print every test by its name and the numbers; 0 when the list and the outcomes agree."""
    groups: dict[str, list[str]] = {
        "passed": [],
        "skipped": [],
        "not yet supported": [],
        "FAILED": [],
        "WRONGLY LISTED": [],
    }
    for name, (outcome, reason) in sorted(outcomes.items()):
        if outcome == "passed":
            groups["WRONGLY LISTED" if name in listed else "passed"].append(name)
        elif outcome == "skipped":
            groups["skipped"].append(f"{name}: {reason}")
        elif name in listed:
            groups["not yet supported"].append(f"{name}: {listed[name]}")
        else:
            groups["FAILED"].append(f"{name}: {reason}")
    groups["WRONGLY LISTED"] += [f"{name}: there is no such test" for name in listed if name not in outcomes]
    for title, names in groups.items():
        for name in names:
            print(f"{title:18} {name}")
    print("conformance: " + ", ".join(f"{len(names)} {title}" for title, names in groups.items()))
    return 1 if groups["FAILED"] or groups["WRONGLY LISTED"] or not outcomes else 0


if __name__ == "__main__":
    raise SystemExit(main())

"""The API as /openapi.json describes it, driven by schemathesis against a real server with real devboxes."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from devboxd.routes import ROUTES
from support.api import Api
from support.environments import python_environment
from support.server import Server

pytestmark = [pytest.mark.box, pytest.mark.timeout(600)]

SCHEMATHESIS = "4.32.5"
HERE = Path(__file__).parent / "clients"
NOT_HERE = "positive_data_acceptance,only_public_paths_answer"
"""What fits the description may be refused all the same: a blank command, a devbox that has ended."""


@pytest.fixture(scope="module")
def world(server: Server, api: Api, box: str) -> Iterator[dict[str, str]]:
    """What exists for the cases: a running devbox and an ended one, with executions."""
    command = "printf 'first\\n\\377\\xe2\\x82'; echo second >&2"
    ended = api.create(name="ended before the cases")
    past = api.run(ended, command)["execution_id"]
    api.shutdown(ended)
    over = api.run(box, command)["execution_id"]
    lasting = api.start(box, "trap '' INT; exec sleep 900", attach_stdin=True)
    yield {
        "url": server.url,
        "key": server.key,
        "live": box,
        "ended": ended,
        "past": past,
        "over": over,
        "lasting": lasting,
    }
    assert api.box(box)["status"] == "running", api.box(box)
    assert api.execution(box, lasting)["status"] == "running"
    assert api.output(box, "echo unharmed") == "unharmed\n"


def schemathesis(world: dict[str, str], folder: Path, *options: str) -> None:
    """Run `st run`. Fails with its report when it found anything."""
    python = python_environment(f"schemathesis-{SCHEMATHESIS}", [f"schemathesis=={SCHEMATHESIS}"])
    environment = {
        **os.environ,
        "PYTHONPATH": str(HERE),
        "SCHEMATHESIS_HOOKS": "schema_hooks",
        "DEVBOXD_WORLD": json.dumps(world),
    }
    program = [python.with_name("st"), "--config-file", HERE / "schemathesis.toml", "run", "--no-color"]
    done = subprocess.run(
        [*program, world["url"] + "/openapi.json", *options],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=580,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-2000:]
    assert f"Tested: {len(ROUTES) + 3}\n" in done.stdout, done.stdout


def test_every_answer_is_as_described(world: dict[str, str], tmp_path: Path) -> None:
    """No 5xx, no code, type or shape that the description does not have, nothing accepted that it forbids."""
    key = f"Authorization: Bearer {world['key']}"
    schemathesis(world, tmp_path, "-H", key, "--exclude-checks", NOT_HERE)


def test_nothing_is_answered_without_a_key(world: dict[str, str], tmp_path: Path) -> None:
    """The check `ignored_auth` of the other test tries wrong keys."""
    schemathesis(world, tmp_path, "--phases", "fuzzing", "-n", "3", "--checks", "only_public_paths_answer")

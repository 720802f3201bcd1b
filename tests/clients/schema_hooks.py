"""Hooks of schemathesis: its cases meet devboxes that exist, never wait long, and leave nothing running.

Loaded by `st run` in an environment of its own; the ids come from the test in DEVBOXD_WORLD, as JSON.
"""

from __future__ import annotations

import json
import os
import random
from typing import Any

import requests
import schemathesis

HELD_S = 0.1
"""How long a case holds an answer at most: what never comes is no subject here."""
PUBLIC = {"/", "/healthz", "/openapi.json", "/docs"}
CREATES = {"/v1/devboxes", "/v1/devboxes/create_and_await_running"}
ENDED = {"shutdown", "suspend", "tail"}
"""What must not be done to the devbox that all cases share, or would have no end there."""
WORLD: dict[str, str] = json.loads(os.environ["DEVBOXD_WORLD"])
"""url, key; `live` and `ended` devboxes; `lasting` and `over` executions of the first, `past` of the second."""
UNKNOWN = "dbx_" + "0" * 21
FILES = ("/etc/passwd", "/root/secret", "/dev/zero", "/proc/self/status", ".", "new file")

_session = requests.Session()
_session.headers["authorization"] = f"Bearer {WORLD['key']}"
_own = random.Random()


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: Any) -> None:
    """Put ids that exist into three quarters of the cases, and paths of files that do."""
    last = case.path.rsplit("/", 1)[-1]
    names, body = case.path_parameters, case.body
    if isinstance(names, dict) and "devbox_id" in names and _own.random() < 0.1:
        names["devbox_id"] = UNKNOWN
    elif isinstance(names, dict) and "devbox_id" in names and _own.random() < 0.8:
        ended = last in ENDED or _own.random() < 0.3
        names["devbox_id"] = WORLD["ended" if ended else "live"]
        if "execution_id" in names:
            # A stream of what runs has no end, and what is killed must not be needed any more.
            lasting = not last.startswith("stream_") and last != "kill" and _own.random() < 0.6
            names["execution_id"] = WORLD["past" if ended else "lasting" if lasting else "over"]
            if last == "kill" and not ended:
                names["execution_id"] = _started()
    if isinstance(names, dict):  # ids of earlier answers come back as values of later cases
        if last in ENDED and names.get("devbox_id") == WORLD["live"]:
            names["devbox_id"] = WORLD["ended"]
        if last == "kill" and names.get("execution_id") == WORLD["lasting"]:
            names["execution_id"] = WORLD["over"]
    if isinstance(body, dict) and case.media_type == "application/json":
        if last == "wait_for_status" and isinstance(body.get("timeout_seconds") or HELD_S, int | float):
            body["timeout_seconds"] = min(body.get("timeout_seconds") or HELD_S, HELD_S)
        for name in ("path", "file_path"):
            if isinstance(body.get(name), str) and _own.random() < 0.5:
                body[name] = _own.choice(FILES)


@schemathesis.hook
def after_call(context: Any, case: Any, response: Any) -> None:
    """Shut down what was made."""
    if case.method == "POST" and case.path in CREATES and response.status_code == 200:
        _post(f"/v1/devboxes/{response.json()['id']}/shutdown")


@schemathesis.check
def only_public_paths_answer(ctx: Any, response: Any, case: Any) -> None:
    """For a run without a key: 401 everywhere but on the public paths. 405 is said of every path, whoever asks."""
    described = case.method.lower() in case.operation.schema.raw_schema["paths"][case.path]
    expected = (200 if case.path in PUBLIC else 401) if described else 405
    assert response.status_code == expected, f"without a key: {response.status_code} {response.text[:500]}"


def _started() -> str:
    body = {"command": "exec sleep 5", "attach_stdin": True}
    return str(_post(f"/v1/devboxes/{WORLD['live']}/execute_async", body)["execution_id"])


def _post(path: str, body: Any = None) -> Any:
    answer = _session.post(WORLD["url"] + path, json=body, timeout=30)
    assert answer.status_code == 200, answer.text
    return answer.json()

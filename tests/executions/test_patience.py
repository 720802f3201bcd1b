"""What takes long is held: a quiet stream keeps awake, and a command may outlast every held answer."""

from __future__ import annotations

import time

import pytest

from support.api import Api

pytestmark = pytest.mark.box


def test_a_quiet_stream_sends_a_comment_in_time(api: Api, box: str) -> None:
    execution = api.start(box, "cat", attach_stdin=True)
    path = f"/v1/devboxes/{box}/executions/{execution}/stream_stdout_updates"
    begun = time.monotonic()
    with api.http.stream("GET", path) as answer:
        first = next(answer.iter_bytes())
    assert first == b": keep-alive\n\n"
    assert 9 < time.monotonic() - begun < 14
    api.send(box, execution, signal="EOF")


def test_execute_sync_outlasts_every_held_answer(api: Api, box: str) -> None:
    view = api.call("POST", f"/v1/devboxes/{box}/execute_sync", {"command": "sleep 26; echo done"})
    assert view["stdout"] == "done\n"

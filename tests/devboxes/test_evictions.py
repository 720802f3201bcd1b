"""The stream of evictions: idle, for nothing is evicted, and ended as other streams are."""

from __future__ import annotations

import threading

import pytest
from runloop_api_client import Runloop

from support.api import Api
from support.server import Server

pytestmark = pytest.mark.box

PATH = "/v1/devboxes/evictions/watch"
EVENTS = {"accept": "text/event-stream"}


def test_who_accepts_neither_a_stream_nor_json_gets_nothing(api: Api) -> None:
    answer = api.http.get(PATH, headers={"accept": "text/plain"})
    assert (answer.status_code, answer.content) == (200, b"")
    assert answer.headers["content-type"].startswith("text/plain")
    assert api.http.get(PATH, headers={"authorization": "", **EVENTS}).status_code == 401
    for accepted in ("text/event-stream", "Application/JSON", "*/*", ""):
        with api.http.stream("GET", PATH, headers={"accept": accepted}) as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            assert next(stream.iter_bytes()).startswith(b":"), "a comment keeps the connection awake"


def test_the_stream_lasts_until_the_server_stops(own_server: Server) -> None:
    found: list[str] = []
    begun = threading.Event()

    def read() -> None:
        with own_server.api() as api, api.http.stream("GET", PATH, headers=EVENTS) as stream:
            for line in stream.iter_lines():
                begun.set()
                found.append(line)

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    assert begun.wait(30)
    own_server.terminate()
    reader.join(30)
    assert not reader.is_alive()
    error = [line for line in found if line and not line.startswith(":")]
    assert error[0] == "event: error"
    assert '"code":408' in error[1]


def test_the_published_client_watches(server: Server) -> None:
    client = Runloop(base_url=server.url, bearer_token=server.key, max_retries=0)
    for headers in ({"Accept": "text/event-stream"}, {}):  # by itself it says that it accepts JSON alone
        with client.devboxes.watch_evictions(extra_headers=headers) as stream:
            assert stream.response.headers["content-type"].startswith("text/event-stream")
            assert next(stream.response.iter_bytes()).startswith(b":")

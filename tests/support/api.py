"""A small client for tests: plain HTTP, no retries, answers as they came."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

JsonObject = dict[str, Any]


class Api:
    """Calls to one server with one key; every method fails when the answer is not the one expected."""

    def __init__(self, url: str, key: str, **options: Any) -> None:
        self.http = httpx.Client(
            base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=httpx.Timeout(60, connect=5), **options
        )

    def __enter__(self) -> Api:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()

    def call(self, method: str, path: str, body: Any = None, status: int = 200, **options: Any) -> Any:
        """One request with a JSON body; the decoded answer, which must have this status."""
        if body is not None:
            options["json"] = body
        answer = self.http.request(method, path, **options)
        assert answer.status_code == status, f"{method} {path}: {answer.status_code} {answer.text[:2000]}"
        return answer.json() if answer.content else None

    def refused(self, method: str, path: str, code: int, body: Any = None, **options: Any) -> str:
        """One request that must be answered by this error in the form that people can read; its message."""
        answer = self.call(method, path, body, status=code, **options)
        assert set(answer) == {"code", "message"}, answer
        assert answer["code"] == code, answer
        message = answer["message"]
        assert isinstance(message, str), answer
        assert message.startswith("cannot "), message
        assert len(message) < 2000, "a message is for people: it does not repeat what was sent at length"
        return message

    # devboxes

    def create(self, **body: Any) -> str:
        """A running devbox; its id."""
        view = self.call("POST", "/v1/devboxes/create_and_await_running", body)
        return str(self.wait_box(view["id"], "running")["id"])

    def wait_box(self, box: str, *statuses: str, seconds: float = 120) -> JsonObject:
        """Wait until the devbox is in one of these statuses."""
        return self._wait(f"/v1/devboxes/{box}", statuses, seconds)

    def wake(self, box: str) -> JsonObject:
        """Resume a devbox that is suspended, or is about to be; its view before that."""
        asleep = self.wait_box(box, "suspended")
        self.call("POST", f"/v1/devboxes/{box}/resume")
        self.wait_box(box, "running")
        return asleep

    def boxes(self, **query: Any) -> list[JsonObject]:
        """One page of devboxes, as large as is allowed."""
        found: list[JsonObject] = self.call("GET", "/v1/devboxes", params={"limit": 5000, **query})["devboxes"]
        return found

    def box(self, box: str) -> JsonObject:
        view: JsonObject = self.call("GET", f"/v1/devboxes/{box}")
        return view

    def shutdown(self, box: str) -> JsonObject:
        view: JsonObject = self.call("POST", f"/v1/devboxes/{box}/shutdown")
        return view

    # executions

    def run(self, box: str, command: str, seconds: float = 60, **body: Any) -> JsonObject:
        """Run a command to its end; its view."""
        started = self.call("POST", f"/v1/devboxes/{box}/execute_async", {"command": command, **body})
        return self.wait(box, started["execution_id"], seconds)

    def output(self, box: str, command: str, **body: Any) -> str:
        """What a command printed; it must succeed."""
        view = self.run(box, command, **body)
        assert view["exit_status"] == 0, view
        return str(view["stdout"])

    def start(self, box: str, command: str, **body: Any) -> str:
        """Start a command; the execution's id."""
        view = self.call("POST", f"/v1/devboxes/{box}/execute_async", {"command": command, **body})
        return str(view["execution_id"])

    def execution(self, box: str, execution: str, **query: Any) -> JsonObject:
        view: JsonObject = self.call("GET", f"/v1/devboxes/{box}/executions/{execution}", params=query)
        return view

    def wait(self, box: str, execution: str, seconds: float = 60) -> JsonObject:
        """Wait until an execution has completed; its view."""
        return self._wait(f"/v1/devboxes/{box}/executions/{execution}", ("completed",), seconds)

    def send(
        self, box: str, execution: str, text: str | None = None, signal: str | None = None, **options: Any
    ) -> bool:
        """Send text or a signal to a running execution; whether it was taken."""
        body = {"text": text} if signal is None else {"signal": signal}
        path = f"/v1/devboxes/{box}/executions/{execution}/send_std_in"
        return bool(self.call("POST", path, body, **options)["success"])

    @contextmanager
    def stream(
        self, box: str, execution: str, which: str = "stdout", offset: int | None = None
    ) -> Iterator[Iterator[Event]]:
        """The raw events of an output stream."""
        path = f"/v1/devboxes/{box}/executions/{execution}/stream_{which}_updates"
        query = {} if offset is None else {"offset": str(offset)}
        with self.events(path, query) as found:
            yield found

    @contextmanager
    def events(self, path: str, query: dict[str, str]) -> Iterator[Iterator[Event]]:
        """The raw events of any stream."""
        with self.http.stream("GET", path, params=query, headers={"accept": "text/event-stream"}) as answer:
            if answer.status_code != 200:
                answer.read()
            assert answer.status_code == 200, answer.text
            assert answer.headers["content-type"].startswith("text/event-stream")
            yield events(answer)

    def streamed(self, box: str, execution: str, which: str = "stdout", offset: int | None = None) -> str:
        """All output from a position to the end of the stream, which must be a clean one."""
        with self.stream(box, execution, which, offset) as found:
            return "".join(event.output for event in found)

    # files

    def write(self, box: str, path: str, contents: str) -> None:
        self.call("POST", f"/v1/devboxes/{box}/write_file_contents", {"file_path": path, "contents": contents})

    def read(self, box: str, path: str) -> str:
        answer = self.http.post(f"/v1/devboxes/{box}/read_file_contents", json={"file_path": path})
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"].startswith("text/plain")
        return answer.text

    def upload(self, box: str, path: str, content: bytes) -> httpx.Response:
        parts = {"file": ("file", content)}
        answer = self.http.post(f"/v1/devboxes/{box}/upload_file", data={"path": path}, files=parts)
        assert answer.status_code == 200, answer.text
        return answer

    def download(self, box: str, path: str) -> bytes:
        answer = self.http.post(f"/v1/devboxes/{box}/download_file", json={"path": path})
        assert answer.status_code == 200, answer.text
        return answer.content

    def _wait(self, path: str, statuses: tuple[str, ...], seconds: float) -> JsonObject:
        """Ask again and again, as clients do: 408 means that the time of one question is over."""
        deadline = time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            body = {"statuses": list(statuses), "timeout_seconds": min(left, 20)}
            answer = self.http.post(f"{path}/wait_for_status", json=body)
            if answer.status_code == 200:
                view: JsonObject = answer.json()
                return view
            assert answer.status_code == 408, f"{path}: {answer.status_code} {answer.text}"
        raise AssertionError(f"{path} was not {' or '.join(statuses)} in {seconds} s: {self.call('GET', path)}")


class Event:
    """One server-sent event of an output stream."""

    def __init__(self, name: str, data: JsonObject) -> None:
        self.name = name
        self.data = data

    @property
    def output(self) -> str:
        assert self.name == "message", f"the stream ended early: {self.data}"
        return str(self.data["output"])

    @property
    def offset(self) -> int:
        return int(self.data["offset"])

    @property
    def end(self) -> int:
        """The position after this event's output."""
        return self.offset + len(self.output.encode())


def events(answer: httpx.Response) -> Iterator[Event]:
    """Parse server-sent events; comments are left out, anything that the contract does not know fails."""
    name, data = "message", ""
    for line in _lines(answer.iter_bytes()):
        if line.startswith(":"):
            continue
        if not line:
            if data:
                yield Event(name, json.loads(data))
            name, data = "message", ""
            continue
        field, _, value = line.partition(": ")
        assert field in ("event", "data"), f"a field that confuses clients: {line!r}"
        if field == "event":
            name = value
        else:
            data += value


def _lines(pieces: Iterator[bytes]) -> Iterator[str]:
    """Lines end with a line feed only: other characters that Unicode counts as line ends may stand in the data."""
    rest = b""
    for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line.decode()
    assert not rest, f"the stream ended in the middle of a line: {rest!r}"

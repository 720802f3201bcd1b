"""`devboxd boxes exec`: a command in a box with its output live, its input passed on, its exit code returned.

Bytes pass unchanged in both directions.
"""

from __future__ import annotations

import base64
import json
import os
import sys
import threading
import time
from typing import Any, TextIO

from devboxd.errors import ApiError, SetupError
from devboxd.remote import Remote

_PIECE = 256 * 1024
_PAUSE_SECONDS = 0.2


def execute(remote: Remote, box_id: str, command: str, as_json: bool) -> int:
    """Run the command; its exit code. An interrupt from the keyboard reaches it, a second one kills it.

    Raises SetupError or ApiError, after the command was killed, when its input or output cannot be passed on.
    """
    started = remote.call("POST", f"/v1/devboxes/{box_id}/execute_async", {"command": command, "attach_stdin": True})
    path = f"/v1/devboxes/{box_id}/executions/{started['execution_id']}"
    pipes: list[_Pipe] = [
        _Output(remote, f"{path}/stream_stdout_updates", sys.stderr if as_json else sys.stdout),
        _Output(remote, f"{path}/stream_stderr_updates", sys.stderr),
    ]
    source = _Input(remote, path)
    try:
        for pipe in (*pipes, source):
            pipe.start()
        _joined(remote, path, pipes)
        view = _completed(remote, path)
    except (KeyboardInterrupt, ApiError, SetupError, OSError):
        remote.call("POST", f"{path}/kill", {"kill_process_group": True})
        raise
    if source.error is not None:
        raise source.error
    if as_json:
        print(json.dumps(view))
    return int(view["exit_status"] or 0)


def _joined(remote: Remote, path: str, pipes: list[_Pipe]) -> None:
    """Wait for the end of all output; the first interrupt meanwhile goes to the command."""
    try:
        for pipe in pipes:
            pipe.finish()
    except KeyboardInterrupt:
        if not remote.call("POST", f"{path}/send_std_in", {"signal": "INTERRUPT"})["success"]:
            raise
        for pipe in pipes:
            pipe.finish()


def _completed(remote: Remote, path: str) -> Any:
    while True:
        try:
            return remote.call("POST", f"{path}/wait_for_status", {"statuses": ["completed"]})
        except ApiError as error:
            if error.code != 408:
                raise


class _Pipe(threading.Thread):
    """Copies bytes in one direction; what goes wrong is kept for who waits for the end."""

    def __init__(self, remote: Remote, path: str) -> None:
        super().__init__(daemon=True)
        self._remote = remote
        self._path = path
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            self._copy()
        except Exception as error:
            self.error = error

    def _copy(self) -> None:
        raise NotImplementedError

    def finish(self) -> None:
        """Wait for the end; what went wrong is raised here."""
        self.join()
        if self.error is not None:
            raise self.error


class _Output(_Pipe):
    """From a stream of the command to a file of ours."""

    def __init__(self, remote: Remote, path: str, target: TextIO) -> None:
        super().__init__(remote, path)
        self._target = target

    def _copy(self) -> None:
        for piece in self._remote.stream(self._path):
            self._target.buffer.write(piece)
            self._target.buffer.flush()


class _Input(_Pipe):
    """From our standard input to the command, then EOF. A command that is not given all of it is killed.

    A terminal is not passed on. A thread that a finished command leaves behind is no loss.
    """

    def _copy(self) -> None:
        try:
            while not sys.stdin.isatty() and (piece := os.read(sys.stdin.fileno(), _PIECE)):
                if not self._deliver({"base64": base64.b64encode(piece).decode()}):
                    return
            self._deliver({"signal": "EOF"})
        except (ApiError, SetupError, OSError) as error:
            self.error = error
            self._remote.call("POST", f"{self._path}/kill", {"kill_process_group": True})

    def _deliver(self, body: dict[str, str]) -> bool:
        """Send until it is taken; the command may be slower than we are. False when the command takes no more."""
        while not self._remote.call("POST", f"{self._path}/send_std_in", body)["success"]:
            if self._remote.call("GET", self._path)["status"] == "completed":
                return False
            time.sleep(_PAUSE_SECONDS)
        return True

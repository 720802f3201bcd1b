"""`devboxd boxes exec`: a command in a box with its output live, its input passed on, its exit code returned."""

from __future__ import annotations

import codecs
import json
import os
import sys
import threading
import time
from typing import Any, TextIO

from devboxd.errors import ApiError, SetupError
from devboxd.remote import Remote

_PIECE = 64 * 1024
_PAUSE_SECONDS = 0.2


def execute(remote: Remote, box_id: str, command: str, as_json: bool) -> int:
    """Run the command; its exit code. An interrupt from the keyboard kills it in the box, too."""
    attach = not sys.stdin.isatty()
    started = remote.call("POST", f"/v1/devboxes/{box_id}/execute_async", {"command": command, "attach_stdin": attach})
    path = f"/v1/devboxes/{box_id}/executions/{started['execution_id']}"
    readers = [
        _Reader(remote, f"{path}/stream_stdout_updates", sys.stderr if as_json else sys.stdout),
        _Reader(remote, f"{path}/stream_stderr_updates", sys.stderr),
    ]
    try:
        for reader in readers:
            reader.start()
        if attach:
            threading.Thread(target=_forward_stdin, args=(remote, path), daemon=True).start()
        for reader in readers:
            reader.finish()
        view = _completed(remote, path)
    except KeyboardInterrupt:
        remote.call("POST", f"{path}/kill", {"kill_process_group": True})
        raise
    if as_json:
        print(json.dumps(view))
    return int(view["exit_status"] or 0)


def _completed(remote: Remote, path: str) -> Any:
    while True:
        try:
            return remote.call("POST", f"{path}/wait_for_status", {"statuses": ["completed"]})
        except ApiError as error:
            if error.code != 408:
                raise


class _Reader(threading.Thread):
    """Copies one stream to a file of ours."""

    def __init__(self, remote: Remote, path: str, target: TextIO) -> None:
        super().__init__(daemon=True)
        self._remote = remote
        self._path = path
        self._target = target
        self._error: Exception | None = None

    def run(self) -> None:
        try:
            for text in self._remote.stream(self._path):
                self._target.buffer.write(text.encode())
                self._target.buffer.flush()
        except Exception as error:
            self._error = error

    def finish(self) -> None:
        """Wait for the end of the stream; what went wrong is raised here."""
        self.join()
        if self._error is not None:
            raise self._error


def _forward_stdin(remote: Remote, path: str) -> None:
    """Send standard input to the command, then EOF; a thread that a finished command leaves behind is no loss."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    try:
        while piece := os.read(sys.stdin.fileno(), _PIECE):
            if (text := decoder.decode(piece)) and not _deliver(remote, path, {"text": text}):
                return
        decoder.decode(b"", final=True)
        _deliver(remote, path, {"signal": "EOF"})
    except UnicodeDecodeError:
        _complain("cannot pass standard input on: it is not UTF-8 text; write it to a file in the box instead")
        _deliver(remote, path, {"signal": "EOF"})
    except (ApiError, SetupError, OSError) as error:
        _complain(str(error))


def _deliver(remote: Remote, path: str, body: dict[str, str]) -> bool:
    """Send until it is taken; the command may be slower than we are. False when the command has ended."""
    while not remote.call("POST", f"{path}/send_std_in", body)["success"]:
        if remote.call("GET", path)["status"] == "completed":
            return False
        time.sleep(_PAUSE_SECONDS)
    return True


def _complain(message: str) -> None:
    print(message, file=sys.stderr)

"""The command line's client of a server: plain requests by the standard library, so that it starts fast."""

from __future__ import annotations

import base64
import copy
import errno
import http.client
import json
import os
import socket
import ssl
import time
import uuid
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import quote, urlencode, urlsplit

from devboxd.errors import ApiError, SetupError
from devboxd.path_errors import explained, shown

DEFAULT_URL = "http://127.0.0.1:8080"
_TIMEOUT_SECONDS = 60.0
_RETRY_SECONDS = 60.0
"""How long a server that does not answer (it may be restarting) is asked again."""
_PAUSE_SECONDS = 0.5

_PIECE = 64 * 1024
_REMEMBERED = 100_000
_NO_WAY = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EACCES, errno.EPERM)

Broken = (OSError, http.client.HTTPException)


class Remote:
    """One server and one key. Every call may be made from several threads at once."""

    def __init__(self, url: str, key: str) -> None:
        self.url = url
        self._key = key
        self._wait = _TIMEOUT_SECONDS
        self._reached = False
        try:
            parts = urlsplit(url if "://" in url else f"http://{url}")
            self._host, self._port = parts.hostname or "", parts.port
        except ValueError:
            parts = urlsplit("")
        if parts.scheme not in ("http", "https") or not self._host:
            raise SetupError(f"cannot use {url!r} as the server's address; give one such as {DEFAULT_URL}")
        self._secure = parts.scheme == "https"
        self._base = parts.path.rstrip("/").removesuffix("/v1")

    @classmethod
    def find(cls, url: str | None, key_file: Path | None, environ: Mapping[str, str] = os.environ) -> Remote:
        """The server and key of the options, else of the environment. Raises SetupError when there is no key."""
        address = url or environ.get("DEVBOXD_URL") or environ.get("RUNLOOP_BASE_URL") or DEFAULT_URL
        if key_file is not None:
            try:
                key = key_file.read_text().strip()
            except (OSError, UnicodeDecodeError) as error:
                raise SetupError(f"cannot read the key in {shown(key_file)}: {explained(error)}") from error
        else:
            key = environ.get("DEVBOXD_KEY") or environ.get("RUNLOOP_API_KEY") or ""
        if not key:
            raise SetupError("cannot call the server without a key: set DEVBOXD_KEY or give --key-file")
        if not key.isascii() or not key.isprintable() or " " in key:
            raise SetupError("cannot use this key: it has characters that no key has; copy it again")
        return cls(address, key)

    def patient(self, seconds: float) -> Remote:
        """The same server, waited for so long at most."""
        other = copy.copy(self)
        other._wait = seconds
        return other

    def call(self, method: str, path: str, body: Any = None, query: Mapping[str, Any] | None = None) -> Any:
        """The decoded answer. Repeats a request whose connection broke: its effect happens once.

        An answer that asks to come again (408) is followed for as long as it comes. Raises ApiError for an error of the
        server and SetupError when there is none to be reached.
        """
        headers = {"x-request-id": str(uuid.uuid4())} if method != "GET" else {}
        deadline = time.monotonic() + min(self._wait, _RETRY_SECONDS)
        while True:
            try:
                connection, response = self._send(method, path, body, query, headers)
                self._reached = True
                with connection:
                    return _decode(response)
            except Broken as error:
                if (_no_server(error) and not self._reached) or time.monotonic() > deadline:
                    raise self._unreachable(error) from error
            except ApiError as error:
                if error.code != 408 and (error.code != 503 or time.monotonic() > deadline):
                    raise
            time.sleep(_PAUSE_SECONDS)

    def stream(self, path: str) -> Iterator[bytes]:
        """The bytes of a stream from its begin to its end, each once, over any number of connections."""
        offset = 0
        deadline = time.monotonic() + min(self._wait, _RETRY_SECONDS)
        while True:
            try:
                for event in self._events(path, {"offset": offset, "encoding": "base64"}):
                    deadline = time.monotonic() + min(self._wait, _RETRY_SECONDS)
                    piece = base64.b64decode(event.get("base64") or "")
                    offset = event["offset"] + len(piece)
                    if piece:
                        yield piece
                return
            except Broken as error:
                if time.monotonic() > deadline:
                    raise self._unreachable(error) from error
            except ApiError as error:
                if error.code not in (408, 503) or time.monotonic() > deadline:
                    raise
            time.sleep(_PAUSE_SECONDS)

    def entries(self, path: str) -> Iterator[dict[str, Any]]:
        """The entries of a log to its end, over any number of connections.

        The server tells what is there anew on each; of that the newest `_REMEMBERED` are known again.
        """
        told: deque[str] = deque(maxlen=_REMEMBERED)
        deadline = time.monotonic() + min(self._wait, _RETRY_SECONDS)
        while True:
            again = Counter(told)
            try:
                for entry in self._events(path, {}):
                    deadline = time.monotonic() + min(self._wait, _RETRY_SECONDS)
                    known = json.dumps(entry, sort_keys=True)
                    if again[known] > 0:
                        again[known] -= 1
                    else:
                        told.append(known)
                        yield entry
                return
            except Broken as error:
                if (_no_server(error) and not told) or time.monotonic() > deadline:
                    raise self._unreachable(error) from error
            except ApiError as error:
                if error.code not in (408, 503) or time.monotonic() > deadline:
                    raise
            time.sleep(_PAUSE_SECONDS)

    def download(self, path: str, body: Any) -> Iterator[bytes]:
        """The bytes of an answer as they come. Raises ApiError, and SetupError when the connection breaks."""
        try:
            connection, response = self._send("POST", path, body, None, {})
            with connection:
                if response.status != 200:
                    _decode(response)
                while piece := response.read1(_PIECE):
                    yield piece
                if response.length:
                    raise http.client.IncompleteRead(b"", response.length)
        except Broken as error:
            raise self._unreachable(error) from error

    def upload(self, path: str, target: str, content: BinaryIO) -> None:
        """Send a file's bytes to be stored at `target` in the devbox. Raises as `download` does."""
        boundary = uuid.uuid4().hex
        head = f'--{boundary}\r\ncontent-disposition: form-data; name="path"\r\n\r\n{target}\r\n--{boundary}\r\n'
        head += 'content-disposition: form-data; name="file"; filename="file"\r\n\r\n'

        def pieces() -> Iterator[bytes]:
            yield head.encode(errors="surrogateescape")
            while piece := content.read(_PIECE):
                yield piece
            yield f"\r\n--{boundary}--\r\n".encode()

        kind = {"content-type": f"multipart/form-data; boundary={boundary}"}
        try:
            connection, response = self._send("POST", path, pieces(), None, kind)
            with connection:
                _decode(response)
        except Broken as error:
            raise self._unreachable(error) from error

    def _events(self, path: str, query: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        connection, response = self._send("GET", path, None, query, {"accept": "text/event-stream"})
        with connection:
            if response.status != 200:
                _decode(response)
            name, data = "", ""
            for line in _lines(response):
                field, _, value = line.partition(":")
                if field == "event":
                    name = value.strip()
                elif field == "data":
                    data += value.removeprefix(" ")
                elif not field and not value and data:
                    event = json.loads(data)
                    if name == "error":
                        raise ApiError(event["code"], event["message"])
                    yield event
                    name, data = "", ""

    def _send(
        self, method: str, path: str, body: Any, query: Mapping[str, Any] | None, headers: Mapping[str, str]
    ) -> tuple[_Closing, http.client.HTTPResponse]:
        connection: http.client.HTTPConnection
        if self._secure:
            context = ssl.create_default_context()
            connection = http.client.HTTPSConnection(self._host, self._port, timeout=self._wait, context=context)
        else:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=self._wait)
        content = body if body is None or isinstance(body, Iterator) else json.dumps(body).encode()
        sent = {"authorization": f"Bearer {self._key}", "content-type": "application/json", **headers}
        target = self._base + quote(path) + (f"?{urlencode(query)}" if query else "")
        try:
            try:
                connection.request(method, target, content, sent)
            except (BrokenPipeError, ConnectionResetError):
                if not isinstance(content, Iterator):  # else what is sent was refused, and the answer is there
                    raise
            return _Closing(connection), connection.getresponse()
        except BaseException:
            connection.close()
            raise

    def _unreachable(self, error: Exception) -> SetupError:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        return SetupError(f"cannot reach the server at {self.url}: {reason}; is `devboxd serve` running there?")


def _no_server(error: Exception) -> bool:
    """Whether an error means that there is no such server, rather than one that is being restarted."""
    wrong = (ConnectionRefusedError, socket.gaierror, ssl.SSLError, http.client.BadStatusLine)
    restarting = isinstance(error, http.client.RemoteDisconnected)
    return not restarting and (isinstance(error, wrong) or getattr(error, "errno", 0) in _NO_WAY)


def _lines(response: http.client.HTTPResponse) -> Iterator[str]:
    """The lines of a chunked answer. Unlike the response's own readline this raises when the connection breaks."""
    rest = b""
    while piece := response.read1(65536):
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line.decode().rstrip("\r")


class _Closing:
    def __init__(self, connection: http.client.HTTPConnection) -> None:
        self._connection = connection

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        self._connection.close()


def _decode(response: http.client.HTTPResponse) -> Any:
    text = response.read()
    try:
        value = json.loads(text or b"{}")
    except ValueError:
        value = None
    if response.status != 200:
        message = value.get("message") if isinstance(value, dict) else None
        place = f" and names {response.headers['location']!r}" if "location" in response.headers else ""
        unknown = f"cannot do this: the server answered {response.status}{place}; is it devboxd?"
        raise ApiError(response.status, str(message or unknown))
    if value is None:
        raise SetupError("cannot understand the answer: what answers at this address is not devboxd; check it")
    return value

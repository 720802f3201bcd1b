"""The command line's client of a server: plain requests by the standard library, so that it starts fast."""

from __future__ import annotations

import http.client
import json
import os
import ssl
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

from devboxd.errors import ApiError, SetupError

DEFAULT_URL = "http://127.0.0.1:8080"
_TIMEOUT_SECONDS = 60.0
_RETRY_SECONDS = 60.0
"""How long a server that does not answer (it may be restarting) is asked again."""
_PAUSE_SECONDS = 0.5

Broken = (OSError, http.client.HTTPException)


class Remote:
    """One server and one key. Every call may be made from several threads at once."""

    def __init__(self, url: str, key: str) -> None:
        self.url = url
        self._key = key
        parts = urlsplit(url if "://" in url else f"http://{url}")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise SetupError(f"cannot use {url!r} as the server's address; give one such as {DEFAULT_URL}")
        self._secure = parts.scheme == "https"
        self._host = parts.hostname
        self._port = parts.port
        self._base = parts.path.rstrip("/").removesuffix("/v1")

    @classmethod
    def find(cls, url: str | None, key_file: Path | None, environ: Mapping[str, str] = os.environ) -> Remote:
        """The server and key of the options, else of the environment. Raises SetupError when there is no key."""
        address = url or environ.get("DEVBOXD_URL") or environ.get("RUNLOOP_BASE_URL") or DEFAULT_URL
        if key_file is not None:
            try:
                key = key_file.read_text().strip()
            except (OSError, UnicodeDecodeError) as error:
                raise SetupError(f"cannot read the key in {key_file}: {error}") from error
        else:
            key = environ.get("DEVBOXD_KEY") or environ.get("RUNLOOP_API_KEY") or ""
        if not key or not key.isascii() or not key.isprintable():
            raise SetupError("cannot call the server without a key: set DEVBOXD_KEY or give --key-file")
        return cls(address, key)

    def call(self, method: str, path: str, body: Any = None, query: Mapping[str, Any] | None = None) -> Any:
        """The decoded answer. Repeats a request whose connection broke: its effect happens once.

        An answer that asks to come again (408) is followed for as long as it comes. Raises ApiError for an error of the
        server and SetupError when there is none to be reached.
        """
        headers = {"x-request-id": str(uuid.uuid4())} if method != "GET" else {}
        deadline = time.monotonic() + _RETRY_SECONDS
        reached = False
        while True:
            try:
                connection, response = self._send(method, path, body, query, headers)
                reached = True
                with connection:
                    return _decode(response)
            except Broken as error:
                # A refused first connection is no restart: say so at once.
                if (isinstance(error, ConnectionRefusedError) and not reached) or time.monotonic() > deadline:
                    raise self._unreachable(error) from error
            except ApiError as error:
                if error.code != 408 and (error.code != 503 or time.monotonic() > deadline):
                    raise
            time.sleep(_PAUSE_SECONDS)

    def stream(self, path: str) -> Iterator[str]:
        """The text of a stream from its begin to its end, each piece once, over any number of connections."""
        offset, seen = 0, 0
        deadline = time.monotonic() + _RETRY_SECONDS
        while True:
            try:
                for event in self._events(path, offset):
                    deadline = time.monotonic() + _RETRY_SECONDS
                    text: str = event["output"]
                    if event["offset"] == offset:
                        fresh, seen = text[seen:], max(seen, len(text))
                    else:
                        fresh, offset, seen = text, event["offset"], len(text)
                    if fresh:
                        yield fresh
                return
            except Broken as error:
                if time.monotonic() > deadline:
                    raise self._unreachable(error) from error
            except ApiError as error:
                if error.code not in (408, 503) or time.monotonic() > deadline:
                    raise
            time.sleep(_PAUSE_SECONDS)

    def _events(self, path: str, offset: int) -> Iterator[dict[str, Any]]:
        connection, response = self._send("GET", path, None, {"offset": offset}, {"accept": "text/event-stream"})
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
            connection = http.client.HTTPSConnection(self._host, self._port, timeout=_TIMEOUT_SECONDS, context=context)
        else:
            connection = http.client.HTTPConnection(self._host, self._port, timeout=_TIMEOUT_SECONDS)
        content = None if body is None else json.dumps(body).encode()
        sent = {"authorization": f"Bearer {self._key}", "content-type": "application/json", **headers}
        target = self._base + quote(path) + (f"?{urlencode(query)}" if query else "")
        try:
            connection.request(method, target, content, sent)
            return _Closing(connection), connection.getresponse()
        except BaseException:
            connection.close()
            raise

    def _unreachable(self, error: Exception) -> SetupError:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error) or type(error).__name__
        return SetupError(f"cannot reach the server at {self.url}: {reason}; is `devboxd serve` running there?")


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
        value = {"message": text[:200].decode(errors="replace")}
    if response.status != 200:
        message = value.get("message") if isinstance(value, dict) else None
        raise ApiError(response.status, str(message or f"cannot do this: the server answered {response.status}"))
    return value

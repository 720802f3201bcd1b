"""Large files pass through the server without staying in it, and a file that changes meanwhile ends as an error."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import httpx
import pytest

from support.api import Api
from support.server import Server

pytestmark = pytest.mark.box

SIZE = 400 << 20
PIECE = bytes(range(256)) * 4096


def memory(server: Server) -> int:
    """Bytes of the server's memory that are its own."""
    with open(f"/proc/{server.pid}/status") as file:
        fields = dict(line.split(":", 1) for line in file)
    return int(fields["RssAnon"].split()[0]) << 10


def test_a_large_file_goes_up_and_down_without_staying_in_memory(own_server: Server) -> None:
    with own_server.api() as api:
        box = api.create()
        api.upload(box, "warm", PIECE)
        api.download(box, "warm")
        before = memory(own_server)
        highest = before

        def body() -> Iterator[bytes]:
            nonlocal highest
            head = b'--b\r\nContent-Disposition: form-data; name="path"\r\n\r\nlarge\r\n'
            yield head + b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
            for number in range(SIZE // len(PIECE)):
                if number % 32 == 0:
                    highest = max(highest, memory(own_server))
                yield PIECE
            yield b"\r\n--b--\r\n"

        path = f"/v1/devboxes/{box}/upload_file"
        kind = {"content-type": "multipart/form-data; boundary=b"}
        answer = api.http.post(path, content=body(), headers=kind)
        assert answer.status_code == 200, answer.text
        assert answer.headers["x-upload-size"] == str(SIZE)
        digest, size = hashlib.sha256(), 0
        with api.http.stream("POST", f"/v1/devboxes/{box}/download_file", json={"path": "large"}) as download:
            for piece in download.iter_bytes(1 << 20):
                digest.update(piece)
                size += len(piece)
                if size % (32 << 20) < 1 << 20:
                    highest = max(highest, memory(own_server))
        assert size == SIZE
        assert digest.hexdigest() == answer.headers["x-upload-sha256"]
        assert highest - before < 32 << 20


def test_a_file_that_shrinks_ends_the_download_as_an_error(api: Api, box: str) -> None:
    api.output(box, "truncate -s 500M shrinking")

    def download() -> None:
        path = f"/v1/devboxes/{box}/download_file"
        with api.http.stream("POST", path, json={"path": "shrinking"}) as answer:
            pieces = answer.iter_bytes(1 << 20)
            next(pieces)
            api.output(box, "truncate -s 1M shrinking")
            for _ in pieces:
                pass

    with pytest.raises(httpx.HTTPError):
        download()
    assert api.output(box, "rm shrinking; echo fine") == "fine\n"

"""Files that come before their path wait on disk, in bounded number of bytes, and leave nothing there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from starlette.requests import Request
from starlette.types import Message

from devboxd.access import uploads
from devboxd.access.uploads import Early, Upload
from devboxd.errors import ApiError

pytestmark = pytest.mark.anyio

FILE = b'--b\r\nContent-Disposition: form-data; name="file"; filename="f"\r\n\r\n'
PATH = b'\r\n--b\r\nContent-Disposition: form-data; name="path"\r\n\r\nhere\r\n--b--\r\n'


def request(*parts: bytes) -> Request:
    left = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    left[-1]["more_body"] = False

    async def receive() -> Message:
        return left.pop(0)

    kind = (b"content-type", b"multipart/form-data; boundary=b")
    return Request({"type": "http", "headers": [kind]}, receive)


async def test_a_file_before_its_path_is_kept_and_nothing_stays(tmp_path: Path) -> None:
    early = Early(tmp_path)
    with early.file() as file:
        upload = Upload(request(FILE + b"abc", b"x" * 300_000, PATH), file)
        assert await upload.path() == "here"
        assert early.size == 300_003
        assert os.listdir(tmp_path) == []
        assert b"".join([piece async for piece in upload.chunks()]) == b"abc" + b"x" * 300_000
    assert early.size == 0


async def test_files_before_their_paths_are_bounded_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "EARLY_LIMIT", 1 << 20)
    early = Early(tmp_path)
    with early.file() as first:
        assert await Upload(request(FILE + b"x" * 700_000, PATH), first).path() == "here"
        with early.file() as second, pytest.raises(ApiError, match="send the part `path` before") as refused:
            await Upload(request(FILE, b"x" * 500_000, PATH), second).path()
        assert refused.value.code == 413
    with early.file() as third:
        assert await Upload(request(FILE, b"x" * 500_000, PATH), third).path() == "here"
    assert early.size == 0

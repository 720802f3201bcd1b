"""The operations on files of a devbox."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated
from urllib.parse import quote

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from devboxd.access.files import Files, OpenFile, Written
from devboxd.access.uploads import Early, Upload
from devboxd.errors import ApiError
from devboxd.executions.box import Box, Boxes
from devboxd.executions.directory import DevboxDirectory
from devboxd.executions.views import ExecutionDetailView
from devboxd.http.operation import Call
from devboxd.http.streams import Lasting, Places

TEXT_LIMIT = 100_000_000
"""Most bytes that read_file_contents gives and write_file_contents takes; larger files have their own operations."""

_PIECE = 200 << 10
"""Characters: what is larger than 256 KiB is taken from the kernel and given back each time."""
_WIDEST = 4
"""Bytes of a character in UTF-8, at most."""
_SMALL = 64 << 10
"""Bytes of a file that is read before the answer begins, which then is one write with its head."""
_INERT = {"content-security-policy": "sandbox"}


class ReadFile(msgspec.Struct, frozen=True):
    """Which file to read: absolute, or relative to the home directory."""

    file_path: str
    """Absolute, or relative to the home directory. Example: `"notes.txt"`"""


class WriteFile(msgspec.Struct, frozen=True):
    """Which file to write, and all that it shall hold."""

    file_path: str
    """Absolute, or relative to the home directory. Example: `"notes.txt"`"""
    contents: str
    r"""All that it shall hold, at most 100 MB. Example: `"hello\n"`"""


class DownloadFile(msgspec.Struct, frozen=True):
    """Which file to send: absolute, or relative to the home directory."""

    path: str
    """Absolute, or relative to the home directory. Example: `"build/app.tar"`"""


class UploadFile(msgspec.Struct, frozen=True):
    """The parts of an upload: where the file goes, and its bytes."""

    path: str
    """Absolute, or relative to the home directory. Example: `"data.bin"`"""
    file: Annotated[str, msgspec.Meta(extra_json_schema={"format": "binary"})]
    """The bytes of the file. Example: `"@data.bin"`"""


async def read_file_contents(
    devboxes: DevboxDirectory, boxes: Boxes, files: Files, places: Places, call: Call, devbox_id: str, body: ReadFile
) -> Annotated[Response, "text/plain", 403, 429, 504]:
    """The file as text/plain, byte for byte; up to 100 MB.

    ```python
    text = client.devboxes.read_file_contents(box.id, file_path="notes.txt")
    ```
    """
    places.check()
    file = await files.open(await _box(devboxes, boxes, call, devbox_id), body.file_path)
    if (file.size or 0) > TEXT_LIMIT:
        await file.close()
        raise ApiError(
            413,
            f"cannot read {body.file_path} as text: it is larger than 100 MB; use download_file",
            retry=False,
        )
    headers = {"content-disposition": "attachment"}
    return await _sent(file, places, "text/plain; charset=utf-8", headers, TEXT_LIMIT)


async def write_file_contents(
    devboxes: DevboxDirectory, boxes: Boxes, files: Files, call: Call, devbox_id: str, body: WriteFile
) -> Annotated[Response, ExecutionDetailView, 403, 504, 507]:
    """Create or replace a file with this text; missing parent directories are made.

    ```python
    client.devboxes.write_file_contents(box.id, file_path="notes.txt", contents="hello\\n")
    ```
    """
    certain = len(body.contents) * _WIDEST <= TEXT_LIMIT
    if not certain and (size := sum(map(len, _encoded(body.contents)))) > TEXT_LIMIT:
        raise ApiError(413, f"cannot write {size} bytes as text: at most 100 MB; use upload_file", retry=False)
    box = await _box(devboxes, boxes, call, devbox_id)
    written = await files.put(box, body.file_path, _encoded(body.contents))
    view = ExecutionDetailView(devbox_id, "", "", 0)
    return _stored(msgspec.json.encode(view), written)


async def write_file(
    devboxes: DevboxDirectory, boxes: Boxes, files: Files, call: Call, devbox_id: str, body: WriteFile
) -> Annotated[Response, ExecutionDetailView, 403, 504, 507]:
    """Create or replace a file with this text: the older name of write_file_contents.

    ```python
    client.devboxes.write_file_contents(box.id, file_path="notes.txt", contents="hello\\n")
    ```
    """
    return await write_file_contents(devboxes, boxes, files, call, devbox_id, body)


async def upload_file(
    devboxes: DevboxDirectory, boxes: Boxes, files: Files, places: Places, early: Early, call: Call, devbox_id: str
) -> Annotated[Response, 403, 429, 504, 507]:
    """Create or replace a file with the part `file` of a multipart body, at the path in the part `path`; streamed.

    ```python
    client.devboxes.upload_file(box.id, path="data.bin", file=Path("data.bin"))
    ```
    """
    box = await _box(devboxes, boxes, call, devbox_id)
    with places.taking(), early.file() as waiting:
        upload = Upload(call.request, waiting)
        written = await files.receive(box, await upload.path(), upload.chunks())
    return _stored(b"{}", written)


async def download_file(
    devboxes: DevboxDirectory,
    boxes: Boxes,
    files: Files,
    places: Places,
    call: Call,
    devbox_id: str,
    body: DownloadFile,
) -> Annotated[Response, "application/octet-stream", 403, 429, 504]:
    """The file's bytes, streamed, as an attachment.

    ```python
    client.devboxes.download_file(box.id, path="build/app.tar").write_to_file("app.tar")
    ```
    """
    places.check()
    file = await files.open(await _box(devboxes, boxes, call, devbox_id), body.path)
    name = body.path.rsplit("/", 1)[-1]
    headers = {"content-disposition": f"attachment; filename*=UTF-8''{quote(name, safe='')}"}
    return await _sent(file, places, "application/octet-stream", headers)


class Download(Lasting):
    """A file as an answer; its descriptor is given back however the answer ends."""

    def __init__(
        self, file: OpenFile, places: Places, kind: str, headers: dict[str, str], limit: int | None = None
    ) -> None:
        super().__init__(file.chunks(limit), places, kind, headers)
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._file.close()


async def _sent(
    file: OpenFile, places: Places, kind: str, headers: dict[str, str], limit: int | None = None
) -> Response:
    """The answer that sends the file, which it owns from now on, also when there is no place for it any more."""
    headers = {**_INERT, **headers}
    if file.size is not None and file.size <= _SMALL:
        try:
            with places.taking():
                content = b"".join([piece async for piece in file.chunks(limit)])
        except EOFError as error:
            raise ApiError(409, "cannot send the file: it shrank while it was read; ask again", retry=True) from error
        finally:
            await file.close()
        return Response(content, media_type=kind, headers=headers)
    length = {} if file.size is None else {"content-length": str(file.size)}
    try:
        with places.taking():
            await file.begin()
        return Download(file, places, kind, {**headers, **length}, limit)
    except BaseException:
        await file.close()
        raise


async def _box(devboxes: DevboxDirectory, boxes: Boxes, call: Call, devbox_id: str) -> Box:
    await devboxes.usable(call.account, devbox_id)
    return await boxes.reached(devbox_id)


def _encoded(text: str) -> Iterator[bytes]:
    """In pieces, so that a large text is not in memory once more."""
    for start in range(0, len(text), _PIECE):
        yield text[start : start + _PIECE].encode()


def _stored(answer: bytes, written: Written) -> Response:
    headers = {"x-upload-size": str(written.size), "x-upload-sha256": written.sha256}
    return Response(answer, media_type="application/json", headers=headers)

"""A multipart upload as it arrives: the field `path`, and the bytes of the part `file`, never held in memory."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from devboxd.concurrency.threads import finished
from devboxd.errors import ApiError, bad_request

_MAX_FIELD = 8192
_PIECE = 1 << 18
_MAX_HEADERS = 16 * 1024
EARLY_LIMIT = 1 << 30
"""Bytes of all files together that wait on disk because they came before their path."""


class Early:
    """Where files wait that came before their path: unnamed files in a folder, of bounded size together."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.size = 0

    @contextmanager
    def file(self) -> Iterator[EarlyFile]:
        """One that lasts as long as the block; it is made when bytes come."""
        with contextlib.ExitStack() as stack:
            early = EarlyFile(self, self._folder, stack)
            try:
                yield early
            finally:
                self.size -= early.size


class EarlyFile:
    """One of them."""

    def __init__(self, all_of_them: Early, folder: Path, stack: contextlib.ExitStack) -> None:
        self.size = 0
        self._all = all_of_them
        self._folder = folder
        self._stack = stack
        self._file: IO[bytes] | None = None

    async def write(self, pieces: list[bytes]) -> None:
        """Append them. Raises ApiError 413 when there is no room."""
        size = sum(map(len, pieces))
        if self._all.size + size > EARLY_LIMIT:
            raise ApiError(
                413,
                f"cannot keep a file that comes before its path: {EARLY_LIMIT >> 20} MiB of them wait, the most at "
                "once; send the part `path` before the part `file`",
                retry=False,
            )
        self._all.size += size
        self.size += size
        if self._file is None:
            self._file = self._stack.enter_context(tempfile.TemporaryFile(dir=self._folder))  # noqa: SIM115
        await finished(partial(self._file.writelines, pieces))

    async def pieces(self) -> AsyncIterator[bytes]:
        """All that was written."""
        if self._file is None:
            return
        await finished(partial(self._file.seek, 0))
        while data := await finished(partial(self._file.read, _PIECE)):
            yield data


class Upload:
    """Reads `path` first, then gives the file's bytes. A file that comes before its path waits on disk."""

    def __init__(self, request: Request, early: EarlyFile) -> None:
        kind, options = parse_options_header(request.headers.get("content-type"))
        if kind != b"multipart/form-data" or b"boundary" not in options:
            raise bad_request("cannot read the upload: send multipart/form-data with the parts `path` and `file`")
        self._stream = request.stream()
        self._parser = MultipartParser(
            options[b"boundary"],
            {
                "on_part_begin": self._on_part_begin,
                "on_header_field": self._on_header_field,
                "on_header_value": self._on_header_value,
                "on_header_end": self._on_header_end,
                "on_part_data": self._on_part_data,
                "on_part_end": self._on_part_end,
                "on_end": self._on_end,
            },
        )
        self._header = (b"", b"")
        self._header_bytes = 0
        self._part = ""
        self._path = bytearray()
        self._path_known = False
        self._file_seen = False
        self._file_ended = False
        self._complete = False
        self._data: list[bytes] = []
        self._early = early

    async def path(self) -> str:
        """The field `path`. Raises 400 when it is missing or not UTF-8."""
        while not self._path_known:
            if not await self._more():
                raise bad_request("cannot store the upload: the part `path` is missing; say where the file goes")
            if self._data and not self._path_known:
                await self._early.write(self._taken())
        try:
            return self._path.decode()
        except UnicodeDecodeError as error:
            raise bad_request("cannot store the upload: its path is not UTF-8") from error

    async def chunks(self) -> AsyncIterator[bytes]:
        """The bytes of the file. Raises 400 when the part is missing or the body ends too early."""
        async for data in self._early.pieces():
            yield data
        while True:
            for data in self._taken():
                yield data
            if not await self._more():
                break
        if not self._file_seen:
            raise bad_request("cannot store the upload: the part `file` is missing; send the content in it")
        if not self._complete:
            raise bad_request("cannot store the upload: it was cut off before its end; send it again")

    async def _more(self) -> bool:
        """Feed the parser the next piece of the body; False when there is none."""
        async for piece in self._stream:
            if piece:
                try:
                    self._parser.write(piece)
                except FormParserError as error:
                    raise bad_request(
                        f"cannot read the upload: it is not valid multipart/form-data ({error})"
                    ) from error
                return True
        return False

    def _taken(self) -> list[bytes]:
        data, self._data = self._data, []
        return data

    def _on_part_begin(self) -> None:
        self._part = ""
        self._header = (b"", b"")

    def _on_header_field(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self._header = (self._header[0] + data[start:end], self._header[1])

    def _on_header_value(self, data: bytes, start: int, end: int) -> None:
        self._count(end - start)
        self._header = (self._header[0], self._header[1] + data[start:end])

    def _on_header_end(self) -> None:
        name, value = self._header
        self._header = (b"", b"")
        if name.lower() == b"content-disposition":
            self._part = parse_options_header(value)[1].get(b"name", b"").decode("utf-8", "replace")
            self._file_seen = self._file_seen or self._part == "file"

    def _on_part_data(self, data: bytes, start: int, end: int) -> None:
        if self._part == "file" and not self._file_ended:
            self._data.append(data[start:end])
        elif self._part == "path" and not self._path_known:
            self._path += data[start:end]
            if len(self._path) > _MAX_FIELD:
                raise bad_request(f"cannot store the upload: its path is longer than {_MAX_FIELD} bytes")

    def _on_part_end(self) -> None:
        self._path_known = self._path_known or self._part == "path"
        self._file_ended = self._file_ended or self._part == "file"

    def _on_end(self) -> None:
        self._complete = True

    def _count(self, size: int) -> None:
        self._header_bytes += size
        if self._header_bytes > _MAX_HEADERS:
            raise bad_request("cannot read the upload: the headers of its parts are too long")

"""A multipart upload as it arrives: the field `path`, and the bytes of the part `file`, never held in memory."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from typing import IO

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import Request

from devboxd.errors import bad_request

_MAX_FIELD = 8192
_MAX_HEADERS = 16 * 1024


class Upload:
    """Reads `path` first, then gives the file's bytes. A file that comes before its path waits on disk."""

    def __init__(self, request: Request) -> None:
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
        self._early: IO[bytes] | None = None

    async def path(self) -> str:
        """The field `path`. Raises 400 when it is missing or not UTF-8."""
        while not self._path_known:
            if not await self._more():
                raise bad_request("cannot store the upload: the part `path` is missing; say where the file goes")
            if self._data and not self._path_known:
                self._early = self._early or tempfile.TemporaryFile()  # noqa: SIM115 - closed by chunks()
                self._early.writelines(self._taken())
        try:
            return self._path.decode()
        except UnicodeDecodeError as error:
            raise bad_request("cannot store the upload: its path is not UTF-8") from error

    async def chunks(self) -> AsyncIterator[bytes]:
        """The bytes of the file. Raises 400 when the part is missing or the body ends too early."""
        if self._early is not None:
            with self._early as early:
                early.seek(0)
                while data := early.read(1 << 20):
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

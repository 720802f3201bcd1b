"""Answers that do not come about, for want of a place or of bytes, say why and give file and place back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from devboxd.access import files
from devboxd.access.api import Download, _sent
from devboxd.access.files import OpenFile
from devboxd.errors import ApiError
from devboxd.executions.box import Box
from devboxd.http.streams import Places

pytestmark = pytest.mark.anyio


async def test_a_download_whose_place_was_taken_meanwhile_leaks_no_descriptor(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    descriptor = os.open(tmp_path / "f", os.O_RDONLY)
    places = Places(1)
    with places.taking(), pytest.raises(ApiError, match="cannot open another stream"):
        await _sent(OpenFile(descriptor, False, "f", Box("dbx_x", "user", {})), places, "text/plain", {})
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    """Both ends of a pipe; the reading one, which does not block, belongs to whoever reads it."""
    ours, theirs = os.pipe()
    os.set_blocking(ours, False)
    yield ours, theirs
    os.close(theirs)


async def test_a_pipe_that_stays_silent_is_refused_before_the_answer_begins(
    pipe: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "SILENCE_S", 0.05)
    places = Places(1)
    with pytest.raises(ApiError, match=r"^cannot read /proc/x: it kept us waiting for 0.05 s;") as refused:
        await _sent(OpenFile(pipe[0], True, "/proc/x", Box("dbx_x", "user", {})), places, "text/plain", {})
    assert (refused.value.code, refused.value.retry, places.taken) == (504, False, 0)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(pipe[0])


async def test_a_pipe_is_sent_from_its_first_byte_to_its_last(pipe: tuple[int, int]) -> None:
    os.write(pipe[1], b"first ")
    answer = await _sent(OpenFile(pipe[0], True, "/proc/x", Box("dbx_x", "user", {})), Places(1), "text/plain", {})
    assert isinstance(answer, Download)
    pieces = aiter(answer.body_iterator)
    assert await anext(pieces) == b"first "
    os.write(pipe[1], b"last")
    assert await anext(pieces) == b"last"
    os.close(pipe[0])

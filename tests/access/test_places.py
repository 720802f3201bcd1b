"""Answers that do not come about, for want of a place or of bytes, say why and give file and place back."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from devboxd.access import files
from devboxd.access.api import Download, _sent
from devboxd.access.files import OpenFile, Pieces
from devboxd.errors import ApiError
from devboxd.executions.box import Box
from devboxd.http.streams import Places

pytestmark = pytest.mark.anyio


async def test_one_download_at_a_time_has_wide_pieces_and_all_are_whole(tmp_path: Path) -> None:
    content = os.urandom((1 << 20) + 7)
    (tmp_path / "f").write_bytes(content)
    pieces = Pieces()

    def opened() -> OpenFile:
        return OpenFile(os.open(tmp_path / "f", os.O_RDONLY), False, "f", Box("dbx_x", "user", {}), pieces)

    for _ in range(2):
        first, second = opened(), opened()
        wide, narrow = first.chunks(), second.chunks()
        found = [await anext(wide)], [await anext(narrow)]
        assert (len(found[0][0]), len(found[1][0])) == (512 << 10, 128 << 10)
        found[0].extend([piece async for piece in wide])
        found[1].extend([piece async for piece in narrow])
        assert b"".join(found[0]) == b"".join(found[1]) == content
        await first.close()
        await second.close()


async def test_a_download_whose_place_was_taken_meanwhile_leaks_no_descriptor(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    descriptor = os.open(tmp_path / "f", os.O_RDONLY)
    places = Places(1)
    with places.taking(), pytest.raises(ApiError, match="cannot open another stream"):
        await _sent(OpenFile(descriptor, False, "f", Box("dbx_x", "user", {}), Pieces()), places, "text/plain", {})
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
        await _sent(OpenFile(pipe[0], True, "/proc/x", Box("dbx_x", "user", {}), Pieces()), places, "text/plain", {})
    assert (refused.value.code, refused.value.retry, places.taken) == (504, False, 0)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(pipe[0])


async def test_a_pipe_is_sent_from_its_first_byte_to_its_last(pipe: tuple[int, int]) -> None:
    os.write(pipe[1], b"first ")
    answer = await _sent(
        OpenFile(pipe[0], True, "/proc/x", Box("dbx_x", "user", {}), Pieces()), Places(1), "text/plain", {}
    )
    assert isinstance(answer, Download)
    pieces = aiter(answer.body_iterator)
    assert await anext(pieces) == b"first "
    os.write(pipe[1], b"last")
    assert await anext(pieces) == b"last"
    os.close(pipe[0])

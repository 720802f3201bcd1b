"""What is shown of journals: last lines, whole characters, and streams that lose and double nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devboxd.errors import ApiError
from devboxd.executions.journals import BLOCK, Journals, Reader, Spool
from devboxd.executions.output import VIEW_BYTES, follow, lines_wanted, tail, whole_characters
from devboxd.executions.views import Chunk
from devboxd.http.streams import EndedEarlyError

CAP = 1 << 30
LINES = st.lists(st.text(alphabet="abé€😀", max_size=5), max_size=30)


def reader(data: bytes, cap: int = CAP) -> Reader:
    descriptor = os.memfd_create("journal")
    os.write(descriptor, data)
    return Reader(descriptor, cap)


def shown(data: bytes, lines: int | None) -> tuple[str, bool]:
    opened = reader(data)
    try:
        return tail(opened, len(data), lines)
    finally:
        opened.close()


@pytest.mark.parametrize(
    ("data", "lines", "text", "cut"),
    [
        (b"", 100, "", False),
        (b"a\n", 100, "a\n", False),
        (b"a\nb\nc\n", 2, "b\nc\n", True),
        (b"a\nb\nc", 2, "b\nc", True),
        (b"a\nb\nc\n", 3, "a\nb\nc\n", False),
        (b"\n\n\n", 1, "\n", True),
        (b"a\n", 0, "", True),
        (b"", 0, "", False),
        (b"\xff\xfe\n", 5, "��\n", False),
    ],
)
def test_last_lines(data: bytes, lines: int, text: str, cut: bool) -> None:
    assert shown(data, lines) == (text, cut)


@given(LINES, st.integers(0, 40), st.booleans())
def test_last_lines_are_the_last_lines(lines: list[str], count: int, newline: bool) -> None:
    text = "\n".join(lines) + ("\n" if newline else "")
    pieces = text.splitlines(keepends=True) if text else []
    expected = "".join(pieces[max(0, len(pieces) - count) :])
    assert shown(text.encode(), count) == (expected, len(pieces) > count)


def test_a_view_carries_at_most_a_mebibyte_and_begins_with_a_line() -> None:
    data = b"".join(b"%07d\n" % number for number in range(200_000))
    text, cut = shown(data, None)
    assert cut
    assert VIEW_BYTES - 8 <= len(text) <= VIEW_BYTES
    assert text == data[-len(text) :].decode()
    assert len(text) % 8 == 0


@pytest.mark.parametrize("end", ["", "\n"])
def test_one_endless_line_is_cut_at_a_character(end: str) -> None:
    text, cut = shown("€".encode() * 400_000 + end.encode(), None)
    assert cut
    assert text.strip("€") == end
    assert len(text.encode()) > VIEW_BYTES - 4


@pytest.mark.parametrize(("text", "lines"), [(None, 100), ("", 100), ("3", 3), ("0", 0)])
def test_lines_wanted(text: str | None, lines: int) -> None:
    assert lines_wanted(text) == lines


@pytest.mark.parametrize("text", ["-1", "x", "1.5", "9" * 30, "٣"])
def test_other_numbers_of_lines_are_refused(text: str) -> None:
    with pytest.raises(ApiError, match="last_n") as refusal:
        lines_wanted(text)
    assert refusal.value.code == 400


@given(st.binary(max_size=300), st.lists(st.integers(1, 9), min_size=1, max_size=50))
def test_cutting_anywhere_gives_the_same_text(data: bytes, sizes: list[int]) -> None:
    """However a journal arrives, the chunks join to what decoding all at once gives, and their bytes add up."""
    joined, position, end = "", 0, 0
    for size in [*sizes, len(data)]:
        end = min(len(data), end + size)
        text, used = whole_characters(data[position:end], final=end == len(data))
        joined, position = joined + text, position + used
    assert position == len(data)
    assert joined == data.decode("utf-8", "replace")


async def collect(data: list[bytes], offset: int = 0) -> list[tuple[str, int]]:
    """Follow a journal that grows by one piece at each pause and completes after the last."""
    descriptor = os.memfd_create("journal")
    left = list(data)
    size = 0

    def grow() -> None:
        nonlocal size
        os.pwrite(descriptor, left[0], size)
        size += len(left.pop(0))

    async def more() -> bool:
        if left:
            grow()
        return True

    opened = Reader(descriptor, CAP)
    chunks = follow(opened, offset, lambda: None if left else size, more, lambda: False)
    result = [(chunk.output, chunk.offset) async for several in chunks for chunk in several]
    opened.close()
    return result


@pytest.mark.anyio
async def test_a_stream_tells_where_it_stands() -> None:
    assert await collect([b"first\n", b"second\n"]) == [("first\n", 0), ("", 6), ("second\n", 6), ("", 13)]


@pytest.mark.anyio
async def test_a_character_cut_in_two_arrives_whole() -> None:
    euro = "€".encode()
    assert await collect([b"a" + euro[:1], euro[1:2], euro[2:] + b"b"]) == [("a", 0), ("", 1), ("€b", 1), ("", 5)]


@pytest.mark.anyio
async def test_an_offset_past_the_end_ends_cleanly() -> None:
    assert await collect([b"short"], offset=1000) == []


@pytest.mark.anyio
async def test_a_cut_character_at_the_end_is_replaced() -> None:
    assert await collect([b"ok\xe2\x82"]) == [("ok�", 0), ("", 4)]


@pytest.mark.anyio
@pytest.mark.parametrize("pieces", [[b"one\n", "zwei €\n".encode(), b"three\n"], [b"x" * (3 * BLOCK), b"end"]])
async def test_opening_again_at_any_last_offset_doubles_nothing(pieces: list[bytes]) -> None:
    """A chunk and the position after it leave in one write, so it is behind such pairs that a stream is cut."""
    whole = b"".join(pieces).decode()
    chunks = await collect(pieces)
    for cut in range(1, len(chunks), 2):
        seen = "".join(text for text, _ in chunks[: cut + 1])
        again = await collect([b"".join(pieces)], offset=chunks[cut][1])
        assert seen + "".join(text for text, _ in again) == whole


@pytest.mark.anyio
@pytest.mark.parametrize("completed", [True, False])
async def test_a_stopping_server_never_ends_a_stream_as_if_it_were_whole(completed: bool) -> None:
    descriptor = os.memfd_create("journal")
    os.pwrite(descriptor, b"x" * (2 * BLOCK), 0)
    opened = Reader(descriptor, CAP)
    seen: list[Chunk] = []

    async def never() -> bool:
        raise AssertionError("a stopping server waits for nothing")

    chunks = follow(opened, 0, lambda: 2 * BLOCK if completed else None, never, lambda: bool(seen))
    seen += await anext(chunks)
    with pytest.raises(EndedEarlyError):
        await anext(chunks)
    assert [chunk.offset for chunk in seen] == [0, BLOCK]
    opened.close()


def test_the_cap_bounds_what_is_read() -> None:
    opened = reader(b"x" * 100, cap=40)
    assert opened.read(0) == b"x" * 40
    assert opened.read(40) == b""
    assert opened.read_all(10, 90) == b"x" * 30
    opened.close()


def test_journals_grow_only_and_are_removed(tmp_path: Path) -> None:
    journals = Journals(tmp_path / "journals", CAP, 100 * CAP)
    journals.make("dbx_1", "exe_1")
    with journals.opened("dbx_1", "exe_1", stdin=True) as (out, err, stdin):
        os.write(out, b"hello")
        os.write(err, b"oops")
        assert stdin is not None
    path = journals.path("dbx_1", "exe_1", "stdout")
    assert path.stat().st_mode & 0o777 == 0o600
    assert journals.length("dbx_1", "exe_1", "stdout") == 5
    assert journals.length("dbx_1", "none", "stdout") == 0
    with journals.opened("dbx_1", "exe_1", stdin=False) as (out, _, _):
        os.write(out, b" again")
    opened = journals.reader("dbx_1", "exe_1", "stdout")
    assert opened.read(0) == b"hello again"
    opened.close()
    journals.remove("dbx_1")
    assert list((tmp_path / "journals").iterdir()) == []


def test_a_missing_journal_reads_as_empty(tmp_path: Path) -> None:
    opened = Journals(tmp_path / "journals", CAP, 100 * CAP).reader("dbx_1", "exe_1", "stdout")
    assert opened.read(0) == b""
    opened.close()


def test_a_spool_is_written_at_the_committed_length_and_freed_behind_the_reader(tmp_path: Path) -> None:
    path = tmp_path / "stdin"
    spool = Spool(path)
    spool.write(0, b"never committed")
    spool.write(0, b"a" * (3 << 20))
    spool.free(2 << 20)
    spool.close()
    assert path.stat().st_blocks * 512 < 2 << 20
    with path.open("rb") as file:
        file.seek(2 << 20)
        assert file.read() == b"a" * (1 << 20)

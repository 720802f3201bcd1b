"""Reading whole bodies: small ones, those in chunks, and those that are worth huge pages."""

from __future__ import annotations

from typing import Any

import pytest
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive

from devboxd.errors import ApiError
from devboxd.http.body import BIG_BYTES, read

pytestmark = pytest.mark.anyio

LIMIT = 3 * BIG_BYTES


def _sent(*parts: bytes, cut: bool = False) -> Receive:
    messages: list[dict[str, Any]] = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    if cut:
        messages.append({"type": "http.disconnect"})
    else:
        messages[-1]["more_body"] = False
    coming = iter(messages)

    async def receive() -> Message:
        return next(coming)

    return receive


@pytest.mark.parametrize("announced", [True, False])
@pytest.mark.parametrize("parts", [(b"{}",), (b"",), (b"a", b"", b"b"), (b"x" * BIG_BYTES, b"y" * 5, b"z" * BIG_BYTES)])
async def test_a_body_is_what_was_sent(parts: tuple[bytes, ...], announced: bool) -> None:
    whole = b"".join(parts)
    taken: list[int] = []
    found = await read(_sent(*parts), len(whole) if announced else None, LIMIT, taken.append)
    assert (len(found), bytes(found)) == (len(whole), whole)
    assert sum(taken) == len(whole)


@pytest.mark.parametrize("length", [None, LIMIT + 1])
async def test_a_body_past_the_limit_is_refused(length: int | None) -> None:
    with pytest.raises(ApiError) as refused:
        await read(_sent(b"x" * LIMIT, b"x"), length, LIMIT, lambda size: None)
    assert refused.value.code == 413


@pytest.mark.parametrize("cut", [True, False])
async def test_a_body_that_ends_early_is_no_body(cut: bool) -> None:
    with pytest.raises(ClientDisconnect):
        await read(_sent(b"x" * BIG_BYTES, b"x", cut=cut), 2 * BIG_BYTES, LIMIT, lambda size: None)

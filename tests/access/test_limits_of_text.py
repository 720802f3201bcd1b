"""How much text is taken at once: counted in bytes, and refused before anything is looked at."""

from __future__ import annotations

from typing import Any

import pytest

from devboxd.access.api import TEXT_LIMIT, WriteFile, write_file_contents
from devboxd.errors import ApiError

pytestmark = pytest.mark.anyio
NOTHING: Any = None


@pytest.mark.parametrize("character", ["e", "é"])
async def test_a_text_of_more_bytes_than_the_limit_is_413(character: str) -> None:
    width = len(character.encode())
    body = WriteFile("f", character * (TEXT_LIMIT // width + 1))
    with pytest.raises(
        ApiError, match=f"cannot write {TEXT_LIMIT + width} bytes as text: .*use upload_file"
    ) as refused:
        await write_file_contents(NOTHING, NOTHING, NOTHING, NOTHING, "dbx_1", body)
    assert refused.value.code == 413

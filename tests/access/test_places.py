"""An answer that finds no place any more gives its file back."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from devboxd.access.api import _sent
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

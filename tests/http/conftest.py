"""A store, and an application with a small table of its own, called over ASGI."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from devboxd.config import Settings
from support.web import Web


@pytest.fixture
def settings() -> Settings:
    return Settings()


@pytest.fixture
def web(tmp_path: Path, settings: Settings) -> Iterator[Web]:
    web = Web(tmp_path / "devboxd.db", settings)
    yield web
    web.store.close()

"""The first key of a server: kept in a file that only root reads, made once, never in a log."""

from __future__ import annotations

from pathlib import Path

import pytest
from structlog.testing import capture_logs

from devboxd.http.guard import hash_key
from devboxd.resources.accounts import first_start, list_keys
from devboxd.store.db import Store
from devboxd.store.schema import keys

pytestmark = pytest.mark.anyio


async def test_the_first_key_is_a_file_of_mode_0600(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "devboxd.db")
    with capture_logs() as logs:
        await first_start(store, tmp_path)
    path = tmp_path / "first-key"
    assert path.stat().st_mode & 0o777 == 0o600
    key = path.read_text().strip()
    assert key.startswith("ak_")
    hashes = await store.read(lambda connection: [row.hash for row in connection.execute(keys.select())])
    assert hashes == [hash_key(key)]
    assert key not in str(logs)
    assert str(path) in str(logs)
    store.close()


async def test_a_second_start_makes_no_other_key(tmp_path: Path) -> None:
    store = Store.open(tmp_path / "devboxd.db")
    await first_start(store, tmp_path)
    key = (tmp_path / "first-key").read_text()
    (tmp_path / "first-key").unlink()
    await first_start(store, tmp_path)
    assert not (tmp_path / "first-key").exists()
    assert len(await list_keys(store)) == 1
    assert key
    store.close()

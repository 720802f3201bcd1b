"""The migrations lead to exactly the tables of the schema, one step at a time, with a copy before each."""

from __future__ import annotations

import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from devboxd.store import db, migrations
from devboxd.store.db import FILE_NAME, HEAD, Store
from devboxd.store.schema import metadata


def test_the_migrations_make_the_schema(tmp_path: Path) -> None:
    store = Store.open(tmp_path / FILE_NAME)
    context = MigrationContext.configure(store._writer, opts={"compare_type": True, "compare_server_default": True})
    assert compare_metadata(context, metadata) == []
    store.close()


def test_the_program_knows_its_newest_revision() -> None:
    assert migrations.head() == HEAD
    assert HEAD in migrations.known()


def test_a_new_store_has_no_copy_and_a_current_one_is_not_touched(tmp_path: Path) -> None:
    for _ in range(2):
        Store.open(tmp_path / FILE_NAME).close()
    assert {file.name for file in tmp_path.iterdir()} <= {FILE_NAME, f"{FILE_NAME}.lock"}


def test_a_pending_migration_copies_the_store_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _older_store(tmp_path)
    _pretend_a_next_revision(monkeypatch, fails=False)
    Store.open(path).close()
    copy = tmp_path / f"{FILE_NAME}.before-9999"
    assert stat.S_IMODE(copy.stat().st_mode) == 0o600
    with sqlite3.connect(copy) as raw:
        assert raw.execute("SELECT id FROM accounts").fetchall() == [("acc_1",)]
        assert raw.execute("SELECT version_num FROM alembic_version").fetchone() == (HEAD,)
    raw.close()
    with sqlite3.connect(path) as raw:
        assert raw.execute("SELECT more FROM accounts").fetchall() == [(None,)]
    raw.close()


def test_a_migration_that_fails_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _older_store(tmp_path)
    _pretend_a_next_revision(monkeypatch, fails=True)
    with pytest.raises(ZeroDivisionError):
        Store.open(path)
    with sqlite3.connect(path) as raw:
        assert "more" not in {row[1] for row in raw.execute("PRAGMA table_info(accounts)")}
        assert raw.execute("SELECT version_num FROM alembic_version").fetchone() == (HEAD,)
    raw.close()


def test_many_processes_may_open_a_new_store_at_once(tmp_path: Path) -> None:
    code = (
        f"from pathlib import Path; from devboxd.store.db import Store; Store.open(Path({str(tmp_path / FILE_NAME)!r}))"
    )
    children = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(4)]
    assert [child.wait(60) for child in children] == [0] * 4


def test_a_store_of_each_earlier_revision_is_migrated(tmp_path: Path) -> None:
    path = tmp_path / FILE_NAME
    with sqlite3.connect(path) as raw:
        raw.executescript((Path(__file__).parent / "store-0001.sql").read_text())
    raw.close()
    store = Store.open(path)
    context = MigrationContext.configure(store._writer, opts={"compare_type": True, "compare_server_default": True})
    assert compare_metadata(context, metadata) == []
    store.close()


def _older_store(tmp_path: Path) -> Path:
    path = tmp_path / FILE_NAME
    Store.open(path).close()
    with sqlite3.connect(path) as raw:
        raw.execute("INSERT INTO accounts VALUES ('acc_1', '', 1)")
    raw.close()
    return path


def _pretend_a_next_revision(monkeypatch: pytest.MonkeyPatch, *, fails: bool) -> None:
    def upgrade(connection: object) -> None:
        connection.exec_driver_sql("ALTER TABLE accounts ADD COLUMN more TEXT")  # type: ignore[attr-defined]
        if fails:
            raise ZeroDivisionError
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '9999'")  # type: ignore[attr-defined]

    monkeypatch.setattr(db, "HEAD", "9999")
    monkeypatch.setattr(migrations, "upgrade", upgrade)

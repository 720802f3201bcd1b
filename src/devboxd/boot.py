"""What a server is told through its state folder: what came between it and the last one, and the last backup."""

from __future__ import annotations

from pathlib import Path

from devboxd.engine import linux

_FILE = "boot-id"
_RESTORED = "restored"
_STORAGE = "storage"
_REASONS = {_RESTORED: "it was restored from a backup", _STORAGE: "the storage of the host failed"}
_BACKUP = "last-backup"
"""An empty file, of which the time counts."""


def interruption(state: Path) -> str | None:
    """Why no box of an earlier server can be alive, in words; None where that is not so."""
    path = state / _FILE
    if not path.exists() or (last := path.read_text().strip()) == linux.boot_id():
        return None
    return _REASONS.get(last, "the host was restarted")


def remember(state: Path) -> None:
    """Note this run of the machine, once every devbox that ended with the last one says so."""
    _write(state, linux.boot_id())


def mark_restored(state: Path) -> None:
    """Let the next server know that its folder comes from a backup."""
    _write(state, _RESTORED)


def mark_storage_failed(state: Path) -> None:
    """Let the next server know that boxes are ended because the storage failed. To be called before they are."""
    _write(state, _STORAGE)


def mark_backup(state: Path) -> None:
    """Note that a backup of this folder is finished."""
    (state / _BACKUP).touch()


def last_backup(state: Path) -> float:
    """When the last backup of this folder was finished, in seconds since 1970; 0 where there is none."""
    try:
        return (state / _BACKUP).stat().st_mtime
    except OSError:
        return 0.0


def _write(state: Path, text: str) -> None:
    temporary = state / f"{_FILE}.new"
    temporary.write_text(f"{text}\n")
    temporary.replace(state / _FILE)

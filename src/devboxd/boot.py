"""What a server is told by the one before, or by a command: what came between them, and the last backup.

In the state folder, but for a failure of its disk: that lies in /run, for the folder may be read-only then.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

from devboxd.engine import linux
from devboxd.engine.instance import RUN

_FILE = "boot-id"
_RESTORED = "restored"
STORAGE_FAILED = "the storage of the host failed"
_REASONS = {_RESTORED: "it was restored from a backup"}
_BACKUP = "last-backup"
"""An empty file, of which the time counts."""


def interruption(state: Path) -> str | None:
    """Why no box of an earlier server can be alive, in words; None where that is not so."""
    if _failure(state).exists():
        return STORAGE_FAILED
    path = state / _FILE
    if not path.exists() or (last := path.read_text().strip()) == linux.boot_id():
        return None
    return _REASONS.get(last, "the host was restarted")


def remember(state: Path) -> None:
    """Note this run of the machine, once every devbox that ended with the last one says so."""
    _write(state, linux.boot_id())
    _failure(state).unlink(missing_ok=True)


def mark_restored(state: Path) -> None:
    """Let the next server know that its folder comes from a backup."""
    _write(state, _RESTORED)


def note_storage(state: Path, failed: bool) -> None:
    """Let the next server know that boxes end because the storage fails, or not any more. To be called before they do.

    A restart of the machine forgets it, and is reason enough itself.
    """
    if failed:
        _failure(state).write_text(f"{state.resolve()}\n")
    else:
        _failure(state).unlink(missing_ok=True)


def mark_backup(state: Path) -> None:
    """Note that a backup of this folder is finished."""
    (state / _BACKUP).touch()


def last_backup(state: Path) -> float:
    """When the last backup of this folder was finished, in seconds since 1970; 0 where there is none."""
    try:
        return (state / _BACKUP).stat().st_mtime
    except OSError:
        return 0.0


def _failure(state: Path) -> Path:
    return RUN / f"failed-{hashlib.sha256(bytes(state.resolve())).hexdigest()[:16]}"


def _write(state: Path, text: str) -> None:
    temporary = state / f"{_FILE}.new"
    temporary.write_text(f"{text}\n")
    temporary.replace(state / _FILE)

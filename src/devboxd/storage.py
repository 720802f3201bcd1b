"""`devboxd storage`: what the pool of disks is and holds, making it larger, and looking for damage."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import sqlite3
import subprocess
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from devboxd import boot, probes
from devboxd.config import Settings
from devboxd.engine.base import EngineError
from devboxd.engine.disks import Disks
from devboxd.engine.instance import Instance, claim, left_by
from devboxd.engine.network import Network
from devboxd.engine.oci import OciEngine
from devboxd.engine.pool import Kind, Pool, unwritable
from devboxd.engine.processes import which
from devboxd.engine.reserve import reserve
from devboxd.errors import SetupError
from devboxd.path_errors import AS_ROOT
from devboxd.store.db import FILE_NAME

T = TypeVar("T")
_UNITS = {"M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_WORDS: dict[Kind, str] = {
    "btrfs": "the state folder's own btrfs",
    "file": "btrfs in a file",
    "folders": "plain folders, without limits",
}
_RECOVER = "restart the server, or stop it and run devboxd storage recover"


@dataclass(frozen=True)
class Status:
    """The pool as it is. Sizes in bytes; None where nothing shows them because no server runs."""

    kind: Kind
    folder: str
    shown: bool
    size: int | None
    free: int | None
    file: str | None
    allocated: int | None
    used: int | None
    may_still_grow_by: int | None
    may_grow_to: int | None
    kept_for_the_server: int
    disk_free: int
    devboxes: int | None
    warm_boxes: int | None
    snapshots: int | None
    trouble: str | None
    """Why nothing can be written to it."""


def status(state: Path) -> Status:
    """Look at the pool, which may be in use. Raises SetupError where there is none yet, or one may not look."""
    pool = _found(state)
    host = shutil.disk_usage(state)
    pool.look()
    is_file, shown = pool.kind == "file", pool.mounted
    usage = shutil.disk_usage(pool.folder) if shown or not is_file else None
    trouble = _trouble(pool, state)
    disks = Disks(pool) if usage and not trouble else None
    boxes, known = (disks.boxes(), _devboxes(state)) if disks else (set(), set())
    return Status(
        pool.kind,
        str(pool.folder),
        shown,
        usage.total if usage else pool.file.stat().st_size,
        usage.free if usage else None,
        str(pool.file) if is_file else None,
        pool.file.stat().st_size - pool.holes if is_file else None,
        usage.total - usage.free if usage else None,
        max(0, pool.below()) if is_file else None,
        max(pool.file.stat().st_size, pool.most()) if is_file else None,
        reserve(host.total),
        host.free,
        len(boxes & known) if disks else None,
        len(boxes - known) if disks else None,
        len(disks.snapshots()) if disks else None,
        trouble,
    )


def _trouble(pool: Pool, state: Path) -> str | None:
    """Of a pool that a server, or boxes that outlive one, have open; else of the disk below alone."""
    if not pool.mounted:
        return unwritable(state)
    pool.look()
    return pool.trouble()


def _devboxes(state: Path) -> set[str]:
    """The ids of all devboxes that the store has, also beside a server."""
    with contextlib.closing(sqlite3.connect(f"file:{state / FILE_NAME}?mode=ro", uri=True)) as store:
        try:
            return {row[0] for row in store.execute("SELECT id FROM devboxes WHERE disk_freed = 0")}
        except sqlite3.Error as error:
            raise SetupError(f"cannot look at the store {state / FILE_NAME}: {error}") from error


def lines(found: Status, size: str = "{:.1f} GiB") -> list[tuple[str, str]]:
    """The same for a person."""

    unknown = "not known" if found.trouble else "not known while no server runs"

    def shown(number: int | None) -> str:
        return unknown if number is None else size.format(number / (1 << 30))

    def counted(number: int | None) -> str:
        return unknown if number is None else str(number)

    rows = [("trouble", f"{found.trouble}; {_RECOVER}")] if found.trouble else []
    rows += [("storage", _WORDS[found.kind]), ("folder", found.folder)]
    rows += [("size", shown(found.size)), ("used", shown(found.used)), ("free", shown(found.free))]
    if found.file is not None:
        rows += [("file", f"{found.file}, {shown(found.allocated)} allocated on its disk")]
        rows += [("may grow", f"by {shown(found.may_still_grow_by)}, to {shown(found.may_grow_to)}")]
    rows += [("disk below", f"{shown(found.disk_free)} free, {shown(found.kept_for_the_server)} kept for the server")]
    rows += [("devboxes", counted(found.devboxes)), ("warm boxes", counted(found.warm_boxes))]
    return [*rows, ("snapshots", counted(found.snapshots))]


def grow(state: Path, size: str) -> int:
    """Make the pool so large, as in `64G`; its new size in bytes. Raises SetupError."""
    match = re.fullmatch(r"(\d{1,9})\s*([MGT])(?:i?B)?", size.strip(), re.IGNORECASE)
    if match is None:
        raise SetupError(f"cannot read the size {size!r}: give one such as 64G")
    wanted = int(match[1]) * _UNITS[match[2].upper()]
    _found(state).grow_to(wanted)
    return wanted


def check(state: Path) -> int:
    """Look for damage and show what is found; the exit code, 0 when there is none.

    In use, every block of the pool's own is read and compared with its checksum; else the structure is checked. Nothing
    is repaired, and what disks hold has no checksums: digests of snapshots tell of that.
    """
    pool = _found(state)
    if not pool.file.exists():
        kind = probes.file_system(state)[0]
        tool = f"btrfs scrub start -B {state}" if kind == "btrfs" else f"the tools of {kind}"
        raise SetupError(f"cannot check the storage: it is part of the file system of {state}; use {tool}")
    program = which("btrfs")
    if program is None:
        raise SetupError("cannot check the storage: the program btrfs is missing; install btrfs-progs")
    if why := _trouble(pool, state):
        raise SetupError(f"cannot check the storage: {why}; {_RECOVER}")
    if pool.mounted:
        command = [program, "scrub", "start", "-B", "-r", str(pool.folder)]
    elif pool.in_use:
        raise SetupError("cannot check the storage: boxes use it while no server runs; start the server, or end them")
    else:
        command = [program, "check", "--readonly", str(pool.file)]
    return 1 if subprocess.run(command, check=False).returncode else 0


def recover(settings: Settings) -> set[str] | None:
    """Make a broken pool usable again while no server runs, by ending the boxes that hold on to it.

    Gives those whose disks are there, None where nothing was broken. The next server has them suspended. Raises
    SetupError.
    """
    _found(settings.state)
    refuse_unwritable(settings, "recover the storage")
    return _by_engine(settings, claim(settings.state), OciEngine.recover)


def refuse_unwritable(settings: Settings, what: str) -> None:
    """Where the disk of a state folder cannot be written, let go of it: end its boxes, which can be resumed later.

    Raises SetupError then, with what is to be done; `what` could not be.
    """
    state = settings.state
    if os.geteuid() != 0 or not (state / "disks").is_dir() or (why := unwritable(state)) is None:
        return
    instance = left_by(state)
    ended = set() if instance is None else _by_engine(settings, instance, OciEngine.let_go)
    boxes = (
        f"; these were ended, and devboxes among them can be resumed then: {', '.join(sorted(ended))}" if ended else ""
    )
    raise SetupError(
        f"cannot {what}: {why}; nothing of devboxd holds on to it: see dmesg for the reason, unmount it, check it, "
        f"mount it again, then start the server{boxes}"
    )


def _by_engine(settings: Settings, instance: Instance, work: Callable[[OciEngine], Awaitable[T]]) -> T:
    note = partial(boot.note_storage, settings.state)

    async def run() -> T:
        engine = OciEngine(settings, instance, Network(settings, instance), note)
        try:
            return await work(engine)
        finally:
            await engine.close()

    try:
        return asyncio.run(run())
    except EngineError as error:
        raise SetupError(str(error)) from error
    finally:
        instance.close()


def _found(state: Path) -> Pool:
    if os.geteuid() != 0:
        raise SetupError(f"cannot look at the storage: its folder is root's; {AS_ROOT}")
    if not (state / "disks").is_dir():
        raise SetupError(f"cannot look at the storage: no server has run with {state}; name its folder with --state")
    return Pool(state.resolve())

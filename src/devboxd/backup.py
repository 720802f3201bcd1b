"""`devboxd backup` and `devboxd restore`: all that a server keeps, as plain files in a folder, and back again.

    <backup>/backup.json       what is in it; written last, so without it the backup is not whole
             devboxd.db        the store at one instant; all the rest is as of that instant or later
             journals, shells  the output of executions, the named shells of devboxes that sleep
             disks             an archive for each devbox that has not ended
             snapshots         an archive for each snapshot; its SHA-256 is the digest of the snapshot
             images            an archive for each image that these lie on

What opens other things (`SECRETS`) is kept apart or not at all.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, nullcontext
from functools import partial
from pathlib import Path

import msgspec

from devboxd import __version__, boot
from devboxd.concurrency.clock import now_ms
from devboxd.config import Settings
from devboxd.devboxes import snapshot_store
from devboxd.devboxes import store as devbox_store
from devboxd.devboxes.snapshot_store import ERROR
from devboxd.devboxes.states import TERMINAL, Status
from devboxd.devboxes.store import Devbox
from devboxd.engine import btrfs, manifest
from devboxd.engine.base import EngineError
from devboxd.engine.disks import Disks
from devboxd.engine.images import Images
from devboxd.engine.instance import InUse, hold
from devboxd.engine.pool import Pool
from devboxd.errors import SetupError
from devboxd.path_errors import AS_ROOT, explained, not_made, reason, shown
from devboxd.store import db
from devboxd.store.db import FILE_NAME, Store

SECRETS = ("first-key",)
"""Files of the state folder that open something: whoever finds the backup shall not find them too."""
DELETED = "it was deleted meanwhile"
"""Why something is left out that nobody misses."""
_FOLDERS = ("journals", "shells")
_LIST = "backup.json"
_FORMAT = 1
_MARK = "restoring"

Tell = Callable[[float, str], None]
"""Called with the share that is done, 0 to 1, and a few words on what happens now."""


class Archive(msgspec.Struct, frozen=True):
    """A file of the backup. `slot`: the number of the devbox on its machine, which decides its address.

    `given`: the files that the server wrote into the devbox for this machine.
    """

    path: str
    sha256: str
    bytes: int
    slot: int | None = None
    given: dict[str, str] = {}

    @property
    def name(self) -> str:
        """What it holds: the id of a devbox or snapshot, or the name of an image."""
        return Path(self.path).stem


class Contents(msgspec.Struct):
    """What a backup holds. `left_out`: what could not be kept, and why, by its id."""

    format: int
    devboxd: str
    create_time_ms: int
    archives: list[Archive]
    left_out: dict[str, str]


def check_not_cut(state: Path) -> None:
    """Raises SetupError for a state folder into which a restore was begun and not finished."""
    if (state / _MARK).exists():
        raise SetupError(
            f"cannot use the state folder {state}: a restore into it was cut; run `devboxd restore` again, or empty it"
        )


# -- backup ----------------------------------------------------------------------------------------------------------


async def backup(settings: Settings, target: Path, secrets: Path | None, tell: Tell) -> Contents:
    """Write a backup of the state folder, beside a server that runs or without one. Raises SetupError."""
    state = settings.state.resolve()
    _check_may(state, "back up")
    _check_store(state, "back up")
    for folder in (target, *((secrets,) if secrets else ())):
        _make_empty(folder, outside=state)
    try:
        contents = await _write_all(settings, state, target, tell)
        for name in SECRETS if secrets else ():
            _copy_file(state / name, (secrets or target) / name)
        return contents
    except BaseException as error:
        shutil.rmtree(target, ignore_errors=True)
        if isinstance(error, (OSError, sqlite3.Error, EngineError)):
            raise SetupError(f"cannot write the backup {target}: {explained(error)}") from error
        raise


async def _write_all(settings: Settings, state: Path, target: Path, tell: Tell) -> Contents:
    contents = Contents(_FORMAT, __version__, now_ms(), [], {})
    with _pool(state) as pool:
        tell(0.0, "the store")
        _copy_store(state / FILE_NAME, target / FILE_NAME)
        async with _store(target) as store:
            devboxes = [box for box in await store.read(devbox_store.unfinished) if box.status not in TERMINAL]
            snapshots = await store.read(snapshot_store.complete)
        with _as_of_now(pool, devboxes, contents) as disks:
            sources: dict[str, str | Path] = {f"disks/{box}.tar": name for box, name in disks.items()}
            sources |= {f"snapshots/{one.id}.tar": one.id for one in snapshots}
            names = {box.image for box in devboxes} | {one.image for one in snapshots}
            images = {name: Images(settings).named(name) for name in sorted(filter(None, names))}
            sources |= {f"images/{name}.tar": image.layers[0] for name, image in images.items() if image}
            contents.left_out.update(dict.fromkeys((n for n, i in images.items() if i is None), "it is not here"))
            for number, (path, source) in enumerate(sources.items()):
                tell(number / len(sources), path.removesuffix(".tar").replace("/", " "))
                await _keep(Disks(pool), source, target, path, contents)
    tell(1.0, "the output of executions")
    for name in _FOLDERS:
        _copy_folder(state / name, target / name)
    os.sync()  # the list is never there before what it names
    _write(target / _LIST, msgspec.json.format(msgspec.json.encode(contents)))
    os.sync()
    boot.mark_backup(state)
    tell(1.0, "done")
    return contents


@contextmanager
def _as_of_now(pool: Pool, devboxes: Iterable[Devbox], contents: Contents) -> Iterator[dict[str, str]]:
    """The names in the pool of disks, by devbox, which are still for the length of the block.

    Where the pool cannot do that: of those that sleep.
    """
    disks = Disks(pool)
    there = [box for box in devboxes if disks.path(box.id).exists()]
    if pool.copies:
        try:
            with disks.still(box.id for box in there) as found:
                yield found
        except BlockingIOError as error:
            raise SetupError("cannot begin a backup: another one of this server goes on; wait for it") from error
        return
    for box in there:
        if box.status is not Status.SUSPENDED:
            contents.left_out[box.id] = "it runs, and its disk lies in plain folders; suspend it, or take a snapshot"
    yield {box.id: box.id for box in there if box.status is Status.SUSPENDED}


async def _keep(disks: Disks, source: str | Path, target: Path, path: str, contents: Contents) -> None:
    """One archive, of a folder or of what has this name in the pool.

    What was deleted meanwhile is nothing that is missing; what cannot be read is left out.
    """
    file = target / path
    file.parent.mkdir(mode=0o700, exist_ok=True)
    try:
        async with nullcontext(source) if isinstance(source, Path) else disks.reading(source) as folder:
            digest = await manifest.archive(folder, file)
    except (EngineError, OSError) as error:
        file.unlink(missing_ok=True)
        if shutil.disk_usage(target).free < 1 << 20:
            raise
        contents.left_out[file.stem] = _why_left_out(disks, source, error)
        return
    slot, given = (disks.slot(file.stem), disks.given(file.stem)) if file.parent.name == "disks" else (None, {})
    contents.archives.append(Archive(path, digest, file.stat().st_size, slot, given))


def _why_left_out(disks: Disks, source: str | Path, error: Exception) -> str:
    there = source if isinstance(source, Path) else disks.path(source)
    return str(error) if there.exists() else DELETED


# -- restore ---------------------------------------------------------------------------------------------------------


async def restore(settings: Settings, source: Path, secrets: Path | None, tell: Tell) -> dict[str, str]:
    """Make a state folder out of a backup; what could not be brought back, and why, by its id. Raises SetupError.

    The folder must be empty or missing, but for what a cut restore left. Until all is there no server takes it.
    """
    state = settings.state
    _check_may(source, "restore")
    contents = _contents(source)
    _check_store(source, "restore")
    _make_empty(state, but=(_MARK, "lock"))
    try:
        with ExitStack() as held:
            hold(state, held)
            pool = Pool(state.resolve())
            _clear(state, pool)
            (state / _MARK).touch()
            lost = await _read_all(settings, source, contents, pool, tell)
            for name in SECRETS if secrets else ():
                _copy_file((secrets or source) / name, state / name)
            boot.mark_restored(state)
            os.sync()
            (state / _MARK).unlink()
    except (OSError, sqlite3.Error) as error:
        raise SetupError(f"cannot restore into {state}: {reason(error)}; mend that, and run this again") from error
    tell(1.0, "done")
    return {name: why for name, why in (contents.left_out | lost).items() if why != DELETED}


async def _read_all(settings: Settings, source: Path, contents: Contents, pool: Pool, tell: Tell) -> dict[str, str]:
    lost: dict[str, str] = {}
    images = Images(settings)
    pool.open()
    try:
        disks = Disks(pool)
        total = sum(archive.bytes for archive in contents.archives) or 1
        done = 0
        for archive in contents.archives:
            tell(done / total, archive.path.removesuffix(".tar").replace("/", " "))
            done += archive.bytes
            try:
                await _bring_back(disks, images, source, archive)
            except EngineError as error:
                lost[archive.name] = str(error)
    finally:
        pool.close()
    tell(1.0, "the store")
    for name in _FOLDERS:
        _copy_folder(source / name, pool.folder.parent / name)
    _copy_store(source / FILE_NAME, pool.folder.parent / FILE_NAME)
    whole = {archive.name for archive in contents.archives} - lost.keys()
    async with _store(pool.folder.parent) as store:
        for snapshot in await store.read(snapshot_store.complete):
            if snapshot.id not in whole:
                why = lost.get(snapshot.id) or contents.left_out.get(snapshot.id) or "it is not in the backup"
                text = f"it was not restored: {why}"
                await store.write(partial(snapshot_store.change, snapshot=snapshot, status=ERROR, error=text))
    return lost


async def _bring_back(disks: Disks, images: Images, source: Path, archive: Archive) -> None:
    file = source / archive.path
    if await manifest.file_digest(file) != archive.sha256:
        raise EngineError(f"the archive {file} is not what was written: its digest is another one")
    if file.parent.name == "images":
        await images.restore(archive.name, file)
    else:
        await disks.restore(archive.name, file, archive.bytes, archive.slot, archive.given)


def _contents(source: Path) -> Contents:
    try:
        contents = msgspec.json.decode((source / _LIST).read_bytes(), type=Contents)
    except FileNotFoundError as error:
        raise SetupError(
            f"cannot restore {source}: it has no {_LIST}, so it is no backup, or one that was cut"
        ) from error
    except (OSError, msgspec.DecodeError) as error:
        raise SetupError(
            f"cannot restore {source}: its {_LIST} cannot be read: {reason(error)}; use another backup"
        ) from error
    if contents.format != _FORMAT:
        raise SetupError(
            f"cannot restore {source}: devboxd {contents.devboxd} wrote it; use that version or a newer one"
        )
    return contents


def _clear(state: Path, pool: Pool) -> None:
    """Remove what a cut restore left."""
    if pool.mounted:
        pool.close()
    if pool.folder.is_dir() and btrfs.holds(pool.folder):
        for path in filter(btrfs.is_subvolume, pool.folder.iterdir()):
            btrfs.delete(path)  # that of a snapshot cannot be emptied
    for path in state.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != "lock":
            path.unlink()


# -- files -----------------------------------------------------------------------------------------------------------


def _check_may(folder: Path, verb: str) -> None:
    if os.geteuid() != 0:
        raise SetupError(f"cannot {verb} {folder}: disks belong to root; {AS_ROOT}")
    if not folder.is_dir():
        raise SetupError(f"cannot {verb} {folder}: there is no such folder; check the path")


def _check_store(folder: Path, verb: str) -> None:
    if not (folder / FILE_NAME).exists():
        raise SetupError(f"cannot {verb} {folder}: it has no {FILE_NAME}, so no server has run with it or written it")


def _make_empty(folder: Path, but: Iterable[str] = (), outside: Path | None = None) -> None:
    if outside is not None and folder.resolve().is_relative_to(outside):
        raise SetupError(f"cannot back up {outside} into itself: name a folder elsewhere, best on another disk")
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        names = {path.name for path in folder.iterdir()}
    except OSError as error:
        raise SetupError(
            f"cannot use the folder {shown(folder)}: {not_made(folder, error)}; name another one"
        ) from error
    if names - set(but) and not names & {_MARK} & set(but):
        raise SetupError(f"cannot use the folder {folder}: it is not empty; name another one")


@contextmanager
def _pool(state: Path) -> Iterator[Pool]:
    """The pool of a server that runs, or opened here, while servers are kept off."""
    pool = Pool(state)
    with ExitStack() as held:
        try:
            hold(state, held)
            pool.open()
            held.callback(pool.close)
        except InUse as error:
            if not pool.mounted:
                raise SetupError(f"cannot back up {state}: its server is just starting; try again") from error
            pool.look()
        yield pool


@asynccontextmanager
async def _store(folder: Path) -> AsyncIterator[Store]:
    """The store of a folder that no server has, which leaves nothing but its one file."""
    store = Store.open(folder / FILE_NAME)
    try:
        yield store
    finally:
        store.close()
        (folder / f"{FILE_NAME}.lock").unlink()


def _copy_store(source: Path, target: Path) -> None:
    with contextlib.closing(sqlite3.connect(source)) as read:
        db.copy(read, target)


def _copy_folder(source: Path, target: Path) -> None:
    """Copy files that only grow, without those that go meanwhile."""
    for folder, _, names in os.walk(source):
        place = target / Path(folder).relative_to(source)
        place.mkdir(mode=0o700, exist_ok=True)
        for name in names:
            _copy_file(Path(folder) / name, place / name)


def _copy_file(source: Path, target: Path) -> None:
    with contextlib.suppress(FileNotFoundError), source.open("rb") as read:
        _write(target, b"")
        with target.open("wb") as copy:
            shutil.copyfileobj(read, copy, 1 << 20)
            os.utime(copy.fileno(), ns=(os.fstat(read.fileno()).st_atime_ns, os.fstat(read.fileno()).st_mtime_ns))


def _write(file: Path, content: bytes) -> None:
    with open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600), "wb") as opened:
        opened.write(content)

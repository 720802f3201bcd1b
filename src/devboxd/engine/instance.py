"""What one server claims of the machine, so that servers with other state folders are never disturbed.

A claim is a folder below /run/devboxd named by a short id. It reserves a range of user ids, a block of
addresses and every name that carries the id (cgroups, veths, nft tables). It is bound to the inode of the state
folder and outlives the server; whoever claims next removes those whose folder, server and boxes are all gone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import ipaddress
import json
import os
import shutil
import string
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from devboxd.engine import linux
from devboxd.engine.base import EngineError
from devboxd.engine.nettools import ip
from devboxd.errors import SetupError
from devboxd.path_errors import not_made, reason, shown

RUN = Path("/run/devboxd")
ETC = Path("/etc")
IDS_PER_BOX = 65536
SLOTS = 1024
_UID_START = 1 << 29
_UIDS = SLOTS * IDS_PER_BOX
_LOCK_ATTEMPTS = 50
_LOCK_PAUSE_SECONDS = 0.1
_NAMES = string.ascii_lowercase[:24]
_NETWORKS = tuple(
    ipaddress.IPv4Network(text) for text in ("198.18.0.0/16", "198.19.0.0/16", "10.213.0.0/16", "172.29.0.0/16")
)


@dataclass(frozen=True)
class Instance:
    """One server's share of the machine. Indexes are those of slots, from 0 to `slots` - 1."""

    id: str
    directory: Path
    state: Path
    subnet: ipaddress.IPv4Network
    first_uid: int
    slots: int = SLOTS
    _etc: Path = field(default=ETC, repr=False)
    _locks: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, repr=False, compare=False)

    def uid_base(self, index: int) -> int:
        """The id on the host that is root in slot `index`; it and the next 65535 belong to the slot."""
        return self.first_uid + self._checked(index) * IDS_PER_BOX

    def address(self, index: int) -> ipaddress.IPv4Address:
        """The address of the box in slot `index`."""
        return self.subnet[self._checked(index)]

    def close(self) -> None:
        """Let go of the state folder, and of the claim too unless there are boxes."""
        boxes = self.directory / "boxes"
        with contextlib.ExitStack() as brief:
            _lock(self.directory.parent / "lock", brief, wait=True)
            if not (boxes.is_dir() and any(boxes.iterdir())):
                shutil.rmtree(self.directory)
                _register(self.directory.parent, self._etc)
            self._locks.close()

    def _checked(self, index: int) -> int:
        if not 0 <= index < self.slots:
            raise ValueError(f"slot {index} is outside 0..{self.slots - 1}")
        return index


def claim(state: Path, run: Path = RUN, etc: Path = ETC) -> Instance:
    """Take the state folder (made 0700 when missing) and this machine's share for it, until `close` or death.

    Raises SetupError when another server uses the folder, or when no range of ids or addresses is free.
    """
    with contextlib.ExitStack() as locks:
        _make_private(state)
        hold(state, locks)
        _make_private(run, 0o711)
        with contextlib.ExitStack() as brief:
            _lock(run / "lock", brief, wait=True)
            number, subnet = _find(state, run) or _choose(run, etc)
            directory = run / _NAMES[number]
            _make_private(directory, 0o711)
            _lock(directory / "lock", locks, wait=True)
            _write_claim(directory, state, subnet)
            _register(run, etc)
        return Instance(
            id=_NAMES[number],
            directory=directory,
            state=state.resolve(),
            subnet=subnet,
            first_uid=_first_uid(number),
            _etc=etc,
            _locks=locks.pop_all(),
        )


def left_by(state: Path, run: Path = RUN) -> Instance | None:
    """The share of this machine that an ended server has left, without writing to its state folder; None without one.

    Raises InUse when the server lives.
    """
    for number, name in enumerate(_NAMES):
        held = _read_claim(run / name)
        if held.get("identity") == _identity(state):
            with contextlib.ExitStack() as locks:
                try:
                    _lock(run / name / "lock", locks)
                except BlockingIOError as error:
                    raise InUse(
                        f"cannot use the state folder {state}: a server uses it; stop that one first"
                    ) from error
                subnet = ipaddress.IPv4Network(held["subnet"])
                return Instance(name, run / name, state.resolve(), subnet, _first_uid(number), _locks=locks.pop_all())
    return None


def _make_private(folder: Path, mode: int = 0o700) -> None:
    """A folder of root; 0711 lets a box's root, an ordinary user to the host, walk through while it is started."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if folder.stat().st_uid != os.geteuid():
            raise OSError(errno.EPERM, f"it belongs to uid {folder.stat().st_uid}")
        folder.chmod(mode)
    except OSError as error:
        why = not_made(folder, error)
        raise SetupError(f"cannot use the folder {shown(folder)}: {why}; be root, or name another folder") from error


class InUse(SetupError):
    """A server uses the state folder."""


def hold(state: Path, locks: contextlib.ExitStack) -> None:
    """Keep servers off a state folder until the stack closes: hold its lock, with the own pid in it. Raises InUse.

    The kernel lets go of it when this program dies.
    """
    for attempts_left in reversed(range(_LOCK_ATTEMPTS)):
        try:
            descriptor = _lock(state / "lock", locks)
            break
        except BlockingIOError as error:
            pid = (state / "lock").read_text(errors="replace").strip() or "unknown"
            if not attempts_left or Path("/proc", pid).exists():
                raise InUse(
                    f"cannot use the state folder {state}: the server with pid {pid} uses it; "
                    "stop that one first, or name another folder with --state"
                ) from error
            time.sleep(_LOCK_PAUSE_SECONDS)  # a child of a killed server holds the lock until it execs
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)


def _lock(path: Path, until: contextlib.ExitStack, *, wait: bool = False) -> int:
    """Hold a lock until the stack closes; BlockingIOError when somebody else has it and `wait` is off."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    until.callback(os.close, descriptor)
    fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    return descriptor


def _held(directory: Path) -> bool:
    """Whether a living server uses this claim."""
    with contextlib.ExitStack() as brief:
        try:
            _lock(directory / "lock", brief)
        except BlockingIOError:
            return True
        return False


def _identity(state: Path) -> str:
    status = state.stat()
    return f"{status.st_dev}:{status.st_ino}"


def _first_uid(number: int) -> int:
    return _UID_START + number * _UIDS


def _read_claim(directory: Path) -> dict[str, str]:
    """The claim of a folder, empty when it was cut off in the middle of being made."""
    try:
        content = json.loads((directory / "claim").read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write_claim(directory: Path, state: Path, subnet: ipaddress.IPv4Network) -> None:
    content = {"state": str(state.resolve()), "identity": _identity(state), "subnet": str(subnet)}
    temporary = directory / "claim.new"
    temporary.write_text(json.dumps(content))
    temporary.chmod(0o600)
    temporary.rename(directory / "claim")


def _find(state: Path, run: Path) -> tuple[int, ipaddress.IPv4Network] | None:
    """The claim that this state folder already has."""
    for number, name in enumerate(_NAMES):
        held = _read_claim(run / name)
        if held.get("identity") == _identity(state) and not _held(run / name):
            return number, ipaddress.IPv4Network(held["subnet"])
    return None


def _choose(run: Path, etc: Path) -> tuple[int, ipaddress.IPv4Network]:
    for name in _NAMES:
        if (run / name).exists() and _abandoned(run / name):
            _unroute(_read_claim(run / name).get("subnet"))
            with contextlib.suppress(OSError):  # then lxcfs ends, if it is there
                linux.unmount(run / name / "lxcfs")
            shutil.rmtree(run / name)
    free = _free_numbers(run, etc)
    for number in free:
        if subnet := _free_subnet(number):
            return number, subnet
    if free:
        known = ", ".join(map(str, _NETWORKS))
        raise SetupError(f"cannot find free addresses for boxes: this host has routes into all of {known}; remove one")
    raise SetupError(
        f"cannot find a free range of user ids for boxes: all {len(_NAMES)} from {_UID_START} are claimed in "
        f"{run} or used in {etc}/subuid, subgid, passwd or group; stop servers that are not needed"
    )


def _free_numbers(run: Path, etc: Path) -> list[int]:
    """The claims that nobody has, and whose range of ids nobody uses."""
    starts = [(number, _first_uid(number)) for number, name in enumerate(_NAMES) if not (run / name).exists()]
    taken = _foreign_ids(etc)
    return [number for number, first in starts if not any(low < first + _UIDS and first < high for low, high in taken)]


def _abandoned(directory: Path) -> bool:
    """Nobody comes back to this claim: its server, its state folder and its boxes are gone."""
    if _held(directory):
        return False
    held = _read_claim(directory)
    with contextlib.suppress(OSError, KeyError):
        if _identity(Path(held["state"])) == held["identity"]:
            return False
    return not _has_processes(directory.name)


def _unroute(subnet: str | None) -> None:
    """Forget a killed server's route that leads nowhere and its rule: its addresses would be taken for ever."""
    if subnet is None:
        return
    for command in (f"route delete {subnet} dev lo", f"rule delete to {subnet}"):
        with contextlib.suppress(EngineError):  # there is none, or no `ip`, which whoever uses the addresses will tell
            ip(command)


def _has_processes(name: str) -> bool:
    """Whether any process is in a cgroup of this instance."""
    part = f"/devboxd-{name}/"
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if part in (folder / "cgroup").read_text():
                return True
    return False


def _foreign_ids(etc: Path) -> list[tuple[int, int]]:
    """Ranges [low, high) of ids that accounts and other programs on this machine use."""
    ranges = []
    for name in ("subuid", "subgid", "passwd", "group"):
        path = etc / name
        for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
            row = line.strip().split(":")
            numbers = [int(text) for text in (row[1:3] if name.startswith("sub") else row[2:3]) if text.isdigit()]
            if numbers and not line.startswith("devboxd-"):
                ranges.append((numbers[0], numbers[0] + (numbers[1] if len(numbers) == 2 else 1)))
    return ranges


def _free_subnet(number: int) -> ipaddress.IPv4Network | None:
    """A block of addresses that no route of the host overlaps (host routes are those of boxes)."""
    routes = [route for route in _routes() if 0 < route.prefixlen < 32]
    for network in _NETWORKS:
        block = ipaddress.IPv4Network((int(network[0]) + number * SLOTS, 32 - SLOTS.bit_length() + 1))
        if not any(block.overlaps(route) for route in routes):
            return block
    return None


def _routes() -> Iterator[ipaddress.IPv4Network]:
    """The networks that this host reaches. A route to its own loopback leads nowhere: a killed server may leave one."""
    for line in Path("/proc/net/route").read_text().splitlines()[1:]:
        columns = line.split()
        if columns[0] != "lo":
            address, mask = (int.from_bytes(bytes.fromhex(columns[n]), "little") for n in (1, 7))
            yield ipaddress.IPv4Network((address & mask, mask.bit_count()))


def _register(run: Path, etc: Path) -> None:
    """Name the ranges of all claims in subuid and subgid, so that no other program hands them out."""
    claims = [(number, name) for number, name in enumerate(_NAMES) if (run / name).exists()]
    lines = [f"devboxd-{name}:{_first_uid(number)}:{_UIDS}\n" for number, name in claims]
    for name in ("subuid", "subgid"):
        path = etc / name
        try:
            with _account_lock(path):
                _replace_own_lines(path, lines)
        except OSError as error:
            raise SetupError(f"cannot register the boxes' ids in {path}: {reason(error)}; make it writable") from error


@contextlib.contextmanager
def _account_lock(path: Path) -> Iterator[None]:
    """Hold the lock by which useradd and its kin guard an account file; it knows no waiting but trying again."""
    lock = path.with_name(f"{path.name}.lock")
    for attempts_left in reversed(range(_LOCK_ATTEMPTS)):
        try:
            descriptor = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
            break
        except FileExistsError:
            if not attempts_left:
                raise OSError(errno.EEXIST, f"another program changes it and holds {lock}") from None
            if not _owner_lives(lock):
                lock.unlink(missing_ok=True)
            else:
                time.sleep(_LOCK_PAUSE_SECONDS)
    try:
        os.write(descriptor, f"{os.getpid()}\0".encode())
        os.close(descriptor)
        yield
    finally:
        lock.unlink(missing_ok=True)


def _owner_lives(lock: Path) -> bool:
    try:
        return Path("/proc", str(int(lock.read_text().strip("\0\n ")))).exists()
    except (OSError, ValueError):
        return True  # it is just being made or removed


def _replace_own_lines(path: Path, lines: list[str]) -> None:
    old = path.read_text() if path.exists() else ""
    kept = [line + "\n" for line in old.splitlines() if not line.startswith("devboxd-")]
    new = "".join(kept + lines)
    if new == old:
        return
    temporary = path.with_name(f"{path.name}.devboxd")
    temporary.write_text(new)
    temporary.chmod(0o644)
    temporary.rename(path)

"""The disk of a virtual machine: Debian with systemd, a kernel and this project set up; kept until that changes."""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from devboxd.config import Settings
from devboxd.engine import recipe

ROOT = Path(__file__).resolve().parents[1]
CHECKOUT = "/root/devboxd"
"""Where the project lies in the machine."""
SUITES = {"12": "bookworm", "13": "trixie"}
_SIZE = 24 << 30
_TOOLS = {
    "qemu-system-x86_64": "qemu-system-x86",
    "nbdkit": "nbdkit",
    "mmdebstrap": "mmdebstrap",
    "mkfs.ext4": "e2fsprogs",
    "ssh": "openssh-client",
}
_PACKAGES = (
    *("systemd-sysv", "systemd-timesyncd", "dbus", "udev", "linux-image-cloud-amd64", "openssh-server", "rsync"),
    *("ca-certificates", "curl", "git", "make", "procps", "python3", "python3-venv", "util-linux"),
)
_NETWORK = "[Match]\nName=en*\n[Network]\nDHCP=yes\n[DHCPv4]\nUseDNS=no\n"
_FILES = {
    "etc/fstab": "/dev/vda / ext4 errors=remount-ro 0 1\n",
    "etc/hostname": "devboxd-vm\n",
    "etc/hosts": "127.0.0.1 localhost devboxd-vm\n",
    "etc/systemd/network/10-wired.network": _NETWORK,
}
_SET_UP = """\
set -eu
mount -t proc proc /proc; mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev 2>/dev/null || true
mkdir -p /dev/pts /dev/shm; mount -t devpts devpts /dev/pts || true
systemctl enable systemd-networkd ssh
systemctl mask apt-daily.timer apt-daily-upgrade.timer dpkg-db-backup.timer
make -C /root/devboxd setup
cd /root/devboxd  # a first program is compiled with its whole library, which takes minutes in the machine
.venv/bin/python -m ziglang cc -target "$(uname -m)-linux-musl" -static -O1 -o /tmp/probe tests/engine/probe.c
"""


@dataclass(frozen=True)
class Image:
    """What a machine is started from; nothing of it is written to."""

    disk: Path
    kernel: Path
    initrd: Path
    key: Path
    """The private key whose owner may log in as root."""


def cache() -> Path:
    """The folder of all images."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "devboxd-vm"


def image(release: str) -> Image:
    """The image of Debian `release` ("12" or "13"); makes it, which takes minutes, when its recipe changed."""
    folder = cache() / f"{release}-{_digest(release)}"
    if not folder.is_dir():
        with _lock(cache()):
            if not folder.is_dir():
                _check_tools()
                _make(folder, release, _base(release))
    return Image(folder / "disk", folder / "vmlinuz", folder / "initrd.img", folder / "key")


def checkout() -> bytes:
    """A tar of this checkout as it is now, with the built agent."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT, check=True, capture_output=True,
    ).stdout.split(b"\0")  # fmt: skip
    names = [name for name in listed if name and (ROOT / os.fsdecode(name)).exists()]
    command = ["tar", "-c", "--null", "--no-recursion", "--verbatim-files-from", "-T", "-"]
    built = [os.fsencode(path.relative_to(ROOT)) for path in (ROOT / "src/devboxd/agent/bin").iterdir()]
    return subprocess.run(command, cwd=ROOT, input=b"\0".join([*names, *built]), check=True, capture_output=True).stdout


def _digest(release: str) -> str:
    """Of all that set-up makes a machine from; the rest of the checkout is brought to each machine anew."""
    parts = [_base_name(release), repr(_FILES), _SET_UP, recipe.digest(Settings())]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    parts += [repr(project["build-system"]), repr(project["project"]), (ROOT / "scripts/setup").read_text()]
    return _hash(parts)


def _base_name(release: str) -> str:
    return f"base-{release}-{_hash([SUITES[release], str(_SIZE), *_PACKAGES])}"


def _hash(parts: list[str]) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _check_tools() -> None:
    if os.geteuid() != 0:
        raise SystemExit("cannot make a virtual machine: its disk is mounted meanwhile; run this as root")
    missing = sorted(package for tool, package in _TOOLS.items() if shutil.which(tool) is None)
    if missing:
        raise SystemExit(f"cannot make a virtual machine: install {' '.join(missing)} (with apt-get, for example)")


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _made(folder: Path, older: str) -> Iterator[Path]:
    """A folder that takes its name when the block has ended well, in place of `older` ones."""
    new = folder.with_name(folder.name + ".new")
    for old in [new, *cache().glob(older)]:
        shutil.rmtree(old, ignore_errors=True)
    new.mkdir(mode=0o700)
    yield new
    new.rename(folder)


def _base(release: str) -> Path:
    """A disk with Debian and nothing of this project; made when the list of its packages changed."""
    folder = cache() / _base_name(release)
    if folder.is_dir():
        return folder / "disk"
    print(f"making a disk with Debian {release}; this takes some minutes", flush=True)
    with _made(folder, f"base-{release}-*") as new:
        with (new / "disk").open("wb") as disk:
            disk.truncate(_SIZE)
        subprocess.run(["mkfs.ext4", "-q", "-F", new / "disk"], check=True)
        with _mounted(new / "disk", new / "root") as root:
            command = ["mmdebstrap", "--quiet", "--mode=root", "--variant=minbase", f"--include={','.join(_PACKAGES)}"]
            options = ('--aptopt=Acquire::Languages "none"', "--dpkgopt=force-unsafe-io")
            subprocess.run([*command, *options, SUITES[release], root], check=True)
    return folder / "disk"


def _make(folder: Path, release: str, base: Path) -> None:
    print(f"setting this project up on a disk with Debian {release}; this takes some minutes", flush=True)
    with _made(folder, f"{release}-*") as new:
        key = new / "key"
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "devboxd-vm", "-f", key], check=True)
        subprocess.run(["cp", "--reflink=auto", "--sparse=always", base, new / "disk"], check=True)
        with _mounted(new / "disk", new / "root") as root:
            _configure(root, key.with_suffix(".pub"))
            _set_up(root)
            for name in ("vmlinuz", "initrd.img"):
                shutil.copy(root / name, new / name)


def _configure(root: Path, key: Path) -> None:
    """What systemd, ssh and the tools that fetch packages need; the machine trusts the CAs that this host trusts."""
    for name, text in _FILES.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    (root / "root/.ssh").mkdir(mode=0o700, exist_ok=True)
    shutil.copy(key, root / "root/.ssh/authorized_keys")
    shutil.copytree(recipe.CERTIFICATES, root / recipe.CERTIFICATES.relative_to("/"), dirs_exist_ok=True)
    shutil.copy(recipe.BUNDLE, root / recipe.BUNDLE.removeprefix("/"))
    (root / "etc/resolv.conf").unlink(missing_ok=True)
    shutil.copy("/etc/resolv.conf", root / "etc/resolv.conf")
    target = root / CHECKOUT.removeprefix("/")
    target.mkdir()
    subprocess.run(["tar", "-x", "-C", target], input=checkout(), check=True)


def _set_up(root: Path) -> None:
    """Set the project up in the machine's root before it ever runs: processors here are faster than there."""
    kept = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    environment = {**kept, "PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": "/root", "LC_ALL": "C.UTF-8"}
    enter = ["unshare", "--mount", "--pid", "--fork", "--kill-child=KILL", "chroot", str(root)]
    subprocess.run([*enter, "sh", "-c", _SET_UP], env=environment, check=True)
    (root / "etc/resolv.conf").write_text("nameserver 10.0.2.3\n")


@contextmanager
def _mounted(disk: Path, place: Path) -> Iterator[Path]:
    place.mkdir()
    subprocess.run(["mount", "-o", "loop,barrier=0", disk, place], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", place], check=True)
        place.rmdir()

"""A Debian machine in qemu: with systemd, cgroups version 2, and a power that can fail.

Its disk is served by nbdkit through a cache that holds back what was written until the machine flushes, as the cache
of a real disk may: `Machine.lose_power` kills both, and what was not flushed is gone.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from io import BytesIO
from pathlib import Path

import vm_image

BOOT_S = 300.0
_OVERLAY = 64 << 30
"""How far the file of what a machine changed may grow; its holes take no room."""
_APPEND = "root=/dev/vda rw console=ttyS0 panic=1 mitigations=off systemd.show_status=0"
_PROCESSOR = {"kvm": "max", "tcg,thread=single": "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt"}
"""By its accelerator: published wheels want x86-64-v2, and to translate more of it only takes time."""
_SSH = (
    *("-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR"),
    *("-o", "BatchMode=yes", "-o", "ConnectTimeout=60", "-o", "ServerAliveInterval=60", "-o", "ControlMaster=auto"),
)


class MachineError(Exception):
    """The machine does not do what it is asked to; the text tells it with the end of its console."""


def accelerator() -> str:
    """KVM where the processor virtualizes; a device node alone proves nothing. Otherwise qemu's own translator.

    That in one thread: with one for each processor the kernel dies where it changes its own code (`Oops: int3`).
    """
    able = any(flag in Path("/proc/cpuinfo").read_text() for flag in (" vmx", " svm"))
    return "kvm" if able and os.access("/dev/kvm", os.R_OK | os.W_OK) else "tcg,thread=single"


class Machine:
    """A machine with Debian `release`; all that it changes lies in `folder` and is kept until `discard`."""

    def __init__(self, release: str, processors: int = 2, memory_mib: int = 4096) -> None:
        self.release = release
        self._processors = processors
        self._memory_mib = memory_mib
        self.folder = vm_image.cache() / f"run-{release}"

    @property
    def _port(self) -> int:
        """Where its sshd is reached."""
        return int((self.folder / "port").read_text())

    @property
    def console(self) -> Path:
        """What the machine printed on its serial line, over all its boots."""
        return self.folder / "console"

    def make(self) -> None:
        """A fresh one, switched off."""
        image = vm_image.image(self.release)
        self.discard()
        self.folder.mkdir(mode=0o700)
        (self.folder / "image").symlink_to(image.disk.parent)
        disk = self.folder / "disk"
        create = ("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b")
        subprocess.run([*create, str(image.disk), str(disk)], check=True)
        os.truncate(disk, _OVERLAY)
        (self.folder / "port").write_text(str(_free_port()))

    def power_on(self) -> float:
        """Switch it on; the seconds until it could be logged into."""
        self._start("nbdkit", "-U", "nbd", "-P", "nbdkit.pid", "--filter=cache", "file", "disk", "cache=writeback")
        self._start(
            *("qemu-system-x86_64", "-accel", accelerator(), "-cpu", _PROCESSOR[accelerator()]),
            *("-smp", str(self._processors), "-m", str(self._memory_mib)),
            *("-nodefaults", "-no-user-config", "-display", "none", "-daemonize", "-pidfile", "qemu.pid"),
            *("-chardev", "file,id=console,path=console,append=on", "-serial", "chardev:console"),
            *("-kernel", "image/vmlinuz", "-initrd", "image/initrd.img", "-append", _APPEND),
            *("-blockdev", "driver=nbd,node-name=wire,server.type=unix,server.path=nbd"),
            *("-blockdev", "driver=qcow2,node-name=disk,file=wire"),
            *("-device", "virtio-blk-pci,drive=disk", "-device", "virtio-rng-pci"),
            *("-netdev", f"user,id=net,hostfwd=tcp:127.0.0.1:{self._port}-:22", "-device", "virtio-net-pci,netdev=net"),
        )
        return self.reached()

    def reached(self, seconds: float = BOOT_S, other_than: str = "") -> float:
        """The seconds until it could be logged into, and ran another boot than the one named."""
        begun = time.monotonic()
        while time.monotonic() - begun < seconds:
            if self._pid("qemu") is None:
                raise MachineError(f"the machine stopped while it booted:\n{self.tail()}")
            done = self.run("cat /proc/sys/kernel/random/boot_id", 30) if self._greets() else None
            if done and done.returncode == 0 and done.stdout.decode().strip() != other_than:
                return time.monotonic() - begun
            time.sleep(0.5)
        raise MachineError(f"the machine did not boot within {seconds:.0f} s:\n{self.tail()}")

    def _greets(self) -> bool:
        """Whether its sshd answers: qemu takes each connection, and ssh would wait for one that the machine lost."""
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self._port), 2) as probe:
            return probe.recv(4) == b"SSH-"
        return False

    def login(self, command: str) -> list[str]:
        """The words of a program that runs this command of the machine's shell; to be started in `folder`."""
        options = [*_SSH, "-i", "image/key", "-o", "ControlPath=ssh", "-o", "ControlPersist=60"]
        return ["ssh", *options, "-p", str(self._port), "root@127.0.0.1", command]

    def run(
        self, command: str, seconds: float = 600, stdin: bytes = b"", *, show: bool = False
    ) -> subprocess.CompletedProcess[bytes]:
        """Run a command of its shell as root; its output is returned, or shown as it comes. 255: no connection.

        A command that takes longer is left, with the exit code 124 of timeout(1).
        """
        whole = self.login(command)
        pipe = None if show else subprocess.PIPE
        try:
            return subprocess.run(
                whole, cwd=self.folder, input=stdin, stdout=pipe, stderr=pipe, timeout=seconds, check=False
            )
        except subprocess.TimeoutExpired as late:
            return subprocess.CompletedProcess(whole, 124, late.stdout or b"", late.stderr or b"")

    def check(self, command: str, seconds: float = 600, stdin: bytes = b"") -> str:
        """The output of a command that must not fail."""
        done = self.run(command, seconds, stdin)
        if done.returncode:
            said = (done.stdout + done.stderr).decode(errors="replace")[-4000:]
            raise MachineError(f"{command!r} ended with {done.returncode}:\n{said}")
        return done.stdout.decode(errors="replace")

    def bring(self) -> None:
        """Put this checkout as it is now, with its built agent, into the machine, which has all that it needs."""
        self.check(f"tar -x --no-same-owner -C {vm_image.CHECKOUT}", 300, vm_image.checkout())

    def fetch(self, path: str, target: Path) -> None:
        """Copy a file or folder of the machine below the folder `target`."""
        done = self.run(f"tar -c -C / {shlex.quote(path.lstrip('/'))}", 300)
        if done.returncode:
            raise MachineError(f"cannot fetch {path}: {done.stderr.decode(errors='replace')}")
        with tarfile.open(fileobj=BytesIO(done.stdout)) as archive:
            archive.extractall(target, filter="data")

    def reboot(self) -> float:
        """Let systemd restart it; the seconds until it began to boot anew."""
        boot = self.check("cat /proc/sys/kernel/random/boot_id").strip()
        mark, begun = self.console.stat().st_size, time.monotonic()
        self.run("systemctl reboot", 30)
        _until(lambda: b"Linux version" in self._printed(mark), 200, "the machine did not go down")
        down = time.monotonic() - begun
        self.reached(other_than=boot)
        return down

    def lose_power(self) -> None:
        """Switch it off within an instruction; what its disk had not been told to keep is gone."""
        for name in ("qemu", "nbdkit"):
            self._kill(name)

    def discard(self) -> None:
        """Switch it off and forget what it changed."""
        self.lose_power()
        shutil.rmtree(self.folder, ignore_errors=True)

    def tail(self, lines: int = 40) -> str:
        """The end of its console."""
        return "\n".join(self.console.read_text(errors="replace").splitlines()[-lines:])

    def _printed(self, since: int) -> bytes:
        with self.console.open("rb") as file:
            file.seek(since)
            return file.read()

    def _start(self, *command: str) -> None:
        """Start a program that goes into the background once it is ready."""
        done = subprocess.run(
            ["nice", "-n", "5", *command],
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise MachineError(f"cannot start {command[0]}: {done.stderr}")

    def _pid(self, name: str) -> int | None:
        """The process id, None when it does not run; a number that another program has by now does not count."""
        with contextlib.suppress(OSError, ValueError):
            pid = int((self.folder / f"{name}.pid").read_text())
            if name.encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                return pid
        return None

    def _kill(self, name: str) -> None:
        if (pid := self._pid(name)) is not None:
            os.kill(pid, signal.SIGKILL)
            _until(lambda: self._pid(name) is None, 30, f"{name} did not end")
        for path in ("nbd", "ssh"):
            (self.folder / path).unlink(missing_ok=True)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _until(condition: Callable[[], bool], seconds: float, fault: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise MachineError(fault)
        time.sleep(0.1)


def main() -> int:
    """The commands of scripts/vm; the exit status, which is that of a command that ran in the machine."""
    parser = argparse.ArgumentParser(prog="scripts/vm", description=__doc__)
    parser.add_argument("--debian", choices=sorted(vm_image.SUITES), default="13", help="the release (default: 13)")
    commands = parser.add_subparsers(dest="what", required=True)
    commands.add_parser("up", help="make a fresh machine with this checkout and leave it running")
    commands.add_parser("down", help="switch it off and forget it")
    for name, text in (
        ("run", "make one, run a command in its checkout, switch it off"),
        ("exec", "run a command in the one that is up"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("--fetch", metavar="PATH", action="append", default=[], help="bring this out afterwards")
        command.add_argument("command", nargs=argparse.REMAINDER)
    chosen = parser.parse_args()
    machine = Machine(chosen.debian)
    try:
        return _act(machine, chosen)
    except MachineError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        if chosen.what in ("run", "down"):
            machine.discard()


def _act(machine: Machine, chosen: argparse.Namespace) -> int:
    if chosen.what in ("up", "run"):
        machine.make()
        seconds = machine.power_on()
        machine.bring()
        print(
            f"Debian {chosen.debian} is up ({accelerator().partition(',')[0]}, booted in {seconds:.0f} s)",
            file=sys.stderr,
        )
    if chosen.what not in ("run", "exec"):
        return 0
    words = chosen.command[1:] if chosen.command[:1] == ["--"] else chosen.command
    done = machine.run(f"cd {vm_image.CHECKOUT} && {shlex.join(words)}", 3600, show=True)
    for path in chosen.fetch:
        machine.fetch(path, Path.cwd())
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())

"""The default image: built once per recipe, kept in the cache folder, shared by all servers of the machine.

A build goes on in `<digest>.new` under a lock on `<digest>.lock` and is renamed when it is whole, so that a folder
named by a digest is always a finished image. The builder and all its children live in a mount and process namespace
of their own and hold the lock as well: they end, mounts and all, when the server dies or the build is cancelled, and
no second build starts before the first is gone.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import re
import shlex
import shutil
import signal
from collections import deque
from collections.abc import Callable
from functools import partial
from pathlib import Path

from devboxd.concurrency.threads import finished
from devboxd.config import Settings
from devboxd.engine import manifest, recipe
from devboxd.engine.base import EngineError, Image
from devboxd.path_errors import reason, shown

Progress = Callable[[float, str], None]
"""Called with the share that is done, 0 to 1, and a few words on what happens now."""

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_WAIT_SECONDS = 0.2
_NETWORK = re.compile(
    r"failed to fetch|could not resolve|could not connect|connection (failed|refused|timed out)|network is unreachable|"
    r"failed to download|temporary failure|no longer has a release file|cannot initiate the connection|"
    r"failed to establish a new connection|could not find a version",
    re.IGNORECASE,
)


class Images:
    """The images that boxes start from."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._folder = settings.cache / "images"
        self._ensured: Image | None = None

    def default(self) -> Image | None:
        """The default image when it is built already."""
        return self._ensured or self._image(recipe.digest(self._settings))

    def named(self, name: str) -> Image | None:
        """The image of this name, when it is here."""
        return self._image(name.removeprefix("default-"))

    async def restore(self, name: str, archive: Path) -> None:
        """Make the image of this name out of an archive of it, where it is missing. Raises EngineError and OSError."""
        digest = name.removeprefix("default-")
        self._make_folder()
        with (self._folder / f"{digest}.lock").open("ab") as lock:
            await finished(lambda: fcntl.flock(lock, fcntl.LOCK_EX))
            if self._image(digest) is None:
                making = self._folder / f"{digest}.new"
                try:
                    (making / "rootfs").mkdir(parents=True)
                    await manifest.extract(archive, making / "rootfs")
                    await finished(os.sync)
                    making.rename(self._folder / digest)
                finally:
                    await finished(lambda: shutil.rmtree(making, ignore_errors=True))

    async def ensure_default(self, progress: Progress) -> Image:
        """The default image, built now when it is missing; waits when another process builds it at this moment.

        Raises EngineError that says what is missing on this machine and how to get it, and SetupError for a CA
        certificate that cannot be used. Cancelling ends a build.
        """
        if os.geteuid() != 0:
            raise EngineError("cannot look for the image: images belong to root; run this as root")
        name = await asyncio.to_thread(recipe.digest, self._settings)
        if image := self._image(name):
            self._ensured = image
            progress(1.0, "image is ready")
            return image
        self._make_folder()
        descriptor = os.open(self._folder / f"{name}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            await self._take_turn(descriptor, name, progress)
            if self._image(name) is None:
                await self._build(descriptor, name, progress)
        finally:
            os.close(descriptor)
        image = self._image(name)
        if image is None:
            raise EngineError(f"cannot find the image that was just built in {self._folder}; did somebody delete it?")
        self._ensured = image
        progress(1.0, "image is ready")
        return image

    def _image(self, name: str) -> Image | None:
        rootfs = self._folder / name / "rootfs"
        return Image(name=f"default-{name}", layers=(rootfs,)) if rootfs.is_dir() else None

    def _make_folder(self) -> None:
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            # Set-user-id programs of an image that grows old must not be within reach of this host's users.
            self._folder.chmod(0o700)
        except OSError as error:
            raise EngineError(
                f"cannot make {shown(self._folder)} for the image: {reason(error)}; name another folder as cache"
            ) from error

    async def _take_turn(self, descriptor: int, name: str, progress: Progress) -> None:
        """Hold the lock; until then repeat the progress that the process which holds it writes down."""
        while True:
            with contextlib.suppress(BlockingIOError):
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            with contextlib.suppress(OSError, ValueError, TypeError):
                done, text = json.loads((self._folder / f"{name}.progress").read_text())
                progress(float(done), f"{text} (by another process)")
            await asyncio.sleep(_WAIT_SECONDS)

    async def _build(self, lock: int, name: str, progress: Progress) -> None:
        _check_tools()
        folder, record = self._folder / f"{name}.new", self._folder / f"{name}.progress"
        tell = _recorded(progress, record)
        tell(0.0, "preparing the image")
        try:
            await finished(lambda: _stage(folder, self._settings))
            await _run(_command(folder, self._settings), folder / "tmp", lock, tell)
            for part in ("files", "tmp"):
                await finished(partial(shutil.rmtree, folder / part))
            await finished(os.sync)
            folder.rename(self._folder / name)
        except OSError as error:
            raise EngineError(
                f"cannot build the image in {folder}: {reason(error)}; free some space or name another cache"
            ) from error
        finally:
            await finished(lambda: shutil.rmtree(folder, ignore_errors=True))
            record.unlink(missing_ok=True)


def _check_tools() -> None:
    packages = {"mmdebstrap": "mmdebstrap", "setpriv": "util-linux", "unshare": "util-linux", "tar": "tar"}
    missing = sorted({package for tool, package in packages.items() if shutil.which(tool) is None})
    if missing:
        raise EngineError(
            f"cannot build the image: the package {' and '.join(missing)} is missing; "
            f"install it, for example with: apt-get install {' '.join(missing)}"
        )
    if not KEYRING.exists():
        raise EngineError(
            f"cannot build the image: {KEYRING} is missing, with which Debian's packages are verified; "
            "install the package debian-archive-keyring"
        )


def _recorded(progress: Progress, record: Path) -> Progress:
    """A callback that also leaves what it says for those who wait for the lock."""

    def tell(done: float, text: str) -> None:
        temporary = record.with_suffix(".progress-new")
        temporary.write_text(json.dumps([done, text]))
        temporary.rename(record)
        progress(done, text)

    return tell


def _stage(folder: Path, settings: Settings) -> None:
    """An empty build folder with the files that the image gets beside its packages."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(mode=0o755)
    (folder / "tmp").mkdir(mode=0o1777)
    for path, (mode, content) in recipe.files(settings).items():
        target = folder / "files" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
        target.chmod(mode)
    for place in (folder, *(folder / "files").rglob("*/")):
        place.chmod(0o755)  # whatever the server's mask


def _command(folder: Path, settings: Settings) -> list[str]:
    files = shlex.quote(str(folder / "files"))
    copy = f'tar -C {files} -c . | tar -C "$1" --no-overwrite-dir --no-same-owner -px'
    finish = 'chroot "$1" sh /devboxd-finish && rm "$1/devboxd-finish"'
    options = [f"--dpkgopt={line}" for line in recipe.DPKG_OPTIONS]
    return [
        *("setpriv", "--pdeathsig", "KILL", "sh", "-c", 'umask 022; exec "$@"', "sh"),
        *("unshare", "--mount", "--pid", "--fork", "--kill-child=KILL"),
        *("mmdebstrap", "--verbose", "--mode=root", "--format=directory", "--variant=minbase"),
        f"--include={','.join(recipe.PACKAGES)}",
        '--aptopt=Acquire::Languages "none"',
        *options,
        f"--customize-hook={copy}",
        f"--customize-hook={finish}",
        recipe.SUITE,
        str(folder / "rootfs"),
        *recipe.sources(recipe.mirrors(settings)),
    ]


async def _run(command: list[str], temporary: Path, lock: int, tell: Progress) -> None:
    """Run the builder to its end. Whatever happens, nothing of it lives when this returns."""
    environment = {key: value for key, value in os.environ.items() if key.lower().endswith("_proxy")}
    environment |= {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin:/usr/local/sbin:/usr/local/bin", "LC_ALL": "C.UTF-8"}
    environment["TMPDIR"] = str(temporary)  # what a builder that is killed cannot remove goes with the folder
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        env=environment,
        pass_fds=(lock,),
        start_new_session=True,
        limit=1 << 20,
    )
    assert process.stdout is not None
    tail: deque[str] = deque(maxlen=200)
    try:
        meter = _Meter()
        while chunk := await process.stdout.readline():
            line = chunk.decode(errors="replace").strip()
            tail.append(line)
            if step := meter.feed(line):
                tell(*step)
        status = await process.wait()
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGKILL)
        await asyncio.shield(_drain(process))
    if status != 0:
        raise EngineError(_explain(list(tail), status))


async def _drain(process: asyncio.subprocess.Process) -> None:
    """Wait until the last process of the builder has let go of the pipe, which it does only by ending."""
    assert process.stdout is not None
    while await process.stdout.read(65536):
        pass
    await process.wait()


class _Meter:
    """Turns the builder's lines into a share of the whole; the shares come from measured builds."""

    _STAGES = ((0.02, 0.20), (0.22, 0.76))

    def __init__(self) -> None:
        self._runs: list[int] = []
        self._events = 0

    def feed(self, line: str) -> tuple[float, str] | None:
        """The progress after this line, or None when it says nothing about it."""
        if match := re.match(r"\d+ upgraded, (\d+) newly installed", line):
            self._runs.append(int(match[1]))
            self._events = 0
            return None
        if line.startswith("I: cleaning package lists"):
            return 0.98, "cleaning up"
        match = re.match(r"(Get:\d+ \S+ \S+ \S+|Unpacking|Setting up) (\S+)", line)
        if match is None or not 1 <= len(self._runs) <= len(self._STAGES):
            return None
        self._events += 1
        start, share = self._STAGES[len(self._runs) - 1]
        verb = "downloading" if match[1].startswith("Get") else match[1].lower()
        return start + share * min(1.0, self._events / (3 * self._runs[-1] or 1)), f"{verb} {match[2]}"


def _explain(lines: list[str], status: int) -> str:
    """What went wrong, its cause in the builder's own words, and what helps."""
    errors = [line for line in lines if re.match(r"(E|Err|W):|ERROR:|dpkg: error|tar:|sh:|visudo", line)] or lines[-5:]
    text = "\n".join(lines)
    if _NETWORK.search(text):
        cure = "check this machine's network, or set apt_mirror and pip_index_url to mirrors that it reaches"
    elif "No space left" in text:
        cure = "free 2 GB of disk space or name another folder as cache"
    elif re.search(r"NO_PUBKEY|not signed|signatures? (were|was) invalid|couldn't be verified", text):
        cure = "install the newest debian-archive-keyring, and check that apt_mirror is a mirror of Debian"
    else:
        cure = "see the lines above and try again"
    said = "\n  ".join(errors[-8:])
    return f"cannot build the image: the builder ended with status {status}:\n  {said}\nWhat helps: {cure}."

"""`devboxd boxes cp`: files and folders into a box and out of it."""

from __future__ import annotations

import os
import shlex
import stat
import sys
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, BinaryIO

import click

from devboxd.cli.completion import box_or_file
from devboxd.cli.options import find_box, find_remote, server_options
from devboxd.cli.printing import printable
from devboxd.errors import SetupError
from devboxd.path_errors import explained, shown

if TYPE_CHECKING:
    import tarfile

    from devboxd.remote import Remote

_NAMED = 3
"""How many of what is left out are named."""
_MOST_SOCKETS = 1000
_SUDO = "let root do it there, as in `devboxd boxes exec BOX -- sudo cp -r /root/x /tmp`, and copy that"


@dataclass(frozen=True)
class _Place:
    """A path in a box."""

    remote: Remote
    box: str
    path: str

    @property
    def url(self) -> str:
        return f"/v1/devboxes/{self.box}"

    def kind(self) -> str:
        """`folder`, the file's mode in octal, or `?` and what the box says where its user sees nothing."""
        name = shlex.quote(self.path)
        look = f'said=$(LC_ALL=C stat -Lc %a -- {name} 2>&1) && echo "$said" || echo "?$said"'
        return self.run(f"if [ -d {name} ]; then echo folder; else {look}; fi")

    def run(self, command: str) -> str:
        """What a command in the box prints, without its line end. Raises SetupError with what it says when it fails."""
        begun = self.remote.call("POST", f"{self.url}/execute_async", {"command": command})
        path = f"{self.url}/executions/{begun['execution_id']}/wait_for_status"
        view = self.remote.call("POST", path, {"statuses": ["completed"]})
        if view["exit_status"]:
            said = " ".join((view["stderr"] or view["stdout"]).split()) or f"status {view['exit_status']}"
            hint = f"; {_SUDO}" if "Permission denied" in said else ""
            raise SetupError(f"cannot copy: the box says: {printable(said[-300:])}{hint}")
        return str(view["stdout"]).rstrip("\n")

    @contextmanager
    def archive(self) -> Iterator[_Place]:
        """A path for an archive in the box, which is removed in the end."""
        place = _Place(self.remote, self.box, f"/tmp/devboxd-cp-{uuid.uuid4().hex}.tar")  # noqa: S108 - in the box
        try:
            yield place
        finally:
            self.run(f"rm -f {place.path}")


@click.command("cp")
@server_options
@click.argument("source", metavar="SRC", shell_complete=box_or_file)
@click.argument("target", metavar="DST", shell_complete=box_or_file)
def boxes_cp(source: str, target: str, url: str | None, key_file: Path | None) -> None:
    """Copy into a box or out of it.

    SRC is a file or folder. One of SRC and DST is a path in a box, BOX:PATH; without a leading / it begins at the home
    of the box's user. The other one is a path here, or - for standard input or output. What is copied into a folder
    that is there keeps its name. Pipes, sockets and devices in a folder are left out, and said so.

    \b
    devboxd boxes cp ./src BOX:work
    devboxd boxes cp BOX:work/report.html .
    cat data.csv | devboxd boxes cp - BOX:/tmp/data.csv
    """
    inside = [_parts(text) for text in (source, target)]
    if all(inside) or not any(inside):
        raise click.UsageError("one of SRC and DST is a path in a box, as BOX:PATH, and the other one is here")
    remote = find_remote(url, key_file)
    name, path = next(filter(None, inside))
    place = _Place(remote, find_box(remote, name), path or ".")
    if inside[1]:
        _into(place, source)
    else:
        _out_of(place, target)


def _parts(text: str) -> tuple[str, str] | None:
    """Name and path of BOX:PATH; None for a path here, which may have a colon after a slash."""
    name, colon, path = text.partition(":")
    return (name, path) if colon and name and "/" not in name else None


def _into(place: _Place, source: str) -> None:
    if source == "-":
        place.remote.upload(f"{place.url}/upload_file", place.path, sys.stdin.buffer)
        return
    here = Path(source)
    try:
        here.stat()
    except OSError as error:
        raise SetupError(f"cannot copy {shown(source)} of this machine: {explained(error)}") from error
    there = place.kind()
    within = there == "folder" or place.path.endswith("/")
    path = f"{place.path.rstrip('/')}/{here.resolve().name}" if within else place.path
    target = _Place(place.remote, place.box, path)
    if here.is_dir():
        _folder_into(target, here)
    else:
        with _opened(here) as file:
            place.remote.upload(f"{place.url}/upload_file", path, file)
        if os.access(here, os.X_OK):
            target.run(f"chmod +x -- {shlex.quote(path)}")


def _opened(here: Path) -> BinaryIO:
    try:
        return here.open("rb")
    except OSError as error:
        raise SetupError(f"cannot copy {shown(here)} of this machine: {explained(error)}") from error


def _folder_into(target: _Place, here: Path) -> None:
    import tarfile
    import tempfile

    folder = shlex.quote(target.path)
    with target.archive() as archive, tempfile.TemporaryFile() as packed:
        with tarfile.open(fileobj=packed, mode="w", format=tarfile.PAX_FORMAT) as tar:
            tar.add(here.resolve(), arcname=".", filter=_plain)
        _tell_left_out(list(_special(here)))
        packed.seek(0)
        target.remote.upload(f"{target.url}/upload_file", archive.path, packed)
        target.run(f"mkdir -p -- {folder} && tar -C {folder} --no-same-owner -xf {archive.path}")


def _plain(entry: tarfile.TarInfo) -> tarfile.TarInfo | None:
    """Files, folders and links alone: no sockets, pipes or devices."""
    return entry if entry.isfile() or entry.isdir() or entry.issym() or entry.islnk() else None


def _special(folder: Path) -> Iterator[str]:
    """The pipes, sockets and devices of a folder, which are not copied."""
    for place, _, names in os.walk(folder):
        for name in names:
            path = os.path.join(place, name)
            with suppress(OSError):  # it is gone by now
                mode = os.lstat(path).st_mode
                if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):
                    yield os.path.relpath(path, folder)


def _tell_left_out(names: Sequence[str]) -> None:
    """Say on standard error what was not copied and is no fault, as rsync does."""
    if names:
        first = ", ".join(printable(name) for name in sorted(names)[:_NAMED])
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        click.echo(f"left out, because only files, folders and links are copied: {first}{more}", err=True)


def _out_of(place: _Place, target: str) -> None:
    kind = place.kind()
    if kind.startswith("?"):
        raise SetupError(f"cannot copy {place.path!r}: {_unseen(kind)}")
    if target == "-":
        if kind == "folder":
            raise SetupError(f"cannot write the folder {place.path!r} to standard output: name a folder for it")
        _fetch(place, sys.stdout.buffer)
        sys.stdout.buffer.flush()
        return
    here = Path(target)
    name = place.run(f'basename -- "$(realpath -- {shlex.quote(place.path)})"')
    goal = here / name if here.is_dir() else here
    try:
        if name in ("", ".", "..", "/") or not goal.parent.is_dir():
            raise SetupError(f"cannot copy to {shown(target)}: there is no folder {shown(goal.parent)} here")
        if kind == "folder":
            _folder_out_of(place, goal)
        else:
            with _replacing(goal, int(kind, 8) & 0o777) as file:
                _fetch(place, file)
    except OSError as error:
        raise SetupError(f"cannot copy to {shown(goal)} of this machine: {explained(error)}") from error


def _unseen(said: str) -> str:
    """Why the user of a box sees nothing at a path, by what `stat` said."""
    why = said.rpartition(": ")[2]
    if why == "Permission denied":
        return f"the box's user may not look there; {_SUDO}"
    if why == "No such file or directory":
        return "there is no such file or folder in the box"
    return f"the box says: {printable(why)}"


def _fetch(place: _Place, file: IO[bytes]) -> None:
    for piece in place.remote.download(f"{place.url}/download_file", {"path": place.path}):
        file.write(piece)


@contextmanager
def _replacing(goal: Path, mode: int) -> Iterator[IO[bytes]]:
    """A file that takes the place of `goal` once it is whole; nothing of it stays when it is not."""
    import tempfile

    with tempfile.NamedTemporaryFile(dir=goal.parent, prefix=f".{goal.name[:100]}-", delete=False) as file:
        try:
            yield file
            os.chmod(file.name, mode & ~_mask())
            os.replace(file.name, goal)
        except BaseException:
            os.unlink(file.name)
            raise


def _mask() -> int:
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def _folder_out_of(place: _Place, goal: Path) -> None:
    """What comes from a box is hostile: nothing of it leaves the folder, and no device or owner is made."""
    import tarfile
    import tempfile

    if not hasattr(tarfile, "data_filter"):
        raise SetupError("cannot copy a folder out of a box with this Python: 3.11.4 or newer unpacks safely")
    left_out = []
    special = []

    def filtered(entry: tarfile.TarInfo, folder: str) -> tarfile.TarInfo | None:
        try:
            return tarfile.data_filter(entry, folder)
        except tarfile.SpecialFileError:
            special.append(entry.name.removeprefix("./"))
            return None
        except tarfile.FilterError as error:
            left_out.append(printable(str(error)))
            return None

    with place.archive() as archive, tempfile.TemporaryFile() as packed:
        path = shlex.quote(place.path)
        place.run(f"tar -C {path} -cf {archive.path} . || [ $? = 1 ]")  # 1: it changed meanwhile
        sockets = place.run(f"find {path}/ -type s -printf '%P\\n' | head -n {_MOST_SOCKETS}")  # tar leaves them out
        _fetch(archive, packed)
        packed.seek(0)
        goal.mkdir(exist_ok=True)
        try:
            with tarfile.open(fileobj=packed) as tar:
                tar.extractall(goal, filter=filtered)  # noqa: S202 - filtered
        except tarfile.TarError as error:
            why = printable(str(error))
            raise SetupError(f"cannot unpack {place.path!r}: {why}; copy its files one by one") from error
    _tell_left_out([*special, *sockets.splitlines()])
    if left_out:
        raise SetupError(f"cannot copy all of {place.path!r}: {len(left_out)} left out, the first: {left_out[0]}")

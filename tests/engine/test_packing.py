"""Archives of what boxes nest and name: the bytes that GNU tar wrote, in bounded memory, and all of it comes back."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from devboxd.engine import manifest, processes
from devboxd.engine.base import EngineError

pytestmark = pytest.mark.anyio

LEVELS, NAMES = 5000, 100_000
MOST_MIB = 128
GNU_TAR = (
    *("tar", "--create", "--file=-", "--sort=name", "--sparse", "--sparse-version=0.0", "--format=pax"),
    *("--pax-option=exthdr.name=%d/%f,delete=atime,delete=ctime", "--xattrs", "--xattrs-include=*"),
    *("--numeric-owner", "--warning=none"),
)
"""How earlier versions packed."""
LIMITED = """
import asyncio, json, pathlib, resource, sys
from devboxd.engine import manifest
async def main(tree, file, back):
    told = await manifest.archive(tree, file), await manifest.digest(tree)
    back.mkdir()
    await manifest.extract(file, back)
    return *told, await manifest.digest(back), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss >> 10
print(json.dumps(asyncio.run(main(*map(pathlib.Path, sys.argv[1:])))))
"""


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Path]:
    """An empty folder beside others that a test may make."""
    (tmp_path / "tree").mkdir()
    yield tmp_path / "tree"
    subprocess.run(["rm", "-rf", "--", *map(str, tmp_path.iterdir())], check=True)


def _ordinary(tree: Path) -> None:
    """All kinds of entries, names, owners, times and attributes that a path can lead to."""
    _links(tree)
    _holes(tree)
    (tree / "folder").mkdir(mode=0o1777)
    for number, ns in enumerate((-1_250_000_000, -1, -(10**9), 0, 5, 5 * 10**9, 2**33 * 10**9 + 1, 2**34 * 10**9)):
        (tree / f"time-{number}").touch()
        os.utime(tree / f"time-{number}", ns=(ns, ns))
    for number, (uid, gid, mode) in enumerate(((3_000_000, 70_000, 0o4755), (2_097_151, 2_097_152, 0o2750))):
        (tree / f"own-{number}").touch()
        (tree / f"folder-{number}").mkdir()
        for path in (tree / f"own-{number}", tree / f"folder-{number}"):
            os.chown(path, uid, gid)
            path.chmod(mode)
    os.setxattr(tree / "own-0", "security.capability", bytes.fromhex("0100000200200000" + "00" * 12))
    for name in ("user.x=y%z", "user.%3D", "trusted.overlay.opaque", "user.a"):
        os.setxattr(tree / "folder", name, b"v\0\n\xff")
    os.setxattr(tree / "link", "trusted.z", b"1", follow_symlinks=False)
    above = tree / "nested"
    while len(os.fsencode(above)) - len(os.fsencode(tree)) < 3900:
        above = above / ("n" * 120)
    above.mkdir(parents=True)
    (above / "last").write_text("deep")


def _links(tree: Path) -> None:
    for name in (
        b"a",
        b"=% ",
        b"\xff\xfe",
        b"a\nb",
        b"\\x",
        "é".encode(),
        *(b"q" * n for n in (96, 97, 98, 99, 150, 253)),
    ):
        path = os.fsencode(tree) + b"/" + name
        Path(os.fsdecode(path)).write_bytes(name)
        os.link(path, path + b"L")
        os.symlink(name, os.fsencode(tree) + b"/S" + name)
        os.mkdir(os.fsencode(tree) + b"/D" + name)
    (tree / "link").symlink_to("/etc/shadow")
    os.link(tree / "link", tree / "link-too", follow_symlinks=False)
    os.mknod(tree / "whiteout", 0o020600, os.makedev(0, 0))
    os.setxattr(tree / "whiteout", "trusted.z", b"1")
    os.mknod(tree / "block", 0o060640, os.makedev(300, 70000))
    os.mkfifo(tree / "pipe")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(tree / "socket"))


def _holes(tree: Path) -> None:
    with (tree / "holes").open("wb") as file:
        for number in range(50):
            file.seek(number * 100_000)
            file.write(b"x" * 5000)
        file.truncate(10**8)
    for name, first, size in (("ends", 10**6, 10**6 + 777), ("begins", 0, 100_000), ("nothing", None, 1 << 20)):
        with (tree / name).open("wb") as file:
            if first is not None:
                file.seek(first)
                file.write(b"x" * 777)
            file.truncate(size)


def _nest(tree: Path, levels: int) -> int:
    """Folders in one another, the last of which is open then."""
    at = os.open(tree, os.O_RDONLY | os.O_DIRECTORY)
    for _ in range(levels):
        os.mkdir("x" * 250, dir_fd=at)
        below = os.open("x" * 250, os.O_RDONLY | os.O_DIRECTORY, dir_fd=at)
        os.close(at)
        at = below
    return at


def _gnu_tar(folder: Path) -> bytes:
    return subprocess.run([*GNU_TAR, f"--directory={folder}", "."], capture_output=True, check=True).stdout


def _measured(words: list[str]) -> tuple[str, str, str, int]:
    """The digests of what was packed, read, and brought back, and the most MiB that a program had for it."""
    done = subprocess.run([sys.executable, "-c", LIMITED, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    packed, read, brought, most = json.loads(done.stdout)
    return packed, read, brought, most


async def test_of_what_paths_lead_to_it_is_what_gnu_tar_wrote(tree: Path) -> None:
    """So digests that were told before stay true, and earlier archives come back."""
    _ordinary(tree)
    os.sync()
    before = _gnu_tar(tree)
    assert await manifest.archive(tree, tree.parent / "new.tar") == hashlib.sha256(before).hexdigest()
    assert (tree.parent / "new.tar").read_bytes() == before
    (tree.parent / "old.tar").write_bytes(before)
    back = tree.parent / "back"
    back.mkdir()
    await manifest.extract(tree.parent / "old.tar", back)
    os.sync()
    assert _gnu_tar(back) == before


async def test_many_levels_and_many_names_need_little_and_come_back(tree: Path) -> None:
    """tar took 9 GiB for 5,000 levels, and brought nothing back whose path was longer than 4,095 bytes."""
    at = _nest(tree, LEVELS)
    for number in range(NAMES // 2):
        os.symlink("a", f"{number:0248}", dir_fd=at)
        (tree / f"{number:0248}").symlink_to("b")
    os.close(at)
    words = [str(path) for path in (tree, tree.parent / "archive.tar", tree.parent / "back")]
    packed, read, brought, most = _measured(words)
    assert packed == read == brought
    assert most < MOST_MIB
    assert (tree.parent / "archive.tar").stat().st_size < (LEVELS + NAMES) * 2048


async def test_files_of_several_names_stay_one_however_deep(tree: Path) -> None:
    at = _nest(tree, 30)
    for name, text in (("first", "one"), ("only", "two")):
        file = os.open(name, os.O_CREAT | os.O_WRONLY, dir_fd=at)
        os.write(file, text.encode())
        os.close(file)
    os.symlink("target", "sign", dir_fd=at)
    os.link("sign", "sign-too", src_dir_fd=at, dst_dir_fd=at, follow_symlinks=False)
    (tree / "above").write_text("above")
    os.link(tree / "above", "below", dst_dir_fd=at)
    for number in range(3):
        os.link("first", f"more-{number}", src_dir_fd=at, dst_dir_fd=at)
    os.link("first", tree / "z", src_dir_fd=at)
    os.close(at)
    back = tree.parent / "back"
    back.mkdir()
    digest = await manifest.archive(tree, tree.parent / "archive.tar")
    await manifest.extract(tree.parent / "archive.tar", back)
    assert await manifest.digest(back) == digest
    assert (back / "z").stat().st_nlink == 5
    assert (back / "z").read_text() == "one"
    assert (back / "above").stat().st_nlink == 2
    assert sorted(path.name for path in tree.parent.iterdir()) == ["archive.tar", "back", "tree"]


async def test_as_many_names_as_a_file_may_have_come_back(tree: Path) -> None:
    """The one that is kept aside while they are made would be one too many."""
    at = _nest(tree, 30)
    os.close(os.open("0", os.O_CREAT | os.O_WRONLY, dir_fd=at))
    names = 1
    try:
        while names < 70_000:
            os.link("0", str(names), src_dir_fd=at, dst_dir_fd=at)
            names += 1
    except OSError:
        pass
    os.close(at)
    back = tree.parent / "back"
    back.mkdir()
    digest = await manifest.archive(tree, tree.parent / "archive.tar")
    await manifest.extract(tree.parent / "archive.tar", back)
    assert await manifest.digest(back) == digest


async def test_more_than_it_may_hold_is_refused_in_words(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number in range(50_000):
        (tree / f"{number:0248}").symlink_to("b")
    limited = [*processes.BOUNDED[:-2], f"--as={40 << 20}", "--"]
    monkeypatch.setattr(processes, "BOUNDED", limited)
    with pytest.raises(EngineError, match="needs more memory than this may have"):
        await manifest.digest(tree)


@pytest.mark.parametrize("what", ["./../out", "/out", "out", "a/out", "./a/b", "./", "./.", ""])
async def test_no_entry_leads_out_of_the_folder(tree: Path, what: str) -> None:
    """Archives have digests, but who writes both may not write elsewhere."""
    (tree / "file").write_text("text")
    await manifest.archive(tree, tree.parent / "archive.tar")
    packed = bytearray((tree.parent / "archive.tar").read_bytes())
    at = packed.rindex(b"./file")
    packed[at : at + 100] = what.encode().ljust(100, b"\0")
    (tree.parent / "archive.tar").write_bytes(packed)
    back = tree.parent / "back"
    back.mkdir()
    with pytest.raises(EngineError, match="cannot bring back"):
        await manifest.extract(tree.parent / "archive.tar", back)
    assert not (tree.parent / "out").exists()
    assert not list(back.iterdir())


async def test_a_cut_archive_is_told(tree: Path) -> None:
    (tree / "file").write_bytes(bytes(100_000))
    await manifest.archive(tree, tree.parent / "archive.tar")
    whole = (tree.parent / "archive.tar").read_bytes()
    for length in (0, 100, 700, 3000, 50_000):
        (tree.parent / "archive.tar").write_bytes(whole[:length])
        back = tree.parent / f"back-{length}"
        back.mkdir()
        with pytest.raises(EngineError, match="it is cut"):
            await manifest.extract(tree.parent / "archive.tar", back)

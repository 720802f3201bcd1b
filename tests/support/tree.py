"""A tree of files as a model: changes by chance, each as a command for a box and as an effect on what is known."""

from __future__ import annotations

import hashlib
import random
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace

from support.api import Api

IMAGE = ("/etc/cron.daily", "/etc/skel", "/usr/share/debianutils")
"""Small folders of the default image."""
OWN = ("/home/user/model", "/tmp/model")
LOOK = ("/home/user", "/tmp", *IMAGE)
"""All that is changed lies below these."""
PREPARE = f"mkdir -p {' '.join(OWN)}"
_MANIFEST = (
    f"sudo find {' '.join(LOOK)} -printf '%y\\t%m\\t%u\\t%p\\t%l\\n'; "
    f"sudo find {' '.join(LOOK)} -type f -exec sha256sum {{}} +"
)
_NAMES = ("a", "b", "c d", "é'", "-x", ".profile", "dpkg", "shells", "shells.d")
_MOST = 60


@dataclass(frozen=True)
class Entry:
    """A file (`f`), folder (`d`) or symbolic link (`l`); `content` of a link is its target."""

    kind: str
    mode: str
    owner: str
    content: bytes = b""

    def shown(self) -> tuple[str, ...]:
        """What a manifest tells of it."""
        if self.kind == "l":
            return (self.kind, self.mode, self.owner, self.content.decode(), "")
        digest = hashlib.sha256(self.content).hexdigest() if self.kind == "f" else ""
        return (self.kind, self.mode, self.owner, "", digest)


Tree = dict[str, Entry]
"""What lies on a disk, by absolute paths."""


def manifest(api: Api, box: str) -> dict[str, tuple[str, ...]]:
    """What a box really has, by its own words; the content of files as a digest."""
    found: dict[str, tuple[str, ...]] = {}
    for line in api.output(box, _MANIFEST).splitlines():
        if "\t" in line:
            kind, mode, owner, path, target = line.split("\t")
            found[path] = (kind, mode, owner, target, "")
        else:
            digest, _, path = line.partition("  ")
            found[path] = (*found[path][:4], digest)
    return found


def read_tree(api: Api, box: str) -> Tree:
    """The whole tree of a box, as a beginning."""
    tree = {}
    for path, (kind, mode, owner, target, _) in manifest(api, box).items():
        content = api.download(box, path) if kind == "f" else target.encode()
        tree[path] = Entry(kind, mode, owner, content)
    return tree


def differences(api: Api, box: str, tree: Tree) -> str:
    """Where a box differs from what is known; nothing if it does not."""
    found, known = manifest(api, box), {path: entry.shown() for path, entry in tree.items()}
    paths = sorted(path for path in found.keys() | known.keys() if found.get(path) != known.get(path))
    return "\n".join(f"{path}: has {found.get(path)}, must have {known.get(path)}" for path in paths)


def changes(tree: Tree, chance: random.Random, number: int) -> str:
    """Change the tree so many times; the command that does the same in a box."""
    return "\n".join(["set -e", *(_change(tree, chance) for _ in range(number))])


def _change(tree: Tree, chance: random.Random) -> str:
    kinds: list[Callable[[Tree, random.Random], str]] = [
        _write, _write, _append, _patch, _stretch, _copy, _move, _move, _link, _folder, _owner, _mode,
    ]  # fmt: skip
    return chance.choice([*kinds, _delete] if len(tree) < _MOST else [_delete])(tree, chance)


def _pick(tree: Tree, chance: random.Random, kinds: str) -> str:
    """A path of one of these kinds that may be changed; a new file where there is none."""
    found = sorted(path for path, entry in tree.items() if entry.kind in kinds and path not in LOOK + OWN)
    return chance.choice(found) if found else ""


def _new(tree: Tree, chance: random.Random, moved: str = "\0") -> str:
    """A path that may be there or not, in a folder that is, not below `moved`."""
    folders = [path for path, entry in tree.items() if entry.kind == "d" and path not in ("/tmp", "/home/user")]
    at = chance.choice(sorted(path for path in folders if not _below(path, moved)))
    return f"{at}/{chance.choice(_NAMES)}"


def _below(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder + "/")


def _drop(tree: Tree, path: str) -> str:
    for each in [each for each in tree if _below(each, path)]:
        del tree[each]
    return f"sudo rm -rf {shlex.quote(path)}"


def _bytes(chance: random.Random, most: float = 5.5) -> tuple[str, bytes]:
    """A command that prints some bytes, and the bytes: few and many are equally likely."""
    word, size = f"{chance.randrange(10**9)}", int(10 ** chance.uniform(0, most))
    return f"yes {word} | head -c {size}", (f"{word}\n".encode() * (size // len(word) + 1))[:size]


def _write(tree: Tree, chance: random.Random) -> str:
    path, (command, content) = _new(tree, chance), _bytes(chance)
    drop = ""
    if (known := tree.get(path)) is None or known.kind != "f":
        drop, known = _drop(tree, path) + "; ", Entry("f", "644", "root")
    tree[path] = replace(known, content=content)
    return f"{drop}{command} | sudo tee {shlex.quote(path)} >/dev/null"


def _append(tree: Tree, chance: random.Random) -> str:
    if not (path := _pick(tree, chance, "f")):
        return _write(tree, chance)
    command, content = _bytes(chance)
    tree[path] = replace(tree[path], content=tree[path].content + content)
    return f"{command} | sudo tee -a {shlex.quote(path)} >/dev/null"


def _patch(tree: Tree, chance: random.Random) -> str:
    """Write over a part, or past the end."""
    if not (path := _pick(tree, chance, "f")):
        return _write(tree, chance)
    command, content = _bytes(chance, 4)
    old = tree[path].content
    at = chance.randrange(len(old) + 5000)
    tree[path] = replace(tree[path], content=old[:at].ljust(at, b"\0") + content + old[at + len(content) :])
    return f"{command} | sudo dd of={shlex.quote(path)} seek={at} oflag=seek_bytes conv=notrunc status=none"


def _stretch(tree: Tree, chance: random.Random) -> str:
    if not (path := _pick(tree, chance, "f")):
        return _write(tree, chance)
    size = chance.randrange(200_000)
    tree[path] = replace(tree[path], content=tree[path].content[:size].ljust(size, b"\0"))
    return f"sudo truncate -s {size} {shlex.quote(path)}"


def _copy(tree: Tree, chance: random.Random) -> str:
    if not (path := _pick(tree, chance, "f")):
        return _write(tree, chance)
    entry, target = tree[path], _new(tree, chance)
    if _below(path, target):
        return _append(tree, chance)
    drop = _drop(tree, target)
    tree[target] = entry
    return f"{drop}; sudo cp -aT {shlex.quote(path)} {shlex.quote(target)}"


def _move(tree: Tree, chance: random.Random) -> str:
    """Files, links and whole folders, also those of the image."""
    if not (path := _pick(tree, chance, "fdl")):
        return _write(tree, chance)
    target = _new(tree, chance, path)
    if _below(path, target):
        return _append(tree, chance)
    drop = _drop(tree, target)
    for each in [each for each in tree if _below(each, path)]:
        tree[target + each[len(path) :]] = tree.pop(each)
    return f"{drop}; sudo mv -T {shlex.quote(path)} {shlex.quote(target)}"


def _link(tree: Tree, chance: random.Random) -> str:
    path, target = _new(tree, chance), chance.choice(["/etc", "gone", "../a", "/tmp/model/b"])
    drop = _drop(tree, path)
    tree[path] = Entry("l", "777", "root", target.encode())
    return f"{drop}; sudo ln -s {target} {shlex.quote(path)}"


def _folder(tree: Tree, chance: random.Random) -> str:
    """A new and empty one, also in the place of one of the image."""
    path = _new(tree, chance)
    drop = _drop(tree, path)
    tree[path] = Entry("d", "755", "root")
    return f"{drop}; sudo mkdir {shlex.quote(path)}"


def _owner(tree: Tree, chance: random.Random) -> str:
    if not (path := _pick(tree, chance, "fd")):
        return _write(tree, chance)
    owner = chance.choice(["user", "root", "nobody"])
    tree[path] = replace(tree[path], owner=owner)
    return f"sudo chown {owner} {shlex.quote(path)}"


def _mode(tree: Tree, chance: random.Random) -> str:
    if not (path := _pick(tree, chance, "fd")):
        return _write(tree, chance)
    mode = chance.choice(["600", "755", "700", "444"])
    tree[path] = replace(tree[path], mode=mode)
    return f"sudo chmod {mode} {shlex.quote(path)}"


def _delete(tree: Tree, chance: random.Random) -> str:
    return _drop(tree, path) if (path := _pick(tree, chance, "fdl")) else "true"

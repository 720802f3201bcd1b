"""Why a path cannot be used, in words and with what helps: for files and folders that a person names."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Literal

from devboxd.errors import SetupError

Wanted = Literal["file", "folder"]
AS_ROOT = "run this as root, with sudo"
_SHOWN = 120
_WORDS = {
    errno.ENOENT: ("there is no such file or folder", "check the path"),
    errno.ENOTDIR: ("a part of its path is a file, not a folder", "check the path"),
    errno.EISDIR: ("it is a folder", "name a file"),
    errno.EEXIST: ("something else has this name", "name a path where nothing is"),
    errno.ENAMETOOLONG: ("a name in it, or the whole, is longer than Linux allows", "name a shorter one"),
    errno.ELOOP: ("its symbolic links lead in a circle", "mend them, or name another path"),
    errno.EROFS: ("its file system can only be read", "name another path, or mount it for writing"),
    errno.ENOSPC: ("its disk is full", "free some space, or name another path"),
    errno.EDQUOT: ("its user's quota of the disk is used up", "free some space, or name another path"),
    errno.EIO: ("its disk fails", "look at the kernel's log (dmesg)"),
    errno.EMFILE: ("too many files are open", "raise the limit (ulimit -n)"),
}
_NEVER = (errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)
"""Errors of a path at which nothing can be, nor be made."""


def reason(error: Exception) -> str:
    """Why, in words and without the number of Linux; of errors that are none of the system's their own words."""
    if isinstance(error, UnicodeError):
        return "it is no text in UTF-8"
    if not isinstance(error, OSError) or error.errno is None:
        return str(error)
    return _explain(error)[0]


def explained(error: Exception) -> str:
    """The same, and what helps where that is known: the end of a sentence that begins with what cannot be done."""
    if isinstance(error, UnicodeError):
        return f"{reason(error)}; name a text file"
    if not isinstance(error, OSError) or error.errno is None:
        return reason(error)
    return "; ".join(filter(None, _explain(error)))


def not_made(folder: Path, error: OSError) -> str:
    """Why a folder cannot be made: only on a file system like /proc can its parent be missing then."""
    return f"no folder can be made in {shown(folder.parent)}" if error.errno == errno.ENOENT else reason(error)


def shown(path: Path | str) -> str:
    """A path for a message, in its length."""
    text = str(path)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def check(path: Path, wanted: Wanted, source: str) -> None:
    """Raises SetupError for what is not of the wanted kind, or where nothing can ever be.

    A path at which nothing is yet is right, and one that this user may not look at is left to what opens it.
    `source` says which option, variable or setting it comes from.
    """
    try:
        is_folder = stat.S_ISDIR(os.stat(path).st_mode)
    except FileNotFoundError:
        why = "it is a symbolic link to nothing; mend it, or name another path" if path.is_symlink() else ""
    except OSError as error:
        why = explained(error) if error.errno in _NEVER else ""
    except ValueError:
        why = "a path holds no NUL character; correct it"
    else:
        words = {"file": "it is a folder; name a file", "folder": "it is a file; name a folder"}
        why = "" if is_folder == (wanted == "folder") else words[wanted]
    if why:
        raise SetupError(f"cannot use {shown(path)!r} of {source}: {why}")


def _explain(error: OSError) -> tuple[str, str]:
    if error.strerror and error.strerror != os.strerror(error.errno or 0):
        return error.strerror, ""  # words of our own
    if error.errno in (errno.EACCES, errno.EPERM):
        if os.geteuid() == 0:
            return "it is not allowed, even to root", "name another path"
        return "permission denied", f"{AS_ROOT}, or as the owner"
    return _WORDS.get(error.errno or 0, ((error.strerror or str(error)).lower(), ""))

"""How much one server may do at once, as far as that follows from its open files."""

from __future__ import annotations

import contextlib
import resource

_FILES_A_COMMAND = 4
_FILES_A_STREAM = 4
"""Its connection and its journal or file, and as much again for what comes and goes."""
_FILES_FOR_OTHERS = 1000


def open_files() -> int:
    """How many files this process may have open; raises the own limit as far as is allowed."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(OSError, ValueError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        soft = hard
    return soft


def commands_within(files: int) -> int:
    """How many commands fit into this number of open files; a running one needs few of them at a time."""
    return max(16, (files - _FILES_FOR_OTHERS) // _FILES_A_COMMAND)


def streams_within(files: int) -> int:
    """How many streams and file transfers fit into this number of open files beside the commands."""
    return max(16, (files - _FILES_FOR_OTHERS) // _FILES_A_STREAM)

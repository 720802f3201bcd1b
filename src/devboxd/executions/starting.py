"""Starts in a box that has lost its home, its /etc/passwd or its bash: what is known from the create is used instead.

As sshd and login do, a command begins in `/` then, with the ids and the home that it would have, or in `/bin/sh`. The
first one that finds it so says it on its stderr.
"""

from __future__ import annotations

import errno
import shlex
from collections.abc import Awaitable, Callable
from functools import partial

import msgspec

from devboxd.agent.client import AgentError
from devboxd.agent.protocol import Stage, encode_record
from devboxd.executions.box import Box, patient
from devboxd.executions.shells import READ_SCRIPT, READ_SCRIPT_BY_SH

_NO_PROGRAM = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EACCES, errno.ENOEXEC, errno.ELOOP, errno.EISDIR})

_OPEN_ROOT = "make a snapshot, create a devbox from it with the user root (user_parameters), and `chmod 755 /` there"


class _Start(msgspec.Struct, frozen=True):
    program: str
    read: str
    user: str
    environment: dict[str, str]
    directory: str = ""
    words: tuple[str, ...] = ()

    def record(self, script: bytes, shell: bool, news: tuple[str, ...]) -> bytes:
        said = "\n".join(f"devboxd: {words}" for words in news)
        if not said:
            read = self.read
        elif shell:
            read = f"__devboxd_w={shlex.quote(said)}; {self.read}"  # its stderr is nobody's: the first command says it
        else:
            read = f"printf '%s\\n' {shlex.quote(said)} >&2; {self.read}"
        return encode_record([self.program, "-lc", read], self.environment, self.directory, self.user, script)


async def begin(
    box: Box,
    read: str,
    script: bytes,
    tell: Callable[[bytes], Awaitable[object]],
    root: bool,
    said: tuple[str, ...] = (),
) -> None:
    """Start a bash that reads `script` by `read`, as root or as the box's user: give its record to `tell`.

    Its first command says on its stderr what is `said`, one line each. Raises what `tell` raises when nothing known
    helps.
    """
    start = _Start("bash", read, "root" if root else box.user, dict(box.environment))
    shell = read is not READ_SCRIPT
    while True:
        news = tuple(words for words in start.words if words not in box.told)
        try:
            await patient(partial(tell, start.record(script, shell, (*said, *news))))
        except AgentError as error:
            other = _instead(box, start, error, shell)
            if other is None:
                raise
            start = other
        else:
            if not root:
                box.told = start.words
            return


def _instead(box: Box, start: _Start, error: AgentError, shell: bool) -> _Start | None:
    """How to start after this refusal; None when nothing is known that could help."""
    words = ""
    changes: dict[str, object] = {}
    if error.stage is Stage.USER and error.errno == errno.ENOENT and ":" not in start.user:
        home, name = box.home_of(start.user), start.user
        words = f"cannot find the user {name} in /etc/passwd; going on as uid {box.ids_of(name).partition(':')[0]}"
        known = {"HOME": home, "USER": name, "LOGNAME": name}
        changes = {"user": box.ids_of(name), "directory": home, "environment": {**known, **start.environment}}
    elif error.stage is Stage.DIRECTORY and start.directory != "/":
        words = f"cannot enter the home directory: {error.name}; going on in /"
        changes = {"directory": "/"}
    elif error.stage is Stage.DIRECTORY:
        raise AgentError(Stage.DIRECTORY, error.errno, f"{error.name} for /; {_OPEN_ROOT}") from error
    elif error.stage is Stage.EXEC and error.errno in _NO_PROGRAM and start.program == "bash":
        return msgspec.structs.replace(start, program="/bin/bash")
    elif error.stage is Stage.EXEC and error.errno in _NO_PROGRAM and shell:
        raise AgentError(Stage.EXEC, error.errno, f"named shells need bash: {error.name}") from error
    elif error.stage is Stage.EXEC and error.errno in _NO_PROGRAM and start.program == "/bin/bash":
        words = f"cannot execute bash: {error.name}; going on with /bin/sh"
        changes = {"program": "/bin/sh", "read": READ_SCRIPT_BY_SH}
    else:
        return None
    return msgspec.structs.replace(start, words=(*start.words, words), **changes)

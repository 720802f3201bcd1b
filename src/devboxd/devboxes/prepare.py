"""What is done in a box before it is `running` (its user, its files, its launch commands) and before it sleeps.

All may be done twice: after a crash of the server in between.
"""

from __future__ import annotations

import asyncio
import shlex
from http import HTTPStatus

import structlog

from devboxd.access.files import Files
from devboxd.agent.client import AgentError
from devboxd.devboxes.store import Devbox
from devboxd.devboxes.views import DEFAULT_HOOKS_MS, UserParameters
from devboxd.errors import ApiError, comes_later
from devboxd.executions.box import Box
from devboxd.executions.looking import Looking
from devboxd.executions.output import DEFAULT_LINES
from devboxd.executions.running import SETUP, Executions

_log = structlog.get_logger()
DEFAULT_USER = ("user", 1000)
_REASON_LINES = 20
_KILLED = 128 + 9

_MAKE_USER = r"""
set -e
name={name} uid={uid}
old=$(getent passwd "$uid" | cut -d: -f1 || true)
if getent passwd "$name" >/dev/null; then
  [ "$(id -u "$name")" = "$uid" ] || usermod -o -u "$uid" "$name"
elif [ -n "$old" ] && [ "$uid" -ge 1000 ]; then
  usermod -l "$name" -d "/home/$name" -m "$old"
  ! getent group "$old" >/dev/null || groupmod -n "$name" "$old"
else
  useradd -m -o -u "$uid" -s /bin/bash "$name"
fi
if [ -d /etc/sudoers.d ]; then
  printf '%s ALL=(ALL:ALL) NOPASSWD:ALL\n' "$name" >/etc/sudoers.d/devboxd-user
  chmod 0440 /etc/sudoers.d/devboxd-user
fi
"""


class PreparationError(Exception):
    """A step before `running` failed; the text says which, with the end of its output. `killed`: by SIGKILL."""

    def __init__(self, text: str, killed: bool = False) -> None:
        super().__init__(text)
        self.killed = killed


def user_of(devbox: Devbox) -> str:
    """The name of the user as whom commands run."""
    user = devbox.launch_parameters.user_parameters
    return user.username if user else DEFAULT_USER[0]


def uid_of(devbox: Devbox) -> int:
    """The id of that user."""
    user = devbox.launch_parameters.user_parameters
    return user.uid if user else DEFAULT_USER[1]


def nothing_to_prepare(devbox: Devbox) -> bool:
    """Whether `prepare` has no step to do."""
    first_time = not devbox.prepared and bool(devbox.file_mounts or _own_user(devbox))
    return not devbox.launch_parameters.launch_commands and not first_time


def _own_user(devbox: Devbox) -> UserParameters | None:
    """The user that must be made, None where the image has it."""
    user = devbox.launch_parameters.user_parameters
    if user is None or user.uid == 0 or (user.username, user.uid) == DEFAULT_USER:
        return None
    return user


async def prepare(devbox: Devbox, box: Box, executions: Executions, looking: Looking, files: Files) -> None:
    """Do all steps in their order. Raises PreparationError at the first that fails, 503 where that is to be done again.

    A devbox that is resumed has its user and files already, and perhaps changed them since.
    """
    new = not devbox.prepared
    if new and (user := _own_user(devbox)) is not None:
        script = _MAKE_USER.format(name=shlex.quote(user.username), uid=user.uid)
        handle = handle_of(devbox, "user")
        await _run(executions, looking, box, script, handle, SETUP, "making the user of user_parameters")
    for path, content in devbox.file_mounts.items() if new else ():
        try:
            await _mount(files, box, path, content.encode())
        except (ApiError, AgentError, OSError) as error:
            if comes_later(error):
                raise
            raise PreparationError(f"the file mount {path} failed: {error}") from error
    commands = devbox.launch_parameters.launch_commands or []
    for number, command in enumerate(commands, 1):
        what = f"launch command {number} of {len(commands)} ({command[:200]})"
        await _run(executions, looking, box, command, handle_of(devbox, f"launch.{number}"), "launch", what)


async def suspend_hooks(devbox: Devbox, box: Box, executions: Executions, looking: Looking) -> None:
    """Run the suspend commands one after the other, until their deadline. What fails is logged, and no more."""
    lifecycle = devbox.launch_parameters.lifecycle
    hooks = lifecycle.lifecycle_hooks if lifecycle else None
    if hooks is None or not hooks.suspend_commands:
        return
    try:
        async with asyncio.timeout((hooks.suspend_deadline_ms or DEFAULT_HOOKS_MS) / 1000):
            for number, command in enumerate(hooks.suspend_commands, 1):
                handle = handle_of(devbox, f"suspend.{number}")
                row = await executions.start(box.id, command, handle=handle, purpose="suspend")
                row = await looking.completed(row)
                if row.exit_status != 0:
                    _log.warning("a suspend command failed", id=devbox.id, number=number, status=row.exit_status)
    except TimeoutError:
        _log.warning("the suspend commands take too long; suspending without them", id=devbox.id)
    except (ApiError, AgentError, OSError) as error:
        _log.warning("the suspend commands cannot run; suspending without them", id=devbox.id, error=str(error))


def handle_of(devbox: Devbox, name: str) -> str:
    """The handle of a command of devboxd's own: another one each time that the devbox is started."""
    return f"devboxd.{devbox.boots}.{name}" if devbox.boots else f"devboxd.{name}"


async def _mount(files: Files, box: Box, path: str, content: bytes) -> None:
    """Write a file as the box's user, or as root where only root may."""
    try:
        await files.put(box, path, (content,))
    except ApiError as error:
        if error.code != HTTPStatus.FORBIDDEN:
            raise
        await files.put(box, path, (content,), user="root")


async def _run(
    executions: Executions, looking: Looking, box: Box, command: str, handle: str, purpose: str, what: str
) -> None:
    row = await executions.start(box.id, command, handle=handle, purpose=purpose)
    row = await looking.completed(row)
    if row.exit_status != 0:
        view = looking.view(row, min(_REASON_LINES, DEFAULT_LINES))
        said = f"{view.stdout or ''}{view.stderr or ''}".strip()[-4000:]
        raise PreparationError(f"{what} exited with {row.exit_status}: {said}", row.exit_status == _KILLED)

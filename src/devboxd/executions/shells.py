"""Named shells: a living bash for each (devbox, name), its queue, and the script that it runs."""

from __future__ import annotations

import asyncio
import hashlib
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from devboxd.executions.box import Running

SHELLS_MAX = 32
"""Most named shells that live in one devbox; the agent has room for 64 shells and terminals together."""

DRIVER = r"""
shopt -s expand_aliases
set -m
__devboxd=/run/devboxd/s/$1
__devboxd_n=0
for __devboxd_f in "$__devboxd"/[01]; do
  if [[ -f $__devboxd_f ]]; then
    __devboxd_r=
    IFS= read -r -d '' __devboxd_r <"$__devboxd_f" || :
    if [[ $__devboxd_r == *$'\n#end\n' && ${__devboxd_r%%$'\n'*} =~ ^#\ ([0-9]+)$ ]] \
        && (( BASH_REMATCH[1] > __devboxd_n )); then
      __devboxd_n=${BASH_REMATCH[1]}
    fi
  fi
done
if (( __devboxd_n > 0 )); then
  for __devboxd_f in $(compgen -e); do unset "$__devboxd_f" 2>/dev/null; done
  . "$__devboxd/$(( __devboxd_n % 2 ))"
fi
unset __devboxd_f __devboxd_r
shift $#
while \builtin :; do
  if ! IFS= \builtin read -r -u 20 __devboxd_k; then \builtin exit 0; fi
  __devboxd_d=/run/devboxd/x/$__devboxd_k
  __devboxd_c=
  IFS= \builtin read -r -d '' __devboxd_c <"$__devboxd_d/c" || \builtin :
  if [[ -p $__devboxd_d/0 ]]; then
    \command exec 22<"$__devboxd_d/0" 23>"$__devboxd_d/1" 24>"$__devboxd_d/2"
  else
    \command exec 22</dev/null 23>"$__devboxd_d/1" 24>"$__devboxd_d/2"
  fi
  \builtin printf 'S %s\n' "$__devboxd_k" >&21
  __devboxd_e=0
  for __devboxd_i in 1; do
    \builtin eval "$__devboxd_c" <&22 >&23 2>&24 20<&- 21>&- 22<&- 23>&- 24>&-
    __devboxd_e=$?
  done
  \command exec 22<&- 23>&- 24>&-
  __devboxd_n=$(( __devboxd_n + 1 ))
  {
    \builtin printf '# %s\ncd -- %q\n' "$__devboxd_n" "$PWD"
    \builtin export -p
    \builtin declare -f
    \builtin declare -Fx
    \builtin alias -p
    \builtin shopt -p
    \builtin set +o
    \builtin printf '\n#end\n'
  } >"$__devboxd/$(( __devboxd_n % 2 ))" 2>/dev/null
  \builtin printf 'E %s %d\n' "$__devboxd_k" "$__devboxd_e" >&21
done
"""
"""What the bash of a named shell runs. It reads keys of commands at descriptor 20 and answers at 21.

The command runs by `eval` in the shell itself, so that directory, variables, functions, aliases and options stay. Job
control is on: each pipeline has a process group of its own, and background jobs outlive a kill of a later command. The
`for` of one round catches a stray `break`. After each command the state is written to one of two files in turn, whole
only with its last line, so that a death in between leaves the other one.
"""


def shell_key(name: str) -> str:
    """The key of a shell for the agent: the same for the same name, whatever characters it has."""
    return "sh-" + hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:32]


READ_SCRIPT = 'IFS= read -r -d "" -u 9 REPLY; exec 9<&-; eval "$REPLY"'
"""Runs the script at descriptor 9: one of any size, and one that need not be read in every list of processes."""


def shell_record(key: str) -> tuple[list[str], bytes]:
    """The arguments and the script with which a shell's bash starts; it begins with the last record of its state."""
    return ["bash", "-lc", READ_SCRIPT, "bash", key], DRIVER.encode()


class Shell:
    """The queue of a named shell. Its first command runs; the others wait in the order of their commits."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.key = shell_key(name)
        self.order = asyncio.Lock()
        """Held from the choice of a status to its commit, so that the queue has the order of the commits."""
        self.queue: deque[Running] = deque()
        self.worker: asyncio.Task[None] | None = None

    @property
    def busy(self) -> bool:
        """Whether a new command has to wait."""
        return bool(self.queue)

    def drop(self, running: Running) -> bool:
        """Take a waiting command out of the queue; whether it was waiting."""
        if running in self.queue and self.queue[0] is not running:
            self.queue.remove(running)
            return True
        return False

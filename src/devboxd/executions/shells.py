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
{
shopt -s expand_aliases
set -m
__devboxd=/run/devboxd/s/$1 __devboxd_n=0 __devboxd_k=
for __devboxd_f in '' "$__devboxd"/[01]; do
  __devboxd_c=${__devboxd_r-}
  if [[ -f $__devboxd_f ]]; then IFS= read -r -d '' __devboxd_c <"$__devboxd_f" || :; fi
  if [[ $__devboxd_c == *$'\n#end\n' && ${__devboxd_c%%$'\n'*} =~ ^#\ ([0-9]+)$ ]] \
      && (( BASH_REMATCH[1] > __devboxd_n )); then
    __devboxd_n=${BASH_REMATCH[1]} __devboxd_r=$__devboxd_c
  fi
done
shift $#
if (( __devboxd_n > 0 )); then
  for __devboxd_f in $(compgen -e); do unset "$__devboxd_f" 2>/dev/null; done
  eval "$__devboxd_r" || :
fi
unset __devboxd_r
until
  {
    __devboxd_e=$? __devboxd_o=$-
    \unset -f builtin command
    \builtin set +ax
    \builtin export -n __devboxd_e __devboxd_o
  } >/dev/null 2>&1
  \command exec </dev/null >/dev/null 2>&1
  __devboxd_o=${__devboxd_o//[^ax]/}
  if [[ $__devboxd_k ]]; then
    __devboxd_n=$(( __devboxd_n + 1 )) __devboxd_f=u __devboxd_i=u
    if [[ :$BASHOPTS: == *:extglob:* ]]; then __devboxd_f=s; fi
    if [[ :$BASHOPTS: == *:expand_aliases:* ]]; then __devboxd_i=s; fi
    {
      if [[ $__devboxd_o ]]; then \builtin set "-$__devboxd_o"; fi
      \builtin printf '# %s\ncd -- %q\nunalias -a\n' "$__devboxd_n" "${PWD-}"
      \builtin export -p
      \builtin shopt -p
      \builtin set +o
      \builtin printf 'shopt -u expand_aliases; shopt -s extglob\n'
      \builtin alias -p
      \builtin declare -f
      \builtin declare -Fx
      \builtin printf '\\builtin shopt -%s extglob\n' "$__devboxd_f"
      \builtin printf '\\builtin shopt -%s expand_aliases\n#end\n' "$__devboxd_i"
    } >|"$__devboxd/$(( __devboxd_n % 2 ))"
    \builtin set +ax
    __devboxd_f=$__devboxd_k __devboxd_k= __devboxd_c= __devboxd_i=
    \builtin printf 'E %s %d\n' "$__devboxd_f" "$__devboxd_e" >&21
  fi
  IFS= \builtin read -r -t 99999999 -u 20 __devboxd_k
  if [[ $__devboxd_k ]]; then
    __devboxd_f=/run/devboxd/x/$__devboxd_k __devboxd_c= __devboxd_i=/dev/null
    IFS= \builtin read -r -d '' __devboxd_c <"$__devboxd_f/c"
    if [[ $__devboxd_o ]]; then __devboxd_c="\\builtin set -$__devboxd_o"$'\n'$__devboxd_c; fi
    if [[ -p $__devboxd_f/0 ]]; then __devboxd_i=$__devboxd_f/0; fi
    \command exec <"$__devboxd_i" >"$__devboxd_f/1" 2>"$__devboxd_f/2"
    \builtin printf 'S %s\n' "$__devboxd_k" >&21
  fi
  [[ ! $__devboxd_k ]]
do
  for __devboxd_i in 1; do
    \builtin eval "$__devboxd_c" 20<&- 21>&-
  done
done
}
"""
"""What the bash of a named shell runs. It reads keys of commands at descriptor 20 and answers at 21.

The command runs by `eval` in the shell itself, so that directory, variables, functions, aliases and options stay. Job
control is on: each pipeline has a process group of its own, and background jobs outlive a kill of a later command.

A command may do anything to this shell; at worst the shell ends with it, and the next begins from the record:

- All else is the condition of the loop. So the end of a command is told even when it jumps there by `continue 2`;
  `set -e` does not hold; and after `set -n`, when nothing is executed any more, an `until` ends where a `while` would
  spin. The `for` of one round catches a stray `break`.
- The variables are assigned before the end is told, which one that is `readonly` now prevents.
- It is one compound command, read before the record's aliases are there. No function but `unset`, `builtin` and
  `command` can stand in the way of `\\builtin`; those named `builtin` and `command` last only for their command. If all
  else fails no key is read, and the shell ends.
- `set -a` and `set -x` are off meanwhile: these variables are exported to no command, and nothing of this is traced.
- The shell's own descriptors 0, 1 and 2 are the command's, so that a trap on EXIT can write.

After each command the state is written to one of two files in turn, whole only with its last line, so that a death in
between leaves the other one. There, options come before functions and aliases, which could change what the words mean;
functions are read with extglob, without which some cannot be, and without aliases. `||` keeps `set -e` away.
"""


def shell_key(name: str) -> str:
    """The key of a shell for the agent: the same for the same name, whatever characters it has."""
    return "sh-" + hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:32]


READ_SCRIPT = (
    'IFS= builtin read -r -d "" -u 9 BASH_EXECUTION_STRING || :; command exec 9<&-; '
    'builtin eval -- "$BASH_EXECUTION_STRING"'
)
"""Runs the script at descriptor 9: one of any size, which no list of processes shows, neither here nor on the host."""


def shell_record(key: str, kept: bytes = b"") -> tuple[list[str], bytes]:
    """The arguments and the script with which a shell's bash starts.

    It begins with the last record of its state, or with the one that was `kept` from before its box was suspended.
    """
    quoted = b"'" + kept.replace(b"'", rb"'\''") + b"'"
    return ["bash", "-lc", READ_SCRIPT, "bash", key], b"__devboxd_r=" + quoted + DRIVER.encode()


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

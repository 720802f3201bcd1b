"""Named shells: a living bash for each (devbox, name), its queue, and the script that it runs."""

from __future__ import annotations

import asyncio
import hashlib
import shlex
from collections import deque
from collections.abc import Iterator

from devboxd.executions.live import LiveExecution

SHELLS_MAX = 32
"""Most named shells that live in one devbox; the agent has room for 64 shells and terminals together."""

_DRIVER = r"""
{
  if {
    \builtin [ -p /dev/fd/20 ] && \builtin [ -p /dev/fd/21 ] || \builtin exit 126;
    \builtin set -m;
    \builtin shopt -s expand_aliases execfail;
    __devboxd=/run/devboxd/s/KEY __devboxd_n=0 __devboxd_k= __devboxd_v=;
    for __devboxd_f in '' "$__devboxd/0" "$__devboxd/1"; do
      __devboxd_c=${__devboxd_r[1]-};
      if [[ -f $__devboxd_f ]]; then
        \builtin mapfile -d '' __devboxd_c <"$__devboxd_f";
      fi;
      if [[ $__devboxd_c == *$'\n#end\n' && ${__devboxd_c%%$'\n'*} =~ ^#\ ([0-9]+)$ ]]
          && (( BASH_REMATCH[1] > __devboxd_n )); then
        __devboxd_n=${BASH_REMATCH[1]} __devboxd_r[0]=$__devboxd_c;
      fi;
    done;
    if (( __devboxd_n > 0 )); then
      \builtin mapfile -t __devboxd_p < <(\builtin compgen -e);
      for __devboxd_f in "${__devboxd_p[@]}"; do \builtin unset -v "$__devboxd_f"; done;
      \builtin mapfile -t __devboxd_p < <(\builtin compgen -A function);
      for __devboxd_f in "${__devboxd_p[@]}"; do \builtin unset -f "$__devboxd_f"; done;
      \builtin unalias -a;
      \builtin eval "${__devboxd_r[0]}";
    fi;
    \builtin unset __devboxd_r;
    __devboxd_d=$(\builtin trap -p ERR DEBUG);
    __devboxd_d=${__devboxd_d#"${__devboxd_d%%trap -- *}"};
    __devboxd_a=u __devboxd_c= __devboxd_t=;
    if [[ :$BASHOPTS: == *:expand_aliases:* ]]; then __devboxd_a=s; fi;
    \builtin shopt -u expand_aliases;
    __devboxd_g=TURN;
    \builtin printf -v __devboxd_h
        '%.0s\\builtin eval -- "$__devboxd_g";case $? in 0);; *) \\builtin exit;; esac;' INNER;
    \builtin printf -v __devboxd_l '%.0s\\builtin eval -- "$__devboxd_h";' INNER;
  }; then \builtin :; fi;
  \builtin :;
  OUTER
  case ${__devboxd_k-} in ?*) \builtin eval -- "$__devboxd_c" 20<&- 21>&-;; esac;
}
"""

_TURN = r"""
  \builtin shopt "-$__devboxd_a" expand_aliases;
  \builtin : '';
  case $__devboxd_t in
    -1) __devboxd_q '' && \builtin : ;;
    ARMS
  esac;
  \builtin eval -- "$__devboxd_c" 20<&- 21>&-;
  if
    {
      __devboxd_s=$? __devboxd_o=$- __devboxd_a=u;
      \unset -f builtin command;
      \builtin set +avx;
      if [[ :$BASHOPTS: == *:expand_aliases:* ]]; then __devboxd_a=s; fi;
      \builtin shopt -u expand_aliases;
      if [[ $__devboxd_k ]]; then
        \builtin trap -p ERR DEBUG >|"$__devboxd/d";
        \builtin mapfile -d '' __devboxd_d <"$__devboxd/d";
        __devboxd_d=${__devboxd_d-} __devboxd_d=${__devboxd_d%$'\n'};
      fi;
      \builtin trap - DEBUG;
      \builtin export -n "${!__devboxd@}";
    } >/dev/null 2>&1;
    \command exec </dev/null >/dev/null 2>&1;
    __devboxd_o=${__devboxd_o//[^avx]/};
    if [[ $__devboxd_v ]]; then __devboxd_s=$__devboxd_e; else __devboxd_p=("$__devboxd_s"); fi;
    if [[ $__devboxd_k ]]; then
      __devboxd_n=$(( __devboxd_n + 1 )) __devboxd_f=u;
      if [[ :$BASHOPTS: == *:extglob:* ]]; then __devboxd_f=s; fi;
      {
        if [[ $__devboxd_o ]]; then \builtin set "-$__devboxd_o"; fi;
        \builtin printf '# %s\ncd -- %q\nunalias -a\n' "$__devboxd_n" "${PWD-}";
        \builtin umask -p;
        \builtin export -p;
        \builtin shopt -p;
        \builtin set +o;
        \builtin printf 'shopt -u expand_aliases; shopt -s extglob\n';
        \builtin alias -p;
        \builtin declare -f;
        \builtin declare -Fx;
        \builtin printf '\\builtin shopt -%s extglob\n' "$__devboxd_f";
        \builtin printf '\\builtin shopt -%s expand_aliases\n#end\n' "$__devboxd_a";
      } >|"$__devboxd/$(( __devboxd_n % 2 ))";
      \builtin set +avx;
      __devboxd_f=$__devboxd_k __devboxd_k= __devboxd_c= __devboxd_i= __devboxd_t= __devboxd_v= __devboxd_e=;
      \builtin printf 'E %s %d\n' "$__devboxd_f" "$__devboxd_s" >&21;
    fi;
    \builtin mapfile -t -n 1 -u 20 __devboxd_i;
    __devboxd_k=${__devboxd_i[0]-} __devboxd_v= __devboxd_e= __devboxd_t=;
    if [[ $__devboxd_k ]]; then
      __devboxd_f=/run/devboxd/x/$__devboxd_k;
      \builtin mapfile -d '' __devboxd_c <"$__devboxd_f/c" || \builtin exit 126;
      if (( ${#__devboxd_c} < 9999 )); then __devboxd_c=${__devboxd_c%$'\n'}; fi;
      if (( ${#__devboxd_c} < 9999 ))
          && [[ $__devboxd_c == *'|'* || $__devboxd_c == *ERR* || ${__devboxd_d-} == *ERR* ]]
          && [[ $__devboxd_c == *[[:alnum:]\"\'\]\}\)/._*=?:+,@%~-] && $__devboxd_c != *'<<'* ]]
          && [[ $__devboxd_c != *'()' ]]
          && [[ $__devboxd_o != *v* && ($__devboxd_c != *case* || $__devboxd_c == *esac) ]]
          && [[ $__devboxd_c == *done
              || " ${__devboxd_c##*$'\n'}" != *[![:alnum:]_]@(for|select|function|coproc)[[:space:]]* ]]; then
        __devboxd_c+=$'\n{ __devboxd_e=$? __devboxd_p=("${PIPESTATUS[@]}") __devboxd_v=1; } >/dev/null 2>&1';
      fi;
      if (( ${#__devboxd_p[@]} > 1 )) && [[ $__devboxd_s == "${__devboxd_p[-1]}" || -o pipefail ]]; then
        __devboxd_t=${#__devboxd_p[@]};
        \builtin printf -v __devboxd_e '|(\\builtin exit %d)' "${__devboxd_p[@]}";
        __devboxd_e="${__devboxd_e#'|'}";
      elif (( __devboxd_s )) && [[ -o functrace ]]; then
        __devboxd_t=5 __devboxd_e="(\\builtin exit $__devboxd_s)";
      elif (( __devboxd_s )); then
        __devboxd_t=1 __devboxd_e="__devboxd_q ''";
        __devboxd_q() { \builtin unset -f __devboxd_q; \builtin return "$__devboxd_s"; };
      fi;
      if (( __devboxd_s )); then __devboxd_t=-$__devboxd_t __devboxd_e+=' && :'; fi;
      if [[ $__devboxd_o || ${__devboxd_d-} ]]; then
        __devboxd_e="${__devboxd_d:+\\builtin $__devboxd_d;}${__devboxd_e:-\\builtin :}";
        __devboxd_e="${__devboxd_o:+\\builtin set -$__devboxd_o;}$__devboxd_e";
        __devboxd_t= __devboxd_c="{ $__devboxd_e; } >/dev/null 2>&1"$'\n'"$__devboxd_c";
      elif (( ${#__devboxd_t} && (__devboxd_t > 4 || __devboxd_t < -4) )); then
        __devboxd_c="{ $__devboxd_e; } >/dev/null 2>&1;$__devboxd_c";
      fi;
      __devboxd_i=/dev/null;
      if [[ -p $__devboxd_f/0 ]]; then __devboxd_i=$__devboxd_f/0; fi;
      \command exec <"$__devboxd_i" >"$__devboxd_f/1" 2>"$__devboxd_f/2" || \builtin exit 126;
      if [[ ${__devboxd_w-} ]]; then \builtin printf '%s\n' "$__devboxd_w" >&2; \builtin unset __devboxd_w; fi;
      \builtin printf 'S %s\n' "$__devboxd_k" >&21;
    fi;
    [[ ! $__devboxd_k ]];
  then \builtin exit; fi
"""


def _arms() -> Iterator[str]:
    """The arms that leave a PIPESTATUS: one that ends in 0 would be lost by `&& :`, one that does not would end a shell
    with `set -e` without it."""
    for count in range(2, 5):
        pipe = "|".join(rf'(\builtin exit "${{__devboxd_p[{i}]}}")' for i in range(count))
        yield rf"{count}) {{ {pipe}; }} >/dev/null 2>&1 ;; -{count}) {{ {pipe}; }} >/dev/null 2>&1 && \builtin : ;;"


def _line(text: str) -> str:
    return " ".join(line.strip() for line in text.splitlines()).strip()


_INNER, _OUTER = 200, 250
DRIVER = (
    _line(_DRIVER)
    .replace("TURN", shlex.quote(_line(_TURN.replace("ARMS", " ".join(_arms())))))
    .replace("INNER", " ".join(["1"] * _INNER))
    .replace("OUTER", r'\builtin eval -- "$__devboxd_l";' * _OUTER)
)
"""What the bash of a named shell runs: one line, so that errors name the lines of the command. It reads keys at
descriptor 20 and answers at 21.

The command runs by `eval` in the shell itself, so that directory, variables, functions, aliases and options stay.
Job control is on: each pipeline has a process group of its own, and background jobs outlive a kill of a later command.
`$?` and PIPESTATUS are at its begin what they were at the end of the one before: what sets them stands before its text;
what reads PIPESTATUS, which `eval` overwrites, stands behind a text with a pipe, when that looks complete.

A command, or a profile, may do anything to this shell; at worst the shell ends with it, and the next begins from the
record:

- No loop surrounds a command, for `break` and `continue` would leave it: texts that are evaluated many times, in three
  layers, take its place, for ten million commands. The last one ends the shell. After `set -n`, when nothing is
  executed any more, they end. A turn that fails outside of its command ends the shell.
- All that is not a command is the condition of an `if`, where `set -e` and a trap on ERR do not hold.
- The variables are assigned before the end is told, which one that is `readonly` now prevents.
- All of it is read while aliases are off. No function but `unset`, `builtin` and
  `command` can stand in the way of `\\builtin`; those named `builtin` and `command` last only for their command. If all
  else fails no key is read, and the shell ends.
- `mapfile` reads, and not `read`, for which IFS and TMOUT, which may be readonly, would count. No name is left to match
  by files, and BASH_REMATCH, REPLY and MAPFILE are the commands'.
- `set -a`, `-v` and `-x` and a trap on DEBUG are off meanwhile: these variables are exported to no command, and nothing
  of this is shown.
- The shell's own descriptors 0, 1 and 2 are the command's, so that a trap on EXIT can write.

After each command the state is written to one of two files in turn, whole only with its last line, so that a death in
between leaves the other one. There, options come before functions and aliases, which could change what the words mean;
functions are read with extglob, without which some cannot be, and without aliases.
"""


FAILED_BASH = 127
"""The exit status of a bash that ended by an error from which an interactive one goes on: `${x:?}`, `set -u; $x`."""
NOT_RUN = 126
"""The exit status of a bash that could not read the text of a command, or not open its output."""


def shell_key(name: str) -> str:
    """The key of a shell for the agent: the same for the same name, whatever characters it has."""
    return "sh-" + hashlib.sha256(name.encode("utf-8", "surrogatepass")).hexdigest()[:32]


_MARK = "__devboxd=;"
"""Begins each script, so that nothing is run that a profile opened in its place. /bin/sh runs it to no effect."""
_READ = (
    r"\unset -f builtin command; __devboxd_r=; "
    r'\builtin mapfile -d "" -u 250 __devboxd_r && __devboxd_r=${__devboxd_r-} '
    r'&& \builtin [ "$__devboxd_r" != "${__devboxd_r#"MARK"}" ] '
    r'|| \builtin mapfile -d "" -u 9 __devboxd_r || \builtin :; '
    r"\builtin [ -e /dev/fd/250 ] && \builtin [ ! /dev/fd/9 -ef /dev/fd/250 ] || \command exec 9<&-; "
    r"\command exec 250<&-; __devboxd_r=${__devboxd_r-}; "
    r'\builtin [ "$__devboxd_r" != "${__devboxd_r#"MARK"}" ] '
).replace("MARK", _MARK)
"""Takes the script from descriptor 250, or from 9, at which agents of before have it alone and profiles their locks;
a 9 that is not the script stays. No word here can be an alias."""
_TAKEN = (
    r'\builtin printf "devboxd: cannot run the command: a profile uses descriptor 9, by which it comes; '
    r'let the profile use another\n" >&2; \builtin exit 126'
)
READ_SCRIPT = (
    "{ "
    + _READ
    + r'&& BASH_EXECUTION_STRING=${__devboxd_r#"MARK"} || '.replace("MARK", _MARK)
    + f"BASH_EXECUTION_STRING='{_TAKEN}'; "
    + r'\builtin unset __devboxd_r; \builtin [ "$-" = "${-#*x}" ] '
    r'|| BASH_EXECUTION_STRING="{ \\builtin set -x; } 2>/dev/null;$BASH_EXECUTION_STRING"; \builtin set +x; } '
    r'>/dev/null 2>&1; \builtin eval -- "$BASH_EXECUTION_STRING"'
)
"""Runs the script of a command: one of any size, which no list of processes shows, neither here nor on the host.
`set -x` of a profile begins with the command."""
READ_SCRIPT_BY_SH = "if [ -e /dev/fd/250 ]; then . /dev/fd/250; else . /dev/fd/9; fi"

READ_DRIVER = (
    r"\unset -f builtin; \builtin shopt -u expand_aliases; "
    + _READ
    + r'|| \builtin exit 126; \builtin eval "${__devboxd_r#"MARK"}"'.replace("MARK", _MARK)
)
"""Runs the driver, behind which a record may stand."""


def command_script(command: bytes) -> bytes:
    """The script that READ_SCRIPT reads for a command."""
    return _MARK.encode() + command


def shell_script(key: str, kept: bytes = b"") -> bytes:
    """The script with which a shell's bash starts, read by READ_DRIVER.

    It begins with the last record of its state, or with the one that was `kept` from before its box was suspended.
    """
    return f"{_MARK}{DRIVER.replace('KEY', key)}".encode() + b"\0" + kept


class Shell:
    """The queue of a named shell. Its first command runs; the others wait in the order of their commits."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.key = shell_key(name)
        self.order = asyncio.Lock()
        """Held from the choice of a status to its commit, so that the queue has the order of the commits."""
        self.queue: deque[LiveExecution] = deque()
        self.worker: asyncio.Task[None] | None = None
        self.failed = False
        """An error of a command ended the bash; the next command says so."""

    @property
    def busy(self) -> bool:
        """Whether a new command has to wait."""
        return bool(self.queue)

    def drop(self, running: LiveExecution) -> bool:
        """Take a waiting command out of the queue; whether it was waiting."""
        if running in self.queue and self.queue[0] is not running:
            self.queue.remove(running)
            return True
        return False

"""An OCI runtime that is killed in the middle of its work: the real one behind a script that obeys a plan."""

from __future__ import annotations

import shutil
from pathlib import Path

_SCRIPT = """#!/bin/sh
case " $* " in *" run "*) plan=$(cat {plan}) ;; *) plan=whole ;; esac
case $plan in
    whole) exec {real} "$@" ;;
    before) ;;
    never) {real} "$@"; sleep 1000 ;;
    after) {real} "$@" ;;
    full) echo whole >{plan}
        for word; do
            [ "$last" != --log ] || echo "seccomp (SECCOMP_SET_MODE_FILTER): Unknown error 524" >>"$word"
            last=$word
        done
        exit 1 ;;
    *) {real} "$@" & sleep "$plan"; kill -9 $! ;;
esac
kill -9 $$
"""


class Runtime:
    """`path` is a setting; `plan` is what happens to the next boxes."""

    def __init__(self, real: str, folder: Path) -> None:
        self.path = folder / f"{real}-that-is-killed"
        self._plan = folder / "plan"
        self.path.write_text(_SCRIPT.format(real=shutil.which(real), plan=self._plan))
        self.path.chmod(0o755)
        self.plan("whole")

    def plan(self, moment: str | float) -> None:
        """`whole`: it does all its work; else it is killed `before` or `after` it, or so many seconds into it.

        `never`: it does its work, and does not end. `full`: once it finds no room for a filter in the kernel.
        """
        self._plan.write_text(str(moment))

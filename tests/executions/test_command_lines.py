"""What lists of processes show of commands, on the host and in the devbox, and that hiding it changes nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from support.api import Api

pytestmark = pytest.mark.box

MARK = "m4rk-0f-a-c0mmand"


def command_lines() -> str:
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            found.append(Path("/proc", pid, "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
        except OSError:  # it has just gone
            continue
    return "\n".join(found)


@pytest.mark.parametrize("shell", [None, "named"])
def test_no_list_of_processes_shows_a_command(api: Api, box: str, shell: str | None) -> None:
    command = f"until [ -e /tmp/seen-{shell} ]; do sleep 0.05; done # {MARK}"
    execution = api.start(box, command, **({"shell_name": shell} if shell else {}))
    assert MARK not in api.output(box, "cat /proc/[0-9]*/cmdline | tr '\\0' ' '; touch /tmp/looked")
    assert MARK not in command_lines()
    api.output(box, f"touch /tmp/seen-{shell}")
    assert api.wait(box, execution)["exit_status"] == 0


def test_a_pattern_does_not_find_the_command_that_looks_for_it(api: Api, box: str) -> None:
    """`pkill -f` must end what it is meant for, not the shell that calls it."""
    view = api.run(box, "pkill -f no-such-server-anywhere; echo went on")
    assert (view["exit_status"], view["stdout"]) == (0, "went on\n")


@pytest.mark.parametrize(
    ("command", "status", "output"),
    [
        ("#nothing", 0, ""),
        ("echo $0 $# $-; shopt login_shell | cut -f2", 0, "bash 0 hBc\non\n"),
        ('echo "$BASH_EXECUTION_STRING"', 0, 'echo "$BASH_EXECUTION_STRING"\n'),
        ("echo a\necho $LINENO", 0, "a\n2\n"),
        ("set -e; false; echo never", 1, ""),
        ("set -u; echo ${REPLY-none}", 0, "none\n"),
        ("kill -9 $$", 137, ""),
        ("sh -c 'kill -TERM $$'", 143, ""),
        ("trap 'echo bye; exit 7' EXIT; exit 3", 7, "bye\n"),
        ("cat <<END\ntext\nEND", 0, "text\n"),
        ("if", 2, ""),
        ("echo 'unfinished", 2, ""),
        ("[ ! -e /proc/$$/fd/9 ]; echo $?", 0, "0\n"),
        ("--version", 127, ""),
    ],
)
def test_a_command_means_what_it_means_to_bash(api: Api, box: str, command: str, status: int, output: str) -> None:
    view = api.run(box, command)
    assert (view["exit_status"], view["stdout"]) == (status, output), view


@pytest.mark.parametrize(
    "profile",
    [
        "set -e",
        "set -u; trap 'exit 9' ERR",
        "shopt -s failglob",
        "readonly IFS=x",
        "set -o posix",
        "mapfile() { exit 5; }",
    ],
)
@pytest.mark.parametrize("shell", [{}, {"shell_name": "s"}])
def test_commands_run_whatever_the_profile_sets(api: Api, profile: str, shell: dict[str, str]) -> None:
    box = api.create()
    api.write(box, ".profile", profile)
    assert api.run(box, "echo here; (exit 7); echo $?" if "9" not in profile else "echo here; echo 7", **shell)[
        "stdout"
    ] == ("here\n7\n" if "-e" not in profile else "here\n")
    api.shutdown(box)


@pytest.mark.parametrize("shell", [{}, {"shell_name": "large"}])
def test_a_command_of_a_megabyte(api: Api, box: str, shell: dict[str, str]) -> None:
    assert api.run(box, f"v={'x' * 1_000_000}; echo ${{#v}}", **shell)["stdout"] == "1000000\n"


def test_a_named_shell_knows_the_status_of_the_command_before(api: Api, box: str) -> None:
    said = [
        api.run(box, c, shell_name="status")["stdout"] for c in ("true", "echo $?", "(exit 7)", "echo $?", "--version")
    ]
    assert said == ["", "0\n", "", "7\n", ""]


@pytest.mark.parametrize(
    "profile", ["exec 9>/tmp/lock; flock 9", "exec 9</etc/passwd", "exec 9<&-", "set -eu; exec 9</dev/null"]
)
@pytest.mark.parametrize("shell", [None, "taken"])
def test_a_profile_keeps_the_descriptor_that_it_took(api: Api, box: str, profile: str, shell: str | None) -> None:
    api.write(box, "/home/user/.profile", profile + "\n")
    try:
        look = "readlink /proc/$$/fd/9; ls /proc/$$/fd | grep -c 250; (exit 3)"
        view = api.run(box, look, **({} if shell is None else {"shell_name": shell + profile}))
    finally:
        api.write(box, "/home/user/.profile", "")
    taken = {">": "/tmp/lock\n", "</e": "/etc/passwd\n", "</d": "/dev/null\n"}
    assert view["stdout"] == next((path for mark, path in taken.items() if mark in profile), "") + "0\n", view


@pytest.mark.parametrize("profile", ["exec 20</dev/null", "exec 20<&-", "exec 21>&-", "exec 21>/dev/null"])
def test_a_profile_that_takes_the_descriptors_of_a_named_shell_ends_its_commands(
    api: Api, box: str, profile: str
) -> None:
    """None waits for ever."""
    api.write(box, "/home/user/.profile", profile + "\n")
    try:
        for _ in range(3):
            view = api.run(box, "touch /tmp/done", shell_name=profile)
            assert view["exit_status"] == 126
            assert "file exists" not in view["stderr"]
    finally:
        api.write(box, "/home/user/.profile", "")
    assert api.run(box, "test -e /tmp/done")["exit_status"] == 1
    assert api.run(box, "echo on", shell_name=profile)["stdout"] == "on\n"


def test_a_trace_that_a_profile_begins_shows_the_command_alone(api: Api, box: str) -> None:
    api.write(box, "/home/user/.profile", "set -x\n")
    try:
        view = api.run(box, "echo here")
    finally:
        api.write(box, "/home/user/.profile", "")
    assert (view["stdout"], view["stderr"]) == ("here\n", "++ echo here\n")

"""The script of a named shell, run by a real bash outside of any box: what stays and what ends, without noise."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from devboxd.executions import shells
from devboxd.executions.shells import READ_DRIVER, READ_SCRIPT, command_script, shell_script


class Driver:
    """Plays the agent's part for one bash."""

    def __init__(self, root: Path, home: Path) -> None:
        self.root = root
        self.home = home
        self.number = 0
        self.start()

    def start(self) -> None:
        (self.root / "s" / "k").mkdir(parents=True, exist_ok=True)
        (self.root / "x").mkdir(exist_ok=True)
        commands, self.commands = os.pipe()
        self.control, control = os.pipe()
        script = shell_script("k")
        source = os.memfd_create("script", 0)
        os.write(source, script.replace(b"/run/devboxd", str(self.root).encode()))
        os.lseek(source, 0, os.SEEK_SET)

        def descriptors() -> None:
            os.dup2(source, 119)
            os.dup2(commands, 120)
            os.dup2(control, 121)
            os.dup2(120, 20)
            os.dup2(121, 21)
            os.dup2(119, 9)
            os.closerange(10, 20)
            os.closerange(22, 1000)

        self.process = subprocess.Popen(
            ["bash", "-lc", READ_DRIVER],
            cwd=self.home,
            env={"PATH": os.environ["PATH"], "HOME": str(self.home), "LANG": "C.UTF-8"},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            preexec_fn=descriptors,
            close_fds=False,
        )
        os.close(source)
        os.close(commands)
        os.close(control)
        self.answers = os.fdopen(self.control, "r")

    def run(self, command: str, stdin: str | None = None) -> tuple[int, str, str]:
        """(status, stdout, stderr); the status of the process itself when the shell died."""
        self.number += 1
        key = f"e{self.number}"
        folder = self.root / "x" / key
        folder.mkdir()
        (folder / "c").write_text(command)
        results = {}

        def read(name: str, descriptor: int) -> None:
            with open(descriptor) as file:
                results[name] = file.read()

        holders, readers = [], []
        for name in ("1", "2"):
            os.mkfifo(folder / name)
            descriptor = os.open(folder / name, os.O_RDONLY | os.O_NONBLOCK)
            os.set_blocking(descriptor, True)
            holders.append(os.open(folder / name, os.O_WRONLY))
            readers.append(threading.Thread(target=read, args=(name, descriptor)))
            readers[-1].start()
        feeder = None
        if stdin is not None:
            os.mkfifo(folder / "0")
            feeder = threading.Thread(target=lambda: (folder / "0").write_text(stdin))
            feeder.start()
        os.write(self.commands, f"{key}\n".encode())
        lines = []
        for line in self.answers:
            lines.append(line.split())
            if lines[-1][0] == "E":
                break
        for holder in holders:
            os.close(holder)
        for thread in [*readers, *([feeder] if feeder else [])]:
            thread.join()
        status = int(lines[-1][2]) if lines and lines[-1][0] == "E" else self.died()
        return status, results["1"], results["2"]

    def died(self) -> int:
        status = self.process.wait()
        self.close()
        self.start()
        return status if status >= 0 else 128 - status

    def close(self) -> None:
        self.answers.close()
        os.close(self.commands)
        self.process.wait()


@pytest.fixture
def shell(tmp_path: Path):
    if shutil.which("bash") is None:
        pytest.skip("bash is not installed, and the script is one of bash")
    home = tmp_path / "home"
    home.mkdir()
    driver = Driver(tmp_path / "run", home)
    yield driver
    driver.close()


def test_streams_are_apart_and_without_noise(shell: Driver) -> None:
    assert shell.run("echo out; echo err >&2; (exit 7)") == (7, "out\n", "err\n")
    assert shell.run("true") == (0, "", "")


def test_state_persists(shell: Driver) -> None:
    shell.run("cd /; export A='x y'; f() { echo f$A; }; alias ll='echo alias'; set -o pipefail; shopt -s nullglob; B=1")
    assert shell.run('pwd; echo "$A"; f; ll; false | true; echo $?; shopt nullglob; echo $B')[:2] == (
        0,
        "/\nx y\nfx y\nalias\n1\nnullglob       \ton\n1\n",
    )


@pytest.mark.parametrize(
    ("command", "status"), [("exit 3", 3), ("exec false", 1), ("kill -9 $$", 137), ("exec sh -c 'exit 9'", 9)]
)
def test_a_death_ends_only_its_command(shell: Driver, command: str, status: int) -> None:
    shell.run("cd /usr; export A=1; f() { echo f; }; alias ll='echo alias'; set -o pipefail; unset LANG")
    assert shell.run(f"cd /tmp; export A=2; {command}")[0] == status
    assert shell.run("pwd; echo $A; f; ll; false | true; echo $? ${LANG-unset}")[:2] == (
        0,
        "/usr\n1\nf\nalias\n1 unset\n",
    )


@pytest.mark.parametrize("command", ["if", "echo 'open", "done", "break", "break 2", "continue", "(", "}"])
def test_a_broken_command_ends_only_itself(shell: Driver, command: str) -> None:
    shell.run("cd /usr")
    status, out, _ = shell.run(command)
    assert out == ""
    assert shell.run("pwd") == (0, "/usr\n", "")


@pytest.mark.parametrize(
    ("command", "printed"),
    [
        ("while true; do break 2; done; echo after", "after\n"),
        ("for i in 1 2; do echo $i; continue 3; done; echo after", "1\n2\nafter\n"),
        ("until false; do for i in 1; do break 9; done; done; echo after", "after\n"),
        ("break; echo after", "after\n"),
        ("continue 2; echo after", "after\n"),
        ("eval 'continue'; echo after", "after\n"),
        ("f() { break; }; for i in 1 2; do f; echo $i; done", "1\n2\n"),
        ("break && echo after", "after\n"),
    ],
)
def test_break_and_continue_leave_the_loops_of_the_command_alone(shell: Driver, command: str, printed: str) -> None:
    assert shell.run(command)[:2] == (0, printed)
    assert shell.run(command)[:2] == (0, printed)


@pytest.mark.parametrize("name", ["s", "a", "k", "n", "f", "c", "i", "t", "e", "v"])
def test_a_command_that_breaks_the_driver_runs_once(shell: Driver, name: str) -> None:
    shell.run(f"echo once >>log; readonly __devboxd_{name}")
    assert shell.run("cat log")[1] == "once\n"


@pytest.mark.parametrize(
    ("command", "status"), [("exec nonexist", 127), ("exec /", 126), ("exec nonexist; true", 0), (": $((1/0))", 1)]
)
def test_an_error_that_an_interactive_bash_survives_loses_nothing(shell: Driver, command: str, status: int) -> None:
    shell.run("x=5")
    assert shell.run(command)[0] == status
    assert shell.run("echo $x") == (0, "5\n", "")


def test_a_bash_that_has_run_all_its_turns_runs_the_command_that_it_has_read(
    shell: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = shells.DRIVER.replace(" 1" * (shells._INNER - 2), "")
    few = few.replace(r'\builtin eval -- "$__devboxd_l";' * shells._OUTER, r'\builtin eval -- "$__devboxd_l";')
    monkeypatch.setattr(shells, "DRIVER", few)
    shell.run("export n=0; exit")
    processes = set()
    for number in range(12):
        status, out, err = shell.run(f"alias a{number}=true; echo {number} $$; (exit {number})")
        assert (status, out.split()[0], err) == (number, str(number), "")
        processes.add(out.split()[1])
    assert len(processes) == 3


def test_the_same_process_lives_on(shell: Driver) -> None:
    first = shell.run("echo $$")[1]
    assert shell.run("echo $$")[1] == first


def test_stdin(shell: Driver) -> None:
    assert shell.run("cat; echo end", stdin="a\nb\n") == (0, "a\nb\nend\n", "")
    assert shell.run("cat") == (0, "", "")
    assert shell.run("read x; echo got:$x", stdin="word\n") == (0, "got:word\n", "")


def test_children_see_three_descriptors_only(shell: Driver) -> None:
    assert shell.run("ls /proc/self/fd | sort -n | head -n 4 | xargs")[1] in ("0 1 2 3\n",)


def test_background_jobs_have_groups_of_their_own(shell: Driver) -> None:
    _, out, err = shell.run("sleep 30 >/dev/null 2>&1 & echo $! $(ps -o pgid= -p $!) $(ps -o pgid= -p $$)")
    pid, group, own = out.split()
    assert (group, err) == (pid, "")
    assert group != own
    shell.run("kill -9 $$")
    os.kill(int(pid), 0)
    os.kill(int(pid), 9)


def test_odd_settings_do_not_harm(shell: Driver) -> None:
    assert shell.run("set -u; set -e")[0] == 0
    assert shell.run("echo ok") == (0, "ok\n", "")
    assert shell.run("false; echo no")[:2] == (1, "")
    assert shell.run("set +e; IFS=:; PATH=/nowhere; echo still") == (0, "still\n", "")
    assert shell.run("printf() { :; }; read() { :; }; eval() { :; }; echo ok")[1] == "ok\n"
    assert shell.run("echo ok2")[1] == "ok2\n"


def test_multiline_and_heredoc(shell: Driver) -> None:
    assert shell.run("\ncat <<X\nline\nX\nfor i in 1 2; do\n echo $i\ndone\n")[1] == "line\n1\n2\n"


def test_a_large_command(shell: Driver) -> None:
    text = "x" * 300_000
    assert shell.run(f"v={text}; echo ${{#v}}")[1] == "300000\n"


@pytest.mark.parametrize(
    ("command", "status"),
    [
        ("continue 2", 0),
        ("continue 9", 0),
        ("break 9", 0),
        ("set -n", 0),
        ("command() { :; }", 0),
        ("builtin() { :; }", 0),
        ("unset() { :; }; builtin() { :; }", 0),
        ("unset() { exit 9; }", 9),
        ("exec() { :; }; eval() { :; }; read() { :; }; shift() { exit 9; }; set() { exit 9; }", 0),
        ("readonly __devboxd_k", 1),
        ("set -C", 0),
    ],
)
def test_nothing_that_a_command_does_stops_the_shell(shell: Driver, command: str, status: int) -> None:
    shell.run("cd /usr")
    found, out, _ = shell.run(command)
    assert out == ""
    assert status == 9 or found == status
    for number in range(3):
        assert shell.run(f"pwd; echo {number}")[:2] == (0, f"/usr\n{number}\n")


def test_aliases_do_not_change_the_driver(shell: Driver) -> None:
    words = ["shift", "unset", "builtin", "command", "exec", "eval", "printf", "read", "export", "for", "set", "until"]
    shell.run("cd /usr; f() { echo f; }; " + "; ".join(f"alias {word}=exit" for word in [*words, "echo"]))
    for _ in range(2):
        shell.run("\\kill -9 $$")
        assert shell.run("pwd; alias shift; f")[1] == "/usr\nalias shift='exit'\nf\n"


def test_functions_with_names_of_builtins_are_kept(shell: Driver) -> None:
    words = [
        "shift",
        "exec",
        "eval",
        "printf",
        "read",
        "export",
        "set",
        "shopt",
        "alias",
        "unalias",
        "trap",
        "cd",
        "source",
    ]
    shell.run("builtin cd /usr; " + "; ".join(f"{word}() {{ exit 9; }}" for word in words))
    for _ in range(2):
        shell.run("kill -9 $$")
        assert shell.run("pwd; echo $$")[1].startswith("/usr\n")
        assert shell.run("cd /")[0] == 9


def test_functions_that_need_extglob_are_kept(shell: Driver) -> None:
    shell.run("shopt -s extglob")
    shell.run("f() { case $1 in @(a|b)) echo yes;; *) echo no;; esac; }; alias ll='echo l'; set -o pipefail; set -u")
    shell.run("kill -9 $$")
    status, out, _ = shell.run("f a; f c; ll; shopt extglob; false | true; echo $?; echo ${nothing}")
    assert (status != 0, out) == (True, "yes\nno\nl\nextglob        \ton\n1\n")
    shell.run("shopt -u extglob")
    shell.run("kill -9 $$")
    assert shell.run("f c; ll; shopt extglob")[1] == "no\nl\nextglob        \toff\n"


def test_a_record_with_errexit_starts_a_shell(shell: Driver, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    shell.run(f"cd {tmp_path}/gone; rmdir ../gone; A=1; export A; set -eu")
    shell.run("kill -9 $$")
    assert shell.run("echo $A; echo ${-//[^eu]/}; false; echo no")[:2] == (1, "1\neu\n")
    assert shell.run("echo on")[:2] == (0, "on\n")


def test_an_alias_that_was_removed_stays_away(shell: Driver) -> None:
    (shell.home / ".bash_profile").write_text("alias p='echo from the profile'\n")
    shell.run("kill -9 $$")
    assert shell.run("p")[1] == "from the profile\n"
    shell.run("unalias p")
    shell.run("kill -9 $$")
    assert shell.run("p")[0] == 127


def test_options_that_export_and_trace_show_nothing_of_the_driver(shell: Driver) -> None:
    assert shell.run("set -a") == (0, "", "")
    for _ in range(2):
        assert shell.run("X=1; env | grep -c __devboxd; echo $-")[1].startswith("0\n")
        assert shell.run("env | grep ^X=; : " + "x" * 200_000)[:2] == (0, "X=1\n")
        shell.run("kill -9 $$")
    assert shell.run("set -x") == (0, "", "")
    assert shell.run("echo a") == (0, "a\n", "++++++ echo a\n")
    shell.run("kill -9 $$")
    assert shell.run("if")[0] == 2
    assert shell.run("echo a") == (0, "a\n", "++++++ echo a\n")
    assert shell.run("set +ax; echo ${-//[^ax]/}")[1] == "\n"
    assert shell.run("Y=1; env | grep ^Y=; echo b") == (0, "b\n", "")


@pytest.mark.parametrize("last", ["exit 3", "set -e; (exit 3)", "trap 'exit 3' USR1; kill -USR1 $$"])
def test_a_trap_on_exit_writes_to_the_command(shell: Driver, last: str) -> None:
    assert shell.run(f"trap 'echo cleanup; echo more >&2' EXIT; echo work; {last}") == (3, "work\ncleanup\n", "more\n")


def test_redirections_of_a_command_end_with_it(shell: Driver, tmp_path: Path) -> None:
    shell.run(f"exec >{tmp_path}/log; echo kept")
    assert shell.run("echo shown") == (0, "shown\n", "")
    assert (tmp_path / "log").read_text() == "kept\n"


def test_an_idle_shell_lives_on_whatever_tmout_says(shell: Driver) -> None:
    first = shell.run("TMOUT=1; echo $$")[1]
    with pytest.raises(subprocess.TimeoutExpired):
        shell.process.wait(timeout=1.5)
    assert shell.run("echo $$")[1] == first


@pytest.mark.parametrize(
    ("command", "asked", "answer"),
    [
        ("true", "echo $?", "0"),
        ("(exit 7)", "echo $?", "7"),
        ("f() { return 9; }; f", "echo $?; declare -F", "9\ndeclare -f f"),
        ("nosuchcommand", "echo $?", "127"),
        ("if", "echo $?", "2"),
        ("set -u; (exit 3)", "echo $?; echo $?", "3\n0"),
        ("false | (exit 3) | true", "echo $? ${PIPESTATUS[@]}", "0 1 3 0"),
        ("false | (exit 3)", "echo $? ${PIPESTATUS[@]}", "3 1 3"),
        ("false | true | (exit 2) | (exit 3)", "echo $? ${PIPESTATUS[@]}", "3 1 0 2 3"),
        ("false | true | (exit 2) | (exit 3) | true", "echo $? ${PIPESTATUS[@]}", "0 1 0 2 3 0"),
        ("false | true | (exit 2) | true | (exit 3)", "echo $? ${PIPESTATUS[@]}", "3 1 0 2 0 3"),
        ("set -e; false | true", "echo $? ${PIPESTATUS[@]}", "0 1 0"),
        ("trap 'echo E' ERR; set +e; false | true", "echo $? ${PIPESTATUS[@]}", "0 1 0"),
        ("set -o pipefail; (exit 3) | true", "echo $? ${PIPESTATUS[@]}", "3 3 0"),
        ("true |\n(exit 4)", "echo ${PIPESTATUS[@]} $?", "0 4 4"),
        ("cat <<X | grep -c a\na\nX", "echo $?", "0"),
        ("for x in a b; do echo $x | false; done", "echo $?", "1"),
        ("sleep 0 & j=$!", "[ $! = $j ]; echo $?; wait $!; echo $?", "0\n0"),
        ("cd /usr; cd /", "cd - >/dev/null; echo $PWD $OLDPWD", "/usr /"),
        ("read <<<word; [[ abc =~ b ]]; mapfile <<<line", "echo $REPLY $BASH_REMATCH $MAPFILE", "word b line"),
        (
            "exec 3>/dev/null 4</dev/null; ulimit -S -n 200; umask 27",
            "ulimit -n; umask; echo /dev/fd/[34]",
            "200\n0027\n/dev/fd/3 /dev/fd/4",
        ),
        ("sleep 30 >/dev/null 2>&1 & sleep 31 >/dev/null 2>&1 &", "kill %1; wait %1; echo $?; kill %2", "143"),
        ("trap 'echo $?' ERR", "(exit 5)", "5"),
        ("trap 'echo d' DEBUG; (exit 5)", "echo $?; trap", "d\n5\nd\ntrap -- 'echo d' DEBUG"),
        ("set -T; trap 'echo r' RETURN; (exit 2)", "echo $?", "2"),
        ("set -T; trap 'echo d' DEBUG; trap 'echo r' RETURN; (exit 2)", "echo $?", "d\n2"),
    ],
)
def test_what_a_living_bash_knows_of_the_command_before(shell: Driver, command: str, asked: str, answer: str) -> None:
    shell.run(command)
    assert shell.run(asked)[1] == f"{answer}\n"


@pytest.mark.parametrize(
    "before", ["true", "(exit 3)", "false | true", "true | (exit 3)", "false | true | false | true"]
)
@pytest.mark.parametrize("command", ["done", "echo 'a", "true)", "true | case x in a", "case x in a|b"])
def test_a_syntax_error_shows_the_command_and_nothing_of_the_driver(shell: Driver, before: str, command: str) -> None:
    shell.run("set -e; set +e")
    shell.run(before)
    status, _, err = shell.run(command)
    assert status == 2
    assert "syntax error" in err or "unexpected EOF" in err
    assert not [word for word in ("devboxd", "builtin", "line 3") if word in err], err


@pytest.mark.parametrize("numbers", [(9,), (9, 250)])
@pytest.mark.parametrize(
    ("profile", "kept"),
    [
        ("", False),
        ("set -eu", False),
        ("exec 9<&-", False),
        ("exec 9</etc/passwd", True),
        ("set -eu; exec 9</dev/null", True),
    ],
)
def test_a_command_comes_by_9_alone_from_an_agent_of_before(
    tmp_path: Path, numbers: tuple[int, ...], profile: str, kept: bool
) -> None:
    """Where a profile took that it says so, and runs nothing in its place."""
    (tmp_path / ".profile").write_text(profile)
    source = os.memfd_create("script", 0)
    os.write(source, command_script(b"if [ -e /dev/fd/9 ]; then echo kept; else echo free; fi"))
    os.lseek(source, 0, os.SEEK_SET)

    def descriptors() -> None:
        for number in numbers:
            os.dup2(source, number)

    done = subprocess.run(
        ["bash", "-lc", READ_SCRIPT],
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
        preexec_fn=descriptors,
        close_fds=False,
        capture_output=True,
        text=True,
        check=False,
    )
    os.close(source)
    if len(numbers) == 1 and "exec" in profile:
        assert (done.returncode, done.stdout) == (126, "")
        assert "a profile uses descriptor 9" in done.stderr
    else:
        assert (done.returncode, done.stdout, done.stderr) == (0, "kept\n" if kept else "free\n", "")


def test_errors_name_the_lines_of_the_command(shell: Driver) -> None:
    assert shell.run("nosuchcommand")[2] == "bash: line 1: nosuchcommand: command not found\n"
    assert shell.run("true\nnosuchcommand")[2] == "bash: line 2: nosuchcommand: command not found\n"


_WORDS = [
    "true", "false", "(exit 7)", "echo $?", "false | (exit 3) | true",
     "set -o pipefail", "set +o pipefail", "! true | false", "cd /usr", "cd - >/dev/null",
    "echo $PWD $OLDPWD", "x=5", "echo $x", "a=(1 2 3)", "echo ${a[1]}", "set -- p q", "echo $# $1", "shift",
    "umask 027", "umask", "sleep 0 & wait $!", "f() { echo f; return 4; }", "f", "alias g='echo alias'", "g",
    "unalias g", "trap 'echo err $?' ERR", "trap - ERR", "trap 'echo dbg' DEBUG", "trap - DEBUG",
    "trap 'echo ret' RETURN", "set -T", "set +T", "set -E", "trap", "IFS=:", "v=a:b; echo $v", "read <<<hello",
    "echo $REPLY", "[[ abc =~ b ]]", "echo ${BASH_REMATCH[0]}", "exec 3>/dev/null", "echo gone >&3",
    "{ echo x; false; } | cat", "ro=2", "readonly ro=1", "if false; then :; fi", "declare -i n=3+4", "echo $n",
    "echo ${-//[sc]/}", "shopt -s nullglob", "echo /nothing*", "set -a", "set +a", "env | grep -c ^x=", "jobs",
    "printf '%s|%s\\n' a b", "case x in x) (exit 6);; esac", "for i in 1 2; do echo $i | cat; done", "declare -F",
    "set -f",
]  # fmt: skip


@given(commands=st.lists(st.sampled_from(_WORDS), min_size=2, max_size=12))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_sequence_of_commands_does_what_it_does_in_one_bash(tmp_path_factory, commands: list[str]) -> None:
    root = tmp_path_factory.mktemp("sequence")
    (root / "home").mkdir()
    driver = Driver(root / "run", root / "home")
    try:
        found = "".join(driver.run(command)[1] for command in commands)
    finally:
        driver.close()
    one = subprocess.run(
        ["bash", "-ls"],
        input="set -m; shopt -s expand_aliases; unset ro\n" + "\n".join(commands),
        cwd=root / "home",
        env={"PATH": os.environ["PATH"], "HOME": str(root / "home"), "LANG": "C.UTF-8"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert found == one.stdout


@pytest.mark.parametrize(
    "profile",
    [
        "set -e",
        "set -u",
        "set -euo pipefail; trap 'exit 9' ERR; shopt -s inherit_errexit",
        "shopt -s failglob nullglob dotglob globstar nocasematch nocaseglob extglob",
        "set -o posix",
        "shopt -s extdebug compat31",
        "set -aCfkx",
        "set -v",
        "trap 'echo noise >/dev/tty' DEBUG",
        "set -ET; trap 'x=1' DEBUG; trap 'x=2' RETURN; trap 'x=3' ERR EXIT",
        "readonly IFS=x REPLY=1 TMOUT=1",
        "set -- some words; IFS=/devboxruns01",
        "exec </dev/null >/dev/null 2>&1",
        "return 3",
        "read x; cat",
        "shopt -s expand_aliases; alias if=exit until=exit mapfile=exit builtin=exit eval=exit set=exit",
        "mapfile() { exit 5; }; eval() { exit 5; }; set() { exit 5; }; exec() { exit 5; }; printf() { exit 5; }",
        "trap() { exit 5; }; shopt() { exit 5; }; export() { exit 5; }; read() { exit 5; }; :() { exit 5; }",
        "builtin() { exit 4; }; command() { exit 4; }",
        "PATH=; CDPATH=/; GLOBIGNORE=*; BASH_ENV=/nothing; POSIXLY_CORRECT=",
        "PROMPT_COMMAND='exit 3'; PS1='$(exit 4)'; PS4='$(echo noise)'; HISTFILE=/",
    ],
)
def test_whatever_a_profile_does_commands_run(shell: Driver, profile: str) -> None:
    (shell.home / ".profile").write_text(profile)
    for _ in range(2):
        assert shell.run('\\builtin kill -9 "$BASHPID"')[0] == 137
        assert shell.run("\\builtin echo one")[:2] == (0, "one\n")
        assert shell.run('( \\builtin exit 0 ); \\builtin echo "$?" two; \\builtin :')[:2] == (0, "0 two\n")

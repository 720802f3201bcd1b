"""SHELL and RUN with the smallest driver of a living bash."""

import errno

import pytest

from devboxd.agent.client import AgentError
from devboxd.agent.protocol import EntryType, Scope, Stage, encode_record

pytestmark = [pytest.mark.anyio, pytest.mark.box]


FOLDERS_GONE = 'while [ -n "$(ls -A /run/devboxd/x)" ]; do sleep 0.01; done'
"""The folders of commands are removed by a child of the agent, some time after their end was told."""


async def refused(coroutine) -> tuple[Stage, str]:
    with pytest.raises(AgentError) as caught:
        await coroutine
    return caught.value.stage, errno.errorcode[caught.value.errno]


@pytest.fixture
async def shell(session):
    await session.start_shell("sh")
    return session


async def test_state_lives_and_streams_stay_apart(shell):
    first = await shell.run_in("sh", "one", "cd /usr; X=5; f() { echo f $X; }; echo out; echo err >&2; (exit 9)")
    assert (first.stdout, first.stderr, first.exit.status) == (b"out\n", b"err\n", 9)
    assert not first.exit.shell_died
    second = await shell.run_in("sh", "two", "f; pwd")
    assert (second.stdout, second.stderr, second.exit.status) == (b"f 5\n/usr\n", b"", 0)
    assert [entry.key for entry in await shell.client.list()] == ["sh"]
    assert (await shell.run("look", FOLDERS_GONE)).exit.status == 0


async def test_stdin_of_a_command(shell):
    await shell.start_in("sh", "one", "read a; read b; echo $b $a; cat", stdin=True)
    for part in (b"first\n", b"second\n", b"rest" * 100_000):
        await shell.client.stdin("one", shell.box.feed("one", part), False)
    await shell.client.stdin("one", shell.box.feed("one", b"!"), True)
    await shell.exited("one")
    assert shell.box.output("one", "out") == b"second first\n" + b"rest" * 100_000 + b"!"


async def test_much_output_and_a_cap(shell):
    result = await shell.run_in("sh", "one", "head -c 3000000 /dev/zero; head -c 5000 /dev/zero >&2", cap=1_000_000)
    assert (len(result.stdout), result.exit.stdout_truncated) == (1_000_000, True)
    assert (len(result.stderr), result.exit.stderr_truncated) == (5000, False)


async def test_a_command_of_ten_megabytes(shell):
    result = await shell.run_in("sh", "one", ": " + "x" * 10_000_000 + "; echo done")
    assert result.stdout == b"done\n"


async def test_one_command_at_a_time(shell):
    await shell.start_in("sh", "one", "sleep 60")
    assert await refused(shell.start_in("sh", "two", "true")) == (Stage.BUSY, "EBUSY")
    assert await refused(shell.start_in("none", "two", "true")) == (Stage.LOOKUP, "ESRCH")
    assert await refused(shell.start_in("one", "two", "true")) == (Stage.LOOKUP, "ESRCH")
    await shell.start_shell("other")
    assert (await shell.run_in("other", "two", "echo independent")).stdout == b"independent\n"


@pytest.mark.parametrize(
    ("command", "status"), [("exit 3", 3), ("kill -9 $$", 137), ("exec true", 0), ("exec bash -c 'exit 4'", 4)]
)
async def test_the_shell_dies_in_a_command(shell, command, status):
    await shell.start_in("sh", "one", f"echo before; {command}")
    event = await shell.exited("one")
    assert (event.status, event.shell_died, event.stdout_length) == (status, True, 7)
    assert [entry.key for entry in await shell.client.list()] == ["one"]
    assert await refused(shell.start_in("sh", "two", "true")) == (Stage.LOOKUP, "ESRCH")
    await shell.client.ack("one")
    await shell.start_shell("sh")
    assert (await shell.run_in("sh", "two", "echo again")).stdout == b"again\n"
    assert (await shell.run("look", FOLDERS_GONE)).exit.status == 0


async def test_the_death_of_an_idle_shell_is_an_exit(shell):
    await shell.run_in("sh", "one", "true")
    await shell.client.signal("sh", 9, Scope.PROCESS)
    event = await shell.exited("sh")
    assert (event.status, event.shell_died) == (137, False)
    await shell.client.ack("sh")
    assert await shell.client.list() == []


async def test_a_signal_spares_the_jobs_of_earlier_commands(shell):
    await shell.run_in("sh", "one", "sleep 61 & sleep 62 & true")
    await shell.start_in("sh", "two", "trap : TERM; sleep 63 & sleep 64 | cat; echo status $?")
    look = "ps -A -o args= | grep -o '^sleep 6[1-4]' | sort"

    async def running():
        shell.count = getattr(shell, "count", 0) + 1
        return (await shell.run(f"look-{shell.count}", look)).stdout

    async def all_run():
        return await running() == b"sleep 61\nsleep 62\nsleep 63\nsleep 64\n"

    await shell.until(all_run)
    await shell.client.signal("two", 15, Scope.PROCESS)
    await shell.exited("two")
    assert await running() == b"sleep 61\nsleep 62\n"
    assert (await shell.run_in("sh", "three", "echo on")).stdout == b"on\n"


async def test_a_background_job_keeps_its_fifo(shell):
    await shell.start_in("sh", "one", "(while [ ! -e /tmp/go ]; do sleep 0.01; done; echo later) & echo now")
    event = await shell.exited("one")
    await shell.client.ack("one")
    assert event.stdout_length == 4
    assert (await shell.run_in("sh", "two", "touch /tmp/go; echo second")).stdout == b"second\n"
    await shell.has("one", b"now\nlater\n")


async def test_a_shell_of_a_user(session):
    await session.start_shell("sh", user="nobody")
    result = await session.run_in("sh", "one", "id -un; ls -ld /run/devboxd/x/one; ls /run/devboxd/x/one")
    assert result.stdout.startswith(b"nobody\ndrwx------ 2 nobody nogroup")
    assert result.stdout.endswith(b"\n1\n2\nc\n")


async def test_lies_on_the_control_pipe_harm_the_liar_alone(session):
    driver = """
        while read -r key <&20; do
            head -c 100000 /dev/zero | tr '\\0' x >&21; echo >&21
            printf 'E other 0\\nE %s 999\\nS\\nE\\nE %s\\n\\n' "$key" "$key" >&21
            printf 'E %s 7\\nE %s 8\\n' "$key" "$key" >&21
        done"""
    record = encode_record(["bash", "-c", driver], {"PATH": "/usr/bin:/bin"}, "/", "root")
    await session.client.shell("sh", record)
    for number in range(3):
        result = await session.run_in("sh", f"k{number}", "true")
        assert (result.exit.status, result.stdout) == (7, b"")


async def test_a_shell_that_never_answers(session):
    record = encode_record(["sleep", "60"], {"PATH": "/usr/bin:/bin"}, "/", "root")
    await session.client.shell("sh", record)
    await session.start_in("sh", "one", "true", stdin=True)
    assert await session.client.stdin("one", session.box.feed("one", b"text"), True) == 0
    await session.client.signal("one", 15, Scope.PROCESS)
    event = await session.exited("one")
    assert (event.status, event.shell_died, event.stdout_length) == (143, True, 0)
    await session.client.ack("one")
    assert await session.client.list() == []


async def test_a_shell_that_closed_its_pipes(session):
    record = encode_record(["bash", "-c", "exec 20<&- 21>&-; sleep 60"], {"PATH": "/usr/bin:/bin"}, "/", "root")
    await session.client.shell("sh", record)
    fds = await session.run("wait", "while ls /proc/[0-9]*/fd/20 2>/dev/null; do sleep 0.01; done")
    assert fds.exit.status == 0
    assert await refused(session.start_in("sh", "one", "true")) == (Stage.LOOKUP, "ESRCH")
    look = f"{FOLDERS_GONE}; echo clean"
    assert (await session.run("look", look)).stdout == b"clean\n"


async def test_the_folder_of_a_start_that_failed_hinders_no_other(shell):
    """A shell that dies as a command comes leaves one, and the command is told to the next shell."""
    await shell.run("left", "mkdir -p /run/devboxd/x/one; mkfifo /run/devboxd/x/one/1; echo old >/run/devboxd/x/one/c")
    assert (await shell.run_in("sh", "one", "echo new")).stdout == b"new\n"


async def test_commands_survive_the_server(box):
    first = await box.session()
    await first.start_shell("sh")
    await first.start_in("sh", "one", "while [ ! -e /tmp/go ]; do sleep 0.01; done; cat; exit 6", stdin=True)
    await first.client.stdin("one", box.feed("one", b"early "), False)
    await first.client.close()
    second = await box.session()
    kinds = {entry.key: (entry.type, entry.shell) for entry in await second.client.list()}
    assert kinds == {"sh": (EntryType.SHELL, ""), "one": (EntryType.COMMAND, "sh")}
    await second.run("go", "touch /tmp/go")
    await second.client.stdin("one", box.feed("one", b"late"), True)
    event = await second.exited("one")
    assert (event.status, event.shell_died) == (6, True)
    assert box.output("one", "out") == b"early late"


async def test_many_commands_leave_nothing(shell):
    for number in range(100):
        assert (await shell.run_in("sh", f"k{number}", f"echo {number}")).stdout == b"%d\n" % number
    assert (await shell.run("look", FOLDERS_GONE)).exit.status == 0


def commands(pattern: str) -> str:
    """A look at whose command line matches; it does not see itself."""
    return f"ps -A -o args= | grep -x '{pattern}' | sort"


async def until_seen(shell, pattern: str, wanted: bytes) -> None:
    async def seen():
        shell.looks = getattr(shell, "looks", 0) + 1
        return (await shell.run(f"seen-{shell.looks}", commands(pattern))).stdout == wanted

    await shell.until(seen)


@pytest.mark.parametrize("signal", [2, 15])
@pytest.mark.parametrize("command", ["x=$(sleep 71; true); echo got", "x=$(true | (sleep 71; true)); echo got"])
async def test_a_signal_reaches_substitutions(shell, command, signal):
    await shell.start_in("sh", "one", command)
    await until_seen(shell, "sleep 71", b"sleep 71\n")
    await shell.client.signal("one", signal, Scope.GROUP)
    event = await shell.exited("one")
    assert (event.status, shell.box.output("one", "out")) == (128 + signal, b"")
    await until_seen(shell, "sleep 71", b"")


async def test_a_signal_spares_the_substitutions_of_earlier_commands(shell):
    await shell.run_in("sh", "one", "exec 7< <(sleep 72)")
    await shell.start_in("sh", "two", "cat <(sleep 73)")
    await until_seen(shell, "sleep 7[23]", b"sleep 72\nsleep 73\n")
    await shell.client.signal("two", 15, Scope.PROCESS)
    assert (await shell.exited("two")).status == 143
    await until_seen(shell, "sleep 7[23]", b"sleep 72\n")


async def test_end_insists_on_what_a_dead_shell_left(shell):
    await shell.start_in("sh", "one", "bash -c \"trap '' TERM; sleep 74; sleep 75\"; true")
    await until_seen(shell, "sleep 7[45]", b"sleep 74\n")
    await shell.client.end("one", Scope.GROUP, 0.3)
    event = await shell.exited("one")
    assert (event.status, event.shell_died) == (143, True)
    await shell.client.ack("one")
    await until_seen(shell, "sleep 7[45]", b"")


async def test_end_insists_on_what_a_shell_began_meanwhile(shell):
    await shell.start_in("sh", "one", "trap '' TERM; echo ready; (trap - TERM; exec sleep 76); sleep 77; true")
    await shell.has("one", b"ready\n")
    await shell.client.end("one", Scope.GROUP, 2)
    assert (await shell.exited("one")).status == 137
    await until_seen(shell, "sleep 7[67]", b"")
    with pytest.raises(AgentError):
        await shell.client.end("one", Scope.GROUP, 2)


async def test_a_command_that_ends_in_the_grace_leaves_its_shell_alone(shell):
    await shell.run_in("sh", "earlier", "sleep 78 & true")
    await shell.start_in("sh", "one", "trap 'echo caught' TERM; echo ready; sleep 79; echo over")
    await shell.has("one", b"ready\n")
    await shell.client.end("one", Scope.GROUP, 0.1)
    event = await shell.exited("one")
    assert (event.status, shell.box.output("one", "out")) == (0, b"ready\ncaught\nover\n")
    await shell.client.ack("one")
    assert event.shell_died is False
    await shell.start_in("sh", "two", "read x; echo on", stdin=True)
    await shell.start("clock", ["bash", "-c", "trap '' TERM; echo ready; while :; do sleep 0.01; done"])
    await shell.has("clock", b"ready\n")
    await shell.client.end("clock", Scope.PROCESS, 0.1)
    assert (await shell.exited("clock")).status == 137  # so the grace of the first is over, too
    await shell.client.stdin("two", shell.box.feed("two", b"x\n"), True)
    assert (await shell.exited("two")).status == 0
    await until_seen(shell, "sleep 78", b"sleep 78\n")

"""SPAWN, SIGNAL, LIST and ACK on the real agent."""

import asyncio
import errno
import hashlib
import os
import signal
import time
from pathlib import Path

import pytest

from devboxd.agent.client import AgentError
from devboxd.agent.protocol import EntryState, EntryType, Scope, Stage, encode_record
from support.environments import PYTHON

pytestmark = [pytest.mark.anyio, pytest.mark.box]


async def refused(coroutine) -> tuple[Stage, str]:
    """Await what must fail; return the stage and the name of the errno."""
    with pytest.raises(AgentError) as caught:
        await coroutine
    return caught.value.stage, errno.errorcode[caught.value.errno]


async def test_streams_stay_apart(session):
    result = await session.run("one", "echo out; echo err >&2; exit 3")
    assert (result.stdout, result.stderr, result.exit.status) == (b"out\n", b"err\n", 3)
    assert (result.exit.stdout_length, result.exit.stderr_length) == (4, 4)
    assert await session.client.list() == []


async def test_fifty_megabytes_arrive_byte_exact(session):
    size = 50_000_000
    command = f"head -c {size} /dev/urandom | tee >(sha256sum >&2)"
    result = await session.run("big", command)
    assert len(result.stdout) == size
    # The process substitution may outlive the command.
    await session.until(lambda: len(session.box.output("big", "err")) >= 64)
    assert session.box.output("big", "err")[:64].decode() == hashlib.sha256(result.stdout).hexdigest()


async def test_past_the_cap_output_is_discarded_and_told(session):
    result = await session.run("cap", "head -c 1000000 /dev/zero; echo small >&2", cap=1000)
    assert (len(result.stdout), result.exit.stdout_length, result.exit.stdout_truncated) == (1000, 1000, True)
    assert (result.stderr, result.exit.stderr_truncated) == (b"small\n", False)
    exact = await session.run("exact", "head -c 1000 /dev/zero", cap=1000)
    assert (len(exact.stdout), exact.exit.stdout_truncated) == (1000, False)


async def test_environment_directory_and_user(session):
    await session.start("env", ["/usr/bin/env"], user="nobody", env={"A": "b=c", "HOME": "/tmp"}, directory="/tmp")
    await session.exited("env")
    lines = set(session.box.output("env", "out").decode().split("\n"))
    shell = "SHELL=/usr/sbin/nologin"
    assert lines == {"A=b=c", "HOME=/tmp", "PATH=/usr/bin:/bin", "USER=nobody", "LOGNAME=nobody", shell, ""}
    result = await session.run("id", "id; pwd; umask; cat /proc/self/oom_score_adj; ulimit -n", user="65534:4")
    ids = b"uid=65534(nobody) gid=4(adm) groups=4(adm)"
    assert result.stdout.split(b"\n")[:4] == [ids, b"/", b"0022", b"500"]


async def test_groups_come_from_the_box(make_box):
    box = await make_box(
        "mount -t tmpfs tmpfs /mnt && cp /etc/passwd /etc/group /mnt && "
        "echo 'extra:x:4242:other,nobody' >> /mnt/group && "
        "echo 'guest:x:1234:4321::/tmp:/bin/bash' >> /mnt/passwd && mount --bind /mnt/group /etc/group && "
        "mount --bind /mnt/passwd /etc/passwd"
    )
    session = await box.session()
    assert b",4242(extra)" in (await session.run("groups", "id", user="nobody")).stdout
    result = await session.run("guest", "id -u; id -g; pwd; echo $HOME $SHELL", user="guest", directory="")
    assert result.stdout == b"1234\n4321\n/tmp\n/tmp /bin/bash\n"


async def test_each_command_leads_a_session_of_its_own(session):
    result = await session.run("sid", "ps -o pid=,pgid=,sid= -p $$; ls -l /proc/self/fd")
    first, *fds = result.stdout.decode().split("\n")
    assert len(set(first.split())) == 1
    assert len([line for line in fds if "->" in line]) == 4  # 0, 1, 2 and that of ls itself
    await session.start("signals", ["grep", "-E", "Sig(Blk|Ign)", "/proc/self/status"])
    await session.exited("signals")
    assert session.box.output("signals", "out") == b"SigBlk:\t0000000000000000\nSigIgn:\t0000000000000000\n"


async def test_what_cannot_start_says_where(session):
    client = session.client
    assert await refused(session.start("a", ["/no/such"])) == (Stage.EXEC, "ENOENT")
    assert await refused(session.start("a", ["no-such"])) == (Stage.EXEC, "ENOENT")
    assert await refused(session.start("a", ["/etc/passwd"])) == (Stage.EXEC, "EACCES")
    assert await refused(session.start("a", ["true", "x" * 200_000])) == (Stage.EXEC, "E2BIG")
    assert await refused(session.start("a", ["true"], directory="/no/such")) == (Stage.DIRECTORY, "ENOENT")
    assert await refused(session.start("a", ["true"], directory="/root", user="nobody")) == (
        Stage.DIRECTORY,
        "EACCES",
    )
    assert await refused(session.start("a", ["true"], user="nobody-at-all")) == (Stage.USER, "ENOENT")
    assert await refused(session.start("a", ["true"], user="")) == (Stage.USER, "ENOENT")
    assert await refused(session.start("a", ["true"], user="1:x")) == (Stage.USER, "ENOENT")
    assert await refused(client.spawn("a", b"junk", 1, 2, None, 10)) == (Stage.DECODE, "EINVAL")
    assert await refused(client.spawn("a", b"", 1, 2, None, 10)) == (Stage.DECODE, "EINVAL")
    assert await client.list() == []
    assert (await session.run("a", "echo the key is free again")).exit.status == 0


async def test_unknown_and_known_keys(session):
    client = session.client
    assert await refused(client.ack("gone")) == (Stage.LOOKUP, "ESRCH")
    assert await refused(client.signal("gone", 15, Scope.PROCESS)) == (Stage.LOOKUP, "ESRCH")
    assert await refused(client.stdin("gone", 1, False)) == (Stage.LOOKUP, "ESRCH")
    await session.start("cat", ["cat"], stdin=True)
    assert await refused(session.start("cat", ["cat"])) == (Stage.DUPLICATE, "EEXIST")
    assert await refused(client.ack("cat")) == (Stage.BUSY, "EBUSY")
    assert await refused(client.signal("cat", 99, Scope.PROCESS)) == (Stage.LOOKUP, "EINVAL")
    assert await refused(client.resize("cat", 1, 1)) == (Stage.LOOKUP, "ESRCH")


@pytest.mark.parametrize(("scope", "status"), [(Scope.PROCESS, 143), (Scope.GROUP, 143), (Scope.ALL, 143)])
async def test_signals_reach_whom_they_are_for(session, scope, status):
    await session.start("one", ["bash", "-c", "sleep 60 & echo $!; wait"])
    await session.start("two", ["sleep", "60"])
    await session.until(lambda: session.box.output("one", "out"))
    child = int(session.box.output("one", "out"))
    await session.client.signal("" if scope is Scope.ALL else "one", signal.SIGTERM, scope)
    assert (await session.exited("one")).status == status
    if scope is Scope.PROCESS:
        assert (await session.run("look", f"kill -0 {child} && echo alive")).stdout == b"alive\n"
    else:  # it may take a moment to be gone; one that stays is found by the test's own limit
        await session.run("look", f"while [ -d /proc/{child} ]; do sleep 0.01; done")
    entries = {entry.key: entry.state for entry in await session.client.list()}
    assert (entries["two"] is EntryState.ENDED) == (scope is Scope.ALL)


async def test_a_group_is_reached_after_its_leader_has_ended(session):
    await session.start("one", ["bash", "-c", "trap '' TERM; sleep 60 & echo $!; disown; exit 0"])
    assert (await session.exited("one")).status == 0
    await session.client.ack("one")
    child = session.box.output("one", "out").decode().strip()
    await session.client.signal("one", signal.SIGKILL, Scope.GROUP)
    command = f"while [ -d /proc/{child} ]; do sleep 0.01; done; echo gone"
    assert (await session.run("look", command)).stdout == b"gone\n"
    with pytest.raises(AgentError):
        await session.client.signal("one", signal.SIGKILL, Scope.PROCESS)


async def test_a_background_child_writes_on_after_the_end(session):
    command = "echo now; (while [ ! -e /tmp/go ]; do sleep 0.01; done; echo later) & exit 5"
    await session.start("bg", ["bash", "-c", command])
    event = await session.exited("bg")
    assert (event.status, event.stdout_length) == (5, 4)
    await session.client.ack("bg")
    assert await session.client.list() == []
    assert await refused(session.start("bg", ["true"])) == (Stage.DUPLICATE, "EEXIST")
    await session.run("go", "touch /tmp/go")
    await session.has("bg", b"now\nlater\n")


async def test_all_that_a_pipe_holds_at_the_end_belongs_to_the_command(session):
    for number in range(20):
        result = await session.run(f"k{number}", "head -c 65536 /dev/zero; (sleep 60 >/dev/null 2>&1 <&- &)")
        assert result.exit.stdout_length == 65536


async def test_orphans_are_reaped(session):
    result = await session.run("orphans", "for i in $(seq 200); do ( ( true & ) & ) ; done; echo ok")
    assert result.stdout == b"ok\n"
    command = "while ps -o stat= -A | grep -q Z; do sleep 0.01; done; echo none"
    assert (await session.run("zombies", command)).stdout == b"none\n"


async def test_a_script_of_ten_megabytes(session):
    script = b"# " + b"x" * 10_000_000 + b"\necho read it all; cat <<'E'\n\xff\xfe\nE\n"
    await session.start("script", ["bash", "-c", ". /dev/fd/9"], script=script, user="nobody")
    assert (await session.exited("script")).status == 0
    assert session.box.output("script", "out") == b"read it all\n\xff\xfe\n"


async def test_a_script_comes_by_two_descriptors(session):
    """9 is what published servers read, 250 what profiles leave alone; a low limit allows 9 alone."""
    look = "ls /proc/self/fd; cat <&9; exec 2>&-; cat <&250"
    await session.start("one", ["bash", "-c", look], script=b"text")
    assert (await session.exited("one")).status == 0
    assert session.box.output("one", "out") == b"0\n1\n2\n250\n3\n9\ntext"


async def test_the_list_tells_all(session):
    record = encode_record(["cat"], {"PATH": "/bin"}, "/", "root")
    pid = await session.start("one", ["cat"], stdin=True)
    master = await session.client.pty("two", 10, 20, record)
    os.close(master)
    shell = await session.start_shell("three")
    await session.start_in("three", "four", "echo hello; sleep 60")
    length = session.box.feed("one", b"12345")
    await session.client.stdin("one", length, False)
    await session.has("one", b"12345")
    await session.has("four", b"hello\n")
    entries = {entry.key: entry for entry in await session.client.list()}
    one, two, three, four = (entries[key] for key in ("one", "two", "three", "four"))
    assert (one.type, one.state, one.pid) == (EntryType.EXECUTION, EntryState.RUNNING, pid)
    assert (one.position, one.stdout_length, one.stderr_length) == (5, 5, 0)
    assert (two.type, two.state) == (EntryType.TERMINAL, EntryState.RUNNING)
    assert (three.type, three.pid, three.shell) == (EntryType.SHELL, shell, "")
    assert (four.type, four.stdout_length, four.shell, four.pid) == (EntryType.COMMAND, 6, "three", shell)


async def test_the_inside_cannot_look_into_the_agent(session):
    result = await session.run(
        "look", "cat /proc/1/environ /proc/1/maps; ls /proc/1/fd; readlink /proc/1/exe", user="nobody"
    )
    assert result.stdout == b""
    assert result.stderr.count(b"ermission denied") >= 3


async def test_a_signal_to_pid_1_is_nothing(session):
    command = "for s in $(seq 1 64); do kill -$s 1 2>/dev/null; done; echo done"
    assert (await session.run("kill", command)).stdout == b"done\n"
    assert (await session.run("after", "echo alive")).stdout == b"alive\n"


async def test_sigterm_from_outside_ends_the_box(session):
    """As a machine that goes down sends it to every process; commands are told, and have a moment."""
    code = "trap 'sleep 0.3; echo told; exit 5' TERM; echo up; while :; do sleep 0.1; done"
    await session.start("polite", ["bash", "-c", code])
    await session.start("stubborn", ["bash", "-c", "trap '' TERM; echo up; while :; do sleep 1; done"])
    await session.has("polite", b"up\n")
    await session.has("stubborn", b"up\n")
    begun = time.monotonic()
    os.kill(session.box.pid, signal.SIGTERM)
    status = await asyncio.to_thread(session.box.process.wait, 30)
    assert (status, session.box.output("polite", "out")) == (0, b"up\ntold\n")
    assert time.monotonic() - begun < 5
    session.box.ended = True


async def test_an_exec_that_blocks_keeps_nobody_waiting(session):
    """Whoever holds a lease on a program makes exec wait for as long as /proc/sys/fs/lease-break-time says."""
    hold = (
        "import fcntl,os,time; f=os.open('/tmp/p',2); fcntl.fcntl(f,1024,1); print('held',flush=True); time.sleep(60)"
    )
    await session.run("copy", "cp /bin/true /tmp/p")
    await session.start("lease", [PYTHON, "-c", "import signal; signal.signal(29, signal.SIG_IGN);" + hold])
    await session.until(lambda: session.box.output("lease", "out"))
    starting = asyncio.create_task(session.start("one", ["/tmp/p"]))

    async def known():
        return [entry.state for entry in await session.client.list() if entry.key == "one"]

    await session.until(known)
    assert await known() == [EntryState.STARTING]
    assert (await session.run("other", "echo fine")).stdout == b"fine\n"
    await session.client.signal("one", signal.SIGKILL, Scope.GROUP)
    await starting
    assert (await session.exited("one")).signal == 9


async def test_no_process_to_be_had(make_box):
    box = await make_box()
    session = await box.session()
    group = Path("/sys/fs/cgroup/pids") / box.folder.name
    if not group.parent.is_dir():
        pytest.skip("this machine has no cgroup of version 1 for pids")
    group.mkdir()
    try:
        (group / "cgroup.procs").write_text(str(box.pid))
        (group / "pids.max").write_text("1")
        assert await refused(session.start("one", ["true"])) == (Stage.FORK, "EAGAIN")
        assert await refused(session.client.dial(1)) == (Stage.FORK, "EAGAIN")
        (group / "pids.max").write_text("max")
        assert (await session.run("one", "true")).exit.status == 0
    finally:
        await box.stop()
        await session.until(lambda: not (group / "cgroup.procs").read_text())
        group.rmdir()


async def test_a_user_opens_its_own_pipes_by_name(session):
    command = "cat /dev/stdin > /dev/stdout; echo err > /dev/stderr"
    await session.start("one", ["bash", "-c", command], stdin=True, user="nobody")
    await session.client.stdin("one", session.box.feed("one", b"through"), True)
    assert (await session.exited("one")).status == 0
    assert session.box.output("one", "out") == b"through"
    assert session.box.output("one", "err") == b"err\n"


async def test_end_insists_on_a_group_that_outlives_its_leader_and_the_server(box):
    session = await box.session()
    stubborn = "(trap '' TERM; exec sleep 5151) >/dev/null 2>&1 & exec sleep 60"
    await session.start("one", ["bash", "-c", stubborn])
    look = "ps -A -o args= | grep -cx 'sleep 5151'; true"

    async def count(wanted: bytes) -> bool:
        session.looks = getattr(session, "looks", 0) + 1
        return (await session.run(f"look-{session.looks}", look)).stdout == wanted

    await session.until(lambda: count(b"1\n"))
    await session.client.end("one", Scope.GROUP, 1)
    assert (await session.exited("one")).status == 143
    await session.client.ack("one")
    assert await session.client.list() == []
    await session.client.close()
    session = await box.session()
    session.looks = 1000
    await session.until(lambda: count(b"0\n"))

    async def free() -> bool:
        try:
            await session.start("one", ["true"])
        except AgentError:
            return False
        return True

    await session.until(free)


async def test_end_of_a_process_leaves_its_group(session):
    await session.start("one", ["bash", "-c", "trap '' TERM; sleep 5252 & echo ready; while :; do sleep 0.01; done"])
    await session.has("one", b"ready\n")
    await session.client.end("one", Scope.PROCESS, 0.1)
    assert (await session.exited("one")).status == 137
    assert (await session.run("look", "ps -A -o args= | grep -x 'sleep 5252'")).exit.status == 0
    for key, scope in (("none", Scope.GROUP), ("one", Scope.PROCESS), ("one", 2)):
        with pytest.raises(AgentError):
            await session.client.end(key, scope, 1)


async def test_room_counts_executions_whose_pipes_are_held(session):
    before = await session.client.room()
    await session.run("one", "sleep 5353 & true")
    assert await session.client.room() == before - 1
    await session.run("two", "kill $(pgrep -x sleep)")

    async def again() -> bool:
        return await session.client.room() == before

    await session.until(again)

"""READ, WRITE, RENAME and UNLINK: the box's own look-ups and permissions, and nothing that blocks."""

import asyncio
import errno
import os
import signal
import stat
import time

import pytest

from devboxd.agent.client import AgentError
from devboxd.agent.protocol import Stage
from support.environments import PYTHON

pytestmark = [pytest.mark.anyio, pytest.mark.box]


async def refused(coroutine) -> tuple[Stage, str]:
    with pytest.raises(AgentError) as caught:
        await coroutine
    return caught.value.stage, errno.errorcode[caught.value.errno]


async def content(session, path: str, user: str = "root") -> bytes:
    opened = await session.client.read(user, path)
    assert not opened.pipe
    with os.fdopen(opened.fd, "rb") as file:
        return file.read()


async def pipe_content(fd: int) -> bytes:
    parts = []
    async with asyncio.timeout(10):
        while True:
            try:
                part = os.read(fd, 65536)
            except BlockingIOError:
                await asyncio.sleep(0.01)
                continue
            if not part:
                os.close(fd)
                return b"".join(parts)
            parts.append(part)


async def put(session, path: str, data: bytes, user: str = "root", mode: int = 0o644) -> bytes:
    target = await session.client.write(user, path, mode)
    assert not target.pipe
    with os.fdopen(target.fd, "wb") as file:
        file.write(data)
    await session.client.rename(user, target.temporary, target.target)
    return target.target


async def bash(session, command: str, user: str = "root") -> str:
    number = getattr(session, "count", 0)
    session.count = number + 1
    return (await session.run(f"bash-{number}", command, user=user)).stdout.decode()


async def holds(session, names: str) -> bool:
    """Whether /tmp holds exactly these files."""
    return await bash(session, "ls -A /tmp") == names


async def test_write_and_read(session):
    data = os.urandom(100_000)
    assert await put(session, "/tmp/new/deep/file", data, mode=0o640) == b"/tmp/new/deep/file"
    assert await content(session, "/tmp/new/deep/file") == data
    found = await bash(session, "stat -c '%a %U' /tmp/new /tmp/new/deep /tmp/new/deep/file; ls -A /tmp/new/deep")
    assert found == "755 root\n755 root\n640 root\nfile\n"


async def test_the_old_content_stays_until_the_rename(session):
    await put(session, "/tmp/file", b"old", mode=0o750)
    target = await session.client.write("root", "/tmp/file", 0o644)
    os.write(target.fd, b"half of the")
    os.close(target.fd)
    assert await content(session, "/tmp/file") == b"old"
    await session.client.unlink("root", target.temporary)
    assert await bash(session, "ls -A /tmp; stat -c %a /tmp/file") == "file\n750\n"
    await put(session, "/tmp/file", b"new")
    assert await bash(session, "cat /tmp/file; stat -c %a /tmp/file") == "new750\n"


async def test_names_start_at_the_home(make_box):
    box = await make_box("mkdir /tmp/home && mount --bind /tmp/home /root && chmod 755 /root")
    session = await box.session()
    assert await put(session, "a b", b"1") == b"/root/a b"
    assert await put(session, "~/c", b"2") == b"/root/c"
    assert await put(session, "~d", b"3") == b"/root/~d"
    assert await content(session, "x/../a b") == b"1" if await bash(session, "mkdir /root/x") == "" else None
    assert await put(session, "/tmp/./e/../f", b"4") == b"/tmp/f"
    name = bytes(range(1, 256)).replace(b"/", b"")
    assert await put(session, b"/tmp/" + name[:200], b"5") == b"/tmp/" + name[:200]


async def test_symbolic_links_are_followed(session):
    await bash(
        session, "mkdir /tmp/real; echo -n x > /tmp/real/file; ln -s real/file /tmp/link; ln -s real /tmp/folder"
    )
    await bash(session, "ln -s real/not-yet /tmp/dangling; ln -s /tmp/loop /tmp/loop; ln -s dangling /tmp/twice")
    await bash(session, "ln -s missing/deep/file /tmp/far")
    assert await content(session, "/tmp/link") == b"x"
    assert await put(session, "/tmp/link", b"y") == b"/tmp/real/file"
    assert await put(session, "/tmp/folder/other", b"y") == b"/tmp/real/other"
    assert await put(session, "/tmp/twice", b"z") == b"/tmp/real/not-yet"
    assert await put(session, "/tmp/far", b"z") == b"/tmp/missing/deep/file"
    assert await bash(session, "readlink /tmp/link /tmp/dangling") == "real/file\nreal/not-yet\n"
    assert await refused(session.client.read("root", "/tmp/loop")) == (Stage.OPEN, "ELOOP")
    assert await refused(session.client.write("root", "/tmp/loop")) == (Stage.OPEN, "ELOOP")


async def test_only_regular_files(session):
    await bash(
        session, "mkfifo /tmp/fifo; mkdir /tmp/dir; python3 -c \"import socket; socket.socket(1).bind('/tmp/sock')\""
    )
    for path, name in [
        ("/tmp/fifo", "EINVAL"),
        ("/tmp/dir", "EISDIR"),
        ("/tmp/sock", "EINVAL"),
        ("/dev/null", "EINVAL"),
    ]:
        assert await refused(session.client.read("root", path)) == (Stage.TYPE, name)
        assert await refused(session.client.write("root", path)) == (Stage.TYPE, name)
    assert await refused(session.client.write("root", "/tmp/new/")) == (Stage.TYPE, "EISDIR")


async def test_permissions_are_the_users(session):
    client = session.client
    await bash(
        session,
        "echo x > /tmp/secret; chmod 600 /tmp/secret; mkdir -m 755 /tmp/closed; install -m 666 /dev/null /tmp/open",
    )
    assert await refused(client.read("nobody", "/tmp/secret")) == (Stage.OPEN, "EACCES")
    assert await refused(client.write("nobody", "/tmp/secret")) == (Stage.OPEN, "EACCES")
    assert await refused(client.write("nobody", "/tmp/closed/file")) == (Stage.OPEN, "EACCES")
    assert await refused(client.write("nobody", "/tmp/closed/deep/file")) == (Stage.PARENTS, "EACCES")
    assert await refused(client.unlink("nobody", "/tmp/secret")) == (Stage.OPEN, "EPERM")
    assert await refused(client.rename("nobody", "/tmp/secret", "/tmp/mine")) == (Stage.RENAME, "EPERM")
    assert await refused(client.read("no-such-user", "/tmp/open")) == (Stage.USER, "ENOENT")
    await put(session, "/tmp/by-nobody", b"x", user="nobody")
    assert await bash(session, "stat -c %U:%G /tmp/by-nobody") == "nobody:nogroup\n"


async def test_what_is_not_there(session):
    client = session.client
    assert await refused(client.read("root", "/tmp/none")) == (Stage.OPEN, "ENOENT")
    assert await refused(client.read("root", "")) == (Stage.OPEN, "ENOENT")
    assert await refused(client.write("root", "")) == (Stage.OPEN, "ENOENT")
    assert await refused(client.unlink("root", "/tmp/none")) == (Stage.OPEN, "ENOENT")
    assert await refused(client.rename("root", "/tmp/none", "/tmp/x")) == (Stage.RENAME, "ENOENT")
    assert await refused(client.read("root", "/tmp/" + "x" * 300)) == (Stage.OPEN, "ENAMETOOLONG")
    assert await refused(client.read("root", "/tmp" + "/x" * 3000)) == (Stage.OPEN, "ENAMETOOLONG")
    assert await refused(client.read("root", "/tmp/a\0b")) == (Stage.DECODE, "EINVAL")
    assert await refused(client.write("root", "/tmp/a\0b")) == (Stage.DECODE, "EINVAL")
    await put(session, "/tmp/file", b"")
    assert (await refused(client.write("root", "/tmp/file/below")))[0] is Stage.PARENTS


async def test_procfs_is_read_and_written_by_a_child(session):
    opened = await session.client.read("root", "/proc/self/status")
    assert opened.pipe
    assert b"Name:\tdevboxd-init" in await pipe_content(opened.fd)
    target = await session.client.write("root", "/proc/sys/net/ipv4/ip_default_ttl")
    assert (target.pipe, target.temporary, target.target) == (True, b"", b"")
    os.write(target.fd, b"77\n")
    os.close(target.fd)
    command = "while [ $(cat /proc/sys/net/ipv4/ip_default_ttl) != 77 ]; do sleep 0.01; done; echo set"
    assert await bash(session, command) == "set\n"


async def test_a_leased_file_does_not_block(session):
    await put(session, "/tmp/leased", b"x")
    hold = "import fcntl,os,time,signal; signal.signal(29, signal.SIG_IGN); f=os.open('/tmp/leased',2);"
    hold += "fcntl.fcntl(f,1024,1); print('held',flush=True); time.sleep(60)"
    await session.start("lease", [PYTHON, "-c", hold])
    await session.until(lambda: session.box.output("lease", "out"))
    started = time.monotonic()
    assert await refused(session.client.read("root", "/tmp/leased", 1.0)) == (Stage.OPEN, "EAGAIN")
    assert time.monotonic() - started < 5


async def test_a_helper_past_its_deadline_is_killed(make_box):
    """A FIFO in the place of a user database must not block either; a stopped helper is past its deadline."""
    box = await make_box("mkfifo /tmp/fifo && mount --bind /tmp/fifo /etc/passwd")
    session = await box.session()
    assert await refused(session.client.read("root", "/tmp/x")) == (Stage.USER, "ENOENT")
    assert (await session.run("digits", "echo fine", user="0:0")).stdout == b"fine\n"


async def test_a_cancelled_request_leaks_nothing(session):
    await put(session, "/tmp/file", b"x")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        tasks = [asyncio.create_task(session.client.read("root", "/tmp/file"))]
        tasks.append(asyncio.create_task(session.client.write("root", "/tmp/other")))
        await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)
    await session.client.list()
    await session.until(lambda: holds(session, "file\n"))
    assert len(os.listdir("/proc/self/fd")) <= before


async def test_a_lost_server_leaves_no_temporary_file(box):
    """What the agent could not deliver it removes; it is held meanwhile, so that it delivers nothing."""
    first = await box.session()
    os.kill(box.pid, signal.SIGSTOP)
    tasks = [asyncio.create_task(first.client.write("root", f"/tmp/{n}")) for n in range(10)]
    await asyncio.sleep(0)
    await first.client.close()
    os.kill(box.pid, signal.SIGCONT)
    await asyncio.wait(tasks)
    second = await box.session()
    for task in tasks:
        assert isinstance(task.exception(), ConnectionError)
    await second.until(lambda: holds(second, ""))


async def test_a_server_that_is_lost_before_the_rename_leaves_no_temporary_file(box):
    first = await box.session()
    await put(first, "/tmp/kept", b"old")
    targets = [await first.client.write("root", "/tmp/kept"), await first.client.write("nobody", "/tmp/new")]
    for target in targets:
        os.write(target.fd, b"half of the")
        os.close(target.fd)
    await first.client.close()
    second = await box.session()
    await second.until(lambda: holds(second, "kept\n"))
    assert await content(second, "/tmp/kept") == b"old"


async def test_what_was_renamed_or_is_executed_outlives_the_server(box):
    first = await box.session()
    await put(first, "/tmp/program", b"#!/bin/bash\necho ran\n", mode=0o755)
    assert await bash(first, "/tmp/program") == "ran\n", "nobody has it open for writing"
    await first.client.close()
    second = await box.session()
    assert await content(second, "/tmp/program") == b"#!/bin/bash\necho ran\n"


async def test_more_files_than_are_looked_after_are_written_all_the_same(session):
    targets = [await session.client.write("root", f"/tmp/{n:02}") for n in range(40)]
    for target in targets:
        os.close(target.fd)
        await session.client.rename("root", target.temporary, target.target)
    assert await holds(session, "".join(f"{n:02}\n" for n in range(40)))
    assert await content(session, "/tmp/39") == b""


async def test_many_at_once_are_bounded_but_answered(session):
    await put(session, "/tmp/file", b"x")
    results = await asyncio.gather(
        *(session.client.read("root", "/tmp/file") for _ in range(300)), return_exceptions=True
    )
    opened = [r for r in results if not isinstance(r, BaseException)]
    for one in opened:
        os.close(one.fd)
    assert len(opened) >= 64
    refusals = [r for r in results if isinstance(r, BaseException)]
    assert all(isinstance(r, AgentError) and (r.stage, r.errno) == (Stage.BUSY, errno.EAGAIN) for r in refusals)
    assert await content(session, "/tmp/file") == b"x"
    assert stat.S_ISREG(os.stat("/etc/passwd").st_mode)

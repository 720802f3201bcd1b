"""Sleep: the disk stays, the processes end after the hooks, or are frozen for a while."""

from __future__ import annotations

import os
import random
import shlex
import signal
import subprocess
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from devboxd.executions.shells import shell_key
from support.api import Api
from support.casualties import end_sleeps
from support.disks import upper
from support.reader import Reader
from support.server import Server

pytestmark = pytest.mark.box
RECORDS = f"/run/devboxd/s/{shell_key('s')}"


def suspend(api: Api, box: str) -> None:
    api.call("POST", f"/v1/devboxes/{box}/suspend")
    api.wait_box(box, "suspended")


def resume(api: Api, box: str) -> None:
    api.call("POST", f"/v1/devboxes/{box}/resume")
    api.wait_box(box, "running")


@pytest.fixture(scope="module")
def freezing() -> Iterator[Server]:
    """A server that keeps the memory of suspended devboxes for a while."""
    server = Server(suspend_keep_memory_seconds="600")
    try:
        yield server.start()
    finally:
        server.stop()


def test_a_named_shell_goes_on_from_its_record(own_server: Server) -> None:
    def say(command: str) -> str:
        return str(api.run(box, command, shell_name="a name of it's own")["stdout"])

    with own_server.api() as api:
        box = api.create()
        say("cd /tmp; export SECRET='it''s \"$HOME\"'; alias hi='echo hi'; set -o pipefail; x=1")
        say('f() { echo "f of $1"; }')
        snapshot = api.call("POST", f"/v1/devboxes/{box}/snapshot_disk", {})["id"]
        suspend(api, box)
        (record,) = (own_server.state / "shells" / box).iterdir()
        assert record.stat().st_mode & 0o777 == 0o600
        assert b"SECRET" in record.read_bytes()
        with upper(own_server.state, snapshot) as one, upper(own_server.state, box) as other:
            command = ["grep", "-rl", "SECRET", one, other]
            assert subprocess.run(command, capture_output=True, text=True, check=False).stdout == "", "it is on a disk"
        own_server.restart()
        resume(api, box)
        assert say('pwd; echo "$SECRET"; hi; f 2; set -o | grep -c "pipefail.*on"; echo ${x-}; export SECRET=new') == (
            '/tmp\nits "$HOME"\nhi\nf of 2\n1\n\n'
        )
        assert api.run(box, "echo ${SECRET-none}", shell_name="another")["stdout"] == "none\n"
        say("kill -9 $$")
        assert say("echo $SECRET") == "new\n", "what came after the resume counts more"
        for _ in range(2):
            suspend(api, box)
            resume(api, box)
            assert say("echo $SECRET $PWD") == "new /tmp\n"
        api.shutdown(box)
        api.wait_box(box, "shutdown")
        while record.parent.exists():
            time.sleep(0.05)


@pytest.mark.parametrize("record", ["", "# 1\n", "# 9\nexport X=1\n", "exit\n#end\n", "# 1x\n#end\n", "# -1\n#end\n"])
def test_what_is_no_whole_record_is_not_kept(api: Api, server: Server, record: str) -> None:
    box = api.create()
    api.run(box, "true", shell_name="s")
    written = api.run(box, f"cd {RECORDS} && rm -f 0 1 && printf %b {shlex.quote(record)} >0")
    assert written["exit_status"] == 0
    suspend(api, box)
    assert [path.read_text() for path in (server.state / "shells").glob(f"{box}/*")] == []
    resume(api, box)
    assert api.run(box, "echo ${X-none}", shell_name="s")["stdout"] == "none\n"
    api.shutdown(box)


def test_records_of_all_shells_together_are_bounded(api: Api, server: Server) -> None:
    """What is too much is not kept, and what comes after it and fits is."""
    box = api.create()
    fill = "rm -f $1/[01] && { echo '# 9'; head -c $2 /dev/zero | tr '\\0' '#'; echo; echo '#end'; } >$1/0"

    def fill_all(sizes: list[int]) -> None:
        for number, size in enumerate(sizes):
            api.run(box, "true", shell_name=f"s{number}")
            folder = f"/run/devboxd/s/{shell_key(f's{number}')}"
            assert api.run(box, f"bash -c {shlex.quote(fill)} - {folder} {size}")["exit_status"] == 0

    fill_all([4_000_000] * 5 + [100_000])
    suspend(api, box)
    kept = sorted(path.stat().st_size for path in (server.state / "shells" / box).iterdir())
    assert [size // 100_000 for size in kept] == [1, 40, 40, 40, 40]
    assert "the state of a named shell is not kept" in server.tail()
    resume(api, box)
    fill_all([4_000_000] * 6)
    suspend(api, box)
    assert len(list((server.state / "shells" / box).iterdir())) == 4, "an older one is not kept in place of a newer"
    api.shutdown(box)


@pytest.mark.parametrize("make", ["mkfifo 0 && ln -s /etc/shadow 1", r"printf '# 7\nX=\x27; exit 3; \x27\n#end\n' >1"])
def test_a_hostile_record_hinders_nothing(api: Api, make: str) -> None:
    """It may be anything that the box can write; the shell begins all the same."""
    box = api.create()
    api.run(box, "true", shell_name="s")
    assert api.run(box, f"cd {RECORDS} && rm -f 0 1 && {make}")["exit_status"] == 0
    suspend(api, box)
    resume(api, box)
    assert api.run(box, "echo whole", shell_name="s")["stdout"] == "whole\n"
    api.shutdown(box)


def test_the_disk_stays_and_processes_end(api: Api) -> None:
    launch = {"launch_commands": ["echo launched >>~/launches"]}
    box = api.create(launch_parameters=launch, file_mounts={"/tmp/mounted": "as made"}, entrypoint="sleep 1000")
    api.run(box, "echo kept >/tmp/t; echo mine >/tmp/mounted")
    address = api.output(box, "hostname -i; hostname")
    running = api.start(box, "echo said; sleep 1000")
    with api.stream(box, running) as events:
        next(events)
    suspend(api, box)
    view = api.wait(box, running)
    assert (view["status"], view["exit_status"], view["stdout"]) == ("completed", 137, "said\n")
    for refusal in ("execute_async", "execute"):
        assert "resume" in api.refused(
            "POST", f"/v1/devboxes/{box}/{refusal}", 400, {"command": "true", "command_id": "c"}
        )
    assert "already" in api.refused("POST", f"/v1/devboxes/{box}/suspend", 400)
    resume(api, box)
    assert "not suspended" in api.refused("POST", f"/v1/devboxes/{box}/resume", 400)
    assert api.output(box, "cat /tmp/t /tmp/mounted ~/launches") == "kept\nmine\nlaunched\nlaunched\n"
    assert api.output(box, "hostname -i; hostname") == address
    assert api.output(box, "pgrep -fc 'sleep [1]000'") == "1\n", "the entrypoint runs, and nothing else"
    statuses = [step["status"] for step in api.box(box)["state_transitions"]]
    life = ["provisioning", "initializing", "running"]
    assert statuses == [*life, "suspending", "suspended", *life]
    api.shutdown(box)


def test_a_resume_on_another_network_tells_the_box(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its resolvers and its own name are written anew, unless somebody in it wrote them differently."""
    server = Server(dns_servers="192.0.2.53")
    try:
        with server.start().api() as api:
            box, own = api.create(), api.create()
            assert api.output(box, "cat /etc/resolv.conf").startswith("nameserver 192.0.2.53\n")
            api.run(own, "echo nameserver 198.51.100.1 | sudo tee /etc/resolv.conf")
            api.run(own, "sudo mkdir -p /tmp/etc; sudo mv /etc/hosts /tmp/etc/; sudo ln -s /tmp/etc/hosts /etc/hosts")
            for one in (box, own):
                suspend(api, one)
            server.terminate()
            monkeypatch.setenv("DEVBOXD_DNS_SERVERS", "192.0.2.54")
            server.settings.pop("DEVBOXD_DNS_SERVERS")
            server.start()
            for _ in range(2):
                for one in (box, own):
                    resume(api, one)
                assert api.output(box, "cat /etc/resolv.conf").startswith("nameserver 192.0.2.54\n")
                assert api.output(own, "cat /etc/resolv.conf") == "nameserver 198.51.100.1\n"
                assert api.output(own, "readlink /etc/hosts") == "/tmp/etc/hosts\n"
                for one in (box, own):
                    suspend(api, one)
    finally:
        server.stop()


def test_hooks_run_before_and_their_failures_stop_nothing(api: Api) -> None:
    hooks = {"suspend_commands": ["exit 3", "echo hooked >~/hooked; id -un >>~/hooked"]}
    box = api.create(launch_parameters={"lifecycle": {"lifecycle_hooks": hooks}})
    suspend(api, box)
    resume(api, box)
    assert api.output(box, "cat ~/hooked") == "hooked\nuser\n"
    api.shutdown(box)


def test_hooks_have_a_deadline(api: Api) -> None:
    hooks = {"suspend_commands": ["sleep 1000", "touch ~/never"], "suspend_deadline_ms": 200}
    box = api.create(launch_parameters={"lifecycle": {"lifecycle_hooks": hooks}})
    suspend(api, box)
    resume(api, box)
    assert api.run(box, "ls ~/never")["exit_status"] != 0
    api.shutdown(box)


def test_a_suspended_devbox_can_be_shut_down(api: Api, server: Server) -> None:
    box = api.create()
    suspend(api, box)
    assert (server.state / "disks" / box).exists()
    api.shutdown(box)
    assert "ended" in api.refused("POST", f"/v1/devboxes/{box}/resume", 400)
    assert "ended" in api.refused("POST", f"/v1/devboxes/{box}/suspend", 400)


def test_a_suspended_devbox_survives_restarts_of_the_server(own_server: Server) -> None:
    with own_server.api() as api:
        box, hasty = api.create(), api.create()
        api.run(box, "echo kept >/tmp/t; sync")
        suspend(api, box)
        api.call("POST", f"/v1/devboxes/{hasty}/suspend")
    own_server.kill()
    own_server.start()
    with own_server.api() as api:
        api.wait_box(hasty, "suspended")
        assert api.box(box)["status"] == "suspended"
        api.call("POST", f"/v1/devboxes/{box}/resume")
    own_server.kill()
    own_server.start()
    with own_server.api() as api:
        api.wait_box(box, "running")
        assert api.output(box, "cat /tmp/t") == "kept\n"


def test_a_devbox_that_cannot_be_resumed_sleeps_on(api: Api) -> None:
    box = api.create(launch_parameters={"launch_commands": ["test ! -e /tmp/broken"]})
    api.run(box, "touch /tmp/broken; echo kept >~/f")
    suspend(api, box)
    api.call("POST", f"/v1/devboxes/{box}/resume")
    view = api.wait_box(box, "suspended")
    while view["state_transitions"][-1]["failure_reason"] is None:  # asked before the resume had begun
        view = api.wait_box(box, "suspended")
    assert "launch command 1 of 1" in view["state_transitions"][-1]["failure_reason"]
    assert view["failure_reason"] is None
    api.shutdown(box)


def test_frozen_processes_go_on_where_they_were(freezing: Server) -> None:
    with freezing.api() as api:
        box = api.create()
        execution = api.start(box, "n=0; while read -r line; do n=$((n + 1)); echo $n $line; done", attach_stdin=True)
        api.send(box, execution, "before\n")
        Reader(freezing, box, execution).until(lambda reader: reader.text == "1 before\n")
        suspend(api, box)
        assert api.box(box)["status"] == "suspended"
        assert "resume" in api.refused("POST", f"/v1/devboxes/{box}/execute_async", 400, {"command": "true"})
        view = api.call("POST", f"/v1/devboxes/{box}/resume")
        assert view["status"] == "running"
        assert api.send(box, execution, "after\n")
        api.call("POST", f"/v1/devboxes/{box}/executions/{execution}/send_std_in", {"signal": "EOF"})
        assert api.wait(box, execution)["stdout"] == "1 before\n2 after\n"
        suspend(api, box)
        api.shutdown(box)


def test_frozen_processes_outlive_the_server(freezing: Server) -> None:
    with freezing.api() as api:
        box = api.create()
        execution = api.start(box, "read -r line; echo got $line", attach_stdin=True)
        suspend(api, box)
    freezing.kill()
    freezing.start()
    with freezing.api() as api:
        assert api.call("POST", f"/v1/devboxes/{box}/resume")["status"] == "running"
        assert api.send(box, execution, "it\n")
        assert api.wait(box, execution)["stdout"] == "got it\n"
        api.shutdown(box)


@pytest.mark.parametrize("memory_s", ["0", "600"])
@pytest.mark.parametrize("death", [signal.SIGKILL, signal.SIGTERM])
def test_a_suspend_goes_on_where_a_server_ended(memory_s: str, death: signal.Signals) -> None:
    """What its commands did meanwhile counts, the hooks that were left run, and its shells are kept."""
    hooks = {"suspend_commands": ["touch ~/begun; sleep 7301; true", "echo hooked >~/hooked"]}
    server = Server(suspend_keep_memory_seconds=memory_s)
    try:
        with server.start().api() as api:
            box = api.create(launch_parameters={"lifecycle": {"lifecycle_hooks": hooks}})
            api.run(box, "cd /tmp; export X=kept", shell_name="s")
            execution = api.start(box, "echo before; sleep 7302; echo after; exit 7")
            Reader(server, box, execution).until(lambda reader: reader.text == "before\n")
            api.call("POST", f"/v1/devboxes/{box}/suspend")
            with upper(server.state, box) as folder:
                while not (folder / "home/user/begun").exists():
                    time.sleep(0.01)
            (server.terminate if death is signal.SIGTERM else server.kill)()
            end_sleeps(box, "7301", "7302")
            server.start()
            api.wait_box(box, "suspended")
            if memory_s != "0":
                resume(api, box)
            view = api.wait(box, execution)
            assert (view["exit_status"], view["stdout"]) == (7, "before\nafter\n")
            if memory_s == "0":
                resume(api, box)
            assert api.output(box, "cat ~/hooked") == "hooked\n"
            assert api.run(box, "echo $X $PWD", shell_name="s")["stdout"] == "kept /tmp\n"
    finally:
        server.stop()


def test_after_the_grace_frozen_processes_end_and_the_disk_stays() -> None:
    server = Server(suspend_keep_memory_seconds="1")
    try:
        with server.start().api() as api:
            box = api.create()
            execution = api.start(box, "echo kept >~/f; echo there; sleep 1000")
            Reader(server, box, execution).until(lambda reader: reader.text == "there\n")
            suspend(api, box)
            assert api.wait(box, execution)["exit_status"] == 137
            resume(api, box)
            assert api.output(box, "cat ~/f") == "kept\n"
    finally:
        server.stop()


@pytest.mark.parametrize("memory_s", ["0", "600"])
def test_a_repeated_suspend_or_resume_is_done_once(memory_s: str) -> None:
    """Whatever came in between: other changes, repeats at the same moment, the death of the server."""
    chance = random.Random(os.environ["CRASH_SEED"])
    server = Server(suspend_keep_memory_seconds=memory_s)
    try:
        with server.start().api() as api, ThreadPoolExecutor(3) as clients:
            box = api.create()
            answers: dict[tuple[str, str], bytes] = {}

            def ask(request: tuple[str, str]) -> httpx.Response:
                verb, request_id = request
                return api.http.post(f"/v1/devboxes/{box}/{verb}", headers={"x-request-id": request_id})

            deadly = chance.randrange(4)
            for number, (verb, status) in enumerate(2 * (("suspend", "suspended"), ("resume", "running"))):
                new = (verb, str(uuid.uuid4()))
                found = [answer.content for answer in clients.map(ask, [new] * chance.randint(1, 3))]
                answers[new] = found[0]
                assert set(found) == {answers[new]}, new
                if number == deadly:
                    server.restart()
                for request in chance.choices(list(answers), k=3):
                    again = ask(request)
                    assert (again.status_code, again.content) == (200, answers[request]), request
                assert api.wait_box(box, status)["status"] == status
                assert api.refused("POST", f"/v1/devboxes/{box}/{verb}", 400).startswith(f"cannot {verb} the devbox")
            statuses = [transition["status"] for transition in api.box(box)["state_transitions"]]
            assert [statuses.count(status) for status in ("suspending", "suspended", "running")] == [2, 2, 3]
            api.shutdown(box)
            for request, answer in answers.items():
                assert ask(request).content == answer, "it was done, though the devbox has ended since"
    finally:
        server.stop()

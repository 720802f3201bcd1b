"""Executions over HTTP in real boxes, line by line of what is promised."""

from __future__ import annotations

import concurrent.futures
import time
import uuid

import pytest

from support.api import Api

pytestmark = pytest.mark.box


def view_of(api: Api, box: str, **body: object) -> dict[str, object]:
    return api.call("POST", f"/v1/devboxes/{box}/execute", {"command_id": str(uuid.uuid4()), **body})


# -- starting and ending


def test_output_and_exit_code(api: Api, box: str) -> None:
    view = api.run(box, "echo out; echo err >&2; exit 42")
    assert (view["exit_status"], view["stdout"], view["stderr"]) == (42, "out\n", "err\n")
    assert (view["stdout_truncated"], view["stderr_truncated"]) == (False, False)
    assert api.run(box, "true")["stdout"] == ""


def test_a_login_shell_of_the_user_in_its_home(api: Api, box: str) -> None:
    assert api.output(box, 'echo "$USER $HOME $PWD"; shopt login_shell | cut -f2; echo {1..3}') == (
        "user /home/user /home/user\non\n1 2 3\n"
    )


def test_commands_run_side_by_side(api: Api, box: str) -> None:
    """Each waits for the other: one after the other they would never end."""
    first = api.start(box, "mkfifo /tmp/side; echo a >/tmp/side; echo done")
    second = api.start(box, "until [ -p /tmp/side ]; do :; done; cat /tmp/side")
    assert api.wait(box, first)["stdout"] == "done\n"
    assert api.wait(box, second)["stdout"] == "a\n"


def test_without_attached_stdin_a_command_reads_its_end(api: Api, box: str) -> None:
    assert api.output(box, "cat; echo over") == "over\n"


def test_each_command_has_a_session_and_a_group_of_its_own(api: Api, box: str) -> None:
    pid, group, session = api.output(box, "echo $(ps -o pid=,pgid=,sid= -p $$)").split()
    assert pid == group == session


def test_it_completes_with_its_own_process_and_later_output_is_not_lost(api: Api, box: str) -> None:
    execution = api.start(box, "(until [ -e /tmp/go ]; do sleep 0.01; done; echo late; touch /tmp/late) & echo early")
    view = api.wait(box, execution)
    assert (view["stdout"], view["exit_status"]) == ("early\n", 0)
    api.output(box, "touch /tmp/go; until [ -e /tmp/late ]; do sleep 0.01; done")
    assert api.execution(box, execution)["stdout"] == "early\n"
    assert api.streamed(box, execution) == "early\nlate\n"


def test_a_command_that_kills_itself_shows_128_and_the_signal(api: Api, box: str) -> None:
    assert api.run(box, "kill -9 $$")["exit_status"] == 137
    assert api.run(box, "kill -SEGV $$")["exit_status"] == 139


def test_truncating_stdout_of_another_name_loses_nothing(api: Api, box: str) -> None:
    assert api.output(box, "echo a; echo b > /dev/stdout; echo c > /proc/self/fd/1") == "a\nb\nc\n"


def test_a_running_execution_shows_what_it_wrote_so_far(api: Api, box: str) -> None:
    execution = api.start(box, "echo first; cat", attach_stdin=True)
    with api.stream(box, execution) as events:
        assert next(events).output == "first\n"
    view = api.execution(box, execution)
    assert (view["status"], view["stdout"], view["exit_status"]) == ("running", "first\n", None)
    assert api.send(box, execution, signal="EOF")
    assert api.wait(box, execution)["exit_status"] == 0


# -- execute, execute_sync


def test_execute_is_done_once_per_command_id(api: Api, box: str) -> None:
    identity = str(uuid.uuid4())
    path = f"/v1/devboxes/{box}/execute"
    body = {"command": "echo x >> /tmp/once; cat /tmp/once", "command_id": identity}
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        views = list(pool.map(lambda _: api.call("POST", path, body), range(4)))
    assert {view["execution_id"] for view in views} == {identity}
    assert {view["stdout"] for view in views} == {"x\n"}
    message = api.refused("POST", path, 409, {"command": "echo other", "command_id": identity})
    assert identity in message


def test_execute_returns_a_running_command_after_its_timeout(api: Api, box: str) -> None:
    view = view_of(api, box, command="echo begun; cat /dev/zero >/dev/null", optimistic_timeout=0.2)
    assert (view["status"], view["exit_status"]) == ("running", None)
    path = f"/v1/devboxes/{box}/executions/{view['execution_id']}/kill"
    assert api.call("POST", path)["status"] == "completed"


def test_execute_sync_gives_the_outcome(api: Api, box: str) -> None:
    view = api.call("POST", f"/v1/devboxes/{box}/execute_sync", {"command": "echo a; echo b >&2; exit 3"})
    assert view == {"devbox_id": box, "stdout": "a\n", "stderr": "b\n", "exit_status": 3, "shell_name": None}


@pytest.mark.parametrize("path", ["execute", "execute_sync"])
def test_waiting_commands_take_no_stdin(api: Api, box: str, path: str) -> None:
    assert "execute_async" in api.refused(
        "POST", f"/v1/devboxes/{box}/{path}", 400, {"command": "a", "attach_stdin": True}
    )


# -- what is shown of output


def test_the_last_lines(api: Api, box: str) -> None:
    execution = api.start(box, "for i in {1..1000}; do echo line $i; echo err $i >&2; done")
    view = api.wait(box, execution)
    assert view["stdout"].splitlines() == [f"line {i}" for i in range(901, 1001)]
    assert (view["stdout_truncated"], view["stderr_truncated"]) == (True, True)
    short = api.execution(box, execution, last_n="3")
    assert short["stderr"] == "err 998\nerr 999\nerr 1000\n"
    whole = api.execution(box, execution, last_n="1000")
    assert (len(whole["stdout"].splitlines()), whole["stdout_truncated"]) == (1000, False)
    assert api.streamed(box, execution).splitlines() == [f"line {i}" for i in range(1, 1001)]


def test_a_view_is_at_most_a_mebibyte_and_a_stream_is_whole(api: Api, box: str) -> None:
    execution = api.start(box, "head -c 5000000 /dev/zero | tr '\\0' x")
    view = api.wait(box, execution)
    assert view["stdout_truncated"] is True
    assert 0 < len(view["stdout"]) <= 1 << 20
    assert len(api.streamed(box, execution)) == 5_000_000


def test_bytes_that_are_not_text_are_replaced_and_count(api: Api, box: str) -> None:
    execution = api.start(box, r"printf 'a\xff\xfeb\xe2\x82'; sleep 0.05; printf '\xac!\n'")
    assert api.wait(box, execution)["stdout"] == "a\ufffd\ufffdb€!\n"
    with api.stream(box, execution) as events:
        found = list(events)
    assert "".join(event.output for event in found) == "a\ufffd\ufffdb€!\n"


def test_a_stream_can_be_opened_at_any_byte(api: Api, box: str) -> None:
    execution = api.start(box, "seq 1 10000")
    api.wait(box, execution)
    whole = api.streamed(box, execution)
    assert whole == "".join(f"{i}\n" for i in range(1, 10001))
    for offset in (0, 1, 7, len(whole) - 1, len(whole)):
        assert api.streamed(box, execution, offset=offset) == whole[offset:]
    assert api.streamed(box, execution, offset=10**9) == ""


def test_output_streams_as_it_comes(api: Api, box: str) -> None:
    execution = api.start(box, "echo immediate; cat; echo delayed", attach_stdin=True)
    with api.stream(box, execution, offset=0) as events:
        first = next(events)
        assert (first.output, first.offset) == ("immediate\n", 0)
        marker = next(events)
        assert (marker.output, marker.offset) == ("", 10)
        api.send(box, execution, signal="EOF")
        assert [(e.output, e.offset) for e in events if e.output] == [("delayed\n", 10)]


# -- stdin


def test_texts_arrive_in_order_and_eof_comes_after_them(api: Api, box: str) -> None:
    execution = api.start(box, "cat", attach_stdin=True)
    assert api.send(box, execution, "first\n")
    assert api.send(box, execution, "second\n")
    assert api.send(box, execution, signal="EOF")
    assert not api.send(box, execution, "third\n")
    view = api.wait(box, execution)
    assert (view["stdout"], view["exit_status"]) == ("first\nsecond\n", 0)
    assert not api.send(box, execution, "fourth\n")


def test_stdin_that_was_not_attached_takes_nothing(api: Api, box: str) -> None:
    execution = api.start(box, "sleep 60")
    assert not api.send(box, execution, "text")
    assert not api.send(box, execution, signal="EOF")
    api.call("POST", f"/v1/devboxes/{box}/executions/{execution}/kill")


def test_a_reader_that_is_gone_takes_nothing(api: Api, box: str) -> None:
    execution = api.start(box, "exec <&-; echo closed; sleep 60", attach_stdin=True)
    with api.stream(box, execution) as events:
        next(events)
    assert not api.send(box, execution, "text")
    api.call("POST", f"/v1/devboxes/{box}/executions/{execution}/kill")


def test_stdin_is_bounded_ahead_of_its_reader(api: Api, box: str) -> None:
    """64 MiB wait for a reader; what is refused then is not taken, what was taken arrives."""
    execution = api.start(box, "read -r go < <(sleep 1000 & cat /tmp/gate); sha256sum", attach_stdin=True)
    text = "x" * (8 << 20)
    taken = 0
    while api.send(box, execution, text):
        taken += 1
        assert taken <= 9
    assert taken == 8
    api.call("POST", f"/v1/devboxes/{box}/executions/{execution}/kill", {"kill_process_group": True})


def test_senders_do_not_mix(api: Api, box: str) -> None:
    execution = api.start(box, "sort | uniq -c", attach_stdin=True)
    texts = [f"{letter * 5000}\n" for letter in "abcdefgh"] * 5
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda text: api.send(box, execution, text), texts))
    api.send(box, execution, signal="EOF")
    lines = api.wait(box, execution)["stdout"].split()
    assert lines == [word for letter in "abcdefgh" for word in ("5", letter * 5000)]


def test_the_same_request_is_delivered_once(api: Api, box: str) -> None:
    execution = api.start(box, "cat", attach_stdin=True)
    headers = {"x-request-id": str(uuid.uuid4())}
    for _ in range(3):
        assert api.send(box, execution, "once\n", headers=headers)
    api.send(box, execution, signal="EOF")
    assert api.wait(box, execution)["stdout"] == "once\n"
    path = f"/v1/devboxes/{box}/executions/{execution}/send_std_in"
    other = api.http.post(path, json={"text": "other"}, headers=headers)
    assert (other.status_code, other.headers["x-should-retry"]) == (409, "false")


def test_interrupt_reaches_the_group(api: Api, box: str) -> None:
    execution = api.start(
        box, "trap 'echo caught; exit 7' INT; echo ready; while :; do sleep 0.05; done", attach_stdin=True
    )
    with api.stream(box, execution) as events:
        next(events)
        assert api.send(box, execution, signal="INTERRUPT")
    view = api.wait(box, execution)
    assert (view["exit_status"], view["stdout"]) == (7, "ready\ncaught\n")
    plain = api.start(box, "echo ready; sleep 60; echo no", attach_stdin=True)
    with api.stream(box, plain) as events:
        next(events)
    assert api.send(box, plain, signal="INTERRUPT")
    assert api.wait(box, plain)["exit_status"] == 130


# -- kill


def test_kill_ends_the_process_and_leaves_its_children(api: Api, box: str) -> None:
    execution = api.start(box, "sleep 61 & echo $!; wait; echo no")
    with api.stream(box, execution) as events:
        child = next(events).output.strip()
    view = api.call("POST", f"/v1/devboxes/{box}/executions/{execution}/kill")
    assert (view["status"], view["exit_status"]) == ("completed", 143)
    assert api.run(box, f"kill -0 {child}")["exit_status"] == 0
    api.output(box, f"kill {child}")


@pytest.mark.parametrize("command", ["exec 1>&-; {}", "cd /tmp && {}", "{}", "true; {}; echo no", "trap '' INT; {}"])
def test_kill_ends_the_program_for_which_the_shell_waits(api: Api, box: str, command: str) -> None:
    execution = api.start(box, "sleep 62.5 & " + command.format("sleep 61.5"))
    while api.run(box, "pgrep -fx 'sleep 61.5'")["exit_status"] != 0:
        pass  # until it has begun
    view = api.call("POST", f"/v1/devboxes/{box}/executions/{execution}/kill")
    assert (view["status"], view["exit_status"]) == ("completed", 143)
    assert api.run(box, "pgrep -fx 'sleep 61.5'")["exit_status"] == 1
    api.output(box, "pkill -fx 'sleep 62.5'")  # a job in the background is spared


@pytest.mark.parametrize("group", [False, True])
@pytest.mark.parametrize("shell", [{}, {"shell_name": "killed"}])
@pytest.mark.parametrize(
    "command",
    [
        "printf 'sleep 61.5\\ntrue\\n' >/tmp/run.sh; bash /tmp/run.sh",
        "sudo sleep 61.5",
        "sudo sh -c 'sleep 61.5; true' | cat",
        "echo 61.5 | xargs -P 2 -n 1 sleep",
        "(true | (sleep 61.5; true) | cat)",
        "timeout 100 sleep 61.5",
        'python3 -c \'import subprocess; subprocess.run(["sleep", "61.5"])\'',
    ],
)
def test_kill_ends_all_that_a_command_waits_for(
    api: Api, box: str, command: str, shell: dict[str, str], group: bool
) -> None:
    execution = api.start(box, f"{command}; true", **shell)
    while api.run(box, "pgrep -fx 'sleep 61.5'")["exit_status"] != 0:
        pass  # until it has begun
    view = api.call("POST", f"/v1/devboxes/{box}/executions/{execution}/kill", {"kill_process_group": group})
    assert (view["status"], view["exit_status"]) == ("completed", 143)
    assert api.run(box, "pgrep -fx 'sleep 61.5'")["exit_status"] == 1


def test_the_last_words_of_what_a_kill_takes_along_are_in_the_view(api: Api, box: str) -> None:
    child = "trap 'sleep 0.5; echo bye; exit' TERM; echo ready; while :; do sleep 0.01; done"
    execution = api.start(box, f'bash -c "{child}"; true')
    with api.stream(box, execution) as events:
        next(events)
    view = api.call("POST", f"/v1/devboxes/{box}/executions/{execution}/kill")
    assert (view["exit_status"], view["stdout"]) == (143, "ready\nbye\n")


def test_kill_insists_on_a_program_that_ignores_it(api: Api, box: str) -> None:
    execution = api.start(
        box, "python3 -c 'import signal as s; s.signal(15, s.SIG_IGN); print(1, flush=True); s.pause()'"
    )
    with api.stream(box, execution) as events:
        next(events)
    api.call("POST", f"/v1/devboxes/{box}/executions/{execution}/kill")
    assert api.run(box, "pgrep -f signal.as.s")["exit_status"] == 1


def test_kill_of_the_group_ends_the_children_too(api: Api, box: str) -> None:
    execution = api.start(box, "(trap 'sleep 0.2; exit' TERM; while :; do sleep 0.05; done) & echo $$; wait; echo no")
    with api.stream(box, execution) as events:
        group = next(events).output.strip()
    view = api.call("POST", f"/v1/devboxes/{box}/executions/{execution}/kill", {"kill_process_group": True})
    assert view["exit_status"] == 143
    assert api.run(box, f"kill -0 -- -{group}")["exit_status"] == 1, "somebody of the group was still there"


@pytest.mark.parametrize("output", ["", ">/dev/null 2>&1"])
def test_kill_of_the_group_insists_on_those_that_outlive_their_leader(api: Api, box: str, output: str) -> None:
    execution = api.start(box, f"(trap '' TERM; while :; do sleep 0.1; done) {output} & echo $!; wait; echo no")
    with api.stream(box, execution) as events:
        child = next(events).output.strip()
    view = api.call("POST", f"/v1/devboxes/{box}/executions/{execution}/kill", {"kill_process_group": True})
    assert view["exit_status"] == 143
    assert api.run(box, f"while kill -0 {child} 2>/dev/null; do sleep 0.1; done")["exit_status"] == 0


def test_kill_insists_after_a_grace(api: Api, box: str) -> None:
    execution = api.start(box, "trap '' TERM; echo ready; while :; do sleep 1; done")
    with api.stream(box, execution) as events:
        next(events)
    view = api.call("POST", f"/v1/devboxes/{box}/executions/{execution}/kill")
    assert (view["status"], view["exit_status"]) == ("completed", 137)


def test_kill_of_an_ended_execution_changes_nothing(api: Api, box: str) -> None:
    view = api.run(box, "exit 5")
    again = api.call("POST", f"/v1/devboxes/{box}/executions/{view['execution_id']}/kill")
    assert again["exit_status"] == 5


# -- waiting


def test_a_wait_ends_with_408_that_asks_to_retry(api: Api, box: str) -> None:
    execution = api.start(box, "sleep 63")
    path = f"/v1/devboxes/{box}/executions/{execution}/wait_for_status"
    begun = time.monotonic()
    answer = api.http.post(path, json={"statuses": ["completed"], "timeout_seconds": 0.3})
    assert time.monotonic() - begun >= 0.3
    assert (answer.status_code, answer.headers["x-should-retry"]) == (408, "true")
    assert api.call("POST", path, {"statuses": ["running", "completed"]})["status"] == "running"
    api.call("POST", f"/v1/devboxes/{box}/executions/{execution}/kill")


# -- could not start


def test_a_command_in_a_box_without_a_shell_says_so(api: Api) -> None:
    own = api.create()
    api.output(own, "sudo sh -c 'mv /bin/bash /bin/hidden; rm /bin/sh'")
    view = api.call("POST", f"/v1/devboxes/{own}/execute_sync", {"command": "echo hi"})
    assert view["exit_status"] == 127
    assert "cannot" in view["stderr"]
    assert "no such file" in view["stderr"].lower()
    api.shutdown(own)


# -- named shells


def test_a_named_shell_keeps_its_state(api: Api, box: str) -> None:
    api.run(box, "cd /usr; export A=1; f() { echo f$A; }; alias ll='echo l'; set -o pipefail", shell_name="keep")
    view = api.run(box, "pwd; f; ll; false | true; echo $?", shell_name="keep")
    assert (view["stdout"], view["stderr"], view["shell_name"]) == ("/usr\nf1\nl\n1\n", "", "keep")
    assert api.run(box, "pwd; echo ${A-none}", shell_name="other")["stdout"] == "/home/user\nnone\n"


def test_commands_of_a_shell_run_in_order(api: Api, box: str) -> None:
    first = api.start(box, "cat; echo 1 >> /tmp/order", shell_name="order", attach_stdin=True)
    rest = [api.start(box, f"echo {i} >> /tmp/order", shell_name="order") for i in range(2, 6)]
    assert [api.execution(box, e)["status"] for e in rest] == ["queued"] * 4
    free = api.run(box, "echo free", shell_name="independent")
    assert free["stdout"] == "free\n"
    api.send(box, first, signal="EOF")
    api.wait(box, rest[-1])
    assert api.output(box, "cat /tmp/order") == "1\n2\n3\n4\n5\n"


@pytest.mark.parametrize(
    ("command", "status"),
    [("exit 3", 3), ("exec sh -c 'exit 4'", 4), ("kill -9 $$", 137), ("if", 2), ("cd /nowhere; (exit 6)", 6)],
)
def test_a_death_ends_only_its_command(api: Api, box: str, command: str, status: int) -> None:
    name = f"death {command}"
    api.run(box, "cd /var; export KEPT=yes", shell_name=name)
    view = api.run(box, command, shell_name=name)
    assert view["exit_status"] == status
    assert api.run(box, "pwd; echo $KEPT", shell_name=name)["stdout"] == "/var\nyes\n"


def test_a_kill_in_a_shell_ends_its_command_and_spares_background_jobs(api: Api, box: str) -> None:
    api.run(box, "cd /opt; sleep 64 & echo $! > /tmp/job", shell_name="jobs")
    execution = api.start(box, "echo on; sleep 65; echo no", shell_name="jobs")
    with api.stream(box, execution) as events:
        next(events)
    view = api.call("POST", f"/v1/devboxes/{box}/executions/{execution}/kill")
    assert (view["status"], view["exit_status"]) == ("completed", 143)
    assert api.run(box, "pwd", shell_name="jobs")["stdout"] == "/opt\n"
    assert api.run(box, "kill -0 $(cat /tmp/job) && kill $(cat /tmp/job)")["exit_status"] == 0
    assert api.run(box, "pgrep -fx 'sleep 65'")["exit_status"] == 1


def test_a_waiting_command_can_be_killed(api: Api, box: str) -> None:
    first = api.start(box, "cat", shell_name="waiting", attach_stdin=True)
    second = api.start(box, "touch /tmp/never", shell_name="waiting")
    view = api.call("POST", f"/v1/devboxes/{box}/executions/{second}/kill")
    assert (view["status"], view["exit_status"]) == ("completed", 143)
    api.send(box, first, signal="EOF")
    api.wait(box, first)
    assert api.run(box, "ls /tmp/never", shell_name="waiting")["exit_status"] == 2


def test_a_shell_reads_attached_stdin(api: Api, box: str) -> None:
    execution = api.start(box, "read line; echo got:$line; cat", shell_name="reads", attach_stdin=True)
    api.send(box, execution, "one\ntwo\n")
    api.send(box, execution, signal="EOF")
    assert api.wait(box, execution)["stdout"] == "got:one\ntwo\n"
    assert api.run(box, "cat; echo end", shell_name="reads")["stdout"] == "end\n"


def test_an_interrupt_in_a_shell_ends_its_command(api: Api, box: str) -> None:
    api.run(box, "cd /srv", shell_name="interrupt")
    execution = api.start(box, "echo on; sleep 66; echo no", shell_name="interrupt", attach_stdin=True)
    with api.stream(box, execution) as events:
        next(events)
    assert api.send(box, execution, signal="INTERRUPT")
    assert api.wait(box, execution)["exit_status"] == 130
    assert api.run(box, "pwd", shell_name="interrupt")["stdout"] == "/srv\n"

"""The command line: fast, readable in a narrow window, one line for each refusal."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from devboxd import systemd
from devboxd.config import Settings
from devboxd.store.db import FILE_NAME, Store
from support.commands import devboxd, every_command, refused
from support.server import Server

# help


@pytest.mark.parametrize("command", every_command(), ids=" ".join)
def test_help_fits_a_narrow_window(command: tuple[str, ...]) -> None:
    done = devboxd(*command, "--help", env={"COLUMNS": "60"})
    assert done.returncode == 0
    assert max(map(len, done.stdout.splitlines())) <= 60
    assert not re.search(r"(?<![A-Z\]])\.\.\.", done.stdout), "no sentence is cut"


def test_the_command_line_starts_without_the_server() -> None:
    code = "import devboxd.cli, sys; print(*sorted(sys.modules))"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    heavy = {"sqlalchemy", "alembic", "starlette", "granian", "rich", "structlog", "msgspec", "asyncio", "http.client"}
    assert not loaded & heavy


def test_the_help_of_serve_names_every_setting() -> None:
    shown = devboxd("serve", "--help").stdout
    assert all(re.search(rf"\b{name}\b", shown) for name in Settings.__struct_fields__)
    assert "settings.md" in shown


def test_the_version() -> None:
    assert re.fullmatch(r"devboxd \d+\.\d+\.\d+\n", devboxd("--version").stdout)


# refusals


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("nothing",), ["nothing", "--help"]),
        (("serve", "--prot", "1"), ["--prot"]),
        (("serve", "--port", "0"), ["--port"]),
        (("serve", "--port", "x"), ["--port"]),
        (("serve", "--config", "/nonexistent"), ["/nonexistent"]),
        (("keys", "create", "--state", "/dev/null/x"), ["/dev/null/x"]),
        (("keys", "list", "--state", "/typo"), ["no server has used", "/typo", "--state"]),
        (("serve", "--state", ""), ["--state", "empty"]),
        (("snapshot", "verify"), ["ID..."]),
        (("boxes", "cp", "a", "b"), ["BOX:PATH"]),
        (("boxes", "cp", "a:b", "c:d"), ["BOX:PATH"]),
        (("boxes", "create", "--env", "A"), ["--env", "="]),
        (("completion", "tcsh"), ["bash", "zsh", "fish"]),
        (("keys", "revoke"), ["ID"]),
        (("boxes", "list"), ["DEVBOXD_KEY"]),
        (("boxes", "list", "--key-file", "/nonexistent"), ["/nonexistent"]),
        (("boxes", "exec", "dbx_1"), ["CMD"]),
        (("boxes", "shutdown"), ["--all"]),
        (("boxes", "shutdown", "--all", "dbx_1"), ["--all"]),
    ],
)
def test_a_wrong_call_is_refused_in_one_line(arguments: tuple[str, ...], words: list[str]) -> None:
    refused(devboxd(*arguments), *words)


@pytest.mark.parametrize(
    "url",
    [
        "ftp://localhost",
        "http://",
        "http://127.0.0.1:1",
        "http://[::1]:1",
        "http://[::1",
        "http://localhost:port",
        "http://no-such-host.invalid",
        "127.0.0.1:1",
    ],
)
def test_a_server_that_cannot_be_reached_is_told_at_once(url: str) -> None:
    begun = time.monotonic()
    refused(devboxd("boxes", "list", "--url", url, env={"DEVBOXD_KEY": "ak_x"}), "cannot")
    assert time.monotonic() - begun < 5


def test_a_group_without_a_command_shows_its_help() -> None:
    done = devboxd("keys")
    assert done.returncode == 2
    assert "create" in done.stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody else")
def test_serve_needs_root_and_says_so(tmp_path: Path) -> None:
    code = (
        "import os, sys; os.setgid(65534); os.setuid(65534); sys.argv = ['devboxd', 'serve', '--state', sys.argv[1]];"
    )
    code += "from devboxd.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", "import devboxd.cli, devboxd.config;" + code, tmp_path / "state"],
        capture_output=True, text=True, check=False, env={**os.environ, "DEVBOXD_CONFIG": "/dev/null"},
    )  # fmt: skip
    refused(done, "root", "systemd-unit")


# keys


@pytest.fixture
def state(tmp_path: Path) -> Path:
    return tmp_path / "state"


def test_keys_are_made_listed_and_revoked_beside_a_running_server(state: Path) -> None:
    running = Store.open(state / FILE_NAME)
    folder = ("--state", str(state))
    made = [devboxd("keys", "create", "--name", name, *folder) for name in ("one", "[b]two\x1b")]
    for done in made:
        assert re.fullmatch(r"ak_[A-Za-z0-9_-]{43}\n", done.stdout)
        assert done.stderr == ""
    first, second = json.loads(devboxd("keys", "list", "--json", *folder).stdout)
    assert (first["name"], second["name"]) == ("one", "[b]two\x1b")
    assert devboxd("keys", "revoke", first["id"], *folder).returncode == 0
    assert devboxd("keys", "revoke", first["id"], *folder).returncode == 0
    listed = devboxd("keys", "list", *folder).stdout.splitlines()
    assert listed[0].endswith("revoked")
    assert listed[1].split("\t")[1] == "[b]two\N{REPLACEMENT CHARACTER}"
    assert "ak_" not in "".join(listed)
    running.close()


def test_a_key_of_an_old_store_is_alone_on_standard_output(state: Path) -> None:
    state.mkdir()
    with contextlib.closing(sqlite3.connect(state / "devboxd.db")) as old:
        old.executescript((Path(__file__).parent / "store" / "store-0001.sql").read_text())
    done = devboxd("keys", "create", "--state", str(state))
    assert re.fullmatch(r"ak_[\w-]+\n", done.stdout)
    assert "store.migrating" in done.stderr


def test_a_folder_that_no_server_used_is_left_as_it_is(state: Path) -> None:
    for command in (("create",), ("list",), ("revoke", "key_" + "0" * 21)):
        refused(devboxd("keys", *command, "--state", str(state)), "no server has used", str(state))
    assert not state.exists()


def test_revoking_an_unknown_key_is_refused(state: Path) -> None:
    Store.open(state / FILE_NAME).close()
    refused(devboxd("keys", "revoke", "key_" + "0" * 21, "--state", str(state)), "no such key")
    refused(devboxd("keys", "revoke", "nonsense", "--state", str(state)), "nonsense")


# systemd


def test_the_unit_runs_this_installation() -> None:
    names = ("--domain", "a.example", "--domain", "b.example")
    unit = devboxd("systemd-unit", "--state", "/srv/my boxes%", "--port", "9", *names).stdout
    for line in (
        "KillMode=process", "Delegate=yes", "OOMPolicy=continue", "TasksMax=infinity", "Type=notify", "WatchdogSec=60",
        "LimitNOFILE=1048576", "LimitCORE=1", "UMask=0077",
    ):  # fmt: skip
        assert line in unit.splitlines()
    command = next(line for line in unit.splitlines() if line.startswith("ExecStart="))
    assert command.endswith(' serve --state "/srv/my boxes%%" --port 9 --domain a.example --domain b.example')
    assert Path(shlex.split(command.removeprefix("ExecStart="))[0]).exists()


def test_the_unit_names_whole_paths_for_it_runs_in_another_folder(tmp_path: Path) -> None:
    unit = devboxd("systemd-unit", "--state", "here", "--config", "one.toml", cwd=tmp_path).stdout
    assert f" serve --state {tmp_path}/here --config {tmp_path}/one.toml" in unit


def test_boxes_are_the_same_under_the_mask_of_the_unit() -> None:
    look = "umask; find / -maxdepth 4 -not -path '/proc/*' -not -path '/sys/*' -printf '%m %u %g %p\\n' | sort -k 4"
    shown = []
    for umask in (0o022, 0o077):
        server = Server(warm_boxes="1")
        server.umask = umask
        try:
            server.start()
            with server.api() as api:
                cold = api.create(launch_parameters={"user_parameters": {"username": "eve", "uid": 1234}})
                warm = api.create()
                api.write(warm, "folder/file", "x")
                api.upload(warm, "other/file", b"x")
                snapshot = api.call("POST", f"/v1/devboxes/{warm}/snapshot_disk", {})["id"]
                copy = api.create(snapshot_id=snapshot)
                api.call("POST", f"/v1/devboxes/{copy}/suspend")
                api.wait_box(copy, "suspended")
                api.call("POST", f"/v1/devboxes/{copy}/resume")
                api.wait_box(copy, "running")
                shown.append([api.streamed(box, api.run(box, look)["execution_id"]) for box in (cold, warm, copy)])
        finally:
            server.stop()
    assert shown[0] == shown[1]


def test_systemd_hears_that_the_server_is_ready(tmp_path: Path) -> None:
    import socket

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        assert systemd.notify("READY=1", {"NOTIFY_SOCKET": str(tmp_path / "notify")})
        assert listener.recv(100) == b"READY=1"
    name = f"@devboxd-test-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + name[1:])
        assert systemd.notify("READY=1", {"NOTIFY_SOCKET": name})
        assert listener.recv(100) == b"READY=1"
    assert not systemd.notify("READY=1", {"NOTIFY_SOCKET": name})
    assert not systemd.notify("READY=1", {})


# logs


def test_logs_are_json_away_from_a_terminal() -> None:
    code = (
        "from devboxd import logs; logs.configure('auto'); import structlog, logging;"
        "log = structlog.get_logger(); log.info('request', path='/x\\n', ms=1.5);"
        "logging.getLogger('library').warning('careful %s', 1); log.debug('hidden')\n"
        "try:\n    1 / 0\nexcept ZeroDivisionError:\n    log.exception('failed')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["event"] for line in lines] == ["request", "careful 1", "failed"]
    assert lines[0]["path"] == "/x\n"
    assert "ZeroDivisionError" in lines[2]["exception"]
    assert done.stdout == ""


def test_a_traceback_in_text_shows_no_values() -> None:
    code = (
        "from devboxd import logs; logs.configure('text'); import structlog\n"
        "secret = 'hunter' + '2'\ntry:\n    1 / 0\nexcept ZeroDivisionError:\n"
        "    structlog.get_logger().exception('failed')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "ZeroDivisionError" in done.stderr
    assert "hunter2" not in done.stderr


# boxes


@pytest.fixture(scope="module")
def env(server: Server) -> dict[str, str]:
    return {"DEVBOXD_URL": server.url, "DEVBOXD_KEY": server.key}


def test_boxes_are_listed(env: dict[str, str], box: str) -> None:
    rows = [line.split("\t") for line in devboxd("boxes", "list", env=env).stdout.splitlines()]
    assert [box, "running"] in [row[:2] for row in rows]
    listed = json.loads(devboxd("boxes", "list", "--json", "--status", "running", env=env).stdout)
    assert box in {view["id"] for view in listed}


def test_exec_shows_output_and_ends_with_the_exit_code(env: dict[str, str], box: str) -> None:
    done = devboxd("boxes", "exec", box, "--", "echo out; echo err >&2; exit 42", env=env)
    assert (done.stdout, done.stderr, done.returncode) == ("out\n", "err\n", 42)
    done = devboxd("boxes", "exec", box, "--", "printf", "%s|", "a b", "$HOME", "--help", env=env)
    assert (done.stdout, done.returncode) == ("a b|$HOME|--help|", 0)
    done = devboxd("boxes", "exec", "--json", box, "--", "exit 3", env=env)
    assert (json.loads(done.stdout)["exit_status"], done.returncode) == (3, 3)


def test_exec_passes_standard_input_on(env: dict[str, str], box: str) -> None:
    text = "é" * 200_000 + "\n"
    done = devboxd("boxes", "exec", box, "--", "wc -c; wc -c < /dev/null", env=env, input=text)
    assert done.stdout.split() == ["400001", "0"]
    assert devboxd("boxes", "exec", box, "--", "cat", env=env, input=text).stdout == text


def test_exec_gives_large_output_whole(env: dict[str, str], box: str) -> None:
    done = devboxd("boxes", "exec", box, "--", "seq 300000", env=env)
    assert done.stdout == "".join(f"{number}\n" for number in range(1, 300_001))


def test_an_interrupt_kills_the_command_in_the_box(env: dict[str, str], box: str) -> None:
    program = ("env", "--default-signal=INT", sys.executable)  # whoever runs the tests may ignore it, and so would we
    command = [*program, "-m", "devboxd.cli", "boxes", "exec", box, "--", "echo begun; sleep 314159"]
    with subprocess.Popen(
        command, env={**os.environ, **env}, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    ) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == "begun\n"
        child.send_signal(signal.SIGINT)
        assert child.wait(20) == 130
    done = devboxd("boxes", "exec", box, "--", "pgrep -f 'sleep 31415[9]'", env=env)
    assert done.returncode == 1, done.stdout


def test_logs_of_a_box(env: dict[str, str], box: str) -> None:
    devboxd("boxes", "exec", box, "--", "echo a word for the log", env=env)
    assert "a word for the log" in devboxd("boxes", "logs", box, env=env).stdout


def test_logs_do_not_steer_the_terminal(env: dict[str, str], box: str) -> None:
    devboxd("boxes", "exec", box, "--", r"printf 'title: \033]0;taken\007 \tafter a tab\n'", env=env)
    assert "\x1b]0;taken\x07" in devboxd("boxes", "logs", box, env=env).stdout
    ours, terminal = os.openpty()
    try:
        command = [sys.executable, "-m", "devboxd.cli", "boxes", "logs", box]
        with subprocess.Popen(command, env={**os.environ, **env}, stdout=terminal, stdin=subprocess.DEVNULL) as child:
            os.close(terminal)
            shown = b""
            with contextlib.suppress(OSError):  # EIO: the terminal has no other side any more
                while piece := os.read(ours, 65536):
                    shown += piece
            assert child.wait(60) == 0
    finally:
        os.close(ours)
    assert "title: \N{REPLACEMENT CHARACTER}]0;taken\N{REPLACEMENT CHARACTER} \tafter a tab\r\n" in shown.decode()
    assert b"\x1b" not in shown


def test_errors_of_the_server_are_one_line(env: dict[str, str]) -> None:
    refused(devboxd("boxes", "exec", "dbx_" + "0" * 21, "--", "true", env=env))
    refused(devboxd("boxes", "logs", "nonsense", env=env))
    refused(devboxd("boxes", "list", env={**env, "DEVBOXD_KEY": "ak_wrong"}), "key")


def test_boxes_are_shut_down(env: dict[str, str], server: Server) -> None:
    with server.api() as api:
        made = [api.create(name=f"to end {number}") for number in range(2)]
    assert devboxd("boxes", "shutdown", made[0], env=env).stdout.split() == [made[0]]
    assert made[1] in json.loads(devboxd("boxes", "shutdown", made[1], "--json", env=env).stdout)
    running = json.loads(devboxd("boxes", "list", "--json", "--status", "running", env=env).stdout)
    assert not {view["id"] for view in running} & set(made)


# streams that break


class Faulty(threading.Thread):
    """Speaks just enough HTTP to break a stream in the ways in which a server can be lost."""

    def __init__(self, answers: list[bytes]) -> None:
        import socket

        super().__init__(daemon=True)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.answers = answers
        self.asked: list[str] = []

    def run(self) -> None:
        for answer in self.answers:
            connection, _ = self.listener.accept()
            with connection:
                request = connection.recv(65536)
                self.asked.append(request.split()[1].decode())
                connection.sendall(answer)


def events(*chunks: tuple[int, bytes], end: bytes = b"0\r\n\r\n") -> bytes:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
    lines = [
        f": ping\n\ndata: {json.dumps({'base64': base64.b64encode(piece).decode(), 'offset': at})}\n\n".encode()
        for at, piece in chunks
    ]
    return head + b"".join(b"%x\r\n%s\r\n" % (len(line), line) for line in lines) + end


@pytest.fixture
def faulty() -> Iterator[Any]:
    made: list[Faulty] = []

    def make(*answers: bytes) -> Faulty:
        made.append(Faulty(list(answers)))
        made[-1].start()
        return made[-1]

    yield make
    for server in made:
        server.listener.close()


def test_a_stream_is_read_once_over_broken_connections(faulty: Any) -> None:
    from devboxd.remote import Remote

    error = b'event: error\ndata: {"code": 408, "message": "again"}\n\n'
    stopped = b"%x\r\n%s\r\n0\r\n\r\n" % (len(error), error)
    server = faulty(
        events((0, b"one "), (4, b"tw"), end=b""),  # lost in the middle
        events((6, b"o "), (8, b""), end=stopped),  # stopped in order, with the end told
        b"HTTP/1.1 503 Unavailable\r\ncontent-length: 2\r\n\r\n{}",
        events((8, b"three\xff")),
    )
    assert b"".join(Remote(server.url, "ak_x").stream("/s")) == b"one two three\xff"
    assert server.asked == [f"/s?offset={at}&encoding=base64" for at in (0, 6, 8, 8)]

"""Bytes that are no text: into a command, out of it, and through `devboxd boxes exec`."""

from __future__ import annotations

import base64
import hashlib
import os
import subprocess
import sys

import pytest

from support.api import Api
from support.server import Server

pytestmark = pytest.mark.box

BYTES = bytes(range(256)) * 4000 + os.urandom(100_000)


def _exec(server: Server, *words: str, data: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    env = {**os.environ, "DEVBOXD_URL": server.url, "DEVBOXD_KEY": server.key}
    command = [sys.executable, "-m", "devboxd.cli", "boxes", "exec", *words]
    return subprocess.run(command, input=data, capture_output=True, env=env, timeout=120, check=False)


def test_base64_goes_in_and_comes_out_unchanged_from_any_byte(api: Api, box: str) -> None:
    execution = api.start(box, "cat", attach_stdin=True)
    path = f"/v1/devboxes/{box}/executions/{execution}"
    for start in range(0, len(BYTES), 500_001):
        body = {"base64": base64.b64encode(BYTES[start : start + 500_001]).decode()}
        assert api.call("POST", f"{path}/send_std_in", body)["success"]
    assert api.send(box, execution, signal="EOF")
    assert api.wait(box, execution)["exit_status"] == 0
    for offset in (0, 129, len(BYTES) - 1, len(BYTES)):
        text = api.http.get(f"{path}/stream_stdout_updates", params={"encoding": "base64", "offset": offset}).text
        pieces = [line.partition('"base64":"')[2].partition('"')[0] for line in text.splitlines()]
        assert b"".join(map(base64.b64decode, pieces)) == BYTES[offset:]
    plain = api.http.get(f"{path}/stream_stdout_updates").text
    assert "base64" not in plain


@pytest.mark.parametrize(
    "body", [{"base64": "no base64!"}, {"base64": "AA"}, {"base64": "AAAA", "text": "x"}, {"base64": ""}]
)
def test_what_is_no_base64_is_refused(api: Api, box: str, body: dict[str, str]) -> None:
    execution = api.start(box, "cat", attach_stdin=True)
    path = f"/v1/devboxes/{box}/executions/{execution}"
    assert "base64" in api.refused("POST", f"{path}/send_std_in", 400, body)
    assert "encoding" in api.refused("GET", f"{path}/stream_stdout_updates?encoding=hex", 400)
    api.send(box, execution, signal="EOF")


def test_exec_passes_bytes_in_both_directions(server: Server, box: str) -> None:
    done = _exec(server, box, "--", "tee /tmp/bytes; head -c 3 /tmp/bytes >&2; exit 3", data=BYTES)
    assert (done.stdout == BYTES, done.stderr, done.returncode) == (True, BYTES[:3], 3)
    assert _exec(server, box, "sha256sum", "/tmp/bytes").stdout.split()[0].decode() == hashlib.sha256(BYTES).hexdigest()
    listed = subprocess.run(
        ["tar", "tz"], input=_exec(server, box, "--", "tar cz /etc/hosts").stdout, capture_output=True
    )
    assert listed.stdout == b"etc/hosts\n"


def test_options_of_exec_stand_before_the_command(server: Server, box: str) -> None:
    done = _exec(server, box, "--json", "--", "seq 3")
    assert (b'"stdout": "1\\n2\\n3\\n"' in done.stdout, done.returncode) == (True, 0)
    assert _exec(server, box, "--", "echo", "--json", "--", "x").stdout == b"--json -- x\n"
    assert _exec(server, box, "echo", "--json", "--", "x").stdout == b"--json -- x\n"


def test_exec_goes_on_over_a_restart_of_the_server(own_server: Server) -> None:
    with own_server.api() as api:
        box = api.create()
    env = {**os.environ, "DEVBOXD_URL": own_server.url, "DEVBOXD_KEY": own_server.key}
    command = [sys.executable, "-m", "devboxd.cli", "boxes", "exec", box, "--", "echo on; cat; printf '\\377'"]
    with subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.readline() == b"on\n"
        own_server.kill()
        child.stdin.write(b"\xfe\n")
        child.stdin.close()
        own_server.start()
        assert child.stdout.read() == b"\xfe\n\xff"
        assert child.wait(60) == 0


def test_the_end_of_a_very_long_line_is_shown(api: Api, box: str) -> None:
    view = api.run(box, "head -c 20000000 /dev/zero | tr '\\0' x; echo; echo END")
    assert view["stdout_truncated"]
    assert view["stdout"].endswith("x\nEND\n")
    assert len(view["stdout"]) == 1 << 20

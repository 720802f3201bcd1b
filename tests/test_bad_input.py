"""Wrong requests: a clear refusal that changes nothing, and a server that leaks nothing whatever clients do."""

from __future__ import annotations

import platform
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from support.api import Api
from support.server import Server

pytestmark = pytest.mark.box

UNKNOWN_BOX = "dbx_" + "0" * 21
MEGABYTE = 1 << 20


@pytest.fixture(autouse=True)
def no_leaks(server: Server, api: Api) -> Iterator[None]:
    """The server has as many descriptors after each of these tests as before."""
    api.call("GET", "/v1/devboxes")
    before = server.descriptors()
    yield
    assert _settles(lambda: server.descriptors() <= before + 1), (before, server.descriptors())


def _settles(check: Callable[[], bool], seconds: float = 10) -> bool:
    """Whether something becomes true in time; closing happens after the answer."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if check():
            return True
        time.sleep(0.05)
    return check()


@pytest.fixture(scope="module")
def running(api: Api, box: str) -> Iterator[str]:
    """An execution that reads its standard input until the module ends."""
    execution = api.start(box, "cat", attach_stdin=True)
    yield execution
    api.call("POST", f"/v1/devboxes/{box}/executions/{execution}/kill")


def _new(api: Api) -> set[str]:
    return {view["id"] for view in api.boxes()}


# the body


@pytest.mark.parametrize("text", ["", "{", "[1,", "nul", '{"name": "a"', "\xff\xfe", '{"name": "a"} trailing'])
def test_a_body_that_is_not_json_is_refused(api: Api, box: str, text: str) -> None:
    sent = text.encode("latin-1")
    headers = {"content-type": "application/json"}
    for path in ("execute_async", "write_file_contents"):
        api.refused("POST", f"/v1/devboxes/{box}/{path}", 400, content=sent, headers=headers)


@pytest.mark.parametrize("body", [[], "text", 1, True])
def test_a_body_of_another_type_is_refused(api: Api, box: str, body: Any) -> None:
    before = _new(api)
    api.refused("POST", "/v1/devboxes", 400, body)
    api.refused("POST", f"/v1/devboxes/{box}/execute_async", 400, body)
    assert _new(api) == before


def test_a_body_that_is_no_json_by_its_type_is_refused(api: Api) -> None:
    """A page in a browser can send such bodies without asking first."""
    before = _new(api)
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        answer = api.http.post("/v1/devboxes", content=b"{}", headers={"content-type": kind})
        assert answer.status_code in (400, 415), answer.text
        assert answer.json()["message"].startswith("cannot ")
    assert _new(api) == before


def test_what_is_not_built_is_refused_by_its_name_and_the_client_does_not_ask_again(api: Api) -> None:
    assert "blueprints.create" in api.refused("POST", "/v1/blueprints", 501, {"name": "x"})
    assert "execut" in api.refused("POST", "/v1/devboxes/dbx_x/create_ssh_key", 501, {})
    assert api.http.post("/v1/secrets").headers["x-should-retry"] == "false"


def test_deeply_nested_json_is_refused(api: Api) -> None:
    text = '{"metadata":' + "[" * 100_000 + "]" * 100_000 + "}"
    api.refused("POST", "/v1/devboxes", 400, content=text, headers={"content-type": "application/json"})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", 5),
        ("name", ["a"]),
        ("metadata", "text"),
        ("metadata", {"key": 1}),
        ("metadata", {"key": None}),
        ("environment_variables", ["A=b"]),
        ("environment_variables", {"A": 1}),
        ("environment_variables", {"": "x"}),
        ("environment_variables", {"A=B": "x"}),
        ("environment_variables", {"A": "nul\0"}),
        ("file_mounts", {"/tmp/a": 5}),
        ("file_mounts", {"/tmp/\0": "x"}),
        ("entrypoint", 5),
        ("launch_parameters", "big"),
        ("launch_parameters", {"resource_size_request": "HUGE"}),
        ("launch_parameters", {"resource_size_request": "CUSTOM_SIZE"}),
        ("launch_parameters", {"launch_commands": "true"}),
        ("launch_parameters", {"launch_commands": [5]}),
        ("launch_parameters", {"keep_alive_time_seconds": "soon"}),
        ("launch_parameters", {"keep_alive_time_seconds": 0}),
        ("launch_parameters", {"keep_alive_time_seconds": -1}),
        ("launch_parameters", {"keep_alive_time_seconds": 172_801}),
        ("launch_parameters", {"user_parameters": {"username": "user"}}),
        ("launch_parameters", {"user_parameters": {"username": "../../etc", "uid": 1000}}),
        ("launch_parameters", {"user_parameters": {"username": "somebody", "uid": -1}}),
    ],
)
def test_a_create_with_a_wrong_value_is_refused(api: Api, field: str, value: Any) -> None:
    before = _new(api)
    message = api.refused("POST", "/v1/devboxes", 400, {field: value})
    assert any(name in message for name in (field.split("_")[0], *_names(value))), message
    assert _new(api) == before


def _names(value: Any) -> list[str]:
    """What a message may name instead: the keys within, or the size that was asked for."""
    return [*value, *map(str, value.values())] if isinstance(value, dict) else []


UNSUPPORTED = {
    "mounts": [{"type": "file_mount", "target": "/tmp/a", "content": "x"}],
    "code_mounts": [{"repo_name": "a", "repo_owner": "b"}],
    "secrets": {"NAME": "secret"},
    "blueprint_id": "bpt_" + "0" * 21,
    "blueprint_name": "base",
    "tunnel": {"auth_mode": "open"},
    "gateways": {"GWS": {"gateway": "a", "secret": "b"}},
    "mcp": {"MCP": {"mcp_config": "a", "secret": "b"}},
}
UNSUPPORTED_LAUNCH = {
    "network_policy_id": "np_" + "0" * 21,
    "required_services": ["postgres"],
    "available_ports": [80],
    "architecture": "arm64" if platform.machine() == "x86_64" else "x86_64",
    "provisioning_tier": "flex",
}


@pytest.mark.parametrize("field", UNSUPPORTED)
def test_what_would_make_another_devbox_is_refused_by_name(api: Api, field: str) -> None:
    before = _new(api)
    for path in ("/v1/devboxes", "/v1/devboxes/create_and_await_running"):
        assert field in api.refused("POST", path, 400, {field: UNSUPPORTED[field]})
    assert _new(api) == before


@pytest.mark.parametrize("field", UNSUPPORTED_LAUNCH)
def test_what_would_launch_otherwise_is_refused_by_name(api: Api, field: str) -> None:
    before = _new(api)
    body = {"launch_parameters": {field: UNSUPPORTED_LAUNCH[field]}}
    assert field in api.refused("POST", "/v1/devboxes", 400, body)
    assert _new(api) == before


def test_a_field_that_nobody_knows_is_refused_by_name(api: Api) -> None:
    before = _new(api)
    assert "colour" in api.refused("POST", "/v1/devboxes", 400, {"colour": "green"})
    assert "colour" in api.refused("POST", "/v1/devboxes", 400, {"launch_parameters": {"colour": "green"}})
    assert _new(api) == before


def test_null_and_empty_count_as_absent(api: Api) -> None:
    nothing: dict[str, Any] = dict.fromkeys((*UNSUPPORTED, "name", "metadata", "entrypoint", "file_mounts"))
    nothing |= {"mounts": [], "secrets": {}, "environment_variables": {}}
    nothing["launch_parameters"] = dict.fromkeys((*UNSUPPORTED_LAUNCH, "resource_size_request", "launch_commands"))
    nothing["launch_parameters"]["available_ports"] = []
    box = api.create(**nothing)
    assert api.output(box, "echo here") == "here\n"
    api.shutdown(box)


def test_names_of_ten_thousand_characters_are_refused(api: Api, box: str) -> None:
    long = "x" * 10_000
    before = _new(api)
    api.refused("POST", "/v1/devboxes", 400, {"name": long})
    api.refused("POST", "/v1/devboxes", 400, {"metadata": {long: "value"}})
    api.refused("POST", f"/v1/devboxes/{box}", 400, {"name": long})
    api.refused("POST", f"/v1/devboxes/{box}/execute_async", 400, {"command": "true", "shell_name": long})
    api.refused("POST", f"/v1/devboxes/{box}/execute", 400, {"command": "true", "command_id": long})
    assert _new(api) == before
    assert api.box(box)["name"] != long


# executions


@pytest.mark.parametrize("path", ["execute_async", "execute_sync", "execute"])
@pytest.mark.parametrize(
    "body",
    [
        {},
        {"command": None},
        {"command": 5},
        {"command": ["true"]},
        {"command": ""},
        {"command": "echo nul\0"},
        {"command": "true", "shell_name": 5},
        {"command": "true", "shell_name": "nul\0"},
    ],
)
def test_a_wrong_command_is_refused(api: Api, box: str, path: str, body: dict[str, Any]) -> None:
    if path == "execute":
        body = {"command_id": str(uuid.uuid4()), **body}
    api.refused("POST", f"/v1/devboxes/{box}/{path}", 400, body)


@pytest.mark.parametrize("command_id", ["", "../../escape", "a/b", "nul\0", "x" * 300, 5])
def test_a_wrong_command_id_is_refused(api: Api, box: str, command_id: Any) -> None:
    api.refused("POST", f"/v1/devboxes/{box}/execute", 400, {"command": "true", "command_id": command_id})


@pytest.mark.parametrize("seconds", ["soon", [], {}])
def test_a_wrong_optimistic_timeout_is_refused(api: Api, box: str, seconds: Any) -> None:
    body = {"command": "true", "command_id": str(uuid.uuid4()), "optimistic_timeout": seconds}
    api.refused("POST", f"/v1/devboxes/{box}/execute", 400, body)


@pytest.mark.parametrize("lines", ["-1", "many", "1.5", "١", " "])
def test_a_wrong_number_of_lines_is_refused(api: Api, box: str, running: str, lines: str) -> None:
    api.refused("GET", f"/v1/devboxes/{box}/executions/{running}", 400, params={"last_n": lines})


@pytest.mark.parametrize(
    "body",
    [
        {},
        {"text": None, "signal": None},
        {"text": ""},
        {"text": "", "signal": None},
        {"text": "a", "signal": "EOF"},
        {"signal": "HANGUP"},
        {"signal": "eof"},
        {"signal": 2},
        {"text": 5},
    ],
)
def test_stdin_takes_exactly_one_of_text_and_signal(api: Api, box: str, running: str, body: dict[str, Any]) -> None:
    path = f"/v1/devboxes/{box}/executions/{running}"
    api.refused("POST", f"{path}/send_std_in", 400, body)
    view = api.execution(box, running)
    assert (view["status"], view["stdout"]) == ("running", ""), "nothing was delivered"


@pytest.mark.parametrize(
    "body", [{"statuses": []}, {"statuses": "completed"}, {"statuses": ["done"]}, {"statuses": [1]}, {}]
)
def test_a_wait_for_no_or_unknown_statuses_is_refused(api: Api, box: str, running: str, body: dict[str, Any]) -> None:
    api.refused("POST", f"/v1/devboxes/{box}/executions/{running}/wait_for_status", 400, body)
    api.refused("POST", f"/v1/devboxes/{box}/wait_for_status", 400, body)


def test_a_command_of_ten_megabytes_runs(api: Api, box: str) -> None:
    command = ": " + "x" * (10 * MEGABYTE) + "\necho done"
    assert api.run(box, command, seconds=120)["stdout"] == "done\n"


# identities


@pytest.mark.parametrize("identity", ["nonsense", "dbx_short", "dbx_" + "!" * 21, "DBX_" + "0" * 21, "x" * 5000, "%00"])
def test_a_malformed_id_is_refused(api: Api, box: str, identity: str) -> None:
    api.refused("GET", f"/v1/devboxes/{identity}", 400)
    api.refused("POST", f"/v1/devboxes/{identity}/shutdown", 400)
    api.refused("POST", f"/v1/devboxes/{identity}/execute_async", 400, {"command": "true"})


def test_an_unknown_devbox_is_not_found(api: Api) -> None:
    path = f"/v1/devboxes/{UNKNOWN_BOX}"
    assert UNKNOWN_BOX in api.refused("GET", path, 404)
    for action in ("shutdown", "keep_alive"):
        api.refused("POST", f"{path}/{action}", 404)
    api.refused("POST", path, 404, {"name": "new"})
    api.refused("POST", f"{path}/execute_async", 404, {"command": "true"})
    api.refused("POST", f"{path}/wait_for_status", 404, {"statuses": ["running"]})
    api.refused("POST", f"{path}/read_file_contents", 404, {"file_path": "a"})
    api.refused("POST", f"{path}/download_file", 404, {"path": "a"})


def test_an_unknown_execution_is_not_found(api: Api, box: str, running: str) -> None:
    """An id of the right form, that no execution of this devbox has."""
    unknown = running[:-4] + ("0000" if running[-4:] != "0000" else "1111")
    path = f"/v1/devboxes/{box}/executions/{unknown}"
    api.refused("GET", path, 404)
    api.refused("POST", f"{path}/kill", 404)
    api.refused("POST", f"{path}/send_std_in", 404, {"text": "a"})
    api.refused("POST", f"{path}/wait_for_status", 404, {"statuses": ["completed"]})
    api.refused("GET", f"{path}/stream_stdout_updates", 404)
    api.refused("GET", f"{path}/stream_stderr_updates", 404)


def test_an_id_of_another_kind_is_refused(api: Api, box: str, running: str) -> None:
    api.refused("GET", f"/v1/devboxes/{running}", 400)
    answer = api.http.get(f"/v1/devboxes/{box}/executions/{box}")
    assert answer.status_code in (400, 404), answer.text
    assert answer.json()["message"].startswith("cannot ")


def test_an_execution_belongs_to_its_devbox_only(api: Api, box: str, running: str) -> None:
    other = api.create()
    path = f"/v1/devboxes/{other}/executions/{running}"
    api.refused("GET", path, 404)
    api.refused("POST", f"{path}/kill", 404)
    api.refused("POST", f"{path}/send_std_in", 404, {"text": "strange"})
    assert api.execution(box, running)["status"] == "running"
    api.shutdown(other)


@pytest.mark.parametrize("key", ["x", "ak_wrong", "x" * 10_000])
def test_a_wrong_key_gets_nothing(server: Server, key: str) -> None:
    with Api(server.url, key) as stranger:
        stranger.refused("GET", "/v1/devboxes", 401)
        stranger.refused("POST", "/v1/devboxes", 401, {})
    assert httpx.get(server.url + "/v1/devboxes").status_code == 401


def test_a_foreign_host_gets_nothing(server: Server, api: Api) -> None:
    """A name that an attacker points at this machine: the browser would send its page's requests here."""
    answer = api.http.get("/v1/devboxes", headers={"host": "attacker.example"})
    assert answer.status_code == 421, answer.text


def test_unknown_paths_and_methods_are_refused_in_the_same_form(api: Api) -> None:
    api.refused("GET", "/v1/nonsense", 404)
    api.refused("PUT", "/v1/devboxes", 405)


# lists


@pytest.mark.parametrize("limit", ["-1", "0", "ten", "1.5", ""])
def test_a_limit_that_is_no_count_is_refused(api: Api, limit: str) -> None:
    assert "limit" in api.refused("GET", "/v1/devboxes", 400, params={"limit": limit})


def test_a_huge_limit_is_refused_or_clamped(api: Api, box: str) -> None:
    answer = api.http.get("/v1/devboxes", params={"limit": 100_000})
    if answer.status_code == 200:
        assert len(answer.json()["devboxes"]) <= 5000
    else:
        assert answer.status_code == 400, answer.text
        assert "5000" in answer.json()["message"]


@pytest.mark.parametrize("query", [{"status": "sleeping"}, {"starting_after": "nonsense"}])
def test_a_wrong_filter_is_refused(api: Api, query: dict[str, str]) -> None:
    api.refused("GET", "/v1/devboxes", 400, params=query)


# streams


@pytest.mark.parametrize("offset", ["-1", "start", "1.5", "0x10", "9" * 40])
def test_an_offset_that_is_no_position_is_refused(api: Api, box: str, running: str, offset: str) -> None:
    path = f"/v1/devboxes/{box}/executions/{running}/stream_stdout_updates"
    api.refused("GET", path, 400, params={"offset": offset})


def test_an_offset_past_the_end_of_a_finished_stream_is_a_clean_end_or_a_refusal(api: Api, box: str) -> None:
    execution = api.start(box, "echo five")
    api.wait(box, execution)
    assert api.streamed(box, execution, offset=5) == "", "the end itself is a position"
    path = f"/v1/devboxes/{box}/executions/{execution}/stream_stdout_updates"
    answer = api.http.get(path, params={"offset": "1000000"}, timeout=10)
    if answer.status_code == 200:
        assert b"data:" not in answer.content
    else:
        assert answer.status_code == 400, answer.text
        assert answer.json()["message"].startswith("cannot ")


# files


@pytest.mark.parametrize("path", ["", "nul\0byte", "x" * 10_000, "/" + "a/" * 5000, 5, None])
def test_a_wrong_path_is_refused(api: Api, box: str, path: Any) -> None:
    prefix = f"/v1/devboxes/{box}"
    api.refused("POST", f"{prefix}/read_file_contents", 400, {"file_path": path})
    api.refused("POST", f"{prefix}/write_file_contents", 400, {"file_path": path, "contents": "x"})
    api.refused("POST", f"{prefix}/download_file", 400, {"path": path})
    if isinstance(path, str):
        parts = {"file": ("file", b"x")}
        api.refused("POST", f"{prefix}/upload_file", 400, data={"path": path}, files=parts)


def test_a_file_call_without_its_fields_is_refused(api: Api, box: str) -> None:
    prefix = f"/v1/devboxes/{box}"
    for action in ("read_file_contents", "write_file_contents", "download_file"):
        api.refused("POST", f"{prefix}/{action}", 400, {})
    api.refused("POST", f"{prefix}/write_file_contents", 400, {"file_path": "a", "contents": 5})
    api.refused("POST", f"{prefix}/upload_file", 400, data={"path": "a"}, files={"other": ("a", b"x")})
    api.refused("POST", f"{prefix}/upload_file", 400, files={"file": ("a", b"x")})
    wrong = {"content-type": "multipart/form-data; boundary=x"}
    api.refused("POST", f"{prefix}/upload_file", 400, content=b"--y\r\n", headers=wrong)
    api.refused("POST", f"{prefix}/upload_file", 400, content=b"x", headers={"content-type": "multipart/form-data"})


def test_what_is_no_regular_file_is_refused(api: Api, box: str) -> None:
    api.output(box, "mkdir -p folder && mkfifo fifo && ln -sf fifo link")
    prefix = f"/v1/devboxes/{box}"
    for path in ("folder", "fifo", "link", "/dev/zero", "/dev/null"):
        api.refused("POST", f"{prefix}/read_file_contents", 400, {"file_path": path}, timeout=30)
        api.refused("POST", f"{prefix}/download_file", 400, {"path": path}, timeout=30)
    api.refused("POST", f"{prefix}/read_file_contents", 404, {"file_path": "missing"})
    api.refused("POST", f"{prefix}/download_file", 404, {"path": "missing/too"})
    api.refused("POST", f"{prefix}/read_file_contents", 403, {"file_path": "/etc/shadow"})
    api.refused("POST", f"{prefix}/write_file_contents", 403, {"file_path": "/etc/new", "contents": "x"})


def test_an_upload_that_is_cut_leaves_the_old_content(server: Server, api: Api, box: str) -> None:
    api.upload(box, "precious", b"old")
    head = b'--b\r\ncontent-disposition: form-data; name="path"\r\n\r\nprecious\r\n'
    head += b'--b\r\ncontent-disposition: form-data; name="file"; filename="f"\r\n\r\n'
    request = (
        f"POST /v1/devboxes/{box}/upload_file HTTP/1.1\r\nhost: 127.0.0.1:{server.port}\r\n"
        f"authorization: Bearer {server.key}\r\ncontent-type: multipart/form-data; boundary=b\r\n"
        f"content-length: {50 * MEGABYTE}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(request.encode() + head + b"n" * MEGABYTE)
    assert _settles(lambda: api.output(box, "ls -A | grep -c precious || true") == "1\n"), "no temporary file is left"
    assert api.download(box, "precious") == b"old"


# clients that go away


def test_a_client_gone_in_the_middle_of_a_stream_costs_nothing(server: Server, api: Api, box: str) -> None:
    execution = api.start(box, "echo first; cat", attach_stdin=True)
    before = server.descriptors()
    for _ in range(20):
        with server.api() as client, client.stream(box, execution) as found:
            assert next(text for event in found if (text := event.output)) == "first\n"
    assert _settles(lambda: server.descriptors() <= before), (before, server.descriptors())
    assert api.send(box, execution, "second\n")
    assert api.send(box, execution, signal="EOF")
    assert api.wait(box, execution)["stdout"] == "first\nsecond\n"
    assert api.streamed(box, execution) == "first\nsecond\n"


def test_a_client_gone_in_the_middle_of_a_wait_costs_nothing(server: Server, api: Api, box: str, running: str) -> None:
    before = server.descriptors()
    for path in (f"/v1/devboxes/{box}", f"/v1/devboxes/{box}/executions/{running}"):
        status = "shutdown" if path.endswith(box) else "completed"
        for _ in range(10):
            with server.api() as client, pytest.raises(httpx.ReadTimeout):
                client.http.post(
                    f"{path}/wait_for_status", json={"statuses": [status], "timeout_seconds": 20}, timeout=0.2
                )
    assert _settles(lambda: server.descriptors() <= before), (before, server.descriptors())
    assert api.execution(box, running)["status"] == "running"
    assert api.box(box)["status"] == "running"


def test_a_client_gone_in_the_middle_of_execute_does_not_end_the_command(api: Api, server: Server, box: str) -> None:
    command_id = str(uuid.uuid4())
    body = {"command": "while [ ! -e go ]; do sleep 0.1; done; echo kept", "command_id": command_id}
    with server.api() as client, pytest.raises(httpx.ReadTimeout):
        client.http.post(f"/v1/devboxes/{box}/execute", json=body, timeout=0.5)
    api.write(box, "go", "")
    view = api.call("POST", f"/v1/devboxes/{box}/execute", body)
    assert (view["status"], view["stdout"], view["exit_status"]) == ("completed", "kept\n", 0)


def test_half_a_request_is_not_waited_for_for_ever(server: Server, api: Api) -> None:
    """Connections that send nothing more do not keep others from being served."""
    halves = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(50)]
    for half in halves:
        half.sendall(b"POST /v1/devboxes HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-length: 100\r\n\r\n{")
    try:
        assert api.call("GET", "/v1/devboxes")["has_more"] in (True, False)
    finally:
        for half in halves:
            half.close()

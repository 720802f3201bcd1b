"""What cannot be, asked of real devboxes: a refusal in words that names it, and nothing has changed afterwards."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from support.api import Api

pytestmark = pytest.mark.box
SNAPSHOTS = "/v1/devboxes/disk_snapshots"
NO_BOX, NO_SNAPSHOT = "dbx_" + "0" * 21, "snp_" + "0" * 21
MANY = {f"key {number}": "x" for number in range(10_000)}


@contextlib.contextmanager
def unchanged(api: Api) -> Iterator[None]:
    """After the block all devboxes and snapshots are as they were."""
    before = _all(api)
    yield
    assert _all(api) == before


def _all(api: Api) -> tuple[Any, Any]:
    return api.boxes(), api.call("GET", SNAPSHOTS, params={"limit": 5000})


def _suspended(api: Api) -> str:
    box = api.create()
    api.call("POST", f"/v1/devboxes/{box}/suspend")
    api.wait_box(box, "suspended")
    return box


def _failed(api: Api) -> str:
    box = api.call("POST", "/v1/devboxes", {"launch_parameters": {"launch_commands": ["exit 1"]}})["id"]
    api.wait_box(box, "failure")
    return str(box)


def _shut_down(api: Api) -> str:
    box = api.create()
    api.shutdown(box)
    return box


def _starting(api: Api) -> str:
    box = api.call("POST", "/v1/devboxes", {"launch_parameters": {"launch_commands": ["sleep 1000"]}})["id"]
    api.wait_box(box, "initializing")
    return str(box)


@pytest.mark.parametrize(
    ("made", "status", "verbs"),
    [
        (Api.create, "running", ["resume"]),
        (_suspended, "suspended", ["snapshot_disk", "snapshot_disk_async", "suspend"]),
        (_failed, "failure", ["snapshot_disk", "snapshot_disk_async", "suspend", "resume", "keep_alive"]),
        (_shut_down, "shutdown", ["snapshot_disk", "snapshot_disk_async", "suspend", "resume", "keep_alive"]),
        (_starting, "initializing", ["snapshot_disk", "snapshot_disk_async", "suspend", "resume"]),
    ],
)
def test_what_the_status_does_not_allow_is_refused(
    api: Api, made: Callable[[Api], str], status: str, verbs: list[str]
) -> None:
    box = made(api)
    with unchanged(api):
        for verb in verbs:
            message = api.refused("POST", f"/v1/devboxes/{box}/{verb}", 400)
            asked = verb.removesuffix("_disk_async").removesuffix("_disk").replace("_", " ")
            assert message.startswith(f"cannot {asked} the devbox {box} while its status is {status}: "), message
    api.shutdown(box)


def test_force_is_a_boolean_however_it_is_spelt(api: Api) -> None:
    box = api.create()
    with unchanged(api):
        for wrong in ("", "1", "yes", "none"):
            assert "'force'" in api.refused("POST", f"/v1/devboxes/{box}/shutdown", 400, params={"force": wrong})
    for force in ("true", "True", "false"):
        ended = api.call("POST", f"/v1/devboxes/{box}/shutdown", params={"force": force})
        assert ended["status"] == "shutdown"


@pytest.mark.parametrize("verb", ["snapshot_disk", "snapshot_disk_async", "suspend", "resume", "keep_alive"])
def test_an_unknown_devbox_is_not_found(api: Api, verb: str) -> None:
    with unchanged(api):
        assert NO_BOX in api.refused("POST", f"/v1/devboxes/{NO_BOX}/{verb}", 404)


@pytest.mark.parametrize(
    ("verb", "begun", "settled"), [("suspend", "suspending", "suspended"), ("resume", "provisioning", "running")]
)
def test_of_many_at_once_one_is_done(api: Api, verb: str, begun: str, settled: str) -> None:
    box = api.create() if verb == "suspend" else _suspended(api)
    before = [step["status"] for step in api.box(box)["state_transitions"]]
    with ThreadPoolExecutor(5) as clients:
        answers = list(clients.map(lambda _: api.http.post(f"/v1/devboxes/{box}/{verb}"), range(5)))
    assert sorted(answer.status_code for answer in answers) == [200, 400, 400, 400, 400]
    refusal = f"cannot {verb} the devbox {box} while its status is "
    for answer in answers:
        if answer.status_code == 400:
            assert answer.json()["message"].startswith(refusal), answer.text
    view = api.wait_box(box, settled)
    after = [step["status"] for step in view["state_transitions"]][len(before) :]
    assert (after[0], after[-1], after.count(begun)) == (begun, settled, 1)
    api.shutdown(box)


def test_a_snapshot_is_not_deleted_while_it_is_taken(api: Api, box: str) -> None:
    """How long it is in progress is the disk's affair, so it is asked until a delete came in between."""
    taken = []
    for _ in range(50):
        taken.append(api.call("POST", f"/v1/devboxes/{box}/snapshot_disk_async")["id"])
        answer = api.http.post(f"{SNAPSHOTS}/{taken[-1]}/delete")
        if answer.status_code != 200:
            break
    assert (answer.status_code, answer.headers["x-should-retry"]) == (409, "false"), answer.text
    assert answer.json()["message"].startswith(f"cannot delete the snapshot {taken[-1]} while it is being taken")
    while (shown := api.call("GET", f"{SNAPSHOTS}/{taken[-1]}/status"))["status"] == "in_progress":
        assert shown["error_message"] is None
    assert shown["status"] == "complete", "the refused delete did nothing"
    fork = api.create(snapshot_id=taken[-1])
    assert api.output(fork, "echo whole") == "whole\n"
    api.shutdown(fork)
    api.call("POST", f"{SNAPSHOTS}/{taken[-1]}/delete")


def test_deletes_of_what_is_not_there(api: Api, box: str) -> None:
    gone = api.call("POST", f"/v1/devboxes/{box}/snapshot_disk")["id"]
    api.call("POST", f"{SNAPSHOTS}/{gone}/delete")
    with unchanged(api):
        assert NO_SNAPSHOT in api.refused("POST", f"{SNAPSHOTS}/{NO_SNAPSHOT}/delete", 404)
        assert "snp_" in api.refused("POST", f"{SNAPSHOTS}/{box}/delete", 400)
        assert api.call("POST", f"{SNAPSHOTS}/{gone}/delete") == {}, "it is as it was asked to be"


def test_unknown_fields_of_what_is_made_or_changed_are_refused_by_name(api: Api, box: str) -> None:
    snapshot = api.call("POST", f"/v1/devboxes/{box}/snapshot_disk")["id"]
    with unchanged(api):
        for path in (
            "/v1/devboxes", f"/v1/devboxes/{box}", f"/v1/devboxes/{box}/snapshot_disk",
            f"/v1/devboxes/{box}/snapshot_disk_async", f"{SNAPSHOTS}/{snapshot}",
        ):  # fmt: skip
            message = api.refused("POST", path, 400, {"name": "named", "metdata": {"a": "b"}})
            assert message == "cannot use the field 'metdata': it is not known here; leave it out"
    api.call("POST", f"{SNAPSHOTS}/{snapshot}/delete")


def test_metadata_of_ten_thousand_keys_is_refused(api: Api, box: str) -> None:
    snapshot = api.call("POST", f"/v1/devboxes/{box}/snapshot_disk", {"metadata": {"kept": "yes"}})["id"]
    with unchanged(api):
        for path in (
            "/v1/devboxes", f"/v1/devboxes/{box}", f"/v1/devboxes/{box}/snapshot_disk",
            f"/v1/devboxes/{box}/snapshot_disk_async", f"{SNAPSHOTS}/{snapshot}",
        ):  # fmt: skip
            message = api.refused("POST", path, 400, {"metadata": MANY})
            assert message.startswith("cannot keep 10000 metadata entries: at most 1024"), message
    api.call("POST", f"{SNAPSHOTS}/{snapshot}/delete")


IDLE = {"idle_time_seconds": 60, "on_idle": "shutdown"}


@pytest.mark.parametrize("other", [{"idle_time_seconds": 61}, {"on_idle": "suspend"}])
def test_two_idle_policies_that_differ_are_refused(api: Api, other: dict[str, Any]) -> None:
    launch = {"after_idle": IDLE, "lifecycle": {"after_idle": IDLE | other}}
    with unchanged(api):
        message = api.refused("POST", "/v1/devboxes", 400, {"launch_parameters": launch})
        assert "launch_parameters.after_idle and lifecycle.after_idle differ" in message
    box = api.create(launch_parameters=launch | {"lifecycle": {"after_idle": IDLE}})
    assert api.box(box)["launch_parameters"]["after_idle"] == IDLE, "the same one twice is one"
    api.shutdown(box)


CPU, MEMORY, DISK = "custom_cpu_cores", "custom_gb_memory", "custom_disk_size"
WHOLE = {"resource_size_request": "CUSTOM_SIZE", CPU: 1, MEMORY: 2, DISK: 4}


@pytest.mark.parametrize(
    ("field", "text"),
    [
        *((CPU, text) for text in ("0", "-1", "-0.5", "0.25", "1.5", "3", "18", "1e30", "-1e308")),
        *((MEMORY, text) for text in ("0", "-2", "3", "66", "2.5", "9223372036854775808")),
        *((DISK, text) for text in ("0", "-4", "1", "5", "66", "4.5", "1e30", "18446744073709551616")),
        *((field, text) for field in (CPU, MEMORY, DISK) for text in ('"NaN"', '"4"', "true", "[4]", "{}", '"inf"')),
    ],
)
def test_a_size_that_cannot_be_is_refused_by_name(api: Api, field: str, text: str) -> None:
    launch = json.dumps(WHOLE | {field: "HERE"}).replace('"HERE"', text)
    with unchanged(api):
        message = api.refused(
            "POST",
            "/v1/devboxes",
            400,
            content=f'{{"launch_parameters": {launch}}}'.encode(),
            headers={"content-type": "application/json"},
        )
    assert field in message, message


@pytest.mark.parametrize("text", ["NaN", "Infinity", "-Infinity", "1e999", "1" + 5000 * "0", "0x4", "04"])
@pytest.mark.parametrize("field", [CPU, MEMORY, DISK])
def test_a_size_that_is_no_number_of_json_is_refused(api: Api, field: str, text: str) -> None:
    launch = json.dumps(WHOLE | {field: "HERE"}).replace('"HERE"', text)
    with unchanged(api):
        content = f'{{"launch_parameters": {launch}}}'.encode()
        api.refused("POST", "/v1/devboxes", 400, content=content, headers={"content-type": "application/json"})


@pytest.mark.parametrize(("cores", "gib"), [(16, 16), (0.5, 8), (1, 1), (2, 32)])
def test_a_size_out_of_proportion_is_refused(api: Api, cores: float, gib: int) -> None:
    launch = WHOLE | {CPU: cores, MEMORY: gib}
    with unchanged(api):
        message = api.refused("POST", "/v1/devboxes", 400, {"launch_parameters": launch})
    assert f"{cores:g} cores with {gib} GiB" in message

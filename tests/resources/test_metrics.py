"""/metrics: counts that follow what happens, in a form that Prometheus reads, without a secret or an id in it."""

from __future__ import annotations

import contextlib
import re
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from support.api import Api
from support.reader import Reader
from support.server import Server

pytestmark = pytest.mark.box

MONITORING = Path(__file__).parents[2] / "docs" / "how-to" / "monitoring"
ALARMS, DASHBOARD = MONITORING / "alerts.yml", MONITORING / "dashboard.json"


class Scrape:
    """One look at all metrics."""

    def __init__(self, api: Api) -> None:
        answer = api.http.get("/metrics")
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        self.text = answer.text
        self.samples = {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(answer.text)
            for sample in family.samples
        }

    def value(self, name: str, **labels: str) -> float:
        return self.samples.get((name, frozenset(labels.items())), 0.0)

    def labels(self) -> Iterator[tuple[str, str]]:
        for _, labels in self.samples:
            yield from labels


def test_the_counts_follow_what_happens(own_server: Server) -> None:
    with own_server.api() as api:
        before = Scrape(api)
        for labels in ({"status": "failure", "reason": "out_of_memory"}, {"status": "shutdown", "reason": "idle"}):
            assert before.samples["devboxd_devboxes_ended_total", frozenset(labels.items())] >= 0
        for status in ("complete", "error"):
            assert before.samples["devboxd_snapshots_total", frozenset({("status", status)})] >= 0
        assert before.samples["devboxd_devboxes", frozenset({("status", "running")})] == 0
        assert before.samples["devboxd_http_server_errors_total", frozenset()] >= 0
        assert before.value("devboxd_ready") == 1
        assert before.samples["devboxd_promised_memory_bytes", frozenset()] == 0
        box = api.create()
        api.run(box, "true")
        running = api.start(box, "echo on; sleep 600")
        reader = Reader(own_server, box, running).until(lambda r: "on" in r.text)
        api.refused("GET", "/v1/devboxes/dbx_000000000000000000000", 404)
        during = Scrape(api)
        assert during.value("devboxd_devboxes", status="running") == 1
        assert during.value("devboxd_devboxes_created_total") - before.value("devboxd_devboxes_created_total") == 1
        assert during.value("devboxd_promised_memory_bytes") == 2 << 30
        assert during.value("devboxd_machine_memory_bytes") > 1 << 30
        assert during.value("devboxd_executions_running") == 1
        started = during.value("devboxd_executions_started_total")
        assert started - during.value("devboxd_executions_completed_total") == 1
        assert during.value("devboxd_streams_open") == 1
        assert during.value("devboxd_streams_limit") > 1
        missing = {"operation": "devboxes.retrieve_devbox", "status": "404"}
        assert during.value("devboxd_http_request_duration_seconds_count", **missing) == 1
        assert during.value("devboxd_http_request_duration_seconds_bucket", **missing, le="+Inf") == 1
        assert 0 < during.value("devboxd_http_request_duration_seconds_sum", **missing) < 60
        assert during.value("devboxd_store_writes_total") >= during.value("devboxd_store_commits_total") > 0
        assert during.value("process_open_fds") > 10
        assert during.value("process_resident_memory_bytes") > 10 << 20
        assert during.value("devboxd_state_disk_bytes") > during.value("devboxd_state_disk_free_bytes") > 0
        api.shutdown(box)
        assert reader.wait() == "clean"
        failing = api.call("POST", "/v1/devboxes", {"launch_parameters": {"launch_commands": ["exit 1"]}})["id"]
        reason = api.wait_box(failing, "failure")["failure_reason"]
        after = Scrape(api)
        assert after.value("devboxd_devboxes_ended_total", status="shutdown", reason="api_shutdown") == 1
        assert after.value("devboxd_devboxes_ended_total", status="failure", reason=reason) == 1
        assert after.value("devboxd_executions_running") == 0
        assert after.value("devboxd_streams_open") == 0


def test_snapshots_sleep_and_the_pool_are_counted(own_server: Server) -> None:
    with own_server.api() as api:
        box = api.create()
        snapshot = api.call("POST", f"/v1/devboxes/{box}/snapshot_disk")["id"]
        for verb, settled in (("suspend", "suspended"), ("resume", "running"), ("suspend", "suspended")):
            api.call("POST", f"/v1/devboxes/{box}/{verb}")
            api.wait_box(box, settled)
        scrape = Scrape(api)
        assert scrape.value("devboxd_snapshots_total", status="complete") == 1
        assert scrape.value("devboxd_snapshots_total", status="error") == 0
        assert scrape.value("devboxd_suspends_total") == 2
        assert scrape.value("devboxd_resumes_total") == 1
        if (own_server.state / "pool.btrfs").exists():
            assert scrape.value("devboxd_pool_bytes") > scrape.value("devboxd_pool_free_bytes") > 1 << 30
    own_server.kill()
    lost = "update snapshots set status = 'in_progress', id = ? where id = ?"  # as if it had not been made in time
    with contextlib.closing(sqlite3.connect(own_server.state / "devboxd.db")) as store, store:
        store.execute(lost, ("snp_" + "0" * 21, snapshot))
    own_server.start()
    with own_server.api() as api:
        assert Scrape(api).value("devboxd_snapshots_total", status="error") == 1


def test_the_last_backup_is_told(own_server: Server, tmp_path: Path) -> None:
    with own_server.api() as api:
        assert Scrape(api).samples["devboxd_last_backup_timestamp_seconds", frozenset()] == 0
        begun = time.time()
        own_server.command("backup", str(tmp_path / "b"), "--state", str(own_server.state))
        assert begun - 1 < Scrape(api).value("devboxd_last_backup_timestamp_seconds") <= time.time() + 1


NAME = re.compile(r"\b(?:devboxd|process)_[a-z_]+\b")


def test_alarms_and_dashboard_name_what_exists(api: Api) -> None:
    found = {name for name, _ in Scrape(api).samples}
    for file in (ALARMS, DASHBOARD):
        assert len(named := set(NAME.findall(file.read_text()))) > 5
        assert named <= found


def test_promtool_takes_alarms_and_metrics(api: Api) -> None:
    if (promtool := shutil.which("promtool")) is None:
        pytest.skip("promtool is not installed; `scripts/setup test` installs it with Debian's prometheus")
    for arguments, text in ((["rules", str(ALARMS)], ""), (["metrics"], Scrape(api).text)):
        done = subprocess.run(
            [promtool, "check", *arguments], input=text, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_metrics_need_a_key_also_from_the_same_machine(api: Api) -> None:
    assert api.http.get("/metrics", headers={"authorization": ""}).status_code == 401
    assert api.http.get("/metrics", headers={"authorization": "Bearer ak_wrong"}).status_code == 401


def test_labels_hold_nothing_that_a_caller_chose(api: Api, server: Server, box: str) -> None:
    word = "s3cret-word"
    api.run(box, f"echo {word}", shell_name=word)
    api.http.get(f"/v1/devboxes/{word}", params={word: word})
    api.http.request("BREW", f"/{word}")
    scrape = Scrape(api)
    assert word not in scrape.text
    assert server.key not in scrape.text
    assert box not in scrape.text
    assert {name for name, _ in scrape.labels()} <= {"operation", "status", "reason", "le", "version"}
    operations = {value for name, value in scrape.labels() if name == "operation"}
    assert all(re.fullmatch(r"[a-z]+\.[a-z_]+|none", operation) for operation in operations)

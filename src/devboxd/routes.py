"""The table: every operation of the API in one row each."""

from __future__ import annotations

from devboxd.access import api as files
from devboxd.devboxes import api as devboxes
from devboxd.devboxes import evictions
from devboxd.devboxes import snapshot_api as snapshots
from devboxd.devboxes.logs import api as logs
from devboxd.executions import api as executions
from devboxd.http.operation import Route
from devboxd.resources import accounts, metrics

_READ = "devboxes:read"
_WRITE = "devboxes:write"
_BOX = "/v1/devboxes/{devbox_id}"
_SNAPSHOTS = "/v1/devboxes/disk_snapshots"
_EXECUTION = _BOX + "/executions/{execution_id}"
_TEXT_BODY = 256 << 20
"""100 MB of text, however much of it JSON escapes."""
_STDIN_BODY = 9 << 20
"""8 MiB of text: all of it is in memory while it is written to its spool."""

ROUTES = (
    Route("GET", "/v1/accounts/me", accounts.me, "account:read"),
    Route("GET", "/metrics", metrics.retrieve_metrics, "metrics:read"),
    # devboxes
    Route("POST", "/v1/devboxes", devboxes.create_devbox, _WRITE, once=True),
    Route("GET", "/v1/devboxes", devboxes.list_devboxes, _READ),
    Route("POST", "/v1/devboxes/create_and_await_running", devboxes.create_and_await_running, _WRITE, once=True),
    Route("GET", "/v1/devboxes/evictions/watch", evictions.watch_evictions, _READ),
    Route("GET", _BOX, devboxes.retrieve_devbox, _READ),
    Route("POST", _BOX, devboxes.update_devbox, _WRITE, once=True),
    Route("POST", _BOX + "/wait_for_status", devboxes.wait_for_devbox, _READ, waits=True),
    Route("GET", _BOX + "/usage", devboxes.retrieve_usage, _READ),
    Route("POST", _BOX + "/keep_alive", devboxes.keep_alive, _WRITE),
    Route("POST", _BOX + "/shutdown", devboxes.shutdown_devbox, _WRITE),
    Route("GET", _BOX + "/logs", logs.list_logs, _READ),
    Route("GET", _BOX + "/logs/tail", logs.tail_logs, _READ),
    Route("POST", _BOX + "/snapshot_disk", snapshots.snapshot_disk, _WRITE, once=True),
    Route("POST", _BOX + "/snapshot_disk_async", snapshots.snapshot_disk_async, _WRITE, once=True),
    Route("POST", _BOX + "/suspend", devboxes.suspend_devbox, _WRITE, once=True),
    Route("POST", _BOX + "/resume", devboxes.resume_devbox, _WRITE, once=True),
    # snapshots
    Route("GET", _SNAPSHOTS, snapshots.list_snapshots, _READ),
    Route("GET", _SNAPSHOTS + "/list_public", snapshots.list_public_snapshots, _READ),
    Route("GET", _SNAPSHOTS + "/metadata/keys", snapshots.snapshot_metadata_keys, _READ),
    Route("GET", _SNAPSHOTS + "/metadata/keys/{key}/values", snapshots.snapshot_metadata_values, _READ),
    Route("GET", _SNAPSHOTS + "/public/metadata/keys", snapshots.public_snapshot_metadata_keys, _READ),
    Route("GET", _SNAPSHOTS + "/public/metadata/keys/{key}/values", snapshots.public_snapshot_metadata_values, _READ),
    Route("POST", _SNAPSHOTS + "/{snapshot_id}", snapshots.update_snapshot, _WRITE, once=True),
    Route("GET", _SNAPSHOTS + "/{snapshot_id}/status", snapshots.snapshot_status, _READ),
    Route("POST", _SNAPSHOTS + "/{snapshot_id}/verify", snapshots.verify_snapshot, _READ, waits=True),
    Route("POST", _SNAPSHOTS + "/{snapshot_id}/delete", snapshots.delete_snapshot, _WRITE, once=True),
    # executions
    Route("POST", _BOX + "/execute", executions.execute, _WRITE, once=True),
    Route("POST", _BOX + "/execute_async", executions.execute_async, _WRITE, once=True),
    Route("POST", _BOX + "/execute_sync", executions.execute_sync, _WRITE, once=True),
    Route("GET", _EXECUTION, executions.retrieve_execution, _READ),
    Route("POST", _EXECUTION + "/wait_for_status", executions.wait_for_execution, _READ, waits=True),
    Route("POST", _EXECUTION + "/kill", executions.kill_execution, _WRITE, once=True),
    Route("POST", _EXECUTION + "/send_std_in", executions.send_std_in, _WRITE, once=True, body_limit=_STDIN_BODY),
    Route("GET", _EXECUTION + "/stream_stdout_updates", executions.stream_stdout_updates, _READ),
    Route("GET", _EXECUTION + "/stream_stderr_updates", executions.stream_stderr_updates, _READ),
    # files
    Route("POST", _BOX + "/read_file_contents", files.read_file_contents, _READ),
    Route("POST", _BOX + "/write_file_contents", files.write_file_contents, _WRITE, once=True, body_limit=_TEXT_BODY),
    Route("POST", _BOX + "/write_file", files.write_file, _WRITE, once=True, body_limit=_TEXT_BODY),
    Route("POST", _BOX + "/upload_file", files.upload_file, _WRITE, once=True, streamed=True, form=files.UploadFile),
    Route("POST", _BOX + "/download_file", files.download_file, _READ),
)

"""One scenario by calls that Python clients have had since 0.16; `oldest.py` in the environment of such a client.

The server's address and key come from the variables that the client reads itself.
"""

from __future__ import annotations

import time

from runloop_api_client import Runloop


def main() -> None:
    """Create, execute, files, a snapshot and a devbox from it, sleep, the end."""
    devboxes = Runloop().devboxes
    box = devboxes.create_and_await_running(name="old", environment_variables={"A": "1"}).id
    assert devboxes.retrieve(box).name == "old"
    assert box in [one.id for one in devboxes.list(limit=100)]
    done = devboxes.execute_sync(box, command="echo $A; exit 3")
    assert (done.exit_status, done.stdout) == (3, "1\n")
    begun = devboxes.execute_async(box, command="seq 3").execution_id
    view = devboxes.executions.await_completed(begun, devbox_id=box)
    assert (view.exit_status, view.stdout) == (0, "1\n2\n3\n")
    devboxes.write_file_contents(box, file_path="text", contents="hällo\n")
    assert devboxes.read_file_contents(box, file_path="text") == "hällo\n"
    devboxes.upload_file(box, path="bytes", file=b"\0\1" * 1000)
    assert devboxes.download_file(box, path="bytes").read() == b"\0\1" * 1000
    snapshot = devboxes.snapshot_disk(box, name="old").id
    assert snapshot in [one.id for one in devboxes.list_disk_snapshots()]
    fork = devboxes.create_and_await_running(snapshot_id=snapshot).id
    assert devboxes.read_file_contents(fork, file_path="text") == "hällo\n"
    assert devboxes.shutdown(fork).status == "shutdown"
    devboxes.suspend(box)
    _wait(devboxes, box, "suspended")
    devboxes.resume(box)
    _wait(devboxes, box, "running")
    assert devboxes.read_file_contents(box, file_path="text") == "hällo\n"
    assert devboxes.logs.list(box).logs
    devboxes.delete_disk_snapshot(snapshot)
    assert devboxes.shutdown(box).status == "shutdown"


def _wait(devboxes: object, box: str, status: str) -> None:
    """These clients have no wait for it: ask until it is so, or the test's own time ends."""
    while devboxes.retrieve(box).status != status:  # type: ignore[attr-defined]
        time.sleep(0.05)


if __name__ == "__main__":
    main()

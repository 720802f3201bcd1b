"""A device below the state folder that fails: it is told, costs no devbox, and can be exchanged."""

from __future__ import annotations

import subprocess
import time

import pytest

from support import devices
from support.server import Server

pytestmark = pytest.mark.box


@pytest.mark.parametrize("end", ["kill", "terminate"])
@pytest.mark.parametrize("target", ["error", "flakey"])
def test_a_device_that_fails_costs_no_devbox(target: str, end: str) -> None:
    """With `error` every read and write fails, with `flakey` every write."""
    if (why := devices.lack(target)) is not None:
        pytest.skip(f"cannot make a device fail: {why}")
    with devices.mapped_disk(3072) as disk:
        server = Server(warm_boxes="1")
        server.state = disk.folder / "state"
        try:
            with server.start().api() as api:
                box = api.create()
                api.output(box, "echo kept >kept; sync -f .")
                subprocess.run(["sync", "--file-system", server.state / "disks", disk.folder], check=True)
                api.start(box, "while :; do echo more >>more; sync -f .; done")
                disk.become(target)
                deadline = time.monotonic() + 120  # a disk that can be read is said to fail once something is written
                while (answer := api.http.get("/healthz")).status_code != 503:
                    assert time.monotonic() < deadline, "the failure is not noticed"
                    time.sleep(0.02)
                assert "disk" in answer.text
                assert api.http.post("/v1/devboxes", json={"name": "broken"}).status_code == 503
                getattr(server, end)()
            assert "Traceback" not in server.log.read_text()
            command = [server.program, "storage", "recover", "--state", server.state]
            said = subprocess.run(command, capture_output=True, text=True, env=server.environment(), check=False)
            assert (said.returncode, box in said.stderr) == (2, True), said
            assert "Traceback" not in said.stderr
            disk.mend()
            server.start()
            with server.api() as api:
                api.wake(box)
                assert api.http.get("/healthz").status_code == 200
                assert api.output(box, "cat kept") == "kept\n"
        finally:
            server.stop()

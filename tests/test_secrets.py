"""Secrets are planted wherever a caller can put one, and looked for wherever they must not be."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.server import Server

pytestmark = pytest.mark.box

MARK = "s3cr3t-7f1c"


def _files(folder: Path) -> Iterator[Path]:
    """All files below a folder but those that lxcfs shows, which are the kernel's."""
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if name != "lxcfs"]
        yield from (path for name in names if (path := Path(place, name)).is_file())


def test_no_log_config_or_list_of_processes_has_a_secret(own_server: Server) -> None:
    with own_server.api() as api:
        box = api.create(
            name=f"{MARK}-name",
            metadata={"token": f"{MARK}-metadata"},
            environment_variables={"TOKEN": f"{MARK}-environment"},
            file_mounts={"token.txt": f"{MARK}-mount"},
            launch_parameters={"launch_commands": [f": {MARK}-launch"]},
        )
        assert api.output(box, f"echo $TOKEN {MARK}-command").startswith(MARK)
        execution = api.start(box, "cat", attach_stdin=True)
        api.send(box, execution, f"{MARK}-stdin")
        processes = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
        api.write(box, f"{MARK}-path", f"{MARK}-contents")
        api.http.get(f"/v1/devboxes/{box}", params={"token": f"{MARK}-query"})
        api.http.get("/v1/devboxes", headers={"authorization": f"Bearer {MARK}-key"})
        api.http.post(f"/v1/devboxes/{box}/execute", content=f'{{"command": {MARK}-broken')
        api.http.post(f"/v1/devboxes/{box}/execute_sync", json={"command": "exit 1", "unknown": f"{MARK}-field"})
        state = own_server.state
        searched = [own_server.log, *_files(own_server.boxes.parent)]
        assert len(searched) >= 3
        for path in searched:
            text = path.read_bytes()
            assert MARK.encode() not in text, f"{path} holds a secret"
            assert own_server.key.encode() not in text, f"{path} holds the key"
        assert MARK not in processes
        assert own_server.key not in processes
        assert api.output(box, "sudo tr '\\0' '\\n' < /proc/1/environ 2>&1 | grep -c s3cr3t || true") == "0\n"
        database = (state / "devboxd.db").read_bytes()
        assert own_server.key.encode() not in database

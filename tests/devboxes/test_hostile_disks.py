"""What a box left on its disk is met again when it starts: it must hold up nobody, and nothing for long."""

from __future__ import annotations

import time

import pytest

from support.api import Api

pytestmark = pytest.mark.box

LONG_S = 9.0
"""A start that looks into a pipe, or deletes a million names, takes far longer."""


@pytest.mark.parametrize(
    "spoil",
    [
        "mkfifo /etc/new && mv /etc/new /etc/passwd",
        "mkfifo /etc/new && mv /etc/new /etc/group",
        "mkfifo /etc/new && mv /etc/new /etc/shadow",
        "truncate -s 1T /etc/passwd",
        "ln -sf passwd /etc/passwd",
        "ln -sfn /proc/self/fd/0 /etc/passwd",
        "rm -f /etc/hosts; mkdir -p /etc/hosts/in && chmod 000 /etc/hosts",
        "rm -f /etc/hosts; mkfifo /etc/hosts",
        "rm -f /etc/resolv.conf; ln -s /proc/kmsg /etc/resolv.conf",
        "rm -f /etc/hostname; fallocate -l 100M /etc/hostname",
        "mv /etc /etc2; ln -s / /etc",
        "mv /etc /etc2; ln -s etc /etc",
        "mv /etc /etc2; mkfifo /etc",
        "mv /etc /etc2; touch /etc",
        "chmod 000 /etc /",
        "mv /home /home2; mkfifo /home",
        "mv /usr/bin/bash /usr/bin/bash2; mkfifo /usr/bin/bash",
        "rm -rf --one-file-system /opt /srv /mnt /media /home /root /var /boot; true",
    ],
)
def test_a_spoiled_disk_starts_or_fails_soon(api: Api, spoil: str) -> None:
    box = api.create()
    api.run(box, f"sudo sh -c '{spoil}'")
    snapshot = api.call("POST", f"/v1/devboxes/{box}/snapshot_disk")["id"]
    api.call("POST", f"/v1/devboxes/{box}/suspend")
    api.wait_box(box, "suspended")
    begun = time.monotonic()
    api.call("POST", f"/v1/devboxes/{box}/resume")
    resumed = api.wait_box(box, "running", "failure", "suspended")["status"]
    middle = time.monotonic()
    copy = api.call("POST", "/v1/devboxes", {"snapshot_id": snapshot})["id"]
    created = api.wait_box(copy, "running", "failure")["status"]
    ended = time.monotonic()
    print(f"{resumed} in {middle - begun:.1f} s, {created} in {ended - middle:.1f} s")
    api.shutdown(copy)
    if resumed != "failure":
        api.shutdown(box)
    assert middle - begun < LONG_S
    assert ended - middle < LONG_S

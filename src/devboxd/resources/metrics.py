"""GET /metrics, and what it tells of the server as a whole: that it is ready, its version, its disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import Metric
from starlette.responses import Response

import devboxd
from devboxd.boot import last_backup
from devboxd.metrics import Metrics, gauge

_MEMORY_BYTES = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class ServerMetrics:
    """Metrics that belong to no part alone. `ready`: whether commands can be run; `writable`: whether disks can."""

    def __init__(self, state: Path, ready: Callable[[], bool], writable: Callable[[], bool]) -> None:
        self._state = state
        self._ready = ready
        self._writable = writable

    def collect(self) -> Iterator[Metric]:
        """The families of the server and of the disk below its state folder. Raises OSError."""
        yield gauge("devboxd_build_info", "The version that runs", {(devboxd.__version__,): 1}, "version")
        yield gauge("devboxd_ready", "Whether commands can be run: 1 or 0", {(): int(self._ready())})
        text = "When `devboxd backup` was finished last, in seconds since 1970; 0 for never"
        yield gauge("devboxd_last_backup_timestamp_seconds", text, {(): last_backup(self._state)})
        yield gauge("devboxd_machine_memory_bytes", "Memory of the machine", {(): _MEMORY_BYTES})
        disk = shutil.disk_usage(self._state)
        yield gauge("devboxd_state_disk_bytes", "Size of the disk that holds the state folder", {(): disk.total})
        yield gauge("devboxd_state_disk_free_bytes", "What is free of it", {(): disk.free})
        text = "Whether the pool of disks can be written at all: 1 or 0"
        yield gauge("devboxd_pool_writable", text, {(): int(self._writable())})
        if os.path.ismount(self._state / "disks"):
            pool = shutil.disk_usage(self._state / "disks")
            text = "Size of the pool of disks, where it is not a part of that disk; it grows"
            yield gauge("devboxd_pool_bytes", text, {(): pool.total})
            yield gauge("devboxd_pool_free_bytes", "What is free of it", {(): pool.free})


async def retrieve_metrics(metrics: Metrics) -> Annotated[Response, "text/plain"]:
    """Counts for Prometheus, in its text format.

    ```python
    answer = client.get("/metrics", cast_to=str)
    ```
    """
    return Response(metrics.text(), headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4})

"""What an operator watches, in the text format of Prometheus. Labels are names that this server knows, never ids."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.responses import Response

import devboxd
from devboxd.boot import last_backup
from devboxd.devboxes.changes import Changes
from devboxd.devboxes.incidents import Incidents
from devboxd.devboxes.lifecycle import Devboxes
from devboxd.devboxes.snapshots import Snapshots
from devboxd.devboxes.states import TERMINAL, Status
from devboxd.executions.running import Executions
from devboxd.http.requests import BOUNDS_S, Requests
from devboxd.http.streams import Places
from devboxd.store.db import Store

Counts = Mapping[tuple[str, ...], float]
"""Values by those of their labels."""
_MEMORY_BYTES = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class Metrics(Collector):
    """Reads the counts that the parts of the server keep anyway, when somebody asks.

    A new part gets a method that yields its families, and a line in `collect`.
    """

    def __init__(
        self,
        state: Path,
        store: Store,
        requests: Requests,
        places: Places,
        devboxes: Devboxes,
        changes: Changes,
        executions: Executions,
        incidents: Incidents,
        snapshots: Snapshots,
        ready: Callable[[], bool],
        writable: Callable[[], bool],
    ) -> None:
        self._state = state
        self._store = store
        self._requests = requests
        self._places = places
        self._devboxes = devboxes
        self._changes = changes
        self._executions = executions
        self._incidents = incidents
        self._snapshots = snapshots
        self._ready = ready
        self._writable = writable
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)
        ProcessCollector(registry=self._registry)

    def text(self) -> bytes:
        """All of it now."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """Every family but those of the process."""
        yield _gauge("devboxd_build_info", "The version that runs", {(devboxd.__version__,): 1}, "version")
        yield _gauge("devboxd_ready", "Whether commands can be run: 1 or 0", {(): int(self._ready())})
        text = "When `devboxd backup` was finished last, in seconds since 1970; 0 for never"
        yield _gauge("devboxd_last_backup_timestamp_seconds", text, {(): last_backup(self._state)})
        yield from self._of_devboxes()
        yield from self._of_executions()
        yield from self._of_http()
        yield from self._of_store()

    def _of_devboxes(self) -> Iterator[Metric]:
        now: Counter[tuple[str, ...]] = Counter({(str(status),): 0 for status in Status if status not in TERMINAL})
        now.update((str(status),) for status in self._devboxes.living())
        yield _gauge("devboxd_devboxes", "Devboxes that have not been freed", now, "status")
        yield _counter("devboxd_devboxes_created", "Devboxes made by this server", {(): self._devboxes.created})
        yield _gauge("devboxd_warm_boxes", "Boxes that wait for a create", {(): self._devboxes.waiting})
        text = "Memory that devboxes may use together, as far as they are not asleep"
        yield _gauge("devboxd_promised_memory_bytes", text, {(): self._devboxes.promised_memory()})
        yield _gauge("devboxd_machine_memory_bytes", "Memory of the machine", {(): _MEMORY_BYTES})
        ended = self._changes.ended
        yield _counter("devboxd_devboxes_ended", "Devboxes that ended, and why", ended, "status", "reason")
        yield _counter("devboxd_suspends", "Devboxes put to sleep", {(): self._changes.suspended})
        yield _counter("devboxd_resumes", "Devboxes that slept and run again", {(): self._changes.resumed})
        taken = self._snapshots.finished
        yield _counter("devboxd_snapshots", "Snapshots that are complete or have failed (error)", taken, "status")
        text = "Processes of devboxes that the kernel killed for lack of memory"
        yield _counter("devboxd_oom_kills", text, {(): self._incidents.oom_kills})

    def _of_executions(self) -> Iterator[Metric]:
        executions = self._executions
        yield _gauge("devboxd_executions_running", "Executions that have not completed", {(): executions.running})
        yield _counter("devboxd_executions_started", "Executions that were begun", {(): executions.started})
        yield _counter("devboxd_executions_completed", "Executions that have ended", {(): executions.completed})

    def _of_http(self) -> Iterator[Metric]:
        family = HistogramMetricFamily(
            "devboxd_http_request_duration_seconds", "Time until an answer began", labels=["operation", "status"]
        )
        for (operation, status), taken in sorted(self._requests.taken.items()):
            total, buckets = 0, []
            for bound, count in zip((*map(str, BOUNDS_S), "+Inf"), taken.buckets, strict=True):
                total += count
                buckets.append((bound, float(total)))
            family.add_metric([operation, str(status)], buckets, taken.seconds)
        yield family
        failed = sum(sum(taken.buckets) for (_, status), taken in self._requests.taken.items() if status >= 500)
        yield _counter("devboxd_http_server_errors", "Requests answered with a status from 500 on", {(): failed})
        yield _gauge("devboxd_streams_open", "Streams and file transfers that are open", {(): self._places.taken})
        yield _gauge("devboxd_streams_limit", "How many may be open", {(): self._places.limit})

    def _of_store(self) -> Iterator[Metric]:
        yield _counter("devboxd_store_writes", "Changes of the store", {(): self._store.writes})
        yield _counter("devboxd_store_commits", "Transactions that they shared", {(): self._store.commits})
        disk = shutil.disk_usage(self._state)
        yield _gauge("devboxd_state_disk_bytes", "Size of the disk that holds the state folder", {(): disk.total})
        yield _gauge("devboxd_state_disk_free_bytes", "What is free of it", {(): disk.free})
        text = "Whether the pool of disks can be written at all: 1 or 0"
        yield _gauge("devboxd_pool_writable", text, {(): int(self._writable())})
        if os.path.ismount(self._state / "disks"):
            pool = shutil.disk_usage(self._state / "disks")
            text = "Size of the pool of disks, where it is not a part of that disk; it grows"
            yield _gauge("devboxd_pool_bytes", text, {(): pool.total})
            yield _gauge("devboxd_pool_free_bytes", "What is free of it", {(): pool.free})


async def retrieve_metrics(metrics: Metrics) -> Annotated[Response, "text/plain"]:
    """Counts for Prometheus, in its text format.

    ```python
    answer = client.get("/metrics", cast_to=str)
    ```
    """
    return Response(metrics.text(), headers={"content-type": CONTENT_TYPE_PLAIN_0_0_4})


def _gauge(name: str, text: str, values: Counts, *labels: str) -> GaugeMetricFamily:
    family = GaugeMetricFamily(name, text, labels=labels)
    for key, value in sorted(values.items()):
        family.add_metric(key, value)
    return family


def _counter(name: str, text: str, values: Counts, *labels: str) -> CounterMetricFamily:
    family = CounterMetricFamily(name, text, labels=labels)
    for key, value in sorted(values.items()):
        family.add_metric(key, value)
    return family

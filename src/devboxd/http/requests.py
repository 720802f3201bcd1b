"""Counts of requests by operation and status, and how long their answers took to begin: a few additions a request."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator

from prometheus_client.core import HistogramMetricFamily
from prometheus_client.metrics_core import Metric

from devboxd.metrics import counter

BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper bounds of the buckets, in seconds; one more is for all that took longer."""
UNKNOWN = "none"
"""The operation of requests that were refused before one was found."""


class Taken:
    """Requests of one operation and status: how many fell into each bucket, and the sum of their seconds."""

    __slots__ = ("buckets", "seconds")

    def __init__(self) -> None:
        self.buckets = [0] * (len(BOUNDS_S) + 1)
        self.seconds = 0.0


class Requests:
    """All requests since the server was started. The names come from the table of operations, never from a caller."""

    def __init__(self) -> None:
        self.taken: dict[tuple[str, int], Taken] = {}

    def collect(self) -> Iterator[Metric]:
        """The histogram of all requests, and the number of those that failed by a fault of the server."""
        family = HistogramMetricFamily(
            "devboxd_http_request_duration_seconds", "Time until an answer began", labels=["operation", "status"]
        )
        for (operation, status), taken in sorted(self.taken.items()):
            total, buckets = 0, []
            for bound, count in zip((*map(str, BOUNDS_S), "+Inf"), taken.buckets, strict=True):
                total += count
                buckets.append((bound, float(total)))
            family.add_metric([operation, str(status)], buckets, taken.seconds)
        yield family
        failed = sum(sum(taken.buckets) for (_, status), taken in self.taken.items() if status >= 500)
        yield counter("devboxd_http_server_errors", "Requests answered with a status from 500 on", {(): failed})

    def count(self, operation: str, status: int, seconds: float) -> None:
        """One request."""
        taken = self.taken.get((operation, status))
        if taken is None:
            taken = self.taken[operation, status] = Taken()
        taken.buckets[bisect_left(BOUNDS_S, seconds)] += 1
        taken.seconds += seconds

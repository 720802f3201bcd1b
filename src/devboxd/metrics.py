"""Metrics of the server's parts, in the text format of Prometheus. Labels are names that this server knows, never ids.

A part that counts something has a method `collect`, which yields its families, and is registered where it is built.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Protocol

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

Counts = Mapping[tuple[str, ...], float]
"""Values by those of their labels."""


class Counting(Protocol):
    """A part with metrics of its own."""

    def collect(self) -> Iterable[Metric]:
        """All families of this part, with their values of now."""
        ...


class Metrics:
    """The metrics of one server. Values are read from the parts when a client asks."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=self._registry)

    def register(self, *parts: Counting) -> None:
        """Include the metrics of these parts. Raises ValueError for the name of a family that is there already."""
        for part in parts:
            self._registry.register(_Adapter(part))

    def text(self) -> bytes:
        """All of them now."""
        return generate_latest(self._registry)


class _Adapter(Collector):
    def __init__(self, part: Counting) -> None:
        self._part = part

    def collect(self) -> Iterable[Metric]:
        return self._part.collect()


def gauge(name: str, text: str, values: Counts, *labels: str) -> GaugeMetricFamily:
    """A family of values that rise and fall; `labels` are the names for the parts of the keys of `values`."""
    family = GaugeMetricFamily(name, text, labels=labels)
    for key, value in sorted(values.items()):
        family.add_metric(key, value)
    return family


def counter(name: str, text: str, values: Counts, *labels: str) -> CounterMetricFamily:
    """A family of values that only rise, as `gauge`; its samples are named with `_total`."""
    family = CounterMetricFamily(name, text, labels=labels)
    for key, value in sorted(values.items()):
        family.add_metric(key, value)
    return family

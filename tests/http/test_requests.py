"""Counting requests."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from devboxd.http.requests import BOUNDS_S, Requests


@given(st.lists(st.floats(0, 100), min_size=1))
def test_each_request_falls_into_one_bucket(times: list[float]) -> None:
    requests = Requests()
    for seconds in times:
        requests.count("devboxes.create_devbox", 200, seconds)
    taken = requests.taken["devboxes.create_devbox", 200]
    for number, bound in enumerate(BOUNDS_S, 1):
        assert sum(taken.buckets[:number]) == sum(seconds <= bound for seconds in times), "as Prometheus defines `le`"
    assert sum(taken.buckets) == len(times)
    assert taken.seconds == sum(times)

"""What the server says of itself while it starts."""

from __future__ import annotations

from structlog.testing import capture_logs

from devboxd.app import Readiness


def test_the_log_tells_each_tenth_of_an_image_that_is_built() -> None:
    ready = Readiness()
    with capture_logs() as lines:
        for hundredth in range(101):
            ready.progress(hundredth / 100, f"step {hundredth}")
    assert [line["done"] for line in lines] == [f"{tenth}0%" if tenth else "0%" for tenth in range(10)]
    assert ready.state is not None
    assert "100%, step 100" in ready.state.reason


def test_an_image_that_is_there_is_nothing_to_tell() -> None:
    with capture_logs() as lines:
        Readiness().progress(1.0, "image is ready")
    assert lines == []

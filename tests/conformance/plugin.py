"""Loaded into the published client's own test run: bounds each test and writes down how each one ended."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

LISTED_TIMEOUT_S = 20
_expected_to_fail = set(filter(None, os.environ.get("CONFORMANCE_LISTED", "").splitlines()))
_outcomes: dict[str, tuple[str, str]] = {}
_SEVERITY = ("passed", "skipped", "failed")


def short_name(nodeid: str) -> str:
    """The name of a test without the folder that all of them share."""
    return nodeid.removeprefix("tests/smoketests/")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """A listed test gets little time: it is run only to notice when it begins to pass."""
    for item in items:
        if short_name(item.nodeid) in _expected_to_fail:
            item.add_marker(pytest.mark.timeout(LISTED_TIMEOUT_S), append=False)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Keep the worst outcome of set-up, call and tear-down."""
    if report.when != "call" and report.outcome == "passed":
        return
    name = short_name(report.nodeid)
    before = _outcomes.get(name, ("passed", ""))[0]
    if _SEVERITY.index(report.outcome) >= _SEVERITY.index(before):
        _outcomes[name] = (report.outcome, _reason(report))


def pytest_sessionfinish(session: pytest.Session) -> None:
    """The process that gathers all reports writes the result."""
    if not hasattr(session.config, "workerinput"):
        Path(os.environ["CONFORMANCE_RESULT"]).write_text(json.dumps(_outcomes))


def _reason(report: pytest.TestReport) -> str:
    """One line that says why a test did not pass."""
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    lines = [line for line in str(report.longrepr or "").splitlines() if line.startswith("E ")]
    return lines[0][1:].strip() if lines else ""

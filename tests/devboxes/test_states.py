"""The state table: every pair, and random sequences."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devboxd.devboxes.states import (
    LIVE,
    TABLE,
    TERMINAL,
    WORK,
    Event,
    InvalidTransition,
    Refusal,
    Status,
    Transition,
    Work,
    step,
)

PAIRS = [(status, event) for status in Status for event in Event]


@pytest.mark.parametrize(("status", "event"), PAIRS)
def test_every_pair_has_one_meaning(status: Status, event: Event) -> None:
    if status in TABLE[event]:
        transition = step(status, event)
        if isinstance(transition, Refusal):
            assert 400 <= transition.code < 500
            assert transition.advice
        else:
            assert transition.status in Status
            assert (transition.shutdown_reason is not None) == (
                transition.status == Status.SHUTDOWN and status not in TERMINAL
            )
    else:
        with pytest.raises(InvalidTransition, match=f"{event}.*{status}"):
            step(status, event)


@pytest.mark.parametrize("event", [event for event in Event if event.endswith("_asked")])
def test_requests_never_meet_an_invalid_transition(event: Event) -> None:
    for status in Status:
        assert isinstance(step(status, event), Transition | Refusal)


def test_a_refusal_says_what_to_do_and_not_the_status_again() -> None:
    """It stands behind "cannot ... while its status is ...: "."""
    for event, row in TABLE.items():
        for status, transition in row.items():
            if isinstance(transition, Refusal):
                assert f"it is {status}" not in transition.advice, (event, status)
                assert transition.advice[0].islower()
                assert not transition.advice.endswith(".")
                assert re.search(r"\b(wait|resume|use|create)\b", transition.advice), (event, status)


@pytest.mark.parametrize("event", Event)
def test_terminal_states_never_change(event: Event) -> None:
    for status in TERMINAL:
        transition = step(status, event)
        assert isinstance(transition, Refusal) or (transition.status == status and not transition.effects)


@given(st.lists(st.sampled_from(Event), max_size=40))
def test_random_sequences_keep_the_rules(events: list[Event]) -> None:
    """Once ended, always ended: the work of an end is come to once."""
    status, ends = Status.PROVISIONING, 0
    for event in events:
        try:
            transition = step(status, event)
        except InvalidTransition:
            continue
        if isinstance(transition, Refusal):
            continue
        assert not (status in TERMINAL and transition.status != status)
        ends += status not in TERMINAL and transition.status in TERMINAL
        status = transition.status
    assert ends == (1 if status in TERMINAL else 0)


def test_a_fault_of_the_server_tells_the_last_statuses() -> None:
    with pytest.raises(InvalidTransition, match="it was provisioning, running") as raised:
        step(Status.RUNNING, Event.THAWED, ["provisioning", "running"])
    assert raised.value.history == ("provisioning", "running")


def test_each_status_has_its_work() -> None:
    assert set(WORK) == set(Status)
    assert set(WORK.values()) == set(Work)
    assert {status for status, work in WORK.items() if work is Work.FREE} == TERMINAL


def test_the_way_to_running() -> None:
    assert step(Status.PROVISIONING, Event.BOOTED) == Transition(Status.INITIALIZING)
    assert step(Status.INITIALIZING, Event.PREPARED) == Transition(Status.RUNNING)
    assert step(Status.PROVISIONING, Event.READY) == Transition(Status.RUNNING, through=Status.INITIALIZING)
    assert step(Status.RUNNING, Event.USE_ASKED) == Transition(Status.RUNNING)
    for status in LIVE:
        assert step(status, Event.SHUTDOWN_ASKED) == Transition(Status.SHUTDOWN, shutdown_reason="api_shutdown")


def test_the_way_to_sleep_and_back() -> None:
    assert step(Status.RUNNING, Event.SUSPEND_ASKED) == Transition(Status.SUSPENDING)
    assert step(Status.SUSPENDING, Event.SUSPENDED) == Transition(Status.SUSPENDED)
    again = step(Status.SUSPENDED, Event.RESUME_ASKED)
    assert isinstance(again, Transition)
    assert again.status == Status.PROVISIONING
    thawed = step(Status.SUSPENDED, Event.THAWED)
    assert isinstance(thawed, Transition)
    assert thawed.status == Status.RUNNING


@pytest.mark.parametrize(("event", "from_"), [(Event.SUSPEND_ASKED, "running"), (Event.RESUME_ASKED, "suspended")])
def test_illegal_suspend_and_resume_are_400(event: Event, from_: str) -> None:
    for status in set(Status) - {from_}:
        transition = step(status, event)
        assert isinstance(transition, Refusal)
        assert transition.code == 400


def test_a_shutdown_during_a_snapshot_is_409() -> None:
    for status in set(Status) - TERMINAL:
        transition = step(status, Event.SHUTDOWN_DURING_SNAPSHOT_ASKED)
        assert isinstance(transition, Refusal)
        assert transition.code == 409


@pytest.mark.parametrize("status", [Status.SUSPENDING, Status.SUSPENDED])
def test_what_ends_processes_does_not_end_a_sleeping_devbox(status: Status) -> None:
    ends = {
        Event.FAILED,
        Event.BOX_ENDED,
        Event.HOST_STOPS,
        Event.HOST_RESTARTED,
        Event.RESUME_FAILED,
        Event.DEADLINE_PASSED,
    }
    for event in ends | {Event.ENTRYPOINT_ENDED, Event.IDLE_TO_SHUTDOWN}:
        transition = step(status, event)
        assert isinstance(transition, Transition)
        assert transition.status not in TERMINAL

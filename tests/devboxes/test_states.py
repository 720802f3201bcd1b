"""The state table: every pair, and random sequences."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devboxd.devboxes.states import LIVE, TABLE, TERMINAL, Effect, Event, InvalidTransition, Move, Refusal, Status, step

PAIRS = [(status, event) for status in Status for event in Event]


@pytest.mark.parametrize(("status", "event"), PAIRS)
def test_every_pair_has_one_meaning(status: Status, event: Event) -> None:
    if status in TABLE[event]:
        move = step(status, event)
        if isinstance(move, Refusal):
            assert 400 <= move.code < 500
            assert move.advice
        else:
            assert move.status in Status
            assert (Effect.FREE in move.effects) == (move.status in TERMINAL and status not in TERMINAL)
            assert (move.shutdown_reason is not None) == (move.status == Status.SHUTDOWN and status not in TERMINAL)
    else:
        with pytest.raises(InvalidTransition, match=f"{event}.*{status}"):
            step(status, event)


@pytest.mark.parametrize("event", [event for event in Event if event.endswith("_asked")])
def test_requests_never_meet_an_invalid_transition(event: Event) -> None:
    for status in Status:
        assert isinstance(step(status, event), Move | Refusal)


def test_a_refusal_says_what_to_do_and_not_the_status_again() -> None:
    """It stands behind "cannot ... while its status is ...: "."""
    for event, row in TABLE.items():
        for status, move in row.items():
            if isinstance(move, Refusal):
                assert f"it is {status}" not in move.advice, (event, status)
                assert move.advice[0].islower()
                assert not move.advice.endswith(".")
                assert re.search(r"\b(wait|resume|use|create)\b", move.advice), (event, status)


@pytest.mark.parametrize("event", Event)
def test_terminal_states_never_change(event: Event) -> None:
    for status in TERMINAL:
        move = step(status, event)
        assert isinstance(move, Refusal) or (move.status == status and not move.effects)


@given(st.lists(st.sampled_from(Event), max_size=40))
def test_random_sequences_keep_the_rules(events: list[Event]) -> None:
    """Once ended, always ended; a disk is freed exactly once, on the way into the end."""
    status, freed = Status.PROVISIONING, 0
    for event in events:
        try:
            move = step(status, event)
        except InvalidTransition:
            continue
        if isinstance(move, Refusal):
            continue
        assert not (status in TERMINAL and move.status != status)
        freed += move.effects.count(Effect.FREE)
        status = move.status
    assert freed == (1 if status in TERMINAL else 0)


def test_the_way_to_running() -> None:
    assert step(Status.PROVISIONING, Event.BOOTED) == Move(Status.INITIALIZING, (Effect.PREPARE,))
    assert step(Status.INITIALIZING, Event.PREPARED) == Move(Status.RUNNING, (Effect.START_ENTRYPOINT,))
    at_once = step(Status.PROVISIONING, Event.READY)
    assert at_once == Move(Status.RUNNING, (Effect.START_ENTRYPOINT,), through=Status.INITIALIZING)
    assert step(Status.RUNNING, Event.USE_ASKED) == Move(Status.RUNNING)
    for status in LIVE:
        assert step(status, Event.SHUTDOWN_ASKED) == Move(Status.SHUTDOWN, (Effect.FREE,), "api_shutdown")


def test_the_way_to_sleep_and_back() -> None:
    assert step(Status.RUNNING, Event.SUSPEND_ASKED) == Move(Status.SUSPENDING, (Effect.SUSPEND,))
    assert step(Status.SUSPENDING, Event.SUSPENDED) == Move(Status.SUSPENDED)
    again = step(Status.SUSPENDED, Event.RESUME_ASKED)
    assert isinstance(again, Move)
    assert again.status == Status.PROVISIONING
    thawed = step(Status.SUSPENDED, Event.THAWED)
    assert isinstance(thawed, Move)
    assert thawed.status == Status.RUNNING


@pytest.mark.parametrize(("event", "from_"), [(Event.SUSPEND_ASKED, "running"), (Event.RESUME_ASKED, "suspended")])
def test_illegal_suspend_and_resume_are_400(event: Event, from_: str) -> None:
    for status in set(Status) - {from_}:
        move = step(status, event)
        assert isinstance(move, Refusal)
        assert move.code == 400


def test_a_shutdown_during_a_snapshot_is_409() -> None:
    for status in set(Status) - TERMINAL:
        move = step(status, Event.SHUTDOWN_DURING_SNAPSHOT_ASKED)
        assert isinstance(move, Refusal)
        assert move.code == 409


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
        move = step(status, event)
        assert isinstance(move, Move)
        assert move.status not in TERMINAL

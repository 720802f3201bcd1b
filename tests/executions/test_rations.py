"""Promises of room for output: all together within a bound, and something for everybody."""

from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from devboxd.executions.journals import Journals
from devboxd.executions.rations import LEAST, Rations

CAP, TOTAL = 1 << 30, 16 << 30


def test_the_first_commands_get_all_that_a_stream_may_have() -> None:
    rations = Rations(CAP, TOTAL)
    assert [rations.promise("dbx_1", str(n)) for n in range(4)] == [CAP] * 4
    assert rations.promise("dbx_1", "4") == CAP
    assert rations.promise("dbx_1", "5") < CAP
    assert rations.promise("dbx_1", "5") == rations.promise("dbx_1", "5")
    assert rations.promise("dbx_2", "0") == CAP


def test_what_was_promised_and_not_written_is_given_to_others() -> None:
    rations = Rations(CAP, TOTAL)
    for number in range(100):
        rations.promise("dbx_1", str(number))
    assert rations.promise("dbx_1", "late") < CAP
    for number in range(100):
        rations.keep("dbx_1", str(number), 10)
    rations.keep("dbx_1", "late", 10)
    assert rations.promise("dbx_1", "later") == CAP
    rations.measured("dbx_1", rations.taken("dbx_1"), TOTAL)
    assert rations.promise("dbx_1", "last") == LEAST
    rations.forget("dbx_1")
    assert rations.promise("dbx_1", "new") == CAP


@given(st.lists(st.tuples(st.integers(0, 1), st.integers(0, 30)), max_size=200))
def test_commands_that_write_all_that_they_may_stay_within_the_bound(steps: list[tuple[int, int]]) -> None:
    """Whatever begins and ends in between; each command past the bound adds the least that there is."""
    rations = Rations(CAP, TOTAL)
    running: dict[str, int] = {}
    written, least = 0, 0
    for number, (begins, which) in enumerate(steps):
        if begins or not running:
            running[str(number)] = rations.promise("dbx_1", str(number))
            least += running[str(number)] == LEAST
        else:
            name = list(running)[which % len(running)]
            written += 2 * running[name]
            rations.keep("dbx_1", name, 2 * running.pop(name))
        assert written + 2 * sum(running.values()) <= TOTAL + 2 * LEAST * least
        assert all(promise >= LEAST for promise in running.values())


def test_many_small_journals_are_no_overrun_and_too_much_together_is(tmp_path: Path) -> None:
    journals = Journals(tmp_path / "journals", 1 << 20, 1 << 20)
    for number in range(64):
        journals.make("dbx_1", f"exe_{number}")
        journals.path("dbx_1", f"exe_{number}", "stdout").write_bytes(bytes(LEAST))
    taken, overrun = journals.measure("dbx_1")
    assert (taken >= 64 * LEAST, overrun) == (True, False)
    for number in range(64):
        journals.path("dbx_1", f"exe_{number}", "stderr").write_bytes(bytes(4 * LEAST))
    assert journals.measure("dbx_1")[1]
    assert journals.measure("dbx_unknown") == (0, False)

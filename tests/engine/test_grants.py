"""How room is divided among disks, by figures alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from devboxd.engine.grants import FLOOR, Turn, Want, grants

GIB = 1 << 30
WANTS = st.lists(st.builds(Want, st.integers(0, 64 * GIB), st.sampled_from(Turn)), max_size=40)


@given(WANTS, st.integers(-GIB, 200 * GIB))
def test_no_disk_gets_more_than_it_wants_and_all_together_no_more_than_there_is(wants: list[Want], left: int) -> None:
    found = grants(wants, left)
    assert all(0 <= grant <= want.bytes for grant, want in zip(found, wants, strict=True))
    assert sum(found) <= max(0, left)


@given(WANTS, st.integers(0, 200 * GIB))
def test_nothing_is_held_back_from_those_who_want_it(wants: list[Want], left: int) -> None:
    wanted = sum(want.bytes for want in wants)
    assert min(wanted, left) - sum(grants(wants, left)) <= 3 * len(wants), "but what does not divide"


@given(WANTS, st.integers(0, 200 * GIB))
def test_each_has_a_floor_and_those_that_write_are_served_first(wants: list[Want], left: int) -> None:
    found = grants(wants, left)
    floor = min(FLOOR, left // 2 // max(1, len(wants)))
    for grant, want in zip(found, wants, strict=True):
        assert grant >= min(want.bytes, floor)
        for other, one in zip(found, wants, strict=True) if grant < want.bytes else ():
            if one.turn is want.turn:
                assert other <= grant + 1, "one has more than another one that lacks room"
            elif one.turn > want.turn:
                assert other <= floor + len(wants), "one that rests has room that one which writes lacks"


def test_one_that_writes_has_all_of_its_size_and_the_idle_share_the_rest() -> None:
    found = grants([Want(4 * GIB, Turn.WRITES), *[Want(4 * GIB)] * 11], 15 * GIB)
    assert found == [4 * GIB, *[GIB] * 11]


def test_one_that_begins_to_write_shares_with_those_that_do_already() -> None:
    assert grants([Want(8 * GIB, Turn.WRITES), Want(8 * GIB, Turn.WRITES)], 8 * GIB) == [4 * GIB, 4 * GIB]


def test_nobody_lacks_anything_where_there_is_room() -> None:
    assert grants([Want(4 * GIB), Want(1 * GIB, Turn.WRITES)], 5 * GIB) == [4 * GIB, GIB]

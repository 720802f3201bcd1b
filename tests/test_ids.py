"""Ids sort by the time of their making, and a wrong one is refused with the form expected."""

from __future__ import annotations

import re
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from devboxd import ids
from devboxd.errors import ApiError
from devboxd.ids import check_id, new_id


def test_an_id_has_its_prefix_and_21_base62_digits() -> None:
    assert re.fullmatch(r"dbx_[0-9A-Za-z]{21}", new_id("dbx"))


def test_ids_sort_by_their_making() -> None:
    made = [new_id("dbx") for _ in range(20_000)]
    assert made == sorted(made)
    assert len(set(made)) == len(made)


def test_ids_sort_even_when_the_clock_goes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    before = new_id("dbx")
    monkeypatch.setattr(ids.time, "time_ns", lambda: 1)
    assert new_id("dbx") > before


def test_threads_never_make_the_same_id() -> None:
    made: list[str] = []

    def make() -> None:
        made.extend(new_id("dbx") for _ in range(2000))

    threads = [threading.Thread(target=make) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 16_000


def test_a_good_id_is_given_back() -> None:
    made = new_id("snp")
    assert check_id("snp", made, "snapshot") == made


@pytest.mark.parametrize(
    "text",
    [
        "", "dbx", "dbx_", "dbx_nonexistent12345", "dbx_" + "0" * 20, "dbx_" + "0" * 22, "snp_" + "0" * 21,
        "dbx_" + "0" * 20 + "é", "dbx_" + "0" * 20 + "٣", "dbx_" + "0" * 21 + "\n", " dbx_" + "0" * 21,
        "../" + "0" * 22, "DBX_" + "0" * 21, "dbx_" + "0" * 20 + "\0",
    ],
)  # fmt: skip
def test_a_malformed_id_is_400(text: str) -> None:
    with pytest.raises(ApiError) as caught:
        check_id("dbx", text, "devbox")
    assert caught.value.code == 400
    assert caught.value.message.startswith("cannot use")
    assert "devbox" in caught.value.message


def test_a_long_id_is_not_repeated_whole() -> None:
    with pytest.raises(ApiError) as caught:
        check_id("dbx", "x" * 10_000, "devbox")
    assert len(caught.value.message) < 300


@given(st.text())
def test_no_text_but_an_id_passes(text: str) -> None:
    with pytest.raises(ApiError):
        check_id("dbx", "dbx-" + text, "devbox")

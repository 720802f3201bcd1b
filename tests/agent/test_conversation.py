"""The client in conversations with agents that say anything: by hypothesis, and all that fuzzing has kept."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from support.conversation import play

CORPUS = sorted((Path(__file__).parent.parent / "fuzz" / "corpus").iterdir())
STEPS = st.lists(st.tuples(st.integers(0, 7).map(lambda step: bytes([step])), st.binary(max_size=8)), max_size=40)


@settings(max_examples=400, deadline=None)
@given(STEPS)
def test_nothing_escapes_and_nothing_stays_open(steps: list[tuple[bytes, bytes]]) -> None:
    play(b"\1" + b"".join(step + fields for step, fields in steps))


@pytest.mark.parametrize("path", CORPUS, ids=lambda path: path.name)
def test_what_fuzzing_kept(path: Path) -> None:
    play(path.read_bytes())

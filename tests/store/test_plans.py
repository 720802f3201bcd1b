"""No question that is asked often looks at all that has ended: SQLite says how it would answer each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from sqlalchemy import Connection, event

from devboxd.devboxes import store as devboxes
from devboxd.devboxes.states import Status
from devboxd.executions import store as executions
from devboxd.executions.store import Execution
from devboxd.store.db import FILE_NAME, Store
from devboxd.store.statement import Statement

BOX = "dbx_1"
ROW = Execution(
    "exe_1", BOX, "exe_1", "user", "true", None, False, "completed",
    0, None, 0, 0, False, False, 0, False, 1, 2,
)  # fmt: skip
QUESTIONS: dict[str, Callable[[Connection], Any]] = {
    "an execution by its handle": lambda c: executions.by_handle(c, BOX, "exe_1"),
    "an execution by its id": lambda c: executions.by_id(c, "exe_1"),
    "what has not completed in a devbox": lambda c: executions.unfinished(c, BOX),
    "the newest executions": lambda c: executions.newest(c, BOX, None, None, 1000),
    "the next executions": lambda c: executions.after(c, BOX, "exe_1", 100),
    "the newest of a handle": lambda c: executions.newest(c, BOX, "exe_1", None, 1000),
    "the newest of a named shell": lambda c: executions.newest(c, BOX, None, "main", 1000),
    "set running": lambda c: executions.set_running(c, "exe_1"),
    "set stdin": lambda c: executions.set_stdin(c, "exe_1", 5, False),
    "complete": lambda c: executions.complete(c, ROW),
    "remove what a devbox left": lambda c: executions.remove(c, BOX),
    "a devbox": lambda c: devboxes.get(c, BOX),
    "devboxes that are not freed": devboxes.unfinished,
    "what can be swept": lambda c: devboxes.ended_before(c, 5, "", 100),
    "a page of devboxes": lambda c: devboxes.page(c, "acc_1", None, None, 20, True),
    "the next page": lambda c: devboxes.page(c, "acc_1", None, "dbx_5", 20, True),
    "a page of one status": lambda c: devboxes.page(c, "acc_1", Status.RUNNING, None, 20, True),
    "mark a devbox as swept": lambda c: devboxes.mark_swept(c, BOX),
}
WALKS = {"devboxes that are not freed": "devboxes_unfreed", "what can be swept": "devboxes_unswept"}
"""Those that want all of a small index walk through it; of what has ended it holds nothing, or nothing else."""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store.open(tmp_path / FILE_NAME)
    yield store
    store.close()


def _plans(store: Store, ask: Callable[[Connection], Any]) -> list[str]:
    """What SQLite does for each statement of a question, with its parameters bound as they are."""
    asked: list[tuple[str, Any]] = []
    run = Statement.run

    def note(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        asked.append((statement, parameters))

    def run_noted(self: Statement, connection: Connection, values: Any) -> Any:
        asked.append((self._text, {**self._constants, **values}))
        return run(self, connection, values)

    event.listen(store._writer, "before_cursor_execute", note)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Statement, "run", run_noted)
            ask(store._writer)
    finally:
        event.remove(store._writer, "before_cursor_execute", note)
    assert asked
    found = [store._raw.execute("EXPLAIN QUERY PLAN " + text, parameters).fetchall() for text, parameters in asked]
    return [str(row[3]) for rows in found for row in rows]


@pytest.mark.parametrize("question", QUESTIONS)
def test_every_question_has_its_index(store: Store, question: str) -> None:
    executions.add(store._writer, msgspec.structs.replace(ROW, shell_name="main"))
    for step in _plans(store, QUESTIONS[question]):
        assert "TEMP B-TREE" not in step, f"sorts all that it finds: {step}"
        if (walk := re.match(r"SCAN (?!CONSTANT)", step)) is not None:
            assert question in WALKS, f"looks at every row: {step}"
            assert WALKS[question] in walk.string

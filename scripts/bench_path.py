"""Where the time of one `execute` goes: the real server with marks around its steps, and one client.

As a program it is `devboxd` with marks; on SIGUSR1 it writes them to the file that BENCH_MARKS names.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

STEPS = (
    ("receive", "the request is read, its key and x-request-id are looked up"),
    ("journals", "two journals are made"),
    ("begin", "the row of the execution is committed"),
    ("spawn", "descriptors go to the agent, it forks, the command begins"),
    ("run", "`bash -lc true` runs; the agent tells its end"),
    ("end", "the row of the end is committed"),
    ("answer", "the view is read from the journals, the answer leaves"),
)
MARKS: list[tuple[str, float]] = []


def mark(name: str) -> None:
    """Note that a step begins now."""
    MARKS.append((name, time.perf_counter()))


def before(owner: type, name: str, step: str, after: str | None = None) -> None:
    """Mark `step` when the method is called, and `after` when it has ended."""
    method: Callable[..., Any] = getattr(owner, name)

    async def marked(*arguments: Any, **options: Any) -> Any:
        mark(step)
        try:
            return await method(*arguments, **options)
        finally:
            if after is not None:
                mark(after)

    setattr(owner, name, marked)


def serve() -> None:
    """Run the command line with marks."""
    from devboxd.agent.client import AgentClient
    from devboxd.executions.journals import Journals
    from devboxd.executions.running import Executions
    from devboxd.http.operation import Application

    make = Journals.make

    def marked_make(self: Journals, devbox_id: str, execution_id: str) -> None:
        mark("journals")
        make(self, devbox_id, execution_id)
        mark("begin")

    before(Application, "__call__", "receive", "left")
    Journals.make = marked_make  # type: ignore[method-assign]
    before(AgentClient, "spawn", "spawn", "run")
    before(Executions, "_complete", "end", "answer")

    def write(*_: object) -> None:
        Path(os.environ["BENCH_MARKS"]).write_text(json.dumps(MARKS))

    signal.signal(signal.SIGUSR1, write)
    from devboxd.cli import main

    main()


def spans(marks: list[tuple[str, float]]) -> Iterator[list[float]]:
    """The milliseconds of all steps, for each request that went through all of them once."""
    wanted = [name for name, _ in STEPS] + ["left"]
    start = 0
    while start + len(wanted) <= len(marks):
        part = marks[start : start + len(wanted)]
        if [name for name, _ in part] == wanted:
            yield [(later - at) * 1000 for (_, at), (_, later) in pairwise(part)]
        start += 1


if __name__ == "__main__":
    sys.argv[0] = "devboxd"
    serve()

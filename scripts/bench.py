"""Measure what devboxd promises about speed, each figure beside a floor of this machine taken in the same run.

Prints a table and writes it into docs/performance.md. Usage: scripts/bench.py [NAME...] measures only these and writes
nothing. A figure that misses its mark is shown as missed; the exit status is 0 all the same.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

import bench_disks  # noqa: E402
import bench_path  # noqa: E402
from bench_client import Line, execute, quantile, request, times, together  # noqa: E402
from bench_figure import Figure  # noqa: E402

from support.server import Server  # noqa: E402

MIB = 1 << 20
NEW = "/v1/devboxes/create_and_await_running"
_ROUNDS = 30


class Bench:
    """A server of its own with one box, and the measurements."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.box = self.create()

    def line(self) -> Line:
        """A new connection."""
        return Line(self.server.port, self.server.key)

    def create(self) -> str:
        """A new devbox that runs."""
        with self.line() as line:
            view = line.json("POST", NEW, {})
        if view["status"] != "running":
            raise RuntimeError(f"cannot go on: a devbox is {view['status']}: {view['state_transitions']}")
        return str(view["id"])

    def shutdown(self, boxes: list[str]) -> None:
        """End devboxes."""
        with self.line() as line:
            for box in boxes:
                line.call("POST", f"/v1/devboxes/{box}/shutdown", {})

    def execute(self, line: Line, box: str, command: str = "true") -> Any:
        """Run a command to its end; its view."""
        view = line.json("POST", f"/v1/devboxes/{box}/execute", execute(command))
        if view["status"] != "completed" or view["exit_status"] != 0:
            raise RuntimeError(f"cannot go on: {command} is {view}")
        return view

    # -- the figures ---------------------------------------------------------------------------------------------

    def creating(self) -> Iterator[Figure]:
        """A devbox from nothing to the end of its first command, from a box that waits; with a pause and without."""
        server = Server(pool_size=str(_ROUNDS), warm_boxes=str(_ROUNDS)).start()
        try:
            warm = type(self)(server)
            for pause_s, words in ((0, ""), (0.1, ", a tenth of a second after the last")):
                warm.until_warm(_ROUNDS)
                found = warm.begun(pause_s)
                floor = times(lambda: _run("unshare", "--user", "--net", "--pid", "--mount", "--fork", "true"), 20)
                yield Figure(
                    f"create_and_await_running and first execute{words}, p50", "ms", 10, 5,
                    quantile(sorted(found), 0.5), quantile(floor, 0.5), "unshare of four namespaces",
                )  # fmt: skip
        finally:
            server.stop()

    def begun(self, pause_s: float) -> list[float]:
        """Milliseconds of each of many creates with a command."""
        made: list[str] = []

        def once() -> None:
            made.append(line.json("POST", NEW, {})["id"])
            self.execute(line, made[-1])

        found = []
        with self.line() as line:
            for _ in range(_ROUNDS - 1):
                found += times(once, 1)
                time.sleep(pause_s)
        self.end(made)
        return found

    def until_warm(self, number: int) -> None:
        """Return when so many boxes wait."""
        with self.line() as line:
            while f"devboxd_warm_boxes {number}.0".encode() not in line.call("GET", "/metrics"):
                time.sleep(0.2)

    def executing(self) -> Iterator[Figure]:
        """One command after the other over one connection."""
        with self.line() as line:
            times(lambda: self.execute(line, self.box), 100)
            found = times(lambda: self.execute(line, self.box), 1000)
        floor = times(lambda: _run("bash", "-c", "true"), 200)
        for share, must, aim in ((0.5, 3.5, 2.0), (0.95, 6.0, 3.5)):
            yield Figure(
                f"execute of true, p{share * 100:.0f}", "ms", must, aim, quantile(found, share),
                quantile(floor, share), "bash -c true on the host",
            )  # fmt: skip

    def rate(self) -> Iterator[Figure]:
        """Sixteen connections at once, the load generator on the same processors."""
        count, path = 4000, f"/v1/devboxes/{self.box}/execute"
        bodies = ((path, execute()) for _ in range(count))
        begun = time.perf_counter()
        asyncio.run(together(self.server.port, self.server.key, bodies, 16))
        rate = count / (time.perf_counter() - begun)
        begun = time.perf_counter()
        _run("sh", "-c", f"seq {count} | xargs -P 16 -n 1 bash -c true")
        floor = count / (time.perf_counter() - begun)
        yield Figure(
            "execute per second, 16 at once, one box", "/s", 600, 1000, rate, floor, "xargs -P 16 bash -c true", True
        )

    def first_byte(self) -> Iterator[Figure]:
        """From the moment at which a command prints to the moment at which a stream's client has it."""
        command = "while read -r _; do echo $EPOCHREALTIME; done"
        path = f"/v1/devboxes/{self.box}/executions"
        found = []
        with self.line() as line, self.line() as watching:
            started = line.json(
                "POST", f"/v1/devboxes/{self.box}/execute_async", {"command": command, "attach_stdin": True}
            )
            run = f"{path}/{started['execution_id']}"
            events = watching.events(f"{run}/stream_stdout_updates")
            for _ in range(200):
                line.call("POST", f"{run}/send_std_in", {"text": "\n"})
                found.append(_since(_next_time(events)))
            line.call("POST", f"{run}/send_std_in", {"signal": "EOF"})
        yield Figure(
            "first byte of a stream after it was printed, p50", "ms", 8, 3, quantile(sorted(found), 0.5),
            _pipe_latency(command), "the same through a pipe",
        )  # fmt: skip

    def throughput(self) -> Iterator[Figure]:
        """64 MiB of output from a running command to the client of its stream."""
        size = 64 * MIB
        with self.line() as line:
            self.execute(line, self.box, f"yes 0123456789abcdef | head -c {size} > /tmp/large")
            begun = time.perf_counter()
            started = line.json("POST", f"/v1/devboxes/{self.box}/execute_async", {"command": "cat /tmp/large"})
            path = f"/v1/devboxes/{self.box}/executions/{started['execution_id']}/stream_stdout_updates"
            with self.line() as watching:
                received = sum(map(len, watching.events(path)))
            took = time.perf_counter() - begun
        if received < size:
            raise RuntimeError(f"cannot go on: {received} bytes came of {size}")
        yield Figure(
            "stdout to the client of a stream, 64 MiB", "MB/s", 150, 500, size / 1e6 / took,
            _loopback_rate(size), "a loopback connection", True,
        )  # fmt: skip

    def files(self) -> Iterator[Figure]:
        """10 MB of text, written and read; the requests are made beforehand: to encode 10 MB takes a client 35 ms."""
        text = "0123456789abcdef" * (10_000_000 // 16)
        path = f"/v1/devboxes/{self.box}"
        body = {"file_path": "ten", "contents": text}
        requests = [
            request(self.server.port, self.server.key, "POST", f"{path}/write_file_contents", body) for _ in range(15)
        ]
        with self.line() as line:
            wrote = times(lambda: line.exchange(requests.pop()), 15)
            read = times(lambda: line.call("POST", f"{path}/read_file_contents", {"file_path": "ten"}), 15)
        with tempfile.NamedTemporaryFile(dir="/var/tmp") as file:
            target = Path(file.name)
            floor = times(lambda: target.write_text(text), 15), times(target.read_text, 15)
        for name, found, must, aim, host in (("write", wrote, 60, 20, floor[0]), ("read", read, 40, 15, floor[1])):
            value, least = quantile(found, 0.5), quantile(host, 0.5)
            yield Figure(f"{name} 10 MB, p50", "ms", must, aim, value, least, "the same on the host")

    def memory(self) -> Iterator[Figure]:
        """What an idle devbox takes."""
        box = self.create()
        agent = self.server.agent(box)
        rollup = Path(f"/proc/{agent}/smaps_rollup").read_text()
        (pss,) = re.findall(r"^Pss:\s+(\d+) kB", rollup, re.M)
        yield Figure("memory of an idle box: its agent, PSS", "KiB", 100, 40, int(pss), None, "")
        yield Figure(
            "memory of an idle box, with the kernel's", "MiB", 1.5, 0.5, _charged(box) / MIB, None, ""
        )  # fmt: skip
        self.shutdown([box])

    def many(self) -> Iterator[Figure]:
        """500 devboxes, 16 at a time; then how long a command takes among them, and what the server takes."""
        begun = time.perf_counter()
        views = asyncio.run(together(self.server.port, self.server.key, ((NEW, {}) for _ in range(500)), 16))
        boxes = [str(view["id"]) for view in views]
        for view in views:
            if view["status"] != "running":
                raise RuntimeError(f"cannot go on: a devbox is {view['status']}: {view['state_transitions']}")
        paths = ((f"/v1/devboxes/{box}/execute", execute()) for box in boxes)
        ended = asyncio.run(together(self.server.port, self.server.key, paths, 16))
        took = time.perf_counter() - begun
        if [view["exit_status"] for view in ended] != [0] * 500:
            raise RuntimeError("cannot go on: not all of 500 devboxes run commands")
        floor = times(lambda: _run("unshare", "--user", "--net", "--pid", "--mount", "--fork", "true"), 50)
        yield Figure(
            "500 boxes created 16 at once, all answer a command", "s", 12, 4, took,
            sum(floor) / 50 * 500 / 1000 / (os.cpu_count() or 1), "500 times unshare, on all processors",
        )  # fmt: skip
        yield Figure("memory of the server with 500 boxes", "MB", 200, 150, _resident(self.server.pid) / 1e6, None, "")
        with self.line() as line:
            found = times(lambda: self.execute(line, boxes[250]), 300)
            lone = quantile(found, 0.5)
        self.end(boxes)
        with self.line() as line:
            alone = quantile(times(lambda: self.execute(line, self.box), 300), 0.5)
        yield Figure("execute of true among 500 live boxes, p50", "ms", 3.5, 2, lone, alone, "with one box")

    def restart(self) -> Iterator[Figure]:
        """SIGKILL with 200 running commands: until the server can run commands again and knows all of them."""
        with self.line() as line:
            path = f"/v1/devboxes/{self.box}/execute_async"
            command = {"command": "echo begun; read -r line; echo $line", "attach_stdin": True}
            runs = [line.json("POST", path, command)["execution_id"] for _ in range(200)]
        self.server._signal(signal.SIGKILL, 10)
        begun = time.perf_counter()
        self.server.launch()
        self.server.wait_ready()
        took = time.perf_counter() - begun
        with self.line() as line:
            for run in runs:
                line.call("POST", f"/v1/devboxes/{self.box}/executions/{run}/send_std_in", {"text": "ended\n"})
            for run in runs:
                view = line.json(
                    "POST", f"/v1/devboxes/{self.box}/executions/{run}/wait_for_status", {"statuses": ["completed"]}
                )
                if (view["stdout"], view["exit_status"]) != ("begun\nended\n", 0):
                    raise RuntimeError(f"cannot go on: a command was lost: {view}")
        floor = times(lambda: _run(sys.executable, "-c", "import devboxd.app"), 3)
        yield Figure(
            "SIGKILL with 200 running commands: ready again, nothing lost", "s", 3, 1, took,
            quantile(floor, 0.5) / 1000, "import of the program",
        )  # fmt: skip

    def end(self, boxes: list[str]) -> None:
        """End devboxes and wait until nothing is left of them, so that the next figure is its own."""
        self.shutdown(boxes)
        self._until_gone(boxes)

    def _until_gone(self, boxes: list[str]) -> None:
        folder = self.server.boxes
        deadline = time.monotonic() + 120
        while any((folder / box).exists() for box in boxes):
            if time.monotonic() > deadline:
                raise RuntimeError("cannot go on: devboxes are not freed")
            time.sleep(0.1)


FIGURES: dict[str, Callable[[Bench], Iterator[Figure]]] = {
    "create": Bench.creating,
    "execute": Bench.executing,
    "rate": Bench.rate,
    "first-byte": Bench.first_byte,
    "throughput": Bench.throughput,
    "files": Bench.files,
    "memory": Bench.memory,
    "many": Bench.many,
    "restart": Bench.restart,
    "snapshot": bench_disks.snapshots,
    "sleep": bench_disks.sleep,
}
HEAD = "| work | must | aim | measured | floor of the same run | ratio |\n|---|---|---|---|---|---|"


def main(names: list[str]) -> int:
    """Measure, print, and write what was measured as a whole."""
    if unknown := set(names) - {*FIGURES, "path"}:
        print(f"cannot measure {', '.join(unknown)}: there is only {', '.join(FIGURES)}, path", file=sys.stderr)
        return 2
    rows = []
    server = Server(pool_size="8", warm_boxes="2").start()
    try:
        bench = Bench(server)
        print(HEAD, flush=True)
        for name, measure in FIGURES.items():
            for figure in measure(bench) if not names or name in names else ():
                rows.append(figure.row())
                print(rows[-1], flush=True)
    finally:
        server.stop()
    path = path_rows() if not names or "path" in names else []
    print("", *path, sep="\n")
    if not names:
        _write([*rows, "", *path])
    return 0


def path_rows() -> list[str]:
    """The table of the steps of one `execute`: medians of a server with marks, and what is left for its client."""
    with tempfile.TemporaryDirectory() as name:
        program, marks = Path(name, "devboxd"), Path(name, "marks")
        program.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/scripts/bench_path.py "$@"\n')
        program.chmod(0o755)
        os.environ["BENCH_MARKS"] = str(marks)
        server = Server(program).start()
        try:
            bench = Bench(server)
            with bench.line() as line:
                times(lambda: bench.execute(line, bench.box), 100)
                whole = quantile(times(lambda: bench.execute(line, bench.box), 500), 0.5)
            os.kill(server.pid, signal.SIGUSR1)
            deadline = time.monotonic() + 30
            while not marks.exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            found = list(bench_path.spans(json.loads(marks.read_text())))[-500:]
        finally:
            server.stop()
            del os.environ["BENCH_MARKS"]
    medians = [quantile(sorted(column), 0.5) for column in zip(*found, strict=True)]
    steps = [f"| {text} | {took:.2f} |" for (_, text), took in zip(bench_path.STEPS, medians, strict=True)]
    rest = f"| HTTP below the application, the loopback, the client | {max(0.0, whole - sum(medians)):.2f} |"
    return ["| step of one `execute` | ms |", "|---|---|", *steps, rest, f"| all of it | {whole:.2f} |"]


def _write(rows: list[str]) -> None:
    """Put the tables between their marks in docs/performance.md."""
    path = ROOT / "docs" / "performance.md"
    now = datetime.now(UTC).strftime("%-d %B %Y")
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / (1 << 30)
    where = f"{now}, {os.cpu_count()} processors, {memory:.0f} GiB, Linux {os.uname().release}."
    text = path.read_text()
    begin, end = "<!-- bench: begin -->\n", "<!-- bench: end -->"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    path.write_text("".join([before, begin, f"Measured {where}\n\n", HEAD, "\n", "\n".join(rows), "\n", end, after]))


def _run(*command: str) -> None:
    subprocess.run(command, check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL)


def _next_time(events: Iterator[bytes]) -> float:
    """The next time stamp among the events of a stream."""
    for block in events:
        if found := re.search(rb'"output":"(\d+\.\d+)', block):
            return float(found[1])
    raise RuntimeError("cannot go on: the stream ended")


def _since(stamp: float) -> float:
    return (time.time() - stamp) * 1000


def _pipe_latency(command: str) -> float:
    with subprocess.Popen(["bash", "-c", command], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None and process.stdout is not None  # noqa: PT018
        found = []
        for _ in range(200):
            process.stdin.write(b"\n")
            process.stdin.flush()
            found.append(_since(float(process.stdout.readline())))
        process.stdin.close()
    return quantile(sorted(found), 0.5)


def _loopback_rate(size: int) -> float:
    """MB/s of a plain connection between two processes."""
    sender = (
        "import socket, sys\n"
        "with socket.create_server(('127.0.0.1', 0)) as server:\n"
        "    print(server.getsockname()[1], flush=True)\n"
        "    with server.accept()[0] as peer:\n"
        f"        for _ in range({size} // 65536): peer.sendall(bytes(65536))\n"
    )
    with subprocess.Popen([sys.executable, "-c", sender], stdout=subprocess.PIPE) as process:
        import socket

        assert process.stdout is not None
        port, begun, received = int(process.stdout.readline()), time.perf_counter(), 0
        with socket.create_connection(("127.0.0.1", port)) as connection:
            while block := connection.recv(MIB):
                received += len(block)
        return received / 1e6 / (time.perf_counter() - begun)


def _charged(box: str) -> int:
    """Bytes that the kernel charges to a box, without what it can give back at once (pages of files)."""
    for name, usage, kept in (
        ("memory", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
        ("", "memory.current", ("inactive_file", "active_file")),
    ):
        for folder in Path("/sys/fs/cgroup", name).glob(f"devboxd-*/boxes/{box}"):
            if (folder / usage).exists():
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
                return int((folder / usage).read_text()) - sum(int(stat[key]) for key in kept)
    raise RuntimeError(f"cannot find the memory of {box}: it has no cgroup")


def _resident(pid: int) -> int:
    (kib,) = re.findall(r"^VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.M)
    return int(kib) * 1024


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Runs in the virtual machine: works with devboxes, tells what was confirmed, and compares after the machine was down.

`load` writes a JSON line for each thing that was confirmed, until it is killed. `compare` reads those lines and writes
one JSON object: what was promised and is gone, and how much of that is left for which nothing was promised.
`begin`, `goes-on`, `asleep` and `slept` follow one devbox over restarts and reboots.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.api import Api  # noqa: E402

URL = "http://127.0.0.1:8080"
STATE = Path("/var/lib/devboxd")
PROGRAM = ROOT / ".venv" / "bin" / "devboxd"
KEPT = Path("/root/kept.json")
"""Which devbox is followed."""
_BOXES = 3
_FILES = ("sync", "lazy")
"""Kinds of files: synced by the program that wrote them, or not."""
_WRITE = (
    "import os,sys; f=os.open(sys.argv[1], os.O_CREAT|os.O_WRONLY); os.write(f, sys.argv[2].encode()*20000)\n"
    "if sys.argv[3] == 'sync': os.fsync(f); d=os.open(os.path.dirname(sys.argv[1]), 0); os.fsync(d)\n"
    "print(sys.argv[2])"
)
_READ = (
    "import os,sys\n"
    "for name, text in zip(sys.argv[1::2], sys.argv[2::2]):\n"
    "  if os.path.exists(name) and open(name).read() == text*20000: print(name)"
)
"""Names those of the files that are whole."""
_SEEN = {
    "nproc": "nproc",
    "nproc --all": "nproc --all",
    "lscpu": "lscpu | awk '/^CPU\\(s\\)/ {print $2}'",
    "/proc/cpuinfo": "grep -c ^processor /proc/cpuinfo",
    "cpu.max": "awk '{print $1 / $2}' /sys/fs/cgroup/cpu.max",
    "node": "node -p 'os.availableParallelism()'",
    "python os.cpu_count": "python3 -c 'import os; print(os.cpu_count())'",
    "python sched_getaffinity": "python3 -c 'import os; print(len(os.sched_getaffinity(0)))'",
    "/proc/meminfo": "awk '/^MemTotal/ {print $2 / 1048576}' /proc/meminfo",
    "free": "free -b | awk '/^Mem/ {print $2 / 1073741824}'",
    "memory.max": "awk '{print $1 / 1073741824}' /sys/fs/cgroup/memory.max",
    "df": "df -B1 --output=size / | awk 'END {printf \"%.0f\", $1 / 1073741824}'",
}
"""How programs find the size of their machine."""
_SMALL = dict(zip(_SEEN, ["1", "2", "2", "1", "1", "1", "1", "2", "2", "2", "2", "4"], strict=True))
"""What they find in a small devbox on a machine with two processors, on each of which it may run in turn."""
Fact = dict[str, Any]


def api(key: str | None = None) -> Api:
    """A client with the first key of this machine's server, or another one."""
    return Api(URL, key or (STATE / "first-key").read_text().strip())


def tell(kind: str, **fact: Any) -> None:
    """Say what was confirmed, at once."""
    print(json.dumps({"kind": kind, **fact}), flush=True)


def load() -> None:
    """Work without end."""
    client, boxes = api(), []
    for number in itertools.count():
        if len(boxes) < _BOXES:
            boxes.append(client.create(name=f"box {number}", metadata={"n": "0"}))
            tell("devbox", id=boxes[-1])
            how = ("", "conv=fsync", "oflag=dsync")[len(boxes) % 3]
            client.start(boxes[-1], f"while :; do dd if=/dev/urandom of=~/noise bs=1M count=20 {how}; done 2>/dev/null")
        box = boxes[number % _BOXES % len(boxes)]
        for how in _FILES:
            command = f"python3 -c '{_WRITE.replace(chr(39), chr(34))}' ~/{how}{number} {number}- {how}"
            view = client.run(box, command, 300)
            assert view["stdout"] == f"{number}-\n", view
            tell(how, box=box, n=number)
            tell("execution", box=box, id=view["execution_id"], stdout=view["stdout"])
        client.call("POST", f"/v1/devboxes/{box}", {"metadata": {"n": str(number)}})
        tell("metadata", box=box, n=number)
        if number % 4 == 1:
            snapshot = client.call("POST", f"/v1/devboxes/{box}/snapshot_disk", {})["id"]
            tell("snapshot", id=snapshot, box=box, n=number)
        if number % 4 == 2:
            key = subprocess.run([PROGRAM, "keys", "create"], capture_output=True, text=True, check=True)
            tell("key", key=key.stdout.strip())
        if number % 4 == 3:
            ended = client.create()
            client.shutdown(ended)
            tell("ended", id=ended)


def compare(facts: list[Fact]) -> Fact:
    """What of the facts holds no more, and of what was not promised how much does."""
    client = api()
    lost, found = [], Counter(f"{fact['kind']}s told" for fact in facts)
    for fact in (fact for fact in facts if fact["kind"] not in _FILES and not _holds(client, fact, facts)):
        if fact["kind"] == "execution":
            found["executions gone"] += 1
        else:
            lost.append(fact)
    for box in (fact["id"] for fact in facts if fact["kind"] == "devbox"):
        gone = _gone(client, box, _files(facts, box))
        lost += [fact for fact in gone if fact["kind"] == "sync"]
        found["lazys gone"] += sum(fact["kind"] == "lazy" for fact in gone)
    return {"lost": lost, **found}


def _holds(client: Api, fact: Fact, facts: list[Fact]) -> bool:
    match fact["kind"]:
        case "devbox":
            return _resumed(client, fact["id"])
        case "ended":
            return client.box(fact["id"])["status"] == "shutdown"
        case "metadata":
            return int(client.box(fact["box"])["metadata"]["n"]) >= fact["n"]
        case "key":
            return api(fact["key"]).http.get("/v1/devboxes").status_code == 200
        case "execution":
            answer = client.http.get(f"/v1/devboxes/{fact['box']}/executions/{fact['id']}")
            return answer.status_code == 200 and answer.json()["stdout"] == fact["stdout"]
        case "snapshot":
            return _snapshot_holds(client, fact, facts)
    raise ValueError(fact["kind"])


def _resumed(client: Api, box: str) -> bool:
    """Whether it sleeps, says why, and runs again."""
    view = client.box(box)
    if view["status"] == "running":
        return True
    if view["status"] != "suspended":
        print(json.dumps(view), file=sys.stderr)
        return False
    client.call("POST", f"/v1/devboxes/{box}/resume")
    client.wait_box(box, "running", seconds=300)
    return any("host was restarted" in (step.get("failure_reason") or "") for step in view["state_transitions"])


def _files(facts: list[Fact], box: str, until: float = math.inf) -> list[Fact]:
    """The files of a devbox up to this number."""
    return [fact for fact in facts if fact["kind"] in _FILES and fact["box"] == box and fact["n"] <= until]


def _gone(client: Api, box: str, files: list[Fact]) -> list[Fact]:
    """Those that are not as they were written, of a devbox or one from its snapshot."""
    named = {f"{fact['kind']}{fact['n']}": fact for fact in files}
    words = " ".join(f"{name} {fact['n']}-" for name, fact in named.items())
    whole = client.output(box, f"cd && python3 -c '{_READ}' {words}", seconds=300).split()
    return [fact for name, fact in named.items() if name not in whole]


def _snapshot_holds(client: Api, fact: Fact, facts: list[Fact]) -> bool:
    """Whole by its digest, and a devbox from it has every file that was there before."""
    environment = {**os.environ, "DEVBOXD_KEY": (STATE / "first-key").read_text().strip(), "DEVBOXD_URL": URL}
    verify = [PROGRAM, "snapshot", "verify", fact["id"]]
    done = subprocess.run(verify, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout, done.stderr, file=sys.stderr)
        return False
    box = client.create(snapshot_id=fact["id"])
    gone = _gone(client, box, _files(facts, fact["box"], fact["n"]))
    client.shutdown(box)
    return not gone


def sizes() -> None:
    """A small devbox sees that it is small: each line is one way to look."""
    client = api()
    box = client.create(launch_parameters={"resource_size_request": "SMALL"})
    seen = {name: client.output(box, command).strip() for name, command in _SEEN.items()}
    client.shutdown(box)
    print(", ".join(f"{name} {value}" for name, value in seen.items()))
    assert seen == _SMALL, {name: (value, _SMALL[name]) for name, value in seen.items() if value != _SMALL[name]}


# -- one devbox ------------------------------------------------------------------------------------------------------


def begin() -> None:
    """A devbox with a command that ticks, a named shell, files that no program synced, and suspend commands."""
    client = api()
    hooks = {"suspend_commands": ["echo hooked >~/hook"]}
    box = client.create(launch_parameters={"lifecycle": {"lifecycle_hooks": hooks}})
    tick = client.start(box, "while :; do echo tick >>~/ticks; sleep 0.2; done")
    client.output(box, "cd /opt; export KEPT=yes", shell_name="work")
    client.output(box, "echo kept >~/kept; dd if=/dev/zero of=~/large bs=1M count=50 2>/dev/null")
    KEPT.write_text(json.dumps({"box": box, "tick": tick}))


def goes_on() -> None:
    """The devbox runs as before, and its command ticks on."""
    client, kept = api(), json.loads(KEPT.read_text())
    assert client.box(kept["box"])["status"] == "running", client.box(kept["box"])
    before, deadline = _ticks(client, kept["box"]), time.monotonic() + 60
    while _ticks(client, kept["box"]) <= before:
        assert time.monotonic() < deadline, "the command does not go on"
    assert client.execution(kept["box"], kept["tick"])["status"] == "running"
    assert client.output(kept["box"], "echo $KEPT", shell_name="work") == "yes\n"


def _ticks(client: Api, box: str) -> int:
    return int(client.output(box, "stat -c %s ~/ticks"))


def asleep() -> None:
    """How many seconds the last server took from SIGTERM until all devboxes slept, by the journal."""
    command = ["journalctl", "-b", "-1", "-u", "devboxd", "-o", "short-unix", "--no-pager"]
    told = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    begun = max(float(line.split()[0]) for line in told if "Stopping" in line)
    slept = [float(line.split()[0]) for line in told if "devboxes sleep" in line] or [0.0]
    assert slept[-1] > begun, "\n".join(["no devbox was put to sleep:", *told[-20:]])
    print(slept[-1] - begun)


def slept(reason: str) -> None:
    """The devbox sleeps for this reason, and runs again on its disk as it was; then its command ticks again."""
    client, kept = api(), json.loads(KEPT.read_text())
    box = kept["box"]
    view = client.box(box)
    assert view["status"] == "suspended", view
    assert reason in str(view["state_transitions"]), view
    assert reason in str(client.call("GET", f"/v1/devboxes/{box}/logs")["logs"])
    assert client.execution(box, kept["tick"])["status"] == "completed"
    client.call("POST", f"/v1/devboxes/{box}/resume")
    client.wait_box(box, "running", seconds=300)
    assert client.output(box, "cat ~/kept; stat -c %s ~/large") == f"kept\n{50 << 20}\n"
    if "shuts down" in reason:
        assert client.output(box, "cat ~/hook") == "hooked\n"
        assert client.output(box, "pwd; echo $KEPT", shell_name="work") == "/opt\nyes\n"


def lines() -> Iterator[Fact]:
    """The facts on standard input; the last line may be cut."""
    for line in sys.stdin:
        if line.endswith("}\n"):
            yield json.loads(line)


if __name__ == "__main__":
    match sys.argv[1]:
        case "load":
            load()
        case "compare":
            print(json.dumps(compare(list(lines()))))
        case "sizes":
            sizes()
        case "begin":
            begin()
        case "goes-on":
            goes_on()
        case "asleep":
            asleep()
        case "slept":
            slept(sys.argv[2])

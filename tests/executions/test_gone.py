"""A box that has lost its home, its /etc/passwd or its bash still runs commands, and can be mended."""

from __future__ import annotations

import re

import pytest

from support.api import Api

pytestmark = pytest.mark.box

SHELLS = pytest.mark.parametrize("shell", [{}, {"shell_name": "s"}])


@SHELLS
@pytest.mark.parametrize("harm", ["sudo mv /home/user /home/moved", "sudo rm -rf /home/user", "chmod 000 /home/user"])
def test_without_its_home_commands_begin_in_the_root_folder(api: Api, harm: str, shell: dict[str, str]) -> None:
    box = api.create()
    api.run(box, f"cd /; {harm}")
    view = api.run(box, "pwd; whoami; echo $HOME; (exit 4)", **shell)
    assert (view["exit_status"], view["stdout"]) == (4, "/\nuser\n/home/user\n")
    assert "devboxd: cannot enter the home directory: " in view["stderr"]
    assert view["stderr"].count("devboxd:") == 1
    assert "devboxd" not in api.run(box, "pwd", **shell)["stderr"], "it is said once"
    mended = "sudo mv /home/moved /home/user 2>/dev/null || sudo mkdir -p /home/user; sudo chmod 755 /home/user"
    assert api.run(box, mended)["exit_status"] == 0
    assert api.run(box, "pwd")["stdout"] == "/home/user\n"
    api.run(box, f"cd /; {harm}")
    assert "devboxd: " in api.run(box, "pwd")["stderr"], "it is said again of what is lost again"
    api.shutdown(box)


@SHELLS
@pytest.mark.parametrize(
    "harm",
    [
        "rm /etc/passwd",
        "truncate -s 0 /etc/passwd",
        "sed -i /^user:/d /etc/passwd",
        "sh -c 'rm /etc/passwd; mkfifo /etc/passwd'",
        "sh -c 'rm /etc/passwd; mkdir /etc/passwd'",
    ],
)
def test_without_its_passwd_the_ids_of_the_create_are_used(api: Api, harm: str, shell: dict[str, str]) -> None:
    box = api.create()
    kept = api.read(box, "/etc/passwd")
    api.run(box, f"sudo {harm}")
    view = api.run(box, "pwd; id -u; echo $HOME $USER", **shell)
    assert (view["exit_status"], view["stdout"]) == (0, "/home/user\n1000\n/home/user user\n"), view
    assert "cannot find the user user in /etc/passwd" in view["stderr"]
    api.write(box, "~/note", "a file call")
    assert api.read(box, "/home/user/note") == "a file call"
    api.upload(box, "note2", b"another")
    if "mk" not in harm:
        api.write(box, "/etc/passwd", kept)
        assert api.run(box, "whoami; stat -c %U note")["stdout"] == "user\nuser\n"
        api.refused(
            "POST", f"/v1/devboxes/{box}/write_file_contents", 403, {"file_path": "/etc/passwd", "contents": ""}
        )
    api.shutdown(box)


@pytest.mark.parametrize("harm", ["mv /bin/bash /bin/moved", "chmod 000 /bin/bash", "ln -sf bash /bin/bash"])
def test_without_bash_commands_run_by_sh(api: Api, harm: str) -> None:
    box = api.create()
    api.run(box, f"sudo {harm}")
    view = api.run(box, "echo here; echo ${BASH_VERSION:-sh}; (exit 5)")
    assert (view["exit_status"], view["stdout"]) == (5, "here\nsh\n"), view
    assert view["stderr"].startswith("devboxd: cannot execute bash: ")
    view = api.run(box, "echo here", shell_name="s")
    assert view["exit_status"] in (126, 127)
    assert "named shells need bash: " in view["stderr"]
    api.shutdown(box)


def test_where_bash_cannot_load_its_libraries_a_named_shell_says_so(api: Api) -> None:
    box = api.create()
    api.run(box, "sudo mv /lib/$(uname -m)-linux-gnu/libtinfo.so.6 /root/")
    view = api.run(box, "echo here")
    assert view["exit_status"] == 127, view
    assert "libtinfo" in view["stderr"]
    for _ in range(5):
        view = api.run(box, "echo here", shell_name="s")
        assert view["exit_status"] in (126, 127), view
        assert re.search("bash ended .* without shell_name", view["stderr"]), view
    api.shutdown(box)


def test_a_root_folder_that_the_user_may_not_enter_is_named_with_its_cure(api: Api) -> None:
    box = api.create()
    api.run(box, "touch note; sudo chmod 700 /")
    for shell in ({}, {"shell_name": "s"}):
        view = api.run(box, "echo here", **shell)
        assert view["exit_status"] == 126
        assert "permission denied for /; make a snapshot" in view["stderr"]
        assert "`chmod 755 /`" in view["stderr"]
    assert _cured(api, box, "chmod 755 /") == "user\n"


def _cured(api: Api, box: str, cure: str) -> str:
    """Who the user is in a devbox from a snapshot of one that root cured, which came from a snapshot of this."""
    snapshot = api.call("POST", f"/v1/devboxes/{box}/snapshot_disk")["id"]
    api.shutdown(box)
    root = {"user_parameters": {"username": "root", "uid": 0}}
    other = api.create(snapshot_id=snapshot, launch_parameters=root)
    assert api.output(other, "id -u") == "0\n"
    view = api.run(other, cure)
    assert view["exit_status"] == 0, view
    mended = api.call("POST", f"/v1/devboxes/{other}/snapshot_disk")["id"]
    api.shutdown(other)
    again = api.create(snapshot_id=mended)
    name = api.output(again, "cat note; whoami")
    api.shutdown(again)
    return name


def test_a_folder_in_place_of_passwd_is_removed_by_root_in_a_devbox_from_a_snapshot(api: Api) -> None:
    box = api.create()
    api.run(box, "touch note; sudo sh -c 'cp /etc/passwd /etc/kept; rm /etc/passwd; mkdir /etc/passwd'")
    body = {"file_path": "/etc/passwd", "contents": ""}
    assert "it is a directory" in api.refused("POST", f"/v1/devboxes/{box}/write_file_contents", 400, body)
    assert _cured(api, box, "rmdir /etc/passwd; mv /etc/kept /etc/passwd") == "user\n"


@SHELLS
def test_a_profile_that_waits_is_removed_by_root_in_a_devbox_from_a_snapshot(api: Api, shell: dict[str, str]) -> None:
    box = api.create()
    api.run(box, "touch note; mkfifo .bash_profile")
    execution = api.start(box, "true", **shell)
    view = api.call("POST", f"/v1/devboxes/{box}/executions/{execution}/kill")
    assert view["exit_status"] in (137, 143)
    assert _cured(api, box, "rm /home/user/.bash_profile") == "user\n"

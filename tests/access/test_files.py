"""Files of a box over HTTP."""

from __future__ import annotations

import hashlib
import os

import httpx
import pytest

from support.api import Api

pytestmark = pytest.mark.box


@pytest.mark.parametrize(
    "path", ["plain.txt", "~/tilde.txt", "/tmp/absolute.txt", "new/deep/er/file.txt", "with space é.txt"]
)
@pytest.mark.parametrize("text", ["", "no newline", "a\nb\n", "€ 😀\r\n\t"])
def test_what_was_written_is_read(api: Api, box: str, path: str, text: str) -> None:
    api.write(box, path, text)
    assert api.read(box, path) == text


def test_a_write_tells_size_and_hash(api: Api, box: str) -> None:
    path = f"/v1/devboxes/{box}/write_file_contents"
    answer = api.http.post(path, json={"file_path": "h", "contents": "héllo"})
    assert answer.json() == {"devbox_id": box, "stdout": "", "stderr": "", "exit_status": 0, "shell_name": None}
    content = "héllo".encode()
    assert answer.headers["x-upload-size"] == str(len(content))
    assert answer.headers["x-upload-sha256"] == hashlib.sha256(content).hexdigest()


def test_the_alias_writes_too(api: Api, box: str) -> None:
    api.call("POST", f"/v1/devboxes/{box}/write_file", {"file_path": "alias", "contents": "x"})
    assert api.read(box, "alias") == "x"


def test_uploads_and_downloads_are_exact(api: Api, box: str) -> None:
    content = bytes(range(256)) * 5000 + os.urandom(3_000_000)
    answer = api.upload(box, "~/data.bin", content)
    assert answer.json() == {}
    assert answer.headers["x-upload-sha256"] == hashlib.sha256(content).hexdigest()
    assert answer.headers["x-upload-size"] == str(len(content))
    got = api.http.post(f"/v1/devboxes/{box}/download_file", json={"path": "data.bin"})
    assert got.content == content
    assert got.headers["content-length"] == str(len(content))
    assert "data.bin" in got.headers["content-disposition"]
    assert got.headers["x-content-type-options"] == "nosniff"
    assert got.headers["content-security-policy"] == "sandbox"
    assert api.output(box, "sha256sum < data.bin").split()[0] == hashlib.sha256(content).hexdigest()


def test_a_file_may_come_before_its_path(api: Api, box: str) -> None:
    body = (
        b'--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\nearly\r\n'
        b'--b\r\nContent-Disposition: form-data; name="path"\r\n\r\nearly.txt\r\n--b--\r\n'
    )
    path = f"/v1/devboxes/{box}/upload_file"
    answer = api.http.post(path, content=body, headers={"content-type": "multipart/form-data; boundary=b"})
    assert answer.status_code == 200, answer.text
    assert api.read(box, "early.txt") == "early"


def test_owner_and_mode(api: Api, box: str) -> None:
    api.write(box, "mode.sh", "1")
    assert api.output(box, "stat -c '%U %a' mode.sh; chmod 755 mode.sh") == "user 644\n"
    api.write(box, "mode.sh", "2")
    assert api.output(box, "stat -c '%U %a' mode.sh; cat mode.sh") == "user 755\n2"


def test_links_are_followed_in_the_box(api: Api, box: str) -> None:
    api.output(box, "mkdir -p real; echo old > real/f; ln -sf real/f link; ln -sf /etc/hostname host")
    api.write(box, "link", "new")
    assert api.output(box, "cat real/f; readlink link") == "newreal/f\n"
    assert api.read(box, "host").startswith("devbox-")


def test_files_of_proc_are_read_in_the_box(api: Api, box: str) -> None:
    assert "init" in api.read(box, "/proc/1/comm")
    assert api.read(box, "/proc/self/status").startswith("Name:")


@pytest.mark.parametrize(
    ("make", "path", "code"),
    [
        ("true", "missing.txt", 404),
        ("mkdir -p folder", "folder", 400),
        ("mkfifo fifo || true", "fifo", 400),
        ("true", "/dev/null", 400),
        ("true", "/etc/shadow", 403),
        ("true", "/root/x", 403),
        ("touch flat", "flat/below", 404),
        ("touch flat", "flat/", 404),
        ("true", "a\0b", 400),
        ("true", "", 400),
        ("true", "x" * 5000, 400),
        ("ln -sf loop loop", "loop", 400),
    ],
)
def test_what_cannot_be_read_says_why(api: Api, box: str, make: str, path: str, code: int) -> None:
    api.output(box, make)
    message = api.refused("POST", f"/v1/devboxes/{box}/read_file_contents", code, {"file_path": path})
    if path and "\0" not in path:
        assert path[:40] in message
    api.refused("POST", f"/v1/devboxes/{box}/download_file", code, {"path": path})


@pytest.mark.parametrize(
    ("make", "path", "code"),
    [
        ("mkdir -p folder2", "folder2", 400),
        ("mkfifo fifo2 || true", "fifo2", 400),
        ("true", "/etc/new", 403),
        ("touch ro; chmod 444 ro", "ro", 403),
        ("touch flat2", "flat2/below", 400),
    ],
)
def test_what_cannot_be_written_says_why(api: Api, box: str, make: str, path: str, code: int) -> None:
    api.output(box, make)
    body = {"file_path": path, "contents": "x"}
    api.refused("POST", f"/v1/devboxes/{box}/write_file_contents", code, body)
    assert api.output(box, "ls -A | grep -c devboxd || true") == "0\n"


def test_refusals_of_the_kernel_carry_its_words_and_number(api: Api, box: str) -> None:
    api.output(box, "ln -sf circle circle; touch plain")
    for path, code, words in (
        ("circle", 400, "too many levels of symbolic links (os error 40)"),
        ("plain/below", 404, "not a directory (os error 20)"),
        ("y" * 300, 400, "file name too long (os error 36)"),
    ):
        assert words in api.refused("POST", f"/v1/devboxes/{box}/read_file_contents", code, {"file_path": path})


@pytest.mark.parametrize("mode", ["755", "1777"])
def test_a_file_in_a_folder_of_others_is_written_in_place(api: Api, box: str, mode: str) -> None:
    folder = f"/opt/in-place-{mode}"
    made = f"sudo install -d -m {mode} {folder}; echo long old | sudo tee {folder}/w"
    api.output(box, f"{made}; sudo chmod 666 {folder}/w")
    api.write(box, f"{folder}/w", "new")
    assert api.output(box, f"stat -c '%U %a' {folder}/w; cat {folder}/w; ls -A {folder}") == "root 666\nneww\n"
    api.upload(box, f"{folder}/w", b"uploaded")
    assert api.read(box, f"{folder}/w") == "uploaded"
    body = {"file_path": f"{folder}/other", "contents": "x"}
    if mode == "755":
        api.refused("POST", f"/v1/devboxes/{box}/write_file_contents", 403, body)


def test_a_program_that_runs_is_replaced(api: Api, box: str) -> None:
    api.run(box, "cp /bin/sleep program; ./program 600 >/dev/null 2>&1 &")
    api.upload(box, "program", b"#!/bin/sh\necho new\n")
    assert api.output(box, "./program; pkill -x program && echo old") == "new\nold\n"


def test_a_write_parts_hard_links_and_keeps_owner_and_group(api: Api, box: str) -> None:
    api.run(box, "echo old >one; ln one two; echo old >group; sudo chown :users group; sudo usermod -aG users user")
    api.write(box, "one", "new")
    api.write(box, "group", "new")
    assert api.output(box, "cat one two; stat -c '%U %G' group") == "newold\nuser users\n"
    api.run(box, "echo old >theirs; sudo chown root:root theirs; sudo chmod 666 theirs; stat -c %i theirs >number")
    api.upload(box, "theirs", b"new")
    assert api.output(
        box, "[ $(stat -c %i theirs) = $(cat number) ]; echo $?; stat -c %U:%G:%a theirs; cat theirs"
    ) == ("0\nroot:root:666\nnew")


def test_root_keeps_the_owner_of_what_it_writes(api: Api) -> None:
    box = api.create(launch_parameters={"user_parameters": {"username": "root", "uid": 0}})
    api.run(box, "echo old >/srv/f; chown user:games /srv/f; chmod 4750 /srv/f")
    api.write(box, "/srv/f", "new")
    assert api.output(box, "stat -c %U:%G:%a /srv/f; cat /srv/f") == "user:games:4750\nnew"
    api.shutdown(box)


def test_a_folder_of_the_image_is_moved_by_mv_though_not_by_rename(api: Api, box: str) -> None:
    """Layers stay whole by themselves, so the overlay keeps no redirections; programs copy then."""
    rename = 'python3 -c \'import os; os.rename("/usr/share/doc", "/usr/share/moved")\''
    assert "Invalid cross-device link" in api.run(box, f"sudo {rename}")["stderr"]
    assert api.run(box, "sudo mv /usr/share/doc /usr/share/moved && ls /usr/share/moved >/dev/null")["exit_status"] == 0
    assert api.run(box, "sudo mkdir /usr/share/doc; sudo mv /usr/share/doc /usr/share/doc2")["exit_status"] == 0


@pytest.mark.parametrize(
    ("verb", "path", "words"),
    [
        ("read", "missing.txt", "does not exist: no such file or directory (os error 2)"),
        ("read", "/etc/shadow", "permission denied (os error 13)"),
        ("write", "/etc/hosts", "permission denied (os error 13)"),
        ("read", "/usr", "is a directory (os error 21)"),
        ("write", "/tmp", "is a directory (os error 21)"),
        ("write", "/etc/hostname/below", "not a directory (os error 20)"),
        ("read", "/etc/hostname/below", "not a directory (os error 20)"),
        ("write", "/proc/new", "os error"),
        ("write", "x" * 300, "file name too long"),
    ],
)
def test_errors_carry_the_words_of_linux(api: Api, box: str, verb: str, path: str, words: str) -> None:
    body = {"file_path": path} if verb == "read" else {"file_path": path, "contents": "x"}
    answer = api.http.post(f"/v1/devboxes/{box}/{verb}_file_contents", json=body)
    assert 400 <= answer.status_code < 500
    assert words in answer.json()["message"]


def test_text_over_100_mb_names_download_file(api: Api, box: str) -> None:
    api.output(box, "truncate -s 100000001 large")
    message = api.refused("POST", f"/v1/devboxes/{box}/read_file_contents", 413, {"file_path": "large"})
    assert "download_file" in message
    with api.http.stream("POST", f"/v1/devboxes/{box}/download_file", json={"path": "large"}) as answer:
        assert sum(len(piece) for piece in answer.iter_bytes()) == 100_000_001
    api.output(box, "rm large")


def _upload(api: Api, box: str, path: str, content: bytes) -> httpx.Response:
    return api.http.post(f"/v1/devboxes/{box}/upload_file", data={"path": path}, files={"file": content})


@pytest.mark.parametrize("path", ["/dev/shm/large", "link/large"])
def test_what_lies_in_memory_counts_for_the_devbox_and_not_for_the_server(api: Api, box: str, path: str) -> None:
    api.output(
        box, "sudo install -d -o user /run/mine; ln -sfn /run/mine link; mkdir -p /dev/shm; echo small >/run/mine/large"
    )
    content = os.urandom(48 << 20)
    before = api.call("GET", f"/v1/devboxes/{box}/usage")["live"]["memory_bytes"]
    answer = _upload(api, box, path, content)
    assert answer.headers["x-upload-sha256"] == hashlib.sha256(content).hexdigest()
    assert api.output(box, f"sha256sum <{path}").split()[0] == hashlib.sha256(content).hexdigest()
    after = api.call("GET", f"/v1/devboxes/{box}/usage")["live"]["memory_bytes"]
    assert after - before > 40 << 20
    api.output(box, f"rm {path}")


def test_more_than_fits_into_memory_is_507_and_leaves_nothing(api: Api, box: str) -> None:
    room = int(api.output(box, "sudo install -d -o user /run/mine; df --output=avail -B1 /run | tail -1"))
    kept = api.output(box, "echo kept >/run/mine/file; ls -a /run/mine")
    answer = _upload(api, box, "/run/mine/file", bytes(room + (8 << 20)))
    assert answer.status_code == 507
    assert "no space left on device" in answer.json()["message"]
    assert api.output(box, "ls -a /run/mine") == kept
    assert api.output(box, "cat /run/mine/file") == "kept\n"

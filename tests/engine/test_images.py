"""The default image: its recipe, its building, and what is in it."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from devboxd.config import Settings
from devboxd.engine import images, recipe
from devboxd.engine.base import EngineError
from devboxd.engine.images import Images
from devboxd.errors import SetupError

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="building an image needs root")
PEM = b"-----BEGIN CERTIFICATE-----\nMIIB\n-----END CERTIFICATE-----\n"
SET_ID = {
    *("chage", "chfn", "chsh", "expiry", "gpasswd", "mount", "newgrp", "passwd", "ssh-agent", "ssh-keysign"),
    *("su", "sudo", "umount", "unix_chkpwd"),
}


def host(tmp_path: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


DEBIAN = "ID=debian\nVERSION_CODENAME=bookworm\n"


@pytest.mark.parametrize(
    "files",
    [
        {"etc/apt/sources.list": "# x\ndeb [arch=amd64] http://mirror.test/debian/ bookworm main\n"
                                 "deb-src http://other.test/debian bookworm main\n"
                                 "deb http://mirror.test/security bookworm-security main\n"},
        {"etc/apt/sources.list.d/debian.sources": "Types: deb\n# http://old.test/debian\nURIs: http://mirror.test/debian\n"
                                                  "Suites: bookworm bookworm-updates\nComponents: main\n\n"
                                                  "Types: deb\nURIs: http://mirror.test/security\n"
                                                  "Suites: bookworm-security\nComponents: main\n"},
    ],
)  # fmt: skip
def test_the_host_s_debian_mirror_is_inherited(tmp_path: Path, files: dict[str, str]) -> None:
    found = recipe.mirrors(Settings(), {}, host(tmp_path, {"etc/os-release": DEBIAN, **files}))
    assert (found.archive, found.security) == ("http://mirror.test/debian", "http://mirror.test/security")
    assert recipe.sources(found) == (
        f"deb http://mirror.test/debian {recipe.SUITE} main",
        f"deb http://mirror.test/debian {recipe.SUITE}-updates main",
        f"deb http://mirror.test/security {recipe.SUITE}-security main",
    )


@pytest.mark.parametrize(
    "uri", ["file:/srv/debian", "http://user:secret@mirror.test/debian", "http://localhost:3142/debian", "cdrom:x"]
)
def test_mirrors_that_boxes_cannot_use_are_not_inherited(tmp_path: Path, uri: str) -> None:
    root = host(tmp_path, {"etc/os-release": DEBIAN, "etc/apt/sources.list": f"deb {uri} bookworm main\n"})
    found = recipe.mirrors(Settings(), {}, root)
    assert (found.archive, recipe.sources(found)) == (None, ())


def test_mirrors_of_another_distribution_are_not_inherited(tmp_path: Path) -> None:
    files = {
        "etc/os-release": 'ID=ubuntu\nVERSION_CODENAME="noble"\n',
        "etc/apt/sources.list": "deb http://u.test/u noble main\n",
    }
    assert recipe.mirrors(Settings(), {}, host(tmp_path, files)).archive is None


@pytest.mark.parametrize(
    ("setting", "security"),
    [
        ("http://m.test/debian/", "http://m.test/debian-security"),
        ("http://m.test/all", None),
        ("http://m.test/all http://m.test/fixes", "http://m.test/fixes"),
    ],
)
def test_the_apt_mirror_setting_may_name_the_security_archive(
    tmp_path: Path, setting: str, security: str | None
) -> None:
    assert recipe.mirrors(Settings(apt_mirror=setting), {}, tmp_path).security == security


def test_pip_and_npm_settings_of_the_host(tmp_path: Path) -> None:
    root = host(
        tmp_path,
        {
            "etc/pip.conf": "[global]\nindex-url = https://pip.test/simple\nfind-links = /opt/wheels\n",
            "etc/npmrc": "; x\nregistry=https://npm.test/\n",
            "home/.config/pip/pip.conf": "[global]\nindex_url = https://mine.test/simple\n",
            "home/.npmrc": "registry = http://mine.test/npm/\n",
        },
    )
    found = recipe.mirrors(Settings(), {}, root)
    assert (found.pip, found.npm) == ("https://pip.test/simple", "https://npm.test/")
    found = recipe.mirrors(Settings(), {"HOME": str(root / "home")}, root)
    assert (found.pip, found.npm) == ("https://mine.test/simple", "http://mine.test/npm/")
    environ = {"PIP_INDEX_URL": "https://env.test/simple", "npm_config_registry": "https://env.test/npm/"}
    found = recipe.mirrors(Settings(), environ, root)
    assert (found.pip, found.npm) == ("https://env.test/simple", "https://env.test/npm/")
    settings = Settings(pip_index_url="https://set.test/simple", npm_registry="https://set.test/npm/")
    found = recipe.mirrors(settings, environ, root)
    assert (found.pip, found.npm) == ("https://set.test/simple", "https://set.test/npm/")


@pytest.mark.parametrize(
    "url", ["file:///opt/simple", "https://u:secret@pip.test/simple", "http://127.0.0.1:3141/x", "x y"]
)
def test_indexes_that_boxes_cannot_use_are_not_inherited(tmp_path: Path, url: str) -> None:
    found = recipe.mirrors(Settings(), {"PIP_INDEX_URL": url, "npm_config_registry": url}, tmp_path)
    assert (found.pip, found.npm) == (None, None)


def test_the_recipe_names_the_image(tmp_path: Path) -> None:
    certificate = tmp_path / "company ca.pem"
    certificate.write_bytes(PEM)
    plain = Settings(ca_certificates=())
    digests = {
        recipe.digest(settings)
        for settings in (
            plain,
            Settings(ca_certificates=(certificate,)),
            Settings(ca_certificates=(), apt_mirror="http://m.test/debian"),
            Settings(ca_certificates=(), pip_index_url="http://m.test/simple"),
            Settings(ca_certificates=(), npm_registry="http://m.test/npm"),
        )
    }
    assert len(digests) == 5
    assert recipe.digest(plain) == recipe.digest(Settings(ca_certificates=(), port=9999))


def test_certificates_must_be_certificates(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.pem"
    wrong.write_text("no certificate")
    with pytest.raises(SetupError, match="not in PEM form"):
        recipe.certificates(Settings(ca_certificates=(wrong,)))
    with pytest.raises(SetupError, match="cannot read"):
        recipe.certificates(Settings(ca_certificates=(tmp_path / "missing",)))


def test_the_environment_of_boxes(tmp_path: Path) -> None:
    certificate = tmp_path / "ca.pem"
    certificate.write_bytes(PEM)
    plain = recipe.base_environment(Settings(ca_certificates=()), {})
    assert plain == {"PATH": recipe.PATH, "LANG": "C.UTF-8"}
    more = recipe.base_environment(Settings(ca_certificates=(certificate,)), {})
    assert more["NODE_EXTRA_CA_CERTS"] == more["REQUESTS_CA_BUNDLE"] == recipe.BUNDLE
    proxies = {
        "https_proxy": "http://proxy.test:3128",
        "HTTP_PROXY": "http://u:secret@proxy.test",
        "no_proxy": "x.test",
    }
    passed = recipe.base_environment(Settings(ca_certificates=()), proxies)
    assert passed["HTTPS_PROXY"] == passed["https_proxy"] == "http://proxy.test:3128"
    assert passed["NO_PROXY"] == "x.test"
    assert "secret" not in str(passed)


# Building


def collect(steps: list[tuple[float, str]]) -> images.Progress:
    return lambda done, text: steps.append((done, text))


def settings_at(tmp_path: Path, **more: Any) -> Settings:
    return Settings(cache=tmp_path / "cache", **more)


@needs_root
def test_others_wait_for_the_builder_and_show_its_progress(tmp_path: Path) -> None:
    settings = settings_at(tmp_path)
    name = recipe.digest(settings)
    folder = settings.cache / "images"
    folder.mkdir(parents=True)

    async def main() -> list[tuple[float, str]]:
        steps: list[tuple[float, str]] = []
        seen = asyncio.Event()

        def progress(done: float, text: str) -> None:
            steps.append((done, text))
            seen.set()

        with (folder / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            (folder / f"{name}.progress").write_text(json.dumps([0.5, "unpacking bash"]))
            waiting = asyncio.create_task(Images(settings).ensure_default(progress))
            await seen.wait()
            (folder / name / "rootfs").mkdir(parents=True)
        image = await waiting
        assert image.layers == (folder / name / "rootfs",)
        return steps

    steps = asyncio.run(main())
    assert steps[0] == (0.5, "unpacking bash (by another process)")
    assert steps[-1] == (1.0, "image is ready")


@needs_root
def test_a_cancelled_build_leaves_nothing(tmp_path: Path) -> None:
    settings = settings_at(tmp_path)
    before = set(Path(tempfile.gettempdir()).glob("mmdebstrap.*"))

    async def main() -> None:
        started = asyncio.Event()
        build = asyncio.create_task(
            Images(settings).ensure_default(lambda done, _: started.set() if done > 0.02 else None)
        )
        await asyncio.wait({build, asyncio.create_task(started.wait())}, return_when=asyncio.FIRST_COMPLETED)
        build.cancel()
        with pytest.raises(asyncio.CancelledError):
            await build

    asyncio.run(main())
    assert {path.suffix for path in (settings.cache / "images").iterdir()} == {".lock"}
    assert Images(settings).default() is None
    assert set(Path(tempfile.gettempdir()).glob("mmdebstrap.*")) <= before
    assert str(tmp_path) not in Path("/proc/self/mountinfo").read_text()
    assert [line for line in commands() if str(tmp_path) in line] == []


def commands() -> Iterator[str]:
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with contextlib.suppress(OSError):
                yield (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")


@needs_root
def test_a_mirror_out_of_reach_is_explained(tmp_path: Path) -> None:
    settings = settings_at(tmp_path, apt_mirror="http://127.0.0.1:9/debian")
    with pytest.raises(EngineError, match=r"(?s)cannot build the image.*set apt_mirror"):
        asyncio.run(Images(settings).ensure_default(collect([])))
    assert {path.suffix for path in (settings.cache / "images").iterdir()} == {".lock"}


@needs_root
def test_a_missing_builder_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineError, match="apt-get install mmdebstrap"):
        asyncio.run(Images(settings_at(tmp_path)).ensure_default(collect([])))


# What is in it


@pytest.fixture(scope="module")
def rootfs() -> Path:
    """The image of this machine, which is built once and then shared by everybody."""
    if os.geteuid() != 0:
        pytest.skip("building an image needs root")
    return asyncio.run(Images(Settings()).ensure_default(lambda *_: None)).layers[0]


def user_runs(rootfs: Path, script: str) -> str:
    """Run a script as `user` in a throw-away copy of the image, in namespaces that vanish with it."""
    setup = (
        "mount -t tmpfs none /mnt && mkdir /mnt/u /mnt/w /mnt/r && cp /etc/resolv.conf /mnt/ && "
        'mount -t overlay none -o "lowerdir=$1,upperdir=/mnt/u,workdir=/mnt/w" /mnt/r && '
        "mount -t proc proc /mnt/r/proc && mount --rbind /dev /mnt/r/dev && cp /mnt/resolv.conf /mnt/r/etc/ && "
        "hostname devbox && echo 127.0.0.1 localhost devbox > /mnt/r/etc/hosts && "
        'exec chroot --userspec=1000:1000 /mnt/r bash -c "cd; $2"'
    )
    environment = {**recipe.base_environment(Settings()), "HOME": "/home/user", "USER": "user"}
    done = subprocess.run(
        ["/usr/bin/unshare", "-m", "-u", "-p", "-f", "/bin/sh", "-c", setup, "sh", str(rootfs), script],
        env=environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@needs_root
def test_the_user_and_the_shell(rootfs: Path) -> None:
    out = user_runs(rootfs, "id -un; id -u; pwd; sudo -n id -u; date +%Z; locale | head -1; getent passwd user")
    assert out.splitlines() == [
        "user", "1000", "/home/user", "0", "UTC", "LANG=C.UTF-8", "user:x:1000:1000::/home/user:/bin/bash",
    ]  # fmt: skip


@needs_root
def test_the_programs_are_there(rootfs: Path) -> None:
    names = "curl git python3 python pip node npm jq rg rsync less ip ping ps sudo unzip xz ssh"
    out = user_runs(rootfs, f"for name in {names}; do command -v $name >/dev/null || echo $name; done")
    assert out == ""
    assert (rootfs / "usr/lib/openssh/sftp-server").exists()
    assert user_runs(rootfs, "python3 -m venv v && v/bin/python -c 'print(1)'") == "1\n"


@needs_root
def test_a_login_shell_starts_no_process_and_keeps_path(rootfs: Path) -> None:
    """Process ids of a fresh namespace are given one after the other, so any fork leaves a gap."""
    script = """bash -lc 'echo $$; sh -c "echo \\$\\$"; true'; true"""
    first, second = map(int, user_runs(rootfs, script).split())
    assert second == first + 1
    assert user_runs(rootfs, "bash -lc 'echo $PATH'").strip() == recipe.PATH
    assert user_runs(rootfs, "PATH=/opt/mine:$PATH bash -lc 'echo $PATH'") == f"/opt/mine:{recipe.PATH}\n"
    assert "/home/user/.local/bin" in user_runs(rootfs, "env -i HOME=/home/user bash -lc 'echo $PATH'")


@needs_root
def test_node_is_an_official_build_of_the_lts_whose_npm_may_update_itself(rootfs: Path) -> None:
    out = user_runs(
        rootfs,
        "node -p 'process.release.lts && process.execPath'; npm config get prefix; "
        "test -w $(npm root -g)/npm/package.json && npm install -g npm@latest >/dev/null; npm --version; npx --version",
    ).splitlines()
    assert out[:2] == ["/usr/local/bin/node", "/usr/local"]
    assert out[2] == out[3]


@needs_root
def test_alternatives_of_the_manual_find_their_folders(rootfs: Path) -> None:
    """Of /usr/share/man only the pages are left out, so that the scripts of packages can make links beside them."""
    link = "/usr/share/man/man1/probe.1.gz"
    out = user_runs(
        rootfs,
        f"sudo update-alternatives --quiet --install /usr/bin/probe probe /bin/true 1 --slave {link} probe.1.gz "
        f"/etc/hosts && readlink {link}",
    )
    assert out == "/etc/alternatives/probe.1.gz\n"


@needs_root
def test_the_lists_of_packages_are_fetched_once_and_again_when_they_are_old(rootfs: Path) -> None:
    """By a stand-in for apt-get that tells how it is called."""
    out = user_runs(
        rootfs,
        "sudo tee /usr/bin/apt-get >/dev/null <<'END'\n"
        "#!/bin/sh\n"
        'echo "apt-get $*"; case " $* " in *" update "*) : >/var/lib/apt/lists/x_Packages ;; esac\n'
        "END\n"
        "sudo apt-get remove x; apt-get install x; sudo apt-get -y install x; sudo apt-get install y; "
        "sudo touch -d '2 days ago' /var/lib/apt/lists/x_Packages; sudo apt-get upgrade; sudo apt-get update",
    )
    assert out.splitlines() == [
        "apt-get remove x",
        "apt-get install x",
        *("apt-get -qq update", "apt-get -y install x"),
        "apt-get install y",
        *("apt-get -qq update", "apt-get upgrade"),
        "apt-get update",
    ]


@needs_root
def test_only_known_programs_change_the_user(rootfs: Path) -> None:
    found = set()
    for folder, _, names in os.walk(rootfs):
        for name in names:
            mode = os.lstat(Path(folder) / name).st_mode
            if stat.S_ISREG(mode) and mode & (stat.S_ISUID | stat.S_ISGID):
                found.add(name)
    assert {"su", "sudo"} <= found <= SET_ID


@needs_root
def test_nothing_of_the_host_is_in_the_image(rootfs: Path) -> None:
    assert (rootfs / "etc/resolv.conf").read_text() == ""
    assert (rootfs / "etc/machine-id").read_text() == ""
    assert (rootfs / "etc/hostname").read_text() == "devbox\n"
    assert not (rootfs / "devboxd-finish").exists()
    assert stat.S_IMODE(rootfs.parent.parent.stat().st_mode) == 0o700


@needs_root
def test_packages_are_installed_by_every_tool(rootfs: Path) -> None:
    out = user_runs(
        rootfs,
        "(sudo apt-get install -y tree && pip install six && npm install -g ms) >/tmp/log 2>&1 "
        "|| { cat /tmp/log; exit 1; }; command -v tree; python3 -c 'import six; print(six.__name__)'; "
        "npm ls -g --parseable",
    )
    assert out.split()[:2] == ["/usr/bin/tree", "six"]
    assert "/usr/local/lib/node_modules/ms" in out

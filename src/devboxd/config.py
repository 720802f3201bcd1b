"""Settings: defaults, then one TOML file, then `DEVBOXD_...` environment variables, then command-line options."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import msgspec

from devboxd.errors import SetupError

DEFAULT_FILE = Path("/etc/devboxd/devboxd.toml")
PREFIX = "DEVBOXD_"


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Every setting of the server. Names are the keys of the TOML file and, in capitals, of the environment."""

    state: Path = Path("/var/lib/devboxd")
    """Folder of the store, the journals and the boxes' disks; 0700, on a local file system."""
    cache: Path = Path("/var/cache/devboxd")
    """Folder of images, shared by all servers of the machine; safe to delete while none runs."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: int = 8080
    """Port to listen on."""
    domains: tuple[str, ...] = ()
    """Further host names under which clients reach the server; others get 421."""
    cors_origins: tuple[str, ...] = ()
    """Origins of web pages that may call the API from a browser, such as https://app.example.com."""
    runtime: str = "crun"
    """OCI runtime: crun or runc, by name or absolute path."""
    nested_user_namespaces: bool = False
    """Allow new user namespaces inside boxes (browsers' sandboxes and bwrap want them)."""
    retention_seconds: int = 7 * 86400
    """How long executions and journals of an ended box stay readable."""
    journal_cap_bytes: int = 1 << 30
    """Most bytes kept of one output stream of one execution."""
    journals_per_box_bytes: int = 16 << 30
    """Most bytes of output kept of all executions of a box together. Past half of it, less is kept of each new one."""
    executions_per_box: int = 256
    """Most executions that run at once in one box."""
    deny_cidrs: tuple[str, ...] = ()
    """Networks that boxes may not reach, besides those that they never may."""
    allow_endpoints: tuple[str, ...] = ()
    """Exceptions to the network wall, as address:port (a mirror or proxy on this machine, for example)."""
    dns_servers: tuple[str, ...] = ()
    """Resolvers for boxes; none means those of the host."""
    ca_certificates: tuple[Path, ...] | None = None
    """Extra CA certificates (PEM) for images and boxes; unset means those in /usr/local/share/ca-certificates."""
    apt_mirror: str | None = None
    """Debian mirror of the image and of boxes, after a space also that of security updates; unset: the host's."""
    pip_index_url: str | None = None
    """Index of pip in boxes; unset: the host's, when boxes can reach it."""
    npm_registry: str | None = None
    """Registry of npm in boxes; unset: the host's, when boxes can reach it."""
    disk_bytes_per_second: Annotated[int, msgspec.Meta(ge=0)] = 0
    """Most bytes that each new box reads from the disk in a second, and writes to it; 0: as many as the disk gives."""
    pool_size: int = 4
    """How many namespaces with network are kept ready for new boxes."""
    warm_boxes: int = 2
    """How many empty boxes are kept ready for new devboxes, about 1 MiB of memory each."""
    suspend_keep_memory_seconds: int = 0
    """How long a suspended devbox keeps its processes, frozen: resumed before, it goes on where it was."""
    log_format: str = "auto"
    """`text`, `json`, or `auto`: text on a terminal."""


def load(
    overrides: Mapping[str, Any],
    environ: Mapping[str, str] = os.environ,
    file: Path | None = None,
) -> Settings:
    """Merge all sources; the later of defaults, file, environment, overrides wins. Overrides that are None are absent.

    Raises SetupError that names the source and the key when a value does not fit.
    """
    merged: dict[str, Any] = {}
    path = file or Path(environ.get(PREFIX + "CONFIG", DEFAULT_FILE))
    try:
        merged.update(tomllib.loads(path.read_text()))
    except FileNotFoundError as error:
        if file is not None or PREFIX + "CONFIG" in environ:
            raise SetupError(
                f"cannot read the settings in {path}: there is no such file; name another or leave it out"
            ) from error
    except PermissionError as error:
        raise SetupError(
            f"cannot read the settings in {path}: permission denied; use sudo, or name another file with --config"
        ) from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SetupError(f"cannot read the settings in {path}: {error}; correct the file") from error
    for field in msgspec.structs.fields(Settings):
        if (text := environ.get(PREFIX + field.name.upper())) is not None:
            merged[field.name] = _from_text(field.type, text)
    merged.update({key: value for key, value in overrides.items() if value is not None})
    try:
        return msgspec.convert(merged, Settings, strict=False, dec_hook=_decode)
    except msgspec.ValidationError as error:
        raise SetupError(f"cannot use the settings: {error}; see `devboxd serve --help`") from error


def _from_text(kind: Any, text: str) -> Any:
    if "tuple" in str(kind):
        return [part.strip() for part in text.split(",") if part.strip()]
    return text


def _decode(kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, (str, Path)):
        return Path(value)
    raise NotImplementedError(kind)

"""Settings: defaults, then one TOML file, then `DEVBOXD_...` environment variables, then command-line options."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec

from devboxd import path_errors
from devboxd.errors import SetupError
from devboxd.path_errors import explained, shown

DEFAULT_FILE = Path("/etc/devboxd/devboxd.toml")
PREFIX = "DEVBOXD_"


_MOST = 1 << 53
"""No more bytes or seconds than any machine has, and than a number in JSON holds."""
Count = Annotated[int, msgspec.Meta(ge=0, le=_MOST)]
Positive = Annotated[int, msgspec.Meta(ge=1, le=_MOST)]


class Settings(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Every setting of the server. Names are the keys of the TOML file and, in capitals, of the environment."""

    state: Path = Path("/var/lib/devboxd")
    """Folder of the store, the journals and the boxes' disks; 0700, on a local file system."""
    cache: Path = Path("/var/cache/devboxd")
    """Folder of images, shared by all servers of the machine; safe to delete while none runs."""
    host: str = "127.0.0.1"
    """Address to listen on."""
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)] = 8080
    """Port to listen on."""
    domains: tuple[str, ...] = ()
    """Further host names under which clients reach the server; others get 421."""
    cors_origins: tuple[str, ...] = ()
    """Origins of web pages that may call the API from a browser, such as https://app.example.com."""
    runtime: str = "crun"
    """OCI runtime: crun or runc, by name or absolute path."""
    nested_user_namespaces: bool = False
    """Allow new user namespaces inside boxes (browsers' sandboxes and bwrap want them)."""
    retention_seconds: Count = 7 * 86400
    """How long executions and journals of an ended box stay readable."""
    journal_cap_bytes: Positive = 1 << 30
    """Most bytes kept of one output stream of one execution."""
    journals_per_box_bytes: Positive = 16 << 30
    """Most bytes of output kept of all executions of a box together. Past half of it, less is kept of each new one."""
    executions_per_box: Positive = 256
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
    disk_bytes_per_second: Count = 0
    """Most bytes that each new box reads from the disk in a second, and writes to it; 0: as many as the disk gives.
    With cgroups version 1 the pace of writes holds for what programs sync, not for what the kernel writes later."""
    pool_size: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 4
    """How many namespaces with network are kept ready for new boxes."""
    warm_boxes: Annotated[int, msgspec.Meta(ge=0, le=1024)] = 2
    """How many empty boxes are kept ready for new devboxes, about 1 MiB of memory each."""
    suspend_keep_memory_seconds: Count = 0
    """How long a suspended devbox keeps its processes, frozen: resumed before, it goes on where it was."""
    log_format: Literal["auto", "text", "json"] = "auto"
    """`text`, `json`, or `auto`: text on a terminal."""


def load(
    overrides: Mapping[str, Any],
    environ: Mapping[str, str] = os.environ,
    file: Path | None = None,
) -> Settings:
    """Merge all sources; the later of defaults, file, environment, overrides wins. Overrides that are None are absent.

    Raises SetupError that names the source and the key when one is unknown or its value does not fit.
    """
    values = _from_file(file, environ) | _from_environment(environ)
    for key, value in overrides.items():
        if value is not None:
            values[key] = _fitting(key, value, f"the option --{key.replace('_', '-')}")
    return Settings(**values)


def _from_file(file: Path | None, environ: Mapping[str, str]) -> dict[str, Any]:
    named = environ.get(PREFIX + "CONFIG")
    path = file or Path(named or DEFAULT_FILE)
    try:
        found = tomllib.loads(path.read_text())
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        if isinstance(error, FileNotFoundError) and not (file or named):
            return {}
        cure = "; correct the file" if isinstance(error, tomllib.TOMLDecodeError) else ""
        raise SetupError(f"cannot read the settings in {shown(path)}: {explained(error)}{cure}") from error
    for key in found.keys() - _FIELDS.keys():
        raise SetupError(f"cannot use {key!r} in {path}: there is no such setting{_nearest(key, _FIELDS)}")
    return {key: _fitting(key, value, f"{key!r} in {path}") for key, value in found.items()}


def _from_environment(environ: Mapping[str, str]) -> dict[str, Any]:
    known = {PREFIX + name.upper(): name for name in _FIELDS}
    found = {}
    for variable in sorted(environ):
        if variable in known:
            name = known[variable]
            text = environ[variable]
            value: Any = [part.strip() for part in text.split(",") if part.strip()] if _is_list(name) else text
            found[name] = _fitting(name, value, f"the environment variable {variable}")
        elif variable.startswith(PREFIX) and variable not in _OTHERS:
            near = _nearest(variable, [*known, *_OTHERS])
            raise SetupError(f"cannot use the environment variable {variable}: there is no such setting{near}")
    return found


def _nearest(name: str, known: Iterable[str]) -> str:
    import difflib

    bare = {full.removeprefix(PREFIX): full for full in known}
    near = [bare[close] for close in difflib.get_close_matches(name.removeprefix(PREFIX), bare, 2)]
    return f"; {' or '.join(near)} is meant perhaps" if near else "; `devboxd serve --help` lists them all"


def _fitting(key: str, value: Any, source: str) -> Any:
    """The value as its setting holds it. Raises SetupError that names the source and says what is wanted."""
    kind = _FIELDS[key].type
    if value == "" and _FIELDS[key].default is None:
        return None
    try:
        found = msgspec.convert(None if value == "" else value, kind, strict=False, dec_hook=_decode)
    except msgspec.ValidationError as error:
        shown = f" {str(value)[:40]!r}" if isinstance(value, (str, int, float)) else ""
        raise SetupError(f"cannot use the value{shown} of {source}: give {_wanted(kind)}") from error
    if isinstance(found, Path):
        path_errors.check(found, "folder", source)
    return found


def _wanted(kind: Any) -> str:
    """What a setting takes, in words."""
    limits, plain = _NO_LIMITS, kind
    if get_origin(kind) is Annotated:
        plain, limits = get_args(kind)
    if plain is int:
        return f"a whole number from {limits.ge} to {limits.le}"
    if plain is bool:
        return "true or false"
    if get_origin(plain) is Literal:
        return f"one of {', '.join(get_args(plain))}"
    if "tuple" in str(plain):
        return 'a list of texts, such as ["one", "two"] in the file and one,two in the environment'
    return "a path" if plain is Path else "a text"


def _is_list(name: str) -> bool:
    return "tuple" in str(_FIELDS[name].type)


def _decode(kind: type, value: Any) -> Any:
    if kind is Path and isinstance(value, (str, Path)):
        return Path(value)
    raise ValueError(f"not a {kind.__name__}")


_FIELDS = {field.name: field for field in msgspec.structs.fields(Settings)}
_OTHERS = (PREFIX + "CONFIG", PREFIX + "URL", PREFIX + "KEY")
"""Variables that are no settings: the file of settings, and what client commands read."""
_NO_LIMITS = msgspec.Meta()

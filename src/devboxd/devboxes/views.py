"""The shapes of devboxes on the wire, and the pure rules for what may be asked for."""

from __future__ import annotations

import platform
from typing import Any, Literal, NamedTuple

import msgspec

from devboxd.engine.base import Resources
from devboxd.errors import bad_request
from devboxd.ids import check_id

GIB = 1 << 30
MAX_NAME = 1024
MAX_MAP = 1024
MAX_PATH = 4096
ENVIRONMENT_ENTRY = 128 << 10
"""Bytes of one environment variable, `NAME=value` and a NUL, that Linux takes at most."""
ENVIRONMENT_BYTES = 1536 << 10
"""Bytes of all. Linux takes 2 MiB with the arguments; the rest is for those and the image's own."""
_POINTER = 8
DEFAULT_LIFE_S = 3600
MAX_LIFE_S = 172_800
MAX_IDLE_S = 172_800
MAX_HOOKS_MS = 60_000
DEFAULT_HOOKS_MS = 30_000
DEFAULT_DISK_GIB = 4
"""Of a custom size that names none."""

Size = Literal["X_SMALL", "SMALL", "MEDIUM", "LARGE", "X_LARGE", "XX_LARGE", "CUSTOM_SIZE"]

SIZES: dict[str, tuple[float, int, int]] = {
    "X_SMALL": (0.5, 1, 4),
    "SMALL": (1, 2, 4),
    "MEDIUM": (2, 4, 8),
    "LARGE": (2, 8, 16),
    "X_LARGE": (4, 16, 16),
    "XX_LARGE": (8, 32, 16),
}
"""Size to (cpu cores, GiB of memory, GiB of disk)."""


class UserParameters(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The Linux user of a devbox; `uid` 0 is root."""

    username: str
    """A letter, then at most 31 letters, digits, `-`, `_` or `.`. Example: `"user"`"""
    uid: int
    """The id of the user, 0 to 65533; 0 is root. Example: `1000`"""


class AfterIdle(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """An idle policy as it is asked for; without values it asks for nothing."""

    idle_time_seconds: int | None = None
    """Seconds without use after which the devbox is idle: 1 to 172,800. Example: `600`"""
    on_idle: Literal["shutdown", "suspend"] | None = None
    """What happens then. Example: `"suspend"`"""


class IdlePolicy(NamedTuple):
    """What happens to a devbox that nobody has used for so many seconds."""

    idle_time_seconds: int
    on_idle: str


class ResumeTriggers(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What wakes a suspended devbox beside a resume. There are no tunnels and axons yet, so true is refused."""

    http: bool | None = None
    """Whether a request to a tunnel wakes it; not in this version. Example: `false`"""
    axon_event: bool | None = None
    """Whether an event wakes it; not in this version. Example: `false`"""


class LifecycleHooks(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """Commands before a suspend, all together within the deadline."""

    suspend_commands: list[str] | None = None
    """Shell commands that run before each suspend, one after the other, as the user of the devbox. Example: `["git
    stash"]`
    """
    suspend_deadline_ms: int | None = None
    """Milliseconds for all of them together: 1 to 60,000. Null: 30,000. Example: `30000`"""


class Lifecycle(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """How a devbox sleeps and wakes."""

    after_idle: AfterIdle | None = None
    """The idle policy; the same as `launch_parameters.after_idle`, of which one is set."""
    resume_triggers: ResumeTriggers | None = None
    """What wakes it."""
    lifecycle_hooks: LifecycleHooks | None = None
    """What runs before it sleeps."""


class LaunchParameters(msgspec.Struct, frozen=True, omit_defaults=True, forbid_unknown_fields=True):
    """What a devbox is launched with. Fields under `not yet` are refused when set."""

    resource_size_request: Size | None = None
    """Processors, memory and disk. X_SMALL 0.5 cores, 1 GiB, 4 GiB; SMALL 1, 2, 4; MEDIUM 2, 4, 8; LARGE 2, 8, 16;
    X_LARGE 4, 16, 16; XX_LARGE 8, 32, 16. Null: SMALL. Example: `"MEDIUM"`
    """
    custom_cpu_cores: float | None = None
    """Cores of a CUSTOM_SIZE: 0.5, 1 or an even number up to 16. Example: `2`"""
    custom_gb_memory: int | None = None
    """GiB of memory of a CUSTOM_SIZE: 1 or an even number up to 64, 2 to 8 for each core. Example: `8`"""
    custom_disk_size: int | None = None
    """GiB of disk of a CUSTOM_SIZE: an even number from 2 to 64. Null: 4. Example: `16`"""
    architecture: Literal["x86_64", "arm64"] | None = None
    """Of the processor; this server has x86_64. Example: `"x86_64"`"""
    user_parameters: UserParameters | None = None
    """The user as whom commands run and files are written. Null: `user`, 1000."""
    launch_commands: list[str] | None = None
    """Shell commands that run before the devbox is `running`, at each start; one that fails fails the devbox. Example:
    `["pip install pytest"]`
    """
    keep_alive_time_seconds: int | None = None
    """Seconds until the devbox is shut down, 1 to 172,800 (48 h); `keep_alive` begins them anew. Null: 3600. With an
    idle policy that decides alone. Example: `3600`
    """
    provisioning_tier: Literal["standard", "flex"] | None = None
    """Accepted for clients that send it; there is one tier. Example: `"standard"`"""
    after_idle: AfterIdle | None = None
    """What happens to a devbox that is not used; replaces the deadline of `keep_alive_time_seconds`."""
    lifecycle: Lifecycle | None = None
    """How it sleeps and wakes."""
    # not yet
    available_ports: Any = None
    """Not in this version: refused unless it is null or empty. Example: `null`"""
    network_policy_id: Any = None
    """Not in this version: refused unless it is null or empty. Example: `null`"""
    required_services: Any = None
    """Not in this version: refused unless it is null or empty. Example: `null`"""


class CreateDevbox(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of create: all optional. Unknown fields are refused: they would ask for another devbox."""

    name: str | None = None
    """A name for people; it need not be the only one of its kind. At most 1024 characters. Example: `"first"`"""
    environment_variables: dict[str, str] | None = None
    """Variables of every command. Example: `{"LANG": "C.UTF-8"}`"""
    environment_of: str | None = None
    """A devbox whose variables it gets too, where `environment_variables` has none of the same name; an extension of
    this server, for forks. Example: `"dbx_0BwT25a4ESR05DXUEbW3kZ"`
    """
    file_mounts: dict[str, str] | None = None
    r"""Files that are written before the devbox is `running`: path to contents. Example: `{"/home/user/.gitconfig":
    "[user]\n"}`
    """
    entrypoint: str | None = None
    """A shell command that runs as long as the devbox, from `running` on; its end ends nothing else. Example: `"python3
    -m http.server"`
    """
    launch_parameters: LaunchParameters | None = None
    """Size, user, commands and deadlines."""
    metadata: dict[str, str] | None = None
    """Labels: at most 1024 keys of 1 to 1024 characters, values of at most 16,384. Example: `{"team": "search"}`"""
    snapshot_id: str | None = None
    """The snapshot from whose disk it begins. Null: the default image. Example: `"snp_0BwT25a4ESR05DXUEbW3kZ"`"""
    # not yet
    mounts: Any = None
    """Not in this version: refused unless it is null or empty. Example: `null`"""
    code_mounts: Any = None
    """Not in this version: refused unless it is null or empty. Example: `null`"""
    secrets: Any = None
    """Not in this version: refused unless it is null or empty. Example: `null`"""
    blueprint_id: Any = None
    """Not in this version: refused unless it is null or empty. Example: `null`"""
    blueprint_name: Any = None
    """Not in this version: refused unless it is null or empty. Example: `null`"""
    tunnel: Any = None
    """Not in this version: refused unless it is null or empty. Example: `null`"""
    gateways: Any = None
    """Not in this version: refused unless it is null or empty. Example: `null`"""
    mcp: Any = None
    """Not in this version: refused unless it is null or empty. Example: `null`"""
    repo_connection_id: Any = None
    """Not in this version: refused unless it is null or empty. Example: `null`"""


class UpdateDevbox(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A patch: absent leaves a field as it is, an empty value clears it."""

    name: str | msgspec.UnsetType | None = msgspec.UNSET
    """A name for people; it need not be the only one of its kind. At most 1024 characters. Empty: none. Example:
    `"renamed"`
    """
    metadata: dict[str, str] | msgspec.UnsetType | None = msgspec.UNSET
    """Replaces all labels. Labels: at most 1024 keys of 1 to 1024 characters, values of at most 16,384. Example:
    `{"team": "search"}`
    """


class WaitForStatus(msgspec.Struct, frozen=True):
    """Which statuses end a wait, and after how many seconds it gives up."""

    statuses: list[str]
    """Statuses of which one ends the wait. Example: `["running", "failure"]`"""
    timeout_seconds: float | None = None
    """Seconds after which the answer is 408: at most 24. Null: 10. Example: `10`"""


class StateTransition(msgspec.Struct, frozen=True):
    """A status and when it began; `failure_reason` says in words what went wrong."""

    status: str
    """The status. Example: `"running"`"""
    transition_time_ms: int
    """When it began, in Unix milliseconds. Example: `1764352800000`"""
    failure_reason: str | None = None
    """What went wrong, in words; null where nothing did. Example: `null`"""


class DevboxView(msgspec.Struct, frozen=True):
    """A devbox as clients see it."""

    id: str
    """The id, by which all operations name it. Example: `"dbx_0BwT25a4ESR05DXUEbW3kZ"`"""
    status: str
    """provisioning, initializing, running, suspending, suspended, shutdown or failure. Example: `"running"`
    """
    name: str | None
    """The name that it was given. Example: `"first"`"""
    create_time_ms: int
    """When it was created, in Unix milliseconds. Example: `1764352800000`"""
    end_time_ms: int | None
    """When it ended, in Unix milliseconds; null before. Example: `null`"""
    capabilities: list[str]
    """Accepted for clients that read it; always empty. Example: `[]`"""
    metadata: dict[str, str]
    """Its labels. Example: `{"team": "search"}`"""
    launch_parameters: LaunchParameters
    """What it was launched with."""
    state_transitions: list[StateTransition]
    """Its statuses so far, oldest first."""
    failure_reason: str | None
    """Why it failed: out_of_memory, out_of_disk or execution_failed; null where it did not. Example: `null`"""
    shutdown_reason: str | None
    """Why it was shut down: api_shutdown, keep_alive_timeout or idle; null before. Example: `null`"""
    initiator_type: str = "api"
    """By what it was created. Example: `"api"`"""
    initiator_id: str | None = None
    """Always null. Example: `null`"""
    blueprint_id: str | None = None
    """Always null in this version. Example: `null`"""
    snapshot_id: str | None = None
    """The snapshot from which it began. Example: `null`"""
    tunnel: None = None
    """Always null in this version. Example: `null`"""
    gateway_specs: None = None
    """Always null in this version. Example: `null`"""
    mcp_specs: None = None
    """Always null in this version. Example: `null`"""


class DevboxListView(msgspec.Struct, frozen=True):
    """A page of devboxes, newest first."""

    devboxes: list[DevboxView]
    """The devboxes of this page."""
    has_more: bool
    """Whether there are others; `starting_after` with the last id gives them. Example: `false`"""
    total_count: int | None
    """How many there are in all pages; null unless it was asked for. Example: `1`"""


_NOT_YET_CREATE = (
    "mounts",
    "code_mounts",
    "secrets",
    "blueprint_id",
    "blueprint_name",
    "tunnel",
    "gateways",
    "mcp",
    "repo_connection_id",
)
_NOT_YET_LAUNCH = ("available_ports", "network_policy_id", "required_services")


_INSTEAD = {
    "launch_parameters.available_ports": "nothing outside a devbox reaches its ports in this version",
    "launch_parameters.lifecycle.resume_triggers": "only a resume wakes a devbox in this version",
}
"""What holds in the place of a field, where it is not plain."""


def _unsupported(field: str) -> Exception:
    reason = _INSTEAD.get(field, "this version does not support it")
    return bad_request(f"cannot create a devbox with {field}: {reason}; leave the field out")


def _asks(value: Any) -> bool:
    """Whether a value asks for anything: null, empty, and an object of such values do not."""
    pending = [value]  # no recursion: the depth is the caller's
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            pending.extend(item.values())
        elif item:
            return True
    return False


def check_create(body: CreateDevbox) -> tuple[LaunchParameters, Resources]:
    """Check everything that a create asks for; return its launch parameters and the limits that follow.

    Raises 400 that names the field. Null and empty count as absent (they ask for nothing), except an empty tunnel,
    which is one with all defaults.
    """
    launch = body.launch_parameters or LaunchParameters()
    for field in _NOT_YET_CREATE:
        if _asks(getattr(body, field)) or (field == "tunnel" and body.tunnel == {}):
            raise _unsupported(field)
    for field in _NOT_YET_LAUNCH:
        if _asks(getattr(launch, field)):
            raise _unsupported(f"launch_parameters.{field}")
    if launch.lifecycle and _asks(msgspec.to_builtins(launch.lifecycle.resume_triggers)):
        raise _unsupported("launch_parameters.lifecycle.resume_triggers")
    _check_architecture(launch.architecture)
    if launch.provisioning_tier == "flex":
        raise _unsupported("launch_parameters.provisioning_tier flex")
    check_labels(body.name, body.metadata)
    check_environment(body.environment_variables or {})
    _check_file_mounts(body.file_mounts or {})
    _check_text("entrypoint", body.entrypoint or "")
    for command in launch.launch_commands or ():
        _check_text("launch_commands", command)
        if not command.strip():
            raise bad_request("cannot run an empty launch command: give each entry of launch_commands a text")
    _check_user(launch.user_parameters)
    _check_life(launch.keep_alive_time_seconds)
    _check_idle(launch)
    _check_hooks(launch)
    if body.snapshot_id:
        check_id("snp", body.snapshot_id, "snapshot")
    if body.environment_of:
        check_id("dbx", body.environment_of, "devbox")
    return launch, resources(launch)


def _check_architecture(asked: str | None) -> None:
    here = {"aarch64": "arm64"}.get(platform.machine(), platform.machine())
    if asked not in (None, here):
        raise bad_request(
            f"cannot create a devbox with launch_parameters.architecture {asked}: this machine is {here}; "
            "leave the field out"
        )


def check_labels(name: str | None, metadata: dict[str, str] | None) -> None:
    """Raise 400 when a name or metadata is longer than the store keeps."""
    if name is not None and len(name) > MAX_NAME:
        raise bad_request(f"cannot use a name of {len(name)} characters: at most {MAX_NAME} are kept; shorten it")
    if len(metadata or {}) > MAX_MAP:
        raise bad_request(f"cannot keep {len(metadata or {})} metadata entries: at most {MAX_MAP}; drop some")
    for key, value in (metadata or {}).items():
        if not key or len(key) > MAX_NAME or len(value) > 16 * MAX_NAME:
            raise bad_request(
                f"cannot keep the metadata key {key[:64]!r}: keys have 1 to {MAX_NAME} characters, "
                f"values at most {16 * MAX_NAME}"
            )


def _check_text(field: str, text: str) -> None:
    if "\0" in text:
        raise bad_request(f"cannot use {field} with a NUL character: no program of Linux can be given one; remove it")


def check_environment(environment: dict[str, str]) -> None:
    """Raise 400 when variables are more than Linux passes on to a program."""
    for name, value in environment.items():
        if not name or "=" in name or "\0" in name or "\0" in value:
            raise bad_request(
                f"cannot set the environment variable {name[:64]!r}: a name must not be empty or contain '=' or NUL, "
                "and a value must not contain NUL"
            )
        if name == "SHELLOPTS" and "noexec" in value.split(":"):
            raise bad_request(
                "cannot set the environment variable 'SHELLOPTS' with noexec: bash would read commands, run none, and "
                "end with 0; leave noexec out"
            )
        if (size := _bytes_of(name, value)) > ENVIRONMENT_ENTRY:
            raise bad_request(
                f"cannot set the environment variable {name[:64]!r} of {size} bytes: Linux takes none of "
                f"more than {ENVIRONMENT_ENTRY} bytes, name and value together; write it into a file, by file_mounts"
            )
    if (size := sum(_bytes_of(*entry) + _POINTER for entry in environment.items())) > ENVIRONMENT_BYTES:
        raise bad_request(
            f"cannot set environment_variables of {size} bytes: at most {ENVIRONMENT_BYTES} together, of which Linux "
            "leaves room for the arguments of commands; write some into a file, by file_mounts"
        )


def _bytes_of(name: str, value: str) -> int:
    """What an entry takes when a program is executed: `NAME=value` and a NUL."""
    return len(f"{name}={value}".encode("utf-8", "surrogatepass")) + 1


def _check_file_mounts(mounts: dict[str, str]) -> None:
    for path in mounts:
        if not path or "\0" in path:
            raise bad_request(f"cannot write the file mount {path[:64]!r}: a path must not be empty or contain NUL")
        if len(path.encode("utf-8", "surrogatepass")) > MAX_PATH:
            raise bad_request(f"cannot write the file mount {path[:64]!r}...: a path has at most {MAX_PATH} bytes")


def _check_user(user: UserParameters | None) -> None:
    if user is None:
        return
    plain = user.username.replace("-", "").replace("_", "").replace(".", "")
    if (
        not (plain.isascii() and plain.isalnum())
        or len(user.username) > 32
        or not (user.username[0].isalpha() or user.username[0] == "_")
    ):
        raise bad_request(
            f"cannot use {user.username[:64]!r} as user_parameters.username: a letter, then at most 31 letters, "
            "digits, '-', '_' or '.'"
        )
    if not 0 <= user.uid <= 65533:
        raise bad_request(f"cannot use {user.uid} as user_parameters.uid: a devbox has the ids 0 to 65533")
    if (user.uid == 0) != (user.username == "root"):
        raise bad_request("cannot use these user_parameters: uid 0 and the name root belong together")


def _check_life(seconds: int | None) -> None:
    if seconds is not None and not 1 <= seconds <= MAX_LIFE_S:
        raise bad_request(
            f"cannot keep a devbox alive for {seconds} s: keep_alive_time_seconds is 1 to {MAX_LIFE_S} (48 hours)"
        )


def idle_policy(launch: LaunchParameters) -> IdlePolicy | None:
    """The policy, from either of its two places."""
    asked = next(iter(_asked_policies(launch)), AfterIdle())
    if asked.idle_time_seconds is None or asked.on_idle is None:
        return None
    return IdlePolicy(asked.idle_time_seconds, asked.on_idle)


def _asked_policies(launch: LaunchParameters) -> set[AfterIdle]:
    inner = launch.lifecycle.after_idle if launch.lifecycle else None
    return {asked for asked in (launch.after_idle, inner) if asked is not None and asked != AfterIdle()}


def _check_idle(launch: LaunchParameters) -> None:
    found = _asked_policies(launch)
    if len(found) > 1:
        raise bad_request(
            "cannot use two idle policies: launch_parameters.after_idle and lifecycle.after_idle differ; set one"
        )
    policy = idle_policy(launch)
    if found and policy is None:
        raise bad_request("cannot use half an idle policy: after_idle needs both idle_time_seconds and on_idle")
    if policy is not None and not 1 <= policy.idle_time_seconds <= MAX_IDLE_S:
        raise bad_request(
            f"cannot wait {policy.idle_time_seconds} s for a devbox to be idle: idle_time_seconds is 1 to {MAX_IDLE_S}"
        )


def _check_hooks(launch: LaunchParameters) -> None:
    hooks = launch.lifecycle.lifecycle_hooks if launch.lifecycle else None
    if hooks is None:
        return
    for command in hooks.suspend_commands or ():
        _check_text("suspend_commands", command)
        if not command.strip():
            raise bad_request("cannot run an empty suspend command: give each entry of suspend_commands a text")
    if hooks.suspend_deadline_ms is not None and not 1 <= hooks.suspend_deadline_ms <= MAX_HOOKS_MS:
        raise bad_request(
            f"cannot give suspend commands {hooks.suspend_deadline_ms} ms: suspend_deadline_ms is 1 to {MAX_HOOKS_MS}"
        )


PIDS_LEAST = 1024
PIDS_PER_GIB = 256


def resources(launch: LaunchParameters) -> Resources:
    """The limits that a size means. Raises 400 when a custom size breaks its rules (behaviour: sizes table)."""
    size = launch.resource_size_request or "SMALL"
    custom = (launch.custom_cpu_cores, launch.custom_gb_memory, launch.custom_disk_size)
    if size != "CUSTOM_SIZE":
        if any(value is not None for value in custom):
            raise bad_request("cannot use custom_... sizes: set resource_size_request to CUSTOM_SIZE with them")
        return _limits(*SIZES[size])
    return _custom(launch.custom_cpu_cores, launch.custom_gb_memory, launch.custom_disk_size)


def _limits(cores: float, gib: int, disk_gib: int) -> Resources:
    """Processes and threads grow with memory; more than these in a small box slow its neighbours down."""
    return Resources(cores, gib * GIB, max(PIDS_LEAST, PIDS_PER_GIB * gib), disk_gib * GIB)


def _custom(cores: float | None, gib: int | None, disk: int | None) -> Resources:
    if cores is None or gib is None:
        raise bad_request("cannot make a CUSTOM_SIZE devbox: custom_cpu_cores and custom_gb_memory are both needed")
    if not (cores in (0.5, 1) or (cores % 2 == 0 and 2 <= cores <= 16)):
        raise bad_request(f"cannot use {cores:g} as custom_cpu_cores: 0.5, 1 or an even number up to 16")
    if not (gib == 1 or (gib % 2 == 0 and 2 <= gib <= 64)):
        raise bad_request(f"cannot use {gib} as custom_gb_memory: 1 or an even number up to 64")
    if disk is not None and not (disk % 2 == 0 and 2 <= disk <= 64):
        raise bad_request(f"cannot use {disk} as custom_disk_size: an even number from 2 to 64")
    if not 2 <= gib / cores <= 8:
        raise bad_request(f"cannot combine {cores:g} cores with {gib} GiB: 2 to 8 GiB of memory belong to a core")
    return _limits(cores, gib, disk or DEFAULT_DISK_GIB)

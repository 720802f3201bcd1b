"""What a create may ask for, and which limits follow."""

from __future__ import annotations

import copy
import functools
import operator
import platform
from collections.abc import Iterator
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from devboxd.devboxes.views import (
    GIB,
    SIZES,
    AfterIdle,
    CreateDevbox,
    IdlePolicy,
    LaunchParameters,
    Lifecycle,
    check_create,
    idle_policy,
    resources,
)
from devboxd.engine.base import Resources
from devboxd.errors import ApiError
from devboxd.http.binding import BodyDecoder

HERE, FOREIGN = ("arm64", "x86_64") if platform.machine() == "aarch64" else ("x86_64", "arm64")


@pytest.mark.parametrize(
    ("size", "cores", "gib", "disk"),
    [
        ("X_SMALL", 0.5, 1, 4),
        ("SMALL", 1, 2, 4),
        ("MEDIUM", 2, 4, 8),
        ("LARGE", 2, 8, 16),
        ("X_LARGE", 4, 16, 16),
        ("XX_LARGE", 8, 32, 16),
        (None, 1, 2, 4),
    ],
)
def test_sizes(size: str | None, cores: float, gib: int, disk: int) -> None:
    limits = Resources(cores, gib * GIB, max(1024, 256 * gib), disk * GIB)
    assert resources(LaunchParameters(resource_size_request=size)) == limits


@given(cores=st.floats(-2, 20), gib=st.integers(-2, 70), disk=st.none() | st.integers(-2, 70))
def test_custom_sizes_keep_their_rules(cores: float, gib: int, disk: int | None) -> None:
    launch = LaunchParameters("CUSTOM_SIZE", cores, gib, disk)
    legal = (
        (cores in (0.5, 1) or (cores % 2 == 0 and 2 <= cores <= 16))
        and (gib == 1 or (gib % 2 == 0 and 2 <= gib <= 64))
        and (disk is None or (disk % 2 == 0 and 2 <= disk <= 64))
        and 2 <= gib / cores <= 8
    )
    if legal:
        assert resources(launch) == Resources(cores, gib * GIB, max(1024, 256 * gib), (disk or 4) * GIB)
    else:
        with pytest.raises(ApiError, match="^cannot ") as refusal:
            resources(launch)
        assert refusal.value.code == 400


def test_half_a_core_with_two_gib_is_legal() -> None:
    assert resources(LaunchParameters("CUSTOM_SIZE", 0.5, 2)) == Resources(0.5, 2 * GIB, 1024)


def test_custom_numbers_need_the_custom_size() -> None:
    with pytest.raises(ApiError, match="CUSTOM_SIZE"):
        resources(LaunchParameters("SMALL", custom_gb_memory=4))


@pytest.mark.parametrize(
    "field",
    ["mounts", "code_mounts", "secrets", "blueprint_id", "blueprint_name", "tunnel", "gateways", "mcp"],
)
@pytest.mark.parametrize("empty", [None, "", [], {}])
def test_unsupported_fields_are_named_and_empty_ones_are_absent(field: str, empty: object) -> None:
    if (field, empty) != ("tunnel", {}):
        check_create(CreateDevbox(**{field: empty}))
    with pytest.raises(ApiError, match=f"^cannot .*{field}") as refusal:
        check_create(CreateDevbox(**{field: {"x": 1}}))
    assert refusal.value.code == 400


def test_an_empty_tunnel_asks_for_one() -> None:
    with pytest.raises(ApiError, match="^cannot create a devbox with tunnel: "):
        check_create(CreateDevbox(tunnel={}))


@pytest.mark.parametrize("empty", [{}, {"after_idle": None}, {"after_idle": {"on_idle": None}}, {"after_idle": {}}])
def test_a_lifecycle_without_a_value_asks_for_nothing(empty: dict[str, object]) -> None:
    body = b'{"launch_parameters": {"lifecycle": ' + msgspec.json.encode(empty) + b"}}"
    launch, _ = check_create(BodyDecoder(CreateDevbox).decode(body))
    assert idle_policy(launch) is None


@pytest.mark.parametrize("place", ["after_idle", "lifecycle"])
def test_an_idle_policy_may_stand_in_either_place(place: str) -> None:
    policy = AfterIdle(60, "suspend")
    launch = (
        LaunchParameters(after_idle=policy) if place == "after_idle" else LaunchParameters(lifecycle=Lifecycle(policy))
    )
    check_create(CreateDevbox(launch_parameters=launch))
    check_create(CreateDevbox(launch_parameters=LaunchParameters(after_idle=policy, lifecycle=Lifecycle(policy))))
    assert idle_policy(launch) == IdlePolicy(60, "suspend")


def test_an_object_of_any_depth_is_looked_through() -> None:
    deep: object = 1
    for _ in range(100_000):
        deep = {"x": deep}
    with pytest.raises(ApiError, match="tunnel"):
        check_create(CreateDevbox(tunnel=deep))


@pytest.mark.parametrize(
    ("launch", "field"),
    [
        ({"after_idle": {"idle_time_seconds": 1}}, "on_idle"),
        ({"after_idle": {"idle_time_seconds": 0, "on_idle": "suspend"}}, "idle_time_seconds"),
        ({"lifecycle": {"after_idle": {"idle_time_seconds": 172_801, "on_idle": "suspend"}}}, "idle_time_seconds"),
        (
            {
                "after_idle": {"idle_time_seconds": 5, "on_idle": "suspend"},
                "lifecycle": {"after_idle": {"idle_time_seconds": 6, "on_idle": "suspend"}},
            },
            "differ",
        ),
        ({"lifecycle": {"lifecycle_hooks": {"suspend_commands": [" "]}}}, "suspend_commands"),
        ({"lifecycle": {"lifecycle_hooks": {"suspend_deadline_ms": 60_001}}}, "suspend_deadline_ms"),
        ({"network_policy_id": "np_x"}, "network_policy_id"),
        ({"required_services": ["db"]}, "required_services"),
        ({"available_ports": [80]}, "available_ports: nothing outside"),
        ({"lifecycle": {"resume_triggers": {"http": True}}}, "resume_triggers: only a resume"),
        ({"lifecycle": {"resume_triggers": {"axon_event": True}}}, "resume_triggers: only a resume"),
        ({"architecture": FOREIGN}, f"architecture {FOREIGN}: this machine is {HERE}"),
        ({"provisioning_tier": "flex"}, "provisioning_tier flex"),
        ({"keep_alive_time_seconds": 0}, "keep_alive_time_seconds"),
        ({"keep_alive_time_seconds": 172_801}, "keep_alive_time_seconds"),
        ({"launch_commands": ["ok", " "]}, "launch_commands"),
        ({"user_parameters": {"username": "x; rm", "uid": 5}}, "username"),
        ({"user_parameters": {"username": "root", "uid": 5}}, "root"),
        ({"user_parameters": {"username": "bob", "uid": 65534}}, "uid"),
    ],
)
def test_unsupported_launch_parameters_are_named(launch: dict[str, object], field: str) -> None:
    body = msgspec.convert({"launch_parameters": launch}, CreateDevbox)
    with pytest.raises(ApiError, match=field):
        check_create(body)


@pytest.mark.parametrize(
    "launch",
    [
        {"available_ports": []},
        {"available_ports": None},
        {"architecture": HERE},
        {"provisioning_tier": "standard"},
        {"lifecycle": {"resume_triggers": {"http": False, "axon_event": None}}},
    ],
)
def test_harmless_launch_parameters_pass(launch: dict[str, object]) -> None:
    check_create(msgspec.convert({"launch_parameters": launch}, CreateDevbox))


def test_unknown_fields_are_refused_by_name() -> None:
    with pytest.raises(msgspec.ValidationError, match="colour"):
        msgspec.json.decode(b'{"colour": "red"}', type=CreateDevbox)
    with pytest.raises(msgspec.ValidationError, match="colour"):
        msgspec.json.decode(b'{"launch_parameters": {"colour": 1}}', type=CreateDevbox)


EVERYTHING: dict[str, Any] = {
    "user_parameters": {"username": "bob", "uid": 1001},
    "after_idle": {"idle_time_seconds": 60, "on_idle": "suspend"},
    "lifecycle": {
        "after_idle": {"idle_time_seconds": 60, "on_idle": "suspend"},
        "resume_triggers": {"http": False, "axon_event": False},
        "lifecycle_hooks": {"suspend_commands": ["sync"], "suspend_deadline_ms": 1000},
    },
}


def paths(known: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The path to each object in an object."""
    yield path
    for name, value in known.items():
        if isinstance(value, dict):
            yield from paths(value, (*path, name))


@pytest.mark.parametrize("path", list(paths(EVERYTHING)), ids=".".join)
def test_unknown_fields_are_refused_at_any_depth(path: tuple[str, ...]) -> None:
    decode = BodyDecoder(CreateDevbox).decode
    launch = copy.deepcopy(EVERYTHING)
    decode(msgspec.json.encode({"launch_parameters": launch}))
    functools.reduce(operator.getitem, path, launch)["colour"] = None
    with pytest.raises(ApiError) as refusal:
        decode(msgspec.json.encode({"launch_parameters": launch}))
    named = ".".join(("launch_parameters", *path, "colour"))
    assert str(refusal.value) == f"cannot use the field {named!r}: it is not known here; leave it out"


@pytest.mark.parametrize("environment", [{"": "x"}, {"A=B": "x"}, {"A": "x\0"}])
def test_impossible_environment_variables_are_refused(environment: dict[str, str]) -> None:
    with pytest.raises(ApiError, match="environment variable"):
        check_create(CreateDevbox(environment_variables=environment))


def test_long_names_are_refused() -> None:
    with pytest.raises(ApiError, match="10000 characters"):
        check_create(CreateDevbox(name="n" * 10_000))


def test_every_size_has_a_known_ratio() -> None:
    assert all(2 <= gib / cores <= 8 or cores == 0 for cores, gib, _ in SIZES.values())

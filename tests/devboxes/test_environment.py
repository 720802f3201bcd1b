"""Which environments a create takes."""

from __future__ import annotations

import pytest

from devboxd.devboxes.views import ENVIRONMENT_BYTES, ENVIRONMENT_ENTRY, CreateDevbox, check_create
from devboxd.errors import ApiError
from support.api import Api


@pytest.mark.parametrize(
    "environment",
    [
        {"A": "x" * (ENVIRONMENT_ENTRY - 2)},
        {"A": "é" * (ENVIRONMENT_ENTRY // 2)},
        {"N" * ENVIRONMENT_ENTRY: ""},
        {f"V{n}": "x" * 100_000 for n in range(16)},
        {"": "x"},
        {"A=B": "x"},
        {"A": "x\0"},
        {"SHELLOPTS": "braceexpand:noexec"},
    ],
)
def test_what_cannot_be_executed_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(ApiError, match="cannot set") as refused:
        check_create(CreateDevbox(environment_variables=environment))
    assert refused.value.code == 400


def test_a_file_mount_with_a_path_that_is_too_long_is_refused() -> None:
    with pytest.raises(ApiError, match="4096 bytes"):
        check_create(CreateDevbox(file_mounts={"/" + "x" * 4096: ""}))


@pytest.mark.box
def test_a_box_can_have_the_environment_of_another(api: Api) -> None:
    first = api.create(environment_variables={"A": "1", "B": "2"})
    second = api.create(environment_of=first, environment_variables={"B": "3", "C": "4"})
    assert api.output(second, "echo $A $B $C") == "1 3 4\n"
    api.shutdown(first)
    third = api.create(environment_of=second)
    api.shutdown(second)
    fourth = api.create(environment_of=second)
    for box in (third, fourth):
        assert api.output(box, "echo $A $B $C") == "1 3 4\n", "also of one that has ended"
        api.shutdown(box)


@pytest.mark.box
def test_an_environment_of_nothing_is_refused(api: Api) -> None:
    large = {f"V{n}": "x" * 100_000 for n in range(9)}
    first = api.create(environment_variables=large)
    more = {f"W{n}": "x" * 100_000 for n in range(9)}
    for code, asked in (
        (400, {"environment_of": "first"}),
        (404, {"environment_of": "dbx_" + "0" * 21}),
        (400, {"environment_of": first, "environment_variables": more}),
    ):
        assert api.http.post("/v1/devboxes", json=asked).status_code == code
    api.shutdown(first)


@pytest.mark.box
def test_the_most_that_is_taken_can_be_executed(api: Api) -> None:
    entry = "x" * (ENVIRONMENT_ENTRY - len("V10=") - 1)
    environment = {f"V{n}": entry for n in range(10, 10 + ENVIRONMENT_BYTES // (ENVIRONMENT_ENTRY + 8))}
    box = api.create(environment_variables=environment)
    for shell in ({}, {"shell_name": "s"}):
        view = api.run(box, "env | wc -c; sudo true; (exit 3)", **shell)
        assert (view["exit_status"], int(view["stdout"]) > 1_400_000) == (3, True), view
    api.shutdown(box)

"""Settings: where they come from, which wins, and what is said when one does not fit."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from devboxd.config import Settings, load
from devboxd.errors import SetupError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "devboxd.toml"


def test_the_defaults_listen_on_this_machine_only() -> None:
    settings = load({}, {"DEVBOXD_CONFIG": "/dev/null"})
    assert settings == Settings()
    assert settings.host == "127.0.0.1"
    assert settings.state == Path("/var/lib/devboxd")


def test_options_win_over_environment_over_file_over_defaults(file: Path) -> None:
    file.write_text('port = 1\nhost = "a"\nruntime = "runc"\nstate = "/srv/file"\n')
    environ = {"DEVBOXD_PORT": "2", "DEVBOXD_HOST": "b"}
    settings = load({"port": 3, "host": None}, environ, file)
    assert (settings.port, settings.host, settings.runtime) == (3, "b", "runc")
    assert settings.state == Path("/srv/file")


def test_the_environment_may_name_the_file(file: Path) -> None:
    file.write_text("port = 9")
    assert load({}, {"DEVBOXD_CONFIG": str(file)}).port == 9


def test_every_setting_can_come_from_the_environment() -> None:
    texts = {"tuple[str, ...]": "a, b", "bool": "true", "int": "7", "Path": "/x", "str": "crun"}
    environ = {"DEVBOXD_CONFIG": "/dev/null"}
    for field in msgspec.structs.fields(Settings):
        declared = field.type.__origin__ if hasattr(field.type, "__metadata__") else field.type  # of Annotated
        kind = getattr(declared, "__name__", "") if isinstance(declared, type) else ""
        environ[f"DEVBOXD_{field.name.upper()}"] = texts.get(kind, "/a,/b" if "Path" in str(field.type) else "a, b")
    settings = load({}, environ)
    assert settings.domains == ("a", "b")
    assert settings.ca_certificates == (Path("/a"), Path("/b"))
    assert settings.nested_user_namespaces is True
    assert settings.journal_cap_bytes == 7
    assert settings.state == Path("/x")


@pytest.mark.parametrize("text", ["true", "1", "false", "0"])
def test_switches_are_read_from_text(text: str) -> None:
    environ = {"DEVBOXD_CONFIG": "/dev/null", "DEVBOXD_NESTED_USER_NAMESPACES": text}
    assert load({}, environ).nested_user_namespaces is (text in ("true", "1"))


@pytest.mark.parametrize(
    ("content", "word"),
    [("port = ", "correct the file"), ('port = "x"', "port"), ("prot = 1", "prot"), ("host = 1", "host")],
)
def test_a_wrong_file_is_refused_with_the_key_named(file: Path, content: str, word: str) -> None:
    file.write_text(content)
    with pytest.raises(SetupError, match=f"cannot .*{word}"):
        load({}, {}, file)


def test_a_file_that_is_not_text_is_refused(file: Path) -> None:
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(SetupError, match="cannot read the settings"):
        load({}, {}, file)


def test_a_named_file_must_exist(file: Path) -> None:
    for options in ({"file": file}, {"environ": {"DEVBOXD_CONFIG": str(file)}}):
        with pytest.raises(SetupError, match="no such file"):
            load({}, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "text"), [("PORT", "x"), ("PORT", ""), ("NESTED_USER_NAMESPACES", "maybe")])
def test_a_wrong_value_in_the_environment_is_refused(name: str, text: str) -> None:
    with pytest.raises(SetupError, match="cannot use the settings"):
        load({}, {"DEVBOXD_CONFIG": "/dev/null", f"DEVBOXD_{name}": text})

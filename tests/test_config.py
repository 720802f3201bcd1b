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
        choice = "json" if "Literal" in str(field.type) else "a, b"
        environ[f"DEVBOXD_{field.name.upper()}"] = texts.get(kind, "/a,/b" if "Path" in str(field.type) else choice)
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


@pytest.mark.parametrize(
    ("name", "text", "wanted"),
    [
        ("PORT", "x", "a whole number from 1 to 65535"),
        ("PORT", "", "a whole number from 1 to 65535"),
        ("PORT", "0", "a whole number from 1 to 65535"),
        ("PORT", "65536", "a whole number from 1 to 65535"),
        ("WARM_BOXES", "-1", "a whole number from 0 to 1024"),
        ("POOL_SIZE", "0", "a whole number from 1 to 1024"),
        ("RETENTION_SECONDS", "-1", f"a whole number from 0 to {1 << 53}"),
        ("EXECUTIONS_PER_BOX", "0", f"a whole number from 1 to {1 << 53}"),
        ("JOURNAL_CAP_BYTES", "1.5", f"a whole number from 1 to {1 << 53}"),
        ("JOURNAL_CAP_BYTES", "99999999999999999999", f"a whole number from 1 to {1 << 53}"),
        ("NESTED_USER_NAMESPACES", "maybe", "true or false"),
        ("LOG_FORMAT", "yaml", "one of auto, text, json"),
        ("STATE", "", "a path"),
        ("HOST", "", "a text"),
    ],
)
def test_a_wrong_value_in_the_environment_is_refused(name: str, text: str, wanted: str) -> None:
    with pytest.raises(
        SetupError, match=f"^cannot use the value '{text}' of the environment variable DEVBOXD_{name}: "
    ) as refusal:
        load({}, {"DEVBOXD_CONFIG": "/dev/null", f"DEVBOXD_{name}": text})
    assert str(refusal.value).endswith(f"give {wanted}")


@pytest.mark.parametrize(
    ("content", "wanted"),
    [
        ("warm_boxes = -1", "a whole number from 0 to 1024"),
        ("port = [1]", "a whole number from 1 to 65535"),
        ('nested_user_namespaces = "maybe"', "true or false"),
        ('deny_cidrs = "10.0.0.0/8"', "a list of texts"),
        ("deny_cidrs = [1]", "a list of texts"),
        ('state = ""', "a path"),
        ("state = 1", "a path"),
        ('log_format = "yaml"', "one of auto, text, json"),
        ("host = 1", "a text"),
    ],
)
def test_a_wrong_value_in_the_file_is_refused(file: Path, content: str, wanted: str) -> None:
    file.write_text(content)
    with pytest.raises(SetupError, match=f"^cannot use the value.* of '{content.split()[0]}' in {file}: give {wanted}"):
        load({}, {}, file)


def test_a_name_that_is_no_setting_is_refused_with_those_that_are_like_it(file: Path) -> None:
    file.write_text("warm_box = 1")
    with pytest.raises(SetupError, match=f"^cannot use 'warm_box' in {file}: there is no such setting; warm_boxes is"):
        load({}, {}, file)
    for name, near in (("PROT", "DEVBOXD_PORT"), ("CONFG", "DEVBOXD_CONFIG"), ("KEYS", "DEVBOXD_KEY")):
        with pytest.raises(SetupError, match=f"variable DEVBOXD_{name}: there is no such setting; {near}") as refusal:
            load({}, {"DEVBOXD_CONFIG": "/dev/null", f"DEVBOXD_{name}": "ak_secret"})
        assert "ak_secret" not in str(refusal.value)
    with pytest.raises(SetupError, match="DEVBOXD_XYZZYX.*devboxd serve --help"):
        load({}, {"DEVBOXD_CONFIG": "/dev/null", "DEVBOXD_XYZZYX": "1"})


def test_variables_of_client_commands_and_of_others_are_let_be() -> None:
    environ = {"DEVBOXD_CONFIG": "/dev/null", "DEVBOXD_URL": "x", "DEVBOXD_KEY": "x", "_DEVBOXD_COMPLETE": "x"}
    assert load({}, environ) == Settings()


def test_an_empty_text_is_as_good_as_none(monkeypatch: pytest.MonkeyPatch, file: Path) -> None:
    monkeypatch.setattr("devboxd.config.DEFAULT_FILE", file)
    assert load({}, {"DEVBOXD_CONFIG": ""}) == Settings()
    assert load({}, {"DEVBOXD_CONFIG": "/dev/null", "DEVBOXD_APT_MIRROR": "", "DEVBOXD_DENY_CIDRS": ""}) == Settings()

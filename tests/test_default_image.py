"""The default image in a devbox: installing packages with every tool, by the user, through the network wall."""

from __future__ import annotations

import pytest

from support.api import Api

pytestmark = pytest.mark.box


def outcome(api: Api, box: str, command: str) -> str:
    view = api.run(box, f"({command}) >/tmp/log 2>&1 || {{ tail -n 20 /tmp/log; exit 1; }}", seconds=170)
    assert view["exit_status"] == 0, view["stdout"]
    return str(view["stdout"])


def test_apt_installs(api: Api, box: str) -> None:
    outcome(api, box, "sudo apt-get update && sudo apt-get install -y --no-install-recommends hello && hello")


def test_pip_installs_for_the_user_and_in_an_environment(api: Api, box: str) -> None:
    outcome(api, box, "pip install six && python3 -c 'import six'")
    outcome(api, box, "python3 -m venv /tmp/env && /tmp/env/bin/pip install six && /tmp/env/bin/python -c 'import six'")


def test_npm_installs_globally_without_sudo(api: Api, box: str) -> None:
    outcome(api, box, "npm install -g semver && semver 1.2.3")


def test_the_usual_tools_are_there(api: Api, box: str) -> None:
    tools = "bash curl git python3 pip node npm jq rg rsync less ps sudo ip"
    assert api.output(box, f"for t in {tools}; do command -v $t >/dev/null || echo $t; done") == ""
    assert api.output(box, "test -x /usr/lib/openssh/sftp-server && git --version | cut -d' ' -f1") == "git\n"

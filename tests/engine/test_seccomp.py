"""The table of system calls, and the program that is made of it."""

from __future__ import annotations

import errno
from collections import defaultdict

import pytest

from devboxd.engine import seccomp


@pytest.mark.parametrize("nested", [False, True])
def test_each_call_has_one_rule_or_rules_with_conditions(nested: bool) -> None:
    found: dict[str, list[seccomp.Rule]] = defaultdict(list)
    for rule in seccomp.rules(nested):
        for name in rule.names:
            found[name].append(rule)
    double = {name for name, rules in found.items() if len(rules) > 1 and not all(rule.arguments for rule in rules)}
    assert double == set()


def test_nothing_is_allowed_and_refused() -> None:
    lists = [seccomp.ALLOWED, seccomp.REFUSED, seccomp.NAMESPACES]
    assert sum(map(len, lists)) == len(set().union(*lists))


def test_program_is_for_the_kernel() -> None:
    plain, nested = (seccomp.compile_filter(seccomp.rules(flag)) for flag in (False, True))
    assert len(plain) % 8 == 0
    assert 100 < len(plain) // 8 < 4096
    assert plain != nested


def test_both_forms_come_from_one_table() -> None:
    table = seccomp.rules(nested_user_namespaces=False)
    form = seccomp.oci(table)
    assert form["defaultErrnoRet"] == errno.ENOSYS
    assert len(form["syscalls"]) == len(table)
    rows = [row for row in form["syscalls"] if row["names"] == ["socket"] and row["args"][0]["value"] == 9]
    assert rows == [
        {
            "names": ["socket"],
            "action": "SCMP_ACT_ERRNO",
            "errnoRet": errno.EAFNOSUPPORT,
            "args": [{"index": 0, "op": "SCMP_CMP_EQ", "value": 9, "valueTwo": 0}],
        }
    ]

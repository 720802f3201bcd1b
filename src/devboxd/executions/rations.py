"""How much of its output each new command may leave, so that all output of a devbox together stays within a bound."""

from __future__ import annotations

from dataclasses import dataclass, field

LEAST = 64 * 1024
"""Bytes of each stream that are kept of every command, whatever others have left."""
_SHARE = 8
_STREAMS = 2


@dataclass
class _Account:
    measured: int = 0
    promised: dict[str, int] = field(default_factory=dict)


class Rations:
    """Promises of room for journals, in bytes of one stream. A command may use all that it was promised at its start.

    Promises get smaller when half of `total` is taken or promised, and never go below LEAST. What was promised before
    a restart of the server is not known afterwards, so the bound may then be passed by as much as was open.
    """

    def __init__(self, cap: int, total: int) -> None:
        self._cap = cap
        self._total = total
        self._accounts: dict[str, _Account] = {}

    def promise(self, devbox_id: str, execution_id: str) -> int:
        """The most that each stream of a command may leave; always the same for the same command."""
        account = self._accounts.setdefault(devbox_id, _Account())
        if execution_id not in account.promised:
            left = self._total - account.measured - _STREAMS * sum(account.promised.values())
            account.promised[execution_id] = max(min(LEAST, self._cap), min(self._cap, left // _SHARE))
        return account.promised[execution_id]

    def keep(self, devbox_id: str, execution_id: str, written: int) -> None:
        """A command has ended: what it wrote takes the place of what it was promised."""
        account = self._accounts.get(devbox_id)
        if account is not None and account.promised.pop(execution_id, None) is not None:
            account.measured += written

    def taken(self, devbox_id: str) -> int:
        """How many bytes the journals of a devbox take as far as is known."""
        account = self._accounts.get(devbox_id)
        return account.measured if account else 0

    def measured(self, devbox_id: str, before: int, found: int) -> None:
        """`found` bytes were seen where `before` were known; what ended meanwhile is rather counted twice."""
        account = self._accounts.setdefault(devbox_id, _Account())
        account.measured = max(found, account.measured + found - before)

    def forget(self, devbox_id: str) -> None:
        """A devbox has ended."""
        self._accounts.pop(devbox_id, None)

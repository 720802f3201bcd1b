"""What executions and files ask of devboxes, which stand above them."""

from __future__ import annotations

from typing import Protocol


class DevboxDirectory(Protocol):
    """Finds devboxes for requests that use one."""

    async def get(self, account: str, devbox_id: str) -> object:
        """The devbox of this id. Raises 400 for a malformed id, 404 for an unknown or foreign one."""
        ...

    async def usable(self, account: str, devbox_id: str) -> object:
        """The devbox, when commands and files can be used in it; 400 that says what to do otherwise."""
        ...

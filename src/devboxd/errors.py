"""Errors that reach a person: each has a code of HTTP and a message that says what, why and what to do."""

from __future__ import annotations


class ApiError(Exception):
    """An answer other than success.

    `code` is the status of HTTP; `message` begins with "cannot", names the thing and says what to do.
    `retry` is sent as `x-should-retry`, which the published clients obey; None leaves the choice to them.
    `retry_after` (seconds) is sent as `retry-after`, where it is known when to come again.
    """

    def __init__(self, code: int, message: str, *, retry: bool | None = None, retry_after: int | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.retry = retry
        self.retry_after = retry_after


def bad_request(message: str) -> ApiError:
    """400: the request itself is wrong; nothing was changed."""
    return ApiError(400, message)


def not_found(message: str) -> ApiError:
    """404: no such thing, or it belongs to somebody else."""
    return ApiError(404, message)


def conflict(message: str) -> ApiError:
    """409 that will not change by asking again: clients are told not to retry."""
    return ApiError(409, message, retry=False)


def timed_out(message: str) -> ApiError:
    """408 that ends a held answer; clients ask again."""
    return ApiError(408, message, retry=True)


def refuse_when(what: str, short: str | None) -> None:
    """Raise 503 when the machine is short of room for what is asked, in these words."""
    if short is not None:
        raise ApiError(503, f"cannot {what}: {short}; delete snapshots or devboxes, or add room", retry=True)


def comes_later(error: BaseException | None) -> bool:
    """Whether an error says no more than that it is too early: 503."""
    return isinstance(error, ApiError) and error.code == 503


class SetupError(Exception):
    """The machine or the settings do not allow what was asked; the text names cause and cure. Exit code 2."""

"""Ids: a prefix of the resource and 21 base-62 digits that sort by the time of their making."""

from __future__ import annotations

import re
import secrets
import threading
import time

from devboxd.errors import bad_request

_ALPHABET = "0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_DIGITS = 21
_RANDOM_BITS = 76
_FORM = re.compile(rf"[0-9A-Za-z]{{{_DIGITS}}}")

_lock = threading.Lock()
_last = 0


def new_id(prefix: str) -> str:
    """A new id such as `dbx_0Ab...`, greater than all that this process made before, also within a millisecond.

    48 bits of milliseconds and 76 random bits fit into 21 base-62 digits (125 bits).
    """
    global _last
    number = (time.time_ns() // 1_000_000) << _RANDOM_BITS | secrets.randbits(_RANDOM_BITS)
    with _lock:
        _last = number = number if number > _last else _last + 1 + secrets.randbits(32)
    digits = ""
    for _ in range(_DIGITS):
        number, rest = divmod(number, 62)
        digits = _ALPHABET[rest] + digits
    return f"{prefix}_{digits}"


def check_id(prefix: str, text: str, what: str) -> str:
    """Return `text` when it has the form of an id of this prefix, else raise 400 that shows the form expected."""
    if text.startswith(prefix + "_") and _FORM.fullmatch(text[len(prefix) + 1 :]):
        return text
    shown = text if len(text) <= 64 else text[:64] + "..."
    raise bad_request(
        f"cannot use {shown!r} as the id of a {what}: such ids are {prefix}_ and {_DIGITS} letters or digits"
    )

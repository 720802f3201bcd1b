"""Work inside another network namespace: in a thread of its own, so that the rest of the server stays where it is."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

_T = TypeVar("_T")
_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


def inside(netns: Path, work: Callable[[], _T]) -> _T:
    """Do `work` in the namespace that is bound to the file `netns` and return its result; blocks until it is done.

    Sockets made by `work`, its children and its view of /proc/sys/net are those of that namespace. The thread ends
    with the call, because one that could not return to its own namespace must never serve anything else.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(_entered, netns, work).result()


def _entered(netns: Path, work: Callable[[], _T]) -> _T:
    descriptor = os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _enter(descriptor)
    finally:
        os.close(descriptor)
    return work()


@contextlib.contextmanager
def visited(netns: int) -> Iterator[None]:
    """Have the calling thread in another network namespace for the length of the block.

    Raises OSError, also when it cannot return: then the thread must end.
    """
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _enter(netns)
        try:
            yield
        finally:
            _enter(home)
    finally:
        os.close(home)


def _enter(netns: int) -> None:
    if _libc.setns(netns, _CLONE_NEWNET) != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"enter a network namespace: {os.strerror(number)}")

"""A lock that a forked child may take: one that another thread held at the fork would never be freed in it."""

from __future__ import annotations

import os
import threading
import weakref


class Lock:
    """A `threading.Lock` for `with`, which is a new one in a forked child."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        _locks.add(self)

    def __enter__(self) -> None:
        self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        self._lock.release()


def _renew() -> None:
    for lock in _locks:
        lock._lock = threading.Lock()


_locks: weakref.WeakSet[Lock] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)

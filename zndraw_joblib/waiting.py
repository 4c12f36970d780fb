"""Requests that wait, and what wakes them inside this process.

Nothing here is shared between processes, and nothing is lost if a wake-up is: whoever
waits looks again by itself every ``recheck_seconds``.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import anyio

_waiters: dict[str, dict["Waiter", None]] = {}


class Waiter:
    """One waiting request."""

    def __init__(self) -> None:
        self._woken = anyio.Event()

    async def wait(self, seconds: float) -> None:
        """Return when woken, or after ``seconds``."""
        with anyio.move_on_after(seconds):
            await self._woken.wait()
        self._woken = anyio.Event()

    def wake(self) -> bool:
        """Wake the request; tell whether it was asleep."""
        asleep = not self._woken.is_set()
        self._woken.set()
        return asleep


@contextmanager
def waiting_for(keys: Iterable[str]) -> Iterator[Waiter]:
    """Listen for wake-ups of ``keys``; enter it before the first look."""
    keys = list(keys)
    waiter = Waiter()
    for key in keys:
        _waiters.setdefault(key, {})[waiter] = None
    try:
        yield waiter
    finally:
        for key in keys:
            waiters = _waiters[key]
            del waiters[waiter]
            if not waiters:
                del _waiters[key]


def wake_all(key: str) -> None:
    """Wake every request that waits for ``key``."""
    for waiter in _waiters.get(key, ()):
        waiter.wake()


def wake_one(key: str) -> None:
    """Wake the request that has waited longest for ``key``, and no other."""
    for waiter in _waiters.get(key, ()):
        if waiter.wake():
            return

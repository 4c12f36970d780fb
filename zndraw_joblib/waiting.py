"""Requests that wait, and what wakes them inside this process.

Nothing is lost if a wake-up is: one task of the process looks for all who wait, every
``recheck_seconds``.
"""

from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import anyio

#: What an ASGI server tells of a request.
Receive = Callable[[], Awaitable[Any]]

_waiters: dict[str, dict["Waiter", None]] = {}


class Waiter:
    """One waiting request."""

    def __init__(self) -> None:
        self._woken = anyio.Event()
        self._gone = False
        self._keys: set[str] = set()
        # what it was woken for alone, and has not looked for yet
        self._turns: list[str] = []

    def listen(self, keys: Iterable[str]) -> None:
        """Hear of ``keys`` too."""
        for key in keys:
            _waiters.setdefault(key, {})[self] = None
            self._keys.add(key)

    async def wait(self, seconds: float, receive: Receive | None = None) -> bool:
        """Return when woken, or after ``seconds``.

        Parameters
        ----------
        seconds : float
            Longest wait.
        receive : callable, optional
            The request's: who hung up is not waited for.

        Returns
        -------
        bool
            False when there is nobody to wait for: the client hung up, or the server
            stops.
        """
        try:
            async with anyio.create_task_group() as group:
                if receive is not None:
                    group.start_soon(self._listen_for_the_end, receive)
                with anyio.move_on_after(seconds):
                    await self._woken.wait()
                group.cancel_scope.cancel()
        except anyio.get_cancelled_exc_class():
            if receive is None:
                raise
            # A server that stops cancels what still runs: let it answer what it knows.
            # An enclosing cancel scope cancels again at the next await.
            self._gone = True
        self._woken = anyio.Event()
        return not self._gone

    async def _listen_for_the_end(self, receive: Receive) -> None:
        ended = False
        try:
            while (message := await receive())["type"] == "http.request":
                if ended and not message.get("more_body"):
                    # a body that never ends: some middleware only plays it back
                    return
                ended = not message.get("more_body")
        except Exception:
            # a receive that can't be asked now: the wait ends with its time
            return
        self._gone = True
        self._woken.set()

    def wake(self, turn: str | None = None) -> bool:
        """Wake the request; tell whether it was asleep.

        Parameters
        ----------
        turn : str, optional
            The key, when no other request was woken for it.
        """
        if self._woken.is_set():
            return False
        self._woken.set()
        if turn is not None:
            self._turns.append(turn)
        return True

    @property
    def turns(self) -> tuple[str, ...]:
        """What it was woken for alone, and has not looked for yet."""
        return tuple(self._turns)

    def looked(self, turns: Collection[str], found: Collection[str]) -> None:
        """Forget turns that a look was for, unless it found something else instead."""
        for turn in turns:
            if turn in found or not found:
                self._turns.remove(turn)

    def leave(self) -> None:
        """Hear of nothing more, and pass on what it was woken for in vain."""
        for key in self._keys:
            waiters = _waiters[key]
            del waiters[self]
            if not waiters:
                del _waiters[key]
        for turn in self._turns:
            wake_some(turn)


@contextmanager
def waiting_for(keys: Iterable[str]) -> Iterator[Waiter]:
    """Listen for wake-ups of ``keys``; enter it before the first look."""
    waiter = Waiter()
    waiter.listen(keys)
    try:
        yield waiter
    finally:
        waiter.leave()


def wake_all(key: str) -> None:
    """Wake every request that waits for ``key``."""
    for waiter in _waiters.get(key, ()):
        waiter.wake()


def wake_some(key: str, count: int = 1) -> None:
    """Wake the ``count`` requests that have waited longest for ``key``, and no others."""
    for waiter in _waiters.get(key, ()) if count else ():
        count -= waiter.wake(turn=key)
        if not count:
            return

"""Waiting requests, and what wakes them here; :mod:`zndraw_joblib.wakeups` does elsewhere.

Nothing is lost if a notification is: what is waited for is also polled in the database, every
``recheck_seconds`` (:mod:`zndraw_joblib.long_polls`).
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple
from uuid import UUID

import anyio

#: What an ASGI server tells of a request.
Receive = Callable[[], Awaitable[Any]]


class Waiter:
    """One waiting request."""

    def __init__(self, waiters: "Waiters") -> None:
        self._waiters = waiters
        self._loop = asyncio.get_running_loop()
        self._woken = asyncio.Event()
        self._asleep = True
        self._gone = False
        self._keys: set[str] = set()
        # keys that it alone was woken for, and has not read for since
        self._turns: list[str] = []

    def listen(self, keys: Iterable[str]) -> None:
        """Hear of ``keys`` too."""
        for key in keys:
            self._waiters.by_key.setdefault(key, {})[self] = None
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
        self._woken.clear()
        self._asleep = True
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
        """Wake the request, from any thread; tell whether it was asleep.

        Parameters
        ----------
        turn : str, optional
            The key, when no other request was woken for it.
        """
        if not self._asleep:
            return False
        try:
            if asyncio._get_running_loop() is self._loop:
                self._woken.set()
            else:
                self._loop.call_soon_threadsafe(self._woken.set)
        except RuntimeError:
            # its event loop was closed
            return False
        self._asleep = False
        if turn is not None:
            self._turns.append(turn)
        return True

    @property
    def turns(self) -> tuple[str, ...]:
        """Keys that it alone was woken for, and has not read for since."""
        return tuple(self._turns)

    def used(self, turns: Collection[str], found: Collection[str]) -> None:
        """Forget turns that were used, unless something else was found instead."""
        for turn in turns:
            if turn in found or not found:
                self._turns.remove(turn)

    def leave(self) -> None:
        """Hear of nothing more, and pass on what it was woken for in vain."""
        for key in self._keys:
            waiting = self._waiters.by_key[key]
            del waiting[self]
            if not waiting:
                del self._waiters.by_key[key]
        for turn in self._turns:
            self._waiters.wake_some(turn)


class Waiters:
    """The requests of one app that wait, by the keys that they wait for."""

    def __init__(self) -> None:
        # in the order of their arrival
        self.by_key: dict[str, dict[Waiter, None]] = {}

    def __len__(self) -> int:
        return len({waiter for by in self.by_key.values() for waiter in by})

    @contextmanager
    def waiting_for(self, keys: Iterable[str]) -> Iterator[Waiter]:
        """Listen for notifications of ``keys``; enter it before the first read."""
        waiter = Waiter(self)
        waiter.listen(keys)
        try:
            yield waiter
        finally:
            waiter.leave()

    def wake_all(self, key: str) -> None:
        """Wake every request that waits for ``key``."""
        for waiter in tuple(self.by_key.get(key, ())):
            waiter.wake()

    def wake_some(self, key: str, count: int = 1) -> None:
        """Wake the ``count`` requests that have waited longest for ``key``, no others."""
        for waiter in tuple(self.by_key.get(key, ())) if count else ():
            count -= waiter.wake(turn=key)
            if not count:
                return

    def notify(self, ended: Iterable[str], queued: Iterable[str]) -> None:
        """Wake all who wait for what ended, and one for each task that is queued."""
        for key in ended:
            self.wake_all(key)
        for key, count in Counter(queued).items():
            self.wake_some(key, count)


class Subscription(NamedTuple):
    """What one request waits for.

    Attributes
    ----------
    task_id : UUID, optional
        A task that may end.
    worker_id : UUID, optional
        A worker that may get work.
    jobs : mapping of UUID to str
        The jobs that work is wanted of, and their full names.
    serves : int
        How many jobs this worker serves.
    log_after : int, optional
        A number of a line: more of the task's log may come.
    """

    task_id: UUID | None = None
    worker_id: UUID | None = None
    jobs: Mapping[UUID, str] = {}
    serves: int = 0
    log_after: int | None = None


#: In an ASGI scope: the admission of its request.
ADMISSION = "zndraw_joblib.admission"
# Requests that may wait of which so many are at work at once: of a crowd that arrives, or
# is woken, in one moment. Each makes some statements before it waits, and a heartbeat that
# comes meanwhile stands behind these few.
AT_WORK = 8


class Admission:
    """Whether a request that may wait is at work, or waits."""

    def __init__(self, limiter: anyio.CapacityLimiter) -> None:
        self._limiter = limiter
        self._admitted = False

    async def enter(self) -> bool:
        """Return True when few enough are at work, False when the server stops before."""
        try:
            await self._limiter.acquire_on_behalf_of(self)
        except anyio.get_cancelled_exc_class():
            # an enclosing cancel scope cancels again at the next await
            return False
        self._admitted = True
        return True

    def leave(self) -> None:
        """Let the next one in."""
        if self._admitted:
            self._admitted = False
            self._limiter.release_on_behalf_of(self)


@dataclass
class Subscriptions:
    """What the requests of one event loop wait for, and the task that polls for all."""

    at_work: anyio.CapacityLimiter = field(default_factory=partial(anyio.CapacityLimiter, AT_WORK))

    by_request: dict[Waiter, Subscription] = field(default_factory=dict)
    by_user: Counter[UUID] = field(default_factory=Counter)
    poller: asyncio.Task[None] | None = None
    # notifications may have been missed: it is time to poll
    missed: bool = False
    # set: something changed of what is here
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def miss(self) -> None:
        """Have the poller look at once."""
        self.missed = True
        self.changed.set()

"""Waiting requests, and what wakes them: here, and in other processes.

Nothing is lost if a notification is: what is waited for is also polled in the database, every
``recheck_seconds`` (:mod:`zndraw_joblib.long_polls`).
"""

import asyncio
import json
import logging
import os
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol
from uuid import UUID, uuid4

import anyio
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

if TYPE_CHECKING:
    from redis.asyncio import Redis

log = logging.getLogger(__name__)

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

        ``turn`` is the key, when no other request was woken for it.
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
    """What one request waits for."""

    #: a task that may end
    task_id: UUID | None = None
    #: a worker that may get work
    worker_id: UUID | None = None
    #: the jobs that work is wanted of, and their full names
    jobs: Mapping[UUID, str] = {}
    #: how many jobs this worker serves
    serves: int = 0
    #: the number of a line: more of the task's log may come
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


# --- over Redis, or PostgreSQL alone ---

_CHANNEL = "zndraw-joblib:wake-ups"
# Longest time that Redis or PostgreSQL may take for one step.
_PATIENCE_SECONDS = 2.0
# Pause after which a silent connection has to show that it lives.
_PING_SECONDS = 2.0
# Notifications beyond are dropped: the other processes poll anyway.
_MAX_UNSENT = 100_000
# In bytes: PostgreSQL takes less than 8000.
_LONGEST_MESSAGE = 7_500
_NOTIFY = text("SELECT pg_notify(:channel, :message)")


class Wakeups(Protocol):
    """What carries notifications between processes; nothing depends on its reliability."""

    def publish(self, ended: Sequence[str], queued: Sequence[str]) -> None:
        """Take notifications for the other processes, and return at once.

        Parameters
        ----------
        ended : sequence of str
            Keys; whoever waits for one is woken.
        queued : sequence of str
            Keys; as often as one is there, one request is woken.
        """

    async def listen(self, waiters: Waiters, missed: Callable[[], None]) -> None:
        """Hand what other processes tell to ``waiters``, until cancelled or cut off.

        Parameters
        ----------
        waiters : Waiters
            Who waits in this process.
        missed : callable
            To be called when notifications may have been missed: once it listens.
        """


def wakeups_of(app: Any) -> Wakeups | None:
    """Return the ``state.wakeups`` of a host.

    Without them this process learns what others did by its polls, every ``recheck_seconds``.
    """
    wakeups: Wakeups | None = getattr(app.state, "wakeups", None)
    return wakeups


class _Sender:
    """Notifications on their way out: all that come in meanwhile leave together."""

    def __init__(self, send: Callable[[str], Awaitable[Any]]) -> None:
        self._send = send
        self._drawn = uuid4().hex
        self._unsent: list[tuple[str, bool]] = []
        self._task: asyncio.Task[None] | None = None

    @property
    def _me(self) -> str:
        # a server that loads the app and forks then has many processes with what was drawn
        return f"{self._drawn}-{os.getpid()}"

    def publish(self, ended: Sequence[str], queued: Sequence[str]) -> None:
        if len(self._unsent) < _MAX_UNSENT:
            self._unsent += [(key, False) for key in ended] + [(key, True) for key in queued]
        loop, task = asyncio.get_running_loop(), self._task
        if task is None or task.done() or task.get_loop() is not loop:
            self._task = loop.create_task(self._send_all())

    async def _send_all(self) -> None:
        while self._unsent:
            keys, self._unsent = self._unsent, []
            for message in self._messages(keys):
                try:
                    with anyio.fail_after(_PATIENCE_SECONDS):
                        await self._send(message)
                except Exception as exc:
                    log.warning("wake-ups were not sent: %r", exc)

    def _messages(self, keys: list[tuple[str, bool]]) -> Iterator[str]:
        batch: tuple[list[str], list[str]] = ([], [])
        size = 0
        for key, queued in keys:
            length = len(json.dumps(key, ensure_ascii=False).encode()) + 2
            if size and size + length > _LONGEST_MESSAGE:
                yield json.dumps([self._me, *batch], ensure_ascii=False)
                batch, size = ([], []), 0
            batch[queued].append(key)
            size += length
        yield json.dumps([self._me, *batch], ensure_ascii=False)

    def receive(self, message: str | bytes, waiters: Waiters) -> None:
        """Wake who waits here for what another process sent."""
        sender, ended, queued = json.loads(message)
        # this process woke its own before it sent it to the others
        if sender != self._me:
            waiters.notify(ended, queued)


class RedisWakeups:
    """Notifications over Redis: one connection a process, while somebody waits.

    Parameters
    ----------
    redis : redis.asyncio.Redis
        The host's.
    """

    def __init__(self, redis: "Redis") -> None:
        self._redis = redis
        self._sender = _Sender(lambda message: redis.publish(_CHANNEL, message))

    def publish(self, ended: Sequence[str], queued: Sequence[str]) -> None:
        """Send notifications as soon as Redis takes them, all that came in together."""
        self._sender.publish(ended, queued)

    async def listen(self, waiters: Waiters, missed: Callable[[], None]) -> None:
        """Hand what other processes tell to ``waiters``, until cancelled or cut off.

        Raises
        ------
        Exception
            What redis-py raises, or TimeoutError, when Redis is not there.
        """
        async with self._redis.pubsub() as pubsub:
            with anyio.fail_after(_PATIENCE_SECONDS):
                await pubsub.subscribe(_CHANNEL)
            unanswered = False
            while True:
                message = await pubsub.get_message(timeout=_PING_SECONDS)
                if message is None:
                    if unanswered:
                        raise TimeoutError("Redis is silent")
                    unanswered = True
                    with anyio.fail_after(_PATIENCE_SECONDS):
                        await pubsub.ping()
                    continue
                unanswered = False
                if message["type"] == "subscribe":
                    # what came before, the first time or after a gap, was missed
                    missed()
                elif message["type"] == "message":
                    self._sender.receive(message["data"], waiters)


class PgWakeups:
    """Notifications over PostgreSQL's LISTEN and NOTIFY, for hosts without Redis.

    To send takes a connection of the pool for a moment; to listen, while somebody waits,
    one beside it. A NOTIFY is no part of a transaction that changes something: at its
    commit it takes a lock that all others wait for.

    Parameters
    ----------
    engine : AsyncEngine
        The host's, on asyncpg. It leads to the server itself: a pooler in transaction mode
        listens to nothing.
    """

    def __init__(self, engine: AsyncEngine) -> None:
        self._engine = engine
        self._at_once = engine.execution_options(isolation_level="AUTOCOMMIT")
        self._sender = _Sender(self._send)

    def publish(self, ended: Sequence[str], queued: Sequence[str]) -> None:
        """Send notifications as soon as PostgreSQL takes them, all that came in together."""
        self._sender.publish(ended, queued)

    async def _send(self, message: str) -> None:
        async with self._at_once.connect() as connection:
            await connection.execute(_NOTIFY, {"channel": _CHANNEL, "message": message})

    async def listen(self, waiters: Waiters, missed: Callable[[], None]) -> None:
        """Hand what other processes tell to ``waiters``, until cancelled or cut off.

        Raises
        ------
        Exception
            What SQLAlchemy or asyncpg raises, or TimeoutError, when PostgreSQL is not there.
        """
        with anyio.fail_after(_PATIENCE_SECONDS):
            pooled = await self._engine.raw_connection()
        connection: Any = pooled.driver_connection
        # the pool counts it no more
        pooled.detach()
        try:
            await connection.add_listener(
                _CHANNEL, lambda *received: self._sender.receive(received[-1], waiters)
            )
            ended = asyncio.Event()
            connection.add_termination_listener(lambda _: ended.set())
            # what came before was missed
            missed()
            while not ended.is_set():
                with anyio.move_on_after(_PING_SECONDS):
                    await ended.wait()
                await connection.execute("SELECT 1", timeout=_PATIENCE_SECONDS)
        finally:
            with anyio.CancelScope(shield=True):
                await connection.close(timeout=_PATIENCE_SECONDS)

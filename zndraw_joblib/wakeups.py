"""Notifications that wake what waits in other processes: over Redis, or PostgreSQL alone."""

import asyncio
import json
import logging
import os
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol
from uuid import uuid4

import anyio
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine

from zndraw_joblib.waiting import Waiters

if TYPE_CHECKING:
    from redis.asyncio import Redis

log = logging.getLogger(__name__)

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

    def tell(self, ended: Sequence[str], queued: Sequence[str]) -> None:
        """Take notifications for the other processes, and return at once.

        Parameters
        ----------
        ended : sequence of str
            Keys; whoever waits for one is woken.
        queued : sequence of str
            Keys; as often as one is there, one request is woken.
        """
        ...

    async def listen(self, waiters: Waiters, missed: Callable[[], None]) -> None:
        """Hand what other processes tell to ``waiters``, until cancelled or cut off.

        Parameters
        ----------
        waiters : Waiters
            Who waits in this process.
        missed : callable
            To be called when notifications may have been missed: once it listens.
        """
        ...


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

    def take(self, ended: Sequence[str], queued: Sequence[str]) -> None:
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
        told: tuple[list[str], list[str]] = ([], [])
        size = 0
        for key, queued in keys:
            length = len(json.dumps(key, ensure_ascii=False).encode()) + 2
            if size and size + length > _LONGEST_MESSAGE:
                yield json.dumps([self._me, *told], ensure_ascii=False)
                told, size = ([], []), 0
            told[queued].append(key)
            size += length
        yield json.dumps([self._me, *told], ensure_ascii=False)

    def hand_on(self, message: str | bytes, waiters: Waiters) -> None:
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

    def tell(self, ended: Sequence[str], queued: Sequence[str]) -> None:
        """Send notifications as soon as Redis takes them, all that came in together."""
        self._sender.take(ended, queued)

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
                    self._sender.hand_on(message["data"], waiters)


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

    def tell(self, ended: Sequence[str], queued: Sequence[str]) -> None:
        """Send notifications as soon as PostgreSQL takes them, all that came in together."""
        self._sender.take(ended, queued)

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
                _CHANNEL, lambda *told: self._sender.hand_on(told[-1], waiters)
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

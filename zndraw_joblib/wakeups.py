"""What carries wake-ups to the other processes of a host: Redis, or nothing."""

import asyncio
import json
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol
from uuid import uuid4

import anyio

from zndraw_joblib.waiting import wake_all, wake_some

if TYPE_CHECKING:
    from redis.asyncio import Redis

log = logging.getLogger(__name__)

_CHANNEL = "zndraw-joblib:wake-ups"
# Longest time that Redis may take for one step.
_PATIENCE_SECONDS = 2.0
# Pause after which a silent connection has to show that it lives.
_PING_SECONDS = 2.0
# What more is not told: a process that is not told looks for itself.
_MAX_UNTOLD = 100_000


class Wakeups(Protocol):
    """What a host can put in the place of Redis; nothing depends on its reliability."""

    def tell(self, ended: Sequence[str], queued: Sequence[str]) -> None:
        """Take wake-ups for the other processes, and return at once.

        Parameters
        ----------
        ended : sequence of str
            Keys; whoever waits for one is woken (:func:`wake_all`).
        queued : sequence of str
            Keys; as often as one is there, one request is woken.
        """
        ...

    async def listen(self, missed: Callable[[], None]) -> None:
        """Wake who waits in this process, until cancelled or cut off.

        Parameters
        ----------
        missed : callable
            To be called when wake-ups may have been missed: once it listens.
        """
        ...


def wakeups_of(app: Any) -> Wakeups | None:
    """Return the ``state.wakeups`` of a host.

    Without them requests that wait look every ``recheck_seconds`` for what other processes
    did.
    """
    wakeups: Wakeups | None = getattr(app.state, "wakeups", None)
    return wakeups


class RedisWakeups:
    """Wake-ups over Redis: one connection a process, while somebody waits.

    Parameters
    ----------
    redis : redis.asyncio.Redis
        The host's.
    """

    def __init__(self, redis: "Redis") -> None:
        self._redis = redis
        self._me = uuid4().hex
        self._ended: list[str] = []
        self._queued: list[str] = []
        self._teller: asyncio.Task[None] | None = None

    def tell(self, ended: Sequence[str], queued: Sequence[str]) -> None:
        """Send wake-ups as soon as Redis takes them, all that have come in as one."""
        if len(self._ended) + len(self._queued) < _MAX_UNTOLD:
            self._ended += ended
            self._queued += queued
        if self._teller is None or self._teller.done():
            self._teller = asyncio.create_task(self._tell())

    async def _tell(self) -> None:
        while self._ended or self._queued:
            told = json.dumps([self._me, self._ended, self._queued])
            self._ended, self._queued = [], []
            try:
                with anyio.fail_after(_PATIENCE_SECONDS):
                    await self._redis.publish(_CHANNEL, told)
            except Exception as exc:
                log.warning("wake-ups were not told: %r", exc)

    async def listen(self, missed: Callable[[], None]) -> None:
        """Wake who waits in this process, until cancelled or cut off.

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
                    # what came before, the first time or after a gap, was not heard
                    missed()
                elif message["type"] == "message":
                    self._hear(message["data"])

    def _hear(self, told: bytes | str) -> None:
        sender, ended, queued = json.loads(told)
        if sender == self._me:
            # woken before it was told
            return
        for key in ended:
            wake_all(key)
        for key, count in Counter(queued).items():
            wake_some(key, count)

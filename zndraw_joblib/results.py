"""Where providers' results wait for their readers: in this process, or in Redis.

Beside it, the requests to providers that have no answers yet.
"""

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Protocol
from uuid import UUID, uuid4

import anyio

from zndraw_joblib.exceptions import ProblemException, ServiceUnavailable
from zndraw_joblib.settings import settings_of
from zndraw_joblib.waiting import Waiters

if TYPE_CHECKING:
    from redis.asyncio import Redis

log = logging.getLogger(__name__)

DEFAULT_MAX_BYTES = 256 * 1024 * 1024
#: Headers of an answer to who may have more luck in a moment.
RETRY_LATER = {"Retry-After": "2"}

# What an entry in memory takes beside its bytes.
_ENTRY_BYTES = 300

_CHANNEL = "zndraw-joblib:results"
# How long a connection that nobody waits on is kept for the next one.
_LINGER_SECONDS = 2.0
# A key that is none: wakes whoever waits for any.
_ANY = ""


class ResultBackend(Protocol):
    """What a host can put in the place of the two below; all times in seconds."""

    async def store(self, key: str, data: bytes, ttl: float) -> None:
        """Keep ``data`` under ``key`` for ``ttl``."""

    async def get(self, key: str) -> bytes | None:
        """Return what is kept under ``key``."""

    async def delete(self, key: str) -> None:
        """Forget ``key``."""

    async def acquire_inflight(self, key: str, ttl: float) -> bool:
        """Mark ``key`` for ``ttl``; tell whether nobody had."""
        ...

    async def release_inflight(self, key: str) -> None:
        """Take the mark of ``key`` away."""

    async def wait_for_key(self, key: str, timeout: float) -> bytes | None:
        """Return what is kept under ``key`` as soon as there is something."""

    async def notify_key(self, key: str) -> None:
        """Wake who waits for ``key``."""


class MemoryResults:
    """Results in the memory of one process: the default of a host with one replica.

    Parameters
    ----------
    max_bytes : int
        What all entries together may take; the oldest go first.
    """

    def __init__(self, max_bytes: int = DEFAULT_MAX_BYTES) -> None:
        self._max_bytes = max_bytes
        self._bytes = 0
        # in order of their arrival, with the moment of their end
        self._kept: dict[str, tuple[bytes, float]] = {}
        self._inflight: dict[str, float] = {}
        self._next_purge = 0.0
        self._waiters = Waiters()

    async def store(self, key: str, data: bytes, ttl: float) -> None:
        """Keep ``data`` under ``key`` for ``ttl`` seconds, if it fits at all."""
        self._forget(key)
        self._purge()
        size = len(data) + _ENTRY_BYTES
        if size > self._max_bytes:
            log.warning("%s is too large to be kept: %d bytes", key, len(data))
            return
        while self._bytes + size > self._max_bytes:
            self._forget(next(iter(self._kept)))
        self._kept[key] = (data, time.monotonic() + ttl)
        self._bytes += size

    async def get(self, key: str) -> bytes | None:
        """Return what is kept under ``key``."""
        data, end = self._kept.get(key, (None, 0.0))
        return data if end > time.monotonic() else None

    async def delete(self, key: str) -> None:
        """Forget ``key``."""
        self._forget(key)

    async def acquire_inflight(self, key: str, ttl: float) -> bool:
        """Mark ``key`` for ``ttl`` seconds; tell whether nobody had."""
        self._purge()
        if self._inflight.get(key, 0.0) > time.monotonic():
            return False
        self._inflight[key] = time.monotonic() + ttl
        return True

    async def release_inflight(self, key: str) -> None:
        """Take the mark of ``key`` away."""
        self._inflight.pop(key, None)

    async def wait_for_key(self, key: str, timeout: float) -> bytes | None:
        """Return what is kept under ``key`` as soon as there is something."""
        deadline = anyio.current_time() + timeout
        with self._waiters.waiting_for([key]) as waiter:
            while (data := await self.get(key)) is None:
                left = deadline - anyio.current_time()
                if left <= 0:
                    return None
                await waiter.wait(left)
        return data

    async def notify_key(self, key: str) -> None:
        """Wake who waits for ``key``."""
        self._waiters.wake_all(key)

    def _forget(self, key: str) -> None:
        if key in self._kept:
            data, _ = self._kept.pop(key)
            self._bytes -= len(data) + _ENTRY_BYTES

    def _purge(self) -> None:
        now = time.monotonic()
        if now < self._next_purge:
            return
        # a walk over all entries, hence not with every request
        self._next_purge = now + 1
        for key in [key for key, (_, end) in self._kept.items() if end <= now]:
            self._forget(key)
        for key in [key for key, end in self._inflight.items() if end <= now]:
            del self._inflight[key]


class RedisResults:
    """Results and wake-ups that all replicas share.

    However many requests of this process wait for a key, they read it once and listen
    on one connection; it opens when there is something to wait for.

    Parameters
    ----------
    redis : redis.asyncio.Redis
        The host's, with ``decode_responses`` off (its default).
    """

    def __init__(self, redis: "Redis") -> None:
        self._redis = redis
        self._reads: dict[str, asyncio.Task[bytes | None]] = {}
        self._acquiring: dict[str, tuple[str, asyncio.Future[bool]]] = {}
        self._waiters = Waiters()
        self._listener: asyncio.Task[None] | None = None

    async def store(self, key: str, data: bytes, ttl: float) -> None:
        """Keep ``data`` under ``key`` for ``ttl`` seconds."""
        ttl_ms = _milliseconds(ttl)
        await self._again(lambda: self._redis.set(key, data, px=ttl_ms))

    async def get(self, key: str) -> bytes | None:
        """Return what is kept under ``key``."""
        if key in self._reads:
            # begun before this call, it may miss what was stored before this call
            await asyncio.wait([self._reads[key]])
        if key not in self._reads:
            read = asyncio.create_task(self._read(key))
            self._reads[key] = read
            read.add_done_callback(lambda _: self._reads.pop(key))
        return await asyncio.shield(self._reads[key])

    async def _read(self, key: str) -> bytes | None:
        data = await self._again(lambda: self._redis.get(key))
        return data.encode() if isinstance(data, str) else data

    async def delete(self, key: str) -> None:
        """Forget ``key``."""
        await self._again(lambda: self._redis.delete(key))

    async def acquire_inflight(self, key: str, ttl: float) -> bool:
        """Mark ``key`` for ``ttl`` seconds; tell whether nobody had."""
        mine = uuid4().hex
        # the pool has not as many connections as there may be readers
        while key in self._acquiring:
            other, acquiring = self._acquiring[key]
            await asyncio.wait([acquiring])
            if not acquiring.cancelled():
                # whether that one got it or not, this one does not
                return False
            # it may have got it, and told nobody
            mine = other
        acquiring = asyncio.ensure_future(self._acquire(key, mine, _milliseconds(ttl)))
        self._acquiring[key] = mine, acquiring
        acquiring.add_done_callback(lambda _: self._acquiring.pop(key))
        try:
            return await acquiring
        except asyncio.CancelledError:
            if not acquiring.cancelled() and acquiring.result():
                await self.release_inflight(key)
            raise

    async def _acquire(self, key: str, mine: str, ttl_ms: int) -> bool:
        async def acquire() -> bool:
            if await self._redis.set(key, mine, nx=True, px=ttl_ms):
                return True
            # it may be a second try, and the first one had it
            return await self._redis.get(key) in (mine, mine.encode())

        return bool(await self._again(acquire))

    async def release_inflight(self, key: str) -> None:
        """Take the mark of ``key`` away."""
        await self._again(lambda: self._redis.delete(key))

    async def wait_for_key(self, key: str, timeout: float) -> bytes | None:
        """Return what is kept under ``key`` as soon as there is something."""
        deadline = anyio.current_time() + timeout
        with self._waiters.waiting_for([key, _ANY]) as waiter:
            while True:
                # also after a connection was lost meanwhile
                self._begin_to_listen()
                data = await self.get(key)
                left = deadline - anyio.current_time()
                if data is not None or left <= 0:
                    return data
                await waiter.wait(left)

    def _begin_to_listen(self) -> None:
        loop, listener = asyncio.get_running_loop(), self._listener
        if listener is None or listener.done() or listener.get_loop() is not loop:
            self._listener = loop.create_task(self._listen())

    async def notify_key(self, key: str) -> None:
        """Wake who waits for ``key``."""
        self._waiters.wake_all(key)
        await self._again(lambda: self._redis.publish(_CHANNEL, key.encode()))

    async def _again(self, command: Callable[[], Awaitable[Any]]) -> Any:
        """Run a command, once more if its connection was lost."""
        try:
            return await command()
        except Exception as exc:
            if not _connection_lost(exc):
                raise
        # the idle ones are as old: each of them would fail the next command
        await self._redis.connection_pool.disconnect(inuse_connections=False)
        return await command()

    async def _listen(self) -> None:
        """Wake who waits in this process, until nobody has for some seconds."""
        try:
            async with self._redis.pubsub() as pubsub:
                await pubsub.subscribe(_CHANNEL)
                while True:
                    message = await pubsub.get_message(timeout=_LINGER_SECONDS)
                    if message is not None and message["type"] == "message":
                        self._waiters.wake_all(message["data"].decode())
                    elif message is not None:
                        # just (again) subscribed: what came before was missed
                        self._waiters.wake_all(_ANY)
                    elif not len(self._waiters):
                        return
        except Exception as exc:
            log.warning("wake-ups are not received: %r", exc)
            # who reads again finds out what is wrong
            self._waiters.wake_all(_ANY)


def _connection_lost(exc: Exception) -> bool:
    # not imported before there is a Redis
    from redis.exceptions import ConnectionError as Lost

    # a pool without a free connection has lost none
    return isinstance(exc, Lost) and type(exc).__name__ != "MaxConnectionsError"


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def results_of(app: Any) -> ResultBackend:
    """Return the ``state.result_backend`` of a host, or a new one in memory."""
    backend: ResultBackend | None = getattr(app.state, "result_backend", None)
    if backend is None:
        largest = settings_of(app).provider_result_max_bytes
        backend = MemoryResults(max(DEFAULT_MAX_BYTES, 4 * largest))
        app.state.result_backend = backend
    return backend


class InFlight:
    """The requests that this process sent to providers and has no answers to."""

    def __init__(self) -> None:
        self._by_provider: dict[UUID, dict[str, asyncio.TimerHandle]] = {}
        self._sending: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return sum(map(len, self._by_provider.values()))

    async def send(self, sending: Coroutine[Any, Any, None]) -> None:
        """Send a request to its end, whoever gives up: others count on it."""
        task = asyncio.create_task(sending)
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)
        await asyncio.shield(task)

    def add(self, provider_id: UUID, digest: str, seconds: float, most: int) -> bool:
        """Count a request for so many seconds; False when its provider has ``most``."""
        others = self._by_provider.get(provider_id, {})
        if len(others) >= most:
            return False
        self.remove(provider_id, digest)
        loop = asyncio.get_running_loop()
        timer = loop.call_later(seconds, self.remove, provider_id, digest)
        self._by_provider.setdefault(provider_id, {})[digest] = timer
        return True

    def remove(self, provider_id: UUID, digest: str) -> None:
        """Count a request no more."""
        others = self._by_provider.get(provider_id, {})
        timer = others.pop(digest, None)
        if timer is not None:
            timer.cancel()
            if not others:
                del self._by_provider[provider_id]


@asynccontextmanager
async def reachable(seconds: float) -> AsyncIterator[None]:
    """Turn a result backend that fails, or takes longer, into 503."""
    try:
        with anyio.fail_after(seconds):
            yield
    except ProblemException:
        raise
    except Exception as exc:
        log.warning("result backend unavailable: %r", exc)
        raise ServiceUnavailable.exception(
            "results can't be reached right now", headers=RETRY_LATER
        ) from exc

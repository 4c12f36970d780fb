"""Where providers' results wait for their readers: in this process, or in Redis."""

import time
from typing import TYPE_CHECKING, Any, Protocol

import anyio

from zndraw_joblib.waiting import waiting_for, wake_all

if TYPE_CHECKING:
    from redis.asyncio import Redis

DEFAULT_MAX_BYTES = 256 * 1024 * 1024


class ResultBackend(Protocol):
    """What a host can put in the place of the two below; all times in seconds."""

    async def store(self, key: str, data: bytes, ttl: float) -> None:
        """Keep ``data`` under ``key`` for ``ttl``."""
        ...

    async def get(self, key: str) -> bytes | None:
        """Return what is kept under ``key``."""
        ...

    async def delete(self, key: str) -> None:
        """Forget ``key``."""
        ...

    async def acquire_inflight(self, key: str, ttl: float) -> bool:
        """Mark ``key`` for ``ttl``; tell whether nobody had."""
        ...

    async def release_inflight(self, key: str) -> None:
        """Take the mark of ``key`` away."""
        ...

    async def wait_for_key(self, key: str, timeout: float) -> bytes | None:
        """Return what is kept under ``key`` as soon as there is something."""
        ...

    async def notify_key(self, key: str) -> None:
        """Wake who waits for ``key``."""
        ...


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

    async def store(self, key: str, data: bytes, ttl: float) -> None:
        """Keep ``data`` under ``key`` for ``ttl`` seconds, if it fits at all."""
        await self.delete(key)
        self._purge()
        if len(data) > self._max_bytes:
            return
        while self._bytes + len(data) > self._max_bytes:
            self._forget(next(iter(self._kept)))
        self._kept[key] = (data, time.monotonic() + ttl)
        self._bytes += len(data)

    async def get(self, key: str) -> bytes | None:
        """Return what is kept under ``key``."""
        data, end = self._kept.get(key, (None, 0.0))
        return data if end > time.monotonic() else None

    async def delete(self, key: str) -> None:
        """Forget ``key``."""
        if key in self._kept:
            self._forget(key)

    async def acquire_inflight(self, key: str, ttl: float) -> bool:
        """Mark ``key`` for ``ttl`` seconds; tell whether nobody had."""
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
        with waiting_for([f"result:{key}"]) as waiter:
            while (data := await self.get(key)) is None:
                left = deadline - anyio.current_time()
                if left <= 0:
                    return None
                await waiter.wait(left)
        return data

    async def notify_key(self, key: str) -> None:
        """Wake who waits for ``key``."""
        wake_all(f"result:{key}")

    def _forget(self, key: str) -> None:
        data, _ = self._kept.pop(key)
        self._bytes -= len(data)

    def _purge(self) -> None:
        now = time.monotonic()
        for key in [key for key, (_, end) in self._kept.items() if end <= now]:
            self._forget(key)
        for key in [key for key, end in self._inflight.items() if end <= now]:
            del self._inflight[key]


class RedisResults:
    """Results and wake-ups that all replicas share.

    Parameters
    ----------
    redis : redis.asyncio.Redis
        The host's, with ``decode_responses`` off (its default).
    """

    def __init__(self, redis: "Redis") -> None:
        self._redis = redis

    async def store(self, key: str, data: bytes, ttl: float) -> None:
        """Keep ``data`` under ``key`` for ``ttl`` seconds."""
        await self._redis.set(key, data, px=_milliseconds(ttl))

    async def get(self, key: str) -> bytes | None:
        """Return what is kept under ``key``."""
        data = await self._redis.get(key)
        return data.encode() if isinstance(data, str) else data

    async def delete(self, key: str) -> None:
        """Forget ``key``."""
        await self._redis.delete(key)

    async def acquire_inflight(self, key: str, ttl: float) -> bool:
        """Mark ``key`` for ``ttl`` seconds; tell whether nobody had."""
        return bool(await self._redis.set(key, b"1", nx=True, px=_milliseconds(ttl)))

    async def release_inflight(self, key: str) -> None:
        """Take the mark of ``key`` away."""
        await self._redis.delete(key)

    async def wait_for_key(self, key: str, timeout: float) -> bytes | None:
        """Return what is kept under ``key`` as soon as there is something."""
        deadline = anyio.current_time() + timeout
        async with self._redis.pubsub() as pubsub:
            # subscribed before the first look: a notification in between is not missed
            await pubsub.subscribe(_channel(key))
            while (data := await self.get(key)) is None:
                left = deadline - anyio.current_time()
                if left <= 0:
                    return None
                await pubsub.get_message(timeout=left)
        return data

    async def notify_key(self, key: str) -> None:
        """Wake who waits for ``key``."""
        await self._redis.publish(_channel(key), b"")


def _channel(key: str) -> str:
    return f"notify:{key}"


def _milliseconds(seconds: float) -> int:
    return max(1, round(seconds * 1000))


def results_of(app: Any) -> ResultBackend:
    """Return the ``state.result_backend`` of a host, or a new one in memory."""
    backend: ResultBackend | None = getattr(app.state, "result_backend", None)
    if backend is None:
        backend = app.state.result_backend = MemoryResults()
    return backend

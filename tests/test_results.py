"""Where results wait for their readers: both backends keep the same promises."""

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import anyio
import pytest
import servers
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio import Redis
from redis.exceptions import RedisError

from zndraw_joblib import results as results_module
from zndraw_joblib.results import MemoryResults, RedisResults, ResultBackend

HANG = 120


@pytest.fixture(params=["memory", "redis"])
async def replicas(
    request: pytest.FixtureRequest, redis_url: str
) -> AsyncIterator[tuple[ResultBackend, ResultBackend]]:
    """Yield the same results as two parts of a host see them."""
    if request.param == "memory":
        one = MemoryResults()
        yield one, one
        return
    async with Redis.from_url(redis_url) as one, Redis.from_url(redis_url) as other:
        yield RedisResults(one), RedisResults(other)


@asynccontextmanager
async def waiting(backend: ResultBackend, key: str, n: int = 1) -> AsyncIterator[list]:
    """Wait ``n`` times for ``key`` meanwhile."""
    found: list[bytes | None] = []

    async def wait() -> None:
        found.append(await backend.wait_for_key(key, 2 * HANG))

    with anyio.fail_after(HANG):
        async with anyio.create_task_group() as tasks:
            for _ in range(n):
                tasks.start_soon(wait)
            yield found


async def test_entries_are_kept_until_their_end(replicas):
    one, other = replicas
    await one.store("a", b"\x00\xff", HANG)
    await one.store("short", b"1", 0.02)
    await one.store("empty", b"", HANG)
    assert (await other.get("a"), await other.get("empty")) == (b"\x00\xff", b"")
    await other.store("a", b"2", HANG)
    assert await one.get("a") == b"2"
    await other.delete("a")
    await other.delete("never there")
    assert await one.get("a") is None
    with anyio.fail_after(HANG):
        while await one.get("short") is not None:
            await anyio.sleep(0.01)


async def test_one_of_many_acquires_a_mark(replicas):
    async def acquire() -> None:
        acquired.append(await replicas[len(acquired) % 2].acquire_inflight("m", HANG))

    for _ in range(2):
        acquired: list[bool] = []
        async with anyio.create_task_group() as tasks:
            for _ in range(10):
                tasks.start_soon(acquire)
        assert sorted(acquired) == [False] * 9 + [True]
        await replicas[1].release_inflight("m")
    await replicas[0].release_inflight("m")
    assert await replicas[0].acquire_inflight("short", 0.02)
    with anyio.fail_after(HANG):
        while not await replicas[1].acquire_inflight("short", HANG):
            await anyio.sleep(0.01)
    assert await replicas[0].get("m") is None, "a mark is no entry"


async def test_who_waits_is_woken(replicas):
    one, other = replicas
    assert await one.wait_for_key("a", 0.02) is None
    # again: the first wait of all begins to listen
    for key in "a", "b":
        async with waiting(one, key, 20) as found:
            await anyio.sleep(0.05)
            await other.notify_key(key)
            await other.store("another", b"1", HANG)
            await other.notify_key("another")
            await other.store(key, b"data", HANG)
            await other.notify_key(key)
        assert found == [b"data"] * 20
    assert await one.wait_for_key("a", 0) == b"data"


async def test_a_process_listens_on_one_connection_while_it_waits(
    redis_url: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(results_module, "_LINGER_SECONDS", 0.05)

    async def listeners() -> int:
        return len([c for c in await redis.client_list() if int(c["sub"])])

    async def until_there_are(n: int) -> None:
        with anyio.fail_after(HANG):
            while await listeners() != n:
                await anyio.sleep(0.01)

    async with Redis.from_url(redis_url) as redis:
        results = RedisResults(redis)
        for _ in range(2):
            async with waiting(results, "a", 50), waiting(results, "b", 50):
                await until_there_are(1)
                await anyio.sleep(0.1)
                assert await listeners() == 1
                for key in "a", "b":
                    await results.store(key, b"1", HANG)
                    await results.notify_key(key)
            await until_there_are(0)
            await results.delete("a")
            await results.delete("b")


async def test_who_waits_hears_that_redis_is_gone():
    with servers.redis_server() as url:
        async with Redis.from_url(url) as redis:
            results = RedisResults(redis)
            waits = asyncio.create_task(results.wait_for_key("a", 2 * HANG))
            while not await redis.client_list(_type="pubsub"):
                await anyio.sleep(0.01)
            await redis.shutdown(nosave=True)
            with anyio.fail_after(HANG), pytest.raises(RedisError):
                await waits


async def test_who_gives_up_leaves_the_mark_to_another(redis_url):
    """Whoever is told that the mark is another's counts on the other to go on."""
    async with Redis.from_url(redis_url) as redis:
        results = RedisResults(redis)
        for delay in (0, 0, 0.0005, 0.001, 0.002):
            first = asyncio.create_task(results.acquire_inflight("m", HANG))
            others = [asyncio.create_task(results.acquire_inflight("m", HANG)) for _ in range(3)]
            await asyncio.sleep(delay)
            first.cancel()
            with anyio.fail_after(HANG):
                await asyncio.wait([first, *others])
            got = [t for t in (first, *others) if not t.cancelled() and t.result()]
            # or nobody has it, since who got it gave up
            assert len(got) == 1 or await results.acquire_inflight("m", HANG)
            await results.release_inflight("m")


@pytest.mark.parametrize("step", ["store", "get", "acquire_inflight", "notify_key"])
async def test_redis_is_back_as_soon_as_it_is_back(step, tmp_path):
    """However many of the pool's connections are as old as the Redis before."""
    arguments = {"store": ("a", b"1", HANG), "acquire_inflight": ("a", HANG)}
    with servers.redis_service() as service:
        async with Redis.from_url(service.url) as redis:
            results = RedisResults(redis)
            await asyncio.gather(*(results.store(f"{n}", b"", HANG) for n in range(9)))
            service.stop()
            service.start()
            for _ in range(5):
                await getattr(results, step)(*arguments.get(step, ("a",)))


# --- in memory ---


def at_once(step: Coroutine[Any, Any, Any]) -> Any:
    """Return what a coroutine returns that never waits."""
    with pytest.raises(StopIteration) as stop:
        step.send(None)
    return stop.value.value


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(-1, 12))))
def test_memory_is_bounded_and_the_oldest_go_first(steps: list[tuple[str, int]]):
    """An empty one takes something, too."""
    entry = results_module._ENTRY_BYTES
    results = MemoryResults(max_bytes=3 * entry + 10)
    kept: dict[str, int] = {}
    for key, size in steps:
        kept.pop(key, None)
        if size < 0:
            at_once(results.delete(key))
        else:
            at_once(results.store(key, bytes(size), HANG))
        if size >= 0:
            kept[key] = size
            while sum(kept.values()) + len(kept) * entry > 3 * entry + 10:
                del kept[next(iter(kept))]
        found = {key: at_once(results.get(key)) for key in "abcd"}
        assert {k: len(v) for k, v in found.items() if v is not None} == kept


async def test_what_has_ended_takes_no_memory(monkeypatch: pytest.MonkeyPatch):
    now = 1000.0
    monkeypatch.setattr(results_module.time, "monotonic", lambda: now)
    results = MemoryResults(max_bytes=results_module._ENTRY_BYTES + 10)
    for n in range(5):
        await results.store(f"{n}", b"12", 10)
        await results.acquire_inflight(f"{n}", 10)
    now += 11
    await results.store("new", b"12345678", 10)
    await results.acquire_inflight("new", 10)
    assert list(results._kept) == list(results._inflight) == ["new"]
    assert await results.get("new") == b"12345678"

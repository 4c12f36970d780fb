"""Reads of providers: a request goes out once, and its answer reaches who waits."""

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import anyio
import host
import httpx
import pytest
from anyio.lowlevel import checkpoint
from conftest import PASSWORD, PREFIX, Sent, User
from fastapi import FastAPI
from redis.asyncio import Redis
from steps import problem

from zndraw_joblib import request_hash
from zndraw_joblib.results import MemoryResults, RedisResults
from zndraw_joblib.settings import JobLibSettings

# sessions matter here, and what a database takes does not: `test_providers` shows that
pytestmark = pytest.mark.makers("plain", "strict")

HANG = 120
FILES = {"category": "filesystem", "name": "files"}
FULL_NAME = "lab:filesystem:files"
READ = f"/rooms/lab/providers/{FULL_NAME}"
PATIENTLY = {"Prefer": f"wait={HANG}"}
DIGEST = hashlib.sha256(b"{}").hexdigest()


class FarResults:
    """Results as far away as a server: every call suspends. Counts who waits."""

    def __init__(self) -> None:
        self.near = MemoryResults()
        self.waiting = 0

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        async def far(*args: Any) -> Any:
            await checkpoint()
            return await getattr(self.near, name)(*args)

        return far

    async def wait_for_key(self, key: str, timeout: float) -> bytes | None:
        self.waiting += 1
        try:
            await checkpoint()
            return await self.near.wait_for_key(key, timeout)
        finally:
            self.waiting -= 1


@pytest.fixture
def results(app: FastAPI) -> FarResults:
    """Return the host's result backend; only notifications wake who waits there."""
    app.state.joblib_settings = JobLibSettings(
        recheck_seconds=2 * HANG,
        provider_long_poll_default_seconds=HANG,
        provider_long_poll_max_seconds=HANG,
    )
    app.state.result_backend = FarResults()
    return app.state.result_backend


@pytest.fixture
async def provider(ada: User) -> dict[str, Any]:
    return await offer(ada)


async def offer(user: User, **changes: Any) -> dict[str, Any]:
    answer = await user.put("/rooms/lab/providers", json={**FILES, **changes})
    return answer.raise_for_status().json()


async def upload(
    user: User, provider: dict[str, Any], content: Any, digest: str = DIGEST, **headers: str
) -> httpx.Response:
    return await user.post(
        f"/providers/{provider['id']}/results",
        content=content,
        headers={"X-Request-Hash": digest, **headers},
    )


async def ask(user: User, full_name: str = FULL_NAME) -> None:
    """Have a provider asked, and don't wait: what nobody asked for is not kept."""
    path = f"/rooms/lab/providers/{full_name}"
    answer = await user.get(path, headers={"Prefer": "wait=0"})
    problem(answer, 504, "provider-timeout")


async def until(condition: Callable[[], Any]) -> None:
    with anyio.fail_after(HANG):
        while not condition():
            await anyio.sleep(0.005)


def requests(events: list[Sent]) -> list[dict[str, Any]]:
    return [sent.data for sent in events if sent.event == "provider_request"]


@asynccontextmanager
async def reading(
    results: FarResults, *readers: httpx.AsyncClient, path: str = READ
) -> AsyncIterator[list[httpx.Response]]:
    """Wait until all read; afterwards all have their answers."""
    answers: list[httpx.Response] = []

    async def read(reader: httpx.AsyncClient) -> None:
        answers.append(await reader.get(path, headers=PATIENTLY))

    already = results.waiting
    with anyio.fail_after(HANG):
        async with anyio.create_task_group() as tasks:
            for reader in readers:
                tasks.start_soon(read, reader)
            await until(lambda: results.waiting == already + len(readers))
            yield answers


# --- asked and answered ---


async def test_a_hundred_readers_share_one_request(ada, bob, provider, events, results):
    async with reading(results, *[bob] * 100) as answers:
        (asked,) = [e for e in events if e.event == "provider_request"]
        assert asked[1:] == (
            {"request_id": DIGEST, "provider_name": FULL_NAME, "params": "{}"},
            f"providers:{FULL_NAME}",
        )
        events.clear()
        assert (await upload(ada, provider, b"[1,\n2]")).status_code == 204
    assert len(answers) == 100
    for answer in (*answers, await bob.get(READ)):
        assert (answer.status_code, answer.content) == (200, b"[1,\n2]")
        assert answer.headers["Content-Type"] == "application/json"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
    ready = {"provider_name": FULL_NAME, "request_hash": DIGEST}
    assert events == [Sent("provider_result_ready", ready, "room:lab")]


async def test_what_was_answered_since_the_look_is_not_asked_for(
    ada, bob, provider, events, results
):
    acquire = results.near.acquire_inflight

    async def late(key: str, ttl: float) -> bool:
        results.near.acquire_inflight = acquire
        assert await acquire(key, ttl)
        await upload(ada, provider, b"1")
        return await acquire(key, ttl)

    results.near.acquire_inflight = late
    with anyio.fail_after(HANG / 2):
        assert (await bob.get(READ)).content == b"1"
    assert not requests(events)
    # and the mark is no obstacle to the next one
    await results.delete(f"provider-result:{FULL_NAME}:{DIGEST}")
    results.near.acquire_inflight = acquire
    async with reading(results, bob):
        assert requests(events)
        await upload(ada, provider, b"2")


async def test_a_result_is_answered_as_it_was_uploaded(ada, bob, results):
    data = bytes(range(256)) * 5000
    provider = await offer(ada, content_type='text/x-Y; charset="latin 1"')
    await ask(bob)
    # a preference that a route knows nothing of is ignored (RFC 7240, section 2)
    assert (await upload(ada, provider, data, Prefer="wait=5")).status_code == 204
    answer = await bob.get(READ, headers={"Prefer": "wait=999"})
    assert answer.content == data
    assert answer.headers["Content-Type"] == 'text/x-Y; charset="latin 1"'
    assert answer.headers["Content-Length"] == str(len(data))
    # cut to what the host allows
    assert answer.headers["Preference-Applied"] == f"wait={HANG}"
    empty = await offer(ada, name="empty")
    await ask(bob, "lab:filesystem:empty")
    assert (await upload(ada, empty, b"")).status_code == 204
    answer = await bob.get("/rooms/lab/providers/lab:filesystem:empty")
    assert (answer.status_code, answer.content) == (200, b"")


async def test_parameters_are_told_apart(ada, bob, provider, events, results):
    queries = {
        "": {},
        "?a=2": {"a": "2"},
        "?a=1&a=2": {"a": ["1", "2"]},
        "?a=2&a=1": {"a": ["2", "1"]},
        "?a=": {"a": ""},
        "?b=ü&a=%20": {"a": " ", "b": "ü"},
        "?a=+&b=%C3%BC": {"a": " ", "b": "ü"},
    }
    for query, params in queries.items():
        encoded = json.dumps(params, sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(encoded.encode()).hexdigest()
        events.clear()
        if query != "?a=+&b=%C3%BC":
            async with reading(results, bob, path=READ + query) as answers:
                (request,) = requests(events)
                assert request["params"] == encoded
                assert request["request_id"] == digest
                await upload(ada, provider, query.encode(), digest)
            assert answers[0].content == query.encode()
    # in another order they are the same
    assert (await bob.get(READ + "?a=+&b=%C3%BC")).content == "?b=ü&a=%20".encode()


@pytest.mark.parametrize("headers", [{}, {"Prefer": "wait=0"}, {"Prefer": "wait=60"}])
async def test_a_provider_that_does_not_answer(app, bob, provider, events, headers):
    app.state.joblib_settings = JobLibSettings(
        provider_long_poll_default_seconds=0.05, provider_long_poll_max_seconds=0.05
    )
    for _ in range(2):
        answer = await bob.get(READ, headers=headers)
        problem(answer, 504, "provider-timeout")
        assert answer.headers["Retry-After"] == "2"
    # it may still be at it
    assert len(requests(events)) == 1


async def test_who_may_answer(ada, bob, admin, provider, results):
    problem(await upload(bob, provider, b"forged"), 403, "forbidden")
    unknown = {"id": "00000000-0000-0000-0000-000000000000"}
    problem(await upload(ada, unknown, b""), 404, "provider-not-found")
    async with reading(results, bob) as answers:
        assert (await upload(admin, provider, b"1", DIGEST.upper())).status_code == 204
    assert answers[0].content == b"1"


async def test_answers_to_nothing_are_refused(ada, provider, results):
    for headers in (
        {},
        {"X-Request-Hash": ""},
        {"X-Request-Hash": DIGEST[1:]},
        {"X-Request-Hash": DIGEST + "0"},
        {"X-Request-Hash": DIGEST[1:] + "g"},
        {"X-Request-Hash": DIGEST, "X-Result-Status": "no such status"},
    ):
        answer = await ada.post(
            f"/providers/{provider['id']}/results", content=b"1", headers=headers
        )
        problem(answer, 422, "invalid-request")
    assert not results.near._kept


# --- failures ---


FAILURES: list[tuple[Any, dict[str, Any]]] = [
    (
        {"type": "/v1/problems/gone", "title": "Gone", "status": 410, "file": "a"},
        {"type": "/v1/problems/gone", "title": "Gone", "status": 410, "file": "a"},
    ),
    ({"detail": "no such file"}, {"status": 400, "detail": "no such file"}),
    ({"status": 200, "detail": "fine"}, {"status": 400, "detail": "fine"}),
    ({"status": "ten"}, {"status": 400, "detail": '{"status": "ten"}'}),
    (["no", "problem"], {"status": 400, "detail": '["no", "problem"]'}),
    (b"\xff plain text", {"status": 400, "detail": "\ufffd plain text"}),
    (b"", {"status": 400, "detail": "The provider could not serve this request."}),
]


async def test_who_waits_hears_why_a_provider_failed(ada, bob, provider, events, results):
    for n, (body, told) in enumerate(FAILURES):
        query = {"path": READ + f"?n={n}"}
        digest = request_hash({"n": str(n)})
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        events.clear()
        async with reading(results, bob, bob, **query) as answers:
            failed = {"X-Result-Status": "error"}
            answer = await upload(ada, provider, content, digest, **failed)
            assert answer.status_code == 204
        expected = {"type": "/v1/problems/provider-execution-failed", **told}
        for answer in answers:
            kind = expected["type"].removeprefix("/v1/problems/")
            assert problem(answer, told["status"], kind).items() >= expected.items()
        # it isn't kept, nor is it a result
        async with reading(results, *[bob] * 10, **query) as answers:
            assert [e.event for e in events] == ["provider_request"] * 2
            await upload(ada, provider, b"well", digest)
        assert [answer.content for answer in answers] == [b"well"] * 10


async def test_all_who_wait_hear_of_a_request_that_can_not_be_sent(
    app, ada, bob, provider, events, results, monkeypatch
):
    all_wait = anyio.Event()

    async def emit(*args: Any, **kwargs: Any) -> None:
        await all_wait.wait()
        raise ConnectionError("the manager of Socket.IO is gone")

    answers = []

    async def read() -> None:
        answers.append(await bob.get(READ, headers=PATIENTLY))

    with monkeypatch.context() as patch:
        patch.setattr(app.state.tsio.manager, "emit", emit)
        async with anyio.create_task_group() as tasks:
            for _ in range(10):
                tasks.start_soon(read)
            # all but the one that sends it
            await until(lambda: results.waiting == 9)
            all_wait.set()
    assert len(answers) == 10
    for answer in answers:
        problem(answer, 503, "service-unavailable")
        assert answer.headers["Retry-After"] == "2"
    async with reading(results, bob):
        assert len(requests(events)) == 1
        await upload(ada, provider, b"1")


async def test_a_manager_of_socketio_that_hangs_is_not_waited_for(
    app, bob, provider, results, monkeypatch
):
    app.state.joblib_settings = JobLibSettings(dispatch_timeout_seconds=0.05)

    async def emit(*args: Any, **kwargs: Any) -> None:
        await anyio.sleep_forever()

    monkeypatch.setattr(app.state.tsio.manager, "emit", emit)
    for _ in range(2):
        problem(await bob.get(READ), 503, "service-unavailable")


async def test_a_host_without_socketio_says_so(app, bob, provider, results):
    app.state.tsio = None
    problem(await bob.get(READ), 503, "service-unavailable")


@pytest.mark.parametrize("how", ["deleted", "replaced", "failed"])
async def test_the_successor_of_a_lost_worker_is_asked(ada, bob, provider, events, results, how):
    # the request was on its way when the worker went
    answer = await bob.get(READ, headers={"Prefer": "wait=0"})
    problem(answer, 504, "provider-timeout")
    if how == "deleted":
        await ada.delete(f"/workers/{provider['worker_id']}")
    if how == "failed":
        await upload(ada, provider, b"", **{"X-Result-Status": "error"})
    successor = await offer(ada)
    async with reading(results, *[bob] * 10) as answers:
        assert len(requests(events)) == 2
        await upload(ada, successor, b"1")
    assert [answer.content for answer in answers] == [b"1"] * 10


async def test_who_hung_up_waits_no_longer(app, server, ada, provider, results):
    host, port = server.removeprefix("http://").split(":")
    stream = await anyio.connect_tcp(host, int(port))
    head = (
        f"GET {PREFIX}{READ} HTTP/1.1\r\nHost: host\r\n"
        f"Authorization: Bearer {ada.token}\r\nPrefer: wait={HANG}\r\n\r\n"
    )
    await stream.send(head.encode())
    await until(lambda: results.waiting)
    await stream.aclose()
    await until(lambda: not results.waiting)
    with anyio.fail_after(HANG / 2):
        for _ in range(10):
            await anyio.sleep(0.05)
            assert not results.waiting


async def test_readers_hear_at_once_that_their_provider_is_gone(app, ada, provider, results):
    async with reading(results, ada, ada) as answers:
        await ada.delete(f"/providers/{provider['id']}")
    for answer in answers:
        problem(answer, 404, "provider-not-found")


async def test_how_many_requests_a_provider_gets(app, ada, bob, provider, results):
    settings = app.state.joblib_settings
    settings.max_requests_per_provider, settings.max_waiting_per_user = 1, 1
    async with reading(results, ada) as answers:
        answer = await bob.get(f"{READ}?n=1", headers=PATIENTLY)
        problem(answer, 503, "server-busy")
        assert int(answer.headers["retry-after"]) > 0
        # the same one is shared, but who waits is counted
        problem(await ada.get(READ, headers=PATIENTLY), 429, "quota-exceeded")
        assert (await upload(ada, provider, b"1")).status_code == 204
    assert answers[0].content == b"1"
    async with reading(results, bob, path=f"{READ}?n=1") as answers:
        digest = request_hash({"n": "1"})
        assert (await upload(ada, provider, b"2", digest)).status_code == 204
    assert answers[0].content == b"2"


# --- whose results they are ---


async def test_nobody_is_answered_with_anothers_result(ada, bob, admin, provider, events, results):
    await ask(bob)
    assert (await upload(ada, provider, b"ada's")).status_code == 204
    events.clear()
    await ada.delete(f"/providers/{provider['id']}")
    bobs = await offer(bob)
    async with reading(results, ada) as answers:
        assert len(requests(events)) == 1
        late = await upload(ada, provider, b"ada's again")
        problem(late, 404, "provider-not-found")
        failed = await upload(ada, provider, b"", **{"X-Result-Status": "error"})
        problem(failed, 404, "provider-not-found")
        await upload(bob, bobs, b"bob's")
    assert answers[0].content == b"bob's"
    # taken over by a superuser
    admins = await offer(admin)
    async with reading(results, ada) as answers:
        problem(await upload(bob, bobs, b"late"), 404, "provider-not-found")
        await upload(admin, admins, b"admin's")
    assert answers[0].content == b"admin's"


async def test_a_provider_may_go_while_its_answer_comes_in(ada, bob, provider, results):
    async def body() -> AsyncIterator[bytes]:
        yield b"ada's"
        await ada.delete(f"/providers/{provider['id']}")
        await offer(bob)

    answer = await upload(ada, provider, body())
    problem(answer, 404, "provider-not-found")
    assert not results.near._kept


async def test_a_result_that_is_stored_late_is_not_its_successors(
    ada, bob, provider, events, results
):
    """Whatever a backend does meanwhile, the last one to store is who it was."""
    began, goes_on = anyio.Event(), anyio.Event()
    store = results.near.store

    async def slow(key: str, data: bytes, ttl: float) -> None:
        if data == b"ada's":
            began.set()
            await goes_on.wait()
        await store(key, data, ttl)

    results.near.store = slow
    await ask(ada)
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(upload, ada, provider, b"ada's")
        await began.wait()
        await ada.delete(f"/providers/{provider['id']}")
        bobs = await offer(bob)
        await ask(bob)
        await upload(bob, bobs, b"bob's")
        goes_on.set()
    events.clear()
    async with reading(results, ada) as answers:
        assert len(requests(events)) == 1
        await upload(bob, bobs, b"bob's")
    assert answers[0].content == b"bob's"


async def test_bytes_of_one_type_are_not_answered_as_another(ada, bob, provider, events, results):
    await ask(bob)
    await upload(ada, provider, b"[]")
    events.clear()
    changed = await offer(ada, content_type="text/html")
    async with reading(results, bob) as answers:
        assert len(requests(events)) == 1
        await upload(ada, changed, b"<p>")
    assert answers[0].headers["Content-Type"] == "text/html"


async def test_hosts_read_and_ask_by_the_keys_of_the_contract(ada, bob, provider, events, results):
    result = f"provider-result:{FULL_NAME}:{DIGEST}"
    inflight = f"provider-inflight:{FULL_NAME}:{DIGEST}"
    assert await results.acquire_inflight(inflight, HANG)
    async with reading(results, bob) as answers, anyio.create_task_group() as tasks:
        # the host has asked already
        assert not requests(events)

        async def wait_as_hosts_do() -> None:
            assert await results.wait_for_key(result, HANG) == b"uploaded"

        tasks.start_soon(wait_as_hosts_do)
        await until(lambda: results.waiting == 2)
        await upload(ada, provider, b"uploaded")
    assert answers[0].content == b"uploaded"
    assert await results.get(result) == b"uploaded"
    assert await results.acquire_inflight(inflight, HANG)


async def test_what_nobody_asked_for_takes_nobodys_place(app, ada, bob, provider):
    app.state.result_backend = MemoryResults(2000)
    await ask(bob)
    await upload(ada, provider, b"asked for")
    flood = await offer(ada, name="flood")
    for n in range(30):
        for content, status in ((b"", "ok"), (500 * b"x", "ok"), (b"x", "error")):
            answer = await upload(ada, flood, content, f"{n:064x}", **{"X-Result-Status": status})
            assert answer.status_code == 204
    assert (await bob.get(READ)).content == b"asked for"
    # nor does the second answer to one request
    await upload(ada, provider, b"and again")
    assert (await bob.get(READ)).content == b"asked for"


@pytest.mark.parametrize("gone", ["result", "origin", "outcome", "requested"])
async def test_what_a_full_cache_lets_go_is_asked_for_again(
    ada, bob, provider, events, results, gone
):
    """And is never answered with what another provider left."""
    forget = results.near.delete
    if gone == "requested":
        # told already, as far as the reader knows
        await ask(bob)
        await upload(ada, provider, b"first")
        for key in [key for key in results.near._kept if "origin" in key]:
            await forget(key)
    events.clear()
    async with reading(results, bob) as answers:
        await upload(ada, provider, b"1")
        for key in [key for key in results.near._kept if f"-{gone}:" in key]:
            await forget(key)
        await until(lambda: answers or len(requests(events)) > 1)
        await upload(ada, provider, b"1")
    assert answers[0].content == b"1"


# --- limits ---


@pytest.mark.parametrize("status", ["ok", "error"])
async def test_an_upload_is_refused_as_soon_as_it_is_too_large(app, ada, provider, results, status):
    app.state.joblib_settings = JobLibSettings(provider_result_max_bytes=64 * 1024)
    taken = 0

    async def body() -> AsyncIterator[bytes]:
        nonlocal taken
        for _ in range(1000):
            taken += 1024
            yield bytes(1024)

    answer = await upload(ada, provider, body(), **{"X-Result-Status": status})
    problem(answer, 413, "payload-too-large")
    assert taken <= 66 * 1024
    assert not results.near._kept
    fits = await upload(ada, provider, bytes(64 * 1024))
    assert fits.status_code == 204


class NoResults:
    """A backend that is down, or hangs."""

    def __init__(self, hangs: bool) -> None:
        self.hangs = hangs

    def __getattr__(self, name: str) -> Callable[..., Awaitable[Any]]:
        async def fail(*args: Any) -> Any:
            if self.hangs:
                await anyio.sleep_forever()
            raise ConnectionError("no results today")

        return fail


@pytest.mark.parametrize("hangs", [False, True])
async def test_a_backend_that_is_down_fails_reads_and_nothing_else(app, ada, bob, hangs):
    app.state.result_backend = NoResults(hangs)
    app.state.joblib_settings = JobLibSettings(
        provider_long_poll_default_seconds=0.05,
        provider_long_poll_max_seconds=0.05,
        dispatch_timeout_seconds=0.05,
    )
    provider = await offer(ada)
    for answer in await bob.get(READ), await upload(ada, provider, b"1"):
        problem(answer, 503, "service-unavailable")
        assert answer.headers["Retry-After"] == "2"
    assert (await bob.get(f"{READ}/info")).status_code == 200
    assert (await bob.get("/rooms/lab/providers")).json()["total"] == 1
    assert (await ada.delete(f"/providers/{provider['id']}")).status_code == 204


# --- replicas ---


async def test_replicas_share_requests_and_results(app, ada, bob, events, redis_url):
    """25 readers on each of two replicas, which share Redis and a database."""
    other = host.create_app()
    for name in ("session_maker", "auth_settings", "tsio"):
        setattr(other.state, name, getattr(app.state, name))
    settings = JobLibSettings(recheck_seconds=2 * HANG, provider_long_poll_max_seconds=2 * HANG)
    provider = await offer(ada)
    answers = []

    async def read(reader: httpx.AsyncClient) -> None:
        answers.append(await reader.get(READ, headers={"Prefer": f"wait={2 * HANG}"}))

    async with (
        Redis.from_url(redis_url) as first,
        Redis.from_url(redis_url) as second,
        httpx.AsyncClient(
            transport=httpx.ASGITransport(other), base_url=bob.base_url, headers=bob.headers
        ) as elsewhere,
    ):
        for replica, redis in ((app, first), (other, second)):
            replica.state.joblib_settings = settings
            replica.state.result_backend = RedisResults(redis)
        with anyio.fail_after(HANG):
            async with anyio.create_task_group() as tasks:
                for reader in [bob, elsewhere] * 25:
                    tasks.start_soon(read, reader)
                await until(lambda: requests(events))
                await upload(ada, provider, b"1")
    assert [answer.content for answer in answers] == [b"1"] * 50
    assert len(requests(events)) == 1


# --- memory ---


@contextmanager
def host_process(directory: Path) -> Iterator[tuple[str, int]]:
    """Run the example host in a process of its own; yield its URL and its id."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "DATABASE_URL": f"sqlite+aiosqlite:///{directory / 'host.db'}",
        "PORT": str(port),
        "ZNDRAW_AUTH_SECRET_KEY": "a key of the tests, long enough for HS256",
    }
    process = subprocess.Popen([sys.executable, host.__file__], env=environment)
    try:
        yield f"http://127.0.0.1:{port}", process.pid
    finally:
        process.terminate()
        process.wait(HANG)


def memory(pid: int, what: str) -> int:
    """Return a line of the process's status, in bytes."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    (line,) = [line for line in lines if line.startswith(what)]
    return int(line.split()[1]) * 1024


def forget_peak(pid: int) -> None:
    Path(f"/proc/{pid}/clear_refs").write_text("5")


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs /proc")
async def test_large_results_are_held_once(tmp_path):
    """32 MiB in, and out to four readers at once: less than twice its size."""
    size = 32 * 1024 * 1024
    person = {"email": "ada@example.org", "password": PASSWORD}
    chunk = os.urandom(1024 * 1024)

    async def body() -> AsyncIterator[bytes]:
        for _ in range(size // len(chunk)):
            yield chunk

    with host_process(tmp_path) as (url, pid):
        async with httpx.AsyncClient(base_url=url, timeout=HANG) as http:
            with anyio.fail_after(HANG):
                while True:
                    try:
                        answer = await http.post("/auth/register", json=person)
                        break
                    except httpx.ConnectError:
                        await anyio.sleep(0.05)
            answer.raise_for_status()
            form = {"username": person["email"], "password": PASSWORD}
            answer = await http.post("/auth/jwt/login", data=form)
            token = answer.raise_for_status().json()["access_token"]
            http.headers["Authorization"] = f"Bearer {token}"
            http.base_url = f"{url}{PREFIX}"
            provider = await offer(http, content_type="application/octet-stream")
            before = memory(pid, "VmRSS")
            forget_peak(pid)
            async with AsyncExitStack() as streams:

                async def begin_to_read() -> None:
                    stream = http.stream("GET", READ, headers=PATIENTLY)
                    answers.append(await streams.enter_async_context(stream))

                answers: list[httpx.Response] = []
                with anyio.fail_after(HANG):
                    async with anyio.create_task_group() as tasks:
                        for _ in range(4):
                            tasks.start_soon(begin_to_read)
                        await upload(http, provider, body())
                    # none of them has taken more than the head so far
                    for answer in answers:
                        assert answer.headers["Content-Length"] == str(size)
                        async for part in answer.aiter_bytes(len(chunk)):
                            assert part == chunk
            grown = memory(pid, "VmHWM") - before
    assert size < grown < 2 * size, f"{grown / size:.1f} times"

"""Databases that refuse, managers and brokers that fail: what reaches a client, and after.

What takes a host's process down with it is in `test_replicas.py`.
"""

import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any, ClassVar
from uuid import uuid4

import anyio
import asyncpg
import httpx
import pytest
from conftest import PREFIX, User, be_quick
from fastapi import FastAPI
from makers import SessionMaker
from sqlalchemy import event, make_url, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine
from steps import JOB, at_once, claim, move, offer, problem, read, report, submit
from taskiq import InMemoryBroker

from zndraw_joblib import register_internal_jobs, router
from zndraw_joblib.database import execute
from zndraw_joblib.settings import JobLibSettings

HANG = 120
CUT = (
    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
    " WHERE backend_type = 'client backend' AND pid <> pg_backend_pid()"
)
#: more than any pool has connections
MANY = 40
Request = Callable[[], Awaitable[httpx.Response]]


def unavailable(answer: httpx.Response) -> None:
    problem(answer, 503, "service-unavailable")
    assert int(answer.headers["Retry-After"]) > 0


# --- a database that refuses ---


@pytest.fixture
def impatient(engine: AsyncEngine) -> None:
    """Let SQLite not wait for a lock; nor does a new connection need one."""
    event.remove(engine.sync_engine, "connect", be_quick)
    event.listen(
        engine.sync_engine,
        "connect",
        lambda connection, _: connection.execute("PRAGMA busy_timeout = 20"),
    )


@pytest.fixture
def other(database_url: str) -> sqlite3.Connection:
    """Return a connection of somebody else to the database."""
    return sqlite3.connect(str(make_url(database_url).database), isolation_level=None)


@pytest.mark.makers("plain", "strict")
async def test_a_locked_database_is_unavailable_on_every_route(
    ada: User, impatient: None, other: sqlite3.Connection
):
    """Auth looks the user up first: not even that is a 500."""
    asked = [
        (method, route.path_format.removeprefix(PREFIX))
        for route in router.routes
        for method in route.methods
    ]
    assert len(asked) > 20
    other.execute("BEGIN EXCLUSIVE")
    for method, path in asked:
        url = path.format_map(Anything())
        headers = {"X-Request-Hash": 64 * "0"}
        unavailable(await ada.request(method, url, headers=headers))
    other.execute("ROLLBACK")
    assert (await ada.get("/workers")).status_code == 200


class Anything(dict[str, str]):
    """Something for every parameter of a path."""

    def __missing__(self, key: str) -> str:
        return str(uuid4()) if key.endswith("_id") and key != "room_id" else "lab"


@pytest.mark.makers("plain", "strict")
async def test_what_a_locked_database_refuses_has_not_happened(
    ada: User, impatient: None, other: sqlite3.Connection
):
    worker, keeper = await offer(ada), await offer(ada)
    waiting, running, failed = [await submit(ada, payload={"n": n}) for n in range(3)]
    await report(ada, waiting, "cancelled")
    running = await move(ada, worker, running, "running")
    failed = await move(ada, worker, failed, "failed")
    await ada.post(f"/tasks/{waiting['id']}/retry")
    files = {"category": "filesystem", "name": "files", "schema": {}}
    provider = (await ada.put("/rooms/lab/providers", json=files)).json()

    async def state() -> list[Any]:
        paths = ("rooms/lab/tasks", "rooms/lab/jobs", "rooms/lab/providers", "workers")
        return [(await ada.get(f"/{path}")).json()["items"] for path in paths]

    job = {"category": "modifiers", "name": "Other", "schema": {}}
    writing: list[tuple[str, str, Any, int]] = [
        ("POST", "/workers", None, 201),
        ("PATCH", f"/workers/{worker}", None, 200),
        ("PUT", "/rooms/lab/jobs", job, 201),
        ("PUT", "/rooms/lab/providers", {**files, "name": "more"}, 201),
        ("POST", f"/rooms/lab/tasks/{JOB}", {"payload": {}}, 202),
        ("POST", "/tasks/claim", {"worker_id": keeper}, 200),
        ("PATCH", f"/tasks/{running['id']}", {"status": "completed"}, 200),
        ("POST", f"/tasks/{failed['id']}/retry", None, 202),
        ("DELETE", f"/providers/{provider['id']}", None, 204),
        ("DELETE", f"/workers/{worker}", None, 204),
    ]
    before = await state()
    # from here on others may read, and nobody may write
    other.execute("BEGIN IMMEDIATE")
    for method, url, body, _ in writing:
        unavailable(await ada.request(method, url, json=body))
        assert await state() == before
    other.execute("ROLLBACK")
    for method, url, body, code in writing:
        answer = await ada.request(method, url, json=body)
        assert answer.status_code == code, answer.text


@pytest.mark.makers("plain", "strict")
async def test_a_full_disk_loses_nothing(ada: User, engine: AsyncEngine):
    """SQLite says of its page limit what it says of a disk without space."""
    pages = 2**30
    event.listen(
        engine.sync_engine,
        "connect",
        lambda connection, _: connection.execute(f"PRAGMA max_page_count = {pages}"),
    )
    worker = await offer(ada)
    running = await move(ada, worker, await submit(ada), "running")
    async with engine.connect() as connection:
        pages = (await connection.scalar(text("PRAGMA page_count"))) + 10
    taken = []
    refused = 0
    while refused < 3:
        body = {"payload": {"text": 2000 * "x"}}
        answer = await ada.post(f"/rooms/lab/tasks/{JOB}", json=body)
        if answer.status_code == 202:
            taken.append(answer.json()["id"])
        else:
            refused += 1
            unavailable(answer)
    assert taken
    listed = await ada.get("/rooms/lab/tasks?status=pending")
    assert [task["id"] for task in listed.json()["items"]] == taken[::-1]
    pages = 2**30
    assert (await report(ada, running, "completed", result="x")).status_code == 200
    await submit(ada, payload={"text": 2000 * "x"})
    claimed = await claim(ada, worker, max_tasks=32)
    assert [task["id"] for task in claimed][:-1] == taken


@pytest.fixture
async def postgres(engine: AsyncEngine) -> AsyncIterator[asyncpg.Connection]:
    """Yield a connection of the operator."""
    connection = await asyncpg.connect(dsn_of(engine))
    yield connection
    await connection.close()


def dsn_of(engine: AsyncEngine) -> str:
    url = engine.url.set(drivername="postgresql")
    return url.render_as_string(hide_password=False)


@pytest.mark.makers("postgres")
async def test_lost_connections_are_unavailable_once(ada: User, postgres: asyncpg.Connection):
    """All of the pool's connections are cut: between requests, and inside of one."""
    worker = await offer(ada)
    task = await move(ada, worker, await submit(ada), "running")
    await at_once(*(ada.get("/workers") for _ in range(5)))
    await postgres.execute(CUT)
    unavailable(await ada.patch(f"/workers/{worker}"))
    for answer in await at_once(*(ada.get("/workers") for _ in range(5))):
        assert answer.status_code == 200
    answers = []

    async def complete() -> None:
        answers.append(await report(ada, task, "completed", result="done"))

    async with anyio.create_task_group() as group, postgres.transaction():
        await postgres.execute("SELECT 1 FROM task FOR UPDATE")
        group.start_soon(complete)
        blocked = "SELECT count(*) FROM pg_locks WHERE NOT granted"
        with anyio.fail_after(HANG):
            while not await postgres.fetchval(blocked):
                await anyio.sleep(0.01)
        await postgres.execute(CUT)
    unavailable(answers[0])
    assert (await read(ada, task))["status"] == "running"
    assert (await report(ada, task, "completed", result="done")).status_code == 200


@pytest.mark.makers("postgres")
async def test_what_is_answered_stands_when_its_session_can_not_end(
    app: FastAPI, ada: User, postgres: asyncpg.Connection
):
    """A read's session ends after the answer: that may fail, and nobody is told."""

    async def cut_after(scope: Any, receive: Any, send: Any) -> None:
        async def sent(message: Any) -> None:
            await send(message)
            if message["type"] == "http.response.body":
                await postgres.execute(CUT)

        await app(scope, receive, sent)

    ada = User(transport=httpx.ASGITransport(cut_after), base_url=ada.base_url, headers=ada.headers)
    for path in ("workers", "rooms/lab/jobs"):
        assert (await ada.get(path)).status_code == 200
        # the pool's other connections were cut as well
        await ada.get(path)


@pytest.mark.makers("postgres")
async def test_a_server_that_takes_no_more_connections_is_unavailable(
    ada: User, engine: AsyncEngine
):
    await engine.dispose()
    async with AsyncExitStack() as taken:

        async def take_all() -> None:
            while True:
                connection = await asyncpg.connect(dsn_of(engine))
                taken.push_async_callback(connection.close)

        with pytest.raises(asyncpg.TooManyConnectionsError):
            await take_all()
        unavailable(await ada.get("/workers"))
        unavailable(await ada.post("/tasks/claim", json={"worker_id": str(uuid4())}))
    assert (await ada.get("/workers")).status_code == 200


# --- what leaves after the commit does not ---


class Gate:
    """A Socket.IO server, or a way to a broker, that fails when it is told to."""

    def __init__(self) -> None:
        self.waiting = 0
        self.opened = anyio.Event()

    async def emit(self, event: str, data: Any, *, room: str) -> None:
        await self.pass_through()

    async def pass_through(self) -> None:
        self.waiting += 1
        await self.opened.wait()
        raise ConnectionError("it is away")


class Echo:
    category: ClassVar[str] = "modifiers"

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]:
        return {}


async def gated_broker(app: FastAPI, session_maker: SessionMaker, gate: Gate) -> str:
    class Gated(InMemoryBroker):
        async def kick(self, message: Any) -> None:
            await gate.pass_through()

    async def execute(*args: Any) -> None: ...

    await register_internal_jobs(
        app, Gated(), [Echo], executor=execute, session_maker=session_maker
    )
    return "@internal:modifiers:Echo"


@pytest.mark.parametrize("ends", ["raises", "times out"])
@pytest.mark.parametrize("what", ["manager", "broker"])
async def test_many_requests_may_hang_on_their_way_out(
    app: FastAPI, ada: User, bob: User, session_maker: SessionMaker, what: str, ends: str
):
    """No pool runs dry and no lock is held: others are served, and all are answered."""
    bobs = (await bob.post("/workers")).json()["id"]
    await offer(ada)
    gate = Gate()
    job = JOB
    if what == "broker":
        job = await gated_broker(app, session_maker, gate)
    else:
        app.state.tsio = gate
    patience = 2 if ends == "times out" else 3600
    app.state.joblib_settings = JobLibSettings(dispatch_timeout_seconds=patience)
    tasks: list[Any] = []

    async def send() -> None:
        tasks.append(await submit(ada, job))

    with anyio.fail_after(HANG):
        async with anyio.create_task_group() as group:
            for _ in range(MANY):
                group.start_soon(send)
            # events leave one by one, messages to the broker side by side
            reached = MANY if (what, ends) == ("broker", "raises") else 1
            while gate.waiting < reached:
                await anyio.sleep(0.01)
            for _ in range(5):
                assert (await bob.patch(f"/workers/{bobs}")).status_code == 200
            if ends != "times out":
                gate.opened.set()
    assert len({task["id"] for task in tasks}) == MANY
    listed = (await ada.get(f"/rooms/lab/tasks?limit={MANY + 1}")).json()["items"]
    left = "failed" if what == "broker" else "pending"
    assert [task["status"] for task in listed] == [left] * MANY


async def test_an_error_shows_no_values_of_its_statement(session_maker):
    async with session_maker() as session:
        with pytest.raises(DBAPIError) as caught:
            await execute(session, text("SELECT :password FROM nowhere"), {"password": "sesame"})
    assert "nowhere" in str(caught.value) or caught.value.orig.sqlstate == "42P01"
    assert "sesame" not in str(caught.value)

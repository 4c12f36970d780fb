"""What is committed is told: in order, once, and whatever becomes of the answer."""

import asyncio
import contextlib
import traceback
from collections.abc import Callable
from typing import Any

import anyio
import httpx
import pytest
from anyio.lowlevel import checkpoint
from conftest import Sent, User
from fastapi import FastAPI
from sqlalchemy import insert
from sqlalchemy.exc import StatementError
from steps import JOB, at_once, claim, offer, report, submit

from zndraw_joblib import JobLibSettings, get_joblib_settings, get_tsio
from zndraw_joblib.database import execute
from zndraw_joblib.delivery import Delivery, Transports, runtime_of
from zndraw_joblib.events import Outbox
from zndraw_joblib.models import Job
from zndraw_joblib.waiting import Waiters

HANG = 30


def through(app: Any, user: User) -> User:
    """Return the user's client of an app that stands behind a middleware."""
    return User(transport=httpx.ASGITransport(app), base_url=user.base_url, headers=user.headers)


def states(events: list[Sent], task: str | None = None) -> list[str]:
    return [
        sent.data["status"]
        for sent in events
        if sent.event == "task_status_event" and task in (None, sent.data["id"])
    ]


async def drained(app: FastAPI) -> None:
    await runtime_of(app).delivery.drain(HANG)


@pytest.mark.parametrize("way", ["fails", "is cancelled", "is cancelled natively"])
@pytest.mark.parametrize("at", [1, 3, 5, 7, 10])
async def test_events_are_those_of_commits(app, ada, events, way, at):
    """Whenever a request dies: what it committed is told, and nothing else."""
    await offer(ada)
    events.clear()

    async def dying(scope: Any, receive: Any, send: Any) -> None:
        async def failing(message: Any) -> None:
            if at >= 10:
                raise anyio.ClosedResourceError
            await send(message)

        if way == "fails":
            await app(scope, receive, failing)
        elif way == "is cancelled":
            with anyio.CancelScope() as scope_:
                asyncio.get_running_loop().call_later(at / 400, scope_.cancel)
                await app(scope, receive, send)
        else:
            running = asyncio.ensure_future(app(scope, receive, send))
            await asyncio.wait([running], timeout=at / 400)
            running.cancel()
            await asyncio.wait([running])

    with anyio.fail_after(HANG):
        with contextlib.suppress(anyio.ClosedResourceError, AssertionError):
            await through(dying, ada).post(f"/rooms/lab/tasks/{JOB}", json={})
        await drained(app)
    listed = (await ada.get("/rooms/lab/tasks")).json()["total"]
    assert states(events) == ["pending"] * listed
    if at >= 10 and way == "fails":
        assert listed == 1


class Slow:
    """A Socket.IO server that takes long for what comes first."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    async def emit(self, event: str, data: Any, *, room: str) -> None:
        if event == "task_status_event":
            for _ in range({"pending": 20, "claimed": 40}.get(data["status"], 1)):
                await checkpoint()
            self.told.append((data["id"], data["status"]))


async def test_events_leave_in_the_order_of_commits(app, ada):
    app.state.tsio = tsio = Slow()
    worker = await offer(ada)

    async def life() -> None:
        (task,) = await claim(ada, worker)
        for status in ("running", "completed"):
            assert (await report(ada, task, status)).status_code == 200

    tasks = [await submit(ada) for _ in range(4)]
    await at_once(*(life() for _ in tasks))
    await drained(app)
    for task in tasks:
        told = [status for task_id, status in tsio.told if task_id == task["id"]]
        assert told == ["pending", "claimed", "running", "completed"]


@pytest.mark.parametrize("hangs", [False, True])
async def test_what_queues_up_leaves_and_waits_for_a_server_that_hangs_once(hangs):
    asked = []

    class Server:
        async def emit(self, event: str, data: Any, *, room: str) -> None:
            asked.append(room)
            if hangs:
                await anyio.sleep_forever()

    transports = Transports(JobLibSettings(dispatch_timeout_seconds=0.1), Server())
    delivery = Delivery(Waiters())
    for room in "abc":
        outbox = Outbox()
        outbox.jobs_changed([room])
        left = delivery.publish(outbox, transports)
    with anyio.fail_after(HANG):
        await left
    assert asked == ["room:a", "room:b", "room:c"][: 1 if hangs else None]


@pytest.mark.makers("plain")
async def test_who_waits_in_another_app_takes_no_turn(app, ada):
    """Nor does one whose event loop is closed."""
    from host import create_app

    app.state.joblib_settings = JobLibSettings(recheck_seconds=1000)
    key = [f"job:{JOB}"]

    async def elsewhere() -> Any:
        waiting = runtime_of(app).waiters.waiting_for(key)
        waiting.__enter__()
        return waiting

    # kept: else it would leave by itself
    dead = await asyncio.to_thread(asyncio.run, elsewhere())
    worker = await offer(ada)
    with anyio.fail_after(HANG), runtime_of(create_app()).waiters.waiting_for(key):
        async with anyio.create_task_group() as group:

            async def wait() -> None:
                url, wait = "/tasks/claim", {"Prefer": f"wait={HANG}"}
                body = {"worker_id": worker}
                answer = await ada.post(url, json=body, headers=wait)
                assert answer.json()["task"]

            group.start_soon(wait)
            while len(runtime_of(app).waiters) < 2:
                await anyio.sleep(0.01)
            await anyio.sleep(0.1)
            await submit(ada)
    dead.__exit__(None, None, None)


@pytest.mark.makers("plain")
async def test_a_draining_claim_takes_no_turn(app, ada, session_maker):
    """It passes on what it was woken for."""
    app.state.joblib_settings = JobLibSettings(recheck_seconds=1000)
    draining, working = await offer(ada), await offer(ada)
    answers: dict[str, Any] = {}

    async def wait(worker: str) -> None:
        url, wait = "/tasks/claim", {"Prefer": f"wait={HANG}"}
        answer = await ada.post(url, json={"worker_id": worker}, headers=wait)
        answers[worker] = answer.json()["task"]

    with anyio.fail_after(HANG):
        async with anyio.create_task_group() as group:
            for n, worker in enumerate((draining, working), 1):
                group.start_soon(wait, worker)
                while len(runtime_of(app).waiters) < n:
                    await anyio.sleep(0.01)
                await anyio.sleep(0.1)
            # elsewhere: nobody here is told that it drains
            from sqlalchemy import text

            async with session_maker() as session:
                await session.execute(
                    text("UPDATE worker SET state = 'draining' WHERE id = :id"),
                    {"id": draining.replace("-", "")},
                )
                await session.commit()
            await submit(ada)
    assert answers[draining] is None
    assert answers[working] is not None


def overrides(value: Any) -> list[Callable[..., Any]]:
    async def with_request(request: Any) -> Any:
        assert request.headers
        return value

    async def bare() -> Any:
        return value

    return [with_request, bare, lambda request: value, lambda: value]


@pytest.mark.makers("plain")
@pytest.mark.parametrize("shape", range(4))
async def test_overrides_of_any_shape(app, ada, shape):
    tsio, settings = Slow(), JobLibSettings(max_payload_bytes=300)
    app.dependency_overrides[get_tsio] = overrides(tsio)[shape]
    await offer(ada)
    task = await submit(ada)
    await drained(app)
    assert tsio.told == [(task["id"], "pending")]
    app.dependency_overrides[get_joblib_settings] = overrides(settings)[shape]
    answer = await ada.post(f"/rooms/lab/tasks/{JOB}", json={"payload": {"text": 300 * "x"}})
    assert answer.status_code == 413


@pytest.mark.makers("plain")
async def test_what_fails_for_good_is_no_503(app, ada, caplog):
    """And what a client sent stands in no log."""
    secret = "hunter2"

    async def broken() -> Any:
        raise FileNotFoundError("the host's own")

    await offer(ada)
    async with app.state.session_maker() as session:
        from sqlalchemy import text

        await session.execute(text("ALTER TABLE task RENAME TO gone"))
        await session.commit()
    body = {"payload": {"password": secret}}
    with pytest.raises(Exception, match="no such table") as failed:
        await ada.post(f"/rooms/lab/tasks/{JOB}", json=body)
    printed = "".join(traceback.format_exception(failed.value))
    assert "routes_tasks" in printed
    assert secret not in printed + caplog.text
    app.dependency_overrides[get_tsio] = broken
    with pytest.raises(FileNotFoundError):
        await ada.get("/workers")


class Unspeakable:
    def __repr__(self) -> str:
        return "hunter2"


@pytest.mark.parametrize(
    "values",
    [{"name": None}, {"schema": "hunter2"}, {"schema": Unspeakable()}, {"id": "hunter2"}],
    ids=["a column is empty", "twice", "no JSON", "of another type"],
)
async def test_a_failing_statement_shows_no_values(session_maker, values):
    """Whoever logs it, and however."""
    row = {"room_id": "hunter2", "category": "a", "name": "b", "deleted": False}
    statement = insert(Job).values({**row, **values})
    async with session_maker() as session:
        if values == {"schema": "hunter2"}:
            await execute(session, statement)
        with pytest.raises(StatementError) as failed:
            await execute(session, statement)
    shown = traceback.format_exception(failed.value)
    assert "hunter2" not in "".join([*shown, repr(failed.value)])

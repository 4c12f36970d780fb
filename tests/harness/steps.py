"""Steps of a task's life over REST, as users and workers take them."""

from collections.abc import Awaitable, Callable, Iterable
from typing import Any
from uuid import UUID

import anyio
import httpx
from conftest import User
from makers import SessionMaker
from sqlalchemy import Executable, Select, func, select, text, update
from sqlalchemy.ext.asyncio import AsyncSession

from zndraw_joblib.exceptions import PROBLEM_JSON
from zndraw_joblib.models import Job, ProviderRecord, Task, Worker, WorkerJobLink, now

JOB = "lab:modifiers:Rotate"
BLOCKED = text("SELECT count(DISTINCT pid) FROM pg_locks WHERE NOT granted")

#: Holds rows until its transaction ends.
Hold = Callable[[AsyncSession], Awaitable[Any]]


async def register(
    user: User, name: str = "Rotate", room: str = "lab", **fields: Any
) -> httpx.Response:
    body = {"category": "modifiers", "name": name, "schema": {}, **fields}
    return await user.put(f"/rooms/{room}/jobs", json=body)


async def offer(user: User, name: str = "Rotate", room: str = "lab", **fields: Any) -> str:
    """Register a job and return the id of the worker that serves it."""
    answer = await register(user, name, room, **fields)
    assert answer.status_code in (200, 201), answer.text
    return answer.json()["worker_id"]


async def submit(user: User, job: str = JOB, room: str = "lab", **fields: Any) -> Any:
    answer = await user.post(f"/rooms/{room}/tasks/{job}", json=fields)
    assert answer.status_code == 202, answer.text
    return answer.json()


async def claim(user: User, worker: str, **fields: Any) -> list[Any]:
    answer = await user.post("/tasks/claim", json={"worker_id": worker, **fields})
    assert answer.status_code == 200, answer.text
    tasks = answer.json()["tasks"]
    assert answer.json()["task"] == (tasks[0] if tasks else None)
    return tasks


async def report(user: User, task: Any, status: str, **fields: Any) -> httpx.Response:
    return await user.patch(f"/tasks/{task['id']}", json={"status": status, **fields})


async def read(user: User, task: Any) -> Any:
    answer = await user.get(f"/tasks/{task['id']}")
    assert answer.status_code == 200, answer.text
    return answer.json()


async def move(user: User, worker: str, task: Any, status: str) -> Any:
    """Bring a pending task to a state; the user owns the worker."""
    if status == "cancelled":
        await report(user, task, "cancelled")
    elif status != "pending":
        (claimed,) = await claim(user, worker)
        assert claimed["id"] == task["id"]
        if status != "claimed":
            await report(user, task, "running")
        if status in ("completed", "failed"):
            await report(user, task, status)
    moved = await read(user, task)
    assert moved["status"] == status
    return moved


def problem(answer: httpx.Response, status: int, kind: str) -> Any:
    """Return the body of a problem, after a look at what it claims to be."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == PROBLEM_JSON
    body = answer.json()
    assert body["status"] == status
    assert body["type"] == f"/v1/problems/{kind}"
    assert body["title"]
    assert body["detail"]
    return body


async def at_once(*requests: Awaitable[Any]) -> list[Any]:
    """Send requests side by side and return their answers in order."""
    answers: list[Any] = [None] * len(requests)

    async def send(n: int, request: Awaitable[Any]) -> None:
        answers[n] = await request

    async with anyio.create_task_group() as tasks:
        for n, request in enumerate(requests):
            tasks.start_soon(send, n, request)
    return answers


async def meet(
    session_maker: SessionMaker, hold: Hold, *requests: Callable[[], Awaitable[Any]]
) -> list[Any]:
    """Send requests one after the other while ``hold`` stands in their way.

    On PostgreSQL alone: it says who waits for a lock.
    """
    answers: dict[int, Any] = {}

    async def send(at: int, request: Callable[[], Awaitable[Any]]) -> None:
        answers[at] = await request()

    with anyio.fail_after(120):
        async with anyio.create_task_group() as group, session_maker() as holder:
            await hold(holder)
            for at, request in enumerate(requests):
                group.start_soon(send, at, request)
                while len(answers) + await holder.scalar(BLOCKED) <= at:
                    await anyio.sleep(0.005)
            await holder.commit()
    return [answers[at] for at in sorted(answers)]


def locking(rows: Select[Any]) -> Hold:
    return lambda session: session.execute(rows.with_for_update())


def row(table: Any, id_: str) -> Hold:
    return locking(select(table.id).where(table.id == UUID(id_)))


def statuses(answers: Iterable[httpx.Response]) -> list[int]:
    return sorted(answer.status_code for answer in answers)


async def stored(session_maker: SessionMaker) -> dict[str, int]:
    """Return how many rows each table holds."""
    counts = {}
    async with session_maker() as session:
        for table in (Job, Worker, WorkerJobLink, ProviderRecord, Task):
            counting = select(func.count()).select_from(table)
            counts[table.__tablename__] = await session.scalar(counting)
    return counts


async def execute(session_maker: SessionMaker, *statements: Executable) -> None:
    async with session_maker() as session:
        for statement in statements:
            await session.execute(statement)
        await session.commit()


async def silence(session_maker: SessionMaker, *workers: str) -> None:
    """Let an hour pass in which nothing was heard of workers."""
    await execute(
        session_maker,
        update(Worker).where(Worker.id.in_(map(UUID, workers))).values(last_heartbeat=now(-3600)),
    )

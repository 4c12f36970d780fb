"""Races, forced: requests meet on the same rows of PostgreSQL, in either order.

The test holds rows that all of them need, sends the first request, waits until PostgreSQL
says that it waits for a lock (or until it is answered), sends the next, and lets go.
"""

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any
from uuid import UUID

import pytest
import steps
from conftest import Sent, User
from makers import SessionMaker
from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncSession
from steps import (
    JOB,
    Hold,
    at_once,
    execute,
    locking,
    move,
    offer,
    read,
    report,
    row,
    submit,
)

from zndraw_joblib import sweeper, workers
from zndraw_joblib.events import Outbox
from zndraw_joblib.models import Job, Task, Worker, WorkerJobLink, now
from zndraw_joblib.settings import JobLibSettings
from zndraw_joblib.sweeper import cleanup_overdue_attempts, cleanup_stale_workers
from zndraw_joblib.workers import Caller

pytestmark = pytest.mark.makers("postgres")

Meet = Callable[..., Awaitable[list[Any]]]
in_either_order = pytest.mark.parametrize("step", [1, -1], ids=["", "reversed"])


@pytest.fixture
def meet(session_maker: SessionMaker) -> Meet:
    return partial(steps.meet, session_maker)


def links(worker: str) -> Hold:
    """Hold what goes after its worker is locked."""
    return locking(
        select(WorkerJobLink.job_id).where(WorkerJobLink.worker_id == UUID(worker))
    )


def told(events: list[Sent], task: Any) -> list[str]:
    return [
        e.data["status"]
        for e in events
        if e.event == "task_status_event" and e.data["id"] == task["id"]
    ]


async def job_of(user: User) -> Any:
    """Return the job as its room sees it, or None."""
    jobs = (await user.get("/rooms/lab/jobs")).json()["items"]
    return next((job for job in jobs if job["full_name"] == JOB), None)


async def job_row(user: User) -> Hold:
    return row(Job, (await user.get(f"/rooms/lab/jobs/{JOB}")).json()["id"])


def codes(answers: list[Any]) -> list[int]:
    return [answer.status_code for answer in answers]


# --- reports ---


@in_either_order
@pytest.mark.parametrize("rival", ["cancelled", "failed"])
async def test_of_two_ends_the_first_stands(ada, bob, events, meet, rival, step):
    worker = await offer(ada)
    task = await move(ada, worker, await submit(bob), "running")
    user = bob if rival == "cancelled" else ada
    ends = ("completed", rival)[::step]
    reports = {
        "completed": lambda: report(ada, task, "completed", attempt=1),
        rival: lambda: report(user, task, rival),
    }
    answers = await meet(row(Task, task["id"]), *(reports[end] for end in ends))
    assert codes(answers) == [200, 409]
    assert (await read(ada, task))["status"] == ends[0]
    assert told(events, task) == ["pending", "claimed", "running", ends[0]]


async def test_of_two_starts_both_are_answered_and_one_is_told(ada, events, meet):
    task = await move(ada, await offer(ada), await submit(ada), "claimed")
    start = lambda: report(ada, task, "running", attempt=1)  # noqa: E731
    answers = await meet(row(Task, task["id"]), start, start)
    assert codes(answers) == [200, 200]
    assert answers[0].json() == answers[1].json()
    assert told(events, task) == ["pending", "claimed", "running"]


async def test_of_two_retries_one_counts(ada, events, meet):
    task = await move(ada, await offer(ada), await submit(ada), "failed")
    retry = lambda: ada.post(f"/tasks/{task['id']}/retry")  # noqa: E731
    answers = await meet(row(Task, task["id"]), retry, retry)
    assert codes(answers) == [202, 409]
    assert told(events, task)[-2:] == ["failed", "pending"]


# --- workers that go ---


@in_either_order
async def test_a_claim_and_the_end_of_its_worker(ada, events, meet, step):
    await offer(ada)  # keeps the job
    worker, task = await offer(ada), await submit(ada)
    requests = [
        lambda: ada.post("/tasks/claim", json={"worker_id": worker}),
        lambda: ada.delete(f"/workers/{worker}"),
    ]
    answers = await meet(row(Worker, worker), *requests[::step])
    if step == 1:
        assert codes(answers) == [200, 204]
        assert told(events, task) == ["pending", "claimed", "failed"]
    else:
        assert codes(answers) == [204, 404]
        assert told(events, task) == ["pending"]
    assert (await read(ada, task))["status"] == told(events, task)[-1]


@in_either_order
async def test_a_completion_and_the_end_of_its_worker(ada, events, meet, step):
    worker = await offer(ada)
    task = await move(ada, worker, await submit(ada), "running")
    requests = [
        lambda: report(ada, task, "completed", attempt=1),
        lambda: ada.delete(f"/workers/{worker}"),
    ]
    answers = await meet(row(Worker, worker), *requests[::step])
    assert codes(answers) == ([200, 204] if step == 1 else [204, 409])
    last = "completed" if step == 1 else "failed"
    assert told(events, task) == ["pending", "claimed", "running", last]


async def silence(session_maker: SessionMaker) -> None:
    await execute(session_maker, update(Worker).values(last_heartbeat=now(-3600)))


async def test_a_heartbeat_under_way_saves_its_worker(ada, session_maker, meet):
    worker = await offer(ada)
    task = await move(ada, worker, await submit(ada), "running")
    await silence(session_maker)
    beat, lost = await meet(
        row(Worker, worker),
        lambda: ada.patch(f"/workers/{worker}"),
        lambda: cleanup_stale_workers(session_maker),
    )
    assert (beat.status_code, lost) == (200, 0)
    assert (await read(ada, task))["status"] == "running"


async def test_a_heartbeat_after_the_sweep_learns_of_it(ada, session_maker, meet):
    worker = await offer(ada)
    task = await move(ada, worker, await submit(ada), "running")
    await silence(session_maker)
    lost, beat = await meet(
        links(worker),
        lambda: cleanup_stale_workers(session_maker),
        lambda: ada.patch(f"/workers/{worker}"),
    )
    assert (lost, beat.status_code) == (1, 404)
    assert (await read(ada, task))["error_type"] == "worker_lost"


async def test_three_sweepers_tell_each_loss_once(
    ada, session_maker, tsio, events, meet
):
    owned = [await offer(ada) for _ in range(5)]
    tasks = [await move(ada, w, await submit(ada), "running") for w in owned]
    await silence(session_maker)

    async def sweep() -> int:
        return await cleanup_stale_workers(session_maker, tsio=tsio)

    assert await meet(links(owned[2]), sweep, sweep, sweep) == [5, 0, 0]
    for task in tasks:
        assert told(events, task) == ["pending", "claimed", "running", "failed"]


@pytest.mark.parametrize("state", ["claimed", "running"])
async def test_three_sweepers_end_each_attempt_once(
    ada, session_maker, tsio, events, state
):
    worker = await offer(
        ada, start_timeout_seconds=60, timeout_seconds=60, max_attempts=2
    )
    tasks = [await move(ada, worker, await submit(ada), state) for _ in range(20)]
    await execute(session_maker, update(Task).values(deadline_at=now(-1)))
    ended = await at_once(
        *(cleanup_overdue_attempts(session_maker, tsio=tsio) for _ in range(3))
    )
    assert sum(ended) == len(tasks)
    for task in tasks:
        assert told(events, task)[-2:] == [state, "pending"]


async def test_a_start_under_way_is_not_taken_back(ada, session_maker, meet):
    worker = await offer(ada, start_timeout_seconds=60)
    task = await move(ada, worker, await submit(ada), "claimed")
    await execute(session_maker, update(Task).values(deadline_at=now(-1)))
    started, taken = await meet(
        row(Task, task["id"]),
        lambda: report(ada, task, "running", attempt=1),
        lambda: cleanup_overdue_attempts(session_maker),
    )
    assert (started.status_code, taken) == (200, 0)
    assert (await read(ada, task))["status"] == "running"


# --- jobs that nobody serves ---


@in_either_order
async def test_a_registration_and_the_end_of_the_last_worker(ada, bob, meet, step):
    worker = await offer(ada)
    requests = [lambda: offer(bob), lambda: ada.delete(f"/workers/{worker}")]
    answers = await meet(await job_row(ada), *requests[::step])
    (bobs,) = [answer for answer in answers if isinstance(answer, str)]
    assert (await job_of(ada))["workers"] == [bobs]


@in_either_order
@pytest.mark.parametrize("what", ["submission", "retry"])
async def test_a_task_and_the_end_of_the_last_worker(ada, meet, what, step):
    worker = await offer(ada)
    done = await move(ada, worker, await submit(ada), "completed")
    url = {
        "submission": f"/rooms/lab/tasks/{JOB}",
        "retry": f"/tasks/{done['id']}/retry",
    }
    requests = [
        lambda: ada.post(url[what], json={}),
        lambda: ada.delete(f"/workers/{worker}"),
    ]
    answers = await meet(await job_row(ada), *requests[::step])
    assert codes(answers) == ([202, 204] if step == 1 else [204, 404])
    waiting = (await ada.get("/rooms/lab/tasks?status=pending&limit=0")).json()["total"]
    assert (await job_of(ada) is not None, waiting) == (step == 1, step == 1)


async def test_the_last_two_workers_go_at_once(ada, meet):
    first, second = await offer(ada), await offer(ada)

    async def retire_first(session: AsyncSession) -> None:
        caller = Caller(ada.id, is_superuser=False)
        gone = await workers.retire(session, UUID(first), caller)
        await sweeper.retire(session, gone, JobLibSettings(), Outbox())

    # neither sees that the other's link goes: one has to wait for the other
    (gone,) = await meet(retire_first, lambda: ada.delete(f"/workers/{second}"))
    assert gone.status_code == 204
    assert await job_of(ada) is None

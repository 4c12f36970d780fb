"""Races, forced: requests meet in the middle of what they do, in every order.

On PostgreSQL the test holds rows that all of them need, sends the first request, waits
until PostgreSQL says that it waits for a lock, sends the next, and lets go. On SQLite each
is stopped before its first write until the others are there too.
"""

from functools import partial
from typing import Any
from uuid import UUID

import pytest
import races
import steps
from conftest import Sent
from races import NAMES, ORDERS, Race, Scene, links
from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from steps import at_once, execute, read, report, row, silence

from zndraw_joblib import sweeper, workers
from zndraw_joblib.events import Outbox
from zndraw_joblib.models import Task, Worker, now
from zndraw_joblib.settings import JobLibSettings
from zndraw_joblib.sweeper import cleanup_idle_jobs, cleanup_overdue_attempts, cleanup_stale_workers
from zndraw_joblib.workers import Caller

pytestmark = pytest.mark.makers("plain", "postgres")


@pytest.fixture
def scene(
    ada: Any, bob: Any, events: list[Sent], session_maker: Any, engine: AsyncEngine, maker: str
) -> Scene:
    async def hears(task: Any, *states: str) -> None:
        assert [
            e.data["status"]
            for e in events
            if e.event == "task_status_event" and e.data["id"] == task["id"]
        ] == [*states]

    if maker == "postgres":
        meet = partial(steps.meet, session_maker)
    else:
        meet = partial(races.meet_before_writes, engine)
    return Scene(ada, ada, bob, "lab", session_maker, meet, hears)


@pytest.mark.parametrize(("race", "first"), ORDERS, ids=NAMES)
async def test_race(scene: Scene, race: Race, first: int):
    await races.run(race, first, scene)


# --- the sweeper's ---


async def test_a_heartbeat_under_way_saves_its_worker(scene):
    worker = await scene.offer()
    task = await scene.task(worker, "running")
    await silence(scene.session_maker, worker)
    beat, lost = await scene.meet(
        row(Worker, worker),
        lambda: scene.ada.patch(f"/workers/{worker}"),
        lambda: cleanup_stale_workers(scene.session_maker),
    )
    assert (beat.status_code, lost) == (200, 0)
    assert (await read(scene.ada, task))["status"] == "running"
    await races.intact(scene)


async def test_a_heartbeat_after_the_sweep_learns_of_it(scene):
    worker = await scene.offer()
    task = await scene.task(worker, "running")
    await silence(scene.session_maker, worker)
    lost, beat = await scene.meet(
        links(worker),
        lambda: cleanup_stale_workers(scene.session_maker),
        lambda: scene.ada.patch(f"/workers/{worker}"),
    )
    assert (lost, beat.status_code) == (1, 404)
    assert (await read(scene.ada, task))["error_type"] == "worker_lost"
    await races.intact(scene)


async def test_three_sweepers_tell_each_loss_once(scene, tsio):
    owned = [await scene.offer() for _ in range(5)]
    tasks = [await scene.task(worker, "running") for worker in owned]
    await silence(scene.session_maker, *owned)
    sweep = partial(cleanup_stale_workers, scene.session_maker, tsio=tsio)
    assert await scene.meet(links(owned[2]), sweep, sweep, sweep) == [5, 0, 0]
    for task in tasks:
        await scene.hears(task, "pending", "claimed", "running", "failed")
    await races.intact(scene)


@pytest.mark.parametrize("state", ["claimed", "running"])
async def test_three_sweepers_end_each_attempt_once(scene, tsio, state):
    worker = await scene.offer(start_timeout_seconds=60, timeout_seconds=60, max_attempts=2)
    tasks = [await scene.task(worker, state) for _ in range(8)]
    await execute(scene.session_maker, update(Task).values(deadline_at=now(-1)))
    ended = await at_once(
        *(cleanup_overdue_attempts(scene.session_maker, tsio=tsio) for _ in range(3))
    )
    assert sum(ended) == len(tasks)
    course = ["pending", "claimed", "running"]
    for task in tasks:
        told = course[: course.index(state) + 1]
        await scene.hears(task, *told, "pending")


async def test_a_start_under_way_is_not_taken_back(scene):
    worker = await scene.offer(start_timeout_seconds=60)
    task = await scene.task(worker, "claimed")
    await execute(scene.session_maker, update(Task).values(deadline_at=now(-1)))
    started, taken = await scene.meet(
        row(Task, task["id"]),
        lambda: report(scene.ada, task, "running", attempt=1),
        lambda: cleanup_overdue_attempts(scene.session_maker),
    )
    assert (started.status_code, taken) == (200, 0)
    assert (await read(scene.ada, task))["status"] == "running"


@pytest.mark.parametrize("first", [0, 1])
async def test_a_submission_and_the_sweep_of_its_idle_job(scene, first):
    worker = await scene.offer()
    task, hold = await scene.task(worker), await scene.job_row()
    await scene.ada.delete(f"/workers/{worker}")
    # the last that waited: from now on the job is idle
    await report(scene.bob, task, "cancelled")
    url = f"/rooms/{scene.room}/tasks/{scene.job}"
    requests = [
        partial(scene.bob.post, url, json={}),
        partial(cleanup_idle_jobs, scene.session_maker),
    ]
    answers = await scene.meet(hold, *races.turned(requests, first))
    submitted, swept = races.turned(answers, first)
    # a sweep that comes first may pass over a job that somebody holds
    assert (submitted.status_code, swept) in ((202, 0), (404, 1))
    await races.intact(scene)


@pytest.mark.makers("postgres")
async def test_the_last_two_workers_go_in_transactions_side_by_side(scene):
    first, second = await scene.offer(), await scene.offer()

    async def retire_first(session: AsyncSession) -> None:
        caller = Caller(scene.ada.id, is_superuser=False)
        chosen = workers.commanded(UUID(first), caller)
        assert await sweeper.retire(session, chosen, JobLibSettings(), Outbox()) == 1

    # neither sees that the other's link goes: one has to wait for the other
    (gone,) = await scene.meet(retire_first, lambda: scene.ada.delete(f"/workers/{second}"))
    assert gone.status_code == 204
    assert await scene.found() is None

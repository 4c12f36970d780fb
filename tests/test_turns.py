"""Turns: what each of several users waits for, simulated over the real statements."""

from collections.abc import Callable
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import update
from steps import JOB, execute, offer

from zndraw_joblib import claims, reports, submissions
from zndraw_joblib.models import Task, now
from zndraw_joblib.schemas import TaskSubmitRequest, TaskUpdateRequest
from zndraw_joblib.settings import JobLibSettings
from zndraw_joblib.workers import Caller

SETTINGS = JobLibSettings()


class Queue:
    """One job's queue, without the way over HTTP."""

    def __init__(self, session_maker: Any, worker: str, owner: Any) -> None:
        self.session_maker = session_maker
        self.worker, self.owner = UUID(worker), Caller(owner.id, False)

    async def submit(self, user: Any, count: int = 1, **fields: Any) -> list[UUID]:
        submission = (
            *("lab", JOB, Caller(user.id, False)),
            [TaskSubmitRequest(**fields)] * count,
            *(SETTINGS, lambda target: True),
        )
        async with self.session_maker() as session:
            batch = await submissions.submit(session, *submission)
            await session.commit()
        return batch.ids

    async def claim(self) -> Any:
        """Return the next task, or None."""
        async with self.session_maker() as session:
            claim = await claims.claim(session, self.worker, self.owner, SETTINGS, limit=1)
            await session.commit()
        return next(iter(claim.tasks), None)

    async def hand_back(self, task_id: UUID) -> None:
        async with self.session_maker() as session:
            release = TaskUpdateRequest(status="pending")
            await reports.report(session, {task_id: release}, self.owner, nobody, SETTINGS)
            await session.commit()

    async def turns(self, count: int, after_each: Callable[[Any], Any]) -> list[UUID]:
        """Return whose the next tasks are."""
        served = []
        for _ in range(count):
            task = await self.claim()
            served.append(task.created_by_id)
            await after_each(task)
        return served


async def nobody(*args: Any) -> bool:
    return False


async def idle(task: Any) -> None:
    pass


@pytest.fixture
async def queue(session_maker, ada):
    return Queue(session_maker, await offer(ada), ada)


async def test_who_has_one_task_waits_for_no_flood(queue, ada, bob):
    await queue.submit(ada, 200)
    waited, turn, since = [], 0, {}

    async def one_now_and_then(task):
        nonlocal turn
        turn += 1
        if task.id in since:
            waited.append(turn - since.pop(task.id))
        if turn % 20 == 1:
            (new,) = await queue.submit(bob)
            since[new] = turn

    await queue.turns(100, one_now_and_then)
    assert len(waited) == 5
    # for the first of the queue, the one after it, and its own
    assert max(waited) <= 3


async def test_those_with_one_at_a_time_starve_no_flood(queue, ada, bob, admin, register):
    users = {user.id: user for user in (bob, admin, await register("eve"))}
    await queue.submit(ada, 40)
    for user in users.values():
        await queue.submit(user)

    async def next_one(task):
        if user := users.get(task.created_by_id):
            await queue.submit(user)

    served = await queue.turns(40, next_one)
    for user_id in (ada.id, *users):
        assert 7 <= served.count(user_id) <= 15


async def test_what_comes_back_is_served_soon_and_lets_nobody_pass(
    queue, ada, bob, admin, session_maker
):
    """A place from long ago is no door for those who come now."""
    (old,) = await queue.submit(bob)
    late = await queue.submit(bob, 3, delay_seconds=3600)
    assert (await queue.claim()).id == old
    flood = await queue.submit(ada, 12)
    await queue.hand_back(old)
    await execute(
        session_maker, update(Task).where(Task.available_at.is_not(None)).values(available_at=now())
    )
    assert (await queue.claim()).id == old
    for user in (bob, admin):
        await queue.submit(user)

    async def next_one(task):
        if task.created_by_id in (bob.id, admin.id) and task.id not in late:
            await queue.submit(bob if task.created_by_id == bob.id else admin)

    served = await queue.turns(24, next_one)
    # three were due before, and then all have their turns
    assert served[:3] == [bob.id] * 3
    assert served.count(ada.id) >= 6
    assert len(flood) == 12


@pytest.mark.parametrize("priority", [0, -3])
async def test_for_one_user_it_is_first_in_first_out(queue, ada, bob, priority):
    ids = []
    for count in (3, 1, 2, 1):
        ids += await queue.submit(ada, count, priority=priority)
    held = [(await queue.claim()).id for _ in range(4)]
    for task_id in reversed(held):
        await queue.hand_back(task_id)
    ids += await queue.submit(ada, 2, priority=priority)
    assert [(await queue.claim()).id for _ in ids] == ids
    # an empty queue begins behind all that was
    ids = [*await queue.submit(ada, 2), *await queue.submit(ada)]
    assert [(await queue.claim()).id for _ in ids] == ids
    assert await queue.claim() is None

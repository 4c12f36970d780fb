"""Sweeps over `@internal` and ordinary tasks together: a model says what each changes.

Every state that a task can be in stands in one table, and each pass meets all of them.
"""

from datetime import UTC, datetime, timedelta
from itertools import product
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import pytest
from sqlalchemy import insert, select
from steps import JOB, offer, silence

from zndraw_joblib import sweeper
from zndraw_joblib.models import Job, Task
from zndraw_joblib.registry import ensure_internal_jobs
from zndraw_joblib.settings import JobLibSettings

ECHO = "@internal:modifiers:Echo"
REDISPATCH, TIMEOUT = 60, 3600
SETTINGS = JobLibSettings(
    internal_redispatch_seconds=REDISPATCH,
    internal_task_timeout_seconds=TIMEOUT,
    # also those that ended years ago
    task_retention_seconds={},
)
#: seconds from now
PAST, FUTURE = -10, 1000
AGES = (5, 2 * REDISPATCH + 5, TIMEOUT + 5)


class Echo:
    category = "modifiers"

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]:
        return {"type": "object"}


class Case(NamedTuple):
    """A task as it is before a sweep; moments are seconds from now."""

    internal: bool
    status: str
    worker: str | None = None
    deadline: int | None = None
    available: int | None = None
    age: int = 5
    max_attempts: int = 1
    dispatches: int = 1


class After(NamedTuple):
    """What of a task a sweep may change."""

    status: str
    error_type: str | None = None
    attempt: int = 1
    failed_attempts: int = 0
    has_worker: bool = False
    dispatches: int = 1


ENDED = ("completed", "failed", "cancelled")
CASES = [
    *(
        Case(internal, "pending", available=at, max_attempts=most)
        for internal, at, most in product((False, True), (None, PAST, FUTURE), (1, 3))
    ),
    *(
        Case(False, status, worker, deadline, None, age, most)
        for status, worker, deadline, age, most in product(
            ("claimed", "running"), ("alive", "silent", "gone"), (None, PAST, FUTURE), AGES, (1, 3)
        )
    ),
    *(
        Case(True, status, None, deadline, None, age, most, dispatches)
        for status, deadline, age, most, dispatches in product(
            ("claimed", "running"), (None, PAST, FUTURE), AGES, (1, 3), (1, 2)
        )
    ),
    *(
        Case(internal, status, worker, None, None, age)
        for internal, status, age in product((False, True), ENDED, AGES)
        for worker in ([None] if internal else ["alive", "silent", "gone", None])
    ),
]


def unchanged(case: Case) -> After:
    return After(case.status, None, 1, 0, case.worker is not None, case.dispatches)


def ended(case: Case, error_type: str) -> After:
    again = case.max_attempts > 1
    status = "pending" if again else "failed"
    keeps = case.worker is not None and not again
    return After(status, error_type, 1, 1, keeps, case.dispatches)


def after_stale_workers(case: Case) -> tuple[After, bool]:
    """Return what becomes of a task, and whether a message is sent."""
    held = case.status in ("claimed", "running")
    lost = held and case.worker == "silent"
    return ended(case, "worker_lost") if lost else unchanged(case), False


def after_overdue_attempts(case: Case) -> tuple[After, bool]:
    if case.internal or case.status not in ("claimed", "running"):
        return unchanged(case), False
    if case.deadline == PAST:
        if case.status == "running":
            return ended(case, "timeout"), False
        return unchanged(case)._replace(status="pending", has_worker=False), False
    if case.worker == "gone":
        return ended(case, "worker_lost"), False
    return unchanged(case), False


def after_stuck_internal_tasks(case: Case) -> tuple[After, bool]:
    sent = After("claimed", None, 2, 0, has_worker=False, dispatches=1)
    if not case.internal or case.status in ENDED:
        return unchanged(case), False
    if case.status == "pending":
        waits = case.available == FUTURE
        return (unchanged(case), False) if waits else (sent, True)
    if case.age > TIMEOUT:
        if case.max_attempts == 1:
            return ended(case, "timeout"), False
        return sent._replace(error_type="timeout", failed_attempts=1), True
    if (
        case.status == "claimed"
        and case.deadline == PAST
        # the second message of a young attempt waits longer than the first
        and (case.dispatches == 1 or case.age > 2 * REDISPATCH)
    ):
        return unchanged(case)._replace(dispatches=case.dispatches + 1), True
    return unchanged(case), False


def after_nothing(case: Case) -> tuple[After, bool]:
    return unchanged(case), False


class Broker:
    def __init__(self) -> None:
        self.sent: list[UUID] = []

    def __contains__(self, name: object) -> bool:
        return name == ECHO

    async def send(self, name: str, *, task_id: str, **message: Any) -> None:
        assert name == ECHO
        self.sent.append(UUID(task_id))


async def fill(session_maker, jobs, workers) -> dict[UUID, Case]:
    """Write a row for each case, without the statements under test."""
    here = datetime.now(UTC)

    def at(seconds: int | None) -> datetime | None:
        return None if seconds is None else here + timedelta(seconds=seconds)

    rows = {uuid4(): case for case in CASES}
    values = []
    for place, (id_, case) in enumerate(rows.items()):
        began, pending = at(-case.age), case.status == "pending"
        values.append(
            {
                "id": id_,
                "job_id": jobs[case.internal],
                "job_name": ECHO if case.internal else JOB,
                "room_id": "lab",
                "payload": {},
                "status": case.status.upper(),
                "queue_order": place,
                "attempt": 1,
                "max_attempts": case.max_attempts,
                "worker_id": workers.get(case.worker),
                "available_at": at(case.available),
                "deadline_at": at(case.deadline),
                "claimed_at": None if pending else began,
                "started_at": None if case.status in ("pending", "claimed") else began,
                "completed_at": began if case.status in ENDED else None,
                "dispatches": case.dispatches,
            }
        )
    table = Task.__table__
    values = [{**row, "status": table.c.status.type.python_type[row["status"]]} for row in values]
    async with session_maker() as session:
        await session.execute(insert(table), values)
        await session.commit()
    return rows


async def look(session_maker) -> dict[UUID, After]:
    columns = (
        Task.id, Task.status, Task.error_type, Task.attempt, Task.failed_attempts,
        Task.worker_id, Task.dispatches,
    )  # fmt: skip
    async with session_maker() as session:
        found = (await session.execute(select(*columns))).all()
    return {
        row.id: After(
            row.status.value,
            row.error_type,
            row.attempt,
            row.failed_attempts,
            row.worker_id is not None,
            row.dispatches,
        )
        for row in found
    }


@pytest.mark.parametrize(
    ("sweep", "model"),
    [
        (sweeper.cleanup_stale_workers, after_stale_workers),
        (sweeper.cleanup_overdue_attempts, after_overdue_attempts),
        (sweeper.cleanup_stuck_internal_tasks, after_stuck_internal_tasks),
        (sweeper.cleanup_idle_jobs, after_nothing),
        (sweeper.purge_tasks, after_nothing),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
async def test_a_sweep_changes_what_is_its_own_alone(ada, session_maker, sweep, model):
    workers = {"alive": UUID(await offer(ada)), "silent": UUID(await offer(ada)), "gone": uuid4()}
    await ensure_internal_jobs([Echo], session_maker)
    async with session_maker() as session:
        found = (await session.execute(select(Job.room_id, Job.id))).all()
    jobs = {room == "@internal": id_ for room, id_ in found}
    await silence(session_maker, str(workers["silent"]))
    rows = await fill(session_maker, jobs, workers)
    broker = Broker()
    options = {"registry": broker} if model is after_stuck_internal_tasks else {}
    await sweep(session_maker, SETTINGS, **options)

    after = await look(session_maker)
    wrong = {
        case: (after.get(id_), model(case)[0])
        for id_, case in rows.items()
        if after.get(id_) != model(case)[0]
    }
    assert not wrong
    sent = [id_ for id_, case in rows.items() if model(case)[1]]
    assert sorted(broker.sent) == sorted(sent)
    # neither the server's own jobs go, nor those that a worker serves
    async with session_maker() as session:
        assert not any((await session.scalars(select(Job.deleted))).all())
    # and again: what it did is done
    await sweep(session_maker, SETTINGS, **options)
    assert await look(session_maker) == after
    assert len(broker.sent) == len(sent)


async def test_an_internal_job_stays_without_workers_and_tasks(ada, session_maker):
    worker = await offer(ada)
    await ensure_internal_jobs([Echo], session_maker)
    await silence(session_maker, worker)
    await sweeper.cleanup_stale_workers(session_maker, SETTINGS)
    await sweeper.cleanup_idle_jobs(session_maker, SETTINGS)
    async with session_maker() as session:
        found = (await session.execute(select(Job.room_id, Job.deleted))).all()
    assert {tuple(row) for row in found} == {("@internal", False), ("lab", True)}

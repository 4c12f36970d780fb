"""Heartbeats: what a worker reports of its tasks, and what it is told of them."""

from collections.abc import Sequence
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Float,
    String,
    bindparam,
    case,
    cast,
    func,
    literal,
    select,
    tuple_,
    update,
)
from sqlalchemy.ext.asyncio import AsyncSession

from zndraw_joblib import workers
from zndraw_joblib.events import TaskView
from zndraw_joblib.lifecycle import HELD, TaskStatus
from zndraw_joblib.models import LINK, PROVIDER, TASK, held, rechecked
from zndraw_joblib.schemas import HeartbeatResponse, TaskHeartbeat, WorkerUpdateRequest
from zndraw_joblib.settings import JobLibSettings
from zndraw_joblib.tasks import BRIEF, change
from zndraw_joblib.workers import Caller


class Beat(NamedTuple):
    """What came of a heartbeat.

    Attributes
    ----------
    answer : HeartbeatResponse
        What the worker is told.
    progressed : list of TaskView
        Tasks whose progress was stored.
    """

    answer: HeartbeatResponse
    progressed: list[TaskView]


def _count_of(table: Any) -> ColumnElement[int]:
    served = table.c.worker_id == bindparam("touched", type_=table.c.worker_id.type)
    return select(func.count()).select_from(table).where(served).scalar_subquery()


# id, attempt and status of the reported tasks that are the worker's
_LINE = (
    cast(TASK.c.id, String) + " " + cast(TASK.c.attempt, String) + " " + cast(TASK.c.status, String)
)
_STATES = (
    select(func.aggregate_strings(_LINE, ","))
    .where(
        TASK.c.worker_id == bindparam("touched", type_=TASK.c.worker_id.type),
        TASK.c.id.in_(bindparam("reported", expanding=True)),
    )
    .scalar_subquery()
)
_COUNTS = (_count_of(LINK).label("jobs"), _count_of(PROVIDER).label("providers"))
BEATING = workers.TOUCHING.returning(*_COUNTS)
BEATING_WITH_TASKS = BEATING.returning(_STATES.label("states"))


async def beat(
    session: AsyncSession,
    worker_id: UUID,
    caller: Caller,
    request: WorkerUpdateRequest,
    settings: JobLibSettings,
) -> Beat:
    """Record that a worker lives, store the progress of its tasks, tell which to drop.

    Parameters
    ----------
    session : AsyncSession
        Whose owner commits; until then the worker's row is locked.
    worker_id : UUID
        The worker.
    caller : Caller
        Its owner; a superuser may set the state of another's.
    request : WorkerUpdateRequest
        The state that the worker is to have, and the tasks that it believes to be its
        own.
    settings : JobLibSettings
        The host's.

    Raises
    ------
    ProblemException
        ``worker-not-found``, or ``forbidden`` for another user's worker.
    """
    reported = {task.id: task for task in request.tasks}
    worker = await workers.touch(
        session,
        worker_id,
        caller,
        BEATING_WITH_TASKS if reported else BEATING,
        state=request.state,
        reported=list(reported),
    )
    lines = (worker.states or "").split(",") if reported else []
    states = {
        UUID(task_id): TaskStatus[status]
        for task_id, attempt, status in (line.split() for line in lines if line)
        if int(attempt) == reported[UUID(task_id)].attempt
    }
    told = [
        task
        for task in request.tasks
        if states.get(task.id) in HELD and (task.progress is not None or task.message is not None)
    ]
    progressed = await _store(session, worker_id, told, settings) if told else []
    cancelled = [task for task, s in states.items() if s is TaskStatus.CANCELLED]
    kept = {task for task, status in states.items() if status in HELD}
    answer = HeartbeatResponse(
        id=worker.id,
        last_heartbeat=worker.last_heartbeat,
        state=worker.state,
        desired_state=worker.state,
        jobs=worker.jobs,
        providers=worker.providers,
        cancelled=cancelled,
        lost=sorted(reported.keys() - kept - {*cancelled}),
    )
    return Beat(answer, progressed)


async def _store(
    session: AsyncSession, worker_id: UUID, told: Sequence[TaskHeartbeat], settings: JobLibSettings
) -> list[TaskView]:
    """Store progress; what ended meanwhile is left to the next heartbeat."""
    fractions = ((TASK.c.id == t.id, literal(t.progress, Float)) for t in told)
    messages = ((TASK.c.id == t.id, literal(t.message, String)) for t in told)
    # by id, as reports lock them
    theirs = (
        select(TASK.c.id)
        .where(
            held(),
            TASK.c.worker_id == worker_id,
            tuple_(TASK.c.id, TASK.c.attempt).in_([(t.id, t.attempt) for t in told]),
        )
        .order_by(TASK.c.id)
        .with_for_update()
    )
    # what is not told stays: a message alone erases no progress
    storing = (
        update(TASK)
        .where(rechecked(held()), TASK.c.id.in_(theirs))
        .values(
            {
                TASK.c.progress: func.coalesce(case(*fractions), TASK.c.progress),
                TASK.c.progress_message: func.coalesce(case(*messages), TASK.c.progress_message),
            }
        )
        .returning(*BRIEF)
    )
    return await change(session, storing, settings)

"""Heartbeats: what a worker says of its tasks, and what it is told of them."""

from collections.abc import Sequence
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Float,
    Row,
    String,
    case,
    cast,
    func,
    literal,
    select,
    tuple_,
    update,
)
from sqlalchemy.ext.asyncio import AsyncSession

from zndraw_joblib.lifecycle import HELD, TaskStatus
from zndraw_joblib.models import TASK, held, rechecked
from zndraw_joblib.schemas import TaskHeartbeat, TaskResponse
from zndraw_joblib.settings import JobLibSettings
from zndraw_joblib.tasks import VIEW, read_changed


class Beat(NamedTuple):
    """What a heartbeat learns of the tasks that it reports.

    Attributes
    ----------
    cancelled : list of UUID
        Tasks to stop.
    lost : list of UUID
        Tasks that are no longer this worker's.
    progressed : list of TaskResponse
        Tasks whose progress was stored.
    """

    cancelled: list[UUID]
    lost: list[UUID]
    progressed: list[TaskResponse]


def standing(
    worker_id: UUID, reported: Sequence[TaskHeartbeat]
) -> tuple[ColumnElement[str], ...]:
    """Return the column ``standing`` for :func:`beat`, or nothing where none is needed.

    It tells attempt and status of the reported tasks that are the worker's.
    """
    if not reported:
        return ()
    shown = TASK.c.id, TASK.c.attempt, TASK.c.status
    task_id, attempt, status = (cast(column, String) for column in shown)
    line = task_id + " " + attempt + " " + status
    theirs = select(func.aggregate_strings(line, ",")).where(
        TASK.c.worker_id == worker_id, TASK.c.id.in_([task.id for task in reported])
    )
    return (theirs.scalar_subquery().label("standing"),)


async def beat(
    session: AsyncSession,
    worker: Row[Any],
    reported: Sequence[TaskHeartbeat],
    settings: JobLibSettings,
) -> Beat:
    """Store the progress of a worker's tasks and tell which of them to drop.

    Parameters
    ----------
    session : AsyncSession
        Whose owner commits.
    worker : Row
        Its ``id``, and :func:`standing` of what is reported.
    reported : sequence of TaskHeartbeat
        The tasks that the worker believes to be its own.
    settings : JobLibSettings
        The host's.
    """
    if not reported:
        return Beat([], [], [])
    attempts = {task.id: task.attempt for task in reported}
    lines = [line.split() for line in (worker.standing or "").split(",") if line]
    states = {
        UUID(task_id): TaskStatus[status]
        for task_id, attempt, status in lines
        if int(attempt) == attempts[UUID(task_id)]
    }
    told = [
        task
        for task in reported
        if states.get(task.id) in HELD
        and (task.progress is not None or task.message is not None)
    ]
    progressed: list[TaskResponse] = []
    if told:
        fractions = ((TASK.c.id == t.id, literal(t.progress, Float)) for t in told)
        messages = ((TASK.c.id == t.id, literal(t.message, String)) for t in told)
        # by id, as reports lock them
        theirs = (
            select(TASK.c.id)
            .where(
                held(),
                TASK.c.worker_id == worker.id,
                tuple_(TASK.c.id, TASK.c.attempt).in_(
                    [(t.id, t.attempt) for t in told]
                ),
            )
            .order_by(TASK.c.id)
            .with_for_update()
        )
        stored = await session.execute(
            update(TASK)
            .where(rechecked(held()), TASK.c.id.in_(theirs))
            .values(
                {
                    TASK.c.progress: func.coalesce(case(*fractions), TASK.c.progress),
                    TASK.c.progress_message: func.coalesce(
                        case(*messages), TASK.c.progress_message
                    ),
                }
            )
            .returning(*VIEW)
        )
        # one that ended meanwhile is told of by the next heartbeat
        progressed = await read_changed(session, stored.all(), settings)
    cancelled = [task for task, s in states.items() if s is TaskStatus.CANCELLED]
    kept = {task for task, status in states.items() if status in HELD}
    lost = attempts.keys() - kept - {*cancelled}
    return Beat(cancelled, sorted(lost), progressed)

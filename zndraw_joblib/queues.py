"""Queues: which place a task takes, how many are before it, and what it waits for."""

from typing import Any

import sqlalchemy as sa

from zndraw_joblib.database import greatest, microseconds, now, number
from zndraw_joblib.lifecycle import INTERNAL_ROOM, TaskStatus, WaitingFor, WorkerState
from zndraw_joblib.models import ALIVE, JOB, LINK, TASK, WORKER, constant, paused, queued
from zndraw_joblib.settings import JobLibSettings

# The places of one priority: 52 bits hold the microseconds until 2112.
PRIORITY_STEP = 2**52

#: The last position that is told; those beyond it are told the same.
LAST: sa.ColumnElement[int] = sa.bindparam("last_position", type_=sa.Integer())

ahead = TASK.alias()


def limits(settings: JobLibSettings) -> dict[str, Any]:
    """Return the parameters of statements that tell positions, or whether workers are alive."""
    return {
        "last_position": settings.queue_position_max,
        "silence": -settings.worker_timeout_seconds,
    }


def _start(priority: Any) -> sa.ColumnElement[int]:
    start: sa.ColumnElement[int] = sa.literal(-PRIORITY_STEP, sa.BigInteger()) * priority
    return start


def _in_queue(job_id: Any, priority: Any) -> sa.ColumnElement[bool]:
    order = ahead.c.queue_order
    start = _start(priority)
    return sa.and_(ahead.c.job_id == job_id, order >= start, order < start + PRIORITY_STEP)


def _head(job_id: Any, priority: Any) -> sa.ColumnElement[int]:
    return (
        sa.select(ahead.c.queue_order)
        .where(queued(ahead.c), _in_queue(job_id, priority))
        .order_by(ahead.c.queue_order)
        .limit(number(1))
        .correlate_except(ahead)
        .scalar_subquery()
    )


def new_place(job_id: Any, priority: Any, user_id: Any) -> sa.ColumnElement[int]:
    """Return the place of a new task: behind the first of its queue, and the user's own.

    A place is for life, so it is here that users take turns: a thousand tasks of one wait
    behind each other, and another's first waits for the next turn. An empty queue begins
    at the database's clock, which is ahead of all places before.

    Parameters
    ----------
    job_id, priority, user_id : ColumnElement
        Of the task. Each priority of a job is a queue of its own; higher comes first.
    """
    theirs = (
        sa.select(ahead.c.queue_order)
        .where(
            ahead.c.created_by_id == user_id,
            ahead.c.status == constant(TaskStatus.PENDING),
            _in_queue(job_id, priority),
        )
        .order_by(ahead.c.queue_order.desc())
        .limit(number(1))
        .correlate_except(ahead)
        .scalar_subquery()
    )
    start = _start(priority)
    return greatest(
        sa.func.coalesce(_head(job_id, priority) + 1, start + microseconds()),
        # a clock may be set back
        sa.func.coalesce(theirs + 1, start),
    )


def place_again() -> sa.ColumnElement[int]:
    """Return the place of a task that comes back: its own, or beside the first if later.

    With a place from long ago it would be the first of its queue for those who come now,
    and they would pass all who wait. Beside the first it is earlier by its id.
    """
    first = _head(TASK.c.job_id, TASK.c.priority)
    clock = _start(TASK.c.priority) + microseconds()
    return greatest(TASK.c.queue_order, sa.func.coalesce(first, clock))


def of_job(column: Any) -> sa.ColumnElement[Any]:
    """Return a column of the task's job, inside a statement about tasks."""
    return sa.select(column).where(JOB.c.id == TASK.c.job_id).correlate(TASK).scalar_subquery()


def position(job_id: Any, order: Any, task_id: Any) -> sa.ColumnElement[int]:
    """Return the position of a place in a job's queue, counted up to :data:`LAST`."""
    place = sa.tuple_(ahead.c.queue_order, ahead.c.id)
    before = (
        sa.select(sa.literal_column("1"))
        .where(ahead.c.job_id == job_id, queued(ahead.c), place < sa.tuple_(order, task_id))
        # In the order of the queue, and up to a number that PostgreSQL can't know: else
        # it would rather read a whole queue, if the jobs' queues are short on average.
        .order_by(ahead.c.queue_order, ahead.c.id)
        .limit(sa.select(LAST - number(1)).scalar_subquery())
        .correlate_except(ahead)
        .subquery()
    )
    return sa.select(sa.func.count() + 1).select_from(before).scalar_subquery()


def obstacle() -> sa.ColumnElement[Any]:
    """Return what keeps all tasks of a job waiting, inside a statement about jobs.

    Null if nothing does.
    """
    at_work = (
        sa.exists()
        .where(LINK.c.job_id == JOB.c.id, LINK.c.worker_id == WORKER.c.id)
        .where(ALIVE, WORKER.c.state == WorkerState.ACTIVE.value)
    )
    unserved = sa.and_(JOB.c.room_id != INTERNAL_ROOM, ~at_work)
    return sa.case((unserved, _why(WaitingFor.NO_WORKER)), (paused(), _why(WaitingFor.PAUSED)))


def obstacle_of(job_id: Any) -> sa.ColumnElement[Any]:
    """Return the :func:`obstacle` of a job, inside any statement."""
    found = sa.select(obstacle()).where(JOB.c.id == job_id)
    return found.correlate_except(JOB).scalar_subquery()


def _why(reason: WaitingFor) -> sa.ColumnElement[str]:
    return sa.literal_column(f"'{reason}'", sa.String())


def waiting_for(task: Any, of_all: sa.ColumnElement[Any]) -> sa.ColumnElement[Any]:
    """Return why a pending task waits, given the :func:`obstacle` of its job."""
    delayed = (task.available_at > now(), _why(WaitingFor.DELAYED))
    return sa.func.coalesce(of_all, sa.case(delayed, else_=_why(WaitingFor.BEHIND)))


_WAITS = TASK.c.status == TaskStatus.PENDING
_PLACE = position(TASK.c.job_id, TASK.c.queue_order, TASK.c.id)
_REASON = waiting_for(TASK.c, obstacle_of(TASK.c.job_id))
#: Where a task waits, and why; null if it does not.
WAITING = {"queue_position": sa.case((_WAITS, _PLACE)), "waiting_for": sa.case((_WAITS, _REASON))}

"""Tasks: how they are submitted, shown and listed."""

import hashlib
import json
import time
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Result,
    Row,
    Select,
    case,
    delete,
    func,
    literal,
    literal_column,
    select,
)

# ON CONFLICT reads the same in PostgreSQL and SQLite, and SQLAlchemy renders this one
# construct for both.
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import aliased
from uuid_utils.compat import uuid7

from zndraw_joblib import jobs
from zndraw_joblib.exceptions import (
    IdempotencyKeyReused,
    TaskNotFound,
)
from zndraw_joblib.lifecycle import (
    TaskStatus,
)
from zndraw_joblib.models import (
    Job,
    Task,
    constant,
    now,
    number,
    queued,
)
from zndraw_joblib.paging import Listing, Page, paginate
from zndraw_joblib.schemas import (
    TaskResponse,
    TaskSubmitRequest,
)
from zndraw_joblib.settings import JobLibSettings
from zndraw_joblib.workers import Caller

ahead = aliased(Task)

KEPT_ERRORS = 5

_PRIORITY_STEP = 2**52
_last_order = 0


def queue_order(priority: int) -> int:
    """Return the place at the end of the queue, among tasks of this priority."""
    # Higher priority first, then first in, first out. 52 bits hold the microseconds
    # until 2112; strictly growing, so that a clock set back reorders nothing.
    global _last_order
    _last_order = max(_last_order + 1, time.time_ns() // 1000)
    return _last_order - priority * _PRIORITY_STEP


def of_job(column: Any) -> ColumnElement[Any]:
    """Return a column of the task's job, inside a statement about tasks."""
    return select(column).where(Job.id == Task.job_id).correlate(Task).scalar_subquery()


#: What :func:`read_view` makes a task of, in a SELECT as in a RETURNING.
VIEW = (
    Task.id,
    Task.job_name,
    Task.room_id,
    Task.status,
    Task.created_at,
    Task.started_at,
    Task.completed_at,
    Task.worker_id,
    Task.error,
    Task.payload,
    Task.attempt,
    Task.max_attempts,
    Task.claimed_at,
    Task.available_at,
    Task.error_type,
    Task.errors,
    Task.result,
    Task.progress,
    Task.progress_message,
    Task.priority,
    Task.created_by_id,
)


def position(job_id: Any, order: Any, settings: JobLibSettings) -> ColumnElement[int]:
    """Return the place of ``order`` in a job's queue, counted up to the setting."""
    before = (
        select(literal_column("1"))
        .where(ahead.job_id == job_id, queued(ahead), ahead.queue_order < order)
        .limit(number(settings.queue_position_max - 1))
        .correlate_except(ahead)
        .subquery()
    )
    return select(func.count() + 1).select_from(before).scalar_subquery()


def _seen(settings: JobLibSettings) -> Select[Any]:
    place = position(Task.job_id, Task.queue_order, settings)
    return select(
        *VIEW, case((Task.status == TaskStatus.PENDING, place)).label("queue_position")
    )


def read_view(row: Row[Any], queue_position: int | None = None) -> TaskResponse:
    """Make the wire view of a row of :data:`VIEW`."""
    lines = row.errors.split("\n")[-KEPT_ERRORS:] if row.errors else []
    return TaskResponse(
        **{
            "queue_position": queue_position,
            **row._mapping,
            "available_at": row.available_at or row.created_at,
            "errors": [json.loads(line) for line in lines],
        }
    )


async def read_changed(
    session: AsyncSession, changed: Result[Any], settings: JobLibSettings
) -> list[TaskResponse]:
    """Make the wire views of what a statement returned, with places in the queue."""
    rows = changed.all()
    waiting = [row.id for row in rows if row.status is TaskStatus.PENDING]
    places: dict[UUID, int] = {}
    if waiting:
        place = position(Task.job_id, Task.queue_order, settings)
        found = await session.execute(
            select(Task.id, place.label("place")).where(Task.id.in_(waiting))
        )
        places = {row.id: row.place for row in found}
    return [read_view(row, places.get(row.id)) for row in rows]


def born_claimed(settings: JobLibSettings) -> dict[Any, Any]:
    """Return what makes an ``@internal`` task wait for the broker's answer."""
    return {
        Task.status: literal(TaskStatus.CLAIMED, Task.status.type),
        Task.attempt: Task.attempt + 1,
        Task.claimed_at: now(),
        Task.deadline_at: now(settings.internal_redispatch_seconds),
    }


class Submitted(NamedTuple):
    """A task, and whether it is new or was there under its idempotency key."""

    task: TaskResponse
    created: bool


async def resolve(
    session: AsyncSession,
    room: str,
    full_name: str,
    priority: int,
    settings: JobLibSettings,
) -> Row[Any]:
    """Return the job of a submission, and the place that its task will take.

    Returns
    -------
    Row
        ``id``, ``room_id``, ``full_name``, ``schema_``, ``queue_order`` and
        ``queue_position``.

    Raises
    ------
    ProblemException
        ``job-not-found``, also for a malformed name.
    """
    order = literal(queue_order(priority), Task.queue_order.type)
    found = await session.execute(
        jobs.served(room, full_name).add_columns(
            literal(full_name).label("full_name"),
            order.label("queue_order"),
            position(Job.id, order, settings).label("queue_position"),
        )
    )
    return jobs.found(found.one_or_none(), room, full_name)


async def submit(
    session: AsyncSession,
    job: Row[Any],
    room: str,
    caller: Caller,
    request: TaskSubmitRequest,
    settings: JobLibSettings,
    *,
    idempotency_key: str | None = None,
    internal: bool = False,
) -> Submitted | None:
    """Insert a task.

    Parameters
    ----------
    session : AsyncSession
        Whose owner commits.
    job : Row
        What :func:`resolve` returned; the job stays locked against soft-deletion until
        the commit.
    room : str
        The room that asks.
    caller : Caller
        The submitter.
    request : TaskSubmitRequest
        What to run; its payload was checked before.
    settings : JobLibSettings
        The host's.
    idempotency_key : str, optional
        For this user, room and job it names one task.
    internal : bool
        The task is born claimed, for the broker instead of a worker.

    Returns
    -------
    Submitted or None
        None when the job went away meanwhile.

    Raises
    ------
    ProblemException
        ``idempotency-key-reused``.
    """
    digest = hashlib.sha256(
        json.dumps(request.model_dump(mode="json"), sort_keys=True).encode()
    ).hexdigest()
    values: dict[Any, Any] = {
        Task.id: uuid7(),
        Task.room_id: room,
        Task.created_by_id: caller.id,
        Task.payload: request.payload,
        Task.priority: request.priority,
        Task.queue_order: job.queue_order,
        Task.job_name: job.full_name,
        Task.idempotency_key: idempotency_key,
        Task.request_digest: digest if idempotency_key else None,
    }
    columns: dict[Any, ColumnElement[Any]] = {
        column: literal(value, column.type) for column, value in values.items()
    }
    columns[Task.job_id] = Job.id.expression
    columns[Task.max_attempts] = Job.max_attempts.expression
    if internal:
        columns |= born_claimed(settings) | {Task.attempt: literal(1)}
    elif request.delay_seconds:
        columns[Task.available_at] = now(request.delay_seconds)
    source = (
        select(*columns.values())
        .where(Job.id == job.id, Job.deleted.is_(False))
        .with_for_update(read=True, key_share=True)
    )
    inserted = await session.execute(
        upsert(Task)
        .from_select([column.key for column in columns], source)
        .on_conflict_do_nothing()
        .returning(*VIEW)
    )
    row = inserted.one_or_none()
    if row is not None:
        place = job.queue_position if row.status is TaskStatus.PENDING else None
        return Submitted(read_view(row, place), created=True)
    if idempotency_key is None:
        return None
    earlier = await session.execute(
        _seen(settings)
        .add_columns(Task.request_digest)
        .where(
            Task.created_by_id == caller.id,
            Task.job_id == job.id,
            Task.room_id == room,
            Task.idempotency_key == idempotency_key,
        )
    )
    row = earlier.one_or_none()
    if row is None:
        return None
    if row.request_digest != digest:
        raise IdempotencyKeyReused.exception()
    return Submitted(read_view(row), created=False)


async def read(
    session: AsyncSession, task_id: UUID, settings: JobLibSettings
) -> TaskResponse:
    """Return a task.

    Raises
    ------
    ProblemException
        ``task-not-found``.
    """
    found = await session.execute(_seen(settings).where(Task.id == task_id))
    row = found.one_or_none()
    if row is None:
        raise TaskNotFound.exception(f"there is no task {task_id}")
    return read_view(row)


async def list_tasks(
    session: AsyncSession,
    room: str,
    page: Page,
    settings: JobLibSettings,
    *,
    job_id: UUID | None = None,
    status: TaskStatus | None = None,
) -> tuple[list[TaskResponse], Listing]:
    """Return a page of the tasks that ``room`` submitted."""
    statement = _seen(settings).where(Task.room_id == room)
    if job_id is not None:
        statement = statement.where(Task.job_id == job_id)
    if status is not None:
        statement = statement.where(Task.status == status)
    listing = await paginate(session, statement, Task, page)
    return [read_view(row) for row in listing.rows], listing


async def purge(
    session: AsyncSession, status: TaskStatus, kept_seconds: float, limit: int
) -> int:
    """Delete at most ``limit`` tasks that ended in ``status`` too long ago.

    Returns
    -------
    int
        How many were deleted.
    """
    outlived = (
        select(Task.id)
        .where(Task.status == constant(status), Task.completed_at < now(-kept_seconds))
        .order_by(Task.completed_at)
        .limit(number(limit))
        .with_for_update(skip_locked=True)
    )
    purged = await session.scalars(
        delete(Task).where(Task.id.in_(outlived)).returning(Task.id)
    )
    return len(purged.all())

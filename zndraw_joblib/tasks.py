"""Tasks: how they are shown, read, listed and purged."""

import json
from collections.abc import Sequence
from functools import lru_cache, partial
from typing import Any
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Row,
    Select,
    bindparam,
    case,
    delete,
    func,
    literal,
    literal_column,
    null,
    select,
)
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import aliased

from zndraw_joblib.exceptions import TaskNotFound
from zndraw_joblib.lifecycle import (
    TERMINAL,
    TaskStatus,
)
from zndraw_joblib.models import (
    Job,
    Task,
    constant,
    microseconds,
    now,
    number,
    queued,
)
from zndraw_joblib.paging import Listing, Page, paginate, size_of
from zndraw_joblib.schemas import TaskResponse
from zndraw_joblib.settings import JobLibSettings
from zndraw_joblib.workers import Caller, RoomAccess

ahead = aliased(Task)

KEPT_ERRORS = 5

PRIORITY_STEP = 2**52
_last_order = 0


def end_of_queue(least: Any, priority: Any) -> ColumnElement[int]:
    """Return the place at the end of the queue, among tasks of this priority.

    It is the database's clock, since replicas queue tasks side by side.

    Parameters
    ----------
    least : ColumnElement
        Of :func:`next_order`.
    priority : ColumnElement
        Higher comes first; then it is first in, first out.
    """
    # 52 bits hold the microseconds until 2112
    clock = case((microseconds() > least, microseconds()), else_=least)
    place: ColumnElement[int] = clock - priority * literal(PRIORITY_STEP, BigInteger())
    return place


def next_order(count: int = 1) -> int:
    """Return the least place of the next of ``count`` tasks; those after it follow.

    Strictly growing, so that neither tasks of one moment nor a clock set back change
    the order of one process's own.
    """
    global _last_order
    _last_order += count
    return _last_order - count + 1


def order_taken(order: int, priority: int, count: int = 1) -> None:
    """Remember the place that the first of ``count`` tasks has taken."""
    global _last_order
    _last_order = max(_last_order, order + priority * PRIORITY_STEP + count - 1)


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
    Task.traceparent,
)


def position(job_id: Any, order: Any, position_max: int) -> ColumnElement[int]:
    """Return the place of ``order`` in a job's queue, counted up to a maximum."""
    before = (
        select(literal_column("1"))
        .where(ahead.job_id == job_id, queued(ahead), ahead.queue_order < order)
        # In the order of the queue, and up to a number that PostgreSQL can't know: else
        # it would rather read a whole queue, if the jobs' queues are short on average.
        .order_by(ahead.queue_order)
        .limit(select(number(position_max - 1)).scalar_subquery())
        .correlate_except(ahead)
        .subquery()
    )
    return select(func.count() + 1).select_from(before).scalar_subquery()


@lru_cache(maxsize=8)
def seen(position_max: int) -> Select[Any]:
    """Return the statement that reads tasks as the wire shows them."""
    place = position(Task.job_id, Task.queue_order, position_max)
    return select(
        *VIEW, case((Task.status == TaskStatus.PENDING, place)).label("queue_position")
    )


KEPT_OF_ERROR = 1000
_LARGE = (Task.payload, Task.result, Task.errors, Task.error)


def _abridging(statement: Select[Any], fits: ColumnElement[bool]) -> Select[Any]:
    """Return ``statement`` without the contents of rows that don't fit."""
    kept = {Task.error.key: func.substr(Task.error, 1, number(KEPT_OF_ERROR))}
    large = {column.key for column in _LARGE}
    columns = [
        case((fits, column), else_=kept.get(column.key, null())).label(column.key)
        if column.key in large
        else column
        for column in statement.selected_columns
    ]
    return statement.with_only_columns(*columns, (~fits).label("abridged"))


@lru_cache(maxsize=64)
def _listed(largest: int) -> Select[Any]:
    fits = size_of(*_LARGE) <= number(largest)
    return _abridging(select(*VIEW, Task.job_id, Task.queue_order), fits)


@lru_cache(maxsize=8)
def _queried(position_max: int, all_together: int) -> Select[Any]:
    up_to_here = func.sum(size_of(*_LARGE)).over(order_by=Task.id)
    return _abridging(seen(position_max), up_to_here <= number(all_together))


def _placed(listed: Select[Any], position_max: int) -> Select[Any]:
    """Return a page with its tasks' places in their queues.

    Where a queue's last exact place is, is looked up once for each job: most of a page
    is beyond it, and to count to the maximum for each task would take most of its time.
    """
    page = listed.cte("page")
    waits = page.c.status == constant(TaskStatus.PENDING)
    jobs = select(page.c.job_id).where(waits).distinct().subquery()
    edge = (
        select(ahead.queue_order)
        .where(ahead.job_id == jobs.c.job_id, queued(ahead))
        .order_by(ahead.queue_order)
        .limit(number(1))
        .offset(select(number(position_max - 1)).scalar_subquery())
        .correlate(jobs)
        .scalar_subquery()
    )
    edges = select(jobs.c.job_id, edge.label("edge")).cte("edges")
    edges = edges.prefix_with("MATERIALIZED")
    place = case(
        (page.c.queue_order >= edges.c.edge, number(position_max)),
        else_=position(page.c.job_id, page.c.queue_order, position_max),
    )
    return (
        select(page, case((waits, place)).label("queue_position"))
        .select_from(page.outerjoin(edges, edges.c.job_id == page.c.job_id))
        .order_by(page.c.created_at.desc(), page.c.id.desc())
    )


def last_errors(row: Row[Any]) -> list[str]:
    """Return of a row's ``errors`` the lines of the last :data:`KEPT_ERRORS`."""
    return row.errors.split("\n")[-KEPT_ERRORS:] if row.errors else []


def read_view(row: Row[Any], queue_position: int | None = None) -> TaskResponse:
    """Make the wire view of a row of :data:`VIEW`."""
    return TaskResponse(
        **{
            "queue_position": queue_position,
            **row._mapping,
            "payload": row.payload or {},
            "available_at": row.available_at or row.created_at,
            "errors": [json.loads(line) for line in last_errors(row)],
        }
    )


async def read_changed(
    session: AsyncSession, rows: Sequence[Row[Any]], settings: JobLibSettings
) -> list[TaskResponse]:
    """Make the wire views of what a statement returned, with places in the queue."""
    waiting = [row.id for row in rows if row.status is TaskStatus.PENDING]
    places: dict[UUID, int] = {}
    if waiting:
        place = position(Task.job_id, Task.queue_order, settings.queue_position_max)
        found = await session.execute(
            select(Task.id, place.label("place")).where(Task.id.in_(waiting))
        )
        places = {row.id: row.place for row in found}
    return [read_view(row, places.get(row.id)) for row in rows]


def born_claimed(redispatch_seconds: float | ColumnElement[float]) -> dict[Any, Any]:
    """Return what makes an ``@internal`` task wait for the broker's answer."""
    return {
        Task.status: literal(TaskStatus.CLAIMED, Task.status.type),
        Task.attempt: Task.attempt + 1,
        Task.claimed_at: now(),
        Task.deadline_at: now(redispatch_seconds),
    }


def not_found(task_id: UUID) -> Exception:
    """Return the problem that says that there is no such task, for this caller."""
    return TaskNotFound.exception(f"there is no task {task_id}")


@lru_cache(maxsize=8)
def _reading(position_max: int) -> Select[Any]:
    return (
        seen(position_max)
        .add_columns(Task.holder_id)
        .where(Task.id == bindparam("task"))
    )


async def read(
    session: AsyncSession,
    task_id: UUID,
    caller: Caller,
    may_enter: RoomAccess,
    settings: JobLibSettings,
) -> TaskResponse:
    """Return a task to its submitter, its holder, and those who may enter its room.

    Raises
    ------
    ProblemException
        ``task-not-found``.
    """
    found = await session.execute(
        _reading(settings.queue_position_max), {"task": task_id}
    )
    row = found.one_or_none()
    if row is None or not (
        caller.id in (row.created_by_id, row.holder_id)
        or await may_enter(session, caller, row.room_id)
    ):
        raise not_found(task_id)
    return read_view(row)


async def readable(
    session: AsyncSession,
    task_ids: Sequence[UUID],
    caller: Caller,
    may_enter: RoomAccess,
) -> list[UUID]:
    """Return which of these tasks the caller may read, in the order of the ids."""
    found = await session.execute(
        select(Task.id, Task.room_id, Task.created_by_id, Task.holder_id).where(
            Task.id.in_(task_ids)
        )
    )
    rooms: dict[UUID, str | None] = {
        # None: the task is the caller's own
        row.id: None if caller.id in (row.created_by_id, row.holder_id) else row.room_id
        for row in found
    }
    entered = {None} | {
        room
        for room in sorted(set(filter(None, rooms.values())))
        if await may_enter(session, caller, room)
    }
    known = dict.fromkeys(task_id for task_id in task_ids if task_id in rooms)
    return [task_id for task_id in known if rooms[task_id] in entered]


async def read_many(
    session: AsyncSession, task_ids: Sequence[UUID], settings: JobLibSettings
) -> list[TaskResponse]:
    """Return the tasks with these ids, in their order; abridged beyond what fits."""
    asked = _queried(settings.queue_position_max, settings.max_query_bytes)
    found = await session.execute(asked.where(Task.id.in_(task_ids)))
    views = {row.id: read_view(row) for row in found}
    return [views[task_id] for task_id in task_ids if task_id in views]


async def last_unfinished(
    session: AsyncSession, task_ids: Sequence[UUID]
) -> UUID | None:
    """Return which of the tasks will probably end last; None when all have ended."""
    last: UUID | None = await session.scalar(
        select(Task.id)
        .where(Task.id.in_(task_ids), Task.status.not_in(TERMINAL))
        .order_by(Task.queue_order.desc())
        .limit(number(1))
    )
    return last


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
    largest = settings.max_page_bytes // max(page.limit, 1)
    statement = _listed(largest).where(Task.room_id == room)
    if job_id is not None:
        statement = statement.where(Task.job_id == job_id)
    if status is not None:
        statement = statement.where(Task.status == status)
    listing = await paginate(
        session,
        statement,
        Task,
        page,
        partial(_placed, position_max=settings.queue_position_max),
    )
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

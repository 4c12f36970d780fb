"""Tasks: how they are shown, placed, read, listed and purged."""

from collections import namedtuple
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, cast
from uuid import UUID

import sqlalchemy as sa
from pydantic_core import to_json
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.sql.dml import ReturningUpdate

from zndraw_joblib.database import execute, greatest, microseconds, now, number, scalar
from zndraw_joblib.events import TaskView
from zndraw_joblib.exceptions import Forbidden, TaskNotFound
from zndraw_joblib.lifecycle import TERMINAL, TaskStatus
from zndraw_joblib.models import JOB, TASK, constant, queued
from zndraw_joblib.paging import Completion, Listing, Page, paginate, size_of
from zndraw_joblib.schemas import TaskResponse
from zndraw_joblib.settings import JobLibSettings
from zndraw_joblib.workers import OPERATE, Caller, RoomAccess, permits

KEPT_ERRORS = 5
KEPT_OF_ERROR = 1000

# The places of one priority: 52 bits hold the microseconds until 2112.
PRIORITY_STEP = 2**52

ahead = TASK.alias()

# --- how a task is shown ---

#: What a task's JSON consists of: the columns with which each row that is shown begins.
FIELDS = tuple(TaskResponse.model_fields)
_Shown = cast(Any, namedtuple("_Shown", FIELDS))
_CONTENTS = ("payload", "result", "errors")
_LARGE = tuple(TASK.c[field] for field in (*_CONTENTS, "error"))


def _columns(
    position: sa.ColumnElement[Any], fits: sa.ColumnElement[bool] | None = None
) -> dict[str, sa.ColumnElement[Any]]:
    """Return the columns of :data:`FIELDS`, contents as text, and only if they fit."""
    shown: dict[str, Any] = {field: TASK.c.get(field) for field in FIELDS}
    shown["queue_position"] = position.label("queue_position")
    shown["abridged"] = (sa.false() if fits is None else ~fits).label("abridged")
    kept = {"error": sa.func.substr(TASK.c.error, 1, number(KEPT_OF_ERROR))}
    for large in _LARGE:
        content: sa.ColumnElement[Any] = sa.type_coerce(large, sa.Text)
        if fits is not None:
            content = sa.case((fits, content), else_=kept.get(large.key, sa.null()))
        shown[large.key] = content.label(large.key)
    return shown


#: A task in a SELECT or a RETURNING, its place in the queue left open.
SHOWN = tuple(_columns(sa.null()).values())
#: The same without contents, of which nobody hears: those of many tasks are large.
BRIEF = tuple(sa.null().label(c.key) if c.key in _CONTENTS else c for c in SHOWN)


def last_errors(errors: str | None) -> list[str]:
    """Return of a task's ``errors`` the lines of the last :data:`KEPT_ERRORS`."""
    return errors.split("\n")[-KEPT_ERRORS:] if errors else []


def as_json(task: TaskView) -> bytes:
    """Write a task as :class:`TaskResponse` documents it: its contents are JSON already."""
    values: Any = task
    fields = dict(zip(FIELDS, values, strict=False))
    fields["available_at"] = fields["available_at"] or fields["created_at"]
    payload, result, errors = (fields.pop(content) for content in _CONTENTS)
    if payload in (None, "null"):
        payload = "{}"
    lines = ",".join(last_errors(errors))
    contents = f',"payload":{payload},"result":{result or "null"},"errors":[{lines}]}}'
    return to_json(fields)[:-1] + contents.encode()


def with_position(row: sa.Row[Any], position: int) -> TaskView:
    """Return a task with its place in the queue, which no RETURNING told."""
    task: TaskView = _Shown(*row[: len(FIELDS)])._replace(queue_position=position)
    return task


# --- where a task waits ---


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


def position(job_id: Any, order: Any, task_id: Any, position_max: int) -> sa.ColumnElement[int]:
    """Return the position of a place in a job's queue, counted up to a maximum."""
    place = sa.tuple_(ahead.c.queue_order, ahead.c.id)
    before = (
        sa.select(sa.literal_column("1"))
        .where(ahead.c.job_id == job_id, queued(ahead.c), place < sa.tuple_(order, task_id))
        # In the order of the queue, and up to a number that PostgreSQL can't know: else
        # it would rather read a whole queue, if the jobs' queues are short on average.
        .order_by(ahead.c.queue_order, ahead.c.id)
        .limit(sa.select(number(position_max - 1)).scalar_subquery())
        .correlate_except(ahead)
        .subquery()
    )
    return sa.select(sa.func.count() + 1).select_from(before).scalar_subquery()


def _waiting_position(position_max: int) -> sa.ColumnElement[Any]:
    place = position(TASK.c.job_id, TASK.c.queue_order, TASK.c.id, position_max)
    return sa.case((TASK.c.status == TaskStatus.PENDING, place))


@lru_cache(maxsize=8)
def seen(position_max: int) -> sa.Select[Any]:
    """Return the statement that reads tasks as the wire shows them, and who holds them."""
    return sa.select(*_columns(_waiting_position(position_max)).values(), TASK.c.holder_id)


@lru_cache(maxsize=8)
def _positions(position_max: int) -> sa.Select[Any]:
    asked = TASK.c.id.in_(sa.bindparam("tasks", expanding=True))
    return sa.select(TASK.c.id, _waiting_position(position_max).label("place")).where(asked)


# --- what becomes of it ---


def back_in_queue() -> dict[Any, Any]:
    """Return what makes a task wait for another worker."""
    return {
        TASK.c.status: TaskStatus.PENDING,
        TASK.c.worker_id: None,
        TASK.c.holder_id: None,
        TASK.c.claim_key: None,
        TASK.c.claimed_at: None,
        TASK.c.started_at: None,
        TASK.c.deadline_at: None,
        TASK.c.progress: None,
        TASK.c.progress_message: None,
        TASK.c.queue_order: place_again(),
    }


def born_claimed(redispatch_seconds: float | sa.ColumnElement[float]) -> dict[Any, Any]:
    """Return what makes an ``@internal`` task wait for the broker's answer."""
    return {
        TASK.c.status: sa.literal(TaskStatus.CLAIMED, TASK.c.status.type),
        TASK.c.attempt: TASK.c.attempt + 1,
        TASK.c.claimed_at: now(),
        TASK.c.deadline_at: now(redispatch_seconds),
        TASK.c.dispatches: sa.literal(1),
    }


async def change(
    session: AsyncSession,
    statement: ReturningUpdate[Any],
    settings: JobLibSettings,
    values: dict[str, Any] | None = None,
) -> list[TaskView]:
    """Run an UPDATE that returns :data:`SHOWN` or :data:`BRIEF`; return the changed tasks."""
    changed = (await execute(session, statement, values)).all()
    return await with_positions(session, changed, settings)


async def with_positions(
    session: AsyncSession, changed: Sequence[Any], settings: JobLibSettings
) -> list[TaskView]:
    """Return changed tasks, those that wait now with their places in their queues."""
    waiting = [row.id for row in changed if row.status is TaskStatus.PENDING]
    if not waiting:
        return list(changed)
    asked = _positions(settings.queue_position_max)
    found = await execute(session, asked, {"tasks": waiting})
    places = {row.id: row.place for row in found}
    return [with_position(row, places[row.id]) if row.id in places else row for row in changed]


# --- who reads it ---


async def require_visible(
    session: AsyncSession,
    row: sa.Row[Any] | None,
    task_id: UUID,
    caller: Caller,
    may_enter: RoomAccess,
) -> sa.Row[Any]:
    """Return a task's row to its submitter, its holder, and those who may enter its room.

    Raises
    ------
    ProblemException
        ``task-not-found``.
    """
    if row is None or not (
        caller.id in (row.created_by_id, row.holder_id)
        or await permits(may_enter, session, caller, row.room_id)
    ):
        raise TaskNotFound.exception(f"task {task_id} not found")
    return row


async def require_own(
    session: AsyncSession,
    row: sa.Row[Any] | None,
    task_id: UUID,
    caller: Caller,
    may_enter: RoomAccess,
    what: str,
) -> sa.Row[Any]:
    """Return a task's row to its submitter, and to who may operate its room.

    Raises
    ------
    ProblemException
        ``task-not-found``, or ``forbidden`` to do ``what``.
    """
    if row is not None and (caller.is_superuser or row.created_by_id == caller.id):
        return row
    row = await require_visible(session, row, task_id, caller, may_enter)
    if not await permits(may_enter, session, caller, row.room_id, OPERATE):
        raise Forbidden.exception(f"task {task_id} is not yours to {what}")
    return row


@lru_cache(maxsize=8)
def _reading(position_max: int) -> sa.Select[Any]:
    return seen(position_max).where(TASK.c.id == sa.bindparam("task"))


async def read(
    session: AsyncSession,
    task_id: UUID,
    caller: Caller,
    may_enter: RoomAccess,
    settings: JobLibSettings,
) -> TaskView:
    """Return a task to those who may see it.

    Raises
    ------
    ProblemException
        ``task-not-found``.
    """
    found = await execute(session, _reading(settings.queue_position_max), {"task": task_id})
    row: Any = await require_visible(session, found.one_or_none(), task_id, caller, may_enter)
    return row  # type: ignore[no-any-return]


async def readable(
    session: AsyncSession, task_ids: Sequence[UUID], caller: Caller, may_enter: RoomAccess
) -> list[UUID]:
    """Return which of these tasks the caller may read, in the order of the ids."""
    found = await execute(
        session,
        sa.select(TASK.c.id, TASK.c.room_id, TASK.c.created_by_id, TASK.c.holder_id).where(
            TASK.c.id.in_(task_ids)
        ),
    )
    rooms: dict[UUID, str | None] = {
        # None: the task is the caller's own
        row.id: None if caller.id in (row.created_by_id, row.holder_id) else row.room_id
        for row in found
    }
    entered = {None} | {
        room
        for room in sorted(set(filter(None, rooms.values())))
        if await permits(may_enter, session, caller, room)
    }
    known = dict.fromkeys(task_id for task_id in task_ids if task_id in rooms)
    return [task_id for task_id in known if rooms[task_id] in entered]


@lru_cache(maxsize=8)
def _queried(position_max: int) -> sa.Select[Any]:
    up_to_here = sa.func.sum(size_of(*_LARGE)).over(order_by=TASK.c.id)
    fits = up_to_here <= sa.bindparam("all_together", type_=sa.BigInteger())
    shown = _columns(_waiting_position(position_max), fits)
    return sa.select(*shown.values()).where(TASK.c.id.in_(sa.bindparam("tasks", expanding=True)))


async def read_many(
    session: AsyncSession, task_ids: Sequence[UUID], settings: JobLibSettings
) -> list[TaskView]:
    """Return the tasks with these ids, in their order; abridged beyond what fits."""
    values = {"tasks": task_ids, "all_together": settings.max_query_bytes}
    found: Any = await execute(session, _queried(settings.queue_position_max), values)
    tasks = {row.id: row for row in found}
    return [tasks[task_id] for task_id in task_ids if task_id in tasks]


async def last_unfinished(session: AsyncSession, task_ids: Sequence[UUID]) -> UUID | None:
    """Return which of the tasks will probably end last; None when all have ended."""
    last: UUID | None = await scalar(
        session,
        sa.select(TASK.c.id)
        .where(TASK.c.id.in_(task_ids), TASK.c.status.not_in(TERMINAL))
        .order_by(TASK.c.queue_order.desc())
        .limit(number(1)),
    )
    return last


# --- listings, and their end ---


@lru_cache(maxsize=4)
def _listed(by_job: bool, by_status: bool) -> sa.Select[Any]:
    fits = size_of(*_LARGE) <= sa.bindparam("largest", type_=sa.BigInteger())
    columns = [TASK.c.room_id, *[TASK.c.job_id] * by_job, *[TASK.c.status] * by_status]
    listed = sa.select(*_columns(sa.null(), fits).values(), TASK.c.job_id, TASK.c.queue_order)
    return listed.where(*(column == sa.bindparam(f"of_{column.key}") for column in columns))


@lru_cache(maxsize=8)
def _placing(position_max: int) -> Completion:
    return lambda listed: _placed(listed, position_max)


def _placed(listed: sa.Select[Any], position_max: int) -> sa.Select[Any]:
    """Return a page with its tasks' places in their queues.

    Where a queue's last exact place is, is looked up once for each job: most of a page
    is beyond it, and to count to the maximum for each task would take most of its time.
    """
    page = listed.cte("page")
    waits = page.c.status == constant(TaskStatus.PENDING)
    jobs = sa.select(page.c.job_id).where(waits).distinct().subquery()
    edge = (
        sa.select(ahead.c.queue_order)
        .where(ahead.c.job_id == jobs.c.job_id, queued(ahead.c))
        .order_by(ahead.c.queue_order, ahead.c.id)
        .limit(number(1))
        .offset(sa.select(number(position_max - 1)).scalar_subquery())
        .correlate(jobs)
        .scalar_subquery()
    )
    edges = sa.select(jobs.c.job_id, edge.label("edge")).cte("edges")
    edges = edges.prefix_with("MATERIALIZED")
    place = sa.case(
        (page.c.queue_order > edges.c.edge, number(position_max)),
        else_=position(page.c.job_id, page.c.queue_order, page.c.id, position_max),
    )
    shown = {field: page.c[field] for field in FIELDS}
    shown["queue_position"] = sa.case((waits, place)).label("queue_position")
    return (
        sa.select(*shown.values())
        .select_from(page.outerjoin(edges, edges.c.job_id == page.c.job_id))
        .order_by(page.c.created_at.desc(), page.c.id.desc())
    )


async def list_tasks(
    session: AsyncSession,
    room: str,
    page: Page,
    settings: JobLibSettings,
    *,
    job_id: UUID | None = None,
    status: TaskStatus | None = None,
) -> Listing:
    """Return a page of the tasks that ``room`` submitted."""
    values = {
        "of_room_id": room,
        "of_job_id": job_id,
        "of_status": status,
        "largest": settings.max_page_bytes // max(page.limit, 1),
    }
    statement = _listed(job_id is not None, status is not None)
    placing = _placing(settings.queue_position_max)
    return await paginate(session, statement, TASK, page, values, placing)


def outlived(status: TaskStatus, kept_seconds: float) -> sa.Select[tuple[UUID]]:
    """Return the tasks that ended in ``status`` too long ago, oldest first."""
    ended = TASK.c.completed_at < now(-kept_seconds)
    return (
        sa.select(TASK.c.id)
        .where(TASK.c.status == constant(status), ended)
        .order_by(TASK.c.completed_at)
    )


async def purge(session: AsyncSession, chosen: sa.Select[tuple[UUID]]) -> int:
    """Delete the chosen tasks; return how many there were."""
    purged = (
        await execute(session, sa.delete(TASK).where(TASK.c.id.in_(chosen)).returning(TASK.c.id))
    ).scalars()
    return len(purged.all())

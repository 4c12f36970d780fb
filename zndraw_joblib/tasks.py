"""Tasks: how they are shown, read, listed and purged."""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple
from uuid import UUID

from pydantic_core import to_json
from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Row,
    Select,
    Text,
    and_,
    bindparam,
    case,
    delete,
    false,
    func,
    literal,
    literal_column,
    null,
    select,
    tuple_,
    type_coerce,
)
from sqlalchemy.ext.asyncio import AsyncSession

from zndraw_joblib.database import execute, greatest, microseconds, now, number, scalar
from zndraw_joblib.exceptions import TaskNotFound
from zndraw_joblib.lifecycle import TERMINAL, TaskStatus
from zndraw_joblib.models import JOB, TASK, constant, queued
from zndraw_joblib.paging import Completion, Listing, Page, paginate, size_of
from zndraw_joblib.schemas import TaskResponse
from zndraw_joblib.settings import JobLibSettings
from zndraw_joblib.workers import Caller, RoomAccess, permits

ahead = TASK.alias()

KEPT_ERRORS = 5

# The places of one priority: 52 bits hold the microseconds until 2112.
PRIORITY_STEP = 2**52


def _start(priority: Any) -> ColumnElement[int]:
    start: ColumnElement[int] = literal(-PRIORITY_STEP, BigInteger()) * priority
    return start


def _in_queue(job_id: Any, priority: Any) -> ColumnElement[bool]:
    order = ahead.c.queue_order
    start = _start(priority)
    return and_(ahead.c.job_id == job_id, order >= start, order < start + PRIORITY_STEP)


def _head(job_id: Any, priority: Any) -> ColumnElement[int]:
    return (
        select(ahead.c.queue_order)
        .where(queued(ahead.c), _in_queue(job_id, priority))
        .order_by(ahead.c.queue_order)
        .limit(number(1))
        .correlate_except(ahead)
        .scalar_subquery()
    )


def new_place(job_id: Any, priority: Any, user_id: Any) -> ColumnElement[int]:
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
        select(ahead.c.queue_order)
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
        func.coalesce(_head(job_id, priority) + 1, start + microseconds()),
        # a clock may be set back
        func.coalesce(theirs + 1, start),
    )


def place_again() -> ColumnElement[int]:
    """Return the place of a task that comes back: its own, or beside the first if later.

    With a place from long ago it would be the first of its queue for those who come now,
    and they would pass all who wait. Beside the first it is earlier by its id.
    """
    first = _head(TASK.c.job_id, TASK.c.priority)
    clock = _start(TASK.c.priority) + microseconds()
    return greatest(TASK.c.queue_order, func.coalesce(first, clock))


def of_job(column: Any) -> ColumnElement[Any]:
    """Return a column of the task's job, inside a statement about tasks."""
    return select(column).where(JOB.c.id == TASK.c.job_id).correlate(TASK).scalar_subquery()


#: What :func:`read_view` makes a task of, in a SELECT as in a RETURNING.
VIEW = (
    TASK.c.id,
    TASK.c.job_name,
    TASK.c.room_id,
    TASK.c.status,
    TASK.c.created_at,
    TASK.c.started_at,
    TASK.c.completed_at,
    TASK.c.worker_id,
    TASK.c.error,
    TASK.c.payload,
    TASK.c.attempt,
    TASK.c.max_attempts,
    TASK.c.claimed_at,
    TASK.c.available_at,
    TASK.c.error_type,
    TASK.c.errors,
    TASK.c.result,
    TASK.c.progress,
    TASK.c.progress_message,
    TASK.c.priority,
    TASK.c.created_by_id,
    TASK.c.traceparent,
    TASK.c.revision,
    TASK.c.payload_checked,
)

_CONTENTS = frozenset({TASK.c.payload.key, TASK.c.result.key, TASK.c.errors.key})
#: The same without contents, of which nobody hears: those of many tasks are large.
BRIEF = tuple(column for column in VIEW if column.key not in _CONTENTS)


def position(job_id: Any, order: Any, task_id: Any, position_max: int) -> ColumnElement[int]:
    """Return the position of a place in a job's queue, counted up to a maximum."""
    place = tuple_(ahead.c.queue_order, ahead.c.id)
    before = (
        select(literal_column("1"))
        .where(ahead.c.job_id == job_id, queued(ahead.c), place < tuple_(order, task_id))
        # In the order of the queue, and up to a number that PostgreSQL can't know: else
        # it would rather read a whole queue, if the jobs' queues are short on average.
        .order_by(ahead.c.queue_order, ahead.c.id)
        .limit(select(number(position_max - 1)).scalar_subquery())
        .correlate_except(ahead)
        .subquery()
    )
    return select(func.count() + 1).select_from(before).scalar_subquery()


@lru_cache(maxsize=8)
def seen(position_max: int) -> Select[Any]:
    """Return the statement that reads tasks as the wire shows them."""
    place = position(TASK.c.job_id, TASK.c.queue_order, TASK.c.id, position_max)
    return select(*VIEW, case((TASK.c.status == TaskStatus.PENDING, place)).label("queue_position"))


KEPT_OF_ERROR = 1000
_LARGE = (TASK.c.payload, TASK.c.result, TASK.c.errors, TASK.c.error)


def _for_json(statement: Select[Any], fits: ColumnElement[bool] | None = None) -> Select[Any]:
    """Return ``statement`` for :func:`_json`: contents as text, and only if they fit."""
    kept = {TASK.c.error.key: func.substr(TASK.c.error, 1, number(KEPT_OF_ERROR))}
    columns = {column.key: column for column in statement.selected_columns}
    for large in _LARGE:
        content: ColumnElement[Any] = type_coerce(large, Text)
        if fits is not None:
            content = case((fits, content), else_=kept.get(large.key, null()))
        columns[large.key] = content.label(large.key)
    abridged = false() if fits is None else ~fits
    return statement.with_only_columns(*columns.values(), abridged.label("abridged"))


@lru_cache(maxsize=4)
def _listed(by_job: bool, by_status: bool) -> Select[Any]:
    fits = size_of(*_LARGE) <= bindparam("largest", type_=BigInteger())
    listed = _for_json(select(*VIEW, TASK.c.job_id, TASK.c.queue_order), fits)
    columns = [TASK.c.room_id, *[TASK.c.job_id] * by_job, *[TASK.c.status] * by_status]
    return listed.where(*(column == bindparam(f"of_{column.key}") for column in columns))


@lru_cache(maxsize=8)
def _queried(position_max: int) -> Select[Any]:
    up_to_here = func.sum(size_of(*_LARGE)).over(order_by=TASK.c.id)
    fits = up_to_here <= bindparam("all_together", type_=BigInteger())
    asked = TASK.c.id.in_(bindparam("tasks", expanding=True))
    return _for_json(seen(position_max), fits).where(asked)


@lru_cache(maxsize=8)
def _placing(position_max: int) -> Completion:
    return lambda listed: _placed(listed, position_max)


def _placed(listed: Select[Any], position_max: int) -> Select[Any]:
    """Return a page with its tasks' places in their queues.

    Where a queue's last exact place is, is looked up once for each job: most of a page
    is beyond it, and to count to the maximum for each task would take most of its time.
    """
    page = listed.cte("page")
    shown = [column for column in page.c if column.key not in ("job_id", "queue_order")]
    waits = page.c.status == constant(TaskStatus.PENDING)
    jobs = select(page.c.job_id).where(waits).distinct().subquery()
    edge = (
        select(ahead.c.queue_order)
        .where(ahead.c.job_id == jobs.c.job_id, queued(ahead.c))
        .order_by(ahead.c.queue_order, ahead.c.id)
        .limit(number(1))
        .offset(select(number(position_max - 1)).scalar_subquery())
        .correlate(jobs)
        .scalar_subquery()
    )
    edges = select(jobs.c.job_id, edge.label("edge")).cte("edges")
    edges = edges.prefix_with("MATERIALIZED")
    place = case(
        (page.c.queue_order > edges.c.edge, number(position_max)),
        else_=position(page.c.job_id, page.c.queue_order, page.c.id, position_max),
    )
    return (
        select(*shown, case((waits, place)).label("queue_position"))
        .select_from(page.outerjoin(edges, edges.c.job_id == page.c.job_id))
        .order_by(page.c.created_at.desc(), page.c.id.desc())
    )


def last_errors(row: Row[Any]) -> list[str]:
    """Return of a row's ``errors`` the lines of the last :data:`KEPT_ERRORS`."""
    errors: str | None = row._mapping.get(TASK.c.errors.key)
    return errors.split("\n")[-KEPT_ERRORS:] if errors else []


def read_view(
    row: Row[Any], queue_position: int | None = None, payload: dict[str, Any] | None = None
) -> TaskResponse:
    """Make the wire view of a row of :data:`VIEW`, or of :data:`BRIEF`."""
    if payload is None:
        payload = row._mapping.get(TASK.c.payload.key) or {}
    return TaskResponse(
        **{
            "queue_position": queue_position,
            **row._mapping,
            "payload": payload,
            "available_at": row.available_at or row.created_at,
            "errors": [json.loads(line) for line in last_errors(row)],
        }
    )


class TaskJson(NamedTuple):
    """A task that is only read: what it is asked for, and the answer.

    Attributes
    ----------
    id : UUID
        The task.
    status : TaskStatus
        Its state.
    json : bytes
        What :class:`TaskResponse` documents.
    """

    id: UUID
    status: TaskStatus
    json: bytes


def _json(row: Row[Any]) -> TaskJson:
    """Write a row whose contents are JSON as text: they are passed on as they are."""
    # SQLAlchemy's names are of a subclass of str, which is ten times slower to write
    fields = dict(zip(map(str, row._fields), row, strict=True))
    fields["available_at"] = row.available_at or row.created_at
    # that it is held by this user is not for everybody
    fields.pop("holder_id", None)
    payload, result, _ = (fields.pop(name) for name in ("payload", "result", "errors"))
    if payload in (None, "null"):
        payload = "{}"
    errors = ",".join(last_errors(row))
    contents = f',"payload":{payload},"result":{result or "null"},"errors":[{errors}]}}'
    return TaskJson(row.id, row.status, to_json(fields)[:-1] + contents.encode())


async def read_changed(
    session: AsyncSession, rows: Sequence[Row[Any]], settings: JobLibSettings
) -> list[TaskResponse]:
    """Make the wire views of what a statement returned, with places in the queue.

    They are looked up where the rows have no ``queue_position``.
    """
    unplaced = (row for row in rows if "queue_position" not in row._mapping)
    waiting = [row.id for row in unplaced if row.status is TaskStatus.PENDING]
    places: dict[UUID, int] = {}
    if waiting:
        place = position(TASK.c.job_id, TASK.c.queue_order, TASK.c.id, settings.queue_position_max)
        found = await execute(
            session, select(TASK.c.id, place.label("place")).where(TASK.c.id.in_(waiting))
        )
        places = {row.id: row.place for row in found}
    return [read_view(row, places.get(row.id)) for row in rows]


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


def born_claimed(redispatch_seconds: float | ColumnElement[float]) -> dict[Any, Any]:
    """Return what makes an ``@internal`` task wait for the broker's answer."""
    return {
        TASK.c.status: literal(TaskStatus.CLAIMED, TASK.c.status.type),
        TASK.c.attempt: TASK.c.attempt + 1,
        TASK.c.claimed_at: now(),
        TASK.c.deadline_at: now(redispatch_seconds),
        TASK.c.dispatches: literal(1),
    }


def not_found(task_id: UUID) -> Exception:
    """Return the problem that says that there is no such task, for this caller."""
    return TaskNotFound.exception(f"task {task_id} not found")


@lru_cache(maxsize=8)
def _reading(position_max: int) -> Select[Any]:
    asked = seen(position_max).where(TASK.c.id == bindparam("task"))
    return _for_json(asked.add_columns(TASK.c.holder_id))


async def read(
    session: AsyncSession,
    task_id: UUID,
    caller: Caller,
    may_enter: RoomAccess,
    settings: JobLibSettings,
) -> TaskJson:
    """Return a task to its submitter, its holder, and those who may enter its room.

    Raises
    ------
    ProblemException
        ``task-not-found``.
    """
    found = await execute(session, _reading(settings.queue_position_max), {"task": task_id})
    row = found.one_or_none()
    if row is None or not (
        caller.id in (row.created_by_id, row.holder_id)
        or await permits(may_enter, session, caller, row.room_id)
    ):
        raise not_found(task_id)
    return _json(row)


async def readable(
    session: AsyncSession, task_ids: Sequence[UUID], caller: Caller, may_enter: RoomAccess
) -> list[UUID]:
    """Return which of these tasks the caller may read, in the order of the ids."""
    found = await execute(
        session,
        select(TASK.c.id, TASK.c.room_id, TASK.c.created_by_id, TASK.c.holder_id).where(
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


async def read_many(
    session: AsyncSession, task_ids: Sequence[UUID], settings: JobLibSettings
) -> list[TaskJson]:
    """Return the tasks with these ids, in their order; abridged beyond what fits."""
    values = {"tasks": task_ids, "all_together": settings.max_query_bytes}
    found = await execute(session, _queried(settings.queue_position_max), values)
    tasks = {row.id: _json(row) for row in found}
    return [tasks[task_id] for task_id in task_ids if task_id in tasks]


async def last_unfinished(session: AsyncSession, task_ids: Sequence[UUID]) -> UUID | None:
    """Return which of the tasks will probably end last; None when all have ended."""
    last: UUID | None = await scalar(
        session,
        select(TASK.c.id)
        .where(TASK.c.id.in_(task_ids), TASK.c.status.not_in(TERMINAL))
        .order_by(TASK.c.queue_order.desc())
        .limit(number(1)),
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
) -> tuple[list[bytes], Listing]:
    """Return a page of the tasks that ``room`` submitted, as JSON."""
    values = {
        "of_room_id": room,
        "of_job_id": job_id,
        "of_status": status,
        "largest": settings.max_page_bytes // max(page.limit, 1),
    }
    statement = _listed(job_id is not None, status is not None)
    placing = _placing(settings.queue_position_max)
    listing = await paginate(session, statement, TASK, page, values, placing)
    return [_json(row).json for row in listing.rows], listing


def outlived(status: TaskStatus, kept_seconds: float) -> Select[tuple[UUID]]:
    """Return the tasks that ended in ``status`` too long ago, oldest first."""
    ended = TASK.c.completed_at < now(-kept_seconds)
    return (
        select(TASK.c.id)
        .where(TASK.c.status == constant(status), ended)
        .order_by(TASK.c.completed_at)
    )


async def purge(session: AsyncSession, chosen: Select[tuple[UUID]]) -> int:
    """Delete the chosen tasks; return how many there were."""
    purged = (
        await execute(session, delete(TASK).where(TASK.c.id.in_(chosen)).returning(TASK.c.id))
    ).scalars()
    return len(purged.all())

"""Tasks: where they wait, and how they are shown, read, listed and purged."""

from collections import namedtuple
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, cast
from uuid import UUID

import sqlalchemy as sa
from pydantic_core import to_json
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.sql.dml import ReturningUpdate

from zndraw_joblib import database, models
from zndraw_joblib.database import Listing, Page, execute, now, number, paginate, scalar, scalars
from zndraw_joblib.events import TaskView
from zndraw_joblib.exceptions import Forbidden, TaskNotFound
from zndraw_joblib.lifecycle import INTERNAL_ROOM, TERMINAL, TaskStatus, WaitingFor, WorkerState
from zndraw_joblib.models import JOB, LINK, LOG, TASK, WORKER, ahead
from zndraw_joblib.schemas import TaskResponse
from zndraw_joblib.settings import JobLibSettings
from zndraw_joblib.workers import OPERATE, Caller, RoomAccess, permits

KEPT_ERRORS = 5
KEPT_OF_ERROR = 1000

# --- where it waits ---

#: The last position that is told; those beyond it are told the same.
LAST: sa.ColumnElement[int] = sa.bindparam("last_position", type_=sa.Integer())


def limits(settings: JobLibSettings) -> dict[str, Any]:
    """Return the parameters of statements that tell positions, or whether workers are alive."""
    return {
        "last_position": settings.queue_position_max,
        "silence": -settings.worker_timeout_seconds,
    }


def position(job_id: Any, order: Any, task_id: Any) -> sa.ColumnElement[int]:
    """Return the position of a place in a job's queue, counted up to :data:`LAST`."""
    place = sa.tuple_(ahead.c.queue_order, ahead.c.id)
    before = (
        sa.select(sa.literal_column("1"))
        .where(ahead.c.job_id == job_id, models.queued(ahead.c), place < sa.tuple_(order, task_id))
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
        .where(models.ALIVE, WORKER.c.state == WorkerState.ACTIVE.value)
    )
    unserved = sa.and_(JOB.c.room_id != INTERNAL_ROOM, ~at_work)
    return sa.case((unserved, _why(WaitingFor.NO_WORKER)), (models.PAUSED, _why(WaitingFor.PAUSED)))


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


# --- how it is shown ---

#: What a task's JSON consists of: the columns with which each row that is shown begins.
FIELDS = tuple(TaskResponse.model_fields)
_Shown = cast(Any, namedtuple("_Shown", FIELDS))
_CONTENTS = ("payload", "result", "errors", "checkpoint")
_LARGE = tuple(TASK.c[field] for field in ("payload", "result", "errors", "error"))


def _columns(
    waits: Mapping[str, sa.ColumnElement[Any]], fits: sa.ColumnElement[bool] | None = None
) -> dict[str, sa.ColumnElement[Any]]:
    """Return the columns of :data:`FIELDS`, contents as text, and only if they fit."""
    shown: dict[str, Any] = {field: TASK.c.get(field) for field in FIELDS}
    shown |= {field: column.label(field) for field, column in waits.items()}
    shown["abridged"] = (sa.false() if fits is None else ~fits).label("abridged")
    kept = {"error": sa.func.substr(TASK.c.error, 1, number(KEPT_OF_ERROR))}
    for large in _LARGE:
        content: sa.ColumnElement[Any] = sa.type_coerce(large, sa.Text)
        if fits is not None:
            content = sa.case((fits, content), else_=kept.get(large.key, sa.null()))
        shown[large.key] = content.label(large.key)
    # of many tasks nobody needs it
    checkpoint = sa.type_coerce(TASK.c.checkpoint, sa.Text) if fits is None else sa.null()
    shown["checkpoint"] = checkpoint.label("checkpoint")
    return shown


_NOT_TOLD = {"queue_position": sa.null(), "waiting_for": sa.null()}
#: A task in a SELECT or a RETURNING; how it waits is left open.
SHOWN = tuple(_columns(_NOT_TOLD).values())
#: The same without contents, of which nobody hears: those of many tasks are large.
BRIEF = tuple(sa.null().label(c.key) if c.key in _CONTENTS else c for c in SHOWN)


def last_errors(errors: str | None) -> list[str]:
    """Return of a task's ``errors`` the lines of the last :data:`KEPT_ERRORS`."""
    return errors.split("\n")[-KEPT_ERRORS:] if errors else []


def as_json(task: TaskView, *, abridged: bool = False) -> bytes:
    """Write a task as :class:`TaskResponse` documents it: its contents are JSON already."""
    values: Any = task
    fields = dict(zip(FIELDS, values, strict=False))
    fields["available_at"] = fields["available_at"] or fields["created_at"]
    payload, result, errors, checkpoint = (fields.pop(content) for content in _CONTENTS)
    if abridged:
        payload, result, errors, fields["abridged"] = None, None, None, True
    if payload in (None, "null"):
        payload = "{}"
    lines = ",".join(last_errors(errors))
    contents = f',"payload":{payload},"result":{result or "null"},"errors":[{lines}]'
    saved = f',"checkpoint":{checkpoint or "null"}}}'
    return to_json(fields)[:-1] + contents.encode() + saved.encode()


def waiting(row: sa.Row[Any], position: int | None, why: str | None = None) -> TaskView:
    """Return a task with its place in the queue and what it waits for, if that is told."""
    shown = _Shown(*row[: len(FIELDS)])
    task: TaskView = shown._replace(queue_position=position, waiting_for=why)
    return task


#: Reads tasks as the wire shows them, and who holds them; with the parameters of
#: :func:`limits`, as what is below.
SEEN = sa.select(*_columns(WAITING).values(), TASK.c.holder_id)
_ONE = SEEN.where(TASK.c.id == sa.bindparam("task"))
_ASKED = TASK.c.id.in_(sa.bindparam("tasks", expanding=True))
_PLACES = sa.select(TASK.c.id, *(c.label(name) for name, c in WAITING.items())).where(_ASKED)


# --- what becomes of it ---


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
    """Return changed tasks, those that wait now with their places in the queue."""
    pending = [row.id for row in changed if row.status is TaskStatus.PENDING]
    if not pending:
        return list(changed)
    values = {"tasks": pending, **limits(settings)}
    waits = {row.id: row for row in await execute(session, _PLACES, values)}
    return [
        waiting(row, waits[row.id].queue_position, waits[row.id].waiting_for)
        if row.id in waits
        else row
        for row in changed
    ]


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
    found = await execute(session, _ONE, {"task": task_id, **limits(settings)})
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


_UP_TO_HERE = sa.func.sum(database.size_of(*_LARGE)).over(order_by=TASK.c.id)
_FIT = sa.bindparam("all_together", type_=sa.BigInteger()) >= _UP_TO_HERE
_QUERIED = sa.select(*_columns(WAITING, _FIT).values()).where(_ASKED)


async def read_many(
    session: AsyncSession, task_ids: Sequence[UUID], settings: JobLibSettings
) -> list[TaskView]:
    """Return the tasks with these ids, in their order; abridged beyond what fits."""
    values = {"tasks": task_ids, "all_together": settings.max_query_bytes}
    found: Any = await execute(session, _QUERIED, values | limits(settings))
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
    fits = database.size_of(*_LARGE) <= sa.bindparam("largest", type_=sa.BigInteger())
    columns = [TASK.c.room_id, *[TASK.c.job_id] * by_job, *[TASK.c.status] * by_status]
    listed = sa.select(*_columns(_NOT_TOLD, fits).values(), TASK.c.job_id, TASK.c.queue_order)
    return listed.where(*(column == sa.bindparam(f"of_{column.key}") for column in columns))


def _placed(listed: sa.Select[Any]) -> sa.Select[Any]:
    """Return a page with its tasks' places in their queues, and why they wait.

    Where a queue's last exact place is, is looked up once for each job: most of a page
    is beyond it, and to count to the maximum for each task would take most of its time.
    """
    page = listed.cte("page")
    waits = page.c.status == models.constant(TaskStatus.PENDING)
    jobs = sa.select(page.c.job_id).where(waits).distinct().subquery()
    edge = (
        sa.select(ahead.c.queue_order)
        .where(ahead.c.job_id == jobs.c.job_id, models.queued(ahead.c))
        .order_by(ahead.c.queue_order, ahead.c.id)
        .limit(number(1))
        .offset(sa.select(LAST - number(1)).scalar_subquery())
        .correlate(jobs)
        .scalar_subquery()
    )
    obstacle = obstacle_of(jobs.c.job_id).label("obstacle")
    edges = sa.select(jobs.c.job_id, edge.label("edge"), obstacle).cte("edges")
    edges = edges.prefix_with("MATERIALIZED")
    place = sa.case(
        (page.c.queue_order > edges.c.edge, LAST),
        else_=position(page.c.job_id, page.c.queue_order, page.c.id),
    )
    shown = {field: page.c[field] for field in FIELDS}
    shown["queue_position"] = sa.case((waits, place)).label("queue_position")
    why = waiting_for(page.c, edges.c.obstacle)
    shown["waiting_for"] = sa.case((waits, why)).label("waiting_for")
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
        **limits(settings),
    }
    statement = _listed(job_id is not None, status is not None)
    return await paginate(session, statement, TASK, page, values, _placed)


def outlived(status: TaskStatus, kept_seconds: float) -> sa.Select[tuple[UUID]]:
    """Return the tasks that ended in ``status`` too long ago, oldest first."""
    ended = TASK.c.completed_at < now(-kept_seconds)
    return (
        sa.select(TASK.c.id)
        .where(TASK.c.status == models.constant(status), ended)
        .order_by(TASK.c.completed_at)
    )


async def delete(session: AsyncSession, *chosen: sa.ColumnElement[bool]) -> list[UUID]:
    """Delete the chosen tasks, and their logs; return the ids."""
    deleted = await scalars(session, sa.delete(TASK).where(*chosen).returning(TASK.c.id))
    if deleted:
        # SQLite does it by itself only where the host asks for that
        await execute(session, sa.delete(LOG).where(LOG.c.task_id.in_(deleted)))
    return deleted

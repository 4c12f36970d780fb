"""Tasks: how they are submitted, shown and listed."""

import hashlib
import json
import time
from bisect import bisect_left
from collections.abc import Sequence
from datetime import timedelta
from functools import lru_cache, partial
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Float,
    Result,
    Row,
    Select,
    and_,
    bindparam,
    case,
    delete,
    func,
    insert,
    literal,
    literal_column,
    null,
    select,
)

# ON CONFLICT reads the same in PostgreSQL and SQLite, and SQLAlchemy renders this one
# construct for both.
from sqlalchemy.dialects.postgresql import Insert as Upsert
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import aliased
from uuid_utils.compat import uuid7

from zndraw_joblib import jobs, telemetry
from zndraw_joblib.exceptions import (
    IdempotencyKeyReused,
    QuotaExceeded,
    TaskNotFound,
)
from zndraw_joblib.lifecycle import (
    TERMINAL,
    TaskStatus,
)
from zndraw_joblib.models import (
    TASK,
    Job,
    Task,
    constant,
    microseconds,
    now,
    number,
    queued,
)
from zndraw_joblib.paging import Listing, Page, paginate, size_of
from zndraw_joblib.schemas import (
    TaskResponse,
    TaskSubmitRequest,
)
from zndraw_joblib.settings import JobLibSettings
from zndraw_joblib.workers import Caller, RoomAccess

ahead = aliased(Task)

KEPT_ERRORS = 5

_PRIORITY_STEP = 2**52
_last_order = 0


def queue_order(priority: int, clock: int) -> int:
    """Return the place at the end of the queue, among tasks of this priority.

    Parameters
    ----------
    priority : int
        Higher comes first; then it is first in, first out.
    clock : int
        The database's ``microseconds``: replicas queue tasks side by side.
    """
    # 52 bits hold the microseconds until 2112; strictly growing, so that neither tasks
    # of one moment nor a clock set back change the order of one process's own
    global _last_order
    _last_order = max(_last_order + 1, clock)
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
    session: AsyncSession, changed: Result[Any], settings: JobLibSettings
) -> list[TaskResponse]:
    """Make the wire views of what a statement returned, with places in the queue."""
    rows = changed.all()
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


def _digest(asked: Any) -> str:
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


def _keyed(caller: Caller, job_id: UUID, room: str, key: str) -> ColumnElement[bool]:
    return and_(
        Task.created_by_id == caller.id,
        Task.job_id == job_id,
        Task.room_id == room,
        Task.idempotency_key == key,
    )


class Submitted(NamedTuple):
    """A task, and whether it is new or was there under its idempotency key."""

    task: TaskResponse
    created: bool


@lru_cache(maxsize=8)
def _resolving(position_max: int) -> Select[Any]:
    least, better = (
        bindparam(name, type_=Task.queue_order.type) for name in ("least", "better")
    )
    # as :func:`queue_order` will have it
    place = case((microseconds() > least, microseconds()), else_=least) - better
    return jobs.SERVED.add_columns(
        bindparam("full_name", type_=Task.job_name.type).label("full_name"),
        position(Job.id, place, position_max).label("queue_position"),
    )


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
        ``id``, ``room_id``, ``full_name``, ``schema_``, ``clock`` and
        ``queue_position``.

    Raises
    ------
    ProblemException
        ``job-not-found``, also for a malformed name.
    """
    name = jobs.find(room, full_name)
    found = await session.execute(
        _resolving(settings.queue_position_max),
        {
            **name._asdict(),
            "full_name": full_name,
            "least": _last_order + 1,
            "better": priority * _PRIORITY_STEP,
        },
    )
    return jobs.found(found.one_or_none(), room, full_name)


@lru_cache(maxsize=8)
def _inserting(internal: bool, delayed: bool, keyed: bool) -> Any:
    # Built once for each shape, and without ON CONFLICT where no key can conflict:
    # SQLAlchemy compiles a statement that has it anew each time.
    columns: dict[Any, Any] = {
        Task.id: bindparam("new_id", type_=Task.id.type),
        Task.room_id: bindparam("in_room", type_=Task.room_id.type),
        Task.created_by_id: bindparam("submitter", type_=Task.created_by_id.type),
        Task.payload: bindparam("given", type_=Task.payload.type),
        Task.priority: bindparam("rank", type_=Task.priority.type),
        Task.queue_order: bindparam("place", type_=Task.queue_order.type),
        Task.job_name: bindparam("full_name", type_=Task.job_name.type),
        Task.idempotency_key: bindparam("key", type_=Task.idempotency_key.type),
        Task.request_digest: bindparam("digest", type_=Task.request_digest.type),
        Task.traceparent: bindparam("trace", type_=Task.traceparent.type),
        Task.job_id: Job.id,
        Task.max_attempts: Job.max_attempts,
    }
    seconds: ColumnElement[float] = bindparam("seconds", type_=Float())
    if internal:
        columns |= born_claimed(seconds) | {Task.attempt: literal(1)}
    elif delayed:
        columns[Task.available_at] = now(seconds)
    source = (
        select(*columns.values())
        .where(Job.id == bindparam("job", type_=Job.id.type), Job.deleted.is_(False))
        .with_for_update(read=True, key_share=True)
    )
    # of the table, not of the class: the parameters are values, not rows to insert
    inserting = (upsert if keyed else insert)(TASK).from_select(
        [column.key for column in columns], source
    )
    if isinstance(inserting, Upsert):
        inserting = inserting.on_conflict_do_nothing()
    return inserting.returning(*VIEW)


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
    digest = None
    if idempotency_key is not None:
        digest = _digest(request.model_dump(mode="json"))
    new_id = uuid7()
    inserted = await session.execute(
        _inserting(internal, request.delay_seconds > 0, idempotency_key is not None),
        {
            "new_id": new_id,
            "in_room": room,
            "submitter": caller.id,
            "given": request.payload,
            "rank": request.priority,
            "place": queue_order(request.priority, job.clock),
            "full_name": job.full_name,
            "key": idempotency_key,
            "digest": digest,
            "trace": telemetry.submitting(job.full_name, new_id),
            "job": job.id,
            "seconds": settings.internal_redispatch_seconds
            if internal
            else request.delay_seconds,
        },
    )
    row = inserted.one_or_none()
    if row is not None:
        place = job.queue_position if row.status is TaskStatus.PENDING else None
        return Submitted(read_view(row, place), created=True)
    if idempotency_key is None:
        return None
    earlier = await session.execute(
        seen(settings.queue_position_max)
        .add_columns(Task.request_digest)
        .where(_keyed(caller, job.id, room, idempotency_key))
    )
    row = earlier.one_or_none()
    if row is None:
        return None
    if row.request_digest != digest:
        raise IdempotencyKeyReused.exception()
    return Submitted(read_view(row), created=False)


class Batch(NamedTuple):
    """The ids of a batch, and those tasks of it that are new."""

    ids: list[UUID]
    created: list[TaskResponse]


# The ids of a batch follow each other, from one whose last bits are zero: the first
# task's key finds them all, and they are in the order of the request.
_BATCH_BITS = 10


def _ids(first: UUID, count: int) -> list[UUID]:
    return [UUID(int=first.int + n) for n in range(count)]


async def submit_many(
    session: AsyncSession,
    job: Row[Any],
    full_name: str,
    room: str,
    caller: Caller,
    requests: Sequence[TaskSubmitRequest],
    settings: JobLibSettings,
    *,
    idempotency_key: str | None = None,
    internal: bool = False,
) -> Batch | None:
    """Insert tasks of one job, at most 1000.

    Parameters
    ----------
    session : AsyncSession
        Whose owner commits.
    job : Row
        ``id`` of the job, and ``clock``; it stays locked against soft-deletion until
        the commit.
    full_name : str
        The job's.
    room : str
        The room that asks.
    caller : Caller
        The submitter.
    requests : sequence of TaskSubmitRequest
        What to run; their payloads were checked before.
    settings : JobLibSettings
        The host's.
    idempotency_key : str, optional
        For this user, room and job it names one batch.
    internal : bool
        The tasks are born claimed, for the broker instead of a worker.

    Returns
    -------
    Batch or None
        None when the job went away meanwhile.

    Raises
    ------
    ProblemException
        ``idempotency-key-reused``.
    """
    digest = None
    if idempotency_key is not None:
        digest = _digest([request.model_dump(mode="json") for request in requests])
    start = UUID(int=uuid7().int >> _BATCH_BITS << _BATCH_BITS)
    orders = [queue_order(request.priority, job.clock) for request in requests]
    redispatch = settings.internal_redispatch_seconds
    inserted = await session.execute(
        _inserting(
            internal, requests[0].delay_seconds > 0, idempotency_key is not None
        ),
        {
            "new_id": start,
            "in_room": room,
            "submitter": caller.id,
            "given": requests[0].payload,
            "rank": requests[0].priority,
            "place": orders[0],
            "full_name": full_name,
            "key": idempotency_key,
            "digest": digest,
            # one trace for all of them
            "trace": telemetry.submitting(full_name),
            "job": job.id,
            "seconds": redispatch if internal else requests[0].delay_seconds,
        },
    )
    first = inserted.one_or_none()
    if first is not None:
        created = await _add(session, job.id, first, requests, orders, settings)
        return Batch([task.id for task in created], created)
    if idempotency_key is None:
        return None
    earlier = await session.execute(
        select(Task.id, Task.request_digest).where(
            _keyed(caller, job.id, room, idempotency_key)
        )
    )
    row = earlier.one_or_none()
    if row is None:
        return None
    if row.request_digest != digest:
        raise IdempotencyKeyReused.exception()
    return Batch(_ids(row.id, len(requests)), [])


async def _add(
    session: AsyncSession,
    job_id: UUID,
    first: Row[Any],
    requests: Sequence[TaskSubmitRequest],
    orders: Sequence[int],
    settings: JobLibSettings,
) -> list[TaskResponse]:
    """Insert the other tasks of a batch beside its first, which holds the job."""
    waits = first.status is TaskStatus.PENDING
    common = {
        "job_id": job_id,
        "failed_attempts": 0,
        "deadline_at": None
        if waits
        else first.claimed_at + timedelta(seconds=settings.internal_redispatch_seconds),
        **{
            column.key: getattr(first, column.key)
            for column in (
                Task.job_name, Task.room_id, Task.created_by_id, Task.status,
                Task.attempt, Task.max_attempts, Task.created_at, Task.claimed_at,
                Task.traceparent,
            )
        },
    }  # fmt: skip
    own = [
        {
            "id": id_,
            "payload": request.payload,
            "priority": request.priority,
            "available_at": first.created_at + timedelta(seconds=request.delay_seconds)
            if request.delay_seconds
            else None,
        }
        for id_, request in zip(_ids(first.id, len(requests)), requests, strict=True)
    ]
    if len(own) > 1:
        # many rows of parameters for one small statement: no number of tasks makes a
        # large one
        await session.execute(
            insert(TASK),
            [
                {**common, **row, "queue_order": order}
                for row, order in zip(own[1:], orders[1:], strict=True)
            ],
        )
    places: list[int | None] = [None] * len(own)
    if waits:
        most = settings.queue_position_max
        head = await session.scalars(
            select(Task.queue_order)
            .where(Task.job_id == job_id, queued())
            .order_by(Task.queue_order)
            .limit(number(most))
        )
        before = head.all()
        places = [min(bisect_left(before, order) + 1, most) for order in orders]
    shown = read_view(first)
    return [
        shown.model_copy(
            update={
                **row,
                "available_at": row["available_at"] or first.created_at,
                "queue_position": place,
            }
        )
        for row, place in zip(own, places, strict=True)
    ]


# How many tasks a user may submit through this process until what waits of theirs is
# counted again: a count costs the more the more there is.
_uncounted: dict[UUID, int] = {}
# Until when, by the process's clock, a user who had too many is refused without a count.
_refused: dict[UUID, float] = {}
_REFUSED_SECONDS = 5
_REMEMBERED_USERS = 10_000


async def check_quota(
    session: AsyncSession, caller: Caller, settings: JobLibSettings, count: int = 1
) -> None:
    """Make sure that a user had room for the ``count`` tasks just submitted.

    After the insertion, since what is submitted again under its key needs no room.
    Counts only after each twentieth of the room that there was.

    Raises
    ------
    ProblemException
        ``quota-exceeded``.
    """
    most = settings.max_pending_tasks_per_user
    left = _uncounted.get(caller.id, most // 20) - count
    full = _refused.get(caller.id, 0.0) > time.monotonic()
    if left < 0 and not full:
        theirs = (
            select(literal_column("1"))
            .where(
                Task.created_by_id == caller.id,
                Task.status == constant(TaskStatus.PENDING),
            )
            .limit(number(most + 1))
            .subquery()
        )
        waiting = await session.scalar(select(func.count()).select_from(theirs)) or 0
        left = (most - waiting) // 20
        full = waiting > most
        if full:
            _refused[caller.id] = time.monotonic() + _REFUSED_SECONDS
    if full:
        raise QuotaExceeded.exception(
            f"waiting tasks are limited to {most} for each user",
            headers={"Retry-After": str(_REFUSED_SECONDS)},
        )
    for remembered in (_uncounted, _refused):
        if len(remembered) > _REMEMBERED_USERS:
            remembered.clear()
    _uncounted[caller.id] = left


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

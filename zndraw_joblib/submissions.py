"""Submissions: how a task, or a batch of them, gets into its queue."""

import hashlib
import json
import time
from bisect import bisect_left
from collections.abc import Sequence
from datetime import timedelta
from functools import lru_cache
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Float,
    Row,
    Select,
    and_,
    bindparam,
    case,
    func,
    insert,
    literal,
    literal_column,
    select,
)

# ON CONFLICT reads the same in PostgreSQL and SQLite, and SQLAlchemy renders this one
# construct for both.
from sqlalchemy.dialects.postgresql import Insert as Upsert
from sqlalchemy.dialects.postgresql import insert as upsert
from sqlalchemy.ext.asyncio import AsyncSession
from uuid_utils.compat import uuid7

from zndraw_joblib import jobs, telemetry
from zndraw_joblib.exceptions import (
    IdempotencyKeyReused,
    QuotaExceeded,
)
from zndraw_joblib.lifecycle import TaskStatus
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
from zndraw_joblib.schemas import (
    TaskResponse,
    TaskSubmitRequest,
)
from zndraw_joblib.settings import JobLibSettings
from zndraw_joblib.tasks import (
    PRIORITY_STEP,
    VIEW,
    born_claimed,
    least_order,
    position,
    queue_order,
    read_view,
    seen,
)
from zndraw_joblib.workers import Caller


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
            "least": least_order(),
            "better": priority * PRIORITY_STEP,
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

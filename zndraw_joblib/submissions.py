"""Submissions: how a task, or a batch of them, gets into its queue."""

import hashlib
import json
import time
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from functools import cache, lru_cache, partial
from typing import Any, NamedTuple, TypeVar
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Float,
    Row,
    Select,
    Text,
    bindparam,
    cast,
    func,
    insert,
    literal,
    literal_column,
    null,
    select,
)
from sqlalchemy.ext.asyncio import AsyncSession
from uuid_utils.compat import uuid7

from zndraw_joblib import jobs, telemetry
from zndraw_joblib.exceptions import (
    IdempotencyKeyReused,
    ProblemException,
    QuotaExceeded,
)
from zndraw_joblib.lifecycle import INTERNAL_ROOM, FullName, TaskStatus
from zndraw_joblib.models import (
    JOB,
    TASK,
    constant,
    execute,
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
    end_of_queue,
    next_order,
    of_job,
    order_taken,
    position,
    read_view,
    seen,
)
from zndraw_joblib.workers import Caller

T = TypeVar("T")


def _digest(asked: Any) -> str:
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


class Submitted(NamedTuple):
    """A task, and whether it is new or was there under its idempotency key."""

    task: TaskResponse
    created: bool


class Target(NamedTuple):
    """A job as it was found: where a submission goes.

    Attributes
    ----------
    id : UUID
        The job's.
    name : FullName
        The job's.
    schema : str
        Its JSON Schema, as JSON.
    """

    id: UUID
    name: FullName
    schema: str


# Jobs as they were found last. Whatever is submitted to one is inserted on the condition
# that the job is still there, and its schema still the one that the payload was checked
# against.
_known: dict[FullName, Target] = {}
_REMEMBERED_JOBS = 1000
_REMEMBERED_BYTES = 8192


async def _to_job(
    session: AsyncSession,
    room: str,
    full_name: str,
    attempt: Callable[[Target], Awaitable[T | None]],
) -> T:
    """Return what ``attempt`` makes of a submission to a job that ``room`` sees.

    It is tried with the job as remembered, and with the job as it is when that came to
    nothing. It returns None when the job is not what it was taken for.
    """
    name = jobs.find(room, full_name)
    known = _known.get(name)
    refused: ProblemException | None = None
    if known is not None:
        try:
            done = await attempt(known)
        except ProblemException as exc:
            refused, done = exc, None
        if done is not None:
            return done
    rows = await execute(session, jobs.SERVED, name._asdict())
    row = jobs.found(rows.one_or_none(), room, full_name)
    target = Target(row.id, name, row.schema)
    if refused is not None and target == known:
        raise refused
    done = await attempt(target)
    if done is None:
        raise jobs.not_found(room, full_name)
    if len(_known) > _REMEMBERED_JOBS:
        _known.clear()
    if len(target.schema) <= _REMEMBERED_BYTES:
        _known[name] = target
    return done


@lru_cache(maxsize=16)
def _inserting(internal: bool, delayed: bool, keyed: bool, position_max: int) -> Any:
    # built once for each shape
    place = end_of_queue(
        bindparam("least", type_=TASK.c.queue_order.type),
        bindparam("rank", type_=TASK.c.queue_order.type),
    )
    columns: dict[Any, Any] = {
        TASK.c.id: bindparam("new_id", type_=TASK.c.id.type),
        TASK.c.room_id: bindparam("in_room", type_=TASK.c.room_id.type),
        TASK.c.created_by_id: bindparam("submitter", type_=TASK.c.created_by_id.type),
        TASK.c.payload: bindparam("given", type_=TASK.c.payload.type),
        TASK.c.priority: bindparam("rank", type_=TASK.c.queue_order.type),
        TASK.c.queue_order: place,
        TASK.c.job_name: bindparam("full_name", type_=TASK.c.job_name.type),
        TASK.c.idempotency_key: bindparam("key", type_=TASK.c.idempotency_key.type),
        TASK.c.request_digest: bindparam("digest", type_=TASK.c.request_digest.type),
        TASK.c.traceparent: bindparam("trace", type_=TASK.c.traceparent.type),
        TASK.c.job_id: JOB.c.id,
        TASK.c.max_attempts: JOB.c.max_attempts,
    }
    seconds: ColumnElement[float] = bindparam("seconds", type_=Float())
    if internal:
        columns |= born_claimed(seconds) | {TASK.c.attempt: literal(1)}
    elif delayed:
        columns[TASK.c.available_at] = now(seconds)
    job: ColumnElement[UUID] = bindparam("job", type_=JOB.c.id.type)
    source = (
        select(*columns.values())
        .where(
            JOB.c.id == job,
            JOB.c.deleted.is_(False),
            cast(JOB.c.schema, Text) == bindparam("schema", type_=Text()),
        )
        .with_for_update(read=True, key_share=True)
    )
    if keyed:
        # as both databases have it; SQLAlchemy's own construct is compiled anew each time
        source = source.suffix_with("ON CONFLICT DO NOTHING")
    queue_position = null() if internal else position(job, place, position_max)
    # of the table, not of the class: the parameters are values, not rows to insert
    return (
        insert(TASK)
        .from_select([column.key for column in columns], source)
        .returning(TASK.c.queue_order, queue_position.label("queue_position"), *VIEW)
    )


async def _insert(
    session: AsyncSession,
    target: Target,
    room: str,
    caller: Caller,
    request: TaskSubmitRequest,
    settings: JobLibSettings,
    **names: Any,
) -> Row[Any] | None:
    internal = target.name.room == INTERNAL_ROOM
    redispatch = settings.internal_redispatch_seconds
    inserted = await execute(
        session,
        _inserting(
            internal,
            request.delay_seconds > 0,
            names["key"] is not None,
            settings.queue_position_max,
        ),
        {
            "in_room": room,
            "submitter": caller.id,
            "given": request.payload,
            "rank": request.priority,
            "full_name": str(target.name),
            "job": target.id,
            "schema": target.schema,
            "seconds": redispatch if internal else request.delay_seconds,
            **names,
        },
    )
    return inserted.one_or_none()


async def _earlier(
    session: AsyncSession,
    statement: Select[Any],
    target: Target,
    room: str,
    caller: Caller,
    key: str | None,
    digest: str | None,
) -> Row[Any] | None:
    """Return what ``statement`` reads of the task that was submitted under the key."""
    if key is None:
        return None
    found = await execute(
        session,
        statement.add_columns(TASK.c.request_digest).where(
            TASK.c.created_by_id == caller.id,
            TASK.c.job_id == target.id,
            TASK.c.room_id == room,
            TASK.c.idempotency_key == key,
            of_job(JOB.c.deleted).is_(False),
            cast(of_job(JOB.c.schema), Text) == target.schema,
        ),
    )
    row = found.one_or_none()
    if row is not None and row.request_digest != digest:
        raise IdempotencyKeyReused.exception()
    return row


async def submit(
    session: AsyncSession,
    room: str,
    full_name: str,
    caller: Caller,
    request: TaskSubmitRequest,
    settings: JobLibSettings,
    check: Callable[[Target], bool],
    *,
    idempotency_key: str | None = None,
) -> Submitted:
    """Insert a task.

    A task of an ``@internal`` job is born claimed, for the broker instead of a worker.

    Parameters
    ----------
    session : AsyncSession
        Whose owner commits; until then the job is locked against soft-deletion.
    room : str
        The room that asks.
    full_name : str
        The job's.
    caller : Caller
        The submitter.
    request : TaskSubmitRequest
        What to run.
    settings : JobLibSettings
        The host's.
    check : callable
        Raises if the job can't take what is submitted.
    idempotency_key : str, optional
        For this user, room and job it names one task.

    Raises
    ------
    ProblemException
        ``job-not-found``, also for a malformed name, ``idempotency-key-reused``, and
        what ``check`` raises.
    """
    digest = idempotency_key and _digest(request.model_dump(mode="json"))
    new_id = uuid7()
    trace = cache(partial(telemetry.submitting, full_name, new_id))

    async def attempt(target: Target) -> Submitted | None:
        check(target)
        row = await _insert(
            session,
            target,
            room,
            caller,
            request,
            settings,
            new_id=new_id,
            least=next_order(),
            key=idempotency_key,
            digest=digest,
            trace=trace(),
        )
        if row is not None:
            order_taken(row.queue_order, request.priority)
            return Submitted(read_view(row), created=True)
        statement = seen(settings.queue_position_max)
        row = await _earlier(
            session, statement, target, room, caller, idempotency_key, digest
        )
        return Submitted(read_view(row), created=False) if row is not None else None

    return await _to_job(session, room, full_name, attempt)


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
    room: str,
    full_name: str,
    caller: Caller,
    requests: Sequence[TaskSubmitRequest],
    settings: JobLibSettings,
    check: Callable[[Target], bool],
    *,
    idempotency_key: str | None = None,
) -> Batch:
    """Insert tasks of one job, at most 1000.

    Parameters, and what is raised, are those of :func:`submit`, but for:

    Parameters
    ----------
    requests : sequence of TaskSubmitRequest
        What to run.
    idempotency_key : str, optional
        For this user, room and job it names one batch.
    """
    digest = idempotency_key and _digest([r.model_dump(mode="json") for r in requests])
    first_id = UUID(int=uuid7().int >> _BATCH_BITS << _BATCH_BITS)
    # one trace for all of them
    trace = cache(partial(telemetry.submitting, full_name))

    async def attempt(target: Target) -> Batch | None:
        check(target)
        first = await _insert(
            session,
            target,
            room,
            caller,
            requests[0],
            settings,
            new_id=first_id,
            least=next_order(len(requests)),
            key=idempotency_key,
            digest=digest,
            trace=trace(),
        )
        if first is not None:
            order_taken(first.queue_order, first.priority, len(requests))
            created = await _add(session, target.id, first, requests, settings)
            return Batch([task.id for task in created], created)
        statement = select(TASK.c.id)
        row = await _earlier(
            session, statement, target, room, caller, idempotency_key, digest
        )
        return Batch(_ids(row.id, len(requests)), []) if row is not None else None

    return await _to_job(session, room, full_name, attempt)


async def _add(
    session: AsyncSession,
    job_id: UUID,
    first: Row[Any],
    requests: Sequence[TaskSubmitRequest],
    settings: JobLibSettings,
) -> list[TaskResponse]:
    """Insert the other tasks of a batch beside its first, which holds the job."""
    base = first.queue_order + first.priority * PRIORITY_STEP
    orders = [base + n - r.priority * PRIORITY_STEP for n, r in enumerate(requests)]
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
                TASK.c.job_name, TASK.c.room_id, TASK.c.created_by_id, TASK.c.status,
                TASK.c.attempt, TASK.c.max_attempts, TASK.c.created_at, TASK.c.claimed_at,
                TASK.c.traceparent,
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
        await execute(
            session,
            insert(TASK),
            [
                {**common, **row, "queue_order": order}
                for row, order in zip(own[1:], orders[1:], strict=True)
            ],
        )
    places: list[int | None] = [None] * len(own)
    if waits:
        most = settings.queue_position_max
        head = (
            select(TASK.c.queue_order)
            .where(TASK.c.job_id == job_id, queued())
            .order_by(TASK.c.queue_order)
            .limit(number(most))
        )
        before = (await execute(session, head)).scalars().all()
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
                TASK.c.created_by_id == caller.id,
                TASK.c.status == constant(TaskStatus.PENDING),
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

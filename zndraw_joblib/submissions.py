"""Submissions: how a task, or a batch of them, gets into its queue, once or again."""

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from functools import lru_cache
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    CompoundSelect,
    Float,
    Row,
    Select,
    Text,
    bindparam,
    cast,
    exists,
    func,
    insert,
    literal,
    literal_column,
    null,
    select,
    true,
    union_all,
    update,
)
from sqlalchemy.ext.asyncio import AsyncSession
from uuid_utils.compat import uuid7

from zndraw_joblib import jobs, telemetry
from zndraw_joblib.database import execute, now, number, returned, scalar
from zndraw_joblib.exceptions import (
    Forbidden,
    IdempotencyKeyReused,
    InvalidTaskTransition,
    JobNotFound,
    QuotaExceeded,
)
from zndraw_joblib.lifecycle import INTERNAL_ROOM, TERMINAL, FullName, TaskStatus
from zndraw_joblib.models import JOB, TASK, constant, in_states, queued
from zndraw_joblib.schemas import TaskResponse, TaskSubmitRequest, canonical
from zndraw_joblib.settings import JobLibSettings
from zndraw_joblib.tasks import (
    BRIEF,
    VIEW,
    back_in_queue,
    born_claimed,
    last_errors,
    new_place,
    not_found,
    of_job,
    position,
    read_changed,
    read_view,
    seen,
)
from zndraw_joblib.workers import Caller, RoomAccess, permits


def _digest(*requests: TaskSubmitRequest) -> str:
    asked = canonical([dict(request) for request in requests])
    return hashlib.sha256(asked.encode()).hexdigest()


class Submitted(NamedTuple):
    """A task, and whether it is new or was there under its idempotency key."""

    task: TaskResponse
    created: bool


class Batch(NamedTuple):
    """The ids of a batch, and those tasks of it that are new."""

    ids: list[UUID]
    created: list[TaskResponse]


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


async def _target(session: AsyncSession, room: str, full_name: str) -> Target:
    name = jobs.find(room, full_name)
    rows = await execute(session, jobs.SERVED, name._asdict())
    row = jobs.found(rows.one_or_none(), room, full_name)
    return Target(row.id, name, row.schema)


def _parameter(name: str, column: Any) -> Any:
    return bindparam(name, type_=column.type)


# Those of the tasks that were submitted under a key.
_UNDER_KEY = (
    TASK.c.created_by_id == _parameter("submitter", TASK.c.created_by_id),
    TASK.c.job_id == _parameter("job", TASK.c.job_id),
    TASK.c.room_id == _parameter("in_room", TASK.c.room_id),
    TASK.c.idempotency_key == _parameter("key", TASK.c.idempotency_key),
)


@lru_cache(maxsize=16)
def _inserting(internal: bool, delayed: bool, keyed: bool, position_max: int) -> Any:
    # built once for each shape
    job, rank = _parameter("job", JOB.c.id), _parameter("rank", TASK.c.queue_order)
    submitter = _parameter("submitter", TASK.c.created_by_id)
    columns: dict[Any, Any] = {
        TASK.c.id: _parameter("new_id", TASK.c.id),
        TASK.c.room_id: _parameter("in_room", TASK.c.room_id),
        TASK.c.created_by_id: submitter,
        TASK.c.payload: _parameter("given", TASK.c.payload),
        TASK.c.payload_checked: _parameter("checked", TASK.c.payload_checked),
        TASK.c.priority: rank,
        TASK.c.queue_order: new_place(job, rank, submitter),
        TASK.c.job_name: _parameter("full_name", TASK.c.job_name),
        TASK.c.idempotency_key: _parameter("key", TASK.c.idempotency_key),
        TASK.c.request_digest: _parameter("digest", TASK.c.request_digest),
        TASK.c.traceparent: _parameter("trace", TASK.c.traceparent),
        TASK.c.job_id: JOB.c.id,
        TASK.c.max_attempts: JOB.c.max_attempts,
    }
    seconds: ColumnElement[float] = bindparam("seconds", type_=Float())
    if internal:
        columns |= born_claimed(seconds) | {TASK.c.attempt: literal(1)}
    elif delayed:
        columns[TASK.c.available_at] = now(seconds)
    source = (
        select(*columns.values())
        .where(
            JOB.c.id == job,
            JOB.c.deleted.is_(False),
            # the one that the payload was checked against
            cast(JOB.c.schema, Text) == bindparam("schema", type_=Text()),
            ~exists().where(*_UNDER_KEY) if keyed else true(),
        )
        .with_for_update(read=True, key_share=True)
    )
    if keyed:
        # as both databases have it; SQLAlchemy's own construct is compiled anew each time
        source = source.suffix_with("ON CONFLICT DO NOTHING")
    order, id_ = returned(TASK.c.queue_order), returned(TASK.c.id)
    queue_position = null() if internal else position(job, order, id_, position_max)
    # of the table, not of the class: the parameters are values, not rows to insert
    return (
        insert(TASK)
        .from_select([column.key for column in columns], source)
        .returning(
            TASK.c.queue_order,
            queue_position.label("queue_position"),
            # but for what the request told, and nobody need read twice
            *(column for column in VIEW if column is not TASK.c.payload),
        )
    )


async def _insert(
    session: AsyncSession,
    target: Target,
    request: TaskSubmitRequest,
    settings: JobLibSettings,
    names: dict[str, Any],
) -> Row[Any] | None:
    internal = target.name.room == INTERNAL_ROOM
    redispatch = settings.internal_redispatch_seconds
    shape = internal, request.delay_seconds > 0, names["key"] is not None
    inserted = await execute(
        session,
        _inserting(*shape, settings.queue_position_max),
        {
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
    full_name: str,
    names: dict[str, Any],
) -> Row[Any]:
    """Return what ``statement`` reads of the first that is left under the key."""
    if names["key"] is not None:
        found = await execute(
            session,
            statement.add_columns(TASK.c.request_digest, TASK.c.batch_index)
            .where(*_UNDER_KEY)
            .order_by(TASK.c.batch_index)
            .limit(number(1)),
            {"job": target.id, **names},
        )
        if row := found.one_or_none():
            if row.request_digest != names["digest"]:
                raise IdempotencyKeyReused.exception()
            return row
    # it went, or came back with another schema, after it was found
    raise jobs.not_found(room, full_name)


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
        Raises if the job can't take what is submitted; returns whether the payload was
        compared with the job's schema.
    idempotency_key : str, optional
        For this user, room and job it names one task, as long as that is kept.

    Raises
    ------
    ProblemException
        ``job-not-found``, also for a malformed name, ``idempotency-key-reused``,
        ``quota-exceeded``, and what ``check`` raises.
    """
    target = await _target(session, room, full_name)
    new_id = uuid7()
    names = {
        "new_id": new_id,
        "in_room": room,
        "submitter": caller.id,
        "checked": check(target),
        "key": idempotency_key,
        "digest": idempotency_key and _digest(request),
        "trace": telemetry.submitting(full_name, new_id),
    }
    row = await _insert(session, target, request, settings, names)
    if row is not None:
        await _check_quota(session, caller.id, settings, [row.queue_order])
        return Submitted(read_view(row, payload=request.payload), created=True)
    statement = seen(settings.queue_position_max)
    row = await _earlier(session, statement, target, room, full_name, names)
    return Submitted(read_view(row), created=False)


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
        For this user, room and job it names one batch, as long as anything of it is kept.
    """
    target = await _target(session, room, full_name)
    names = {
        # Its last bits are zero, so that the ids of a batch can follow each other in the
        # order of the request, and one tells all.
        "new_id": UUID(int=uuid7().int >> 10 << 10),
        "in_room": room,
        "submitter": caller.id,
        "checked": check(target),
        "key": idempotency_key,
        "digest": idempotency_key and _digest(*requests),
        # one trace for all of them
        "trace": telemetry.submitting(full_name),
    }
    first = await _insert(session, target, requests[0], settings, names)
    if first is None:
        statement = select(TASK.c.id)
        row = await _earlier(session, statement, target, room, full_name, names)
        ids = _ids(UUID(int=row.id.int - row.batch_index), len(requests))
        return Batch(ids, [])
    places = await _places(session, target.id, first, requests)
    key = {"idempotency_key": names["key"], "request_digest": names["digest"]}
    created = await _add(session, target.id, first, requests, places, key, settings)
    await _check_quota(session, caller.id, settings, places)
    return Batch([task.id for task in created], created)


# Priorities whose queues one statement looks at.
_PLACED = 16


@lru_cache(maxsize=1)
def _placing() -> CompoundSelect[Any]:
    # built once: to make it takes longer than to run it
    job = _parameter("job", TASK.c.job_id)
    user = _parameter("submitter", TASK.c.created_by_id)
    ranks = [_parameter(f"rank_{n}", TASK.c.queue_order) for n in range(_PLACED)]
    return union_all(*(select(rank, new_place(job, rank, user)) for rank in ranks))


async def _places(
    session: AsyncSession, job_id: UUID, first: Row[Any], requests: Sequence[TaskSubmitRequest]
) -> list[int]:
    """Return the places of a batch, whose tasks follow each other in each queue."""
    following = {first.priority: first.queue_order}
    others = sorted({request.priority for request in requests} - {first.priority})
    for start in range(0, len(others), _PLACED):
        some = others[start : start + _PLACED]
        ranks = {f"rank_{n}": some[n % len(some)] for n in range(_PLACED)}
        asked = {"job": job_id, "submitter": first.created_by_id, **ranks}
        found = await execute(session, _placing(), asked)
        following |= dict(found.tuples().all())
    places = []
    for request in requests:
        places.append(following[request.priority])
        following[request.priority] += 1
    return places


def _shared(
    job_id: UUID, first: Row[Any], under_key: dict[str, Any], settings: JobLibSettings
) -> dict[str, Any]:
    """Return what the other tasks of a batch have from its first."""
    return {
        "job_id": job_id,
        "failed_attempts": 0,
        **under_key,
        "deadline_at": None
        if first.status is TaskStatus.PENDING
        else first.claimed_at + timedelta(seconds=settings.internal_redispatch_seconds),
        **{
            column.key: getattr(first, column.key)
            for column in (
                TASK.c.job_name, TASK.c.room_id, TASK.c.created_by_id, TASK.c.status,
                TASK.c.attempt, TASK.c.max_attempts, TASK.c.created_at, TASK.c.claimed_at,
                TASK.c.traceparent, TASK.c.payload_checked,
            )
        },
    }  # fmt: skip


async def _add(
    session: AsyncSession,
    job_id: UUID,
    first: Row[Any],
    requests: Sequence[TaskSubmitRequest],
    places: Sequence[int],
    under_key: dict[str, Any],
    settings: JobLibSettings,
) -> list[TaskResponse]:
    """Insert the other tasks of a batch beside its first, which holds the job."""
    shared = _shared(job_id, first, under_key, settings)
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
                {**shared, **row, "queue_order": places[n], "batch_index": n}
                for n, row in enumerate(own)
                if n
            ],
        )
    positions: Sequence[int | None] = [None] * len(own)
    if first.status is TaskStatus.PENDING:
        ranked = list(zip(places, _ids(first.id, len(own)), strict=True))
        most = settings.queue_position_max
        positions = await _positions(session, job_id, ranked, most)
    shown = read_view(first, payload=requests[0].payload)
    return [
        shown.model_copy(
            update={
                **row,
                "available_at": row["available_at"] or first.created_at,
                "queue_position": place,
            }
        )
        for row, place in zip(own, positions, strict=True)
    ]


async def _positions(
    session: AsyncSession, job_id: UUID, places: Sequence[tuple[int, UUID]], most: int
) -> list[int]:
    """Return how far places are from the head of a job's queue: one look for all."""
    head = await execute(
        session,
        select(TASK.c.queue_order, TASK.c.id)
        .where(TASK.c.job_id == job_id, queued())
        .order_by(TASK.c.queue_order, TASK.c.id)
        .limit(number(most)),
    )
    before = [(row.queue_order, row.id) for row in head]
    return [min(bisect_left(before, place) + 1, most) for place in places]


async def retry(
    session: AsyncSession,
    task_id: UUID,
    caller: Caller,
    may_enter: RoomAccess,
    settings: JobLibSettings,
) -> TaskResponse:
    """Set a terminal task going again, with all its attempts before it.

    Raises
    ------
    ProblemException
        ``task-not-found``, ``forbidden``, ``invalid-task-transition``,
        ``quota-exceeded``, or ``job-not-found`` when its job is gone.
    """
    # locked, so that no soft-deletion of the job comes in between; where nothing is
    # locked, what was read here may be over by the time of the write
    found = await execute(
        session,
        select(*BRIEF, TASK.c.errors, JOB.c.room_id.label("of_room"))
        .join(JOB, TASK.c.job_id == JOB.c.id)
        .where(TASK.c.id == task_id)
        .with_for_update(read=True, key_share=True, of=JOB),
    )
    task = found.one_or_none()
    entitled = task and (caller.is_superuser or task.created_by_id == caller.id)
    if task is None or not (entitled or await permits(may_enter, session, caller, task.room_id)):
        raise not_found(task_id)
    if not entitled:
        raise Forbidden.exception(f"task {task_id} is not yours to retry")
    seconds = settings.internal_redispatch_seconds
    reborn = born_claimed(seconds) if task.of_room == INTERNAL_ROOM else {}
    place = new_place(TASK.c.job_id, TASK.c.priority, TASK.c.created_by_id)
    raised = await execute(
        session,
        update(TASK)
        .where(
            TASK.c.id == task_id,
            in_states(TERMINAL),
            TASK.c.attempt == task.attempt,
            of_job(JOB.c.deleted).is_(False),
        )
        .values(
            {
                **back_in_queue(),
                TASK.c.queue_order: place,
                TASK.c.queued_at: now(),
                TASK.c.failed_attempts: 0,
                TASK.c.completed_at: None,
                TASK.c.result: None,
                # or each retry would make it longer
                TASK.c.errors: "\n".join(last_errors(task)) or None,
                **reborn,
            }
        )
        .returning(TASK.c.queue_order, *VIEW),
    )
    rows = raised.all()
    if rows:
        if not reborn:
            places = [row.queue_order for row in rows]
            await _check_quota(session, task.created_by_id, settings, places)
        return (await read_changed(session, rows, settings))[0]
    if await scalar(session, select(of_job(JOB.c.deleted)).where(TASK.c.id == task_id)):
        raise JobNotFound.exception("job not found: the task's job is gone")
    raise InvalidTaskTransition.exception("only a terminal task can be tried again")


# A quota up to here is counted with each submission: it takes a millisecond.
ALWAYS_COUNTED = 10_000


async def _check_quota(
    session: AsyncSession, user_id: UUID | None, settings: JobLibSettings, places: Iterable[int]
) -> None:
    """Make sure that a user had room for what just took ``places`` in a queue.

    After the insertion, since what is submitted again under its key needs no room. A count
    costs the more the more there is: of a large quota only who passes each so manieth place
    of a queue is counted. Who is refused there comes to it again, since the next place is
    the same.

    Raises
    ------
    ProblemException
        ``quota-exceeded``.
    """
    most = settings.max_pending_tasks_per_user
    between = 1 if most <= ALWAYS_COUNTED else most // 20
    if user_id is None or all(place % between for place in places):
        return
    theirs = (
        select(literal_column("1"))
        .where(TASK.c.created_by_id == user_id, TASK.c.status == constant(TaskStatus.PENDING))
        .limit(number(most + 1))
        .subquery()
    )
    waiting = await scalar(session, select(func.count()).select_from(theirs)) or 0
    if waiting > most:
        raise QuotaExceeded.exception(
            f"waiting tasks are limited to {most} for each user", headers={"Retry-After": "5"}
        )

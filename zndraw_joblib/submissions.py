"""Submissions: how tasks get into their queue, once or again."""

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple
from uuid import UUID

import sqlalchemy as sa
from pydantic_core import to_json
from sqlalchemy.ext.asyncio import AsyncSession
from uuid_utils.compat import uuid7

from zndraw_joblib import database, exceptions, jobs, tasks, telemetry
from zndraw_joblib.database import execute, now, number
from zndraw_joblib.encoding import canonical
from zndraw_joblib.events import TaskView
from zndraw_joblib.lifecycle import TaskStatus, WaitingFor
from zndraw_joblib.models import JOB, TASK, ahead, constant, queued
from zndraw_joblib.schemas import TaskSubmitRequest
from zndraw_joblib.settings import JobLibSettings
from zndraw_joblib.workers import Caller, check_quota

# The places of one priority: 52 bits hold the microseconds until 2112.
PRIORITY_STEP = 2**52


def _start(priority: Any) -> Any:
    return sa.literal(-PRIORITY_STEP, sa.BigInteger()) * priority


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
    return database.greatest(
        sa.func.coalesce(_head(job_id, priority) + 1, start + database.microseconds()),
        # a clock may be set back
        sa.func.coalesce(theirs + 1, start),
    )


def place_again() -> sa.ColumnElement[int]:
    """Return the place of a task that comes back: its own, or beside the first if later.

    With a place from long ago it would be the first of its queue for those who come now,
    and they would pass all who wait. Beside the first it is earlier by its id.
    """
    first = _head(TASK.c.job_id, TASK.c.priority)
    clock = _start(TASK.c.priority) + database.microseconds()
    return database.greatest(TASK.c.queue_order, sa.func.coalesce(first, clock))


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


def claimed_for_broker(redispatch_seconds: float | sa.ColumnElement[float]) -> dict[Any, Any]:
    """Return what makes an ``@internal`` task wait for the broker's answer."""
    return {
        TASK.c.status: sa.literal(TaskStatus.CLAIMED, TASK.c.status.type),
        TASK.c.attempt: TASK.c.attempt + 1,
        TASK.c.claimed_at: now(),
        TASK.c.deadline_at: now(redispatch_seconds),
        TASK.c.dispatches: sa.literal(1),
    }


class Submission(NamedTuple):
    """What was submitted, now or earlier under the same idempotency key.

    Attributes
    ----------
    ids : list of UUID
        Of the tasks, in the order of the request.
    tasks : list of TaskView
        The new ones; several have no contents, but for the broker. Where none is new, the
        first that is left.
    created : bool
        Whether they are new.
    """

    ids: list[UUID]
    tasks: list[TaskView]
    created: bool


def _parameter(name: str, column: Any) -> Any:
    return sa.bindparam(name, type_=column.type)


_JOB_ID = _parameter("job", TASK.c.job_id)
_SUBMITTER = _parameter("submitter", TASK.c.created_by_id)
# Those of the tasks that were submitted under a key.
_UNDER_KEY = (
    TASK.c.created_by_id == _SUBMITTER,
    TASK.c.job_id == _JOB_ID,
    TASK.c.room_id == _parameter("in_room", TASK.c.room_id),
    TASK.c.idempotency_key == _parameter("key", TASK.c.idempotency_key),
)


def _values(internal: bool) -> dict[Any, Any]:
    """Return what a new task consists of, but for what its job says."""
    rank = _parameter("rank", TASK.c.queue_order)
    values = {
        TASK.c.id: _parameter("new_id", TASK.c.id),
        TASK.c.job_id: _JOB_ID,
        TASK.c.room_id: _parameter("in_room", TASK.c.room_id),
        TASK.c.created_by_id: _SUBMITTER,
        TASK.c.payload: _parameter("given", TASK.c.payload),
        TASK.c.payload_checked: _parameter("checked", TASK.c.payload_checked),
        TASK.c.priority: rank,
        TASK.c.queue_order: new_place(_JOB_ID, rank, _SUBMITTER),
        TASK.c.job_name: _parameter("full_name", TASK.c.job_name),
        TASK.c.idempotency_key: _parameter("key", TASK.c.idempotency_key),
        TASK.c.request_digest: _parameter("digest", TASK.c.request_digest),
        TASK.c.batch_index: _parameter("index", TASK.c.batch_index),
        TASK.c.traceparent: _parameter("trace", TASK.c.traceparent),
    }
    return values | _times(internal, sa.bindparam("seconds", type_=sa.Float()))


def _times(internal: bool, seconds: sa.ColumnElement[float]) -> dict[Any, Any]:
    """Return whether a new task waits for its time, or for the broker's answer."""
    if internal:
        return claimed_for_broker(seconds) | {TASK.c.attempt: sa.literal(1)}
    return {TASK.c.available_at: sa.case((seconds > 0, now(seconds)))}


def _insert(values: dict[Any, Any], source: sa.Select[Any]) -> Any:
    # of the table, not of the class: the parameters are values, not rows to insert
    return sa.insert(TASK).from_select([column.key for column in values], source)


@lru_cache(maxsize=16)
def _inserting(internal: bool, keyed: bool) -> Any:
    """Return what inserts the first task of a submission, if the job takes it."""
    # built once for each shape
    values = _values(internal) | {TASK.c.max_attempts: JOB.c.max_attempts}
    source = (
        sa.select(*values.values())
        .where(
            JOB.c.id == _JOB_ID,
            JOB.c.deleted.is_(False),
            # the one that the payload was checked against
            sa.cast(JOB.c.schema, sa.Text) == sa.bindparam("schema", type_=sa.Text()),
            ~sa.exists().where(*_UNDER_KEY) if keyed else sa.true(),
        )
        .with_for_update(read=True, key_share=True)
    )
    if keyed:
        # as both databases have it; SQLAlchemy's own construct is compiled anew each time
        source = source.suffix_with("ON CONFLICT DO NOTHING")
    order, id_ = database.returned(TASK.c.queue_order), database.returned(TASK.c.id)
    position = sa.null() if internal else tasks.position(_JOB_ID, order, id_)
    placed = position.label("queue_position")
    shown = (placed if column.key == placed.key else column for column in tasks.SHOWN)
    return _insert(values, source).returning(*shown, TASK.c.queue_order)


# What the tasks of a batch have from its first one, and what each has of its own.
_FIRST = TASK.alias("first")
_SAME = (
    TASK.c.job_id,
    TASK.c.room_id,
    TASK.c.created_by_id,
    TASK.c.payload_checked,
    TASK.c.job_name,
    TASK.c.idempotency_key,
    TASK.c.request_digest,
    TASK.c.traceparent,
    TASK.c.max_attempts,
    TASK.c.created_at,
)
_OWN = {"new_id": TASK.c.id, "given": TASK.c.payload, "index": TASK.c.batch_index}


def rows_of(parameter: str) -> tuple[Any, Callable[[str, Any], sa.ColumnElement[Any]]]:
    """Return the rows of a parameter, a list in JSON, and what reads their members."""
    # one parameter: no number of tasks makes a large statement
    rows = database.elements(sa.bindparam(parameter, type_=sa.Text())).table_valued("value")

    def own(name: str, type_: Any) -> sa.ColumnElement[Any]:
        return sa.cast(database.member(rows.c.value, sa.literal_column(f"'{name}'")), type_)

    return rows, own


@lru_cache(maxsize=2)
def _inserting_others(internal: bool) -> Any:
    """Return what inserts the other ones, like the first, which holds the job."""
    others, own = rows_of("others")
    rank, seconds = own("rank", sa.BigInteger()), own("seconds", sa.Float())
    # none sees the others of its statement, which come behind each other
    before = sa.func.row_number().over(partition_by=rank, order_by=own("index", sa.Integer())) - 1
    place = new_place(_FIRST.c.job_id, rank, _FIRST.c.created_by_id)
    values = {
        **{column: _FIRST.c[column.key] for column in _SAME},
        **{column: own(name, column.type) for name, column in _OWN.items()},
        **_times(internal, seconds),
        TASK.c.priority: rank,
        TASK.c.queue_order: place + before,
    }
    source = (
        sa.select(*values.values())
        .join_from(_FIRST, others, sa.true())
        .where(_FIRST.c.id == _parameter("first", TASK.c.id))
    )
    # the broker gets the contents
    shown = tasks.SHOWN if internal else tasks.BRIEF
    return _insert(values, source).returning(*shown, TASK.c.queue_order)


async def submit(
    session: AsyncSession,
    room: str,
    full_name: str,
    caller: Caller,
    requests: Sequence[TaskSubmitRequest],
    settings: JobLibSettings,
    check: Callable[[jobs.Target], bool],
    *,
    idempotency_key: str | None = None,
) -> Submission:
    """Insert tasks of one job, at most 1000: all of them, or none.

    Those of an ``@internal`` job are born claimed, for the broker instead of a worker.
    Until the commit the job is locked against soft-deletion.

    Parameters
    ----------
    room, full_name : str
        The room that asks, and the job's name.
    requests : sequence of TaskSubmitRequest
        What to run.
    check : callable
        Raises if the job can't take what is submitted; returns whether the payloads were
        compared with the job's schema.
    idempotency_key : str, optional
        For this user, room and job it names one submission, as long as any of it is kept.

    Raises
    ------
    ProblemException
        ``job-not-found``, also for a malformed name, ``idempotency-key-reused``,
        ``quota-exceeded``, and what ``check`` raises.
    """
    target = await jobs.require(session, room, full_name, settings)
    whose = {"in_room": room, "submitter": caller.id, "checked": check(target)}
    first, *others = _rows(target, whose, requests, settings, idempotency_key)
    inserting = _inserting(target.internal, bool(idempotency_key))
    values = {**first, "schema": target.schema, **tasks.limits(settings)}
    inserted = await execute(session, inserting, values)
    rows: list[Any] = list(inserted.all())
    if not rows:
        return await _earlier(session, target, first, len(requests), settings)
    if others:
        rows = await _insert_others(session, target, rows[0], others)
    await check_waiting(session, caller.id, settings, [row.queue_order for row in rows])
    if not target.internal:
        rows = await _placed(session, target, rows, settings)
    return Submission([row.id for row in rows], rows, created=True)


def _rows(
    target: jobs.Target,
    whose: dict[str, Any],
    requests: Sequence[TaskSubmitRequest],
    settings: JobLibSettings,
    key: str | None,
) -> list[dict[str, Any]]:
    """Return the parameters of each task."""
    names = {
        **whose,
        "job": target.id,
        "full_name": str(target.name),
        "key": key,
        "digest": key and _digest(requests),
        "trace": telemetry.carried(),
    }
    redispatch = settings.internal_redispatch_seconds
    # Its last bits are zero, so that the ids of a batch can follow each other in the order
    # of the request, and one tells all.
    first_id = uuid7().int >> 10 << 10
    return [
        {
            **names,
            "new_id": UUID(int=first_id + n),
            "index": n,
            "given": request.payload,
            "rank": request.priority,
            "seconds": redispatch if target.internal else request.delay_seconds,
        }
        for n, request in enumerate(requests)
    ]


def _digest(requests: Sequence[TaskSubmitRequest]) -> str:
    asked = canonical([dict(request) for request in requests])
    return hashlib.sha256(asked.encode()).hexdigest()


async def _earlier(
    session: AsyncSession,
    target: jobs.Target,
    names: dict[str, Any],
    count: int,
    settings: JobLibSettings,
) -> Submission:
    """Return what was submitted under the key before."""
    if names["key"] is not None:
        reading = tasks.SEEN.where(*_UNDER_KEY)
        earlier = reading.add_columns(TASK.c.request_digest, TASK.c.batch_index)
        found = await execute(
            session,
            earlier.order_by(TASK.c.batch_index).limit(number(1)),
            names | tasks.limits(settings),
        )
        row: Any = found.one_or_none()
        if row is not None:
            if row.request_digest != names["digest"]:
                raise exceptions.IdempotencyKeyReused.exception()
            first_id = row.id.int - row.batch_index
            ids = [UUID(int=first_id + n) for n in range(count)]
            return Submission(ids, [row], created=False)
    # it went, or came back with another schema, after it was found
    raise jobs.not_found(names["in_room"], str(target.name))


async def _insert_others(
    session: AsyncSession, target: jobs.Target, first: sa.Row[Any], others: Sequence[dict[str, Any]]
) -> list[Any]:
    """Insert the other tasks of a batch; return all of them."""
    entries = [
        {
            "new_id": other["new_id"].hex,
            "given": to_json(other["given"]).decode(),
            **{name: other[name] for name in ("index", "rank", "seconds")},
        }
        for other in others
    ]
    values = {"first": first.id, "others": to_json(entries).decode()}
    inserted = await execute(session, _inserting_others(target.internal), values)
    return [first, *sorted(inserted, key=lambda row: row.id)]


async def _placed(
    session: AsyncSession, target: jobs.Target, rows: Sequence[Any], settings: JobLibSettings
) -> list[TaskView]:
    """Return tasks with their places in the queue: one look at its head for many of them."""
    if len(rows) == 1:
        (only,) = rows
        later = WaitingFor.DELAYED if only.available_at else WaitingFor.BEHIND
        return [tasks.waiting(only, only.queue_position, target.obstacle or later)]
    most = settings.queue_position_max
    head = await execute(
        session,
        sa.select(TASK.c.queue_order, TASK.c.id)
        .where(TASK.c.job_id == target.id, queued())
        .order_by(TASK.c.queue_order, TASK.c.id)
        .limit(number(most)),
    )
    before = [(row.queue_order, row.id) for row in head]

    def position(row: Any) -> int:
        return min(bisect_left(before, (row.queue_order, row.id)) + 1, most)

    return [tasks.waiting(row, position(row)) for row in rows]


# A quota up to here is counted with each submission: it takes a millisecond.
ALWAYS_COUNTED = 10_000


async def check_waiting(
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
    pending = TASK.c.status == constant(TaskStatus.PENDING)
    theirs: sa.Select[Any] = sa.select(sa.literal_column("1")).where(
        TASK.c.created_by_id == user_id, pending
    )
    await check_quota(session, theirs, most, "waiting tasks", retry_after=5)

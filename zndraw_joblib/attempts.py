"""Attempts: how they end, and what the server itself does with them."""

import json
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Float,
    Select,
    String,
    and_,
    case,
    cast,
    exists,
    func,
    literal,
    null,
    or_,
    select,
    true,
    tuple_,
    update,
)
from sqlalchemy.ext.asyncio import AsyncSession

from zndraw_joblib.lifecycle import (
    INTERNAL_TIMEOUT_ERROR,
    TIMEOUT_ERROR,
    WORKER_LOST_ERROR,
    ErrorType,
    TaskStatus,
)
from zndraw_joblib.models import (
    JOB,
    TASK,
    WORKER,
    due,
    held,
    in_states,
    noise,
    now,
    number,
    queued,
    rechecked,
)
from zndraw_joblib.names import INTERNAL_ROOM
from zndraw_joblib.schemas import TaskResponse
from zndraw_joblib.settings import JobLibSettings
from zndraw_joblib.tasks import (
    VIEW,
    born_claimed,
    of_job,
    read_changed,
)

MAX_KEPT_ERROR = 2000
#: The ``claim_key`` of an ``@internal`` attempt whose start was reported without one.
NO_KEY = ""


def back_in_queue() -> dict[Any, Any]:
    """Return what makes a task wait for another worker."""
    return {
        TASK.c.status: TaskStatus.PENDING,
        TASK.c.worker_id: None,
        TASK.c.holder_id: None,
        TASK.c.claim_key: None,
        TASK.c.started_at: None,
        TASK.c.deadline_at: None,
    }


def failed(
    error: str | ColumnElement[Any] | None,
    told: str | ColumnElement[Any],
    error_type: ErrorType,
    longest_backoff: float | ColumnElement[float],
    retryable: ColumnElement[bool],
) -> dict[Any, Any]:
    """Return what the end of a failed attempt makes of its task."""
    # The one place that decides what a failed attempt leads to: reports, lost workers
    # and time-outs all end here.
    again = and_(retryable, TASK.c.failed_attempts + 1 < TASK.c.max_attempts)
    doubling = case((TASK.c.failed_attempts > 20, 20), else_=TASK.c.failed_attempts)
    full = of_job(JOB.c.retry_delay_seconds) * literal(1).bitwise_lshift(doubling)
    # "equal jitter": half of the backoff stands, half is drawn (AWS Architecture Blog,
    # "Exponential Backoff And Jitter", 2015)
    capped = case((full > longest_backoff, longest_backoff), else_=full)
    backoff = capped * (0.5 + noise() / 2)
    line = literal('{"attempt": ') + cast(TASK.c.attempt, String) + told
    kept = case((again, null()), else_=TASK.c.worker_id)
    holder = case((again, null()), else_=TASK.c.holder_id)
    status_type = TASK.c.status.type
    return {
        **back_in_queue(),
        TASK.c.status: case(
            (again, literal(TaskStatus.PENDING, status_type)),
            else_=literal(TaskStatus.FAILED, status_type),
        ),
        TASK.c.worker_id: kept,
        TASK.c.holder_id: holder,
        TASK.c.started_at: case((again, null()), else_=TASK.c.started_at),
        TASK.c.available_at: case(
            (
                and_(again, of_job(JOB.c.retry_delay_seconds) > 0),
                now(cast(backoff, Float)),
            )
        ),
        TASK.c.completed_at: case((~again, now())),
        TASK.c.failed_attempts: TASK.c.failed_attempts + 1,
        TASK.c.error: error,
        TASK.c.error_type: error_type.value,
        TASK.c.errors: func.coalesce(TASK.c.errors + "\n", "") + line,
    }


def told(error: str | None, error_type: ErrorType) -> str:
    """Return how an attempt ended, as what follows its number in ``Task.errors``."""
    ending = {"error_type": error_type, "error": (error or "")[:MAX_KEPT_ERROR] or None}
    return ", " + json.dumps(ending)[1:]


async def fail(
    session: AsyncSession,
    chosen: ColumnElement[bool],
    settings: JobLibSettings,
    *,
    error: str,
    error_type: ErrorType,
) -> list[TaskResponse]:
    """End the current attempt of the chosen tasks that are in somebody's hands.

    Returns
    -------
    list of TaskResponse
        The tasks, waiting for their next attempt or failed.
    """
    longest_backoff = settings.retry_delay_max_seconds
    values = failed(error, told(error, error_type), error_type, longest_backoff, true())
    ended = await session.execute(
        update(TASK).where(rechecked(held()), chosen).values(values).returning(*VIEW)
    )
    return await read_changed(session, ended.all(), settings)


async def lose(
    session: AsyncSession,
    worker_ids: Sequence[UUID],
    settings: JobLibSettings,
    limit: int | None = None,
) -> list[TaskResponse]:
    """End the attempts of workers that are lost: all, or at most ``limit`` of them."""
    # by id, as reports lock them
    theirs = (
        select(TASK.c.id)
        .where(held(), TASK.c.worker_id.in_(worker_ids))
        .order_by(TASK.c.id)
        .with_for_update()
    )
    if limit is not None:
        theirs = theirs.limit(number(limit))
    return await fail(
        session,
        TASK.c.id.in_(theirs),
        settings,
        error=WORKER_LOST_ERROR,
        error_type=ErrorType.WORKER_LOST,
    )


async def lose_orphans(
    session: AsyncSession, settings: JobLibSettings, limit: int
) -> list[TaskResponse]:
    """End at most ``limit`` attempts whose worker is gone without having ended them."""
    orphans = (
        select(TASK.c.id)
        .where(
            held(),
            TASK.c.worker_id.is_not(None),
            ~exists().where(WORKER.c.id == TASK.c.worker_id),
        )
        .limit(number(limit))
        .with_for_update(of=TASK, skip_locked=True)
    )
    return await fail(
        session,
        TASK.c.id.in_(orphans),
        settings,
        error=WORKER_LOST_ERROR,
        error_type=ErrorType.WORKER_LOST,
    )


def _overdue(
    status: TaskStatus, whose: ColumnElement[bool], limit: int
) -> Select[tuple[UUID]]:
    return (
        select(TASK.c.id)
        .where(
            TASK.c.deadline_at <= now(),
            whose,
            in_states(frozenset({status})),
        )
        .limit(number(limit))
        .with_for_update(of=TASK, skip_locked=True)
    )


async def time_out(
    session: AsyncSession, settings: JobLibSettings, limit: int
) -> list[TaskResponse]:
    """End at most ``limit`` attempts that ran longer than their job allows."""
    return await fail(
        session,
        TASK.c.id.in_(
            _overdue(TaskStatus.RUNNING, TASK.c.worker_id.is_not(None), limit)
        ),
        settings,
        error=TIMEOUT_ERROR,
        error_type=ErrorType.TIMEOUT,
    )


async def release_unstarted(
    session: AsyncSession, settings: JobLibSettings, limit: int
) -> list[TaskResponse]:
    """Put at most ``limit`` tasks that were claimed and never started in the queue."""
    taken = await session.execute(
        update(TASK)
        .where(
            TASK.c.id.in_(
                _overdue(TaskStatus.CLAIMED, TASK.c.worker_id.is_not(None), limit)
            )
        )
        .values(back_in_queue())
        .returning(*VIEW)
    )
    return await read_changed(session, taken.all(), settings)


async def start_internal(
    session: AsyncSession, task_id: UUID, attempt: int | None, settings: JobLibSettings
) -> list[TaskResponse]:
    """Start an ``@internal`` attempt that the broker delivered: of two deliveries, one.

    A message of an earlier attempt starts nothing. One that names none is of a release
    that sent none.
    """
    started = await session.execute(
        update(TASK)
        .where(
            TASK.c.id == task_id,
            TASK.c.worker_id.is_(None),
            in_states(frozenset({TaskStatus.CLAIMED})),
            true() if attempt is None else TASK.c.attempt == attempt,
        )
        .values(
            {
                TASK.c.status: TaskStatus.RUNNING,
                TASK.c.started_at: now(),
                TASK.c.deadline_at: None,
            }
        )
        .returning(*VIEW)
    )
    return await read_changed(session, started.all(), settings)


async def confirm_internal_start(
    session: AsyncSession, task_id: UUID, attempt: int, key: str | None
) -> bool:
    """Tell whether a start that is reported of a running attempt is the one that won.

    The host's process starts what is delivered there before its executor says so: the
    first that says so is that executor. Whoever comes later has to show the same key.
    """
    same = TASK.c.claim_key.is_(None)
    confirmed = await session.execute(
        update(TASK)
        .where(
            *_attempts_of([(task_id, attempt)]),
            in_states(frozenset({TaskStatus.RUNNING})),
            same if key is None else or_(same, TASK.c.claim_key == key),
        )
        # nobody sees it: it is no change
        .values({TASK.c.claim_key: key or NO_KEY, TASK.c.revision: TASK.c.revision})
        .returning(TASK.c.id)
    )
    return confirmed.first() is not None


def _attempts_of(chosen: Sequence[tuple[UUID, int]]) -> list[ColumnElement[bool]]:
    return [
        TASK.c.worker_id.is_(None),
        tuple_(TASK.c.id, TASK.c.attempt).in_(chosen),
    ]


async def fail_internal(
    session: AsyncSession,
    task_id: UUID,
    attempt: int,
    error: str,
    settings: JobLibSettings,
) -> list[TaskResponse]:
    """End one ``@internal`` attempt whose executor raised; no other, and no result."""
    return await fail(
        session,
        and_(*_attempts_of([(task_id, attempt)])),
        settings,
        error=error,
        error_type=ErrorType.USER_ERROR,
    )


async def fail_undispatched(
    session: AsyncSession,
    chosen: Sequence[tuple[UUID, int]],
    error: str,
    settings: JobLibSettings,
) -> list[TaskResponse]:
    """End ``@internal`` attempts, by task and number, whose message did not leave."""
    # a message that arrived although its sending failed is not undone
    return await fail(
        session,
        and_(*_attempts_of(chosen), TASK.c.started_at.is_(None)),
        settings,
        error=error,
        error_type=ErrorType.DISPATCH,
    )


async def postpone(
    session: AsyncSession, chosen: Sequence[tuple[UUID, int]], settings: JobLibSettings
) -> None:
    """Try again later to dispatch attempts again whose message did not leave.

    An earlier message of theirs may still be queued.
    """
    await session.execute(
        update(TASK)
        .where(
            *_attempts_of(chosen),
            in_states(frozenset({TaskStatus.CLAIMED})),
            TASK.c.dispatches > 1,
        )
        .values(
            {
                TASK.c.dispatches: TASK.c.dispatches - 1,
                TASK.c.deadline_at: now(settings.internal_redispatch_seconds),
            }
        )
    )


async def dispatch_again(
    session: AsyncSession, settings: JobLibSettings, limit: int
) -> list[TaskResponse]:
    """Return at most ``limit`` ``@internal`` tasks whose message seems lost.

    It may as well wait behind others. So the time between two messages of an attempt
    doubles: their number grows with the logarithm of its age. That time is set here, so
    that of several replicas one sends each again.
    """
    doubled = literal(1).bitwise_lshift(TASK.c.dispatches - 1)
    pause = cast(doubled, Float) * settings.internal_redispatch_seconds
    overdue = _overdue(TaskStatus.CLAIMED, TASK.c.worker_id.is_(None), limit).where(
        or_(TASK.c.dispatches <= 1, TASK.c.claimed_at <= now(-pause))
    )
    resent = await session.execute(
        update(TASK)
        .where(TASK.c.id.in_(overdue))
        .values(
            {TASK.c.dispatches: TASK.c.dispatches + 1, TASK.c.deadline_at: now(pause)}
        )
        .returning(*VIEW)
    )
    return await read_changed(session, resent.all(), settings)


async def dispatch_waiting(
    session: AsyncSession, settings: JobLibSettings, limit: int
) -> list[TaskResponse]:
    """Claim for the broker ``@internal`` tasks that wait for another attempt.

    Returns
    -------
    list of TaskResponse
        At most ``limit`` that wait for no time, and as many whose time has come.
    """
    own = select(JOB.c.id).where(JOB.c.room_id == INTERNAL_ROOM)
    taken: list[TaskResponse] = []
    # one after the other: each has an index of its own
    for waiting in (queued(), due()):
        chosen = (
            select(TASK.c.id)
            .where(waiting, TASK.c.job_id.in_(own))
            .limit(number(limit))
            .with_for_update(of=TASK, skip_locked=True)
        )
        claimed = await session.execute(
            update(TASK)
            .where(TASK.c.id.in_(chosen))
            .values(
                {
                    **born_claimed(settings.internal_redispatch_seconds),
                    TASK.c.available_at: None,
                }
            )
            .returning(*VIEW)
        )
        taken += await read_changed(session, claimed.all(), settings)
    return taken


async def fail_stuck(
    session: AsyncSession, settings: JobLibSettings, limit: int
) -> list[TaskResponse]:
    """End at most ``limit`` ``@internal`` attempts that outlived their time."""
    oldest = now(-settings.internal_task_timeout_seconds)
    stuck = (
        select(TASK.c.id)
        .where(
            held(),
            TASK.c.worker_id.is_(None),
            func.coalesce(TASK.c.started_at, TASK.c.claimed_at) < oldest,
        )
        .limit(number(limit))
        .with_for_update(of=TASK, skip_locked=True)
    )
    return await fail(
        session,
        TASK.c.id.in_(stuck),
        settings,
        error=INTERNAL_TIMEOUT_ERROR,
        error_type=ErrorType.TIMEOUT,
    )

"""Attempts: how they end, and what the server itself does with them."""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Float,
    Select,
    String,
    and_,
    bindparam,
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
from sqlalchemy.sql.dml import ReturningUpdate

from zndraw_joblib.database import execute, noise, now, number, seconds_between
from zndraw_joblib.lifecycle import (
    INTERNAL_ROOM,
    INTERNAL_TIMEOUT_ERROR,
    TIMEOUT_ERROR,
    WORKER_LOST_ERROR,
    ErrorType,
    TaskStatus,
)
from zndraw_joblib.models import JOB, TASK, WORKER, due, held, in_states, queued, rechecked
from zndraw_joblib.schemas import MAX_INT, TaskResponse
from zndraw_joblib.settings import JobLibSettings
from zndraw_joblib.tasks import BRIEF, VIEW, back_in_queue, born_claimed, of_job, read_changed

MAX_KEPT_ERROR = 2000
#: The ``claim_key`` of an ``@internal`` attempt whose start was reported without one.
NO_KEY = ""


def failed(
    error: str | ColumnElement[Any] | None,
    entry: str | ColumnElement[Any],
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
    line = literal('{"attempt": ') + cast(TASK.c.attempt, String) + entry
    status_type = TASK.c.status.type
    # what ends tells whose it was, and how far it came
    ended = {
        column: case((again, null() if value is None else value), else_=column)
        for column, value in back_in_queue().items()
    }
    return {
        **ended,
        TASK.c.status: case(
            (again, literal(TaskStatus.PENDING, status_type)),
            else_=literal(TaskStatus.FAILED, status_type),
        ),
        TASK.c.claim_key: None,
        TASK.c.deadline_at: None,
        TASK.c.available_at: case(
            (and_(again, of_job(JOB.c.retry_delay_seconds) > 0), now(cast(backoff, Float)))
        ),
        TASK.c.completed_at: case((~again, now())),
        TASK.c.failed_attempts: TASK.c.failed_attempts + 1,
        TASK.c.error: error,
        TASK.c.error_type: error_type.value,
        TASK.c.errors: func.coalesce(TASK.c.errors + "\n", "") + line,
    }


def error_entry(error: str | None, error_type: ErrorType) -> str:
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
    values = failed(error, error_entry(error, error_type), error_type, longest_backoff, true())
    ended = await execute(
        session, update(TASK).where(rechecked(held()), chosen).values(values).returning(*BRIEF)
    )
    return await read_changed(session, ended.all(), settings)


@lru_cache(maxsize=8)
def _losing(limit: int, longest_backoff: float) -> ReturningUpdate[Any]:
    # by id, as reports lock them
    theirs = (
        select(TASK.c.id)
        .where(held(), TASK.c.worker_id.in_(bindparam("lost", expanding=True)))
        .order_by(TASK.c.id)
        .limit(number(limit))
        .with_for_update()
    )
    error, error_type = WORKER_LOST_ERROR, ErrorType.WORKER_LOST
    values = failed(error, error_entry(error, error_type), error_type, longest_backoff, true())
    lost = update(TASK).where(rechecked(held()), TASK.c.id.in_(theirs))
    return lost.values(values).returning(*BRIEF)


async def lose(
    session: AsyncSession,
    worker_ids: Sequence[UUID],
    settings: JobLibSettings,
    limit: int = MAX_INT,
) -> list[TaskResponse]:
    """End the attempts of workers that are lost: all, or at most ``limit`` of them."""
    losing = _losing(limit, settings.retry_delay_max_seconds)
    ended = await execute(session, losing, {"lost": worker_ids})
    return await read_changed(session, ended.all(), settings)


def orphaned() -> Select[tuple[UUID]]:
    """Return the attempts whose worker is gone without having ended them."""
    return select(TASK.c.id).where(
        held(), TASK.c.worker_id.is_not(None), ~exists().where(WORKER.c.id == TASK.c.worker_id)
    )


async def lose_orphans(
    session: AsyncSession, chosen: Select[tuple[UUID]], settings: JobLibSettings
) -> list[TaskResponse]:
    """End the chosen attempts, whose worker is gone."""
    return await fail(
        session,
        TASK.c.id.in_(chosen),
        settings,
        error=WORKER_LOST_ERROR,
        error_type=ErrorType.WORKER_LOST,
    )


def _overdue(status: TaskStatus, whose: ColumnElement[bool]) -> Select[tuple[UUID]]:
    return select(TASK.c.id).where(
        TASK.c.deadline_at <= now(), whose, in_states(frozenset({status}))
    )


def timed_out() -> Select[tuple[UUID]]:
    """Return the attempts that ran longer than their job allows."""
    return _overdue(TaskStatus.RUNNING, TASK.c.worker_id.is_not(None))


async def time_out(
    session: AsyncSession, chosen: Select[tuple[UUID]], settings: JobLibSettings
) -> list[TaskResponse]:
    """End the chosen attempts, which ran too long."""
    return await fail(
        session, TASK.c.id.in_(chosen), settings, error=TIMEOUT_ERROR, error_type=ErrorType.TIMEOUT
    )


def never_started() -> Select[tuple[UUID]]:
    """Return the tasks that a worker claimed, and did not start in time."""
    return _overdue(TaskStatus.CLAIMED, TASK.c.worker_id.is_not(None))


async def release_unstarted(
    session: AsyncSession, chosen: Select[tuple[UUID]], settings: JobLibSettings
) -> list[TaskResponse]:
    """Put the chosen tasks back in the queue; no attempt is lost."""
    released = await execute(
        session, update(TASK).where(TASK.c.id.in_(chosen)).values(back_in_queue()).returning(*BRIEF)
    )
    return await read_changed(session, released.all(), settings)


async def correct_moments(session: AsyncSession) -> int:
    """Let what began in the future begin now; return how many tasks these were.

    They were written before the database's clock was set back. Limits and delays keep
    their length.
    """
    corrected = 0
    for ahead, column, *began in (
        (TASK.c.available_at.is_not(None), TASK.c.available_at, TASK.c.claimed_at),
        (held(), TASK.c.deadline_at, TASK.c.started_at, TASK.c.claimed_at),
    ):
        # a task that never was claimed waits since it was made
        since = func.coalesce(*began, TASK.c.created_at)
        moments = (TASK.c.created_at, TASK.c.claimed_at, TASK.c.started_at)
        shifted = case((column.is_not(None), now(seconds_between(since, column))))
        written = (
            await execute(
                session,
                update(TASK)
                .where(ahead, since > now(1))
                .values({m: case((m > now(), now()), else_=m) for m in moments} | {column: shifted})
                .returning(TASK.c.id),
            )
        ).scalars()
        corrected += len(written.all())
    return corrected


async def start_internal(
    session: AsyncSession, task_id: UUID, attempt: int | None, settings: JobLibSettings
) -> list[TaskResponse]:
    """Start an ``@internal`` attempt that the broker delivered: of two deliveries, one.

    A message of an earlier attempt starts nothing. One that names none is of a release
    that sent none.
    """
    started = await execute(
        session,
        update(TASK)
        .where(
            TASK.c.id == task_id,
            TASK.c.worker_id.is_(None),
            in_states(frozenset({TaskStatus.CLAIMED})),
            true() if attempt is None else TASK.c.attempt == attempt,
        )
        .values(
            {TASK.c.status: TaskStatus.RUNNING, TASK.c.started_at: now(), TASK.c.deadline_at: None}
        )
        .returning(*BRIEF),
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
    confirmed = await execute(
        session,
        update(TASK)
        .where(
            *_attempts_of([(task_id, attempt)]),
            in_states(frozenset({TaskStatus.RUNNING})),
            same if key is None else or_(same, TASK.c.claim_key == key),
        )
        # nobody sees it: it is no change
        .values({TASK.c.claim_key: key or NO_KEY, TASK.c.revision: TASK.c.revision})
        .returning(TASK.c.id),
    )
    return confirmed.first() is not None


def _attempts_of(chosen: Sequence[tuple[UUID, int]]) -> list[ColumnElement[bool]]:
    return [TASK.c.worker_id.is_(None), tuple_(TASK.c.id, TASK.c.attempt).in_(chosen)]


async def fail_internal(
    session: AsyncSession, task_id: UUID, attempt: int, error: str, settings: JobLibSettings
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
    session: AsyncSession, chosen: Sequence[tuple[UUID, int]], error: str, settings: JobLibSettings
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
    await execute(
        session,
        update(TASK)
        .where(
            *_attempts_of(chosen), in_states(frozenset({TaskStatus.CLAIMED})), TASK.c.dispatches > 1
        )
        .values(
            {
                TASK.c.dispatches: TASK.c.dispatches - 1,
                TASK.c.deadline_at: now(settings.internal_redispatch_seconds),
            }
        ),
    )


def _pause(settings: JobLibSettings) -> ColumnElement[float]:
    # A message that seems lost may as well wait behind others. So the time between two of
    # an attempt doubles: their number grows with the logarithm of its age.
    doubled = literal(1).bitwise_lshift(TASK.c.dispatches - 1)
    return cast(doubled, Float) * settings.internal_redispatch_seconds


def undelivered(settings: JobLibSettings) -> Select[tuple[UUID]]:
    """Return the ``@internal`` tasks whose message seems lost."""
    return _overdue(TaskStatus.CLAIMED, TASK.c.worker_id.is_(None)).where(
        or_(TASK.c.dispatches <= 1, TASK.c.claimed_at <= now(-_pause(settings)))
    )


async def dispatch_again(
    session: AsyncSession, chosen: Select[tuple[UUID]], settings: JobLibSettings
) -> list[TaskResponse]:
    """Return the chosen ``@internal`` tasks, which are to be sent again.

    Their next time is set, so that of several replicas one sends each again.
    """
    later = now(_pause(settings))
    resent = await execute(
        session,
        update(TASK)
        .where(TASK.c.id.in_(chosen))
        .values({TASK.c.dispatches: TASK.c.dispatches + 1, TASK.c.deadline_at: later})
        .returning(*VIEW),
    )
    return await read_changed(session, resent.all(), settings)


def waiting_internal() -> Sequence[Select[tuple[UUID]]]:
    """Return the ``@internal`` tasks that wait for another attempt.

    Returns
    -------
    sequence of Select
        Those that wait for no time, and those whose time has come: each has an index of
        its own.
    """
    own = select(JOB.c.id).where(JOB.c.room_id == INTERNAL_ROOM)
    return [
        select(TASK.c.id).where(waiting, TASK.c.job_id.in_(own)) for waiting in (queued(), due())
    ]


async def dispatch_waiting(
    session: AsyncSession, chosen: Select[tuple[UUID]], settings: JobLibSettings
) -> list[TaskResponse]:
    """Claim for the broker the chosen ``@internal`` tasks that wait."""
    claimed = await execute(
        session,
        update(TASK)
        .where(TASK.c.id.in_(chosen))
        .values({**born_claimed(settings.internal_redispatch_seconds), TASK.c.available_at: None})
        .returning(*VIEW),
    )
    return await read_changed(session, claimed.all(), settings)


def stuck(settings: JobLibSettings) -> Select[tuple[UUID]]:
    """Return the ``@internal`` attempts that outlived their time."""
    oldest = now(-settings.internal_task_timeout_seconds)
    return select(TASK.c.id).where(
        held(),
        TASK.c.worker_id.is_(None),
        func.coalesce(TASK.c.started_at, TASK.c.claimed_at) < oldest,
    )


async def fail_stuck(
    session: AsyncSession, chosen: Select[tuple[UUID]], settings: JobLibSettings
) -> list[TaskResponse]:
    """End the chosen ``@internal`` attempts, which outlived their time."""
    return await fail(
        session,
        TASK.c.id.in_(chosen),
        settings,
        error=INTERNAL_TIMEOUT_ERROR,
        error_type=ErrorType.TIMEOUT,
    )

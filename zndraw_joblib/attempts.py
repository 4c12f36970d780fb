"""Attempts: how they end, and what the server itself does with them."""

import json
from collections.abc import Sequence
from functools import partial
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from zndraw_joblib import lifecycle
from zndraw_joblib.database import execute, noise, now, number, seconds_between
from zndraw_joblib.encoding import MAX_INT
from zndraw_joblib.events import TaskView
from zndraw_joblib.lifecycle import INTERNAL_ROOM, ErrorType, TaskStatus
from zndraw_joblib.models import JOB, TASK, WORKER, due, held, in_states, of_job, queued, rechecked
from zndraw_joblib.settings import JobLibSettings
from zndraw_joblib.submissions import back_in_queue, claimed_for_broker
from zndraw_joblib.tasks import BRIEF, SHOWN, change

MAX_KEPT_ERROR = 2000
# Tasks whose payloads are read at once for the broker: each may have a MiB.
MESSAGES_A_BATCH = 16
#: The ``claim_key`` of an ``@internal`` attempt whose start was reported without one.
NO_KEY = ""


def failed(
    error: str | sa.ColumnElement[Any] | None,
    entry: str | sa.ColumnElement[Any],
    error_type: str | sa.ColumnElement[Any],
    longest_backoff: float | sa.ColumnElement[float],
    retryable: sa.ColumnElement[bool],
) -> dict[Any, Any]:
    """Return what the end of a failed attempt makes of its task."""
    # The one place that decides what a failed attempt leads to: reports, lost workers
    # and time-outs all end here.
    again = sa.and_(retryable, TASK.c.failed_attempts + 1 < TASK.c.max_attempts)
    doubling = sa.case((TASK.c.failed_attempts > 20, 20), else_=TASK.c.failed_attempts)
    full = of_job(JOB.c.retry_delay_seconds) * sa.literal(1).bitwise_lshift(doubling)
    # "equal jitter": half of the backoff stands, half is drawn (AWS Architecture Blog,
    # "Exponential Backoff And Jitter", 2015)
    capped = sa.case((full > longest_backoff, longest_backoff), else_=full)
    backoff = capped * (0.5 + noise() / 2)
    line = sa.literal('{"attempt": ') + sa.cast(TASK.c.attempt, sa.String) + entry
    status_type = TASK.c.status.type
    # what ends tells whose it was, and how far it came
    ended = {
        column: sa.case((again, sa.null() if value is None else value), else_=column)
        for column, value in back_in_queue().items()
    }
    return {
        **ended,
        TASK.c.status: sa.case(
            (again, sa.literal(TaskStatus.PENDING, status_type)),
            else_=sa.literal(TaskStatus.FAILED, status_type),
        ),
        TASK.c.claim_key: None,
        TASK.c.deadline_at: None,
        TASK.c.available_at: sa.case(
            (sa.and_(again, of_job(JOB.c.retry_delay_seconds) > 0), now(sa.cast(backoff, sa.Float)))
        ),
        TASK.c.completed_at: sa.case((~again, now())),
        TASK.c.failed_attempts: TASK.c.failed_attempts + 1,
        TASK.c.error: error,
        TASK.c.error_type: error_type,
        TASK.c.errors: sa.func.coalesce(TASK.c.errors + "\n", "") + line,
    }


def error_entry(error: str | None, error_type: ErrorType) -> str:
    """Return how an attempt ended, as what follows its number in ``Task.errors``."""
    ending = {"error_type": error_type, "error": (error or "")[:MAX_KEPT_ERROR] or None}
    return ", " + json.dumps(ending)[1:]


async def fail(
    session: AsyncSession,
    chosen: sa.ColumnElement[bool],
    settings: JobLibSettings,
    error: str,
    error_type: ErrorType,
) -> list[TaskView]:
    """End the current attempt of the chosen tasks that are in somebody's hands.

    Returns
    -------
    list of TaskView
        The tasks, waiting for their next attempt or failed.
    """
    longest_backoff = settings.retry_delay_max_seconds
    entry = error_entry(error, error_type)
    values = failed(error, entry, error_type.value, longest_backoff, sa.true())
    ending = sa.update(TASK).where(rechecked(held()), chosen).values(values)
    return await change(session, ending.returning(*BRIEF), settings)


async def _end(
    session: AsyncSession, chosen: sa.Select[tuple[UUID]], settings: JobLibSettings, **why: Any
) -> list[TaskView]:
    return await fail(session, TASK.c.id.in_(chosen), settings, **why)


def lost_error(worker: sa.Row[Any]) -> str:
    """Return the error of what a worker held: who it was, if it said so, and when last heard."""
    info = worker.info or {}
    where = f"{info.get('host')}:{info.get('pid')}"
    names = dict.fromkeys(name for name in (worker.name, where if info else None) if name)
    if not names:
        return lifecycle.WORKER_LOST_ERROR
    last = worker.last_heartbeat.isoformat(timespec="seconds")
    return f"{lifecycle.WORKER_LOST_ERROR}: {', '.join(names)}, last heard at {last}"


async def lose(
    session: AsyncSession,
    workers: Sequence[sa.Row[Any]],
    settings: JobLibSettings,
    limit: int = MAX_INT,
) -> list[TaskView]:
    """End the attempts of workers that are lost: all, or at most ``limit`` of them."""
    errors = {worker.id: lost_error(worker) for worker in workers}
    entries = {key: error_entry(error, ErrorType.WORKER_LOST) for key, error in errors.items()}
    # by id, as reports lock them
    theirs = (
        sa.select(TASK.c.id)
        .where(held(), TASK.c.worker_id.in_(list(errors)))
        .order_by(TASK.c.id)
        .limit(number(limit))
        .with_for_update()
    )
    values = failed(
        sa.case(errors, value=TASK.c.worker_id),
        sa.case(entries, value=TASK.c.worker_id),
        ErrorType.WORKER_LOST.value,
        settings.retry_delay_max_seconds,
        sa.true(),
    )
    lost = sa.update(TASK).where(rechecked(held()), TASK.c.id.in_(theirs)).values(values)
    return await change(session, lost.returning(*BRIEF), settings)


_OF_WORKER = TASK.c.worker_id.is_not(None)
#: The attempts whose worker is gone without having ended them.
ORPHANED = sa.select(TASK.c.id).where(
    held(), _OF_WORKER, ~sa.exists().where(WORKER.c.id == TASK.c.worker_id)
)
lose_orphans = partial(_end, error=lifecycle.WORKER_LOST_ERROR, error_type=ErrorType.WORKER_LOST)


def _overdue(status: TaskStatus, whose: sa.ColumnElement[bool]) -> sa.Select[tuple[UUID]]:
    return sa.select(TASK.c.id).where(
        TASK.c.deadline_at <= now(), whose, in_states(frozenset({status}))
    )


#: The attempts that ran longer than their job allows.
TIMED_OUT = _overdue(TaskStatus.RUNNING, _OF_WORKER)
time_out = partial(_end, error=lifecycle.TIMEOUT_ERROR, error_type=ErrorType.TIMEOUT)
#: The tasks that a worker claimed, and did not start in time.
NEVER_STARTED = _overdue(TaskStatus.CLAIMED, _OF_WORKER)


async def release_unstarted(
    session: AsyncSession, chosen: sa.Select[tuple[UUID]], settings: JobLibSettings
) -> list[TaskView]:
    """Put the chosen tasks back in the queue; no attempt is lost."""
    releasing = sa.update(TASK).where(TASK.c.id.in_(chosen)).values(back_in_queue())
    return await change(session, releasing.returning(*BRIEF), settings)


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
        since = sa.func.coalesce(*began, TASK.c.created_at)
        moments = (TASK.c.created_at, TASK.c.claimed_at, TASK.c.started_at)
        shifted = sa.case((column.is_not(None), now(seconds_between(since, column))))
        written = (
            await execute(
                session,
                sa.update(TASK)
                .where(ahead, since > now(1))
                .values(
                    {m: sa.case((m > now(), now()), else_=m) for m in moments} | {column: shifted}
                )
                .returning(TASK.c.id),
            )
        ).scalars()
        corrected += len(written.all())
    return corrected


async def start_internal(
    session: AsyncSession, task_id: UUID, attempt: int | None, settings: JobLibSettings
) -> list[TaskView]:
    """Start an ``@internal`` attempt that the broker delivered: of two deliveries, one.

    A message of an earlier attempt starts nothing. One that names none is of a release
    that sent none.
    """
    starting = sa.update(TASK).where(
        TASK.c.id == task_id,
        TASK.c.worker_id.is_(None),
        in_states(frozenset({TaskStatus.CLAIMED})),
        sa.true() if attempt is None else TASK.c.attempt == attempt,
    )
    running = {TASK.c.status: TaskStatus.RUNNING, TASK.c.started_at: now()}
    started = starting.values(running | {TASK.c.deadline_at: None})
    return await change(session, started.returning(*BRIEF), settings)


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
        sa.update(TASK)
        .where(
            *_attempts_of([(task_id, attempt)]),
            in_states(frozenset({TaskStatus.RUNNING})),
            same if key is None else sa.or_(same, TASK.c.claim_key == key),
        )
        # nobody sees it: it is no change
        .values({TASK.c.claim_key: key or NO_KEY, TASK.c.revision: TASK.c.revision})
        .returning(TASK.c.id),
    )
    return confirmed.first() is not None


def _attempts_of(chosen: Sequence[tuple[UUID, int]]) -> list[sa.ColumnElement[bool]]:
    return [TASK.c.worker_id.is_(None), sa.tuple_(TASK.c.id, TASK.c.attempt).in_(chosen)]


async def fail_internal(
    session: AsyncSession, task_id: UUID, attempt: int, error: str, settings: JobLibSettings
) -> list[TaskView]:
    """End one ``@internal`` attempt whose executor raised; no other, and no result."""
    one = sa.and_(*_attempts_of([(task_id, attempt)]))
    return await fail(session, one, settings, error, ErrorType.USER_ERROR)


async def fail_undispatched(
    session: AsyncSession, chosen: Sequence[tuple[UUID, int]], error: str, settings: JobLibSettings
) -> list[TaskView]:
    """End ``@internal`` attempts, by task and number, whose message did not leave."""
    # a message that arrived although its sending failed is not undone
    unstarted = sa.and_(*_attempts_of(chosen), TASK.c.started_at.is_(None))
    return await fail(session, unstarted, settings, error, ErrorType.DISPATCH)


async def postpone(
    session: AsyncSession, chosen: Sequence[tuple[UUID, int]], settings: JobLibSettings
) -> None:
    """Try again later to dispatch attempts again whose message did not leave.

    An earlier message of theirs may still be queued.
    """
    await execute(
        session,
        sa.update(TASK)
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


def _pause(settings: JobLibSettings) -> sa.ColumnElement[float]:
    # A message that seems lost may as well wait behind others. So the time between two of
    # an attempt doubles: their number grows with the logarithm of its age.
    doubled = sa.literal(1).bitwise_lshift(TASK.c.dispatches - 1)
    return sa.cast(doubled, sa.Float) * settings.internal_redispatch_seconds


def undelivered(settings: JobLibSettings) -> sa.Select[tuple[UUID]]:
    """Return the ``@internal`` tasks whose message seems lost."""
    return _overdue(TaskStatus.CLAIMED, TASK.c.worker_id.is_(None)).where(
        sa.or_(TASK.c.dispatches <= 1, TASK.c.claimed_at <= now(-_pause(settings)))
    )


async def dispatch_again(
    session: AsyncSession, chosen: sa.Select[tuple[UUID]], settings: JobLibSettings
) -> list[TaskView]:
    """Return some of the chosen ``@internal`` tasks, which are to be sent again.

    Their next time is set, so that of several replicas one sends each again.
    """
    values = {TASK.c.dispatches: TASK.c.dispatches + 1, TASK.c.deadline_at: now(_pause(settings))}
    some = chosen.limit(number(MESSAGES_A_BATCH))
    resending = sa.update(TASK).where(TASK.c.id.in_(some)).values(values)
    return await change(session, resending.returning(*SHOWN), settings)


_INTERNAL = sa.select(JOB.c.id).where(JOB.c.room_id == INTERNAL_ROOM)
#: The ``@internal`` tasks that wait for another attempt: those that wait for no time, and
#: those whose time has come, since each has an index of its own.
WAITING_INTERNAL = (
    sa.select(TASK.c.id).where(queued(), TASK.c.job_id.in_(_INTERNAL)),
    sa.select(TASK.c.id).where(due(), TASK.c.job_id.in_(_INTERNAL)),
)


async def dispatch_waiting(
    session: AsyncSession, chosen: sa.Select[tuple[UUID]], settings: JobLibSettings
) -> list[TaskView]:
    """Claim for the broker some of the chosen ``@internal`` tasks that wait."""
    values = {**claimed_for_broker(settings.internal_redispatch_seconds), TASK.c.available_at: None}
    some = chosen.limit(number(MESSAGES_A_BATCH))
    claiming = sa.update(TASK).where(TASK.c.id.in_(some)).values(values)
    return await change(session, claiming.returning(*SHOWN), settings)


def stuck(settings: JobLibSettings) -> sa.Select[tuple[UUID]]:
    """Return the ``@internal`` attempts that outlived their time."""
    oldest = now(-settings.internal_task_timeout_seconds)
    return sa.select(TASK.c.id).where(
        held(),
        TASK.c.worker_id.is_(None),
        sa.func.coalesce(TASK.c.started_at, TASK.c.claimed_at) < oldest,
    )


fail_stuck = partial(_end, error=lifecycle.INTERNAL_TIMEOUT_ERROR, error_type=ErrorType.TIMEOUT)

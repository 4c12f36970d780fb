"""Figures: what goes on in each job and at each worker, whatever waits or is done."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from zndraw_joblib import jobs, models, tasks
from zndraw_joblib.database import Listing, Page, execute, now, number, paginate
from zndraw_joblib.lifecycle import FullName, TaskStatus
from zndraw_joblib.models import JOB, LINK, TASK, WORKER, held, queued
from zndraw_joblib.schemas import JobStats, RunningTask, WorkerSummary
from zndraw_joblib.settings import JobLibSettings, get_settings
from zndraw_joblib.workers import Caller

#: Over how many seconds what ended is counted.
SECONDS_COUNTED = 60
# Of each kind no more tasks are read: a host that ends more in a minute sees fewer.
COUNTED_MAX = 100_000


def _waiting(order: str, waits: sa.ColumnElement[bool]) -> Any:
    # No more of a queue than is told is read, in the order of its index: else
    # counting would take longer the longer the queue is. Written as positions are.
    return (
        sa.select(TASK.c.created_at)
        .where(TASK.c.job_id == JOB.c.id, waits)
        .order_by(TASK.c[order])
        .limit(sa.select(tasks.LAST).scalar_subquery())
        .correlate_except(TASK)
        .subquery()
    )


_PENDING = _waiting("queue_order", queued())
_DELAYED = _waiting("available_at", TASK.c.available_at.is_not(None))
_FIGURES = sa.select(
    JOB.c.id,
    *jobs.FULL_NAME,
    JOB.c.created_at,
    sa.select(sa.func.count()).select_from(_PENDING).scalar_subquery().label("pending"),
    sa.select(sa.func.count()).select_from(_DELAYED).scalar_subquery().label("delayed"),
    sa.select(sa.func.min(_PENDING.c.created_at)).scalar_subquery().label("oldest"),
    sa.select(now()).scalar_subquery().label("now"),
    jobs.WORKERS_ALIVE,
)
_LISTED = _FIGURES.where(models.served())


async def _count(
    session: AsyncSession, chosen: sa.ColumnElement[bool], order: Any
) -> Counter[tuple[UUID, TaskStatus]]:
    # Read in the order of the index that holds just these, and counted outside: SQLite
    # would rather read all tasks in the order of their jobs than sort some.
    some = sa.select(TASK.c.job_id, TASK.c.status).where(chosen).order_by(order)
    read = some.limit(number(COUNTED_MAX)).subquery()
    counting = sa.select(read.c.job_id, read.c.status, sa.func.count())
    found = await execute(session, counting.group_by(read.c.job_id, read.c.status))
    return Counter({(job, status): count for job, status, count in found})


async def _stats(session: AsyncSession, rows: Sequence[sa.Row[Any]]) -> list[JobStats]:
    # What is held and what ended just now stand in indexes of their own, over all jobs:
    # what is read is what goes on, not what waits or is done.
    counted = await _count(session, held(), TASK.c.worker_id)
    just_now = TASK.c.completed_at >= now(-SECONDS_COUNTED)
    for status in (TaskStatus.COMPLETED, TaskStatus.FAILED):
        ended = sa.and_(TASK.c.status == models.constant(status), just_now)
        counted += await _count(session, ended, TASK.c.completed_at)
    stats = []
    for row in rows:
        age = None if row.oldest is None else (row.now - row.oldest).total_seconds()
        stats.append(
            JobStats(
                job_name=str(FullName(row.room_id, row.category, row.name)),
                pending=row.pending,
                delayed=row.delayed,
                claimed=counted[row.id, TaskStatus.CLAIMED],
                running=counted[row.id, TaskStatus.RUNNING],
                oldest_pending_seconds=None if age is None else max(age, 0.0),
                completed_last_minute=counted[row.id, TaskStatus.COMPLETED],
                failed_last_minute=counted[row.id, TaskStatus.FAILED],
                workers_alive=row.workers_alive,
            )
        )
    return stats


async def queue_stats(
    session: AsyncSession, settings: JobLibSettings | None = None
) -> list[JobStats]:
    """Return what goes on in each job, for monitoring.

    Parameters
    ----------
    settings : JobLibSettings, optional
        Without it, those of the environment. What waits is counted up to
        ``queue_position_max`` for each job; a worker is alive that was heard within
        ``worker_timeout_seconds``.
    """
    of_all = _FIGURES.where(jobs.LIVE).order_by(JOB.c.id)
    rows = await execute(session, of_all, tasks.limits(settings or get_settings()))
    return await _stats(session, rows.all())


async def list_stats(
    session: AsyncSession, room: str, page: Page, settings: JobLibSettings
) -> tuple[list[JobStats], Listing]:
    """Return a page of what goes on in the jobs that ``room`` sees."""
    values = models.seen_from(room) | tasks.limits(settings)
    listing = await paginate(session, _LISTED, JOB, page, values)
    return await _stats(session, listing.rows), listing


#: Tasks of one worker that its entry in a listing names.
TASKS_NAMED = 32


_LINKS = sa.select(sa.func.count()).select_from(LINK).where(LINK.c.worker_id == WORKER.c.id)
_WORKERS = sa.select(
    WORKER.c.id,
    WORKER.c.last_heartbeat,
    WORKER.c.state,
    WORKER.c.name,
    WORKER.c.info,
    sa.func.coalesce(WORKER.c.stuck, number(0)).label("stuck"),
    WORKER.c.created_at,
    _LINKS.scalar_subquery().label("job_count"),
    models.ALIVE.label("alive"),
)
_SERVING = sa.select(LINK.c.worker_id).join(JOB, JOB.c.id == LINK.c.job_id).where(models.served())
_WORKERS_OF_ROOM = _WORKERS.where(WORKER.c.id.in_(_SERVING))


async def list_workers(
    session: AsyncSession,
    page: Page,
    caller: Caller,
    settings: JobLibSettings,
    room: str | None = None,
) -> tuple[list[WorkerSummary], Listing]:
    """Return a page of the workers of the jobs that ``room`` sees, or of all workers.

    With those of the room's tasks that they run; without a room, with what the caller's
    own run, and to superusers with all.
    """
    statement, values = _WORKERS, tasks.limits(settings)
    shown = sa.true() if caller.is_superuser else TASK.c.holder_id == caller.id
    if room is not None:
        statement, values = _WORKERS_OF_ROOM, values | models.seen_from(room)
        shown = TASK.c.room_id == room
    listing = await paginate(session, statement, WORKER, page, values)
    holding = (
        sa.select(TASK.c.worker_id, TASK.c.id, TASK.c.job_name, TASK.c.status, shown.label("shown"))
        .where(held(), TASK.c.worker_id.in_([row.id for row in listing.rows]))
        .limit(number(COUNTED_MAX))
    )
    at_hand = defaultdict[UUID, list[Any]](list)
    for task in await execute(session, holding) if listing.rows else ():
        at_hand[task.worker_id].append(task)
    return [_summary(row, at_hand[row.id]) for row in listing.rows], listing


def _summary(row: sa.Row[Any], tasks: Sequence[sa.Row[Any]]) -> WorkerSummary:
    running = [
        RunningTask(id=task.id, job_name=task.job_name)
        for task in sorted(tasks, key=lambda task: task.id)
        if task.shown and task.status is TaskStatus.RUNNING
    ]
    return WorkerSummary(**row._mapping, held=len(tasks), running=running[:TASKS_NAMED])

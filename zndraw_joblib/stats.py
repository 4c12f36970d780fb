"""What goes on: for each job what waits, what runs, what ended, and who works."""

from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from typing import Any
from uuid import UUID

from sqlalchemy import ColumnElement, Row, Select, and_, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from zndraw_joblib.database import execute, now, number
from zndraw_joblib.lifecycle import FullName, TaskStatus
from zndraw_joblib.models import (
    JOB,
    LINK,
    TASK,
    WORKER,
    alive_within,
    constant,
    held,
    queued,
    seen_from,
    served,
)
from zndraw_joblib.paging import Listing, Page, paginate
from zndraw_joblib.schemas import JobStats
from zndraw_joblib.settings import JobLibSettings, get_settings
from zndraw_joblib.tasks import ahead

#: Over which time what ended is counted.
SECONDS_COUNTED = 60
ENDED = frozenset({TaskStatus.COMPLETED, TaskStatus.FAILED})
# Of each kind no more tasks are read: a host that ends more in a minute sees fewer.
COUNTED_MAX = 100_000


def _waiting(count_max: int, *order: Any, where: ColumnElement[bool]) -> Any:
    # No more of a queue than count_max is read, in the order of its index: else
    # counting would take longer the longer the queue is. Written as positions are.
    return (
        select(ahead.c.created_at)
        .where(ahead.c.job_id == JOB.c.id, where)
        .order_by(*order)
        .limit(select(number(count_max)).scalar_subquery())
        .correlate_except(ahead)
        .subquery()
    )


@lru_cache(maxsize=8)
def _statement(most: int, worker_timeout: float) -> Select[Any]:
    first = _waiting(most, ahead.c.queue_order, where=queued(ahead.c))
    delayed = _waiting(most, ahead.c.available_at, where=ahead.c.available_at.is_not(None))
    oldest = func.min(first.c.created_at)
    alive = (
        select(func.count())
        .select_from(LINK)
        .join(WORKER, WORKER.c.id == LINK.c.worker_id)
        .where(LINK.c.job_id == JOB.c.id, alive_within(worker_timeout))
        .scalar_subquery()
    )
    return select(
        JOB.c.id,
        JOB.c.room_id,
        JOB.c.category,
        JOB.c.name,
        JOB.c.created_at,
        select(func.count()).select_from(first).scalar_subquery().label("pending"),
        select(func.count()).select_from(delayed).scalar_subquery().label("delayed"),
        select(oldest).scalar_subquery().label("oldest"),
        select(now()).scalar_subquery().label("now"),
        alive.label("workers_alive"),
    )


async def _counted(
    session: AsyncSession, chosen: ColumnElement[bool], order: Any
) -> Counter[tuple[UUID, TaskStatus]]:
    # Read in the order of the index that holds just these, and counted outside: SQLite
    # would rather read all tasks in the order of their jobs than sort some.
    some = select(TASK.c.job_id, TASK.c.status).where(chosen).order_by(order)
    read = some.limit(number(COUNTED_MAX)).subquery()
    counting = select(read.c.job_id, read.c.status, func.count())
    found = await execute(session, counting.group_by(read.c.job_id, read.c.status))
    return Counter({(job, status): count for job, status, count in found})


async def _views(session: AsyncSession, rows: Sequence[Row[Any]]) -> list[JobStats]:
    # What is held and what ended just now stand in indexes of their own, over all jobs:
    # what is read is what goes on, not what waits or is done.
    counted = await _counted(session, held(), TASK.c.worker_id)
    for status in sorted(ENDED):
        just_now = TASK.c.completed_at >= now(-SECONDS_COUNTED)
        ended = and_(TASK.c.status == constant(status), just_now)
        counted += await _counted(session, ended, TASK.c.completed_at)
    return [_view(row, counted) for row in rows]


def _view(row: Row[Any], counted: Counter[tuple[UUID, TaskStatus]]) -> JobStats:
    age = None if row.oldest is None else (row.now - row.oldest).total_seconds()
    return JobStats(
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


async def queue_stats(
    session: AsyncSession, settings: JobLibSettings | None = None
) -> list[JobStats]:
    """Return what goes on in each job, for monitoring.

    Parameters
    ----------
    session : AsyncSession
        Nothing is written.
    settings : JobLibSettings, optional
        Without it, those of the environment. What waits is counted up to
        ``queue_position_max`` for each job; a worker is alive that was heard within
        ``worker_timeout_seconds``.
    """
    settings = settings or get_settings()
    statement = _statement(settings.queue_position_max, settings.worker_timeout_seconds)
    live = statement.where(JOB.c.deleted.is_(False))
    rows = await execute(session, live.order_by(JOB.c.id))
    return await _views(session, rows.all())


@lru_cache(maxsize=8)
def _listed(most: int, worker_timeout: float) -> Select[Any]:
    return _statement(most, worker_timeout).where(served())


async def list_visible(
    session: AsyncSession, room: str, page: Page, settings: JobLibSettings
) -> tuple[list[JobStats], Listing]:
    """Return a page of what goes on in the jobs that ``room`` sees."""
    statement = _listed(settings.queue_position_max, settings.worker_timeout_seconds)
    listing = await paginate(session, statement, JOB, page, seen_from(room))
    return await _views(session, listing.rows), listing

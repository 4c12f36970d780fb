"""Claims: what a worker is given, and what its heartbeats say of it."""

from collections.abc import Sequence
from typing import NamedTuple
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Float,
    Select,
    String,
    and_,
    case,
    exists,
    func,
    literal,
    or_,
    select,
    update,
)
from sqlalchemy.ext.asyncio import AsyncSession

from zndraw_joblib import workers
from zndraw_joblib.lifecycle import HELD, TaskStatus, WorkerState
from zndraw_joblib.models import (
    Job,
    Task,
    WorkerJobLink,
    due,
    held,
    now,
    queued,
)
from zndraw_joblib.names import FullName
from zndraw_joblib.schemas import (
    MAX_INT,
    TaskHeartbeat,
    TaskResponse,
)
from zndraw_joblib.settings import JobLibSettings
from zndraw_joblib.tasks import (
    VIEW,
    ahead,
    of_job,
    read_changed,
    read_view,
)
from zndraw_joblib.workers import Caller

# How many other claims may hold the first tasks of a queue locked at one moment
# without this one finding nothing: it looks that much further.
CONTENTION = 32
# Due tasks that one claim moves into the queue.
PROMOTION = 1000


def _due(worker_id: UUID) -> Select[tuple[UUID]]:
    served = select(WorkerJobLink.job_id).where(WorkerJobLink.worker_id == worker_id)
    return select(Task.id).where(due(), Task.job_id.in_(served))


async def served(session: AsyncSession, worker_id: UUID) -> list[str]:
    """Return the full names of a worker's jobs."""
    found = await session.execute(
        select(Job.room_id, Job.category, Job.name)
        .join(WorkerJobLink, WorkerJobLink.job_id == Job.id)
        .where(WorkerJobLink.worker_id == worker_id)
    )
    return [str(FullName(*row)) for row in found]


async def promote(session: AsyncSession, worker_id: UUID) -> None:
    """Let delayed tasks of a worker's jobs, whose time has come, take their place."""
    ready = (
        _due(worker_id)
        .order_by(Task.available_at)
        .limit(PROMOTION)
        .with_for_update(skip_locked=True)
    )
    await session.execute(
        update(Task).where(Task.id.in_(ready)).values({Task.available_at: None})
    )


def _oldest(worker_id: UUID, limit: int) -> Select[tuple[UUID]]:
    # A worker's queue is the merge of its jobs' queues. No index holds it in order, so
    # each job's queue is read only as far as this claim could reach into it: a plain
    # ORDER BY ... LIMIT over the join would sort every waiting task.
    reach = (
        select(ahead.queue_order)
        .where(ahead.job_id == WorkerJobLink.job_id, queued(ahead))
        .order_by(ahead.queue_order)
        .offset(limit - 1 + CONTENTION)
        .limit(1)
        .correlate(WorkerJobLink)
        .scalar_subquery()
    )
    return (
        select(Task.id)
        .join(WorkerJobLink, WorkerJobLink.job_id == Task.job_id)
        .where(
            WorkerJobLink.worker_id == worker_id,
            queued(),
            Task.queue_order <= func.coalesce(reach, MAX_INT),
        )
        .order_by(Task.queue_order, Task.id)
        .limit(limit)
        .with_for_update(of=Task, skip_locked=True)
    )


async def claim(
    session: AsyncSession,
    worker_id: UUID,
    caller: Caller,
    settings: JobLibSettings,
    *,
    limit: int,
    key: str | None = None,
) -> list[TaskResponse]:
    """Give a worker the oldest tasks of its jobs; a draining one gets nothing.

    Parameters
    ----------
    session : AsyncSession
        Whose owner commits.
    worker_id : UUID
        The worker; the claim counts as a sign of life.
    caller : Caller
        Its owner.
    limit : int
        How many at most.
    settings : JobLibSettings
        The host's.
    key : str, optional
        The claim's idempotency key: what it brought once, it brings again.

    Returns
    -------
    list of TaskResponse
        Higher priority first, then oldest first.

    Raises
    ------
    ProblemException
        ``worker-not-found``, or ``forbidden`` for another user's worker.
    """
    worker = await workers.touch(
        session, worker_id, caller, exists(_due(worker_id)).label("has_due")
    )
    if worker.state == WorkerState.DRAINING:
        return []
    if worker.has_due:
        await promote(session, worker_id)
    claimable: ColumnElement[bool] = Task.id.in_(_oldest(worker_id, limit))
    if key is not None:
        claimable = and_(claimable, ~_claimed_under(worker_id, key).exists())
    claimed = await session.execute(
        update(Task)
        .where(claimable)
        .values(
            {
                Task.status: TaskStatus.CLAIMED,
                Task.worker_id: worker_id,
                Task.holder_id: caller.id,
                Task.attempt: Task.attempt + 1,
                Task.claimed_at: now(),
                Task.claim_key: key,
                Task.deadline_at: now(of_job(Job.start_timeout_seconds)),
                Task.progress: None,
                Task.progress_message: None,
            }
        )
        .returning(Task.queue_order, *VIEW)
    )
    rows = claimed.all()
    if not rows and key is not None:
        again = select(Task.queue_order, *VIEW).where(
            Task.id.in_(_claimed_under(worker_id, key))
        )
        rows = (await session.execute(again)).all()
    return [
        read_view(row)
        for row in sorted(rows, key=lambda row: (row.queue_order, row.id))
    ]


def _claimed_under(worker_id: UUID, key: str) -> Select[tuple[UUID]]:
    return select(ahead.id).where(
        ahead.worker_id == worker_id, held(ahead), ahead.claim_key == key
    )


class Beat(NamedTuple):
    """What a heartbeat learns of the tasks that it reports.

    Attributes
    ----------
    cancelled : list of UUID
        Tasks to stop.
    lost : list of UUID
        Tasks that are no longer this worker's.
    progressed : list of TaskResponse
        Tasks whose progress was stored.
    """

    cancelled: list[UUID]
    lost: list[UUID]
    progressed: list[TaskResponse]


NOTHING = Beat([], [], [])


async def beat(
    session: AsyncSession,
    worker_id: UUID,
    reported: Sequence[TaskHeartbeat],
    settings: JobLibSettings,
) -> Beat:
    """Store the progress of a worker's tasks and tell which of them to drop."""
    attempts = {task.id: task.attempt for task in reported}
    told = [t for t in reported if t.progress is not None or t.message is not None]
    progressed: list[TaskResponse] = []
    if told:
        stored = await session.execute(
            update(Task)
            .where(
                held(),
                Task.worker_id == worker_id,
                or_(*(and_(Task.id == t.id, Task.attempt == t.attempt) for t in told)),
            )
            .values(
                {
                    Task.progress: func.coalesce(
                        case(
                            *(
                                (Task.id == t.id, literal(t.progress, Float))
                                for t in told
                            )
                        ),
                        Task.progress,
                    ),
                    Task.progress_message: func.coalesce(
                        case(
                            *(
                                (Task.id == t.id, literal(t.message, String))
                                for t in told
                            )
                        ),
                        Task.progress_message,
                    ),
                }
            )
            .returning(*VIEW)
        )
        progressed = await read_changed(session, stored, settings)
    unsure = attempts.keys() - {task.id for task in progressed}
    cancelled: list[UUID] = []
    if unsure:
        found = await session.execute(
            select(Task.id, Task.status, Task.worker_id, Task.attempt).where(
                Task.id.in_(unsure)
            )
        )
        for row in found:
            if row.worker_id != worker_id or row.attempt != attempts[row.id]:
                continue
            if row.status is TaskStatus.CANCELLED:
                cancelled.append(row.id)
            if row.status in HELD or row.status is TaskStatus.CANCELLED:
                unsure.discard(row.id)
    return Beat(cancelled, sorted(unsure), progressed)

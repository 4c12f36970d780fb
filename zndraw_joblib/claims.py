"""Claims: what a worker is given."""

from collections.abc import Collection, Sequence
from functools import lru_cache
from itertools import groupby
from typing import Any, NamedTuple
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.sql.dml import ReturningUpdate

from zndraw_joblib import workers
from zndraw_joblib.database import execute, now, number, one_of, size_of
from zndraw_joblib.events import TaskView
from zndraw_joblib.lifecycle import TaskStatus, WorkerState
from zndraw_joblib.models import JOB, LINK, PAUSED, TASK, WORKER, ahead, due, held, of_job, queued
from zndraw_joblib.settings import JobLibSettings
from zndraw_joblib.submissions import place_again
from zndraw_joblib.tasks import SHOWN
from zndraw_joblib.workers import Caller

# Due tasks that one claim moves into the queue.
PROMOTED = 1000
# What the payloads of a claim may take together, but for the last of them, in bytes.
MAX_BYTES = 1024 * 1024

_WORKER: sa.ColumnElement[UUID] = sa.bindparam("worker", type_=WORKER.c.id.type)
_FULL_NAME = JOB.c.room_id + ":" + JOB.c.category + ":" + JOB.c.name
# read once for each statement, and not for each of a worker's jobs
_PAUSED = sa.select(JOB.c.id).where(PAUSED)


def _served(link: Any, named: bool) -> sa.ColumnElement[bool]:
    """Return the condition for links to the jobs that a claim is for."""
    served = sa.and_(link.worker_id == _WORKER, link.job_id.not_in(_PAUSED))
    if not named:
        return served
    names = _FULL_NAME.in_(sa.bindparam("jobs", expanding=True))
    return sa.and_(served, sa.exists().where(JOB.c.id == link.job_id, names))


async def served(session: AsyncSession, worker_id: UUID) -> dict[UUID, str]:
    """Return a worker's jobs, with their full names."""
    found = await execute(
        session,
        sa.select(JOB.c.id, _FULL_NAME.label("full_name"))
        .join(LINK, LINK.c.job_id == JOB.c.id)
        .where(LINK.c.worker_id == worker_id),
    )
    return {row.id: row.full_name for row in found}


def _queue(task: Any, job_id: sa.ColumnElement[UUID], *shown: Any) -> sa.Select[Any]:
    return (
        sa.select(*shown)
        .where(task.job_id == job_id, queued(task))
        .order_by(task.queue_order, task.id)
    )


def _next_by_lateral(limit: int, named: bool) -> sa.Select[Any]:
    """Return the next tasks, locked one by one as they are found.

    The queue of the job whose turn it is is read until there are enough; then the next
    one. What other claims have locked is skipped.
    """
    link = LINK.alias("link")
    head, waiting = TASK.alias("head"), TASK.alias("waiting")
    first = _queue(head.c, link.c.job_id, head.c.priority, head.c.queued_at)
    first_of = first.limit(number(1)).lateral("first")
    turn = (
        sa.select(link.c.job_id)
        .select_from(link.join(first_of, sa.true()))
        .where(_served(link.c, named))
        .order_by(first_of.c.priority.desc(), first_of.c.queued_at, link.c.job_id)
        .subquery("turn")
    )
    size = size_of(waiting.c.payload).label("size")
    some = _queue(waiting.c, turn.c.job_id, waiting.c.id, size).limit(number(limit))
    next_of = some.with_for_update(skip_locked=True).lateral("next")
    chosen = (
        sa.select(next_of.c.id, next_of.c.size)
        .select_from(turn.join(next_of, sa.true()))
        .limit(number(limit))
    )
    return _bounded(chosen, limit)


def _bounded(chosen: sa.Select[Any], limit: int) -> sa.Select[Any]:
    """Return the ids of the first of ``chosen``, as far as their sizes allow."""
    tasks = chosen.subquery("chosen")
    if limit == 1:
        return sa.select(tasks.c.id)
    up_to_here = sa.func.sum(tasks.c.size).over(rows=(None, 0))
    sizes = sa.select(tasks.c.id, (up_to_here - tasks.c.size).label("before"))
    bounded = sizes.subquery("bounded")
    return sa.select(bounded.c.id).where(bounded.c.before < number(MAX_BYTES))


def _next_by_heads(limit: int, named: bool) -> sa.Select[Any]:
    """Return the same for a database that knows no LATERAL, and one writer."""
    link = LINK.alias("link")
    head, first, waiting, some = map(TASK.alias, ("head", "first", "waiting", "next"))
    first_of = _queue(first.c, link.c.job_id, first.c.id).limit(number(1))
    some_of = _queue(some.c, link.c.job_id, some.c.id).limit(number(limit))
    chosen = (
        sa.select(waiting.c.id, size_of(waiting.c.payload).label("size"))
        .select_from(link)
        .join(head, head.c.id == first_of.correlate(link).scalar_subquery())
        .join(waiting, waiting.c.id.in_(some_of.correlate(link).scalar_subquery()))
        .where(_served(link.c, named))
        .order_by(
            head.c.priority.desc(), head.c.queued_at, link.c.job_id,
            waiting.c.queue_order, waiting.c.id,
        )
        .limit(number(limit))
    )  # fmt: skip
    return _bounded(chosen, limit)


def _first_of_all(column: sa.ColumnElement[Any], which: sa.ColumnElement[bool]) -> Any:
    # of the job of each link, as the head of its index: for an EXISTS over the tasks
    # PostgreSQL, with a generic plan, reads them all
    least = sa.select(sa.func.min(column)).where(ahead.c.job_id == LINK.c.job_id, which)
    return least.correlate(LINK).scalar_subquery()


def _some(condition: sa.ColumnElement[bool]) -> sa.ColumnElement[bool]:
    return sa.exists(
        sa.select(sa.literal_column("1"))
        .select_from(LINK)
        .where(_served(LINK.c, named=False), condition)
    )


_MOMENT = ahead.c.available_at
_SOME_DUE = _some(_first_of_all(_MOMENT, _MOMENT.is_not(None)) <= now())
_SOME_QUEUED = _some(_first_of_all(ahead.c.queue_order, queued(ahead.c)).is_not(None))


def _at_work() -> sa.ColumnElement[bool]:
    # It stays locked, so that it goes with what it claimed, or before.
    worker: sa.Select[Any] = (
        sa.select(sa.literal_column("1"))
        .where(
            WORKER.c.id == _WORKER,
            WORKER.c.user_id == sa.bindparam("owner"),
            WORKER.c.state == WorkerState.ACTIVE.value,
        )
        .with_for_update(read=True)
    )
    return worker.scalar_subquery().is_not(None)


def _claimed_before(task: Any) -> sa.ColumnElement[bool]:
    return sa.and_(task.worker_id == _WORKER, held(task), task.claim_key == sa.bindparam("key"))


# What a claim brings, and what its order is told by.
_CLAIMED = (*SHOWN, TASK.c.job_id, TASK.c.queue_order, TASK.c.queued_at)


@lru_cache(maxsize=256)
def claiming(limit: int, keyed: bool, start: bool, named: bool) -> ReturningUpdate[Any]:
    """Return the statement that claims."""
    taken: dict[Any, Any] = {
        TASK.c.status: TaskStatus.CLAIMED,
        TASK.c.deadline_at: now(of_job(JOB.c.start_timeout_seconds)),
    }
    if start:
        taken = {
            TASK.c.status: TaskStatus.RUNNING,
            TASK.c.started_at: now(),
            TASK.c.deadline_at: now(of_job(JOB.c.timeout_seconds)),
        }
    return (
        sa.update(TASK)
        .where(
            one_of(
                TASK.c.id,
                lateral=_next_by_lateral(limit, named),
                correlated=_next_by_heads(limit, named),
            ),
            _at_work(),
            # delayed tasks whose time has come take their places first
            sa.or_(sa.bindparam("promoted", type_=sa.Boolean()), ~_SOME_DUE),
            ~sa.exists().where(_claimed_before(ahead.c)) if keyed else sa.true(),
        )
        .values(
            {
                **taken,
                TASK.c.worker_id: _WORKER,
                TASK.c.holder_id: sa.bindparam("holder"),
                TASK.c.attempt: TASK.c.attempt + 1,
                TASK.c.claimed_at: now(),
                TASK.c.claim_key: sa.bindparam("key"),
            }
        )
        .returning(*_CLAIMED, workers.heartbeat_due(_WORKER))
    )


#: What a claim that found nothing asks of its worker: also what its key brought before.
ASKING = (
    sa.select(
        *_CLAIMED,
        WORKER.c.user_id,
        WORKER.c.state,
        workers.heartbeat_due(_WORKER),
        sa.or_(_SOME_DUE, _SOME_QUEUED).label("claimable"),
    )
    .select_from(WORKER.outerjoin(TASK, _claimed_before(TASK.c)))
    .where(WORKER.c.id == _WORKER)
)

PROMOTING = (
    sa.update(TASK)
    .where(
        TASK.c.id.in_(
            sa.select(ahead.c.id)
            .where(
                due(ahead.c),
                ahead.c.job_id.in_(sa.select(LINK.c.job_id).where(LINK.c.worker_id == _WORKER)),
            )
            .order_by(ahead.c.available_at)
            .limit(number(PROMOTED))
            .with_for_update(skip_locked=True)
        )
    )
    .values(
        {
            TASK.c.queued_at: TASK.c.available_at,
            TASK.c.available_at: None,
            TASK.c.queue_order: place_again(),
        }
    )
)


class Claim(NamedTuple):
    """What a claim brought.

    Attributes
    ----------
    tasks : list of TaskView
        In the order in which they were claimed.
    done : bool
        The worker drains: there is nothing to wait for.
    repeated : bool
        The tasks are those that the key brought before.
    """

    tasks: list[TaskView]
    done: bool = False
    repeated: bool = False


async def claim(
    session: AsyncSession,
    worker_id: UUID,
    caller: Caller,
    settings: JobLibSettings,
    *,
    limit: int,
    key: str | None = None,
    start: bool = False,
    jobs: Collection[str] | None = None,
) -> Claim:
    """Give a worker the next tasks of its jobs; a draining one gets nothing.

    Within a job tasks come in the order of their places, which are never compared between
    jobs: first comes the job whose first task has the highest priority, or waited longest.

    Parameters
    ----------
    worker_id, caller : UUID, Caller
        The worker and its owner; the claim counts as a heartbeat.
    limit, start : int, bool
        How many tasks at most, and whether they are running at once.
    key : str, optional
        The claim's idempotency key: what it brought once, it brings again.
    jobs : collection of str, optional
        Full names: of the worker's jobs, these alone.

    Raises
    ------
    ProblemException
        ``worker-not-found``, or ``forbidden`` for another user's worker.
    """
    names = _parameters(worker_id, caller, settings, key, jobs)
    statement = claiming(limit, key is not None, start, jobs is not None)
    if key is not None:
        # of two claims under one key the second waits here, and sees what the first took
        await workers.touch(session, worker_id, caller)
    taken = (await execute(session, statement, names)).all()
    # nothing taken: only now is it worth a read to tell why
    found = taken or (await execute(session, ASKING, names)).all()
    worker = taken[0] if taken else workers.checked(next(iter(found), None), worker_id, caller)
    if worker.heartbeat_due:
        await workers.keep_alive(session, [worker_id])
    if worker.id is not None:
        return Claim(_in_order(found), repeated=not taken)
    draining = worker.state == WorkerState.DRAINING
    if worker.claimable and not draining:
        await execute(session, PROMOTING, names)
        taken = (await execute(session, statement, names | {"promoted": True})).all()
    return Claim(_in_order(taken), done=draining)


def _parameters(
    worker_id: UUID,
    caller: Caller,
    settings: JobLibSettings,
    key: str | None,
    jobs: Collection[str] | None,
) -> dict[str, Any]:
    return {
        "worker": worker_id,
        # one for each of their types: SQLite writes a user's id in two ways
        "owner": caller.id,
        "holder": caller.id,
        "key": key,
        "jobs": list(jobs or ()),
        "promoted": False,
        **workers.due_after(settings),
    }


def _in_order(rows: Sequence[Any]) -> list[TaskView]:
    """Return tasks as they were claimed, which no RETURNING tells."""
    placed = sorted(rows, key=lambda row: (row.job_id, row.queue_order, row.id))
    queues = [list(queue) for _, queue in groupby(placed, key=lambda row: row.job_id)]
    queues.sort(key=lambda queue: (-queue[0].priority, queue[0].queued_at))
    return [row for queue in queues for row in queue]

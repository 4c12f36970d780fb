"""Claims: what a worker is given."""

import time
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import (
    ColumnElement,
    Row,
    Select,
    String,
    and_,
    bindparam,
    case,
    cast,
    exists,
    false,
    func,
    literal_column,
    select,
    true,
    union_all,
    update,
)
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.sql.dml import ReturningUpdate

from zndraw_joblib import workers
from zndraw_joblib.lifecycle import TaskStatus, WorkerState
from zndraw_joblib.models import (
    JOB,
    LINK,
    TASK,
    WORKER,
    due,
    held,
    now,
    number,
    queued,
    rechecked,
    returned,
)
from zndraw_joblib.names import FullName
from zndraw_joblib.schemas import TaskResponse
from zndraw_joblib.settings import JobLibSettings
from zndraw_joblib.tasks import (
    VIEW,
    ahead,
    of_job,
    read_view,
)
from zndraw_joblib.workers import Caller

# How many other claims may hold the first tasks of several queues locked at one moment
# without this one finding nothing: it looks that much further.
CONTENTION = 32
# The same for a claim that looks twice if it finds nothing.
FIRST_CONTENTION = 4
# Due tasks that one claim moves into the queue.
PROMOTION = 1000


def _first(
    column: ColumnElement[Any], *which: ColumnElement[bool]
) -> ColumnElement[Any]:
    # of the job that a row of LINK names
    least = select(func.min(column)).where(
        ahead.c.job_id == returned(LINK.c.job_id), *which
    )
    return least.scalar_subquery()


def _some_due() -> ColumnElement[bool]:
    # Each claim asks, so it is the head of each job's index that is looked at: for an
    # EXISTS over the tasks themselves PostgreSQL, with a generic plan, reads them all.
    moment = ahead.c.available_at
    return exists().where(
        LINK.c.worker_id == bindparam("worker"),
        _first(moment, moment.is_not(None)) <= now(),
    )


def _due(worker_id: UUID) -> Select[tuple[UUID]]:
    served = select(LINK.c.job_id).where(LINK.c.worker_id == worker_id)
    return select(TASK.c.id).where(due(), TASK.c.job_id.in_(served))


async def served(session: AsyncSession, worker_id: UUID) -> dict[UUID, str]:
    """Return a worker's jobs, with their full names."""
    found = await session.execute(
        select(JOB.c.id, JOB.c.room_id, JOB.c.category, JOB.c.name)
        .join(LINK, LINK.c.job_id == JOB.c.id)
        .where(LINK.c.worker_id == worker_id)
    )
    return {job_id: str(FullName(*name)) for job_id, *name in found}


async def promote(session: AsyncSession, worker_id: UUID) -> None:
    """Let delayed tasks of a worker's jobs, whose time has come, take their place."""
    ready = (
        _due(worker_id)
        .order_by(TASK.c.available_at)
        .limit(number(PROMOTION))
        .with_for_update(skip_locked=True)
    )
    await session.execute(
        update(TASK).where(TASK.c.id.in_(ready)).values({TASK.c.available_at: None})
    )


def _claimed_before(task: Any) -> ColumnElement[bool]:
    return and_(
        task.worker_id == bindparam("worker"),
        held(task),
        task.claim_key == bindparam("key"),
    )


def _within_reach(limit: int, all_jobs: bool) -> ColumnElement[str | None]:
    # The first tasks of all are tasks of those jobs whose own first task comes first:
    # however many jobs a worker serves, few of their queues are read. Null when all of
    # them are empty; else those that are come along where the jobs are remembered.
    first = _first(ahead.c.queue_order, queued(ahead.c)).label("first")
    served = (
        select(LINK.c.job_id, first)
        .where(LINK.c.worker_id == bindparam("worker"))
        .order_by(first.asc().nulls_last())
        .limit(number(limit + CONTENTION))
        .subquery()
    )
    ids = func.aggregate_strings(cast(served.c.job_id, String), ",")
    reach = select(ids).having(func.count(served.c.first) > 0)
    if not all_jobs:
        reach = reach.where(served.c.first.is_not(None))
    return reach.scalar_subquery()


@lru_cache(maxsize=128)
def _reaching(
    limit: int, keyed: bool, heard: bool
) -> Select[Any] | ReturningUpdate[Any]:
    again = exists().where(_claimed_before(ahead.c)) if keyed else false()
    seen = (
        WORKER.c.user_id,
        WORKER.c.state,
        workers.silent().label("unheard"),
        _within_reach(limit, all_jobs=not keyed).label("jobs"),
        _some_due().label("due"),
        again.label("again"),
    )
    this = WORKER.c.id == bindparam("worker")
    if heard:
        return select(*seen).where(this)
    # The sign of life is written here. It locks the worker too: of two claims under one
    # key the second has to see what the first one took, and a statement sees what was
    # there when it began.
    # A claim with a key locks each time: one that is not silent spares the index.
    writes = workers.silent() if keyed else WORKER.c.user_id == bindparam("owner")
    heartbeat = case((writes, now()), else_=WORKER.c.last_heartbeat)
    return (
        update(WORKER)
        .where(this)
        .values({WORKER.c.last_heartbeat: heartbeat})
        .returning(*seen)
    )


def _heads(jobs: int, reach: int) -> Select[Any]:
    # A worker's queue is the merge of its jobs' queues, and no index holds it in order.
    # So each queue is read on its own, and only as far as this claim could reach: an
    # ORDER BY ... LIMIT over the join would sort every waiting task. One branch a job,
    # not a correlated LIMIT: SQLite has no LATERAL, and without it PostgreSQL, which
    # can't know how short the reach is, prefers to read the whole table.
    heads = [
        select(TASK.c.id, TASK.c.queue_order)
        .where(
            TASK.c.job_id == bindparam(f"job_{job}", type_=TASK.c.job_id.type), queued()
        )
        .order_by(TASK.c.queue_order)
        .limit(number(reach))
        .subquery()
        for job in range(jobs)
    ]
    merged = union_all(*(select(head) for head in heads)).subquery()
    return (
        select(merged.c.id)
        .order_by(merged.c.queue_order, merged.c.id)
        .limit(number(reach))
    )


def _at_work() -> ColumnElement[bool]:
    # It stays locked, so that it goes with what it claimed, or before.
    worker: Select[Any] = (
        select(literal_column("1"))
        .where(
            WORKER.c.id == bindparam("worker"),
            WORKER.c.user_id == bindparam("owner"),
            WORKER.c.state == WorkerState.ACTIVE.value,
        )
        .with_for_update(read=True)
    )
    return worker.scalar_subquery().is_not(None)


def _as_remembered() -> ColumnElement[bool]:
    # No job was added (none is ever taken away), and no delayed task is to take its
    # place first.
    serves = select(func.count()).where(LINK.c.worker_id == bindparam("worker"))
    return and_(serves.scalar_subquery() == bindparam("serves"), ~_some_due())


@lru_cache(maxsize=256)
def _claiming(
    jobs: int, limit: int, keyed: bool, start: bool, remembered: bool
) -> ReturningUpdate[Any]:
    # built once for each shape: what is left of a claim is filling in the ids
    order = [TASK.c.queue_order, TASK.c.id]
    if jobs == 1:
        # one queue needs no merging: it is read as far as others hold its first tasks,
        # in the order of the index, or PostgreSQL would read and sort 32 of them
        order = [TASK.c.queue_order]
        waiting = select(TASK.c.id).where(
            TASK.c.job_id == bindparam("job_0", type_=TASK.c.job_id.type), queued()
        )
    else:
        contention = FIRST_CONTENTION if remembered else CONTENTION
        head = _heads(jobs, limit + contention).subquery()
        waiting = (
            select(TASK.c.id)
            .join(head, head.c.id == TASK.c.id)
            .where(rechecked(queued()))
        )
    oldest = (
        waiting.where(
            ~exists().where(_claimed_before(ahead.c)) if keyed else true(),
            _at_work(),
            _as_remembered() if remembered else true(),
        )
        .order_by(*order)
        .limit(number(limit))
        .with_for_update(of=TASK, skip_locked=True)
    )
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
        update(TASK)
        .where(TASK.c.id.in_(oldest))
        .values(
            {
                **taken,
                TASK.c.worker_id: bindparam("worker"),
                TASK.c.holder_id: bindparam("holder"),
                TASK.c.attempt: TASK.c.attempt + 1,
                TASK.c.claimed_at: now(),
                TASK.c.claim_key: bindparam("key"),
                TASK.c.progress: None,
                TASK.c.progress_message: None,
            }
        )
        .returning(TASK.c.queue_order, workers.unheard(TASK.c.worker_id), *VIEW)
    )


class _Last(NamedTuple):
    """A worker's last claim without a key, in this process."""

    #: those that it found work for; the next claim is one statement, which makes sure that
    #: they are what the worker serves
    jobs: tuple[UUID, ...]
    #: until when, on this process's clock, no sign of life is due
    until: float


_last: dict[UUID, _Last] = {}
_REMEMBERED_WORKERS = 10_000
# More queues than these are not worth a look at each of them.
_REMEMBERED_JOBS = 8


class Claim(NamedTuple):
    """What a claim brought.

    Attributes
    ----------
    tasks : list of TaskResponse
        Higher priority first, then oldest first.
    done : bool
        The worker drains: there is nothing to wait for.
    repeated : bool
        The tasks are those that the key brought before.
    """

    tasks: list[TaskResponse]
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
) -> Claim:
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
    start : bool
        The tasks are running at once.

    Raises
    ------
    ProblemException
        ``worker-not-found``, or ``forbidden`` for another user's worker.
    """
    shape = limit, key is not None, start
    names = {
        "worker": worker_id,
        "key": key,
        "holder": caller.id,
        **workers.unheard_since(caller, settings),
    }
    last = _last.get(worker_id) if key is None else None
    if last and time.monotonic() > last.until:
        last = None
    if last and last.jobs:
        rows = await _take(session, last.jobs, shape, names, remembered=True)
        if rows:
            return await _claimed(session, worker_id, rows, unheard=rows[0].unheard)
    reaching = _reaching(limit, key is not None, heard=last is not None)
    found = await session.execute(reaching, names)
    worker = workers.checked(found.one_or_none(), worker_id, caller)
    draining = worker.state == WorkerState.DRAINING
    # what its key brought before, it gets all the same
    takes = not (draining or worker.again)
    jobs = worker.jobs if takes else None
    if takes and worker.due:
        await promote(session, worker_id)
        reach = _within_reach(limit, all_jobs=key is None)
        jobs = await session.scalar(select(reach), names)
    ids = tuple(map(UUID, jobs.split(","))) if jobs else ()
    rows = await _take(session, ids, shape, names) if ids else []
    if key is None:
        until = last.until if last else time.monotonic() + workers.fresh(settings)
        _remember(worker_id, _Last(ids if rows else (), until))
    # what was not there when this claim began to wait for the worker, may be there now
    repeated = key is not None and not rows
    if repeated:
        again = select(TASK.c.queue_order, *VIEW).where(_claimed_before(TASK.c))
        rows = (await session.execute(again, names)).all()
    return await _claimed(
        session, worker_id, rows, draining, repeated, unheard=worker.unheard
    )


async def _claimed(
    session: AsyncSession,
    worker_id: UUID,
    rows: Sequence[Row[Any]],
    done: bool = False,
    repeated: bool = False,
    *,
    unheard: bool,
) -> Claim:
    if unheard:
        await workers.keep_alive(session, [worker_id])
    oldest_first = sorted(rows, key=lambda row: (row.queue_order, row.id))
    return Claim([read_view(row) for row in oldest_first], done, repeated)


def _remember(worker_id: UUID, last: _Last) -> None:
    if len(_last) > _REMEMBERED_WORKERS:
        _last.clear()
    # of more jobs those that are within reach need not be all
    jobs = last.jobs if len(last.jobs) <= _REMEMBERED_JOBS else ()
    _last[worker_id] = last._replace(jobs=jobs)


async def _take(
    session: AsyncSession,
    jobs: Sequence[UUID],
    shape: tuple[int, bool, bool],
    names: dict[str, Any],
    *,
    remembered: bool = False,
) -> Sequence[Row[Any]]:
    # few shapes of the statement for any number of jobs: the nil UUID is no job's
    branches = 1 << (len(jobs) - 1).bit_length()
    padded = {f"job_{n}": UUID(int=0) for n in range(branches)}
    chosen = padded | {f"job_{n}": job for n, job in enumerate(jobs)}
    claimed = await session.execute(
        _claiming(branches, *shape, remembered),
        chosen | names | {"serves": len(jobs)},
    )
    return claimed.all()

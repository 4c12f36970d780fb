"""Operations: what goes on; to pause jobs, and to cancel, retry and delete tasks."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from functools import lru_cache
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from pydantic_core import to_json
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.sql.dml import ReturningUpdate

from zndraw_joblib import exceptions, jobs, models, reports, submissions, tasks
from zndraw_joblib.database import Listing, Page, execute, now, number, paginate, scalar, scalars
from zndraw_joblib.events import TaskView
from zndraw_joblib.lifecycle import INTERNAL_ROOM, REPORTABLE, TERMINAL, FullName, TaskStatus
from zndraw_joblib.models import JOB, LINK, TASK, WORKER
from zndraw_joblib.schemas import JobStats, RunningTask, TaskBulkRequest, WorkerSummary
from zndraw_joblib.settings import JobLibSettings, get_settings
from zndraw_joblib.workers import Caller, RoomAccess

# --- what goes on ---

#: Over how many seconds what ended is counted.
SECONDS_COUNTED = 60
# Of each kind no more tasks are read: a host that ends more in a minute sees fewer.
COUNTED_MAX = 100_000


def _waiting(order: str, waits: sa.ColumnElement[bool]) -> Any:
    # No more of a queue than is shown is read, in the order of its index: else
    # counting would take longer the longer the queue is. Written as positions are.
    return (
        sa.select(TASK.c.created_at)
        .where(TASK.c.job_id == JOB.c.id, waits)
        .order_by(TASK.c[order])
        .limit(sa.select(tasks.LAST).scalar_subquery())
        .correlate_except(TASK)
        .subquery()
    )


_PENDING = _waiting("queue_order", models.queued())
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
_LISTED = _FIGURES.where(models.SERVED)


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
    counted = await _count(session, models.held(), TASK.c.worker_id)
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
_SERVING = sa.select(LINK.c.worker_id).join(JOB, JOB.c.id == LINK.c.job_id).where(models.SERVED)
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
        .where(models.held(), TASK.c.worker_id.in_([row.id for row in listing.rows]))
        .limit(number(COUNTED_MAX))
    )
    held = defaultdict[UUID, list[Any]](list)
    for task in await execute(session, holding) if listing.rows else ():
        held[task.worker_id].append(task)
    return [_summary(row, held[row.id]) for row in listing.rows], listing


def _summary(row: sa.Row[Any], tasks: Sequence[sa.Row[Any]]) -> WorkerSummary:
    running = [
        RunningTask(id=task.id, job_name=task.job_name)
        for task in sorted(tasks, key=lambda task: task.id)
        if task.shown and task.status is TaskStatus.RUNNING
    ]
    return WorkerSummary(**row._mapping, held=len(tasks), running=running[:TASKS_NAMED])


# --- what is done about it ---

#: Tasks that one request changes, and waiting ones that a resumed job's workers hear of.
MOST = 1000

_SOURCES = {"cancel": REPORTABLE[TaskStatus.CANCELLED], "retry": TERMINAL, "delete": TERMINAL}


async def pause(
    session: AsyncSession, job: jobs.Target, paused: bool
) -> tuple[bool, Sequence[sa.Row[Any]]]:
    """Let a job's tasks wait, whoever serves it, or wait no longer.

    Returns
    -------
    bool
        Whether it was otherwise before.
    sequence of Row
        Of a job that goes on, the first tasks that wait for a worker.

    Raises
    ------
    ProblemException
        ``forbidden`` for a job of ``@internal``.
    """
    if job.internal:
        raise exceptions.Forbidden.exception("the server's own jobs can't be paused")
    pausing = sa.update(JOB).where(JOB.c.id == job.id, JOB.c.paused.is_(not paused))
    changed = await scalar(session, pausing.values(paused=paused).returning(JOB.c.id))
    if changed is None or paused:
        return changed is not None, []
    waiting = (
        sa.select(TASK.c.id, TASK.c.room_id)
        .where(TASK.c.job_id == job.id, models.queued())
        .order_by(TASK.c.queue_order, TASK.c.id)
    )
    return True, (await execute(session, waiting.limit(number(MOST)))).all()


async def choose(session: AsyncSession, room: str, request: TaskBulkRequest) -> list[UUID]:
    """Return the tasks of a room that a request is for, the oldest first.

    Returns
    -------
    list of UUID
        :data:`MOST` of them, and one more if there are more.

    Raises
    ------
    ProblemException
        ``job-not-found``, where there never was one of this name.
    """
    chosen = [TASK.c.room_id == room]
    if request.job is not None:
        named = sa.select(JOB.c.id).where(jobs.named(jobs.find_name(room, request.job)))
        job_id = await scalar(session, named)
        if job_id is None:
            raise jobs.not_found(room, request.job)
        chosen.append(TASK.c.job_id == job_id)
    if request.created_by is not None:
        chosen.append(TASK.c.created_by_id == request.created_by)
    if request.before is not None:
        chosen.append(TASK.c.created_at < request.before)
    if request.action == "retry":
        chosen.append(models.of_job(JOB.c.deleted).is_(False))
    states = _SOURCES[request.action]
    states = states if request.status is None else states & {request.status}
    if not states:
        return []
    order = (TASK.c.created_at, TASK.c.id)
    # each state in the order of its index: more than is asked for is never read to be sorted
    walks = [
        sa.select(*order)
        .where(TASK.c.status == models.constant(status), *chosen)
        .order_by(*order)
        .limit(number(MOST + 1))
        .subquery()
        for status in sorted(states)
    ]
    found = sa.union_all(*map(sa.select, walks)).subquery()
    oldest = sa.select(found.c.id).order_by(found.c.created_at, found.c.id)
    return await scalars(session, oldest.limit(number(MOST + 1)))


async def cancel(
    session: AsyncSession,
    task_ids: Sequence[UUID],
    caller: Caller,
    reason: str | None,
    settings: JobLibSettings,
) -> list[TaskView]:
    """Cancel those of the tasks that have not ended; return them."""
    await reports.lock(session, task_ids)
    cancelling = (
        sa.update(TASK)
        .where(TASK.c.id.in_(task_ids), models.rechecked(models.in_states(_SOURCES["cancel"])))
        .values(reports.cancelled(caller.id, reason))
    )
    return await tasks.change(session, cancelling.returning(*tasks.BRIEF), settings)


@lru_cache(maxsize=2)
def _retrying(internal: bool) -> ReturningUpdate[Any]:
    """Return what makes tasks that have ended as they were when they were submitted."""
    _, own = submissions.rows_of("ended")
    place = submissions.new_place(TASK.c.job_id, TASK.c.priority, TASK.c.created_by_id)
    anew = {
        **submissions.back_in_queue(),
        # none sees the others of its statement, which come behind each other
        TASK.c.queue_order: place + own("before", sa.Integer()),
        TASK.c.queued_at: now(),
        TASK.c.failed_attempts: 0,
        TASK.c.completed_at: None,
        TASK.c.result: None,
        # what has not come to its end goes on
        TASK.c.checkpoint: sa.case((TASK.c.status != TaskStatus.COMPLETED, TASK.c.checkpoint)),
        TASK.c.errors: own("errors", TASK.c.errors.type),
        TASK.c.ended_by_id: None,
        TASK.c.reason: None,
        TASK.c.retried_by_id: sa.bindparam("retrier", type_=TASK.c.retried_by_id.type),
    }
    if internal:
        anew |= submissions.claimed_for_broker(sa.bindparam("seconds", type_=sa.Float()))
    return (
        sa.update(TASK)
        .where(
            TASK.c.id == own("id", TASK.c.id.type),
            models.in_states(TERMINAL),
            TASK.c.attempt == own("attempt", TASK.c.attempt.type),
            models.of_job(JOB.c.deleted).is_(False),
        )
        .values(anew)
        .returning(*tasks.SHOWN, TASK.c.queue_order)
    )


# Their jobs are locked, so that no soft-deletion comes in between; where nothing is locked,
# what was read here may be over by the time of the write.
_ENDED = (
    sa.select(
        TASK.c.id,
        TASK.c.attempt,
        TASK.c.errors,
        TASK.c.room_id,
        TASK.c.created_by_id,
        TASK.c.holder_id,
        TASK.c.job_id,
        TASK.c.priority,
        JOB.c.room_id.label("of_room"),
    )
    .join(JOB, TASK.c.job_id == JOB.c.id)
    .where(TASK.c.id.in_(sa.bindparam("tasks", expanding=True)))
    .order_by(TASK.c.created_at, TASK.c.id)
    .with_for_update(read=True, key_share=True, of=JOB)
)


async def retry(
    session: AsyncSession,
    task_id: UUID,
    caller: Caller,
    may_enter: RoomAccess,
    settings: JobLibSettings,
) -> TaskView:
    """Set a terminal task going again, with all its attempts before it.

    Raises
    ------
    ProblemException
        ``task-not-found``, ``forbidden``, ``invalid-task-transition``,
        ``quota-exceeded``, or ``job-not-found`` when its job is gone.
    """
    row = (await execute(session, _ENDED, {"tasks": [task_id]})).one_or_none()
    row = await tasks.require_own(session, row, task_id, caller, may_enter, "retry")
    retried = await _retry(session, [row], caller, settings)
    if not retried:
        gone = sa.select(models.of_job(JOB.c.deleted)).where(TASK.c.id == task_id)
        if await scalar(session, gone):
            raise exceptions.JobNotFound.exception("job not found: the task's job is gone")
        raise exceptions.InvalidTaskTransition.exception("only a terminal task can be tried again")
    return retried[0]


async def retry_many(
    session: AsyncSession, task_ids: Sequence[UUID], caller: Caller, settings: JobLibSettings
) -> list[TaskView]:
    """Set those of the tasks that have ended, and whose job is there, going again.

    Raises
    ------
    ProblemException
        ``quota-exceeded`` of one of their submitters.
    """
    ended = await execute(session, _ENDED, {"tasks": task_ids})
    await reports.lock(session, task_ids)
    return await _retry(session, ended.all(), caller, settings)


async def _retry(
    session: AsyncSession, rows: Sequence[sa.Row[Any]], caller: Caller, settings: JobLibSettings
) -> list[TaskView]:
    retried: list[Any] = []
    for internal in (False, True):
        of_one_kind = [row for row in rows if (row.of_room == INTERNAL_ROOM) is internal]
        if of_one_kind:
            values = {"ended": _as_json(of_one_kind), "retrier": caller.id}
            values["seconds"] = settings.internal_redispatch_seconds
            retried += (await execute(session, _retrying(internal), values)).all()
    places = defaultdict[UUID | None, list[int]](list)
    for task in retried:
        if task.status is TaskStatus.PENDING:
            places[task.created_by_id].append(task.queue_order)
    for user_id, taken in places.items():
        await submissions.check_waiting(session, user_id, settings, taken)
    return await tasks.with_positions(session, retried, settings)


def _as_json(rows: Sequence[sa.Row[Any]]) -> str:
    """Write what a retry has to know of each task; of a user's in a queue, how many come before."""
    before = Counter[Any]()
    entries = []
    for row in rows:
        queue = (row.job_id, row.priority, row.created_by_id)
        # all errors would be longer with each retry
        errors = "\n".join(tasks.last_errors(row.errors)) or None
        attempt = row.attempt
        entries.append(
            {"id": row.id.hex, "attempt": attempt, "errors": errors, "before": before[queue]}
        )
        before[queue] += 1
    return to_json(entries).decode()


async def delete(session: AsyncSession, task_ids: Sequence[UUID]) -> list[UUID]:
    """Delete those of the tasks that have ended; return their ids."""
    return await tasks.delete(session, TASK.c.id.in_(task_ids), models.in_states(TERMINAL))


async def delete_one(
    session: AsyncSession, task_id: UUID, caller: Caller, may_enter: RoomAccess
) -> str:
    """Delete a task that has ended; return its room.

    Raises
    ------
    ProblemException
        ``task-not-found``, ``forbidden``, or ``invalid-task-transition`` when it has not
        ended.
    """
    found = await execute(
        session,
        sa.select(TASK.c.room_id, TASK.c.created_by_id, TASK.c.holder_id, TASK.c.status).where(
            TASK.c.id == task_id
        ),
    )
    row = found.one_or_none()
    row = await tasks.require_own(session, row, task_id, caller, may_enter, "delete")
    if not await delete(session, [task_id]):
        raise exceptions.InvalidTaskTransition.exception(
            f"a {row.status.value} task can't be deleted: cancel it first",
            task_status=row.status.value,
        )
    room: str = row.room_id
    return room

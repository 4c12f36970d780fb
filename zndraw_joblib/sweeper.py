"""What the host runs now and then: ends what dead workers and lost messages left."""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from typing import Any, TypeVar
from uuid import UUID

import anyio
from sqlalchemy import Select, select
from sqlalchemy.ext.asyncio import AsyncSession

from zndraw_joblib import attempts, deprecated, jobs, tasks, workers
from zndraw_joblib.database import execute, now, number
from zndraw_joblib.delivery import Delivery, Dispatcher, ProvidersRemoved, SessionMaker, Transports
from zndraw_joblib.events import Emitter, Outbox, TaskView, worker_key
from zndraw_joblib.models import JOB, WORKER, alive_within
from zndraw_joblib.runtime import runtime_of
from zndraw_joblib.settings import JobLibSettings, get_settings
from zndraw_joblib.waiting import Waiters, wakeups_of

log = logging.getLogger(__name__)

# A batch is one transaction; under a lock-wrapped maker everybody else waits for it.
WORKERS_A_BATCH = 10
TASKS_A_BATCH = 125
# Deleted jobs that one pass looks at: the next one goes on behind them.
JOBS_A_PASS = 5000
# Before all ids.
FIRST = UUID(int=0)
# Rows that a pass may fail at; at more it is not the rows.
BAD_A_PASS = 100

T = TypeVar("T")
Rows = Select[tuple[UUID]]
#: Ends the chosen rows and returns how many it changed.
End = Callable[[AsyncSession, Rows, Outbox], Awaitable[int]]
Step = Callable[[AsyncSession, Rows, JobLibSettings], Awaitable[list[TaskView]]]


@dataclass
class _Sweep:
    """Where passes find their rows, and what one remembers for the next.

    Attributes
    ----------
    session_maker : callable
        Opens one session a batch.
    transports : Transports
        What carries changes out of this process.
    delivery : Delivery
        The queue by which they leave.
    reported : set of tuple
        Rows that could not be swept, with the cause: each is logged once.
    looked_at : UUID
        The last deleted job that was looked at.
    """

    session_maker: SessionMaker
    transports: Transports
    delivery: Delivery
    reported: set[tuple[UUID, str]] = field(default_factory=set)
    looked_at: UUID = FIRST

    async def run(self, step: Callable[[AsyncSession, Outbox], Awaitable[T]]) -> T:
        """Commit a step, and return when what it left in the outbox has left, or can't."""
        outbox = Outbox()
        async with self.session_maker() as session:
            result = await step(session, outbox)
            await session.commit()
            # with nothing awaited in between: this is what orders events
            published = self.delivery.publish(outbox, self.transports)
        if published is not None:
            await published
        return result


async def retire(
    session: AsyncSession, removed: workers.Removed, settings: JobLibSettings, outbox: Outbox
) -> None:
    """End what removed workers held, and the jobs that only they served."""
    outbox.tasks_changed(await attempts.lose(session, removed.worker_ids, settings))
    _removed(removed, outbox)
    await jobs.delete_idle(session, JOB.c.id.in_(removed.job_ids))


def _removed(removed: workers.Removed, outbox: Outbox) -> None:
    outbox.workers_gone += removed.worker_ids
    outbox.ended += map(worker_key, removed.worker_ids)
    outbox.jobs_changed(removed.job_rooms)
    outbox.providers_gone(removed.providers)


async def _each(sweep: _Sweep, rows: Rows, end: End, size: int = TASKS_A_BATCH) -> int:
    """End rows, a batch at a time; one that can't be ended costs itself alone."""
    total, bad = 0, set[UUID]()
    (row_id,) = rows.selected_columns
    while True:
        good = rows.where(row_id.not_in(bad)) if bad else rows
        try:
            return total + await _drain(sweep, good, end, size)
        except Exception:
            if len(bad) >= BAD_A_PASS:
                raise
            # which one of the batch was it?
            async with sweep.session_maker() as session:
                ids = ((await execute(session, good.limit(number(size)))).scalars()).all()
            if not ids:
                raise
        for one in ids:
            try:
                total += await _drain(sweep, rows.where(row_id == one), end, 1)
            except Exception as exc:
                bad.add(one)
                _report(sweep, one, exc)


async def _drain(sweep: _Sweep, rows: Rows, end: End, size: int) -> int:
    (row_id,) = rows.selected_columns
    some = rows.limit(number(size)).with_for_update(of=row_id.table, skip_locked=True)
    total = 0
    while True:
        handled = await sweep.run(lambda session, outbox: end(session, some, outbox))
        total += handled
        if not handled:
            return total


def _report(sweep: _Sweep, row_id: UUID, exc: Exception) -> None:
    # of the database's words the first line: the others may quote the row
    lines = str(getattr(exc, "orig", None) or exc).splitlines() or [""]
    cause = f"{type(exc).__name__}: {lines[0]}"
    if (row_id, cause) not in sweep.reported:
        sweep.reported.add((row_id, cause))
        fields = {"event": "not swept", "row_id": str(row_id)}
        log.error("%s can't be swept and stays: %s", row_id, cause, extra=fields)


async def _stale_workers(sweep: _Sweep) -> int:
    settings = sweep.transports.settings
    retired = 0
    job_ids: set[UUID] = set()

    async def end(session: AsyncSession, rows: Rows, outbox: Outbox) -> int:
        nonlocal retired
        ids = await workers.lock(session, rows)
        lost = await attempts.lose(session, ids, settings, TASKS_A_BATCH)
        outbox.tasks_changed(lost)
        if len(lost) < TASKS_A_BATCH:
            # else a later batch ends the rest, and then the workers
            removed = await workers.remove(session, ids)
            _removed(removed, outbox)
            job_ids.update(removed.job_ids)
            retired += len(ids)
        return len(ids)

    stale = select(WORKER.c.id).where(~alive_within(settings.worker_timeout_seconds))
    try:
        await _each(sweep, stale, end, WORKERS_A_BATCH)
    finally:
        if job_ids:
            await _idle_jobs(sweep, job_ids)
    return retired


async def _tasks(sweep: _Sweep, rows: Rows, step: Step) -> int:
    async def end(session: AsyncSession, rows: Rows, outbox: Outbox) -> int:
        changed = await step(session, rows, sweep.transports.settings)
        outbox.tasks_changed(changed)
        return len(changed)

    return await _each(sweep, rows, end)


async def _overdue_attempts(sweep: _Sweep) -> int:
    ended = 0
    for rows, step in (
        (attempts.timed_out(), attempts.time_out),
        (attempts.never_started(), attempts.release_unstarted),
        (attempts.orphaned(), attempts.lose_orphans),
    ):
        ended += await _tasks(sweep, rows, step)
    return ended


async def _stuck_internal_tasks(sweep: _Sweep) -> int:
    settings = sweep.transports.settings
    ended = await _tasks(sweep, attempts.stuck(settings), attempts.fail_stuck)
    if sweep.transports.registry is None:
        return ended

    async def resend(session: AsyncSession, rows: Rows, outbox: Outbox) -> int:
        overdue = await attempts.dispatch_again(session, rows, settings)
        outbox.dispatch(overdue, again=True)
        return len(overdue)

    async def send(session: AsyncSession, rows: Rows, outbox: Outbox) -> int:
        again = await attempts.dispatch_waiting(session, rows, settings)
        outbox.tasks_changed(again)
        outbox.dispatch(again)
        return len(again)

    await _each(sweep, attempts.undelivered(settings), resend)
    for waiting in attempts.waiting_internal():
        await _each(sweep, waiting, send)
    return ended


async def _idle_jobs(sweep: _Sweep, job_ids: set[UUID] | None = None) -> int:
    async def end(session: AsyncSession, rows: Rows, outbox: Outbox) -> int:
        idle = await jobs.delete_idle(session, JOB.c.id.in_(rows))
        outbox.jobs_changed({name.room for name in idle})
        return len(idle)

    idle = jobs.idle()
    if job_ids is not None:
        idle = idle.where(JOB.c.id.in_(job_ids))
    return await _each(sweep, idle, end)


async def _outlived_tasks(sweep: _Sweep) -> int:
    async def end(session: AsyncSession, rows: Rows, outbox: Outbox) -> int:
        return await tasks.purge(session, rows)

    purged = 0
    for status, seconds in sweep.transports.settings.task_retention_seconds.items():
        purged += await _each(sweep, tasks.outlived(status, seconds), end)
    return purged


async def _deleted_jobs(sweep: _Sweep) -> int:
    """Delete for good the deleted jobs that have no tasks, some in each pass."""
    async with sweep.session_maker() as session:
        deleted = jobs.deleted(sweep.looked_at).limit(number(JOBS_A_PASS))
        ids = ((await execute(session, deleted)).scalars()).all()
    # all of them were looked at: from the beginning
    sweep.looked_at = ids[-1] if len(ids) == JOBS_A_PASS else FIRST

    async def end(session: AsyncSession, rows: Rows, outbox: Outbox) -> int:
        return await jobs.purge(session, rows)

    purged = 0
    for first in range(0, len(ids), TASKS_A_BATCH):
        some = jobs.taskless(ids[first : first + TASKS_A_BATCH])
        purged += await _each(sweep, some, end)
    return purged


def _sweep(
    session_maker: SessionMaker,
    settings: JobLibSettings | None,
    tsio: Emitter | None = None,
    registry: Dispatcher | None = None,
    on_providers_removed: ProvidersRemoved | None = None,
    app: Any = None,
) -> _Sweep:
    settings = settings or get_settings()
    wakeups = None if app is None else wakeups_of(app)
    transports = Transports(settings, tsio, registry, session_maker, on_providers_removed, wakeups)
    delivery = Delivery(Waiters()) if app is None else runtime_of(app).delivery
    return _Sweep(session_maker, transports, delivery)


async def cleanup_stale_workers(
    session_maker: SessionMaker,
    settings: JobLibSettings | None = None,
    tsio: Emitter | None = None,
    on_providers_removed: ProvidersRemoved | None = None,
) -> int:
    """Retire the workers that have been silent for ``worker_timeout_seconds``.

    Returns how many. The arguments are those of :func:`run_sweeper`. A worker whose row
    can't be deleted, since a table of the host's refers to it, stays alone, and the log
    says why.
    """
    sweep = _sweep(session_maker, settings, tsio, None, on_providers_removed)
    return await _stale_workers(sweep)


async def cleanup_worker(
    session_maker: SessionMaker,
    worker_id: UUID,
    settings: JobLibSettings | None = None,
    tsio: Emitter | None = None,
    on_providers_removed: ProvidersRemoved | None = None,
) -> bool:
    """Retire one worker, silent or not; return whether it was there.

    The other arguments are those of :func:`run_sweeper`.
    """
    sweep = _sweep(session_maker, settings, tsio, None, on_providers_removed)

    async def remove(session: AsyncSession, outbox: Outbox) -> bool:
        chosen = select(WORKER.c.id).where(WORKER.c.id == worker_id).with_for_update()
        removed = await workers.remove(session, await workers.lock(session, chosen))
        if removed.worker_ids:
            await retire(session, removed, sweep.transports.settings, outbox)
        return bool(removed.worker_ids)

    return await sweep.run(remove)


async def expel(
    session_maker: SessionMaker,
    user_id: UUID,
    room_id: str,
    settings: JobLibSettings | None = None,
    tsio: Emitter | None = None,
    on_providers_removed: ProvidersRemoved | None = None,
) -> int:
    """Take a user's offers out of a room that is no longer open to them.

    Their workers no longer serve the room's jobs, so that no claim brings any of its
    tasks, and their providers there are withdrawn. What they run already goes on, as
    does what they submitted. Call it after the host's own rules have changed.

    Parameters
    ----------
    session_maker : callable
        Opens the session.
    user_id : UUID
        The user.
    room_id : str
        The room.
    settings, tsio, on_providers_removed
        Those of :func:`run_sweeper`.

    Returns
    -------
    int
        How many workers were unlinked and providers withdrawn.
    """
    sweep = _sweep(session_maker, settings, tsio, None, on_providers_removed)

    async def withdraw(session: AsyncSession, outbox: Outbox) -> int:
        removed = await workers.expel(session, user_id, room_id)
        await jobs.delete_idle(session, JOB.c.id.in_(removed.job_ids))
        outbox.jobs_changed(removed.job_rooms)
        outbox.providers_gone(removed.providers)
        return len(removed.worker_ids) + len(removed.providers)

    return await sweep.run(withdraw)


async def cleanup_overdue_attempts(
    session_maker: SessionMaker, settings: JobLibSettings | None = None, tsio: Emitter | None = None
) -> int:
    """End attempts past their deadline, and those whose worker is gone.

    Returns how many. The arguments are those of :func:`run_sweeper`.
    """
    return await _overdue_attempts(_sweep(session_maker, settings, tsio))


async def cleanup_stuck_internal_tasks(
    session_maker: SessionMaker,
    settings: JobLibSettings | None = None,
    tsio: Emitter | None = None,
    registry: Dispatcher | None = None,
) -> int:
    """Send ``@internal`` tasks whose message was lost, or that have attempts left.

    Those that outlived their time are ended first; returns how many these were. The
    arguments are those of :func:`run_sweeper`; without ``registry`` nothing is sent.
    """
    return await _stuck_internal_tasks(_sweep(session_maker, settings, tsio, registry))


async def cleanup_idle_jobs(
    session_maker: SessionMaker, settings: JobLibSettings | None = None, tsio: Emitter | None = None
) -> int:
    """Soft-delete jobs that lost their last waiting task after their last worker.

    Returns how many. The arguments are those of :func:`run_sweeper`.
    """
    return await _idle_jobs(_sweep(session_maker, settings, tsio))


async def purge_tasks(session_maker: SessionMaker, settings: JobLibSettings | None = None) -> int:
    """Delete ended tasks that ``task_retention_seconds`` no longer keeps.

    Returns how many. The arguments are those of :func:`run_sweeper`.
    """
    return await _outlived_tasks(_sweep(session_maker, settings))


async def purge_jobs(session_maker: SessionMaker, settings: JobLibSettings | None = None) -> int:
    """Delete for good the jobs that are deleted and have no tasks any more.

    Returns how many. The arguments are those of :func:`run_sweeper`, each pass of which
    looks at some of them.
    """
    sweep = _sweep(session_maker, settings)
    purged = await _deleted_jobs(sweep)
    while sweep.looked_at != FIRST:
        purged += await _deleted_jobs(sweep)
    return purged


_PASSES = (
    (cleanup_stale_workers.__name__, _stale_workers),
    (cleanup_overdue_attempts.__name__, _overdue_attempts),
    (cleanup_stuck_internal_tasks.__name__, _stuck_internal_tasks),
    (cleanup_idle_jobs.__name__, _idle_jobs),
    (purge_tasks.__name__, _outlived_tasks),
    (purge_jobs.__name__, _deleted_jobs),
)


@deprecated.for_sweeper
async def run_sweeper(
    session_maker: SessionMaker,
    settings: JobLibSettings | None = None,
    tsio: Emitter | None = None,
    registry: Dispatcher | None = None,
    on_providers_removed: ProvidersRemoved | None = None,
    app: Any = None,
) -> None:
    """Sweep every ``sweeper_interval_seconds`` until cancelled; on every replica.

    While the host was down nobody could hear its workers: choose
    ``worker_timeout_seconds`` longer than a restart takes. When host and workers slept
    together, as on a laptop whose lid was closed, or the database's clock jumped, the
    workers get that time once more before anything is ended.

    Parameters
    ----------
    session_maker : callable
        Opens one session a batch.
    settings : JobLibSettings, optional
        Without it, those of the environment.
    tsio : socketio.AsyncServer or a wrapper of one, optional
        Where events go.
    registry : InternalRegistry, optional
        Where ``@internal`` tasks are sent again whose message was lost.
    on_providers_removed : coroutine function, optional
        Hears of the providers that went away with their workers.
    app : FastAPI, optional
        Whose requests run in this process: what is swept wakes those that wait, and its
        events leave by the same queue as theirs, in their order.

    Raises
    ------
    pydantic.ValidationError
        When the environment's settings can't be read.
    """
    try:
        sweep = _sweep(session_maker, settings, tsio, registry, on_providers_removed, app)
        interval = sweep.transports.settings.sweeper_interval_seconds
        log.info("sweeper began, every %g s", interval, extra={"event": "sweeper began"})
        await _forever(sweep)
    except BaseException as exc:
        cancelled = isinstance(exc, anyio.get_cancelled_exc_class())
        fields = {"event": "sweeper ended", "cause": repr(exc)}
        level = logging.INFO if cancelled else logging.ERROR
        log.log(level, "sweeper ended: %r", exc, extra=fields)
        raise


async def _forever(sweep: _Sweep) -> None:
    settings = sweep.transports.settings
    interval, timeout = (settings.sweeper_interval_seconds, settings.worker_timeout_seconds)
    # a worker that slept along for so long is heard in time all the same
    unnoticed = max(1.0, timeout / 4)
    pause = interval
    latest: datetime | None = None
    while True:
        # first of all a pause: after a restart the workers need one to be heard again
        began = await _clock(sweep)
        await anyio.sleep(pause)
        ended = await _clock(sweep)
        if began is None or ended is None:
            continue
        if latest is None or ended < max(began, latest) - timedelta(seconds=1):
            # also at first: nobody knows what the clock showed before
            await _logged("correct_moments", partial(_correct_moments, sweep))
        latest = ended
        asleep = (ended - began).total_seconds() - pause
        if asleep > unnoticed:
            # Workers may have slept along, and what they say may be on its way.
            log.warning("the sweeper slept %.0f s longer than it meant to", asleep)
            pause = timeout
            continue
        pause = interval
        for name, run in _PASSES:
            await _logged(name, partial(run, sweep))


async def _logged(name: str, run: Callable[[], Awaitable[int]]) -> None:
    try:
        if count := await run():
            fields = {"event": "swept", "sweep": name, "count": count}
            log.info("%s: %d", name, count, extra=fields)
    except Exception:
        # the next pass finds what this one left
        log.exception("%s failed", name)


async def _clock(sweep: _Sweep) -> datetime | None:
    """Return what the database's clock shows; None while it is away."""
    try:
        async with sweep.session_maker() as session:
            moment: datetime = ((await execute(session, select(now()))).scalars()).one()
            return moment
    except Exception:
        log.exception("the database's clock can't be read")
        return None


async def _correct_moments(sweep: _Sweep) -> int:
    """Bring forward what was written before the database's clock was set back."""
    async with sweep.session_maker() as session:
        corrected = await workers.correct_moments(session)
        corrected += await attempts.correct_moments(session)
        await session.commit()
    return corrected

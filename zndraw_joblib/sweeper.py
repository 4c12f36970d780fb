"""What the host runs now and then: ends what dead workers and lost messages left.

Each act takes arguments of :func:`run_sweeper`, and returns how many rows it changed.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from typing import Any, TypeVar
from uuid import UUID

import anyio
import sqlalchemy as sa
from sqlalchemy.ext.asyncio import AsyncSession

from zndraw_joblib import attempts, deprecated, jobs, tasks, workers
from zndraw_joblib.database import now, number, scalar, scalars
from zndraw_joblib.delivery import Delivery, ProvidersRemoved, SessionMaker, Transports, runtime_of
from zndraw_joblib.encoding import MAX_INT
from zndraw_joblib.events import Dispatcher, Emitter, Outbox, TaskView, worker_key
from zndraw_joblib.models import JOB, TASK, WORKER
from zndraw_joblib.settings import JobLibSettings, get_settings, settings_of
from zndraw_joblib.waiting import Waiters, wakeups_of

log = logging.getLogger(__name__)

# A batch is one transaction; under a lock-wrapped maker everybody else waits for it.
WORKERS_A_BATCH = 50
TASKS_A_BATCH = 500
# Deleted jobs that one pass looks at: the next one goes on behind them.
JOBS_A_PASS = 5000
FIRST = UUID(int=0)
# Rows that a pass may fail at; at more it is not the rows.
BAD_A_PASS = 100

T = TypeVar("T")
Rows = sa.Select[tuple[UUID]]
# ends the chosen rows and returns how many it changed
End = Callable[[AsyncSession, Rows, JobLibSettings, Outbox], Awaitable[int]]
Step = Callable[[AsyncSession, Rows, JobLibSettings], Awaitable[list[TaskView]]]


@dataclass
class _Sweep:
    session_maker: SessionMaker
    transports: Transports
    delivery: Delivery
    # rows that could not be swept, with the cause: each is logged once
    reported: set[tuple[UUID, str]] = field(default_factory=set)
    # the last of the deleted jobs that were purged, if they had no tasks
    purged_up_to: UUID = FIRST

    async def run(self, step: Callable[[AsyncSession, Outbox], Awaitable[T]]) -> T:
        """Commit a step, and publish what it left in the outbox."""
        return await self.delivery.run(self.session_maker, self.transports, step)


async def retire(
    session: AsyncSession,
    chosen: Rows,
    settings: JobLibSettings,
    outbox: Outbox,
    most: int = MAX_INT,
) -> int:
    """Remove the chosen workers with what they held, and the jobs that only they served.

    Returns how many. When they hold more than ``most`` tasks, so many are ended, and all of
    the workers stay.
    """
    gone = await workers.lock(session, chosen)
    if not gone:
        return 0
    worker_ids = [worker.id for worker in gone]
    lost = await attempts.lose(session, gone, settings, most)
    outbox.tasks_changed(lost)
    if len(lost) == most:
        return 0
    removed = await workers.remove(session, worker_ids)
    await jobs.delete_idle(session, JOB.c.id.in_(removed.job_ids))
    outbox.workers_gone += worker_ids
    outbox.ended += map(worker_key, worker_ids)
    outbox.jobs_changed(removed.job_rooms)
    outbox.providers_gone(removed.providers)
    return len(worker_ids)


async def _each(sweep: _Sweep, rows: Rows, end: End, size: int = TASKS_A_BATCH) -> int:
    """End rows, a batch at a time; one that can't be ended costs itself alone."""
    (row_id,) = rows.selected_columns
    total, more, bad = 0, True, set[UUID]()
    while more:
        good = rows.where(row_id.not_in(bad)) if bad else rows
        try:
            ended, more = await _batch(sweep, good, end, size)
            total += ended
        except Exception:
            # which one of the batch was it?
            async with sweep.session_maker() as session:
                ids = await scalars(session, good.limit(number(size)))
            if not ids or len(bad) >= BAD_A_PASS:
                raise
            for one in ids:
                try:
                    ended, _ = await _batch(sweep, rows.where(row_id == one), end, 1)
                    total += ended
                except Exception as exc:
                    bad.add(one)
                    _report(sweep, one, exc)
    return total


async def _batch(sweep: _Sweep, rows: Rows, end: End, size: int) -> tuple[int, bool]:
    """End some rows; return how many, and whether there may be more."""
    (row_id,) = rows.selected_columns
    some = rows.limit(number(size)).with_for_update(of=row_id.table, skip_locked=True)

    async def step(session: AsyncSession, outbox: Outbox) -> tuple[int, bool]:
        ended = await end(session, some, sweep.transports.settings, outbox)
        # a batch of what a worker holds ends no worker yet
        return ended, bool(ended or outbox.changes)

    return await sweep.run(step)


def _report(sweep: _Sweep, row_id: UUID, exc: Exception) -> None:
    # of the database's words the first line: the others may quote the row
    lines = str(getattr(exc, "orig", None) or exc).splitlines() or [""]
    cause = f"{type(exc).__name__}: {lines[0]}"
    if (row_id, cause) not in sweep.reported:
        sweep.reported.add((row_id, cause))
        fields = {"event": "not swept", "row_id": str(row_id)}
        log.error("%s can't be swept and stays: %s", row_id, cause, extra=fields)


async def _stale_workers(sweep: _Sweep) -> int:
    rows = workers.stale(sweep.transports.settings)
    return await _each(sweep, rows, partial(retire, most=TASKS_A_BATCH), WORKERS_A_BATCH)


def _changing(step: Step) -> End:
    async def end(
        session: AsyncSession, rows: Rows, settings: JobLibSettings, outbox: Outbox
    ) -> int:
        changed = await step(session, rows, settings)
        outbox.tasks_changed(changed)
        return len(changed)

    return end


async def _overdue_attempts(sweep: _Sweep) -> int:
    ended = 0
    for rows, step in (
        (attempts.TIMED_OUT, attempts.time_out),
        (attempts.NEVER_STARTED, attempts.release_unstarted),
        (attempts.ORPHANED, attempts.lose_orphans),
    ):
        ended += await _each(sweep, rows, _changing(step))
    return ended


async def _stuck_internal_tasks(sweep: _Sweep) -> int:
    settings = sweep.transports.settings
    ended = await _each(sweep, attempts.stuck(settings), _changing(attempts.fail_stuck))
    if sweep.transports.registry is not None:
        await _each(sweep, attempts.undelivered(settings), _send_again)
        for waiting in attempts.WAITING_INTERNAL:
            await _each(sweep, waiting, _changing(attempts.dispatch_waiting))
    return ended


async def _send_again(
    session: AsyncSession, rows: Rows, settings: JobLibSettings, outbox: Outbox
) -> int:
    overdue = await attempts.dispatch_again(session, rows, settings)
    outbox.dispatch_again(overdue)
    return len(overdue)


async def _idle_jobs(sweep: _Sweep) -> int:
    async def end(session: AsyncSession, rows: Rows, _: JobLibSettings, outbox: Outbox) -> int:
        idle = await jobs.delete_idle(session, JOB.c.id.in_(rows))
        outbox.jobs_changed({name.room for name in idle})
        return len(idle)

    return await _each(sweep, jobs.IDLE, end)


async def _outlived_tasks(sweep: _Sweep) -> int:
    async def end(session: AsyncSession, rows: Rows, *_: Any) -> int:
        return len(await tasks.delete(session, TASK.c.id.in_(rows)))

    purged = 0
    for status, seconds in sweep.transports.settings.task_retention_seconds.items():
        rows = tasks.outlived(status, seconds)
        purged += await _each(sweep, rows, end)
    return purged


async def _deleted_jobs(sweep: _Sweep) -> int:
    """Delete for good the deleted jobs that have no tasks, of some in each pass."""
    async with sweep.session_maker() as session:
        rows, last = await jobs.taskless(session, sweep.purged_up_to, JOBS_A_PASS)
    # behind the last of them the next pass begins anew
    sweep.purged_up_to = last or FIRST
    return await _each(sweep, rows, lambda session, rows, *_: jobs.purge(session, rows))


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
    """Retire the workers without a heartbeat for ``worker_timeout_seconds``.

    A worker whose row can't be deleted, since a table of the host's refers to it, stays
    alone, and the log says why.
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
    """Retire one worker, stale or not; return whether it was there."""
    sweep = _sweep(session_maker, settings, tsio, None, on_providers_removed)
    chosen = sa.select(WORKER.c.id).where(WORKER.c.id == worker_id).with_for_update()
    settings = sweep.transports.settings
    return bool(await sweep.run(lambda session, outbox: retire(session, chosen, settings, outbox)))


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
    """
    sweep = _sweep(session_maker, settings, tsio, None, on_providers_removed)

    async def withdraw(session: AsyncSession, outbox: Outbox) -> int:
        removed = await workers.expel(session, user_id, room_id)
        await jobs.delete_idle(session, JOB.c.id.in_(removed.job_ids))
        outbox.jobs_changed(removed.job_rooms)
        outbox.providers_gone(removed.providers)
        return len(removed.unlinked) + len(removed.providers)

    return await sweep.run(withdraw)


async def cleanup_overdue_attempts(
    session_maker: SessionMaker, settings: JobLibSettings | None = None, tsio: Emitter | None = None
) -> int:
    """End attempts past their deadline, and those whose worker is gone."""
    return await _overdue_attempts(_sweep(session_maker, settings, tsio))


async def cleanup_stuck_internal_tasks(
    session_maker: SessionMaker,
    settings: JobLibSettings | None = None,
    tsio: Emitter | None = None,
    registry: Dispatcher | None = None,
) -> int:
    """Send ``@internal`` tasks whose message was lost, or that have attempts left.

    Those that outlived their time are ended first: it returns how many these were. Without
    ``registry`` nothing is sent.
    """
    return await _stuck_internal_tasks(_sweep(session_maker, settings, tsio, registry))


async def cleanup_idle_jobs(
    session_maker: SessionMaker, settings: JobLibSettings | None = None, tsio: Emitter | None = None
) -> int:
    """Soft-delete jobs that lost their last waiting task after their last worker."""
    return await _idle_jobs(_sweep(session_maker, settings, tsio))


async def purge_tasks(session_maker: SessionMaker, settings: JobLibSettings | None = None) -> int:
    """Delete ended tasks that ``task_retention_seconds`` no longer keeps."""
    return await _outlived_tasks(_sweep(session_maker, settings))


async def purge_jobs(session_maker: SessionMaker, settings: JobLibSettings | None = None) -> int:
    """Delete for good the jobs that are deleted and have no tasks any more."""
    sweep = _sweep(session_maker, settings)
    purged = await _deleted_jobs(sweep)
    while sweep.purged_up_to != FIRST:
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


@deprecated.old_sweeper_arguments
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
        Without it, those of the app, or of the environment.
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
        if app is not None:
            runtime_of(app).sweeper = asyncio.current_task()
            settings = settings or settings_of(app)
        sweep = _sweep(session_maker, settings, tsio, registry, on_providers_removed, app)
        interval = sweep.transports.settings.sweeper_interval_seconds
        log.info("sweeper began, every %g s", interval, extra={"event": "sweeper began"})
        await _forever(sweep)
    except BaseException as exc:
        cancelled = isinstance(exc, anyio.get_cancelled_exc_class())
        level = logging.INFO if cancelled else logging.ERROR
        fields = {"event": "sweeper ended", "cause": repr(exc)}
        log.log(level, "sweeper ended: %r", exc, extra=fields)
        raise


async def _forever(sweep: _Sweep) -> None:
    settings = sweep.transports.settings
    interval, timeout = settings.sweeper_interval_seconds, settings.worker_timeout_seconds
    # a worker that slept along for so long beats in time all the same
    tolerated = max(1.0, timeout / 4)
    pause = interval
    latest: datetime | None = None
    while True:
        # first of all a pause: after a restart workers need one for their heartbeats
        began = await _clock(sweep)
        await anyio.sleep(pause)
        ended = await _clock(sweep)
        if began is None or ended is None:
            continue
        if latest is None or ended < max(began, latest) - timedelta(seconds=1):
            # set back; at first nobody knows what it showed before
            await _logged("correct_moments", partial(sweep.run, _correct_moments))
        latest = ended
        overslept = (ended - began).total_seconds() - pause
        if overslept > tolerated:
            # workers may have slept along, and their heartbeats be on their way
            log.warning("the sweeper slept %.0f s longer than it meant to", overslept)
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
            moment: datetime = await scalar(session, sa.select(now()))
            return moment
    except Exception:
        log.exception("the database's clock can't be read")
        return None


async def _correct_moments(session: AsyncSession, _: Outbox) -> int:
    return await workers.correct_moments(session) + await attempts.correct_moments(session)

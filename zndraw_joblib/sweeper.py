"""What the host runs now and then: ends what dead workers and lost messages left."""

import logging
from collections.abc import Awaitable, Callable
from functools import partial
from uuid import UUID

import anyio
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from zndraw_joblib import attempts, deprecated, jobs, tasks, workers
from zndraw_joblib.delivery import (
    Dispatcher,
    Exits,
    ProvidersRemoved,
    SessionMaker,
    deliver,
)
from zndraw_joblib.events import Emitter, Outbox, worker_key
from zndraw_joblib.lifecycle import TaskStatus
from zndraw_joblib.models import JOB, WORKER, number, silent_for
from zndraw_joblib.schemas import TaskResponse
from zndraw_joblib.settings import JobLibSettings, get_settings

log = logging.getLogger(__name__)

# A batch is one transaction; under a lock-wrapped maker everybody else waits for it.
WORKERS_A_BATCH = 10
TASKS_A_BATCH = 125

Batch = Callable[[AsyncSession, Outbox], Awaitable[int]]


async def retire(
    session: AsyncSession, gone: workers.Gone, settings: JobLibSettings, outbox: Outbox
) -> None:
    """End what retired workers held, and the jobs that only they served."""
    outbox.workers_gone += gone.worker_ids
    for task in await attempts.lose(session, gone.worker_ids, settings):
        outbox.task_changed(task)
    outbox.ended += map(worker_key, gone.worker_ids)
    outbox.jobs_changed(gone.job_rooms)
    outbox.providers_gone(gone.providers)
    await jobs.delete_idle(session, JOB.c.id.in_(gone.job_ids))


async def _in_batches(batch: Batch, size: int, exits: Exits) -> int:
    total = 0
    while True:
        outbox = Outbox()
        async with exits.session_maker() as session:
            handled = await batch(session, outbox)
            await session.commit()
        await deliver(outbox, exits)
        total += handled
        if handled < size:
            return total


async def cleanup_stale_workers(
    session_maker: SessionMaker,
    settings: JobLibSettings | None = None,
    tsio: Emitter | None = None,
    on_providers_removed: ProvidersRemoved | None = None,
) -> int:
    """Retire the workers that have been silent for ``worker_timeout_seconds``.

    Parameters
    ----------
    session_maker : callable
        Opens one session a batch.
    settings : JobLibSettings, optional
        Without it, those of the environment.
    tsio : socketio.AsyncServer or a wrapper of one, optional
        Where events go.
    on_providers_removed : coroutine function, optional
        Hears of the providers that went along, after the commit.

    Returns
    -------
    int
        How many workers were retired by this call.
    """
    settings = settings or get_settings()
    exits = Exits(
        session_maker, settings, tsio, on_providers_removed=on_providers_removed
    )

    retired = 0

    async def silent(session: AsyncSession, outbox: Outbox) -> int:
        nonlocal retired
        chosen = (
            select(WORKER.c.id)
            .where(silent_for(settings.worker_timeout_seconds))
            .limit(number(WORKERS_A_BATCH))
            .with_for_update(skip_locked=True)
        )
        ids = await workers.lock(session, chosen)
        lost = await attempts.lose(session, ids, settings, TASKS_A_BATCH)
        for task in lost:
            outbox.task_changed(task)
        if len(lost) == TASKS_A_BATCH:
            # a later batch ends the rest, and then the workers
            return WORKERS_A_BATCH
        gone = await workers.retire_where(
            session, select(WORKER.c.id).where(WORKER.c.id.in_(ids)).with_for_update()
        )
        if gone.worker_ids:
            await retire(session, gone, settings, outbox)
            retired += len(gone.worker_ids)
        return len(gone.worker_ids)

    await _in_batches(silent, WORKERS_A_BATCH, exits)
    return retired


async def cleanup_worker(
    session_maker: SessionMaker,
    worker_id: UUID,
    settings: JobLibSettings | None = None,
    tsio: Emitter | None = None,
    on_providers_removed: ProvidersRemoved | None = None,
) -> bool:
    """Retire one worker, silent or not; tell whether it was there.

    Parameters
    ----------
    session_maker : callable
        Opens the session.
    worker_id : UUID
        The worker.
    settings : JobLibSettings, optional
        Without it, those of the environment.
    tsio : socketio.AsyncServer or a wrapper of one, optional
        Where events go.
    on_providers_removed : coroutine function, optional
        Hears of the providers that went along, after the commit.
    """
    settings = settings or get_settings()
    exits = Exits(
        session_maker, settings, tsio, on_providers_removed=on_providers_removed
    )
    outbox = Outbox()
    async with session_maker() as session:
        chosen = select(WORKER.c.id).where(WORKER.c.id == worker_id).with_for_update()
        gone = await workers.retire_where(session, chosen)
        if gone.worker_ids:
            await retire(session, gone, settings, outbox)
        await session.commit()
    await deliver(outbox, exits)
    return bool(gone.worker_ids)


async def cleanup_overdue_attempts(
    session_maker: SessionMaker,
    settings: JobLibSettings | None = None,
    tsio: Emitter | None = None,
) -> int:
    """End attempts past their deadline, and those whose worker is gone.

    Parameters
    ----------
    session_maker : callable
        Opens one session a batch.
    settings : JobLibSettings, optional
        Without it, those of the environment.
    tsio : socketio.AsyncServer or a wrapper of one, optional
        Where events go.

    Returns
    -------
    int
        How many attempts this call ended.
    """
    settings = settings or get_settings()
    exits = Exits(session_maker, settings, tsio)
    total = 0
    for step in (attempts.time_out, attempts.release_unstarted, attempts.lose_orphans):
        batch = partial(_change, step, settings)
        total += await _in_batches(batch, TASKS_A_BATCH, exits)
    return total


Step = Callable[[AsyncSession, JobLibSettings, int], Awaitable[list[TaskResponse]]]


async def _change(
    step: Step, settings: JobLibSettings, session: AsyncSession, outbox: Outbox
) -> int:
    changed = await step(session, settings, TASKS_A_BATCH)
    for task in changed:
        outbox.task_changed(task)
    return len(changed)


async def cleanup_stuck_internal_tasks(
    session_maker: SessionMaker,
    settings: JobLibSettings | None = None,
    tsio: Emitter | None = None,
    registry: Dispatcher | None = None,
) -> int:
    """Send ``@internal`` tasks whose message was lost, or that have attempts left.

    Those that outlived their time are ended first.

    Parameters
    ----------
    session_maker : callable
        Opens one session a batch.
    settings : JobLibSettings, optional
        Without it, those of the environment.
    tsio : socketio.AsyncServer or a wrapper of one, optional
        Where events go.
    registry : InternalRegistry, optional
        Where tasks are sent again; without it none is.

    Returns
    -------
    int
        How many attempts this call ended.
    """
    settings = settings or get_settings()
    exits = Exits(session_maker, settings, tsio, registry)

    async def resend(session: AsyncSession, outbox: Outbox) -> int:
        overdue = await attempts.dispatch_again(session, settings, TASKS_A_BATCH)
        again = await attempts.dispatch_waiting(session, settings, TASKS_A_BATCH)
        for task in again:
            outbox.task_changed(task)
        outbox.dispatch(again)
        outbox.dispatch(overdue, again=True)
        return len(overdue) + len(again)

    stuck = partial(_change, attempts.fail_stuck, settings)
    ended = await _in_batches(stuck, TASKS_A_BATCH, exits)
    if registry is not None:
        await _in_batches(resend, TASKS_A_BATCH, exits)
    return ended


async def cleanup_idle_jobs(
    session_maker: SessionMaker,
    settings: JobLibSettings | None = None,
    tsio: Emitter | None = None,
) -> int:
    """Soft-delete jobs that lost their last waiting task after their last worker.

    Parameters
    ----------
    session_maker : callable
        Opens the session.
    settings : JobLibSettings, optional
        Without it, those of the environment.
    tsio : socketio.AsyncServer or a wrapper of one, optional
        Where events go.

    Returns
    -------
    int
        How many jobs this call deleted.
    """
    outbox = Outbox()
    async with session_maker() as session:
        # of all jobs only these are locked: submissions to others go on
        idle = await jobs.delete_idle(session, ~jobs.wanted())
        await session.commit()
    outbox.jobs_changed({name.room for name in idle})
    await deliver(outbox, Exits(session_maker, settings or get_settings(), tsio))
    return len(idle)


async def purge_tasks(
    session_maker: SessionMaker, settings: JobLibSettings | None = None
) -> int:
    """Delete ended tasks that ``task_retention_seconds`` no longer keeps.

    Parameters
    ----------
    session_maker : callable
        Opens one session a batch.
    settings : JobLibSettings, optional
        Without it, those of the environment.

    Returns
    -------
    int
        How many tasks this call deleted.
    """
    settings = settings or get_settings()
    exits = Exits(session_maker, settings)
    total = 0
    for status, kept in settings.task_retention_seconds.items():

        async def outlived(
            session: AsyncSession,
            outbox: Outbox,
            status: TaskStatus = status,
            kept: float = kept,
        ) -> int:
            return await tasks.purge(session, status, kept, TASKS_A_BATCH)

        total += await _in_batches(outlived, TASKS_A_BATCH, exits)
    return total


@deprecated.for_sweeper
async def run_sweeper(
    session_maker: SessionMaker,
    settings: JobLibSettings | None = None,
    tsio: Emitter | None = None,
    registry: Dispatcher | None = None,
    on_providers_removed: ProvidersRemoved | None = None,
) -> None:
    """Sweep every ``sweeper_interval_seconds`` until cancelled; on every replica.

    While the host was down nobody could hear its workers: choose
    ``worker_timeout_seconds`` longer than a restart takes.

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
    """
    settings = settings or get_settings()
    passes = (
        partial(
            cleanup_stale_workers, session_maker, settings, tsio, on_providers_removed
        ),
        partial(cleanup_overdue_attempts, session_maker, settings, tsio),
        partial(cleanup_stuck_internal_tasks, session_maker, settings, tsio, registry),
        partial(cleanup_idle_jobs, session_maker, settings, tsio),
        partial(purge_tasks, session_maker, settings),
    )
    while True:
        # first of all a pause: after a restart the workers need one to be heard again
        await anyio.sleep(settings.sweeper_interval_seconds)
        for sweep in passes:
            try:
                if ended := await sweep():
                    name = sweep.func.__name__
                    told = {"event": "swept", "sweep": name, "count": ended}
                    log.info("%s: %d", name, ended, extra=told)
            except Exception:
                # the next pass finds what this one left
                log.exception("%s failed", sweep.func.__name__)

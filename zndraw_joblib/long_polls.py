"""Holds requests until what they wait for is there, and polls for all of them at once.

A request is woken by what happens in this process, over :mod:`zndraw_joblib.waiting` by
what happens in others, and by one task of the app that asks the database about all that
is waited for, every ``recheck_seconds``. That task lives while somebody waits.
"""

import asyncio
import logging
import math
from collections.abc import Awaitable, Callable, Collection, Iterator
from itertools import zip_longest
from typing import Any, TypeVar
from uuid import UUID

import anyio
from sqlalchemy import ColumnElement, bindparam, case, func, literal_column, select, union_all

from zndraw_joblib import claims, workers
from zndraw_joblib.claims import Claim
from zndraw_joblib.database import execute, now, number
from zndraw_joblib.delivery import Runtime, SessionMaker, Transports
from zndraw_joblib.dependencies import Context
from zndraw_joblib.events import job_key, provider_key, task_key, worker_key
from zndraw_joblib.exceptions import QuotaExceeded, ServerBusy
from zndraw_joblib.heartbeats import of_last_row
from zndraw_joblib.lifecycle import TERMINAL, WorkerState
from zndraw_joblib.models import JOB, LINK, LOG, PAUSED, TASK, WORKER, ahead, in_states, queued
from zndraw_joblib.waiting import (
    ADMISSION,
    Admission,
    Subscription,
    Subscriptions,
    Waiter,
    Waiters,
    Wakeups,
)

T = TypeVar("T")

log = logging.getLogger(__name__)

# Ids of one kind that one statement asks about.
CHUNK = 1000
# Tasks of one job that one poll counts, and hence requests that it wakes for the job.
COUNTED = 1000
_AGAIN = {"Retry-After": "5"}


async def _wait(
    context: Context,
    session_maker: SessionMaker,
    waiter: Waiter,
    subscription: Subscription,
    seconds: float,
) -> bool:
    """Wait to be woken, counted among the requests that wait, and polled for with them.

    Returns
    -------
    bool
        False when there is nobody to wait for any more.

    Raises
    ------
    ProblemException
        ``quota-exceeded`` when its user, ``server-busy`` when the process has too many.
    """
    subscriptions, settings = context.runtime.subscriptions, context.settings
    user_id = context.caller.id
    if subscriptions.by_user[user_id] >= settings.max_waiting_per_user:
        limit = f"limited to {settings.max_waiting_per_user} for each user"
        raise QuotaExceeded.exception(f"waiting requests are {limit}", headers=_AGAIN)
    if len(subscriptions.by_request) >= settings.max_waiting:
        raise ServerBusy.exception(headers=_AGAIN)
    subscriptions.by_request[waiter] = subscription
    subscriptions.by_user[user_id] += 1
    if subscriptions.poller is None or subscriptions.poller.done():
        subscriptions.changed = asyncio.Event()
        poll = _poll_while_some_wait(context.runtime, context.transports, session_maker)
        subscriptions.poller = asyncio.create_task(poll)
    admission: Admission | None = context.request.scope.get(ADMISSION)
    if admission is not None:
        admission.leave()
    try:
        goes_on = await waiter.wait(seconds, context.request.receive)
        return goes_on and (admission is None or await admission.enter())
    finally:
        del subscriptions.by_request[waiter]
        subscriptions.by_user[user_id] -= 1
        if not subscriptions.by_user[user_id]:
            del subscriptions.by_user[user_id]
        if not subscriptions.by_request:
            subscriptions.changed.set()


async def for_ends(
    context: Context,
    session_maker: SessionMaker,
    seconds: float,
    read: Callable[[], Awaitable[tuple[T, UUID | None]]],
    first: UUID | None = None,
    log_after: int | None = None,
) -> T:
    """Return what ``read`` returns once it names no unfinished task, or when time is up.

    With ``log_after``, it is also woken for lines of the task's log beyond that one. Not the
    end of each of many tasks is waited for but that of the one that is named, and then that
    of the next: however many there are, the request is woken a few times.
    """
    deadline = anyio.current_time() + seconds
    last = first
    with context.runtime.waiters.waiting_for([task_key(first)] if first else []) as waiter:
        while True:
            found, unfinished = await read()
            left = deadline - anyio.current_time()
            if unfinished is None or left <= 0:
                return found
            if unfinished != last:
                # it may have ended before it was listened for
                waiter.listen([task_key(unfinished)])
                last = unfinished
                continue
            subscription = Subscription(unfinished, log_after=log_after)
            if not await _wait(context, session_maker, waiter, subscription, left):
                return found


async def for_work(
    context: Context,
    session_maker: SessionMaker,
    seconds: float,
    worker_id: UUID,
    jobs: Collection[str] | None,
    claim: Callable[[], Awaitable[Claim]],
) -> Claim:
    """Return what ``claim`` returns once there is something, or when time is up.

    It is woken for ``jobs`` of the worker's, or for all of them.
    Who hung up claims nothing: nobody would learn what.
    """
    deadline = anyio.current_time() + seconds
    # where there is work, nothing is to be listened for
    claimed = await claim()
    if claimed.tasks or claimed.done or not seconds:
        return claimed
    with context.runtime.waiters.waiting_for([worker_key(worker_id)]) as waiter:
        served: dict[UUID, str] | None = None
        while True:
            if served is None:
                async with session_maker() as session:
                    served = await claims.served(session, worker_id)
                wanted = {
                    job_id: name for job_id, name in served.items() if jobs is None or name in jobs
                }
                waiter.listen(map(job_key, wanted.values()))
            turns = waiter.turns
            claimed = await claim()
            if claimed.done:
                # it drains: its turns are for others
                return claimed
            waiter.used(turns, {job_key(task.job_name) for task in claimed.tasks})
            left = deadline - anyio.current_time()
            if claimed.tasks or left <= 0:
                return claimed
            subscription = Subscription(None, worker_id, wanted, len(served))
            if not await _wait(context, session_maker, waiter, subscription, left):
                return claimed
            if not waiter.turns:
                # woken as all of this worker's are: its jobs may have changed
                served = None


async def for_answer(
    context: Context,
    session_maker: SessionMaker,
    full_name: str,
    answer: Callable[[], Awaitable[bytes]],
) -> bytes | None:
    """Return what ``answer`` returns.

    Returns
    -------
    bytes or None
        None when there is nobody to wait for any more, reader or provider.
    """
    with context.runtime.waiters.waiting_for([provider_key(full_name)]) as waiter:
        answering = asyncio.ensure_future(answer())
        answering.add_done_callback(lambda _: waiter.wake())
        try:
            await _wait(context, session_maker, waiter, Subscription(), math.inf)
            return await answering if answering.done() else None
        finally:
            answering.cancel()


async def _poll_while_some_wait(
    runtime: Runtime, transports: Transports, session_maker: SessionMaker
) -> None:
    """Wake who waits for what the database says has happened; end when nobody does."""
    settings, wakeups = transports.settings, transports.wakeups
    subscriptions = runtime.subscriptions
    # a claim that waits is a heartbeat, well before its worker would count as lost
    period = settings.worker_timeout_seconds / 3
    next_beat = anyio.current_time() + period
    listener: asyncio.Task[None] | None = None
    try:
        while True:
            if wakeups is not None and (listener is None or listener.done()):
                listener = asyncio.create_task(_listen(wakeups, runtime.waiters, subscriptions))
            if not await _pause(subscriptions, settings.recheck_seconds, wakeups is not None):
                return
            beating = anyio.current_time() >= next_beat
            try:
                await _poll(runtime.waiters, subscriptions, session_maker, beating)
            except Exception as exc:
                log.warning("can't poll for those who wait: %r", exc)
            else:
                next_beat += period if beating else 0
    finally:
        if listener is not None:
            listener.cancel()


async def _pause(subscriptions: Subscriptions, seconds: float, lingers: bool) -> bool:
    """Return when it is time to poll, and whether anybody waits."""
    with anyio.move_on_after(seconds):
        while not subscriptions.missed:
            if not subscriptions.by_request and not lingers:
                return False
            await subscriptions.changed.wait()
            subscriptions.changed.clear()
    subscriptions.missed = False
    return bool(subscriptions.by_request)


async def _listen(wakeups: Wakeups, waiters: Waiters, subscriptions: Subscriptions) -> None:
    try:
        await wakeups.listen(waiters, subscriptions.miss)
    except Exception as exc:
        # until the next poll, which begins to listen again
        log.warning("wake-ups are not received: %r", exc)


def _counted(waits: ColumnElement[bool], order: Any) -> ColumnElement[int]:
    some = (
        select(literal_column("1"))
        .where(ahead.c.job_id == JOB.c.id, waits)
        # as for a place in the queue: in the order of the index, and up to a number
        # that PostgreSQL can't know
        .order_by(order)
        .limit(select(number(COUNTED)).scalar_subquery())
        .correlate_except(ahead)
        .subquery()
    )
    return select(func.count()).select_from(some).scalar_subquery()


def _kind(name: str) -> ColumnElement[str]:
    return literal_column(f"'{name}'").label("kind")


def _among(column: Any, name: str) -> ColumnElement[bool]:
    among: ColumnElement[bool] = column.in_(bindparam(name, expanding=True))
    return among


_DRAINING = -1
# one statement for all that is waited for: which tasks have ended, how many tasks of
# each job can be claimed, how many jobs each worker serves, and how long logs are
_CHANGES = union_all(
    select(_kind("task"), TASK.c.id.label("id"), literal_column("0").label("number")).where(
        _among(TASK.c.id, "tasks"), in_states(TERMINAL)
    ),
    select(
        _kind("job"),
        JOB.c.id,
        _counted(queued(ahead.c), ahead.c.queue_order)
        + _counted(ahead.c.available_at <= now(), ahead.c.available_at),
    ).where(_among(JOB.c.id, "jobs"), ~PAUSED),
    select(
        _kind("worker"),
        WORKER.c.id,
        case(
            (WORKER.c.state == WorkerState.DRAINING.value, _DRAINING),
            else_=select(func.count())
            .where(LINK.c.worker_id == WORKER.c.id)
            .correlate(WORKER)
            .scalar_subquery(),
        ),
    ).where(_among(WORKER.c.id, "workers")),
    select(_kind("log"), TASK.c.id, func.coalesce(of_last_row(LOG.c.last_number), 0)).where(
        _among(TASK.c.id, "logs")
    ),
)


def _chunks(ids: Collection[UUID]) -> Iterator[list[UUID]]:
    all_ids = list(ids)
    for start in range(0, len(all_ids), CHUNK):
        chunk = all_ids[start : start + CHUNK]
        # few shapes of the statement for any number: the nil UUID is nobody's
        yield chunk + [UUID(int=0)] * ((1 << (len(chunk) - 1).bit_length()) - len(chunk))


async def _poll(
    waiters: Waiters, subscriptions: Subscriptions, session_maker: SessionMaker, beating: bool
) -> None:
    waited_for = list(subscriptions.by_request.values())
    followed = {s.task_id for s in waited_for if s.task_id and s.log_after is not None}
    tasks = {s.task_id for s in waited_for if s.task_id is not None}
    jobs = {job_id: name for s in waited_for for job_id, name in s.jobs.items()}
    served = {s.worker_id: s.serves for s in waited_for if s.worker_id is not None}
    found: list[Any] = []
    if not (tasks or jobs or served):
        return
    async with session_maker() as session:
        if beating and served:
            await workers.keep_alive(session, served)
            await session.commit()
        for chunk in zip_longest(*map(_chunks, (tasks, jobs, served, followed))):
            ids = (part or [UUID(int=0)] for part in chunk)
            asked = dict(zip(("tasks", "jobs", "workers", "logs"), ids, strict=True))
            found += (await execute(session, _CHANGES, asked)).all()
    for row in found:
        if row.kind == "task":
            waiters.wake_all(task_key(row.id))
        elif row.kind == "job":
            waiters.wake_some(job_key(jobs[row.id]), row.number)
    lines = {row.id: row.number for row in found if row.kind == "log"}
    for waiter, subscription in tuple(subscriptions.by_request.items()):
        after = subscription.log_after
        if after is not None and lines.get(subscription.task_id, 0) > after:
            waiter.wake()
    known = {row.id: row.number for row in found if row.kind == "worker"}
    for worker_id, jobs_served in served.items():
        # it drains, serves other jobs than before, or is gone
        if known.get(worker_id) != jobs_served:
            waiters.wake_all(worker_key(worker_id))

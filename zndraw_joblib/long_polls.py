"""Holds requests until what they wait for is there, and looks for all of them at once.

A request is woken by what happens in this process, over :mod:`zndraw_joblib.waiting` by
what happens in others, and by one task of the app that asks the database about all that
is waited for, every ``recheck_seconds``. That task lives while somebody waits.
"""

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, NamedTuple
from uuid import UUID

import anyio
from sqlalchemy import ColumnElement, bindparam, case, func, literal_column, select, union_all

from zndraw_joblib import claims, workers
from zndraw_joblib.claims import Claim
from zndraw_joblib.database import execute, now, number
from zndraw_joblib.delivery import SessionMaker
from zndraw_joblib.events import TaskView, job_key, provider_key, task_key, worker_key
from zndraw_joblib.exceptions import QuotaExceeded, ServerBusy
from zndraw_joblib.lifecycle import TERMINAL, WorkerState
from zndraw_joblib.models import JOB, LINK, TASK, WORKER, in_states, queued
from zndraw_joblib.settings import JobLibSettings
from zndraw_joblib.tasks import ahead
from zndraw_joblib.waiting import Receive, Waiters, Wakeups
from zndraw_joblib.workers import Caller

log = logging.getLogger(__name__)

# Ids of one kind that one statement asks about.
CHUNK = 1000
# Tasks of one job that one look counts, and hence requests that it wakes for the job.
COUNTED = 1000
_AGAIN = {"Retry-After": "5"}


class Subscription(NamedTuple):
    """What one request waits for.

    Attributes
    ----------
    task_id : UUID, optional
        A task that may end.
    worker_id : UUID, optional
        A worker that may get work.
    jobs : mapping of UUID to str
        The jobs that work is wanted of, and their full names.
    serves : int
        How many jobs this worker serves.
    """

    task_id: UUID | None = None
    worker_id: UUID | None = None
    jobs: Mapping[UUID, str] = {}
    serves: int = 0


@dataclass
class Subscriptions:
    """What the requests of one event loop wait for, and the task that polls for all."""

    by_request: dict[object, Subscription] = field(default_factory=dict)
    by_user: Counter[UUID] = field(default_factory=Counter)
    poller: asyncio.Task[None] | None = None
    # notifications may have been missed: it is time to poll
    missed: bool = False
    # set: something changed of what is here
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def miss(self) -> None:
        """Have the poller look at once."""
        self.missed = True
        self.changed.set()


@dataclass(frozen=True)
class LongPoll:
    """What it takes to hold a request.

    Attributes
    ----------
    waiters : Waiters
        Who waits in the app.
    subscriptions : Subscriptions
        What is waited for in this event loop.
    caller : Caller
        Whose request it is.
    session_maker : callable
        Opens a session for each look.
    settings : JobLibSettings
        The host's.
    wakeups : Wakeups, optional
        Where this process hears of the others.
    receive : callable
        Tells when the client hangs up.
    seconds : float
        How long the client is made to wait.
    """

    waiters: Waiters
    subscriptions: Subscriptions
    caller: Caller
    session_maker: SessionMaker
    settings: JobLibSettings
    wakeups: Wakeups | None
    receive: Receive
    seconds: float


@contextmanager
def subscribed(poll: LongPoll, subscription: Subscription) -> Iterator[None]:
    """Count a request among those that wait, and have it looked for.

    Raises
    ------
    ProblemException
        ``quota-exceeded`` when its user, ``server-busy`` when the process has too many.
    """
    subscriptions, user_id, settings = poll.subscriptions, poll.caller.id, poll.settings
    if subscriptions.by_user[user_id] >= settings.max_waiting_per_user:
        limit = f"limited to {settings.max_waiting_per_user} for each user"
        raise QuotaExceeded.exception(f"waiting requests are {limit}", headers=_AGAIN)
    if len(subscriptions.by_request) >= settings.max_waiting:
        raise ServerBusy.exception(headers=_AGAIN)
    me = object()
    subscriptions.by_request[me] = subscription
    subscriptions.by_user[user_id] += 1
    if subscriptions.poller is None or subscriptions.poller.done():
        subscriptions.changed = asyncio.Event()
        subscriptions.poller = asyncio.create_task(_poll_for_all(poll))
    try:
        yield
    finally:
        del subscriptions.by_request[me]
        subscriptions.by_user[user_id] -= 1
        if not subscriptions.by_user[user_id]:
            del subscriptions.by_user[user_id]
        if not subscriptions.by_request:
            subscriptions.changed.set()


async def for_end(
    poll: LongPoll, task_id: UUID, look: Callable[[], Awaitable[TaskView]]
) -> TaskView:
    """Return what ``look`` says of a task once it has ended, or when time is up."""
    deadline = anyio.current_time() + poll.seconds
    with poll.waiters.waiting_for([task_key(task_id)]) as waiter:
        while True:
            task = await look()
            left = deadline - anyio.current_time()
            if task.status in TERMINAL or left <= 0:
                return task
            with subscribed(poll, Subscription(task_id=task_id)):
                if not await waiter.wait(left, poll.receive):
                    return task


async def for_ends(poll: LongPoll, unfinished: Callable[[], Awaitable[UUID | None]]) -> None:
    """Return once ``unfinished`` names no task any more, or when time is up.

    Not the end of each of many tasks is waited for but that of the one that is named,
    and then that of the next: however many there are, the request is woken a few times.
    """
    deadline = anyio.current_time() + poll.seconds
    last: UUID | None = None
    with poll.waiters.waiting_for([]) as waiter:
        while (left := deadline - anyio.current_time()) > 0:
            task_id = await unfinished()
            if task_id is None:
                return
            if task_id != last:
                # it may have ended before it was listened for
                waiter.listen([task_key(task_id)])
                last = task_id
                continue
            with subscribed(poll, Subscription(task_id)):
                if not await waiter.wait(left, poll.receive):
                    return


async def for_work(
    poll: LongPoll,
    worker_id: UUID,
    jobs: Collection[str] | None,
    look: Callable[[], Awaitable[Claim]],
) -> Claim:
    """Return what ``look`` claims once there is something, or when time is up.

    It is woken for ``jobs`` of the worker's, or for all of them.
    Who hung up claims nothing: nobody would be told what.
    """
    deadline = anyio.current_time() + poll.seconds
    # where there is work, nothing is to be listened for
    claim = await look()
    if claim.tasks or claim.done or not poll.seconds:
        return claim
    with poll.waiters.waiting_for([worker_key(worker_id)]) as waiter:
        served: dict[UUID, str] | None = None
        while True:
            if served is None:
                async with poll.session_maker() as session:
                    served = await claims.served(session, worker_id)
                wanted = {
                    job_id: name for job_id, name in served.items() if jobs is None or name in jobs
                }
                waiter.listen(map(job_key, wanted.values()))
            turns = waiter.turns
            claim = await look()
            if claim.done:
                # it drains: its turns are for others
                return claim
            waiter.looked(turns, {job_key(task.job_name) for task in claim.tasks})
            left = deadline - anyio.current_time()
            if claim.tasks or left <= 0:
                return claim
            waits_for = Subscription(None, worker_id, wanted, len(served))
            with subscribed(poll, waits_for):
                if not await waiter.wait(left, poll.receive):
                    return claim
            if not waiter.turns:
                # woken as all of this worker's are: its jobs may have changed
                served = None


async def for_answer(
    poll: LongPoll, full_name: str, answer: Callable[[], Awaitable[bytes]]
) -> bytes | None:
    """Return what ``answer`` returns.

    Returns
    -------
    bytes or None
        None when there is nobody to wait for any more, reader or provider.
    """
    with (
        subscribed(poll, Subscription()),
        poll.waiters.waiting_for([provider_key(full_name)]) as waiter,
    ):
        answering = asyncio.ensure_future(answer())
        answering.add_done_callback(lambda _: waiter.wake())
        try:
            await waiter.wait(math.inf, poll.receive)
            return await answering if answering.done() else None
        finally:
            answering.cancel()


async def _poll_for_all(poll: LongPoll) -> None:
    """Wake who waits for what the database says has happened; end when nobody does."""
    # a claim that waits is a heartbeat, well before its worker would count as lost
    period = poll.settings.worker_timeout_seconds / 3
    next_beat = anyio.current_time() + period
    listener: asyncio.Task[None] | None = None
    try:
        while True:
            if poll.wakeups is not None and (listener is None or listener.done()):
                listener = asyncio.create_task(_listen(poll, poll.wakeups))
            if not await _pause(poll):
                return
            beating = anyio.current_time() >= next_beat
            try:
                await _look(poll, beating)
            except Exception as exc:
                log.warning("can't look for those who wait: %r", exc)
            else:
                next_beat += period if beating else 0
    finally:
        if listener is not None:
            listener.cancel()


async def _pause(poll: LongPoll) -> bool:
    """Return when it is time to look; tell whether anybody waits."""
    subscriptions = poll.subscriptions
    with anyio.move_on_after(poll.settings.recheck_seconds):
        while not subscriptions.missed:
            if not subscriptions.by_request and poll.wakeups is None:
                return False
            await subscriptions.changed.wait()
            subscriptions.changed.clear()
    subscriptions.missed = False
    return bool(subscriptions.by_request)


async def _listen(poll: LongPoll, wakeups: Wakeups) -> None:
    try:
        await wakeups.listen(poll.waiters, poll.subscriptions.miss)
    except Exception as exc:
        # until the next look, which begins to listen again
        log.warning("wake-ups are not heard: %r", exc)


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
# each job can be claimed, and how many jobs each worker serves
_CHANGES = union_all(
    select(_kind("task"), TASK.c.id.label("id"), literal_column("0").label("number")).where(
        _among(TASK.c.id, "tasks"), in_states(TERMINAL)
    ),
    select(
        _kind("job"),
        JOB.c.id,
        _counted(queued(ahead.c), ahead.c.queue_order)
        + _counted(ahead.c.available_at <= now(), ahead.c.available_at),
    ).where(_among(JOB.c.id, "jobs")),
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
)


def _chunks(ids: Collection[UUID]) -> Iterator[list[UUID]]:
    all_ids = list(ids)
    for start in range(0, len(all_ids), CHUNK):
        chunk = all_ids[start : start + CHUNK]
        # few shapes of the statement for any number: the nil UUID is nobody's
        yield chunk + [UUID(int=0)] * ((1 << (len(chunk) - 1).bit_length()) - len(chunk))


async def _look(poll: LongPoll, beating: bool) -> None:
    waiters, waited_for = poll.waiters, list(poll.subscriptions.by_request.values())
    tasks = {s.task_id for s in waited_for if s.task_id is not None}
    jobs = {job_id: name for s in waited_for for job_id, name in s.jobs.items()}
    served = {s.worker_id: s.serves for s in waited_for if s.worker_id is not None}
    found: list[Any] = []
    if not (tasks or jobs or served):
        return
    async with poll.session_maker() as session:
        if beating and served:
            await workers.keep_alive(session, served)
            await session.commit()
        for chunk in zip_longest(_chunks(tasks), _chunks(jobs), _chunks(served)):
            ids = (part or [UUID(int=0)] for part in chunk)
            asked = dict(zip(("tasks", "jobs", "workers"), ids, strict=True))
            found += (await execute(session, _CHANGES, asked)).all()
    for row in found:
        if row.kind == "task":
            waiters.wake_all(task_key(row.id))
        elif row.kind == "job":
            waiters.wake_some(job_key(jobs[row.id]), row.number)
    known = {row.id: row.number for row in found if row.kind == "worker"}
    for worker_id, jobs_served in served.items():
        # it drains, serves other jobs than before, or is gone
        if known.get(worker_id) != jobs_served:
            waiters.wake_all(worker_key(worker_id))

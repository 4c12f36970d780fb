"""Holds requests until what they wait for is there, and looks for all of them at once.

A request is woken by what happens in this process, over :mod:`zndraw_joblib.wakeups` by
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
from sqlalchemy import (
    ColumnElement,
    bindparam,
    case,
    func,
    literal_column,
    select,
    union_all,
)

from zndraw_joblib import claims, workers
from zndraw_joblib.claims import Claim
from zndraw_joblib.delivery import SessionMaker
from zndraw_joblib.events import job_key, provider_key, task_key, worker_key
from zndraw_joblib.exceptions import QuotaExceeded, ServerBusy
from zndraw_joblib.lifecycle import TERMINAL, WorkerState
from zndraw_joblib.models import (
    JOB,
    LINK,
    TASK,
    WORKER,
    in_states,
    now,
    number,
    queued,
)
from zndraw_joblib.schemas import TaskResponse
from zndraw_joblib.settings import JobLibSettings
from zndraw_joblib.tasks import ahead
from zndraw_joblib.waiting import Receive, waiting_for, wake_all, wake_some
from zndraw_joblib.wakeups import Wakeups
from zndraw_joblib.workers import Caller

log = logging.getLogger(__name__)

# Ids of one kind that one statement asks about.
CHUNK = 1000
# Tasks of one job that one look counts, and hence requests that it wakes for the job.
COUNTED = 1000
_AGAIN = {"Retry-After": "5"}


class Sought(NamedTuple):
    """What one request waits for.

    Attributes
    ----------
    task_id : UUID, optional
        A task that may end.
    worker_id : UUID, optional
        A worker that may get work.
    jobs : mapping of UUID to str
        The jobs that this worker serves, and their full names.
    """

    task_id: UUID | None = None
    worker_id: UUID | None = None
    jobs: Mapping[UUID, str] = {}


@dataclass
class Watch:
    """Who waits in one app, and the task that looks for all of them."""

    sought: dict[object, Sought] = field(default_factory=dict)
    by_user: Counter[UUID] = field(default_factory=Counter)
    looker: asyncio.Task[None] | None = None
    # wake-ups may have been missed: it is time to look
    missed: bool = False
    # set: something changed of what is here
    changed: anyio.Event = field(default_factory=anyio.Event)

    def miss(self) -> None:
        """Have the looker look at once."""
        self.missed = True
        self.changed.set()


@dataclass(frozen=True)
class Desk:
    """What it takes to hold a request.

    Attributes
    ----------
    watch : Watch
        Of the app.
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
    wait : float or None
        How long the client prefers to wait, in seconds; None if it did not say.
    """

    watch: Watch
    caller: Caller
    session_maker: SessionMaker
    settings: JobLibSettings
    wakeups: Wakeups | None
    receive: Receive
    wait: float | None = None


def watch_of(app: Any) -> Watch:
    """Return the watch of a host, kept in its ``state``."""
    watch: Watch | None = getattr(app.state, "joblib_watch", None)
    if watch is None:
        watch = app.state.joblib_watch = Watch()
    return watch


@contextmanager
def admitted(desk: Desk, sought: Sought) -> Iterator[None]:
    """Count a request among those that wait, and have it looked for.

    Raises
    ------
    ProblemException
        ``quota-exceeded`` when its user, ``server-busy`` when the process has too many.
    """
    watch, caller, settings = desk.watch, desk.caller, desk.settings
    if watch.by_user[caller.id] >= settings.max_waiting_per_user:
        limit = f"limited to {settings.max_waiting_per_user} for each user"
        raise QuotaExceeded.exception(f"waiting requests are {limit}", headers=_AGAIN)
    if len(watch.sought) >= settings.max_waiting:
        raise ServerBusy.exception(headers=_AGAIN)
    me = object()
    watch.sought[me] = sought
    watch.by_user[caller.id] += 1
    if watch.looker is None or watch.looker.done():
        watch.changed = anyio.Event()
        watch.looker = asyncio.create_task(_look_for_all(desk))
    try:
        yield
    finally:
        del watch.sought[me]
        watch.by_user[caller.id] -= 1
        if not watch.by_user[caller.id]:
            del watch.by_user[caller.id]
        if not watch.sought:
            watch.changed.set()


async def for_end(
    desk: Desk,
    task_id: UUID,
    seconds: float,
    look: Callable[[], Awaitable[TaskResponse]],
) -> TaskResponse:
    """Return what ``look`` says of a task once it has ended, or after ``seconds``."""
    deadline = anyio.current_time() + seconds
    with waiting_for([task_key(task_id)]) as waiter:
        while True:
            task = await look()
            left = deadline - anyio.current_time()
            if task.status in TERMINAL or left <= 0:
                return task
            with admitted(desk, Sought(task_id=task_id)):
                if not await waiter.wait(left, desk.receive):
                    return task


async def for_ends(
    desk: Desk,
    seconds: float,
    unfinished: Callable[[], Awaitable[UUID | None]],
) -> None:
    """Return once ``unfinished`` names no task any more, or after ``seconds``.

    Not the end of each of many tasks is waited for but that of the one that is named,
    and then that of the next: however many there are, the request is woken a few times.
    """
    deadline = anyio.current_time() + seconds
    last: UUID | None = None
    with waiting_for([]) as waiter:
        while (left := deadline - anyio.current_time()) > 0:
            task_id = await unfinished()
            if task_id is None:
                return
            if task_id != last:
                # it may have ended before it was listened for
                waiter.listen([task_key(task_id)])
                last = task_id
                continue
            with admitted(desk, Sought(task_id)):
                if not await waiter.wait(left, desk.receive):
                    return


async def for_work(
    desk: Desk,
    worker_id: UUID,
    seconds: float,
    look: Callable[[], Awaitable[Claim]],
) -> Claim:
    """Return what ``look`` claims once there is something, or after ``seconds``.

    Who hung up claims nothing: nobody would be told what.
    """
    deadline = anyio.current_time() + seconds
    # where there is work, nothing is to be listened for
    claim = await look()
    if claim.tasks or claim.done:
        return claim
    served: dict[UUID, str] | None = None
    with waiting_for([worker_key(worker_id)]) as waiter:
        while True:
            if served is None:
                async with desk.session_maker() as session:
                    served = await claims.served(session, worker_id)
                waiter.listen(map(job_key, served.values()))
            turns = waiter.turns
            claim = await look()
            waiter.looked(turns, {job_key(task.job_name) for task in claim.tasks})
            left = deadline - anyio.current_time()
            if claim.tasks or claim.done or left <= 0:
                return claim
            with admitted(desk, Sought(None, worker_id, served)):
                if not await waiter.wait(left, desk.receive):
                    return claim
            if not waiter.turns:
                # the worker itself changed
                served = None


async def for_answer(
    desk: Desk, full_name: str, answer: Callable[[], Awaitable[bytes]]
) -> bytes | None:
    """Return what ``answer`` returns.

    Returns
    -------
    bytes or None
        None when there is nobody to wait for any more, reader or provider.
    """
    with (
        admitted(desk, Sought()),
        waiting_for([provider_key(full_name)]) as waiter,
    ):
        answering = asyncio.ensure_future(answer())
        answering.add_done_callback(lambda _: waiter.wake())
        try:
            await waiter.wait(math.inf, desk.receive)
            return await answering if answering.done() else None
        finally:
            answering.cancel()


async def _look_for_all(desk: Desk) -> None:
    """Wake who waits for what the database says has happened; end when nobody does."""
    # a claim that waits is a sign of life, well before its worker would count as lost
    lively = desk.settings.worker_timeout_seconds / 3
    next_touch = anyio.current_time() + lively
    listener: asyncio.Task[None] | None = None
    try:
        while True:
            if desk.wakeups is not None and (listener is None or listener.done()):
                listener = asyncio.create_task(_listen(desk.wakeups, desk.watch))
            if not await _pause(desk):
                return
            touching = anyio.current_time() >= next_touch
            try:
                await _look(desk, touching)
            except Exception as exc:
                log.warning("can't look for those who wait: %r", exc)
            else:
                next_touch += lively if touching else 0
    finally:
        if listener is not None:
            listener.cancel()


async def _pause(desk: Desk) -> bool:
    """Return when it is time to look; tell whether anybody waits."""
    watch = desk.watch
    with anyio.move_on_after(desk.settings.recheck_seconds):
        while not watch.missed:
            if not watch.sought and desk.wakeups is None:
                return False
            await watch.changed.wait()
            watch.changed = anyio.Event()
    watch.missed = False
    return bool(watch.sought)


async def _listen(wakeups: Wakeups, watch: Watch) -> None:
    try:
        await wakeups.listen(watch.miss)
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
_NEWS = union_all(
    select(
        _kind("task"), TASK.c.id.label("id"), literal_column("0").label("number")
    ).where(_among(TASK.c.id, "tasks"), in_states(TERMINAL)),
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
        yield chunk + [UUID(int=0)] * (
            (1 << (len(chunk) - 1).bit_length()) - len(chunk)
        )


async def _look(desk: Desk, touching: bool) -> None:
    sought = list(desk.watch.sought.values())
    tasks = {s.task_id for s in sought if s.task_id is not None}
    jobs = {job_id: name for s in sought for job_id, name in s.jobs.items()}
    served = {s.worker_id: len(s.jobs) for s in sought if s.worker_id is not None}
    found: list[Any] = []
    if not (tasks or jobs or served):
        return
    async with desk.session_maker() as session:
        if touching and served:
            await workers.keep_alive(session, served)
            await session.commit()
        for chunk in zip_longest(_chunks(tasks), _chunks(jobs), _chunks(served)):
            ids = (part or [UUID(int=0)] for part in chunk)
            asked = dict(zip(("tasks", "jobs", "workers"), ids, strict=True))
            found += (await session.execute(_NEWS, asked)).all()
    for row in found:
        if row.kind == "task":
            wake_all(task_key(row.id))
        elif row.kind == "job":
            wake_some(job_key(jobs[row.id]), row.number)
    known = {row.id: row.number for row in found if row.kind == "worker"}
    for worker_id, jobs_served in served.items():
        # it drains, serves other jobs than before, or is gone
        if known.get(worker_id) != jobs_served:
            wake_all(worker_key(worker_id))

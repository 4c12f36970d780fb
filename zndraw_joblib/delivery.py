"""Where a committed change goes: waiting requests, Socket.IO, the broker, the host's hook."""

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from contextvars import Context
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import anyio
from sqlalchemy.ext.asyncio import AsyncSession

from zndraw_joblib import attempts, tasks, telemetry
from zndraw_joblib.events import Dispatch, Emitter, Outbox, TaskView, emit
from zndraw_joblib.exceptions import InternalJobNotConfigured, InvalidRequest
from zndraw_joblib.lifecycle import INTERNAL_ROOM, FullName
from zndraw_joblib.schemas import TaskResponse, TaskSubmitRequest
from zndraw_joblib.settings import JobLibSettings
from zndraw_joblib.waiting import Waiters, Wakeups

log = logging.getLogger(__name__)

SessionMaker = Callable[[], AbstractAsyncContextManager[AsyncSession]]


class Dispatcher(Protocol):
    """What hands ``@internal`` tasks to a broker."""

    def __contains__(self, name: object) -> bool:
        """Tell whether the broker takes messages of this name."""
        ...

    async def send(self, name: str, *, subject: Any, **message: Any) -> None:
        """Hand over one message about a task or provider; raise if it isn't taken."""
        ...


#: ``await hook(names)``: the providers that went away, whatever took them.
ProvidersRemoved = Callable[[list[FullName]], Awaitable[None]]


@dataclass(frozen=True)
class Transports:
    """What carries a change out of this process, all the host's.

    Attributes
    ----------
    settings : JobLibSettings
        ``dispatch_timeout_seconds`` bounds each single send, and the hook.
    tsio : socketio.AsyncServer or a wrapper of one, optional
        Where events go.
    registry : InternalRegistry, optional
        Where ``@internal`` tasks go.
    session_maker : callable, optional
        Opens the session that fails what the broker didn't take.
    on_providers_removed : coroutine function, optional
        Hears of providers that went away.
    wakeups : Wakeups, optional
        What wakes requests that wait in other processes.
    """

    settings: JobLibSettings
    tsio: Emitter | None = None
    registry: Dispatcher | None = None
    session_maker: SessionMaker | None = None
    on_providers_removed: ProvidersRemoved | None = None
    wakeups: Wakeups | None = None


def require_broker(
    transports: Transports, name: FullName, submitted: Sequence[TaskSubmitRequest], where: str
) -> None:
    """Return if the broker takes what is submitted to a job, or need not.

    Raises
    ------
    ProblemException
        ``internal-job-not-configured``; ``invalid-request`` for a delay.
    """
    if name.room != INTERNAL_ROOM:
        return
    if transports.registry is None or str(name) not in transports.registry:
        raise InternalJobNotConfigured.exception(f"nothing here runs {name}")
    detail = "an @internal task starts at once"
    errors = [
        {"pointer": f"{where.format(n)}/delay_seconds", "detail": detail}
        for n, task in enumerate(submitted)
        if task.delay_seconds
    ]
    if errors:
        raise InvalidRequest.exception(detail, errors=errors[:1])


class Publication(NamedTuple):
    """An outbox on its way out."""

    outbox: Outbox
    transports: Transports
    # done when all of it has left, or can't
    left: asyncio.Future[None]


class Delivery:
    """The queue through which all of one app's committed changes leave, in their order.

    Its task belongs to the app: no client that hangs up, and no answer that fails, takes a
    committed change back.

    Parameters
    ----------
    waiters : Waiters
        The requests of the app that wait.
    """

    def __init__(self, waiters: Waiters) -> None:
        self._waiters = waiters
        self._queue: deque[Publication] = deque()
        self._sender: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    def publish(self, outbox: Outbox, transports: Transports) -> asyncio.Future[None] | None:
        """Let what a transaction left in its outbox leave; never raises.

        Call it right after the commit, with nothing awaited in between: this is what
        orders events.

        Returns
        -------
        asyncio.Future or None
            Done when all has left that can; None when there is nothing to send.
        """
        try:
            self._waiters.notify(outbox.ended, outbox.queued)
            if transports.wakeups is not None and (outbox.ended or outbox.queued):
                transports.wakeups.tell(outbox.ended, outbox.queued)
        except Exception:
            # who waits looks by itself
            log.exception("waiting requests were not woken")
        if not outbox.leaves:
            return None
        loop = asyncio.get_running_loop()
        sender = self._sender
        if sender is None or sender.done() or sender.get_loop() is not loop:
            # what is left in another event loop's queue, its own sender sends
            self._queue = deque()
            self._sender = self._start(self._send_all(self._queue))
        publication = Publication(outbox, transports, loop.create_future())
        self._queue.append(publication)
        return publication.left

    async def drain(self, seconds: float) -> None:
        """Return when all that was published has left, or after ``seconds``."""
        loop, deadline = asyncio.get_running_loop(), anyio.current_time() + seconds
        while tasks := [task for task in self._tasks if task.get_loop() is loop]:
            left = deadline - anyio.current_time()
            if left <= 0:
                log.error("%d deliveries had not left when the app ended", len(tasks))
                return
            await asyncio.wait(tasks, timeout=left)

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        # of no request: neither its trace nor its context variables
        task = asyncio.create_task(work, context=Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _send_all(self, queue: deque[Publication]) -> None:
        while queue:
            # a server that hangs costs one patience for all that queued up meanwhile
            hangs = False
            for _ in range(len(queue)):
                outbox, transports, left = publication = queue.popleft()
                try:
                    _log(outbox)
                    hangs = hangs or not await _emit(outbox, transports)
                except Exception:
                    log.exception("events did not leave")
                if outbox.dispatches or outbox.providers_removed:
                    self._start(self._send_rest(publication))
                elif not left.done():
                    left.set_result(None)

    async def _send_rest(self, publication: Publication) -> None:
        outbox, transports, left = publication
        try:
            failed = await _send_rest(outbox, transports)
            then = self.publish(failed, transports)
            if then is not None:
                await then
        finally:
            if not left.done():
                left.set_result(None)


def _log(outbox: Outbox) -> None:
    for worker_id in outbox.workers_gone:
        extra = {"event": "gone", "worker_id": str(worker_id)}
        log.info("worker %s is gone", worker_id, extra=extra)
    for task in outbox.changes:
        telemetry.task_changed(task)


async def _emit(outbox: Outbox, transports: Transports) -> bool:
    patience = transports.settings.dispatch_timeout_seconds
    return await emit(transports.tsio, outbox.emissions, timeout=patience)


async def _send_rest(outbox: Outbox, transports: Transports) -> Outbox:
    """Send messages and call the hook; return what is to be told of it."""
    failed = await _dispatch(outbox.dispatches, transports)
    if outbox.providers_removed and transports.on_providers_removed is not None:
        try:
            with anyio.fail_after(transports.settings.dispatch_timeout_seconds):
                await transports.on_providers_removed(list(outbox.providers_removed))
        except Exception:
            log.exception("the host's hook for removed providers failed")
    return failed


async def _dispatch(dispatches: Sequence[Dispatch], transports: Transports) -> Outbox:
    left: list[Dispatch] = []
    why: Exception | None = None
    for dispatch in dispatches:
        # a broker that hangs would let each of a thousand messages wait as long
        if not isinstance(why, TimeoutError):
            try:
                await _send(dispatch.task, transports)
                continue
            except Exception as exc:
                log.exception("task %s was not taken by the broker", dispatch.task.id)
                why = exc
        left.append(dispatch)
    return Outbox() if why is None else await _undeliverable(left, why, transports)


async def _send(task: TaskView, transports: Transports) -> None:
    if transports.registry is None:
        raise RuntimeError("there is no broker")
    subject = TaskResponse.model_validate_json(tasks.as_json(task))
    trace = {"traceparent": task.traceparent} if task.traceparent else {}
    with (
        telemetry.continuing(trace),
        anyio.fail_after(transports.settings.dispatch_timeout_seconds),
    ):
        await transports.registry.send(
            task.job_name,
            subject=subject,
            task_id=str(task.id),
            room_id=task.room_id,
            payload=subject.payload,
        )


async def _undeliverable(
    dispatches: Sequence[Dispatch], why: Exception, transports: Transports
) -> Outbox:
    """Fail tasks that can't be sent; return what is to be told of it."""
    outbox = Outbox()
    new, sent_before = (
        [(d.task.id, d.task.attempt) for d in dispatches if d.again is again]
        for again in (False, True)
    )
    error = f"The broker did not take the task: {why!r}"
    try:
        if transports.session_maker is None:
            raise RuntimeError("there is no session maker")
        async with transports.session_maker() as session:
            failed = await attempts.fail_undispatched(session, new, error, transports.settings)
            await attempts.postpone(session, sent_before, transports.settings)
            await session.commit()
        outbox.tasks_changed(failed)
    except Exception:
        # they stay claimed, and the sweeper sends them again
        log.exception("%s tasks could not be failed either", len(dispatches))
    return outbox

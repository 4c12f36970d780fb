"""Where a committed change goes: waiting requests, Socket.IO, the broker, the host's hook.

Beside it, what one app remembers between its requests.
"""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from contextvars import Context
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import anyio
from sqlalchemy.ext.asyncio import AsyncSession

from zndraw_joblib import attempts, tasks, telemetry
from zndraw_joblib.events import Dispatch, Dispatcher, Emitter, Outbox, TaskLogged, TaskView, emit
from zndraw_joblib.exceptions import InternalJobNotConfigured, InvalidRequest
from zndraw_joblib.lifecycle import INTERNAL_ROOM, FullName
from zndraw_joblib.results import InFlight
from zndraw_joblib.schemas import TaskResponse, TaskSubmitRequest
from zndraw_joblib.settings import JobLibSettings, settings_of
from zndraw_joblib.waiting import Subscriptions, Waiters, Wakeups

log = logging.getLogger(__name__)

T = TypeVar("T")
SessionMaker = Callable[[], AbstractAsyncContextManager[AsyncSession]]


#: ``await hook(names)``: the providers that went away, whatever took them.
ProvidersRemoved = Callable[[list[FullName]], Awaitable[None]]
#: ``await hook(logged)``: what tasks logged, of one heartbeat.
OnTaskLog = Callable[[list[TaskLogged]], Awaitable[None]]


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
    on_task_log : coroutine function, optional
        Hears of what tasks log.
    """

    settings: JobLibSettings
    tsio: Emitter | None = None
    registry: Dispatcher | None = None
    session_maker: SessionMaker | None = None
    on_providers_removed: ProvidersRemoved | None = None
    wakeups: Wakeups | None = None
    on_task_log: OnTaskLog | None = None


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
                transports.wakeups.publish(outbox.ended, outbox.queued)
        except Exception:
            # the next poll wakes them
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

    async def run(
        self,
        session_maker: SessionMaker,
        transports: Transports,
        step: Callable[[AsyncSession, Outbox], Awaitable[T]],
    ) -> T:
        """Commit a step, and return when what it left in the outbox has left, or can't."""
        outbox = Outbox()
        async with session_maker() as session:
            result = await step(session, outbox)
            await session.commit()
            left = self.publish(outbox, transports)
        if left is not None:
            await left
        return result

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
                    patience = transports.settings.dispatch_timeout_seconds
                    hangs = hangs or not await emit(
                        transports.tsio, outbox.emissions, timeout=patience
                    )
                except Exception:
                    log.exception("events did not leave")
                if outbox.dispatches or outbox.providers_removed or outbox.logged:
                    self._start(self._send_rest(publication))
                elif not left.done():
                    left.set_result(None)

    async def _send_rest(self, publication: Publication) -> None:
        """Send messages, fail the tasks of those that can't be sent, and call the hook."""
        outbox, transports, left = publication
        try:
            undelivered, why = await _dispatch(outbox.dispatches, transports)
            if undelivered:
                await self._fail(undelivered, why, transports)
            await _call_hook(transports.on_providers_removed, outbox.providers_removed, transports)
            await _call_hook(transports.on_task_log, outbox.logged, transports)
        finally:
            if not left.done():
                left.set_result(None)

    async def _fail(
        self, dispatches: Sequence[Dispatch], why: Exception | None, transports: Transports
    ) -> None:
        new, sent_before = (
            [(d.task.id, d.task.attempt) for d in dispatches if d.again is again]
            for again in (False, True)
        )
        error = f"The broker did not take the task: {why!r}"

        async def fail(session: AsyncSession, outbox: Outbox) -> None:
            failed = await attempts.fail_undispatched(session, new, error, transports.settings)
            await attempts.postpone(session, sent_before, transports.settings)
            outbox.tasks_changed(failed)

        try:
            if transports.session_maker is None:
                raise RuntimeError("there is no session maker")
            await self.run(transports.session_maker, transports, fail)
        except Exception:
            # they stay claimed, and the sweeper sends them again
            log.exception("%s tasks could not be failed either", len(dispatches))


def _log(outbox: Outbox) -> None:
    for worker_id in outbox.workers_gone:
        extra = {"event": "gone", "worker_id": str(worker_id)}
        log.info("worker %s is gone", worker_id, extra=extra)
    for task in outbox.changes:
        telemetry.task_changed(task)


async def _call_hook(
    hook: Callable[[list[T]], Awaitable[None]] | None, events: list[T], transports: Transports
) -> None:
    if not events or hook is None:
        return
    try:
        with anyio.fail_after(transports.settings.dispatch_timeout_seconds):
            await hook(list(events))
    except Exception:
        log.exception("the host's hook for %s failed", type(events[0]).__name__)


async def _dispatch(
    dispatches: Sequence[Dispatch], transports: Transports
) -> tuple[list[Dispatch], Exception | None]:
    """Hand messages to the broker; return those that it didn't take, and why not."""
    undelivered: list[Dispatch] = []
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
        undelivered.append(dispatch)
    return undelivered, why


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


# --- what an app remembers ---


@dataclass
class Runtime:
    """The memory of one app, made once for it and handed on like its session maker.

    Each part belongs to the module that uses it. Two apps in one process share nothing.

    Attributes
    ----------
    waiters : Waiters
        The requests that wait.
    delivery : Delivery
        The queue of committed changes.
    polls : dict of AbstractEventLoop to Subscriptions
        What the requests of each event loop wait for.
    reads : InFlight
        The requests to providers that have no answers.
    sweeper : asyncio.Task, optional
        The task that runs, or ran, the sweeper.
    began : bool
        Whether the app's lifespan ran, or it was logged that it did not.
    """

    waiters: Waiters = field(default_factory=Waiters)
    delivery: Delivery = field(init=False)
    polls: dict[asyncio.AbstractEventLoop, Subscriptions] = field(default_factory=dict)
    reads: InFlight = field(default_factory=InFlight)
    sweeper: asyncio.Task[Any] | None = None
    began: bool = False

    def __post_init__(self) -> None:
        self.delivery = Delivery(self.waiters)

    @property
    def subscriptions(self) -> Subscriptions:
        """What the requests of the running event loop wait for."""
        loop = asyncio.get_running_loop()
        if loop not in self.polls:
            self.polls = {k: v for k, v in self.polls.items() if not k.is_closed()}
            self.polls[loop] = Subscriptions()
        return self.polls[loop]


def runtime_of(app: Any) -> Runtime:
    """Return the runtime of an app, kept in ``app.state.joblib_runtime``."""
    runtime: Runtime | None = getattr(app.state, "joblib_runtime", None)
    if runtime is None:
        runtime = app.state.joblib_runtime = Runtime()
    return runtime


@asynccontextmanager
async def lifespan(app: Any) -> AsyncIterator[None]:
    """Let what was published leave before the host takes down what carries it.

    Raises
    ------
    pydantic.ValidationError, pydantic_settings.SettingsError
        At the start, when the environment's settings can't be read.
    """
    patience = 2 * settings_of(app).dispatch_timeout_seconds
    runtime_of(app).began = True
    yield
    await runtime_of(app).delivery.drain(patience)

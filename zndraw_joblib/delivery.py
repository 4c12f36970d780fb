"""Where a committed change goes: its answer, waiting requests, Socket.IO, the broker."""

import logging
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import anyio
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.types import Message, Send

from zndraw_joblib import attempts, telemetry, waiting
from zndraw_joblib.events import Dispatch, Emitter, Outbox, TaskView, emit
from zndraw_joblib.names import FullName
from zndraw_joblib.settings import JobLibSettings
from zndraw_joblib.wakeups import Wakeups

log = logging.getLogger(__name__)

#: Where a request's scope holds its :class:`Answer`.
ANSWER = "zndraw_joblib.answer"

# Bytes that a server takes without waiting for the client to read them.
UNREAD = 16 * 1024

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


@dataclass
class Answer:
    """A request's answer, kept until the session is closed.

    FastAPI ends a request's dependencies after its answer was sent: a client that reads
    slowly would hold the session, and under a lock-wrapped maker everybody.

    Attributes
    ----------
    send : callable
        The server's.
    kept : list of dict
        What was not sent yet.
    begun : bool
        There is an answer.
    handled : bool
        The route did what it was asked for.
    news : coroutine function, optional
        Delivers what the request left in its outbox.
    """

    send: Send
    kept: list[Message] = field(default_factory=list)
    begun: bool = False
    handled: bool = False
    news: Callable[[], Awaitable[None]] | None = None

    async def keep(self, message: Message) -> None:
        """Take a message in place of the server; what streams is handed on at once."""
        self.begun = True
        self.kept.append(message)
        if message.get("more_body"):
            await self.leave()

    async def end(self) -> None:
        """Send what is kept and deliver the news, now that the session is closed.

        The answer goes first, unless it is so large that its reader could hold up
        everybody else's news.
        """
        await self.leave(UNREAD)
        if self.handled and self.news is not None:
            try:
                await self.news()
            except Exception:
                log.exception("news did not leave")
        await self.leave()

    async def leave(self, most: float = math.inf) -> None:
        """Send what is kept, unless it has more bytes than ``most``."""
        if sum(len(message.get("body", b"")) for message in self.kept) > most:
            return
        messages, self.kept = self.kept, []
        try:
            for message in messages:
                await self.send(message)
        except OSError:
            log.debug("who asked has hung up")


@dataclass(frozen=True)
class Exits:
    """The ways out of this process, all the host's.

    Attributes
    ----------
    session_maker : callable
        Opens the session that fails what the broker didn't take.
    settings : JobLibSettings
        ``dispatch_timeout_seconds`` bounds each single send, and the hook.
    tsio : socketio.AsyncServer or a wrapper of one, optional
        Where events go.
    registry : InternalRegistry, optional
        Where ``@internal`` tasks go.
    on_providers_removed : coroutine function, optional
        Hears of providers that went away.
    wakeups : Wakeups, optional
        What wakes requests that wait in other processes.
    """

    session_maker: SessionMaker
    settings: JobLibSettings
    tsio: Emitter | None = None
    registry: Dispatcher | None = None
    on_providers_removed: ProvidersRemoved | None = None
    wakeups: Wakeups | None = None


async def tell(
    outbox: Outbox,
    settings: JobLibSettings,
    tsio: Emitter | None = None,
    wakeups: Wakeups | None = None,
) -> None:
    """Send an outbox's events, and wake who waits for what they tell of."""
    for worker_id in outbox.workers_gone:
        told = {"event": "gone", "worker_id": str(worker_id)}
        log.info("worker %s is gone", worker_id, extra=told)
    for task in outbox.changes:
        telemetry.task_changed(task)
    await emit(tsio, outbox.emissions, timeout=settings.dispatch_timeout_seconds)
    # woken after what they were woken for was told, so that their own news comes later;
    # while a manager hangs, they look again by themselves
    for key in outbox.ended:
        waiting.wake_all(key)
    for key, count in Counter(outbox.queued).items():
        waiting.wake_some(key, count)
    if wakeups is not None and (outbox.ended or outbox.queued):
        wakeups.tell(outbox.ended, outbox.queued)


async def deliver(outbox: Outbox, exits: Exits) -> None:
    """Send what a transaction left in its outbox; call it with no session open.

    What can't leave is logged; an ``@internal`` task that can't leave is failed.
    """
    patience = exits.settings.dispatch_timeout_seconds
    await tell(outbox, exits.settings, exits.tsio, exits.wakeups)
    await _dispatch(outbox.dispatches, exits)
    if outbox.providers_removed and exits.on_providers_removed is not None:
        try:
            with anyio.fail_after(patience):
                await exits.on_providers_removed(list(outbox.providers_removed))
        except Exception:
            log.exception("the host's hook for removed providers failed")


async def _dispatch(dispatches: Sequence[Dispatch], exits: Exits) -> None:
    left: list[Dispatch] = []
    why: Exception | None = None
    for dispatch in dispatches:
        # a broker that hangs would let each of a thousand messages wait as long
        if not isinstance(why, TimeoutError):
            try:
                await _send(dispatch.task, exits)
                continue
            except Exception as exc:
                log.exception("task %s was not taken by the broker", dispatch.task.id)
                why = exc
        left.append(dispatch)
    if why is not None:
        await _undeliverable(left, why, exits)


async def _send(task: TaskView, exits: Exits) -> None:
    if exits.registry is None:
        raise RuntimeError("there is no broker")
    trace = {"traceparent": task.traceparent} if task.traceparent else {}
    with (
        telemetry.continuing(trace),
        anyio.fail_after(exits.settings.dispatch_timeout_seconds),
    ):
        await exits.registry.send(
            task.job_name,
            subject=task,
            task_id=str(task.id),
            room_id=task.room_id,
            payload=task.payload,
        )


async def _undeliverable(
    dispatches: Sequence[Dispatch], why: Exception, exits: Exits
) -> None:
    outbox = Outbox()
    new, sent_before = (
        [(d.task.id, d.task.attempt) for d in dispatches if d.again is again]
        for again in (False, True)
    )
    error = f"The broker did not take the task: {why!r}"
    try:
        async with exits.session_maker() as session:
            failed = await attempts.fail_undispatched(
                session, new, error, exits.settings
            )
            await attempts.postpone(session, sent_before, exits.settings)
            await session.commit()
        outbox.tasks_changed(failed)
    except Exception:
        # they stay claimed, and the sweeper sends them again
        log.exception("%s tasks could not be failed either", len(dispatches))
    await deliver(outbox, exits)

"""Where a committed change goes: waiting requests, Socket.IO, the broker."""

import logging
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from typing import Protocol

import anyio
from sqlalchemy.ext.asyncio import AsyncSession

from zndraw_joblib import attempts, waiting
from zndraw_joblib.events import Dispatch, Emitter, Outbox, emit
from zndraw_joblib.lifecycle import ErrorType
from zndraw_joblib.models import Task
from zndraw_joblib.settings import JobLibSettings

log = logging.getLogger(__name__)

SessionMaker = Callable[[], AbstractAsyncContextManager[AsyncSession]]


class Dispatcher(Protocol):
    """What hands ``@internal`` tasks to a broker."""

    async def send(self, dispatch: Dispatch) -> None:
        """Hand over one task; raise if the broker doesn't take it."""
        ...


async def deliver(
    outbox: Outbox,
    session_maker: SessionMaker,
    settings: JobLibSettings,
    tsio: Emitter | None = None,
    dispatcher: Dispatcher | None = None,
) -> None:
    """Send what a transaction left in its outbox; call it with no session open.

    What can't leave is logged; an ``@internal`` task that can't leave is failed.

    Parameters
    ----------
    outbox : Outbox
        What to send.
    session_maker : callable
        Opens the session that fails what the broker didn't take.
    settings : JobLibSettings
        ``dispatch_timeout_seconds`` bounds each single send.
    tsio : socketio.AsyncServer or a wrapper of one, optional
        Where events go.
    dispatcher : InternalRegistry, optional
        Where ``@internal`` tasks go.
    """
    for key in outbox.ended:
        waiting.wake_all(key)
    for key in outbox.queued:
        waiting.wake_one(key)
    await emit(tsio, outbox.emissions, timeout=settings.dispatch_timeout_seconds)
    undelivered = Outbox()
    for dispatch in outbox.dispatches:
        try:
            if dispatcher is None:
                raise RuntimeError("there is no broker")
            with anyio.fail_after(settings.dispatch_timeout_seconds):
                await dispatcher.send(dispatch)
        except Exception as exc:
            log.exception("task %s was not taken by the broker", dispatch.task_id)
            async with session_maker() as session:
                failed = await attempts.fail(
                    session,
                    (Task.id == dispatch.task_id) & Task.started_at.is_(None),
                    settings,
                    error=f"The broker did not take the task: {exc!r}",
                    error_type=ErrorType.DISPATCH,
                )
                await session.commit()
            for task in failed:
                undelivered.task_changed(task)
    if undelivered.emissions:
        await deliver(undelivered, session_maker, settings, tsio)

"""``@internal`` jobs and providers: run by the server side through TaskIQ."""

import json
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any, Protocol
from uuid import UUID

from fastapi import FastAPI
from sqlalchemy.ext.asyncio import AsyncSession
from taskiq import AsyncBroker, AsyncTaskiqDecoratedTask, Context, TaskiqDepends

from zndraw_joblib import attempts, jobs, telemetry
from zndraw_joblib.delivery import Exits, SessionMaker, deliver
from zndraw_joblib.events import Outbox
from zndraw_joblib.lifecycle import ErrorType
from zndraw_joblib.models import TASK
from zndraw_joblib.names import INTERNAL_ROOM, FullName
from zndraw_joblib.providers import install as install_provider
from zndraw_joblib.settings import settings_of

log = logging.getLogger(__name__)


class ExtensionClass(Protocol):
    """What is used of a host's own extension class."""

    category: Any
    __name__: str

    def model_json_schema(self) -> dict[str, Any]:
        """Return the JSON schema of the class's fields."""
        ...


#: ``await executor(extension_cls, payload, room_id, task_id)``; it reports by itself.
InternalExecutor = Callable[[Any, dict[str, Any], str, str], Awaitable[None]]

#: ``await executor(provider_cls, params, provider_id, request_id)``; it uploads the
#: result itself, with ``request_id`` as ``X-Request-Hash``.
InternalProviderExecutor = Callable[[Any, dict[str, Any], str, str], Awaitable[None]]


def internal_name(extension: Any) -> FullName:
    """Return the full name under which the server runs an extension."""
    category = extension.category
    if isinstance(category, Enum):
        category = category.value
    return FullName(INTERNAL_ROOM, str(category), extension.__name__)


@dataclass(frozen=True)
class InternalRegistry:
    """The ``@internal`` jobs, or providers, that a broker takes.

    Attributes
    ----------
    tasks : dict of str to AsyncTaskiqDecoratedTask
        By full name.
    extensions : dict of str to type
        By full name.
    executor : InternalExecutor or InternalProviderExecutor
        Runs them.
    """

    tasks: Mapping[str, AsyncTaskiqDecoratedTask[Any, Any]]
    extensions: Mapping[str, Any]
    executor: Callable[..., Awaitable[None]]

    def __contains__(self, full_name: object) -> bool:
        return full_name in self.tasks

    async def send(self, name: str, **message: Any) -> None:
        """Hand a message to the broker; what the broker raises is raised."""
        task = self.tasks[name]
        # a label, since hosts' own tasks take exactly these arguments
        if (trace := telemetry.carried()) is not None:
            await task.kicker().with_labels(traceparent=trace).kiq(**message)
        else:
            await task.kiq(**message)


def register_internal_tasks(
    broker: AsyncBroker, extensions: Iterable[Any], executor: InternalExecutor
) -> InternalRegistry:
    """Register extensions with a broker, for a process with no app and no database.

    Where the process uses OpenTelemetry, a run stands in a consumer span, which goes on
    with the trace of the submission.

    Parameters
    ----------
    broker : AsyncBroker
        Where the tasks are received, under the job's full name.
    extensions : iterable of type
        Classes with ``category``, ``__name__`` and ``model_json_schema()``.
    executor : InternalExecutor
        Runs a task and reports on it.
    """

    async def run(
        extension: Any, payload: dict[str, Any], room_id: str, task_id: str
    ) -> None:
        name, trace = str(internal_name(extension)), telemetry.carried()
        # which attempt it is, only the host knows
        with telemetry.processing(name, task_id, None, trace):
            await executor(extension, payload, room_id, task_id)

    return _register(broker, extensions, executor, _job_receiver(run))


def _register(
    broker: AsyncBroker,
    classes: Iterable[Any],
    executor: Callable[..., Awaitable[None]],
    receiver: Callable[[Any], Callable[..., Awaitable[None]]],
) -> InternalRegistry:
    by_name = {str(internal_name(cls)): cls for cls in classes}
    tasks = {
        name: broker.register_task(receiver(cls), task_name=name)
        for name, cls in by_name.items()
    }
    return InternalRegistry(tasks, by_name, executor)


def _context(context: Annotated[Context, TaskiqDepends()]) -> Context:
    return context


def _job_receiver(
    run: InternalExecutor,
) -> Callable[[Any], Callable[..., Awaitable[None]]]:
    def receiver(extension: Any) -> Callable[..., Awaitable[None]]:
        async def receive(
            task_id: str,
            room_id: str,
            payload: dict[str, Any],
            context: Annotated[Context | None, TaskiqDepends(_context)] = None,
        ) -> None:
            with telemetry.continuing(context.message.labels if context else {}):
                await run(extension, payload, room_id, task_id)

        return receive

    return receiver


def register_internal_providers(
    broker: AsyncBroker, providers: Iterable[Any], executor: InternalProviderExecutor
) -> InternalRegistry:
    """Register providers with a broker; a host sets ``app.state.internal_providers``.

    Parameters
    ----------
    broker : AsyncBroker
        Takes the requests, under the provider's full name.
    providers : iterable of type
        Classes with ``category``, ``__name__`` and ``model_json_schema()``.
    executor : InternalProviderExecutor
        Serves a request and uploads its result.
    """

    def receiver(provider: Any) -> Callable[..., Awaitable[None]]:
        async def receive(provider_id: str, request_id: str, params: str) -> None:
            await executor(provider, json.loads(params), provider_id, request_id)

        return receive

    return _register(broker, providers, executor, receiver)


async def ensure_internal_providers(
    providers: Iterable[Any], session_maker: SessionMaker, *, user_id: UUID
) -> None:
    """Write the rows of ``@internal`` providers; every replica may do so at once.

    Parameters
    ----------
    providers : iterable of type
        Classes with ``category``, ``__name__``, ``model_json_schema()`` and, unless it
        is ``application/json``, ``content_type``.
    session_maker : callable
        Opens the session.
    user_id : UUID
        Who uploads their results.
    """
    by_name = {internal_name(provider): provider for provider in providers}
    async with session_maker() as session:
        for name in sorted(by_name):
            provider = by_name[name]
            content_type = getattr(provider, "content_type", "application/json")
            schema = provider.model_json_schema()
            await install_provider(session, name, schema, content_type, user_id)
        await session.commit()


async def register_internal_jobs(
    app: FastAPI,
    broker: AsyncBroker,
    extensions: Iterable[Any],
    executor: InternalExecutor,
    session_maker: SessionMaker,
) -> InternalRegistry:
    """Write the rows of ``@internal`` jobs and set ``app.state.internal_registry``.

    A task that the broker delivers to this process is started here, so that of two
    deliveries one runs, and failed here when the executor raises.

    Parameters
    ----------
    app : FastAPI
        The host; its ``state.tsio`` and ``state.joblib_settings`` are read when a task
        runs.
    broker : AsyncBroker
        Takes the tasks.
    extensions : iterable of type
        Classes with ``category``, ``__name__`` and ``model_json_schema()``.
    executor : InternalExecutor
        Runs a task and reports on it.
    session_maker : callable
        Opens sessions.
    """
    extensions = list(extensions)

    async def tell(change: Callable[[AsyncSession], Awaitable[list[Any]]]) -> bool:
        box = Outbox()
        async with session_maker() as session:
            for task in await change(session):
                box.task_changed(task)
            await session.commit()
        tsio = getattr(app.state, "tsio", None)
        await deliver(box, Exits(session_maker, settings_of(app), tsio))
        return bool(box.emissions)

    async def run(
        extension: Any, payload: dict[str, Any], room_id: str, task_id: str
    ) -> None:
        started: list[Any] = []

        async def start(session: AsyncSession) -> list[Any]:
            task = await attempts.start_internal(
                session, UUID(task_id), settings_of(app)
            )
            started.extend([] if task is None else [task])
            return started

        async def fail(session: AsyncSession) -> list[Any]:
            return await attempts.fail(
                session,
                TASK.c.id == UUID(task_id),
                settings_of(app),
                error=str(exc) or type(exc).__name__,
                error_type=ErrorType.USER_ERROR,
            )

        if not await tell(start):
            log.info("task %s is not there to be started", task_id)
            return
        try:
            (task,) = started
            with telemetry.processing(
                task.job_name, task_id, task.attempt, task.traceparent
            ):
                await executor(extension, payload, room_id, task_id)
        except Exception as raised:
            exc = raised
            await tell(fail)
            raise

    await ensure_internal_jobs(extensions, session_maker)
    registry = _register(broker, extensions, executor, _job_receiver(run))
    app.state.internal_registry = registry
    return registry


async def ensure_internal_jobs(
    extensions: Iterable[Any], session_maker: SessionMaker
) -> None:
    """Write the rows of ``@internal`` jobs; every replica may do so at once.

    Parameters
    ----------
    extensions : iterable of type
        Classes with ``category``, ``__name__`` and ``model_json_schema()``.
    session_maker : callable
        Opens the session.
    """
    by_name = {internal_name(extension): extension for extension in extensions}
    async with session_maker() as session:
        # in one order, so that replicas that start together wait for each other in turn
        for name in sorted(by_name):
            await jobs.install(session, name, by_name[name].model_json_schema())
        await session.commit()

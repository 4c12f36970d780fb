"""``@internal`` jobs and providers: run by the server side through TaskIQ."""

import asyncio
import inspect
import json
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Annotated, Any
from uuid import UUID

import anyio
from fastapi import FastAPI
from sqlalchemy.ext.asyncio import AsyncSession
from taskiq import AsyncBroker, AsyncTaskiqDecoratedTask, Context, TaskiqDepends

from zndraw_joblib import attempts, deprecated, heartbeats, jobs, telemetry
from zndraw_joblib.delivery import SessionMaker, Transports, runtime_of
from zndraw_joblib.events import Outbox, TaskView
from zndraw_joblib.exceptions import describe, traceback_of
from zndraw_joblib.lifecycle import INTERNAL_ROOM, MAX_LOG_LINES, FullName
from zndraw_joblib.providers import install as install_provider
from zndraw_joblib.schemas_workers import LoggedLines, TaskHeartbeat
from zndraw_joblib.settings import settings_of
from zndraw_joblib.waiting import wakeups_of

log = logging.getLogger(__name__)


#: ``await executor(extension_cls, payload, room_id, task_id)``; it reports by itself. Of
#: ``attempt``, ``token`` and ``traceparent`` it is given those that it declares, by name.
InternalExecutor = Callable[..., Awaitable[None]]

#: ``await executor(provider_cls, params, provider_id, request_id)``; it uploads the
#: result itself, with ``request_id`` as ``X-Request-Hash``. It is given ``token`` where
#: it declares it.
InternalProviderExecutor = Callable[..., Awaitable[None]]

#: ``await mint_token(task)``, or of a provider: what its executor may authenticate with.
MintToken = Callable[[Any], Awaitable[str]]


def internal_name(extension: Any) -> FullName:
    """Return the full name under which the server runs an extension."""
    category = extension.category
    if isinstance(category, Enum):
        category = category.value
    return FullName(INTERNAL_ROOM, str(category), extension.__name__)


def _named(classes: Iterable[Any]) -> list[tuple[FullName, Any]]:
    # in one order, so that replicas that start together wait for each other in turn
    return sorted({internal_name(cls): cls for cls in classes}.items())


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
    mint_token : MintToken, optional
        Makes the token that a message carries.
    """

    tasks: Mapping[str, AsyncTaskiqDecoratedTask[Any, Any]]
    extensions: Mapping[str, Any]
    executor: Callable[..., Awaitable[None]]
    mint_token: MintToken | None = None

    def __contains__(self, name: object) -> bool:
        return name in self.tasks

    async def send(self, name: str, *, subject: Any = None, **message: Any) -> None:
        """Hand a message to the broker; what the broker raises is raised.

        Parameters
        ----------
        name : str
            The full name of the job or provider.
        subject : TaskResponse or ProviderResponse, optional
            For whom a token is minted, and whose ``attempt`` is told.
        **message
            The arguments of the task.
        """
        # labels, since hosts' own tasks take exactly these arguments
        labels: dict[str, Any] = {}
        if (trace := telemetry.carried()) is not None:
            labels["traceparent"] = trace
        if (attempt := getattr(subject, "attempt", None)) is not None:
            labels["attempt"] = attempt
        # an argument, since brokers keep the labels with a result
        if self.mint_token is not None:
            message["token"] = await self.mint_token(subject)
        await self.tasks[name].kicker().with_labels(**labels).kiq(**message)


#: The name that providers' registries had.
InternalProviderRegistry = InternalRegistry


Run = Callable[..., Awaitable[None]]


def _calling(executor: Run, *names: str) -> Run:
    """Return what calls an executor with those of ``names`` that it declares by name.

    Its four arguments are its first four parameters, whatever they are called.
    """
    declared: list[str] = []
    # none where messages are only sent; and some callables can't be inspected
    with suppress(TypeError, ValueError):
        parameters = list(inspect.signature(executor).parameters.values())
        positional = [p for p in parameters if p.kind <= p.POSITIONAL_OR_KEYWORD][:4]
        by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        others = [p for p in parameters if p.kind in by_name and p not in positional]
        declared = [p.name for p in others if p.name in names]

    async def call(*arguments: Any, **offered: Any) -> None:
        await executor(*arguments, **{name: offered[name] for name in declared})

    return call


def _calling_job(executor: Run) -> Run:
    return _calling(executor, "attempt", "token", "traceparent")


def register_internal_tasks(
    broker: AsyncBroker,
    extensions: Iterable[Any],
    executor: InternalExecutor,
    mint_token: MintToken | None = None,
) -> InternalRegistry:
    """Register extensions with a broker, for a process with no app and no database.

    Parameters
    ----------
    broker : AsyncBroker
        Where the tasks are received, under the job's full name.
    extensions : iterable of type
        Classes with ``category``, ``__name__`` and ``model_json_schema()``.
    executor : InternalExecutor
        Runs a task and reports on it, its start included: the broker may deliver twice.
    mint_token : MintToken, optional
        Makes the token that goes with a task, where this process sends them.
    """
    return _register(
        broker, extensions, executor, _job_receiver(_calling_job(executor)), mint_token
    )


def _register(
    broker: AsyncBroker,
    classes: Iterable[Any],
    executor: Run,
    receiver: Callable[[Any], Run],
    mint_token: MintToken | None,
) -> InternalRegistry:
    by_name = {str(name): cls for name, cls in _named(classes)}
    tasks = {
        name: broker.register_task(receiver(cls), task_name=name) for name, cls in by_name.items()
    }
    return InternalRegistry(tasks, by_name, executor, mint_token)


def _context(context: Annotated[Context, TaskiqDepends()]) -> Context:
    return context


def _job_receiver(run: Run) -> Callable[[Any], Run]:
    def receiver(extension: Any) -> Run:
        async def receive(
            task_id: str,
            room_id: str,
            payload: dict[str, Any],
            token: str | None = None,
            context: Annotated[Context | None, TaskiqDepends(_context)] = None,
        ) -> None:
            labels = context.message.labels if context else {}
            attempt = int(labels["attempt"]) if "attempt" in labels else None
            with telemetry.continuing(labels):
                trace = telemetry.carried()
                named = {"attempt": attempt, "token": token, "traceparent": trace}
                await _contained(run(extension, payload, room_id, task_id, **named))

        return receive

    return receiver


async def _contained(running: Awaitable[None]) -> None:
    """Make an exception of whatever else ends an executor: it would end the process."""
    try:
        await running
    except (Exception, GeneratorExit):
        raise
    except BaseException as exc:
        task = asyncio.current_task()
        if isinstance(exc, asyncio.CancelledError) and task and task.cancelling():
            raise
        raise RuntimeError(f"the executor ended with {describe(exc)}") from exc


def register_internal_providers(
    broker: AsyncBroker,
    providers: Iterable[Any],
    executor: InternalProviderExecutor,
    mint_token: MintToken | None = None,
) -> InternalRegistry:
    """Register providers with a broker.

    A host sets ``app.state.internal_provider_registry`` to what is returned.

    Parameters
    ----------
    broker : AsyncBroker
        Takes the requests, under the provider's full name.
    providers : iterable of type
        Classes with ``category``, ``__name__`` and ``model_json_schema()``.
    executor : InternalProviderExecutor
        Serves a request and uploads its result.
    mint_token : MintToken, optional
        Makes the token that goes with a request, of the provider that is asked.
    """
    run = _calling(executor, "token")

    def receiver(provider: Any) -> Run:
        async def receive(
            provider_id: str, request_id: str, params: str, token: str | None = None
        ) -> None:
            arguments = (provider, json.loads(params), provider_id, request_id)
            await _contained(run(*arguments, token=token))

        return receive

    return _register(broker, providers, executor, receiver, mint_token)


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
    async with session_maker() as session:
        for name, provider in _named(providers):
            content_type = getattr(provider, "content_type", "application/json")
            schema = provider.model_json_schema()
            await install_provider(session, name, schema, content_type, user_id)
        await session.commit()


@deprecated.old_registry_arguments
async def register_internal_jobs(
    app: FastAPI,
    broker: AsyncBroker,
    extensions: Iterable[Any],
    executor: InternalExecutor,
    session_maker: SessionMaker,
    mint_token: MintToken | None = None,
) -> InternalRegistry:
    """Write the rows of ``@internal`` jobs and set ``app.state.internal_registry``.

    A task that the broker delivers to this process is started here, so that of two
    deliveries one runs, and its attempt is failed here when the executor raises.

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
    mint_token : MintToken, optional
        ``await mint_token(task)`` makes the token that goes with a task's message, after
        the commit; executors that declare ``token`` are given it.
    """
    extensions = list(extensions)
    await ensure_internal_jobs(extensions, session_maker)
    receiver = _job_receiver(_starting(app, session_maker, executor))
    registry = _register(broker, extensions, executor, receiver, mint_token)
    app.state.internal_registry = registry
    return registry


def _starting(app: FastAPI, session_maker: SessionMaker, executor: Run) -> Run:
    """Return what starts a delivered attempt, runs it, and fails it if it raises."""
    execute = _calling_job(executor)

    async def run(
        extension: Any, payload: dict[str, Any], room_id: str, task_id: str, **named: Any
    ) -> None:
        async def start(session: AsyncSession, outbox: Outbox) -> list[TaskView]:
            attempt = named["attempt"]
            return await attempts.start_internal(session, UUID(task_id), attempt, settings_of(app))

        started = await _change(app, session_maker, start)
        if not started:
            log.info("task %s is not there to be started", task_id)
            return
        (task,) = started
        named["attempt"] = task.attempt
        try:
            with telemetry.continuing({"traceparent": task.traceparent or ""}):
                await execute(extension, payload, room_id, task_id, **named)
        except GeneratorExit:
            # the event loop is gone: nothing can be awaited
            raise
        except BaseException as exc:
            await _fail(app, session_maker, task, exc, named["token"] or "")
            raise

    return run


async def _fail(
    app: FastAPI, session_maker: SessionMaker, task: TaskView, exc: BaseException, secret: str
) -> None:
    """End an attempt whose executor raised; its traceback is the end of the task's log."""
    settings = settings_of(app)

    def shown(text: str) -> str:
        return text.replace(secret, "[token]") if secret else text

    async def fail(session: AsyncSession, outbox: Outbox) -> list[TaskView]:
        lines = shown(traceback_of(exc)).splitlines()
        for first in range(0, len(lines), MAX_LOG_LINES):
            some = LoggedLines(first=first + 1, lines=lines[first : first + MAX_LOG_LINES])
            logged = TaskHeartbeat(id=task.id, attempt=task.attempt, log=some)
            outbox.logged += await heartbeats.append_log(session, [logged], settings)
        error = shown(describe(exc))
        return await attempts.fail_internal(session, task.id, task.attempt, error, settings)

    try:
        # whatever cancels the executor does not leave its task running
        with anyio.move_on_after(settings.dispatch_timeout_seconds, shield=True):
            await _change(app, session_maker, fail)
    except Exception:
        # it stays running until the sweeper ends it
        log.exception("task %s could not be failed", task.id)


async def _change(
    app: FastAPI,
    session_maker: SessionMaker,
    step: Callable[[AsyncSession, Outbox], Awaitable[list[TaskView]]],
) -> list[TaskView]:
    async def change(session: AsyncSession, outbox: Outbox) -> list[TaskView]:
        changed = await step(session, outbox)
        outbox.tasks_changed(changed)
        return changed

    tsio, hook = (getattr(app.state, name, None) for name in ("tsio", "on_task_log"))
    transports = Transports(settings_of(app), tsio, wakeups=wakeups_of(app), on_task_log=hook)
    return await runtime_of(app).delivery.run(session_maker, transports, change)


@deprecated.old_registry_arguments
async def ensure_internal_jobs(extensions: Iterable[Any], session_maker: SessionMaker) -> None:
    """Write the rows of ``@internal`` jobs; every replica may do so at once.

    Parameters
    ----------
    extensions : iterable of type
        Classes with ``category``, ``__name__`` and ``model_json_schema()``.
    session_maker : callable
        Opens the session.
    """
    async with session_maker() as session:
        for name, extension in _named(extensions):
            await jobs.install(session, name, extension.model_json_schema())
        await session.commit()

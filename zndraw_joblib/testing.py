"""A host within a test, for hosts and for authors of extensions.

::

    with Host() as host:
        assert host.run(Composition(symbols=["Cu", "O"])) == {"Cu": 1, "O": 1}

Its routes, its users and its workers are real; only the network is missing. With
``pytest_plugins = "zndraw_joblib.testing"`` the fixture ``joblib_host`` is such a host.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, suppress
from types import SimpleNamespace
from typing import Any, NamedTuple, Self

import anyio
import httpx
from anyio.from_thread import BlockingPortal, start_blocking_portal
from fastapi import FastAPI
from pydantic import SecretStr
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from zndraw_auth import AuthSettings, Base, User, create_engine_for_url
from zndraw_auth.db import get_session_maker
from zndraw_auth.users import get_jwt_strategy

from zndraw_joblib import models, sweeper
from zndraw_joblib.client import ClaimedTask, JobManager, TaskCancelled
from zndraw_joblib.database import UtcDateTime, execute
from zndraw_joblib.delivery import Runtime, SessionMaker
from zndraw_joblib.exceptions import ProblemException, describe, problem_exception_handler
from zndraw_joblib.execution import run_extension
from zndraw_joblib.extension import Extension
from zndraw_joblib.routes import router
from zndraw_joblib.settings import settings_of

URL = "http://host"
# How long a session may be waited for.
_PATIENCE_SECONDS = 10.0


class Sent(NamedTuple):
    """An event that left over Socket.IO."""

    event: str
    data: Any
    room: str | None


class _Sockets:
    """Socket.IO without a network: what is sent is kept, and every manager hears it."""

    def __init__(self) -> None:
        self.sent: list[Sent] = []
        self._handlers: list[tuple[str, Callable[[Any], Any]]] = []

    def on(self, event: str, handler: Callable[[Any], Any]) -> None:
        self._handlers.append((event, handler))

    async def emit(self, event: str, data: Any, *, room: str | None = None) -> None:
        self.sent.append(Sent(event, data, room))
        for heard, handler in self._handlers:
            if heard == event:
                handler(data)


class Host:
    """A host on SQLite in memory; nothing is swept before `later`.

    Parameters
    ----------
    app : FastAPI, optional
        The app under test, which includes the router. Its session maker and its Socket.IO
        server are replaced; its lifespan does not run.

    Attributes
    ----------
    session_maker : callable
        Hands out one session at a time, as a host that locks its database, and raises
        where such a host would hang.
    events : list of Sent
        What left over Socket.IO so far; it grows, and may be cleared.
    portal : anyio.from_thread.BlockingPortal
        ``portal.call(function, *args)`` awaits a coroutine function where the app runs.
    """

    portal: BlockingPortal

    def __init__(self, app: FastAPI | None = None) -> None:
        self.app = app or FastAPI(exception_handlers={ProblemException: problem_exception_handler})
        if app is None:
            self.app.include_router(router)
        self._engine = create_engine_for_url("sqlite+aiosqlite://")
        self.session_maker = _one_at_a_time(async_sessionmaker(self._engine))
        self._sockets = _Sockets()
        self.events = self._sockets.sent
        self._tokens: dict[str, str] = {}
        self._managers: list[JobManager] = []
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        self.portal = self._stack.enter_context(start_blocking_portal())
        self._stack.callback(lambda: self.portal.call(self._engine.dispose))
        state, overrides = self.app.state, self.app.dependency_overrides
        state.engine, state.session_maker = self._engine, self.session_maker
        state.tsio, state.joblib_runtime = self._sockets, Runtime(began=True)
        if not hasattr(state, "auth_settings"):
            secret = SecretStr("only for tests, and of 32 characters")
            state.auth_settings = AuthSettings(secret_key=secret)
        self._stack.callback(setattr, self.app, "dependency_overrides", overrides)
        self.app.dependency_overrides = {**overrides, get_session_maker: lambda: self.session_maker}
        self.portal.call(self._make_tables)
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._stack.close()

    async def _make_tables(self) -> None:
        async with self._engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)

    def token(self, user: str) -> str:
        """Return a token of a user, who is made when first named; ``admin`` is a superuser."""
        if user not in self._tokens:
            self._tokens[user] = self.portal.call(self._register, user)
        return self._tokens[user]

    async def _register(self, name: str) -> str:
        # nobody knows a password
        user = User(email=f"{name}@example.org", hashed_password="!", is_superuser=name == "admin")
        async with self.session_maker() as session:
            session.add(user)
            await session.flush()
            token = await get_jwt_strategy(self.app.state.auth_settings).write_token(user)
            await session.commit()
        return token

    def client(self, user: str | None = None) -> httpx.Client:
        """Return an HTTP client of a user, or of nobody; it is closed with the host."""
        headers = {} if user is None else {"Authorization": f"Bearer {self.token(user)}"}
        transport = httpx.MockTransport(lambda request: self.portal.call(self._ask, request))
        client = httpx.Client(transport=transport, base_url=URL, headers=headers)
        self._stack.callback(client.close)
        return client

    async def _ask(self, request: httpx.Request) -> httpx.Response:
        answer = await httpx.ASGITransport(self.app).handle_async_request(request)
        content = await answer.aread()
        return httpx.Response(answer.status_code, headers=answer.headers, content=content)

    def manager(self, user: str = "ada", **options: Any) -> JobManager:
        """Return a manager of a user; it ends with the host.

        Options are those of `JobManager`. Without ``execute``, `drain` runs its tasks.
        """
        api: Any = SimpleNamespace(http=self.client(user), base_url=URL)
        # the client has the headers
        api.get_headers, api.raise_for_status = dict, _raise_for_status
        # it hears all, and joins no rooms
        socket = SimpleNamespace(on=self._sockets.on, emit=lambda event, data: None)
        manager = JobManager(api, socket, **{"max_unreachable_seconds": 1.0, **options})
        if "execute" not in options:
            self._managers.append(manager)
        return self._stack.enter_context(manager)

    def run(self, extension: Extension, *, room: str = "lab", **run_kwargs: Any) -> Any:
        """Submit a task, run it in this thread, and return the result that the host has.

        What ``run`` raises is raised, and the task is failed with it; ``run_kwargs`` are
        those of `JobManager.register`.
        """
        with self.manager() as manager:
            manager.register(type(extension), room=room, run_kwargs=run_kwargs)
            task_id = manager.submit(extension, room, job_room=room)
            error = next((error for task, error in _work(manager) if task.task_id == task_id), None)
            if error is not None:
                raise error
            return manager.wait_for(task_id, timeout=0).result

    def drain(self) -> int:
        """Run in this thread what waits for the managers; return how many attempts."""
        attempts = 0
        while ran := sum(1 for manager in self._managers for _ in _work(manager)):
            attempts += ran
        return attempts

    def later(self, seconds: float) -> None:
        """Let time pass for all that is stored, and sweep; tokens end as they would have."""
        self.portal.call(self._later, seconds)

    async def _later(self, seconds: float) -> None:
        async with self.session_maker() as session:
            for table in (models.JOB, models.WORKER, models.PROVIDER, models.TASK):
                changes = ", ".join(
                    f"{c.name} = strftime('%Y-%m-%d %H:%M:%f000', {c.name}, '-{seconds} seconds')"
                    for c in table.c
                    if isinstance(c.type, UtcDateTime)
                )
                await execute(session, text(f"UPDATE {table.name} SET {changes}"))
            await session.commit()
        host = (self.session_maker, settings_of(self.app), self._sockets)
        registry = getattr(self.app.state, "internal_registry", None)
        await sweeper.cleanup_stale_workers(*host)
        await sweeper.cleanup_overdue_attempts(*host)
        await sweeper.cleanup_stuck_internal_tasks(*host, registry)
        await sweeper.cleanup_idle_jobs(*host)


def _raise_for_status(response: httpx.Response) -> None:
    if response.is_error:
        kinds = {401: PermissionError, 403: PermissionError, 404: KeyError}
        raise kinds.get(response.status_code, ValueError)(response.json()["detail"])


def _work(manager: JobManager) -> Iterator[tuple[ClaimedTask, BaseException | None]]:
    """Run tasks until there are none, and yield each with what it raised."""
    while manager.worker_id is not None and (task := manager.claim()) is not None:
        error: BaseException | None = None
        manager.start(task)
        try:
            manager.complete(task, run_extension(task))
        except TaskCancelled as exc:
            error = exc
            manager.cancel(task)
        except Exception as exc:
            error = exc
            with suppress(ValueError):
                manager.fail(task, describe(exc))
        yield task, error


def _one_at_a_time(maker: async_sessionmaker[AsyncSession]) -> SessionMaker:
    lock = asyncio.Lock()
    holder: asyncio.Task[Any] | None = None

    @asynccontextmanager
    async def one_at_a_time() -> AsyncIterator[AsyncSession]:
        nonlocal holder
        if holder is asyncio.current_task():
            raise RuntimeError("a session is opened within another one")
        with anyio.fail_after(_PATIENCE_SECONDS):
            await lock.acquire()
        holder = asyncio.current_task()
        try:
            async with maker() as session:
                yield session
        finally:
            holder = None
            lock.release()

    return one_at_a_time


try:
    import pytest
except ImportError:
    pass
else:

    @pytest.fixture
    def joblib_host() -> Iterator[Host]:
        """Yield a host."""
        with Host() as host:
            yield host

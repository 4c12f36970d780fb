"""A complete host: users, jobs, Socket.IO, TaskIQ and the sweeper in one FastAPI app.

Run it with ``nox -s host``, which installs what it needs; docs/mount.md says how to log
in. When the app is created it reads the environment: ``DATABASE_URL``, by default a SQLite
file; ``REDIS_URL``, by default none (with it and PostgreSQL any number of replicas may
run); ``ZNDRAW_AUTH_...`` and ``ZNDRAW_JOBLIB_...``, the settings of the two libraries.
"""

import asyncio
import gc
import logging
import os
import secrets
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4
from weakref import WeakKeyDictionary

import httpx
import monitoring
import socketio
import uvicorn
import zndraw_auth as auth
from fastapi import APIRouter, FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi_users.password import PasswordHelper
from internal_jobs import EXTENSIONS, SERVICE_ID, make_executor, make_mint_token
from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ConstantBackoff
from socketio.exceptions import ConnectionRefusedError
from sqlalchemy import event
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlmodel.ext.asyncio.session import AsyncSession as SQLModelSession
from taskiq import InMemoryBroker
from taskiq_redis import ListQueueBroker
from zndraw_auth.users import get_jwt_strategy

import zndraw_joblib as joblib
from zndraw_joblib.events import jobs_channel, providers_channel, room_channel

log = logging.getLogger(__name__)

# No full name is longer.
MAX_NAME = 1000
#: What begins a transaction for which other processes wait; first, SQLite is given WAL.
EXCLUSIVELY = {
    "sqlite": ("PRAGMA journal_mode=WAL", "BEGIN IMMEDIATE"),
    "postgresql": ("SELECT pg_advisory_xact_lock(20260210)",),
}

# made once: of these, FastAPI takes longer than of all the rest of an app
accounts = APIRouter()
users = auth.fastapi_users
accounts.include_router(users.get_auth_router(auth.auth_backend), prefix="/auth/jwt")
accounts.include_router(users.get_register_router(auth.UserRead, auth.UserCreate), prefix="/auth")
accounts.include_router(users.get_users_router(auth.UserRead, auth.UserUpdate), prefix="/users")


def open_database(url: str) -> AsyncEngine:
    """Return the engine; SQLite is set as docs/sqlite.md says."""
    if not url.startswith("sqlite"):
        return auth.create_engine_for_url(url)
    # it keeps connections: whoever closes the last one waits for the disk
    engine = create_async_engine(url)

    @event.listens_for(engine.sync_engine, "connect")
    def set_synchronous(connection: Any, record: Any) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA synchronous=NORMAL")
        cursor.close()

    return engine


def socket_server(app: FastAPI, redis_url: str | None) -> socketio.AsyncServer:
    """Return a Socket.IO server for people in rooms and for workers."""
    # else the manager would pause for up to a minute after Redis is back
    again = {"retry": Retry(ConstantBackoff(0.5), retries=-1)}
    manager = socketio.AsyncRedisManager(redis_url, redis_options=again) if redis_url else None
    tsio = socketio.AsyncServer(async_mode="asgi", client_manager=manager)

    async def connect(sid: str, environ: dict[str, Any], shown: Any) -> None:
        token = shown.get("token") if isinstance(shown, dict) else None
        strategy = get_jwt_strategy(app.state.auth_settings)
        maker = app.state.session_maker
        try:
            await auth.current_user_scoped_session(maker, strategy, token)
        except HTTPException as exc:
            raise ConnectionRefusedError(exc.detail) from None
        # every room sees what is registered for all
        await tsio.enter_room(sid, room_channel("@global"))

    tsio.on("connect", connect)
    # who may enter which room is for the host to say: here, every user
    for noun, key, channel in (
        ("room", "room_id", room_channel),
        ("job_room", "job_name", jobs_channel),
        ("provider_room", "provider_name", providers_channel),
    ):
        for verb, change in (("join", tsio.enter_room), ("leave", tsio.leave_room)):

            async def handle(
                sid: str,
                data: Any,
                key: str = key,
                channel: Callable[[str], str] = channel,
                change: Any = change,
            ) -> None:
                name = data.get(key) if isinstance(data, dict) else None
                # each is kept as long as the connection
                if isinstance(name, str) and len(name) <= MAX_NAME:
                    await change(sid, channel(name))

            tsio.on(f"{verb}_{noun}", handle)
    return tsio


async def prepare_database(state: Any) -> None:
    """Make the tables, the administrator, and whom ``@internal`` tasks report as."""
    service = auth.User(
        id=SERVICE_ID,
        email="internal@host.invalid",
        hashed_password=PasswordHelper().hash(secrets.token_urlsafe()),
        is_superuser=True,
    )
    async with state.engine.begin() as connection:
        # of processes that start together, one at a time
        for statement in EXCLUSIVELY[connection.dialect.name]:
            await connection.exec_driver_sql(statement)
        await connection.run_sync(auth.Base.metadata.create_all)
        # of the kind that every release of auth can use
        async with SQLModelSession(connection) as session:
            await auth.ensure_default_admin(session, state.auth_settings)
            await session.merge(service)
            await session.commit()


async def on_providers_removed(names: list[Any]) -> None:
    """Hear of providers that went away: drop here what the host keeps of them."""
    log.info("providers removed: %s", ", ".join(map(str, names)))


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Run TaskIQ and the sweeper beside the app."""
    state = app.state
    # or the garbage collector goes through all that was imported, while everybody waits
    gc.collect()
    gc.freeze()
    if state.redis_url:
        # drawn here, not before a fork: Socket.IO drops what a process of its name emitted
        state.tsio.manager.host_id = uuid4().hex
    await prepare_database(state)
    http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://host")
    broker = ListQueueBroker(state.redis_url) if state.redis_url else InMemoryBroker()
    registry = await joblib.register_internal_jobs(
        app,
        broker,
        extensions=EXTENSIONS,
        executor=make_executor(http, state.auth_settings),
        session_maker=state.session_maker,
        mint_token=make_mint_token(state.auth_settings),
    )
    await broker.startup()
    sweeper = asyncio.create_task(
        joblib.run_sweeper(
            session_maker=state.session_maker,
            settings=state.joblib_settings,
            tsio=state.tsio,
            registry=registry,
            on_providers_removed=on_providers_removed,
            app=app,
        )
    )
    await joblib.check_host(app)
    yield
    sweeper.cancel()
    await asyncio.wait([sweeper])
    await broker.shutdown()
    await http.aclose()
    await state.tsio.shutdown()
    if state.redis_url:
        await state.redis.aclose()
    await state.engine.dispose()


def create_app() -> FastAPI:
    """Return the host; nothing is opened before its lifespan begins."""
    app = FastAPI(title="A host of zndraw-joblib", lifespan=lifespan)
    state = app.state
    database_url = os.environ.get("DATABASE_URL", "sqlite+aiosqlite:///zndraw-joblib.db")
    state.redis_url = os.environ.get("REDIS_URL")
    state.auth_settings = auth.AuthSettings()
    state.joblib_settings = joblib.JobLibSettings()
    state.on_providers_removed = on_providers_removed
    state.engine = open_database(database_url)

    base_maker = async_sessionmaker(state.engine)
    state.session_maker = base_maker
    if database_url.startswith("sqlite"):
        # made where it is used: a lock belongs to one event loop, and people's tests run
        # one app in several
        locks: WeakKeyDictionary[Any, asyncio.Lock] = WeakKeyDictionary()

        @asynccontextmanager
        async def locked_maker() -> AsyncIterator[AsyncSession]:
            loop = asyncio.get_running_loop()
            async with locks.setdefault(loop, asyncio.Lock()):
                async with base_maker() as session:
                    yield session

        state.session_maker = locked_maker

    if state.redis_url:
        # who finds all connections taken waits for one instead of failing
        pool = BlockingConnectionPool.from_url(state.redis_url, max_connections=50)
        state.redis = Redis.from_pool(pool)
        state.result_backend = joblib.RedisResults(state.redis)
        state.wakeups = joblib.RedisWakeups(state.redis)
    elif database_url.startswith("postgresql"):
        state.wakeups = joblib.PgWakeups(state.engine)
    state.tsio = socket_server(app, state.redis_url)
    # beneath whichever path the app itself is served
    app.mount("/socket.io", socketio.ASGIApp(state.tsio, socketio_path="/"))
    app.add_exception_handler(joblib.ProblemException, joblib.problem_exception_handler)
    app.add_exception_handler(RequestValidationError, joblib.problem_exception_handler)
    app.include_router(joblib.router)
    app.webhooks.include_router(joblib.webhooks)
    app.include_router(monitoring.router)
    app.include_router(accounts)
    return app


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO)
    port = int(os.environ.get("PORT", "8000"))
    # at its end the server does not wait for requests that wait
    uvicorn.run(create_app(), port=port, timeout_graceful_shutdown=1)

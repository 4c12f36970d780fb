"""A complete host: users, jobs, Socket.IO, TaskIQ and the sweeper in one FastAPI app.

Run it with ``python docs/host.py``. When the app is created it reads the environment:
``DATABASE_URL``, by default a SQLite file; ``REDIS_URL``, by default none (with it and
PostgreSQL any number of replicas may run); ``ZNDRAW_AUTH_...`` and
``ZNDRAW_JOBLIB_...``, the settings of the two libraries.
"""

import asyncio
import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import socketio
import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi_users.password import PasswordHelper
from internal_jobs import EXTENSIONS, SERVICE_ID, make_executor
from redis.asyncio import Redis
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from taskiq import InMemoryBroker
from taskiq_redis import ListQueueBroker
from zndraw_auth import (
    AuthSettings,
    Base,
    User,
    UserCreate,
    UserRead,
    UserUpdate,
    auth_backend,
    create_engine_for_url,
    current_user_scoped_session,
    ensure_default_admin,
    fastapi_users,
)
from zndraw_auth.users import get_jwt_strategy

import zndraw_joblib as joblib
from zndraw_joblib.events import jobs_channel, providers_channel, room_channel
from zndraw_joblib.results import RedisResults


def socket_server(app: FastAPI, redis_url: str | None) -> socketio.AsyncServer:
    """Return a Socket.IO server for people in rooms and for workers."""
    manager = socketio.AsyncRedisManager(redis_url) if redis_url else None
    tsio = socketio.AsyncServer(async_mode="asgi", client_manager=manager)

    async def connect(sid: str, environ: dict[str, Any], auth: Any) -> None:
        token = auth.get("token") if isinstance(auth, dict) else None
        strategy = get_jwt_strategy(app.state.auth_settings)
        try:
            await current_user_scoped_session(app.state.session_maker, strategy, token)
        except HTTPException as exc:
            raise socketio.exceptions.ConnectionRefusedError(exc.detail) from None
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
                sid: str, data: Any, key=key, channel=channel, change=change
            ) -> None:
                if isinstance(data, dict) and isinstance(data.get(key), str):
                    await change(sid, channel(data[key]))

            tsio.on(f"{verb}_{noun}", handle)
    return tsio


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """Make tables and users; run TaskIQ and the sweeper beside the app."""
    state = app.state
    async with state.engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    service = User(
        id=SERVICE_ID,
        email="internal@host.invalid",
        hashed_password=PasswordHelper().hash(secrets.token_urlsafe()),
        is_superuser=True,
    )
    async with state.session_maker() as session:
        await ensure_default_admin(session, state.auth_settings)
        await session.merge(service)
        await session.commit()

    http = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://host")
    broker = ListQueueBroker(state.redis_url) if state.redis_url else InMemoryBroker()
    registry = await joblib.register_internal_jobs(
        app,
        broker,
        extensions=EXTENSIONS,
        executor=make_executor(http, state.auth_settings),
        session_maker=state.session_maker,
    )
    await broker.startup()
    sweeper = asyncio.create_task(
        joblib.run_sweeper(
            session_maker=state.session_maker,
            settings=state.joblib_settings,
            tsio=state.tsio,
            registry=registry,
        )
    )
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
    database_url = os.environ.get(
        "DATABASE_URL", "sqlite+aiosqlite:///zndraw-joblib.db"
    )
    app.state.redis_url = os.environ.get("REDIS_URL")
    app.state.auth_settings = AuthSettings()
    app.state.joblib_settings = joblib.JobLibSettings()
    app.state.engine = create_engine_for_url(database_url)

    base_maker = async_sessionmaker(app.state.engine)
    app.state.session_maker = base_maker
    if database_url.startswith("sqlite"):
        app.state.db_lock = asyncio.Lock()

        @asynccontextmanager
        async def locked_maker() -> AsyncIterator[AsyncSession]:
            async with app.state.db_lock:
                async with base_maker() as session:
                    yield session

        app.state.session_maker = locked_maker

    if app.state.redis_url:
        app.state.redis = Redis.from_url(app.state.redis_url)
        app.state.result_backend = RedisResults(app.state.redis)
    app.state.tsio = socket_server(app, app.state.redis_url)
    app.mount("/socket.io", socketio.ASGIApp(app.state.tsio))
    app.add_exception_handler(joblib.ProblemException, joblib.problem_exception_handler)
    app.add_exception_handler(RequestValidationError, joblib.problem_exception_handler)
    app.include_router(joblib.router)
    for router, prefix in (
        (fastapi_users.get_auth_router(auth_backend), "/auth/jwt"),
        (fastapi_users.get_register_router(UserRead, UserCreate), "/auth"),
        (fastapi_users.get_users_router(UserRead, UserUpdate), "/users"),
    ):
        app.include_router(router, prefix=prefix)
    return app


if __name__ == "__main__":
    port = int(os.environ.get("PORT", "8000"))
    # at its end the server does not wait for requests that wait
    uvicorn.run(create_app(), port=port, timeout_graceful_shutdown=1)

"""The host that is measured: this tree's with the floor beside it, or the release's.

It runs in either environment, so it asks for nothing but what both have. Its first line
on standard output says where it listens and which token is a superuser's.
"""

import asyncio
import json
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

import uvicorn
import zndraw_auth as auth
from fastapi import FastAPI
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from starlette.types import ASGIApp, Receive, Scope, Send
from zndraw_auth.users import get_jwt_strategy

import zndraw_joblib as joblib

USER = auth.User(id=UUID(int=1), email="a@example.org", hashed_password="", is_superuser=True)


def set_synchronous(connection: Any, record: Any) -> None:
    """Set SQLite as docs/sqlite.md says."""
    cursor = connection.cursor()
    cursor.execute("PRAGMA synchronous=NORMAL")
    cursor.close()


def make_app(database_url: str, kind: str) -> FastAPI:
    app = FastAPI()
    app.state.auth_settings = auth.AuthSettings(secret_key="a key for HS256 " * 4)
    app.state.joblib_settings = joblib.JobLibSettings()
    app.state.engine = (
        auth.create_engine_for_url(database_url)
        if kind == "locked"
        # for each of the bench's connections one: what is beyond the pool is opened and
        # closed with each request, and its statements prepared anew
        else create_async_engine(database_url, pool_size=32, pool_use_lifo=True)
    )
    if kind == "wal":
        event.listen(app.state.engine.sync_engine, "connect", set_synchronous)
    # the release reads entities after their commit
    base_maker = async_sessionmaker(app.state.engine, expire_on_commit=False)
    app.state.session_maker = base_maker
    if kind == "locked":
        lock = asyncio.Lock()

        @asynccontextmanager
        async def locked_maker() -> AsyncIterator[AsyncSession]:
            async with lock, base_maker() as session:
                yield session

        app.state.session_maker = locked_maker
    if redis_url := os.environ.get("REDIS_URL"):
        from redis.asyncio import Redis

        app.state.wakeups = joblib.RedisWakeups(Redis.from_url(redis_url))
    app.add_exception_handler(joblib.ProblemException, joblib.problem_exception_handler)
    app.include_router(joblib.router)
    return app


def with_floors(app: FastAPI) -> ASGIApp:
    """Serve the floors' routes beside the app's, with all that the app has.

    Not as routes of the app: the requests of one side would be looked for among those
    of the other one.
    """
    import bench_bare
    import bench_floor

    sides = {}
    for prefix, module in (("/floor/", bench_floor), ("/bare/", bench_bare)):
        side = sides[prefix] = FastAPI()
        side.state = app.state
        side.dependency_overrides = app.dependency_overrides
        side.include_router(module.router)

    async def each(scope: Scope, receive: Receive, send: Send) -> None:
        chosen = next((s for p, s in sides.items() if scope.get("path", "").startswith(p)), app)
        await chosen(scope, receive, send)

    return each


def override_one(app: FastAPI) -> None:
    """Override one dependency, as every host of its own does.

    FastAPI then analyses each dependency of a request anew.
    """
    from zndraw_joblib.dependencies import get_result_backend

    async def backend() -> None:
        raise NotImplementedError

    app.dependency_overrides[get_result_backend] = backend


async def prepare(app: FastAPI, kind: str, beside: str) -> str:
    """Make the tables and a user, and return the user's token."""
    if kind == "wal":
        async with app.state.engine.connect() as connection:
            await connection.exec_driver_sql("PRAGMA journal_mode=WAL")
    async with app.state.engine.begin() as connection:
        await connection.run_sync(auth.Base.metadata.create_all)
        if beside:
            import bench_bare

            for table in bench_bare.TABLES:
                await connection.exec_driver_sql(table)
        async with AsyncSession(connection) as session:
            await session.merge(USER)
            await session.commit()
    return await get_jwt_strategy(app.state.auth_settings).write_token(USER)


async def main(database_url: str, kind: str, beside: str) -> None:
    app = make_app(database_url, kind)
    if os.environ.get("OVERRIDE"):
        override_one(app)
    served = with_floors(app) if beside else app
    token = await prepare(app, kind, beside)
    # of a socket that does not say that it is TCP asyncio lets small writes wait: an
    # answer, head and body, would take as long as a delayed ACK
    listener = socket.socket(proto=socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen(1024)
    config = uvicorn.Config(served, lifespan="on", log_level="critical", timeout_keep_alive=600)
    server = uvicorn.Server(config)
    told: dict[str, Any] = {"port": listener.getsockname()[1], "token": token}
    os.write(1, json.dumps(told).encode() + b"\n")
    await server.serve(sockets=[listener])


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))

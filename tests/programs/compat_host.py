"""A host of 0.1.7, as the programs that ran it were written."""

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import socketio
import uvicorn
import zndraw_auth as auth
import zndraw_socketio
from fastapi import FastAPI
from sqlalchemy.ext.asyncio import async_sessionmaker

import zndraw_joblib as joblib
import zndraw_joblib.models
from zndraw_joblib.sweeper import run_sweeper


class Results:
    """What hosts of 0.1.7 bring to keep the results of providers."""

    def __init__(self) -> None:
        self.kept: dict[str, bytes] = {}
        self.inflight: set[str] = set()
        self.changed = asyncio.Condition()

    async def store(self, key: str, data: bytes, ttl: int) -> None:
        self.kept[key] = data

    async def get(self, key: str) -> bytes | None:
        return self.kept.get(key)

    async def delete(self, key: str) -> None:
        self.kept.pop(key, None)

    async def acquire_inflight(self, key: str, ttl: int) -> bool:
        free = key not in self.inflight
        self.inflight.add(key)
        return free

    async def release_inflight(self, key: str) -> None:
        self.inflight.discard(key)

    async def wait_for_key(self, key: str, timeout: float) -> bytes | None:
        async with self.changed:
            try:
                wait = self.changed.wait_for(lambda: key in self.kept)
                await asyncio.wait_for(wait, timeout)
            except TimeoutError:
                return None
        return self.kept[key]

    async def notify_key(self, key: str) -> None:
        async with self.changed:
            self.changed.notify_all()


engine = auth.create_engine_for_url(os.environ["DATABASE_URL"])
plain = socketio.AsyncServer(async_mode="asgi")
tsio = zndraw_socketio.wrap(plain)


async def connect(sid: str, environ: dict[str, Any], shown: Any) -> None:
    await plain.enter_room(sid, "room:@global")


plain.on("connect", connect)
for noun, key, prefix in (
    ("room", "room_id", "room"),
    ("job_room", "job_name", "jobs"),
    ("provider_room", "provider_name", "providers"),
):

    async def join(sid: str, data: Any, key: str = key, prefix: str = prefix) -> None:
        await plain.enter_room(sid, f"{prefix}:{data[key]}")

    plain.on(f"join_{noun}", join)


@asynccontextmanager
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    async with engine.begin() as connection:
        await connection.run_sync(auth.Base.metadata.create_all)
    async with app.state.session_maker() as session:
        await auth.ensure_default_admin(session, app.state.auth_settings)

    async def get_session() -> AsyncIterator[Any]:
        async with app.state.session_maker() as session:
            yield session

    sweeping = asyncio.create_task(run_sweeper(get_session, app.state.joblib_settings, tsio))
    yield
    sweeping.cancel()
    await engine.dispose()


app = FastAPI(lifespan=lifespan)
app.state.auth_settings = auth.AuthSettings()
app.state.joblib_settings = joblib.JobLibSettings()
app.state.session_maker = async_sessionmaker(engine, expire_on_commit=False)
app.state.db_lock = asyncio.Lock()
app.state.tsio = tsio
results = Results()
app.dependency_overrides[joblib.get_result_backend] = lambda: results
app.add_exception_handler(joblib.ProblemException, joblib.problem_exception_handler)
app.include_router(joblib.router)
users = auth.fastapi_users
app.include_router(users.get_auth_router(auth.auth_backend), prefix="/auth/jwt")
app.mount("/socket.io", socketio.ASGIApp(plain))

if __name__ == "__main__":
    uvicorn.run(app, port=int(os.environ.get("PORT", "8000")))

"""The harness itself: a gate that lets everything through would never be noticed."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Annotated, Any

import anyio
import httpx
import makers
import pytest
import socketio
import strict
from conftest import USERS, Sent, User
from fastapi import APIRouter, BackgroundTasks, Depends, FastAPI, Request
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession
from steps import stored
from zndraw_auth import current_active_user, current_user_scoped_session
from zndraw_auth.db import SessionDep, get_session_maker

Offence = Callable[[Request], Awaitable[Any]]


async def over_a_timer(request: Request) -> None:
    await asyncio.sleep(0.001)


async def over_a_yield(request: Request) -> None:
    await asyncio.sleep(0)


async def over_anyio(request: Request) -> None:
    with anyio.fail_after(1):
        await anyio.sleep(0.001)


async def over_socketio(request: Request) -> None:
    await request.app.state.tsio.emit("jobs_invalidate", {}, room="room:r")


async def over_a_child_task(request: Request) -> None:
    await asyncio.gather(asyncio.sleep(0.001), asyncio.sleep(0.001))


async def over_a_thread(request: Request) -> None:
    await anyio.to_thread.run_sync(int)


async def over_an_async_generator(request: Request) -> None:
    async def ticks() -> AsyncIterator[int]:
        await asyncio.sleep(0)
        yield 1

    async for _ in ticks():
        pass


async def over_the_rest_of_the_body(request: Request) -> None:
    with anyio.move_on_after(0.01):
        while True:
            await request.receive()


async def over_a_cancelled_wait(request: Request) -> None:
    with contextlib.suppress(asyncio.CancelledError), anyio.move_on_after(0.001):
        await asyncio.get_running_loop().create_future()


async def inside_another_session(request: Request) -> None:
    with pytest.raises(RuntimeError, match="inside another one"):
        async with request.app.state.session_maker():
            pass


OFFENCES: list[Offence] = [
    over_a_timer,
    over_a_yield,
    over_anyio,
    over_socketio,
    over_a_child_task,
    over_a_thread,
    over_an_async_generator,
    over_the_rest_of_the_body,
    over_a_cancelled_wait,
    inside_another_session,
]


async def use(session: AsyncSession) -> None:
    await session.execute(text("SELECT 1"))
    await session.commit()


@pytest.fixture
def toys(app: FastAPI) -> APIRouter:
    """Return a router of the host; the host knows its routes from its first request on."""
    return app.router


@pytest.mark.makers("strict")
@pytest.mark.parametrize("offence", OFFENCES)
async def test_strict_tells_of_a_session_held(
    offence: Offence, toys: APIRouter, client: httpx.AsyncClient
):
    @toys.get("/toy")
    async def toy(request: Request, session: SessionDep) -> None:
        await use(session)
        await offence(request)

    assert (await client.get("http://host/toy")).status_code == 200
    violations = strict.take_violations()
    assert violations
    assert offence.__name__ in violations[0]


@pytest.mark.makers("strict")
async def test_strict_tells_of_plain_dependencies(toys: APIRouter, client: httpx.AsyncClient):
    def in_a_thread() -> None: ...

    @toys.get("/toy", dependencies=[Depends(in_a_thread)])
    async def toy(user: Annotated[Any, Depends(current_active_user)]) -> None: ...

    @toys.get("/other")
    async def other(session: SessionDep, none: Annotated[None, Depends(in_a_thread)]) -> None: ...

    await client.get("http://host/toy")
    assert not strict.take_violations()
    await client.get("http://host/other")
    assert "run_in_threadpool" in strict.take_violations()[0]


@pytest.mark.makers("strict")
async def test_strict_tells_of_background_tasks(toys: APIRouter, client: httpx.AsyncClient):
    @toys.get("/toy")
    async def toy(session: SessionDep, tasks: BackgroundTasks) -> None:
        tasks.add_task(asyncio.sleep, 0)

    await client.get("http://host/toy")
    assert "self.background()" in strict.take_violations()[0]


@pytest.mark.makers("strict")
async def test_strict_watches_direct_calls_and_tasks(session_maker: makers.SessionMaker):
    async def sweep() -> None:
        async with session_maker() as session:
            await use(session)
            await asyncio.sleep(0)

    await sweep()
    assert len(strict.take_violations()) == 1
    await asyncio.create_task(sweep())
    assert len(strict.take_violations()) == 1


async def test_no_maker_minds_how_the_house_works(
    toys: APIRouter, client: httpx.AsyncClient, ada: User, events: list[Sent]
):
    async def outbox(request: Request) -> AsyncIterator[None]:
        yield
        await asyncio.sleep(0.001)
        await request.app.state.tsio.emit("jobs_invalidate", {}, room="room:r")

    @toys.post("/act", dependencies=[Depends(outbox)])
    async def act(session: SessionDep, user: Annotated[Any, Depends(current_active_user)]) -> str:
        email = user.email
        await use(session)
        return email

    @toys.get("/wait")
    async def wait(
        session_maker: Annotated[Any, Depends(get_session_maker)],
        user: Annotated[Any, Depends(current_user_scoped_session)],
    ) -> None:
        for _ in range(3):
            async with session_maker() as session:
                await use(session)
            await asyncio.sleep(0.001)

    async with asyncio.TaskGroup() as tasks:
        for _ in range(5):
            tasks.create_task(ada.get("http://host/wait"))
            tasks.create_task(ada.post("http://host/act"))
    answer = await ada.post("http://host/act")
    assert (answer.status_code, answer.json()) == (200, ada.email)
    assert events == [Sent("jobs_invalidate", {}, "room:r")] * 6
    assert (await client.post("http://host/act")).status_code == 401


async def test_a_session_left_open_is_told(maker: str, engine: AsyncEngine):
    session_maker, in_use = makers.make_session_maker(maker, engine)
    async with session_maker() as session:
        await session.execute(text("SELECT 1"))
        with pytest.raises(AssertionError, match="not closed"):
            await makers.assert_closed(in_use, grace=0.01)
    await makers.assert_closed(in_use)
    # it was held while the clock was waited for: on purpose
    strict.take_violations()


@pytest.mark.parametrize("time", range(2))
async def test_every_test_begins_with_the_users_alone(
    engine: AsyncEngine, session_maker: makers.SessionMaker, register: Any, ada: User, time: int
):
    async with engine.connect() as connection:
        assert await connection.scalar(text('SELECT count(*) FROM "user"')) == len(USERS)
    assert not any((await stored(session_maker)).values())
    await register("eve")
    assert (await ada.post("/workers")).status_code == 201


async def test_users_are_told_apart(ada: User, bob: User, admin: User):
    assert len({ada.id, bob.id, admin.id}) == 3
    assert len({ada.token, bob.token, admin.token}) == 3


async def test_browsers_reach_the_server(
    server: str, tsio: socketio.AsyncServer, toys: APIRouter, ada: User
):
    @toys.get("/toy")
    async def toy(session: SessionDep) -> None:
        await use(session)

    async with httpx.AsyncClient(base_url=server) as http:
        assert (await http.get("/toy")).status_code == 200
    heard: asyncio.Queue[Any] = asyncio.Queue()
    async with socketio.AsyncSimpleClient() as browser:
        await browser.connect(server, auth={"token": ada.token})
        browser.client.on("jobs_invalidate", heard.put)
        await tsio.emit("jobs_invalidate", {"a": 1}, room=None)
        assert await asyncio.wait_for(heard.get(), 10) == {"a": 1}


async def test_redis_is_real_and_empty(redis_url: str):
    from redis.asyncio import Redis

    async with Redis.from_url(redis_url) as redis:
        assert await redis.dbsize() == 0
        assert await redis.set("key", 1)

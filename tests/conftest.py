"""Fixtures: a host with real users, over the session maker that `--maker` names.

::

    async def test_heartbeat(ada, bob):          # two ordinary users
        worker = (await ada.post("/workers")).json()
        assert (await bob.patch(f"/workers/{worker['id']}")).status_code == 403

=================  =================================================================
`ada`, `bob`       `User`: an `httpx.AsyncClient` of a registered user, its base URL
                   ends in `/v1/joblib`; has `.id`, `.email`, `.token`
`admin`            the same for the superuser (auth's default admin)
`register(name)`   makes a further user, as `await register("eve")`
`client`           nobody's: no token
`app`              the host of `docs/host.py`, its lifespan left out; set
                   `app.state.joblib_settings` to change settings
`session_maker`    what the host has set; `async with session_maker() as session:`
`events`           what left over Socket.IO, a list of `Sent(event, data, room)`
`tsio`             the real `socketio.AsyncServer` that the host emits through
`server`           URL of the host served over TCP with Socket.IO. It runs in the test's
                   own event loop: blocking clients go to a thread or another process
`redis_url`        URL of a private, empty Redis
`postgres_url`     URL of a private PostgreSQL with the tables made, under any maker
=================  =================================================================

Whatever these clients are answered has to be as the OpenAPI document says (see
``documented.py``).

Coroutine tests need no mark (`anyio_mode = "auto"`). A test that uses no `session_maker`,
directly or through another fixture, says nothing of makers and runs under `plain` alone;
`@pytest.mark.makers("postgres")` restricts a test to the makers that it names. Sessions and
connections that a test leaves open fail it.
"""

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from uuid import UUID

import documented
import host
import httpx
import jwt
import makers
import pytest
import servers
import socketio
import strict
from fastapi import Depends, FastAPI
from fastapi_users.db import SQLAlchemyUserDatabase
from fastapi_users.password import PasswordHelper
from pwdlib import PasswordHash
from pwdlib.hashers.argon2 import Argon2Hasher
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlmodel.ext.asyncio.session import AsyncSession as SQLModelSession
from zndraw_auth import (
    AuthSettings,
    Base,
    UserManager,
    create_engine_for_url,
    ensure_default_admin,
    get_user_db,
    get_user_manager,
)
from zndraw_auth import User as UserRow
from zndraw_auth.settings import get_auth_settings

PREFIX = "/v1/joblib"
PASSWORD = "correct horse battery staple"
AUTH_SETTINGS = AuthSettings(
    secret_key="a key of the tests, long enough for HS256",
    default_admin_email="admin@example.org",
    default_admin_password=PASSWORD,
)
#: argon2 as it is, made cheap: the suite logs in thousands of times
CHEAP = PasswordHelper(PasswordHash((Argon2Hasher(time_cost=1, memory_cost=8, parallelism=1),)))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--maker",
        choices=makers.MAKERS,
        default="plain",
        help="the session maker that the host sets (default: plain)",
    )
    parser.addoption("--renew", action="store_true", help="write docs/statements.md anew")
    parser.addoption(
        "--seconds", type=float, default=4, help="how long replicas are put under load (default: 4)"
    )


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    # a process tells another in UTF-8 what a test logged
    report.sections = [
        (name, text.encode("utf-8", "replace").decode()) for name, text in report.sections
    ]
    return report


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    maker = config.option.maker

    def is_needless(item: pytest.Item) -> bool:
        if mark := item.get_closest_marker("makers"):
            return maker not in mark.args
        return maker != "plain" and "session_maker" not in item.fixturenames

    needless = [item for item in items if is_needless(item)]
    config.hook.pytest_deselected(items=needless)
    items[:] = [item for item in items if item not in needless]


@pytest.fixture(scope="session")
def maker(pytestconfig: pytest.Config) -> str:
    return pytestconfig.option.maker


@pytest.fixture(scope="session")
def anyio_backend(maker: str) -> tuple[str, dict[str, Any]]:
    return "asyncio", {"loop_factory": strict.new_event_loop if maker == "strict" else None}


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    async def create_tables(url: str) -> None:
        engine = create_engine_for_url(url)
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
        await engine.dispose()

    with makers.postgres_server() as url:
        asyncio.run(create_tables(url))
        yield url


@pytest.fixture(scope="session")
def redis_server_url() -> Iterator[str]:
    with servers.redis_server() as url:
        yield url


@pytest.fixture
async def redis_url(redis_server_url: str) -> str:
    from redis.asyncio import Redis

    async with Redis.from_url(redis_server_url) as redis:
        await redis.flushall()
    return redis_server_url


@pytest.fixture(scope="session")
def empty_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "empty.sqlite"
    engine = create_engine(f"sqlite:///{path}")
    Base.metadata.create_all(engine)
    engine.dispose()
    return path


@pytest.fixture
def database_url(maker: str, tmp_path: Path, request: pytest.FixtureRequest) -> str:
    """Return the URL that the host connects to."""
    if maker == "postgres":
        return request.getfixturevalue("postgres_url")
    if maker == "locked-memory":
        return "sqlite+aiosqlite://"
    path = tmp_path / "db.sqlite"
    shutil.copy(request.getfixturevalue("empty_sqlite"), path)
    return f"sqlite+aiosqlite:///{path}"


@pytest.fixture
async def engine(maker: str, database_url: str) -> AsyncIterator[AsyncEngine]:
    """Yield the engine of a database with empty tables."""
    engine = create_engine_for_url(database_url)
    if maker in ("postgres", "locked-memory"):
        async with engine.begin() as connection:
            if maker == "postgres":
                tables = ", ".join(f'"{t.name}"' for t in Base.metadata.sorted_tables)
                await connection.execute(text(f"TRUNCATE {tables}"))
            else:
                await connection.run_sync(Base.metadata.create_all)
    yield engine
    await engine.dispose()


@pytest.fixture
async def session_maker(maker: str, engine: AsyncEngine) -> AsyncIterator[makers.SessionMaker]:
    """Yield what the host sets as its session maker."""
    session_maker, in_use = makers.make_session_maker(maker, engine)
    yield session_maker
    violations = strict.take_violations()
    assert not violations, "\n\n".join(violations)
    await makers.assert_closed(in_use)


class Sent(NamedTuple):
    """An event that left over Socket.IO."""

    event: str
    data: Any
    room: str | None


class RecordingManager(socketio.AsyncManager):
    """The in-process manager of Socket.IO, with a memory."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[Sent] = []

    async def emit(
        self, event: str, data: Any, namespace: str, room: Any = None, **kwargs: Any
    ) -> None:
        # with nobody connected an emit would never suspend, and a session held over it
        # would go unseen
        await asyncio.sleep(0)
        self.sent.append(Sent(event, data, room))
        await super().emit(event, data, namespace, room=room, **kwargs)


async def cheap_user_manager(
    user_db: Annotated[SQLAlchemyUserDatabase[UserRow, UUID], Depends(get_user_db)],
    settings: Annotated[AuthSettings, Depends(get_auth_settings)],
) -> AsyncIterator[UserManager]:
    async for manager in get_user_manager(user_db, settings):
        manager.password_helper = CHEAP
        yield manager


@pytest.fixture
def app(session_maker: makers.SessionMaker) -> FastAPI:
    """Return the host of `docs/host.py`, over the session maker under test.

    Its lifespan doesn't run: nothing sweeps but what a test sweeps.
    """
    app = host.create_app()
    app.state.session_maker = session_maker
    app.state.auth_settings = AUTH_SETTINGS
    app.state.tsio.manager = RecordingManager()
    app.state.tsio.manager.set_server(app.state.tsio)
    app.dependency_overrides[get_user_manager] = cheap_user_manager
    return app


@pytest.fixture
def tsio(app: FastAPI) -> socketio.AsyncServer:
    return app.state.tsio


@pytest.fixture
def events(tsio: socketio.AsyncServer) -> list[Sent]:
    """Return what left over Socket.IO so far; it grows, and may be cleared."""
    return tsio.manager.sent


class User(httpx.AsyncClient):
    """A user's own client of the host."""

    id: UUID
    email: str
    token: str


@pytest.fixture
async def client(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client without a token."""
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(app),
        base_url=f"http://host{PREFIX}",
        event_hooks={"response": [documented.check]},
    ) as client:
        yield client


async def log_in(client: httpx.AsyncClient, app: FastAPI, email: str) -> User:
    answer = await client.post(
        "http://host/auth/jwt/login", data={"username": email, "password": PASSWORD}
    )
    token = answer.raise_for_status().json()["access_token"]
    user = User(
        transport=httpx.ASGITransport(app),
        base_url=f"http://host{PREFIX}",
        headers={"Authorization": f"Bearer {token}"},
        event_hooks={"response": [documented.check]},
    )
    claims = jwt.decode(token, options={"verify_signature": False})
    user.id, user.email, user.token = UUID(claims["sub"]), email, token
    return user


@pytest.fixture
async def register(app: FastAPI, client: httpx.AsyncClient) -> Callable[[str], Awaitable[User]]:
    """Return a function that registers an ordinary user and logs it in."""

    async def register(name: str) -> User:
        email = f"{name}@example.org"
        answer = await client.post(
            "http://host/auth/register", json={"email": email, "password": PASSWORD}
        )
        answer.raise_for_status()
        return await log_in(client, app, email)

    return register


@pytest.fixture
async def ada(register: Callable[[str], Awaitable[User]]) -> User:
    return await register("ada")


@pytest.fixture
async def bob(register: Callable[[str], Awaitable[User]]) -> User:
    return await register("bob")


@pytest.fixture
async def admin(app: FastAPI, client: httpx.AsyncClient, engine: AsyncEngine) -> User:
    """Return the superuser that auth makes from its settings."""
    email = AUTH_SETTINGS.default_admin_email
    # of the kind that every release of auth can use
    async with SQLModelSession(engine) as session:
        # there already, so that auth promotes it and makes no expensive hash
        session.add(UserRow(email=email, hashed_password=CHEAP.hash(PASSWORD)))
        await session.commit()
        await ensure_default_admin(session, AUTH_SETTINGS)
    return await log_in(client, app, email)


@pytest.fixture
async def server(app: FastAPI) -> AsyncIterator[str]:
    """Yield the URL of the host, served over TCP."""
    async with servers.serve(app) as url:
        yield url

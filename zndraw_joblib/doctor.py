"""What is missing or wrong in a host, in plain sentences.

In the host's lifespan, or as a command, which runs the lifespan as a server does::

    await check_host(app)
    python -m zndraw_joblib.doctor module:app
"""

import argparse
import difflib
import inspect
import logging
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime
from importlib import import_module, metadata
from typing import Any, NamedTuple

import anyio
import sqlalchemy as sa
from fastapi import FastAPI
from pydantic import ValidationError
from pydantic_settings import SettingsError
from starlette.requests import Request
from starlette.routing import Mount, NoMatchFound, Router
from zndraw_auth import AuthSettings, get_auth_settings
from zndraw_auth.db import get_session_maker

from zndraw_joblib import dependencies
from zndraw_joblib.database import now
from zndraw_joblib.delivery import runtime_of
from zndraw_joblib.exceptions import ProblemException, describe
from zndraw_joblib.models import JOB, LINK, LOG, PROVIDER, TASK, WORKER
from zndraw_joblib.results import MemoryResults
from zndraw_joblib.settings import JobLibSettings
from zndraw_joblib.waiting import Waiters, wakeups_of

log = logging.getLogger(__name__)

# Where requests fail or anybody may do anything; and where something could work better.
ERROR, WARNING = logging.ERROR, logging.WARNING
# What one check may take, and how far clocks may be apart.
_PATIENCE_SECONDS = 5.0
_CLOCKS_SECONDS = 30.0
_BAD_SETTINGS = (SettingsError, ValidationError)


class Finding(NamedTuple):
    """What is wrong, at a level of `logging`, and what to do."""

    level: int
    sentence: str
    advice: str


Findings = AsyncIterator[tuple[int, str, str]]


async def _given(app: Any, dependency: Callable[..., Any]) -> Any:
    """Return what a dependency, or its override, gives to a request."""
    function = app.dependency_overrides.get(dependency, dependency)
    takes = inspect.signature(function).parameters
    found = function(Request({"type": "http", "app": app})) if takes else function()
    return await found if inspect.isawaitable(found) else found


async def _package(app: Any, processes: int) -> Findings:
    record = "zndraw_joblib/__init__.py,"
    having = {d.name for d in metadata.distributions() if record in (d.read_text("RECORD") or "")}
    for name in having - {"zndraw-joblib", "zndraw_joblib"}:
        advice = "Make a new environment without it, or clean this one as docs/zndraw.md says."
        yield ERROR, f"{name} brings modules named zndraw_joblib, too: they are mixed.", advice


async def _settings(app: Any, processes: int) -> Findings:
    advice = "Correct what begins with ZNDRAW_JOBLIB_ in the environment."
    try:
        await _given(app, dependencies.get_joblib_settings)
    except _BAD_SETTINGS as exc:
        wrong = exc.errors() if isinstance(exc, ValidationError) else []
        told = "; ".join(f"{error['loc'][0]}: {error['msg']}" for error in wrong)
        yield ERROR, f"The settings can't be read: {told or exc}.", advice
    known = [f"ZNDRAW_JOBLIB_{name.upper()}" for name in JobLibSettings.model_fields]
    known += [f"ZNDRAW_AUTH_{name.upper()}" for name in AuthSettings.model_fields]
    known += [f"ZNDRAW_JOBLIB_{name}" for name in ("URL", "TOKEN", "PASSWORD")]
    for name in sorted({name.upper() for name in os.environ} - {*known}):
        ours = name.startswith(("ZNDRAW_JOBLIB_", "ZNDRAW_AUTH_"))
        near = difflib.get_close_matches(name, known, 1, 0.6 if ours else 0.9)
        if ours or near:
            advice = f"Is {near[0]} meant?" if near else "Take it out of the environment."
            yield WARNING, f"{name} in the environment is no setting, and is ignored.", advice


def _host_in(app: FastAPI) -> FastAPI | None:
    """Return the app that has the routes: this one, or one that is mounted in it."""
    mounts = [route for route in app.routes if isinstance(route, Mount)]
    try:
        # by its handler's name: the router may be beneath a prefix
        Router([r for r in app.routes if r not in mounts]).url_path_for("read_limits")
        return app
    except NoMatchFound:
        inner = (_host_in(m.app) for m in mounts if isinstance(m.app, FastAPI))
        return next(filter(None, inner), None)


async def _app(app: Any, processes: int) -> Findings:
    if _host_in(app) is None:
        yield ERROR, "The routes are not there.", "Include the router of zndraw_joblib."
    if ProblemException not in app.exception_handlers:
        yield ERROR, "Problems have no handler: refusals are 500.", "Add problem_exception_handler."
    secret = (await _given(app, get_auth_settings)).secret_key
    if secret == AuthSettings.model_fields["secret_key"].default:
        advice = "Set ZNDRAW_AUTH_SECRET_KEY to 32 characters that nobody knows."
        yield ERROR, "Tokens are signed with the secret of zndraw-auth's source code.", advice


async def _database(app: Any, processes: int) -> Findings:
    journal = None
    async with (await _given(app, get_session_maker))() as session:
        connection = await session.connection()
        there = await connection.run_sync(lambda c: sa.inspect(c).get_multi_columns())
        clock: datetime = (await connection.execute(sa.select(now()))).scalar_one()
        if connection.dialect.name == "sqlite":
            journal = (await connection.exec_driver_sql("PRAGMA journal_mode")).scalar_one()
    columns = {name: {column["name"] for column in there[_, name]} for _, name in there}
    missing, lacking = [], []
    for table in (JOB, WORKER, LINK, PROVIDER, TASK, LOG):
        if table.name not in columns:
            missing.append(table.name)
        else:
            lacking += [
                f"{table.name}.{c.name}" for c in table.c if c.name not in columns[table.name]
            ]
    # tables of 0.1.7 lack one as well, which create_all would make
    if lacking:
        advice = "Bring them up to date as docs/upgrade.md says."
        yield ERROR, f"The tables are of 0.1.7, or another release: no {lacking[0]}.", advice
    elif missing:
        advice = "Call Base.metadata.create_all after zndraw_joblib.models is imported."
        yield ERROR, f"The database has no table {', '.join(missing)}.", advice
    apart = abs((datetime.now(UTC) - clock).total_seconds())
    if apart > _CLOCKS_SECONDS:
        yield WARNING, f"The database's clock is {apart:.0f} s off.", "Use NTP on both machines."
    if journal not in (None, "memory", "wal"):
        advice = "Set journal_mode and synchronous as docs/sqlite.md says."
        yield WARNING, "SQLite runs without WAL: readers and writers wait for each other.", advice
    if journal and processes > 1:
        yield WARNING, f"{processes} processes share one SQLite database.", "Use PostgreSQL."


async def _socketio(app: Any, processes: int) -> Findings:
    tsio = await _given(app, dependencies.get_tsio)
    manager: Any = getattr(tsio, "manager", None)
    if tsio is None:
        yield WARNING, "Without Socket.IO no provider can be read.", "Set app.state.tsio."
    # a manager of one process has no channel to others
    elif processes > 1 and not hasattr(manager, "channel"):
        sentence = f"{processes} processes don't share Socket.IO: each has events of its own alone."
        yield WARNING, sentence, "Give it an AsyncRedisManager, as docs/redis.md says."
    url = getattr(manager, "redis_url", "")
    if url.startswith(("redis:", "rediss:", "unix:")):
        # Socket.IO itself logs that it is away, and goes on
        from redis.asyncio import Redis

        async with Redis.from_url(url, **manager.redis_options) as redis:
            await redis.ping()


async def _result_backend(app: Any, processes: int) -> Findings:
    results = await _given(app, dependencies.get_result_backend)
    if processes > 1 and isinstance(results, MemoryResults):
        sentence = f"{processes} processes don't share results of providers."
        yield WARNING, sentence, "Set app.state.result_backend to RedisResults."
    # of any backend, the host's own included
    await results.get("zndraw-joblib:doctor")


async def _wakeups(app: Any, processes: int) -> Findings:
    wakeups = wakeups_of(app)
    if wakeups is not None:
        with anyio.CancelScope() as scope:
            await wakeups.listen(Waiters(), scope.cancel)
    elif processes > 1:
        sentence = f"{processes} processes don't wake each other: what waits in another one polls."
        yield WARNING, sentence, "Set app.state.wakeups to RedisWakeups or PgWakeups."


async def _sweeper(app: Any, processes: int) -> Findings:
    sweeper = runtime_of(app).sweeper
    if sweeper is None:
        advice = (
            "Start run_sweeper(..., app=app) in a task of the lifespan, before check_host; of the"
            " outer app's, if this app is mounted: no server runs its own."
        )
        yield ERROR, "No sweeper runs: what a worker held that dies is never ended.", advice
    elif sweeper.done():
        exc = None if sweeper.cancelled() else sweeper.exception()
        why = describe(exc) if exc else "it was cancelled"
        if not isinstance(exc, _BAD_SETTINGS):
            yield ERROR, f"The sweeper has ended: {why}.", "Mend this, and start the host again."


_CHECKS = (_package, _settings, _app, _database, _socketio, _result_backend, _wakeups, _sweeper)


def _unusable(app: Any, name: str, exc: Exception) -> Finding:
    if isinstance(exc, AttributeError) and exc.obj is app.state:
        return Finding(ERROR, f"app.state.{exc.name} is not set.", "Set it as docs/mount.md says.")
    why = describe(exc).partition("\n")[0].rstrip(".")
    if isinstance(exc, TimeoutError):
        why = f"there is no answer within {_PATIENCE_SECONDS:.0f} s"
    sentence = f"The host's {name} can't be used: {why}."
    return Finding(ERROR, sentence, "Is it there, reachable, and set as it should be?")


async def check_host(app: FastAPI, processes: int | None = None) -> list[Finding]:
    """Find, log and return what is missing or wrong in a host; nothing of it is raised.

    Call it in the lifespan, when the tables are made and the sweeper is started.

    Parameters
    ----------
    app : FastAPI
        The app that includes the router, or in which that one is mounted.
    processes : int, optional
        How many processes serve its database; by default ``WEB_CONCURRENCY`` of the
        environment, as for uvicorn and gunicorn.
    """
    workers = os.environ.get("WEB_CONCURRENCY", "")
    processes = processes or (int(workers) if workers.isdecimal() else 1)
    app = _host_in(app) or app
    findings: list[Finding] = []
    for check in _CHECKS:
        try:
            with anyio.fail_after(_PATIENCE_SECONDS):
                async for found in check(app, processes):
                    findings += [Finding(*found)]
        except _BAD_SETTINGS:
            # told already
            continue
        except Exception as exc:
            findings.append(_unusable(app, check.__name__[1:], exc))
    for finding in findings:
        log.log(finding.level, "%s %s", finding.sentence, finding.advice)
    return findings


async def _main(address: str) -> int:
    module, _, name = address.partition(":")
    async with AsyncExitStack() as stack:
        try:
            made = getattr(import_module(module), name or "app")
            app = made() if inspect.isroutine(made) else made
            if not isinstance(app, FastAPI):
                # of a host that Socket.IO or a middleware wraps
                raise TypeError("it is no FastAPI app, nor makes one: name the innermost app")
            await stack.enter_async_context(app.router.lifespan_context(app))
        except Exception as exc:
            print(f"error: {address} does not start: {describe(exc)}")
            return 1
        findings = await check_host(app)
    for level, sentence, advice in findings:
        print(f"{logging.getLevelName(level).lower()}: {sentence} {advice}")
    if not findings:
        print("Nothing is missing or wrong.")
    return int(any(finding.level == ERROR for finding in findings))


if __name__ == "__main__":
    parser = argparse.ArgumentParser("python -m zndraw_joblib.doctor")
    parser.add_argument("app", help="module:app, or module:function that returns it")
    address = parser.parse_args().app
    # of a lifespan that asks the doctor, and of what fails meanwhile
    logging.disable()
    sys.exit(anyio.run(_main, address))

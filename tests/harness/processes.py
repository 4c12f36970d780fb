"""Hosts, workers and browsers in processes of their own, as an operator runs them.

::

    async with replicas(tmp_path, 3, postgres_url, redis_url) as hosts:
        async with browsing(hosts[0], "lab") as browser, hosts[1].client() as http:
            ...
"""

import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import host
import httpx
import socketio
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

HANG = 120
DOCS = Path(host.__file__).parent
WORKER = Path(__file__).parent / "end_to_end_worker.py"
ADMIN = {"username": "admin@example.org", "password": secrets.token_urlsafe()}
SECRET = {"ZNDRAW_AUTH_SECRET_KEY": secrets.token_urlsafe()}


async def until(
    done: Callable[[], Any], told: Callable[[], Any] = lambda: "in vain", within: float = HANG
) -> None:
    with anyio.move_on_after(within):
        while not done():
            await anyio.sleep(0.01)
    assert done(), told()


class Process:
    """A process, and what it has written so far."""

    def __init__(self, popen: subprocess.Popen[bytes], log: Path) -> None:
        self.popen = popen
        self.written = log.read_text

    async def writes(self, pattern: str, within: float = HANG) -> str:
        """Return what it writes that is like ``pattern``."""
        await until(
            lambda: re.search(pattern, self.written()) or self.popen.poll() is not None,
            self.written,
            within,
        )
        found = re.search(pattern, self.written())
        assert found, self.written()
        return found[0]

    async def ends(self) -> int:
        """Return its exit status."""
        await until(lambda: self.popen.poll() is not None, self.written)
        return self.popen.returncode


def start(*command: Any, log: Path, python: str = sys.executable, **env: str) -> Process:
    with log.open("wb") as output:
        popen = subprocess.Popen(
            [python, *map(str, command)],
            # while this end is open, docs/tied.py lets it live
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            # a line is written as one: what is printed and what is logged share a file
            env={**os.environ, "PYTHONUNBUFFERED": "", **env},
            start_new_session=True,
        )
    return Process(popen, log)


@asynccontextmanager
async def running(*command: Any, log: Path, **env: str) -> AsyncIterator[Process]:
    """Run Python in a process; it ends with the block, and its children with it."""
    process = start(*command, log=log, **env)
    with process.popen:
        try:
            yield process
        finally:
            # also when it has ended: its children may not have
            with suppress(ProcessLookupError):
                os.killpg(process.popen.pid, signal.SIGKILL)


class Host:
    """A host in a process of its own, and a user of it."""

    def __init__(self, process: Process, url: str, token: str) -> None:
        self.process = process
        self.url = url
        self.token = token

    def client(self) -> httpx.AsyncClient:
        return httpx.AsyncClient(
            base_url=f"{self.url}/v1/joblib",
            headers={"Authorization": f"Bearer {self.token}"},
            timeout=HANG,
        )


@asynccontextmanager
async def starting(
    directory: Path, *, name: str = "host", script: Path = DOCS / "host.py", **env: str
) -> AsyncIterator[Process]:
    """Run a host, by default on a SQLite file; it ends in peace, unless it was killed."""
    settings = {
        "DATABASE_URL": f"sqlite+aiosqlite:///{directory / 'host.db'}",
        "REDIS_URL": "",
        "PORT": "0",
        "ZNDRAW_AUTH_DEFAULT_ADMIN_EMAIL": ADMIN["username"],
        "ZNDRAW_AUTH_DEFAULT_ADMIN_PASSWORD": ADMIN["password"],
        "ZNDRAW_JOBLIB_WORKER_TIMEOUT_SECONDS": "3",
        "ZNDRAW_JOBLIB_SWEEPER_INTERVAL_SECONDS": "0.2",
        **SECRET,
        **env,
    }
    command, log = (DOCS / "tied.py", script), directory / f"{name}.log"
    async with running(*command, log=log, **settings) as process:
        yield process
        if process.popen.poll() == -signal.SIGKILL:
            return
        process.popen.terminate()
        # uvicorn shuts down, and then ends as the signal says
        assert await process.ends() == -signal.SIGTERM
        assert "Application shutdown complete" in process.written()
        assert "Exception in ASGI" not in process.written(), process.written()


async def ready(process: Process) -> Host:
    """Return the host when it serves, with its administrator logged in."""
    # replicas that start together share the machine
    url = await process.writes(r"http://127\S+", within=3 * HANG)
    async with httpx.AsyncClient(base_url=url, timeout=HANG) as http:
        answer = await http.post("/auth/jwt/login", data=ADMIN)
    return Host(process, url, answer.raise_for_status().json()["access_token"])


@asynccontextmanager
async def hosting(directory: Path, **options: Any) -> AsyncIterator[Host]:
    async with starting(directory, **options) as process:
        yield await ready(process)


@asynccontextmanager
async def fresh_database(postgres_url: str, name: str) -> AsyncIterator[str]:
    """Yield the URL of an empty database beside the suite's own."""
    engine = create_async_engine(postgres_url, isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        await connection.execute(text(f"CREATE DATABASE {name}"))
    yield make_url(postgres_url).set(database=name).render_as_string(False)
    async with engine.connect() as connection:
        await connection.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))
    await engine.dispose()


@asynccontextmanager
async def replicas(
    directory: Path, count: int, database_url: str, redis_url: str, **options: Any
) -> AsyncIterator[list[Host]]:
    """Run hosts that share a database, Redis and their users; each may be killed."""
    async with AsyncExitStack() as stack:
        processes = [
            await stack.enter_async_context(
                starting(
                    directory,
                    name=f"replica-{n}",
                    DATABASE_URL=database_url,
                    REDIS_URL=redis_url,
                    **options,
                )
            )
            for n in range(count)
        ]
        yield [await ready(process) for process in processes]
        for process in processes:
            # all at once; each is waited for at the end of its own block
            process.popen.terminate()


@asynccontextmanager
async def working(
    url: str, token: str, room: str, log: Path, *options: str
) -> AsyncIterator[Process]:
    """Run a worker; it serves the room when the block begins."""
    script = (DOCS / "tied.py", WORKER)
    async with running(*script, url, token, room, *options, log=log) as process:
        await process.writes("ready")
        yield process


class Browser:
    """What a browser hears, in order."""

    def __init__(self, tsio: socketio.AsyncClient) -> None:
        self.join = tsio.call
        self.heard: list[tuple[str, dict[str, Any]]] = []
        tsio.on("*", lambda event, data: self.heard.append((event, data)))

    async def hears(self, *names: str) -> list[dict[str, Any]]:
        """Return what it has heard since the last time: exactly these events.

        Of a `task_status_event` the status is named.
        """
        await until(lambda: len(self.heard) >= len(names), lambda: self.heard)
        assert [data.get("status", event) for event, data in self.heard] == [*names]
        events = [data for _, data in self.heard]
        self.heard.clear()
        return events


@asynccontextmanager
async def browsing(host: Host, room: str) -> AsyncIterator[Browser]:
    tsio = socketio.AsyncClient()
    browser = Browser(tsio)
    await tsio.connect(host.url, auth={"token": host.token})
    try:
        await browser.join("join_room", {"room_id": room})
        yield browser
    finally:
        await tsio.disconnect()


async def submit(http: httpx.AsyncClient, room: str, job: str, **payload: Any) -> str:
    answer = await http.post(f"/rooms/{room}/tasks/{job}", json={"payload": payload})
    assert answer.status_code == 202, answer.text
    return answer.json()["id"]


async def read(http: httpx.AsyncClient, path: str, **headers: str) -> Any:
    answer = await http.get(path, headers=headers)
    return answer.raise_for_status().json()

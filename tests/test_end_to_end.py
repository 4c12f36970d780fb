"""The example host, its browsers and its workers, each in a process of its own."""

import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import anyio
import host
import httpx
import pytest
import socketio
from conftest import User
from fastapi import FastAPI
from internal_jobs import EXTENSIONS, Composition
from sqlalchemy import func, make_url, select, text
from sqlalchemy.ext.asyncio import create_async_engine
from taskiq_redis import ListQueueBroker
from zndraw_auth import User as UserRow

from zndraw_joblib import JobLibSettings, register_internal_tasks, request_hash

# a host in a process of its own has a database of its own
pytestmark = pytest.mark.makers("plain")

HANG = 30
DOCS = Path(host.__file__).parent
WORKER = Path(__file__).parent / "end_to_end_worker.py"
COMPOSITION = f"@internal:analysis:{Composition.__name__}"
ADMIN = {"username": "admin@example.org", "password": secrets.token_urlsafe()}
SECRET = {"ZNDRAW_AUTH_SECRET_KEY": secrets.token_urlsafe()}


async def until(
    done: Callable[[], Any], told: Callable[[], Any] = lambda: "in vain"
) -> None:
    with anyio.move_on_after(HANG):
        while not done():
            await anyio.sleep(0.01)
    assert done(), told()


class Process:
    """A process, and what it has written so far."""

    def __init__(self, popen: subprocess.Popen[bytes], log: Path) -> None:
        self.popen = popen
        self.written = log.read_text

    async def writes(self, pattern: str) -> str:
        """Return what it writes that is like ``pattern``."""
        await until(
            lambda: re.search(pattern, self.written()) or self.popen.poll() is not None,
            self.written,
        )
        found = re.search(pattern, self.written())
        assert found, self.written()
        return found[0]

    async def ends(self) -> int:
        """Return its exit status."""
        await until(lambda: self.popen.poll() is not None, self.written)
        return self.popen.returncode


def start(*command: Any, log: Path, **env: str) -> Process:
    with log.open("wb") as output:
        popen = subprocess.Popen(
            [sys.executable, *map(str, command)],
            # while this end is open, docs/tied.py lets it live
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **env},
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
async def hosting(directory: Path, **env: str) -> AsyncIterator[Host]:
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
    script = (DOCS / "tied.py", DOCS / "host.py")
    async with running(*script, log=directory / "host.log", **settings) as process:
        url = await process.writes(r"http://127\S+")
        async with httpx.AsyncClient(base_url=url) as http:
            answer = await http.post("/auth/jwt/login", data=ADMIN)
        yield Host(process, url, answer.raise_for_status().json()["access_token"])
        process.popen.terminate()
        # uvicorn shuts down, and then ends as the signal says
        assert await process.ends() == -signal.SIGTERM
        assert "Application shutdown complete" in process.written()
        assert "Exception in ASGI" not in process.written(), process.written()


@pytest.fixture(scope="module")
async def hosted(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Host]:
    async with hosting(tmp_path_factory.mktemp("host")) as host:
        yield host


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


async def offered(http: httpx.AsyncClient, room: str) -> list[str]:
    """Return what workers offer to a room."""
    jobs = (await read(http, f"/rooms/{room}/jobs"))["items"]
    providers = (await read(http, f"/rooms/{room}/providers"))["items"]
    return [e["full_name"] for e in jobs + providers if e["full_name"] != COMPOSITION]


async def test_a_room_hears_all_that_happens_in_order(hosted: Host, tmp_path: Path):
    job, provider = "lab:analysis:Wait", "lab:numbers:count"
    work = working(hosted.url, hosted.token, "lab", tmp_path / "worker.log")
    async with browsing(hosted, "lab") as browser, hosted.client() as http, work:
        assert (
            await browser.hears("jobs_invalidate", "providers_invalidate") == [{}] * 2
        )
        # as the worker has joined them, so that one connection hears it all
        await browser.join("join_job_room", {"job_name": job, "worker_id": ""})
        room = {"provider_name": provider, "worker_id": ""}
        await browser.join("join_provider_room", room)

        (tmp_path / "done").write_text("well")
        task_id = await submit(http, "lab", job, path=str(tmp_path / "done"))
        pending, available, *held = await browser.hears(
            "pending", "task_available", "claimed", "running", "completed"
        )
        claimed, running, completed = held
        assert available == {"job_name": job, "room_id": "lab", "task_id": task_id}
        task = await read(http, f"/tasks/{task_id}")
        assert task["result"] == "well"
        told = {key: task[key] for key in ("id", "room_id", "created_at")}
        told |= {"name": job, "error": None, "queue_position": None}
        told |= {"started_at": None, "completed_at": None, "worker_id": None}
        (worker_id,) = (await read(http, f"/rooms/lab/jobs/{job}"))["workers"]
        assert pending == {**pending, **told, "queue_position": 1}
        told["worker_id"] = worker_id
        assert claimed == {**claimed, **told}
        told["started_at"] = task["started_at"]
        assert running == {**running, **told}
        told["completed_at"] = task["completed_at"]
        assert completed == {**completed, **told}
        assert None not in (task["started_at"], task["completed_at"])

        answer = await http.get(f"/rooms/lab/providers/{provider}?size=3")
        assert answer.content == b"\x0a\x0b\x0c"
        assert answer.headers["Content-Type"] == "application/octet-stream"
        asked, ready = await browser.hears("provider_request", "provider_result_ready")
        digest = request_hash({"size": "3"})
        assert asked == {
            "request_id": digest,
            "provider_name": provider,
            "params": '{"size":"3"}',
        }
        assert ready == {"provider_name": provider, "request_hash": digest}


async def test_the_sweeper_ends_what_a_killed_worker_held(hosted: Host, tmp_path: Path):
    job, provider = "cellar:analysis:Wait", "cellar:numbers:count"
    work = working(hosted.url, hosted.token, "cellar", tmp_path / "worker.log")
    async with (
        work as worker,
        browsing(hosted, "cellar") as browser,
        hosted.client() as http,
    ):
        assert await offered(http, "cellar") == [job, provider]
        task_id = await submit(http, "cellar", job, path=str(tmp_path / "never"))
        await browser.hears("pending", "claimed", "running")
        worker.popen.kill()
        failed, *_ = await browser.hears(
            "failed", "jobs_invalidate", "providers_invalidate"
        )
        assert (failed["id"], failed["error"]) == (task_id, "Worker disconnected")
        task = await read(http, f"/tasks/{task_id}")
        assert (task["status"], task["error_type"]) == ("failed", "worker_lost")
        assert await offered(http, "cellar") == []
        await hosted.process.writes(f"providers removed: .*{provider}")


async def test_a_worker_that_is_told_to_go_leaves_nothing_behind(
    hosted: Host, tmp_path: Path
):
    job, done = "attic:analysis:Wait", tmp_path / "done"
    work = working(hosted.url, hosted.token, "attic", tmp_path / "worker.log")
    async with (
        work as worker,
        browsing(hosted, "attic") as browser,
        hosted.client() as http,
    ):
        task_id = await submit(http, "attic", job, path=str(done))
        *_, running = await browser.hears("pending", "claimed", "running")
        worker.popen.terminate()
        states: dict[str, str] = {}
        with anyio.fail_after(HANG):
            while states.get(running["worker_id"]) != "draining":
                listed = (await read(http, "/workers"))["items"]
                states = {worker["id"]: worker["state"] for worker in listed}
        # what comes now is another worker's
        late = await submit(http, "attic", job, path=str(done))
        await browser.hears("pending")
        done.write_text("to the end")
        assert await worker.ends() == 0, worker.written()
        await browser.hears("completed", "jobs_invalidate", "providers_invalidate")
        assert (await read(http, f"/tasks/{task_id}"))["result"] == "to the end"
        listed = (await read(http, "/workers"))["items"]
        assert running["worker_id"] not in [worker["id"] for worker in listed]
        # the job stays for the task that waits, and no longer
        assert await offered(http, "attic") == [job]
        await http.patch(f"/tasks/{late}", json={"status": "cancelled"})
        await browser.hears("cancelled", "jobs_invalidate")
        assert await offered(http, "attic") == []


async def test_a_worker_without_websocket_is_given_tasks_at_once(
    app: FastAPI, server: str, ada: User, tmp_path: Path
):
    # nothing looks by itself: its claim waits at the host and has to be woken
    app.state.joblib_settings = JobLibSettings(recheck_seconds=3600)
    (tmp_path / "done").write_text("")
    work = working(server, ada.token, "lab", tmp_path / "log", "--no-websocket")
    async with work:
        for _ in range(3):
            await anyio.sleep(0.2)
            task_id = await submit(
                ada, "lab", "lab:analysis:Wait", path=str(tmp_path / "done")
            )
            task = await read(ada, f"/tasks/{task_id}", prefer="wait=20")
            assert task["status"] == "completed"


async def test_what_the_host_runs_itself(hosted: Host):
    async with browsing(hosted, "office") as browser, hosted.client() as http:
        await browser.join("join_job_room", {"job_name": COMPOSITION, "worker_id": ""})
        task_id = await submit(http, "office", COMPOSITION, symbols=["Cu", "O", "Cu"])
        # no `task_available`: it is no worker's
        await browser.hears("claimed", "running", "completed")
        task = await read(http, f"/tasks/{task_id}")
        assert task["result"] == {"Cu": 2, "O": 1}


async def test_what_is_delivered_twice_through_redis_runs_once(
    redis_url: str, tmp_path: Path
):
    async with (
        hosting(tmp_path, REDIS_URL=redis_url) as host,
        browsing(host, "office") as browser,
        host.client() as http,
    ):
        symbols = ["Cu", "O", "Cu"]
        task_id = await submit(http, "office", COMPOSITION, symbols=symbols)
        await browser.hears("claimed")
        broker = ListQueueBroker(redis_url)
        again = register_internal_tasks(broker, EXTENSIONS, None)
        await again.send(
            COMPOSITION, task_id=task_id, room_id="office", payload={"symbols": symbols}
        )
        await broker.shutdown()
        command = ("-m", "taskiq", "worker", "--workers=1", f"--app-dir={DOCS}")
        async with running(
            *command,
            "internal_jobs:worker_broker",
            log=tmp_path / "taskiq.log",
            HOST_URL=host.url,
            REDIS_URL=redis_url,
            # it has none
            DATABASE_URL="none://",
            **SECRET,
        ):
            await browser.hears("running", "completed")
            asked = f'PATCH /v1/joblib/tasks/{task_id} HTTP/1.1" '

            def answers() -> list[str]:
                return re.findall(asked + r"(\d+)", host.process.written())

            await until(lambda: len(answers()) >= 3, answers)
            # what a second run would report has come before the end of another task
            await submit(http, "office", COMPOSITION, symbols=[])
            await browser.hears("claimed", "running", "completed")
            # start and end of the one that ran; the start of the other
            assert sorted(answers()) == ["200", "200", "409"]
        task = await read(http, f"/tasks/{task_id}")
        assert task["result"] == {"Cu": 2, "O": 1}


@pytest.mark.makers("postgres")
async def test_replicas_may_start_together_on_an_empty_database(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
):
    engine = create_async_engine(postgres_url, isolation_level="AUTOCOMMIT")
    async with engine.connect() as connection:
        await connection.execute(text("CREATE DATABASE fresh"))
    fresh = make_url(postgres_url).set(database="fresh")
    monkeypatch.setenv("DATABASE_URL", fresh.render_as_string(hide_password=False))
    monkeypatch.setenv("ZNDRAW_AUTH_DEFAULT_ADMIN_EMAIL", ADMIN["username"])
    monkeypatch.setenv("ZNDRAW_AUTH_DEFAULT_ADMIN_PASSWORD", ADMIN["password"])
    users = []

    async def replica() -> None:
        app = host.create_app()
        async with host.lifespan(app), app.state.session_maker() as session:
            users.append(
                await session.scalar(select(func.count()).select_from(UserRow))
            )

    async with anyio.create_task_group() as tasks:
        for _ in range(4):
            tasks.start_soon(replica)
    assert users == [2] * 4
    async with engine.connect() as connection:
        await connection.execute(text("DROP DATABASE fresh"))
    await engine.dispose()

"""The example host, its browsers and its workers, each in a process of its own."""

from collections.abc import AsyncIterator
from pathlib import Path

import anyio
import host
import httpx
import pytest
from conftest import User
from fastapi import FastAPI
from internal_jobs import Composition
from processes import ADMIN, HANG, Host, browsing, fresh_database, hosting, read, submit, working
from sqlalchemy import func, select
from zndraw_auth import User as UserRow

from zndraw_joblib import JobLibSettings, request_hash
from zndraw_joblib.events import room_channel

# a host in a process of its own has a database of its own
pytestmark = pytest.mark.makers("plain")

COMPOSITION = f"@internal:analysis:{Composition.__name__}"


@pytest.fixture(scope="module")
async def hosted(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Host]:
    async with hosting(tmp_path_factory.mktemp("host")) as host:
        yield host


async def offered(http: httpx.AsyncClient, room: str) -> list[str]:
    """Return what workers offer to a room."""
    jobs = (await read(http, f"/rooms/{room}/jobs"))["items"]
    providers = (await read(http, f"/rooms/{room}/providers"))["items"]
    return [e["full_name"] for e in jobs + providers if e["full_name"] != COMPOSITION]


async def test_a_room_hears_all_that_happens_in_order(hosted: Host, tmp_path: Path):
    job, provider = "lab:analysis:Wait", "lab:numbers:count"
    work = working(hosted.url, hosted.token, "lab", tmp_path / "worker.log")
    async with browsing(hosted, "lab") as browser, hosted.client() as http, work:
        assert await browser.hears("jobs_invalidate", "providers_invalidate") == [{}] * 2
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
        assert asked == {"request_id": digest, "provider_name": provider, "params": '{"size":"3"}'}
        assert ready == {"provider_name": provider, "request_hash": digest}


async def test_the_sweeper_ends_what_a_killed_worker_held(hosted: Host, tmp_path: Path):
    job, provider = "cellar:analysis:Wait", "cellar:numbers:count"
    work = working(hosted.url, hosted.token, "cellar", tmp_path / "worker.log")
    async with work as worker, browsing(hosted, "cellar") as browser, hosted.client() as http:
        assert await offered(http, "cellar") == [job, provider]
        task_id = await submit(http, "cellar", job, path=str(tmp_path / "never"))
        await browser.hears("pending", "claimed", "running")
        worker.popen.kill()
        failed, *_ = await browser.hears("failed", "jobs_invalidate", "providers_invalidate")
        assert failed["id"] == task_id
        assert failed["error"].startswith("Worker disconnected: ")
        task = await read(http, f"/tasks/{task_id}")
        assert (task["status"], task["error_type"]) == ("failed", "worker_lost")
        assert await offered(http, "cellar") == []
        await hosted.process.writes(f"providers removed: .*{provider}")


async def test_a_worker_that_is_told_to_go_leaves_nothing_behind(hosted: Host, tmp_path: Path):
    job, done = "attic:analysis:Wait", tmp_path / "done"
    work = working(hosted.url, hosted.token, "attic", tmp_path / "worker.log")
    async with work as worker, browsing(hosted, "attic") as browser, hosted.client() as http:
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
            task_id = await submit(ada, "lab", "lab:analysis:Wait", path=str(tmp_path / "done"))
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


@pytest.mark.makers("postgres")
async def test_replicas_may_start_together_on_an_empty_database(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("ZNDRAW_AUTH_DEFAULT_ADMIN_EMAIL", ADMIN["username"])
    monkeypatch.setenv("ZNDRAW_AUTH_DEFAULT_ADMIN_PASSWORD", ADMIN["password"])
    users = []

    async def replica() -> None:
        app = host.create_app()
        async with host.lifespan(app), app.state.session_maker() as session:
            users.append(await session.scalar(select(func.count()).select_from(UserRow)))

    async with fresh_database(postgres_url, "fresh") as fresh:
        monkeypatch.setenv("DATABASE_URL", fresh)
        async with anyio.create_task_group() as tasks:
            for _ in range(4):
                tasks.start_soon(replica)
        assert users == [2] * 4


async def test_a_process_draws_its_identity_after_it_was_forked(
    redis_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Socket.IO drops what was emitted under its own identity: of others it has to hear."""
    monkeypatch.setenv("DATABASE_URL", f"sqlite+aiosqlite:///{tmp_path}/host.db")
    monkeypatch.setenv("REDIS_URL", redis_url)
    app = host.create_app()
    before_the_fork = app.state.tsio.manager.host_id
    async with host.lifespan(app):
        assert app.state.tsio.manager.host_id != before_the_fork


async def test_a_browser_makes_the_host_keep_no_long_names(app: FastAPI):
    tsio = app.state.tsio
    join = tsio.handlers["/"]["join_room"]
    sid = await tsio.manager.connect("a connection", "/")
    for room in ("lab", "r" * 100_000, 5, None):
        await join(sid, {"room_id": room})
    assert set(tsio.rooms(sid)) == {sid, room_channel("lab")}

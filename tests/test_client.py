"""The worker's side against the real host over TCP, with faults put in between."""

import asyncio
import io
import itertools
import json
import logging
import math
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import urlsplit

import anyio
import httpx
import numpy as np
import pytest
import servers
from anyio.to_thread import run_sync
from conftest import AUTH_SETTINGS, PASSWORD, PREFIX
from pydantic import Field, field_validator
from sqlalchemy import delete

from zndraw_joblib import client_transport
from zndraw_joblib.client import (
    Category,
    ClaimedTask,
    Extension,
    JobManager,
    TaskCancelled,
    TaskFailed,
)
from zndraw_joblib.client_api import HostApi, proxy_for
from zndraw_joblib.models import WorkerJobLink
from zndraw_joblib.provider import Provider
from zndraw_joblib.schemas import JobPolicy, TaskResponse
from zndraw_joblib.settings import JobLibSettings

# it is the client that is tested: the routes are, under every maker, elsewhere
pytestmark = [pytest.mark.makers("plain"), pytest.mark.usefixtures("own_directory")]

ROOM = "lab"
HANG = 120


class Work(Extension):
    """A job whose execution the test decides on."""

    category: ClassVar[Category] = Category.ANALYSIS
    what: str = ""
    # JSON has no tuples: a strict field takes a list only from JSON
    cell: tuple[int, ...] = Field(default=(), strict=True)

    @field_validator("what")
    @classmethod
    def check(cls, what: str) -> str:
        # the schema can't say so, and the host lets it in
        if what == "unfit":
            raise SystemExit("not even a validator ends the worker")
        return what

    def run(self, vis: Any, **kwargs: Any) -> Any:
        raise NotImplementedError


JOB = f"@global:analysis:{Work.__name__}"


def kept(error: str) -> Any:
    """Return the result that a task's error says is in a file, if it does."""
    found = re.search(r"; the result is kept in (.*) on \S+$", error)
    if found is None:
        return None
    content = Path(found[1]).read_bytes()
    return pickle.loads(content) if found[1].endswith(".pickle") else json.loads(content)


class Meddler:
    """Stands before the host: notes every request, and does what a test wants."""

    def __init__(self, app: Any) -> None:
        self.app = app
        self.requests: list[tuple[str, str]] = []
        self.bodies: list[Any] = []
        #: called with method, path and the answer's body; a status loses the answer
        self.lose: Callable[[str, str, bytes], int | None] = lambda *_: None
        #: called with method and path; a status keeps the request from the host
        self.refuse: Callable[[str, str], Any] = lambda *_: None
        #: called with method, path and the answer's body; returns another one
        self.change: Callable[[str, str, bytes], bytes] = lambda _, __, body: body
        #: of the body of the request at hand
        self.length = 0
        self.forget_prefer = False
        #: is as old as 0.1.7: it knows nothing of batches
        self.old = False

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(PREFIX):
            await self.app(scope, receive, send)
            return
        method, path = scope["method"], scope["path"].removeprefix(PREFIX)
        self.requests.append((method, path))
        self.length = int(dict(scope["headers"]).get(b"content-length", 0))
        if own := self.refuse(method, path):
            await self.answer(send, *((own,) if isinstance(own, int) else own))
            return
        if self.forget_prefer:
            headers = [h for h in scope["headers"] if h[0] != b"prefer"]
            scope = {**scope, "headers": headers}
        if self.old and re.search(r"/batches/|/tasks(/query)?$|/limits$", path):
            scope = {**scope, "path": f"{PREFIX}/nowhere"}
        answer: list[Any] = []

        async def take() -> Any:
            message = await receive()
            if self.old and "body" in message:
                body = re.sub(rb"start|max_tasks", b"unknown", message["body"])
                message = {**message, "body": body}
            if message.get("body", b"").startswith(b"{"):
                # a large one comes in pieces
                with suppress(ValueError):
                    self.bodies.append(json.loads(message["body"]))
            return message

        async def keep(message: Any) -> None:
            answer.append(message)

        await self.app(scope, take, keep)
        body = b"".join(message.get("body", b"") for message in answer)
        lost = self.lose(method, path, body)
        if asyncio.iscoroutine(lost):
            lost = await lost
        if lost:
            await self.answer(send, lost)
            return
        changed = self.change(method, path, body)
        if changed != body:
            headers = [h for h in answer[0]["headers"] if h[0] != b"content-length"]
            answer = [
                {**answer[0], "headers": headers},
                {"type": "http.response.body", "body": changed},
            ]
        for message in answer:
            await send(message)

    def limit(self, **limits: int) -> None:
        """Let the host say that it takes no more than this."""
        self.change = lambda method, path, body: (
            json.dumps({**json.loads(body), **limits}).encode() if path == "/limits" else body
        )

    async def answer(
        self,
        send: Any,
        status: int,
        kind: str = "",
        body: bytes = b"",
        headers: Iterable[tuple[bytes, bytes]] = (),
    ) -> None:
        body = b"" if status in (204, 304) else body
        headers = [(b"content-type", kind.encode()), *headers] if kind else [*headers]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    def count(self, method: str, path: str) -> int:
        return self.requests.count((method, path))


@pytest.fixture
def meddler(app: Any) -> Meddler:
    return Meddler(app)


@pytest.fixture
async def url(meddler: Meddler) -> AsyncIterator[str]:
    async with servers.serve(meddler) as url:
        yield url


MakeManager = Callable[..., JobManager]


@pytest.fixture
async def make(url: str, admin: Any) -> AsyncIterator[MakeManager]:
    """Return a function that makes managers; they have no Socket.IO."""
    made: list[JobManager] = []

    def make(**options: Any) -> JobManager:
        manager = JobManager(HostApi(url, token=admin.token), **options)
        made.append(manager)
        return manager

    yield make
    for manager in made:
        await run_sync(manager.disconnect)
        manager.api.close()


async def submit(user: Any, what: str = "") -> str:
    answer = await user.post(
        f"/rooms/{ROOM}/tasks/{JOB}", json={"payload": {"what": what, "cell": [1, 2]}}
    )
    return answer.raise_for_status().json()["id"]


async def ended(user: Any, task_id: str) -> dict[str, Any]:
    with anyio.fail_after(HANG):
        while True:
            answer = await user.get(f"/tasks/{task_id}", headers={"Prefer": "wait=5"})
            task = answer.raise_for_status().json()
            if task["status"] in ("completed", "failed", "cancelled"):
                return task


async def until(condition: Callable[[], Any]) -> None:
    with anyio.fail_after(HANG):
        while not condition():
            await anyio.sleep(0.01)


async def workers(user: Any) -> list[str]:
    return [w["id"] for w in (await user.get("/workers")).json()["items"]]


# --- running tasks ---


async def test_whatever_a_task_does_the_next_one_is_run(make: MakeManager, ada: Any, app: Any):
    app.state.joblib_settings = JobLibSettings(max_result_bytes=2**20)

    def execute(task: ClaimedTask) -> Any:
        assert task.run_kwargs == {"gpu": 1}
        match task.extension.what:
            case "raise":
                raise ValueError("a lone surrogate \ud800, and \0")
            case "exit":
                sys.exit(3)
            case "interrupt":
                raise KeyboardInterrupt
            case "object":
                return object()
            case "nan":
                return {"energy": float("nan")}
            case "large":
                return "x" * 2_000_000
            case "arrays":
                cell = task.extension.cell
                return {"r": np.arange(2), "e": np.float32(0.5), "cell": cell}
        return None

    manager = make(execute=execute)
    await run_sync(lambda: manager.register(Work, run_kwargs={"gpu": 1}))
    wrong = {
        "unfit": "SystemExit: not even a validator ends the worker",
        "raise": "ValueError: a lone surrogate ?, and \ufffd",
        "exit": "SystemExit: 3",
        "interrupt": "KeyboardInterrupt",
        "object": "ValueError: the result can't be kept as JSON: object is not JSON",
        "nan": "ValueError: the result can't be kept as JSON: result.energy is nan",
        "large": "the host refused the result: ",
    }
    tasks = {what: await submit(ada, what) for what in (*wrong, "arrays", "")}
    for what, error in wrong.items():
        task = await ended(ada, tasks[what])
        assert (task["status"], task["attempt"]) == ("failed", 1), what
        assert task["error"].startswith(error)
        result = kept(task["error"])
        match what:
            case "object":
                assert type(result) is object
            case "nan":
                assert math.isnan(result["energy"])
            case "large":
                assert result == "x" * 2_000_000
            case _:
                assert result is None
    arrays = await ended(ada, tasks["arrays"])
    assert arrays["result"] == {"r": [0, 1], "e": 0.5, "cell": [1, 2]}
    assert (await ended(ada, tasks[""]))["status"] == "completed"


async def test_a_task_of_an_unknown_job_is_failed(make: MakeManager, ada: Any, admin: Any):
    manager = make(execute=lambda task: None)
    await run_sync(manager.register, Work)
    stranger = {"category": "analysis", "name": "Else", "worker_id": str(manager.worker_id)}
    await admin.put("/rooms/@global/jobs", json={**stranger, "max_attempts": 5})
    answer = await ada.post(f"/rooms/{ROOM}/tasks/@global:analysis:Else", json={})
    task = await ended(ada, answer.json()["id"])
    assert task["error"] == "this worker does not serve @global:analysis:Else"
    assert task["attempt"] == 1
    assert (await ended(ada, await submit(ada)))["status"] == "completed"


async def test_policy_of_a_job(make: MakeManager, ada: Any):
    attempts: list[int | None] = []

    def execute(task: ClaimedTask) -> None:
        attempts.append(task.attempt)
        if len(attempts) < 3:
            raise ValueError("not yet")

    manager = make(execute=execute)
    register = manager.register(policy=JobPolicy(max_attempts=3))
    assert await run_sync(register, Work) is Work
    assert (await ended(ada, await submit(ada)))["status"] == "completed"
    assert attempts == [1, 2, 3]


# --- cancels and progress ---


async def test_a_cancel_stops_the_running_task_without_websocket(make: MakeManager, ada: Any):
    running, stopped = threading.Event(), threading.Event()

    def execute(task: ClaimedTask) -> None:
        if not task.extension.what:
            return
        running.set()
        try:
            for _ in range(100 * HANG):
                task.raise_if_cancelled()
                time.sleep(0.01)
        except TaskCancelled:
            stopped.set()
            raise

    manager = make(execute=execute, heartbeat_interval=10 * HANG)
    await run_sync(manager.register, Work)
    task = await submit(ada, "long")
    await until(running.is_set)
    await ada.patch(f"/tasks/{task}", json={"status": "cancelled"})
    await until(stopped.is_set)
    assert (await ended(ada, await submit(ada)))["status"] == "completed"
    assert (await ended(ada, task))["status"] == "cancelled"


async def test_a_cancelled_claim_is_not_run(make: MakeManager, ada: Any, meddler: Meddler):
    ran: list[str] = []
    manager = make(execute=lambda task: ran.append(task.task_id))
    cancelled = anyio.Event()

    async def cancel_claimed(body: bytes) -> None:
        for task in json.loads(body)["tasks"]:
            await ada.patch(f"/tasks/{task['id']}", json={"status": "cancelled"})
            cancelled.set()

    meddler.lose = lambda method, path, body: (
        cancel_claimed(body) if path == "/tasks/claim" and not cancelled.is_set() else None
    )
    await run_sync(manager.register, Work)
    first = await submit(ada)
    with anyio.fail_after(HANG):
        await cancelled.wait()
    second = await submit(ada)
    await ended(ada, second)
    assert ran == [second]
    assert (await ended(ada, first))["status"] == "cancelled"


async def test_progress_is_coalesced(make: MakeManager, ada: Any, meddler: Meddler):
    told: list[int] = []

    def progress_told() -> list[dict[str, Any]]:
        beats = [t for b in list(meddler.bodies) for t in b.get("tasks", [])]
        return [task for task in beats if "progress" in task]

    def execute(task: ClaimedTask) -> None:
        while len(progress_told()) < 2 and len(told) < 1000 * HANG:
            told.append(1)
            # out of bounds and unprintable: the heartbeat must get through
            task.progress(len(told) / 100, f"step\n{len(told)}\x00")
            time.sleep(0.001)
        task.progress(0.75)

    manager = make(execute=execute)
    await run_sync(manager.register, Work)
    task = await ended(ada, await submit(ada))
    assert task["status"] == "completed"
    sent = progress_told()
    assert 2 <= len(sent) <= 4 < len(told)
    assert all(0 < t["progress"] <= 1 for t in sent)
    assert task["progress_message"].startswith("step ")


async def test_a_task_goes_on_where_it_was_stopped(make: MakeManager, ada: Any):
    done: list[int] = []
    refused: list[str] = []

    def execute(task: ClaimedTask) -> Any:
        state = task.saved or {"step": 0}
        for step in range(state["step"], 6):
            done.append(step)
            state["step"] = step + 1
            task.save(state)
            if len(done) == 4:
                for unfit in ("x" * 64 * 1024, {"e": np.nan}, object(), None):
                    with pytest.raises(ValueError, match="checkpoint") as raised:
                        task.save(unfit)
                    refused.append(str(raised.value))
                # it has not gone with a heartbeat yet
                raise RuntimeError("half way")
        return task.saved

    manager = make(execute=execute, concurrency=2)
    await run_sync(partial(manager.register, Work, policy=JobPolicy(max_attempts=2)))
    task = await ended(ada, await submit(ada))
    assert (task["status"], task["attempt"], task["result"]) == ("completed", 2, {"step": 6})
    assert done == [0, 1, 2, 3, 4, 5]
    assert refused[0].startswith("the checkpoint has 65538 bytes as JSON, and may have 65536")
    assert "checkpoint.e is nan" in refused[1]


async def test_a_checkpoint_that_the_host_refuses_stops_no_heartbeat(
    make: MakeManager, ada: Any, app: Any
):
    app.state.joblib_settings = JobLibSettings(max_payload_bytes=50_000)
    began, cancelled = threading.Event(), threading.Event()

    def execute(task: ClaimedTask) -> Any:
        task.save("x" * 60_000)
        began.set()
        while not task.cancelled:
            time.sleep(0.01)
        cancelled.set()
        task.raise_if_cancelled()

    manager = make(execute=execute)
    await run_sync(manager.register, Work)
    task = await submit(ada)
    assert await run_sync(began.wait, HANG)
    await ada.patch(f"/tasks/{task}", json={"status": "cancelled"})
    # with a heartbeat
    assert await run_sync(cancelled.wait, HANG)


# --- faults ---


async def test_lost_answers_lose_no_task_and_run_none_twice(
    make: MakeManager, ada: Any, meddler: Meddler
):
    ran: list[str] = []
    lost: dict[tuple[str, str], int] = {}

    def lose(method: str, path: str, body: bytes) -> int | None:
        if path == "/tasks/claim" and b'"task":null' in body:
            return None
        status = json.loads(body).get("status", "") if body else ""
        lost[path, status] = lost.get((path, status), 0) + 1
        return 502 if method != "GET" and lost[path, status] == 1 else None

    meddler.lose = lose
    manager = make(execute=lambda task: ran.append(task.task_id))
    await run_sync(manager.register, Work)
    submitter = make()
    first = await run_sync(submitter.submit, Work(), ROOM)
    second = await run_sync(submitter.submit, Work(), ROOM)
    finished = await run_sync(submitter.wait_all, [first, second], HANG)
    assert [(t.status.value, t.attempt) for t in finished] == [("completed", 1)] * 2
    assert ran == [first, second]
    total = (await ada.get(f"/rooms/{ROOM}/tasks")).json()["total"]
    assert total == 2, "a submission whose answer got lost was made twice"


async def test_a_host_that_never_answered_is_asked_a_few_times(make: MakeManager, meddler: Meddler):
    meddler.refuse = lambda *_: 503
    with pytest.raises(ConnectionError):
        await run_sync(make(max_startup_retries=1).register, Work)
    assert meddler.count("POST", "/workers") == 2
    meddler.refuse = lambda *_: None


async def test_a_worker_that_was_taken_for_dead_registers_again(
    make: MakeManager, ada: Any, admin: Any
):
    running = threading.Event()
    stopped: list[bool] = []

    def execute(task: ClaimedTask) -> None:
        if task.extension.what:
            running.set()
            until = time.monotonic() + HANG
            while not task.cancelled and time.monotonic() < until:
                time.sleep(0.01)
            stopped.append(task.cancelled)

    manager = make(execute=execute)
    await run_sync(manager.register, Work)
    first = manager.worker_id
    lost = await submit(ada, "long")
    await until(running.is_set)
    (await admin.delete(f"/workers/{first}")).raise_for_status()
    await until(lambda: stopped and manager.worker_id != first)
    assert (await ended(ada, await submit(ada)))["status"] == "completed"
    assert stopped == [True]
    assert (await ended(ada, lost))["error"].startswith("Worker disconnected: ")
    assert await workers(admin) == [str(manager.worker_id)] != [str(first)]


async def test_a_refused_token_is_asked_for_anew(
    make: MakeManager, url: str, app: Any, register: Any
):
    manager = JobManager.connect(
        url, user=AUTH_SETTINGS.default_admin_email, password=PASSWORD, execute=lambda task: "done"
    )
    stuck = make(execute=lambda task: None, heartbeat_interval=0.1, max_unreachable_seconds=1)
    await run_sync(manager.register, Work)
    await run_sync(stuck.register, Work)
    # every token given out so far is void
    secret = "another key of the tests, long enough too"
    app.state.auth_settings = AUTH_SETTINGS.model_copy(
        update={"secret_key": AUTH_SETTINGS.secret_key.__class__(secret)}
    )
    eve = await register("eve")
    with pytest.raises(PermissionError):
        await run_sync(stuck.wait)
    assert (await ended(eve, await submit(eve)))["result"] == "done"
    await run_sync(manager.disconnect)


async def test_wrong_credentials(url: str):
    manager = JobManager.connect(url, user="nobody@example.org", password="wrong")
    with pytest.raises(PermissionError):
        await run_sync(manager.register, Work)
    with pytest.raises(ValueError, match="give a token"):
        JobManager.connect(url, user="nobody@example.org")
    await run_sync(manager.disconnect)


# --- what comes from something in between ---

HTML = ("text/html", b"<html>not the host</html>")
JSON = "application/json"
NO_ROUTE = (404, JSON, b'{"detail": "Not Found"}')
#: status, content type, body
NOT_THE_HOSTS: list[tuple[int, str, bytes]] = [
    *[
        (status, *HTML)
        for status in (
            200,
            204,
            206,
            301,
            302,
            307,
            400,
            401,
            403,
            404,
            405,
            409,
            410,
            413,
            418,
            422,
            429,
            451,
            500,
            502,
            507,
            520,
            530,
            598,
        )
    ],
    (200, JSON, b'{"id": "4b3'),
    (200, JSON, b'{"status": "ok"}'),
    (200, JSON, b"null"),
    (404, JSON, b'{"message": "no Route matched with those values"}'),
    NO_ROUTE,
    # a token that was taken before, refused and then refused anew
    (401, JSON, b'{"detail": "Unauthorized"}'),
    (401, JSON, b'{"detail": "Unauthorized"}'),
    (403, JSON, b'{"detail": "blocked"}'),
    (409, "application/problem+json", b'{"type": "/problems/x", "status": 409}'),
    (409, "application/problem+json", b'{"type": "about:blank", "status": 409}'),
]


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_only_the_hosts_answers_are_verdicts(
    make: MakeManager, ada: Any, meddler: Meddler, monkeypatch: pytest.MonkeyPatch, concurrency: int
):
    """Every request of a task's life meets each of these answers."""
    monkeypatch.setattr(client_transport, "LONGEST_DELAY_SECONDS", 0.01)
    manager = make(execute=lambda task: "kept", concurrency=concurrency)
    await run_sync(manager.register, Work)
    submitter = make()
    # its login has been taken before
    await run_sync(submitter.create_worker)
    wrong: dict[str, list[Any]] = {}

    def refuse(method: str, path: str) -> Any:
        kind = re.sub("[0-9a-f-]{36}", "ID", f"{method} {path}")
        # without its limits a host is told one thing at a time
        left = wrong.setdefault(kind, NOT_THE_HOSTS[: 3 if path == "/limits" else None])
        return left.pop() if left else None

    meddler.refuse = refuse
    ids = await run_sync(lambda: submitter.submit_many([Work(), Work()], ROOM))
    ended = await run_sync(submitter.wait_all, ids, 3 * HANG)
    assert [(t.status.value, t.result, t.attempt) for t in ended] == [("completed", "kept", 1)] * 2
    assert {kind for kind, left in wrong.items() if not left} >= {
        "POST /tasks/claim", "PATCH /tasks/ID",
        f"POST /rooms/{ROOM}/batches/{JOB}", "POST /tasks/query",
    }  # fmt: skip
    assert (await ada.get(f"/rooms/{ROOM}/tasks")).json()["total"] == 2


async def test_a_worker_reads_what_later_hosts_say(make: MakeManager, ada: Any, meddler: Meddler):
    def change(body: bytes) -> bytes:
        body = body.replace(b'"error_type":null', b'"error_type":"eaten"')
        body = body.replace(b'"desired_state":"active"', b'"desired_state":"resting"')
        return body.replace(b'"errors":[]', b'"errors":[{"new":1}],"waiting_for":[]')

    meddler.change = lambda method, path, body: change(body) if "claim" in path else body
    manager = make(execute=lambda task: task.attempt)
    await run_sync(manager.register, Work)
    assert (await ended(ada, await submit(ada)))["result"] == 1
    task = (await ada.get(f"/tasks/{await submit(ada)}")).json()
    later = {**task, "status": "paused", "error_type": "eaten", "more": 1}
    later["errors"] = [{"attempt": 1, "error_type": "eaten", "error": "x"}]
    read = TaskResponse.model_validate(later)
    assert (read.status.value, read.error_type, read.errors[0].error_type) == (
        "paused", "eaten", "eaten",
    )  # fmt: skip


async def test_what_can_never_get_through_is_told_as_a_failure(
    make: MakeManager, ada: Any, meddler: Meddler, monkeypatch: pytest.MonkeyPatch
):
    def refuse(method: str, path: str) -> Any:
        large = meddler.length > 10_000
        return (413, *HTML) if method == "PATCH" and large else None

    meddler.refuse = refuse
    manager = make(execute=lambda task: "x" * 20_000, max_unreachable_seconds=0.3)
    await run_sync(manager.register, Work)
    task = await ended(ada, await submit(ada))
    assert task["error"].startswith("the result could not be reported")
    assert kept(task["error"]) == "x" * 20_000
    assert manager.worker_id is not None


async def test_a_host_that_is_busy_is_not_away(make: MakeManager, ada: Any, meddler: Meddler):
    asked: list[float] = []

    def refuse(method: str, path: str) -> Any:
        if path != "/tasks/claim" or len(asked) >= 3:
            return None
        asked.append(time.monotonic())
        return (429, *HTML, [(b"retry-after", b"1")])

    meddler.refuse = refuse
    manager = make(execute=lambda task: "done", max_unreachable_seconds=0.1, polling_interval=0.01)
    await run_sync(manager.register, Work)
    assert (await ended(ada, await submit(ada)))["result"] == "done"
    assert len(asked) == 3


async def test_giving_up_is_one_clear_error(
    make: MakeManager, meddler: Meddler, caplog: pytest.LogCaptureFixture
):
    manager = make(execute=lambda task: None, heartbeat_interval=0.1, max_unreachable_seconds=1)
    await run_sync(manager.register, Work)
    meddler.refuse = lambda *_: (301, *HTML, [(b"location", b"https://there/")])
    with pytest.raises(ConnectionError, match=r"gave up: .*https://there/") as given_up:
        await run_sync(manager.wait)
    assert given_up.value.__cause__ is None
    assert given_up.value.__suppress_context__
    away = [r.getMessage() for r in caplog.records if "host away for" in r.getMessage()]
    assert len(away) == 1
    assert "giving up at 1 s" in away[0]


async def test_what_is_just_being_registered_is_not_lost(
    make: MakeManager, meddler: Meddler, caplog: pytest.LogCaptureFixture
):
    manager = make()
    await run_sync(manager.create_worker)
    meddler.refuse = lambda method, path: 503 if path.endswith("/jobs") else None
    async with anyio.create_task_group() as group:
        group.start_soon(run_sync, manager.register, Work)
        await until(lambda: meddler.count("PUT", "/rooms/@global/jobs"))
        await run_sync(manager.heartbeat)
        meddler.refuse = lambda *_: None
    await run_sync(manager.heartbeat)
    assert "lost registrations" not in caplog.text
    assert list(manager) == [JOB]


async def test_a_host_that_lost_registrations_gets_them_again(
    make: MakeManager, ada: Any, session_maker: Any, meddler: Meddler
):
    class Second(Work):
        """A job of which the host keeps nothing."""

    manager = make(execute=lambda task: "done", heartbeat_interval=0.2)
    await run_sync(manager.register, Work)
    await run_sync(manager.register, Second)
    first = manager.worker_id
    async with session_maker() as session:
        await session.execute(delete(WorkerJobLink))
        await session.commit()
    for job in (JOB, JOB.replace("Work", "Second")):
        answer = await ada.post(f"/rooms/{ROOM}/tasks/{job}", json={})
        assert (await ended(ada, answer.json()["id"]))["result"] == "done"
    assert manager.worker_id == first


async def test_heartbeats_are_cut_to_what_the_host_takes(
    make: MakeManager, ada: Any, meddler: Meddler
):
    manager = make()
    await run_sync(manager.register, Work)
    for _ in range(5):
        await submit(ada)
    tasks = [await run_sync(manager.claim) for _ in range(5)]
    meddler.limit(max_heartbeat_tasks=2)
    for task in tasks[::2]:
        await ada.patch(f"/tasks/{task.task_id}", json={"status": "cancelled"})
    meddler.bodies.clear()
    await run_sync(manager.heartbeat)
    sent = [len(b["tasks"]) for b in meddler.bodies if "tasks" in b]
    assert sent == [2, 2, 1]
    assert [task.cancelled for task in tasks] == [True, False, True, False, True]


async def test_another_class_of_the_same_name_is_refused(make: MakeManager, ada: Any):
    def other(module: str) -> type[Extension]:
        body = {"__module__": module, "__qualname__": "Work", "__doc__": Work.__doc__}
        return type(Extension)("Work", (Work,), body)

    manager = make()
    await run_sync(manager.register, Work)
    with pytest.raises(ValueError, match=r"test_client\.Work .* else\.Work"):
        await run_sync(manager.register, other("else"))
    # the same one, defined anew as in a notebook
    again = other(Work.__module__)
    await run_sync(manager.register, again)
    assert manager[JOB] is again


async def test_a_task_that_cancels_itself_ends(make: MakeManager, ada: Any):
    def execute(task: ClaimedTask) -> None:
        task.cancel()
        task.raise_if_cancelled()

    manager = make(execute=execute)
    await run_sync(manager.register, Work)
    assert (await ended(ada, await submit(ada)))["status"] == "cancelled"


async def test_wait_runs_what_has_no_execute(make: MakeManager, ada: Any):
    class Plain(Work):
        def run(self, vis: Any, *, task: ClaimedTask, n: int) -> int:
            return n if task.attempt == 1 else 0

    manager = make()
    await run_sync(lambda: manager.register(Plain, run_kwargs={"n": 3}))
    async with anyio.create_task_group() as group:
        group.start_soon(run_sync, manager.wait)
        job = JOB.replace("Work", "Plain")
        answer = await ada.post(f"/rooms/{ROOM}/tasks/{job}", json={})
        assert (await ended(ada, answer.json()["id"]))["result"] == 3
        await run_sync(manager.disconnect)


@pytest.mark.parametrize("concurrency", [1, 2])
async def test_a_log_that_raises_decides_nothing(make: MakeManager, ada: Any, concurrency: int):
    kinds = itertools.cycle([RuntimeError, SystemExit])

    class Broken(logging.Handler):
        def emit(self, record: Any) -> None:
            # in the main thread runs the host, which would end
            in_main = threading.current_thread() is threading.main_thread()
            raise (RuntimeError if in_main else next(kinds))("the log server is away")

    def execute(task: ClaimedTask) -> None:
        if task.extension.what:
            raise ExceptionGroup("all", [ValueError(task.extension.what)])

    log, handler = logging.getLogger("zndraw_joblib"), Broken()
    level = log.level
    log.setLevel(logging.DEBUG)
    log.addHandler(handler)
    try:
        manager = make(execute=execute, concurrency=concurrency)
        await run_sync(manager.register, Work)
        for _ in range(2):
            bad = await ended(ada, await submit(ada, "leaf"))
            assert bad["error"].endswith("ValueError: leaf")
            assert (await ended(ada, await submit(ada)))["status"] == "completed"
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


@pytest.mark.parametrize("token", ["{}\n", " {}", "{}\r\n", "", "\ufeff{}"])
async def test_a_token_that_is_none_is_refused_at_once(
    url: str, admin: Any, meddler: Meddler, caplog: Any, token: str
):
    manager = JobManager.connect(url, token=token.format(admin.token))
    with pytest.raises(ValueError, match="token") as refused:
        await run_sync(manager.register, Work)
    assert admin.token not in f"{refused.value!r} {refused.value} {caplog.text}"
    assert meddler.requests == []
    await run_sync(manager.disconnect)


async def test_wrong_addresses_are_told_apart(url: str, admin: Any):
    for address in ("127.0.0.1:8000", "localhost", "http://", "http://a:b", "ftp://a"):
        with pytest.raises(ValueError, match="address"):
            JobManager.connect(address, token="x")
    for address, told in {
        "http://127.0.0.1:9": "nothing listens there",
        f"{url}/elsewhere": "isn't an answer of a host",
        url.replace("http:", "https:"): "speaks http, not https",
    }.items():
        manager = JobManager.connect(address, token=admin.token, max_startup_retries=0)
        with pytest.raises(ConnectionError, match=told):
            await run_sync(manager.register, Work)
        await run_sync(manager.disconnect)


@pytest.mark.parametrize(
    ("environment", "host", "proxy"),
    [
        ({}, "host", None),
        ({"http_proxy": "http://p:1"}, "host", "http://p:1"),
        ({"http_proxy": "p:1"}, "host", "http://p:1"),
        ({"https_proxy": "p:1"}, "host", None),
        ({"all_proxy": "socks5://p:1"}, "host", "socks5://p:1"),
        ({"http_proxy": "p:1", "no_proxy": "x,host"}, "host", None),
        ({"http_proxy": "p:1", "no_proxy": ".org"}, "a.org", None),
        ({"http_proxy": "p:1", "no_proxy": "127.0.0.0/8"}, "127.0.0.1", None),
        ({"http_proxy": "p:1", "no_proxy": "[::1],::1"}, "[::1]", None),
        ({"http_proxy": "p:1", "no_proxy": "fe80::/10"}, "[fe80::1]", None),
        ({"http_proxy": "p:1", "no_proxy": "fe80::/10"}, "host", "http://p:1"),
    ],
)
def test_one_reading_of_the_proxies(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], host: str, proxy: Any
):
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert proxy_for(httpx.URL(f"http://{host}:8000")) == proxy


def test_a_proxy_or_an_authority_that_is_no_good_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("ALL_PROXY", "gopher://p:1")
    with pytest.raises(ValueError, match="ALL_PROXY"):
        HostApi("http://host", token="x")
    monkeypatch.delenv("ALL_PROXY")
    monkeypatch.setenv("SSL_CERT_FILE", "/no/such/file")
    with pytest.raises(ValueError, match=r"^SSL_CERT_FILE"):
        HostApi("http://host", token="x")


FORK = """
import os, sys
sys.path.insert(0, sys.argv[3])
from zndraw_joblib.client import JobManager
from zndraw_joblib.client_api import HostApi
from end_to_end_worker import Wait

class Kept:
    def __init__(self, api):
        self.http, self.base_url = api.http, api.base_url
        self.get_headers, self.raise_for_status = api.get_headers, api.raise_for_status

api = HostApi(sys.argv[1], token=sys.argv[2])
manager, other = JobManager(api), JobManager(Kept(api))
manager.register(Wait, room="lab")
other.submit(Wait(path="x"), "lab", job_room="lab")
if (pid := os.fork()) == 0:
    for call in (
        lambda: manager.submit(Wait(path="y"), "lab", job_room="lab"),
        lambda: other.submit(Wait(path="z"), "lab", job_room="lab"),
        manager.claim,
        lambda: manager.register(Wait, room="lab"),
    ):
        try:
            call()
            os.write(1, b"worked ")
        except RuntimeError as exc:
            os.write(1, b"fork " if "is a fork" in str(exc) else b"else ")
    manager.disconnect()
    os._exit(0)
os.waitpid(pid, 0)
assert manager.worker_id is not None
manager.submit(Wait(path="w"), "lab", job_room="lab")
manager.disconnect()
"""


async def test_a_fork_has_a_client_of_its_own_or_none(url: str, admin: Any):
    run = await anyio.run_process(
        [sys.executable, "-c", FORK, url, admin.token, os.path.dirname(servers.__file__)],
        check=False,
    )
    assert (run.stdout, run.returncode) == (b"worked fork fork fork ", 0), run.stderr


# --- how it asks ---


async def test_at_rest_there_is_one_request_that_waits(
    make: MakeManager, ada: Any, meddler: Meddler
):
    manager = make(execute=lambda task: None, polling_interval=0.01)
    await run_sync(manager.register, Work)
    await anyio.sleep(1)
    worker = str(manager.worker_id)
    asked = [("POST", "/workers"), ("PUT", "/rooms/@global/jobs")]
    assert meddler.requests[:2] == asked
    # the first heartbeat comes at once, and the next ones when the host says
    beginning = [("GET", "/limits"), ("PATCH", f"/workers/{worker}"), ("POST", "/tasks/claim")]
    assert sorted(meddler.requests[2:]) == beginning
    assert {"worker_id": worker} in meddler.bodies[2:]


async def test_a_host_that_does_not_wait_is_polled(make: MakeManager, ada: Any, meddler: Meddler):
    meddler.forget_prefer = True
    manager = make(execute=lambda task: None, polling_interval=0.2)
    await run_sync(manager.register, Work)
    await until(lambda: meddler.count("POST", "/tasks/claim"))
    begun = time.monotonic()
    await until(lambda: meddler.count("POST", "/tasks/claim") > 3)
    assert time.monotonic() - begun > 0.3, "it pauses between two claims"
    assert (await ended(ada, await submit(ada)))["status"] == "completed"


async def test_task_available_wakes_a_worker_that_polls(
    url: str, admin: Any, ada: Any, meddler: Meddler
):
    meddler.forget_prefer = True
    manager = JobManager.connect(
        url, token=admin.token, execute=lambda task: None, polling_interval=10 * HANG
    )
    assert manager.tsio is None, "who only submits needs no websocket"
    await run_sync(manager.register, Work)
    await until(lambda: manager.tsio.connected)
    assert (await ended(ada, await submit(ada)))["status"] == "completed"
    await run_sync(manager.disconnect)


# --- many tasks at a time ---


@pytest.mark.parametrize("old", [False, True])
async def test_many_tasks_take_few_requests(
    make: MakeManager, ada: Any, meddler: Meddler, old: bool
):
    """Each answer of a kind of request gets lost once."""
    ran: list[str] = []
    lost: set[tuple[str, str]] = set()

    def lose(method: str, path: str, body: bytes) -> int | None:
        kind = method, re.sub("[0-9a-f-]{36}", "ID", path)
        if kind in lost or (path == "/tasks/claim" and b'"task":null' in body):
            return None
        lost.add(kind)
        return 502

    meddler.old = old

    def execute(task: ClaimedTask) -> Any:
        ran.append(task.extension.what)
        if task.extension.what == "7":
            raise ValueError("seven")
        return {"what": task.extension.what}

    manager = make(execute=execute, concurrency=8)
    await run_sync(manager.register, Work)
    submitter = make()
    if not old:
        meddler.limit(max_batch=25)
    number = 15 if old else 60
    tasks = [Work(what=str(n)) for n in range(number)]
    meddler.lose = lose
    ids = await run_sync(lambda: submitter.submit_many(iter(tasks), ROOM))
    ended = await run_sync(submitter.wait_all, [*ids, ids[0]], HANG * 3)
    assert [str(task.id) for task in ended] == [*ids, ids[0]]
    for n, task in enumerate(ended[:-1]):
        if n == 7:
            assert (task.status.value, task.error) == ("failed", "ValueError: seven")
        else:
            assert (task.result, task.attempt) == ({"what": str(n)}, 1)
    assert sorted(ran, key=int) == [str(n) for n in range(number)]
    assert (await ada.get(f"/rooms/{ROOM}/tasks")).json()["total"] == number
    singles = [r for r in meddler.requests if re.fullmatch("/tasks/[0-9a-f-]{36}", r[1])]
    batches = meddler.count("POST", f"/rooms/{ROOM}/batches/{JOB}")
    if old:
        # what a host lacks it is not asked for again and again
        assert batches == meddler.count("PATCH", "/tasks") == 0
        assert meddler.count("GET", "/limits") <= 4
        assert len(singles) >= 3 * number
    else:
        assert batches == 4, "three, and one whose answer got lost"
        assert len(singles) < 60, "most reports go together"
        assert meddler.count("POST", "/tasks/query") < 15


async def test_a_gateway_without_the_route_does_not_make_the_host_an_older_one(
    make: MakeManager, meddler: Meddler
):
    path = f"/rooms/{ROOM}/batches/{JOB}"

    def refuse(method: str, asked: str) -> Any:
        if asked == path and meddler.count(method, asked) == 1:
            return 404, "application/json", b'{"detail":"Not Found"}'
        return None

    manager = make()
    await run_sync(manager.register, Work)
    meddler.refuse = refuse
    ids = await run_sync(manager.submit_many, [Work(), Work()], ROOM)
    assert len(set(ids)) == 2
    assert meddler.count("POST", path) == 2
    assert meddler.count("POST", f"/rooms/{ROOM}/tasks/{JOB}") == 0


@pytest.mark.parametrize("stream", ["closed", "none", "open"])
async def test_what_progress_is_drawn_on_decides_nothing(
    make: MakeManager, monkeypatch: pytest.MonkeyPatch, stream: str
):
    drawn = io.StringIO()
    if stream == "closed":
        drawn.close()
    monkeypatch.setattr(sys, "stderr", None if stream == "none" else drawn)
    manager = make(execute=lambda task: None)
    await run_sync(manager.register, Work)
    ids = await run_sync(manager.submit_many, [Work(), Work()], ROOM)
    ended = await run_sync(lambda: manager.wait_all(ids, HANG, progress=True))
    assert [str(task.id) for task in ended] == ids
    if stream == "open":
        assert "2/2" in drawn.getvalue()


async def test_one_report_among_many_is_refused(
    make: MakeManager, ada: Any, app: Any, url: str, meddler: Meddler
):
    app.state.joblib_settings = JobLibSettings(max_result_bytes=2**20)
    together = threading.Barrier(6)

    def execute(task: ClaimedTask) -> Any:
        together.wait(HANG)
        # all are too large to go together, one is too large at all
        return "x" * {"3": 2_000_000, "4": 3}.get(task.extension.what, 200_000)

    async def cancel(body: bytes) -> None:
        for task in json.loads(body)["tasks"]:
            if task["payload"]["what"] == "4":
                await ada.patch(f"/tasks/{task['id']}", json={"status": "cancelled"})

    meddler.lose = lambda method, path, body: (
        cancel(body) if path == "/tasks/claim" and b'"tasks":[{' in body else None
    )
    manager = make(execute=execute, concurrency=6)
    await run_sync(manager.register, Work)
    submitter = JobManager(HostApi(url, token=ada.token))
    tasks = [Work(what=str(n)) for n in range(6)]
    ids = await run_sync(lambda: submitter.submit_many(tasks, ROOM, priority=1))
    ended = await run_sync(submitter.wait_all, ids, HANG * 3)
    assert [t.status.value for t in ended] == [
        *["completed"] * 3, "failed", "cancelled", "completed",
    ]  # fmt: skip
    assert ended[3].error.startswith("the host refused the result")
    assert [len(t.result or "") for t in ended] == [200_000] * 3 + [0, 0, 200_000]
    assert {t.priority for t in ended} == {1}
    submitter.api.close()


async def test_a_batch_is_cut_until_the_host_takes_it(
    make: MakeManager, app: Any, ada: Any, meddler: Meddler
):
    manager = make()
    await run_sync(manager.register, Work)
    app.state.joblib_settings = JobLibSettings(max_payload_bytes=4000)
    tasks = [Work(what="x" * 500) for _ in range(20)]

    def submit() -> list[str]:
        return manager.submit_many(tasks, ROOM, idempotency_key="k")

    ids = await run_sync(submit)
    assert len(set(ids)) == 20
    assert await run_sync(submit) == ids
    assert (await ada.get(f"/rooms/{ROOM}/tasks")).json()["total"] == 20
    with pytest.raises(ValueError, match="limited to 4000"):
        await run_sync(lambda: manager.submit_many([Work(what="x" * 5000)], ROOM))
    with pytest.raises(KeyError, match="job not found"):
        await run_sync(lambda: manager.submit_many(tasks, ROOM, job_room="else"))


# --- Socket.IO ---


class Relay:
    """A TCP relay whose connections can be cut."""

    def __init__(self, url: str) -> None:
        self.upstream = urlsplit(url)
        self.writers: set[asyncio.StreamWriter] = set()

    async def pipe(self, reader: Any, writer: Any) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def serve(self, reader: Any, writer: Any) -> None:
        host, port = self.upstream.hostname, self.upstream.port
        there, back = await asyncio.open_connection(host, port)
        self.writers |= {writer, back}
        await asyncio.gather(self.pipe(reader, back), self.pipe(there, writer))

    def cut(self) -> None:
        for writer in self.writers:
            writer.transport.abort()
        self.writers.clear()


@asynccontextmanager
async def relay(url: str) -> AsyncIterator[tuple[str, Relay]]:
    between = Relay(url)
    server = await asyncio.start_server(between.serve, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}", between
        between.cut()


async def test_rooms_are_joined_again_after_a_reconnect(url: str, admin: Any, ada: Any, tsio: Any):
    def listeners() -> list[str]:
        rooms = tsio.manager.rooms.get("/", {})
        return list(rooms.get(f"jobs:{JOB}", {}))

    async with relay(url) as (relayed, between):
        manager = JobManager.connect(relayed, token=admin.token, execute=lambda task: None)
        await run_sync(manager.register, Work)
        await until(listeners)
        first = listeners()
        between.cut()
        await until(lambda: set(listeners()) - set(first))
        assert (await ended(ada, await submit(ada)))["status"] == "completed"
        await run_sync(manager.disconnect)
    await until(lambda: not listeners())


async def test_a_cancel_is_heard_at_once(url: str, admin: Any, ada: Any):
    heard = threading.Event()

    class Client:
        """What a program may wrap a `socketio.Client` with."""

        def __init__(self) -> None:
            self.handlers = {"/": {"task_status_event": self.own}}
            self.said: list[str] = []

        def own(self, data: Any) -> None:
            heard.set()

        def on(self, event: str, handler: Any) -> None:
            self.handlers["/"][event] = handler

        def emit(self, event: str, data: Any) -> None:
            self.said.append(event)

    client = Client()
    manager = JobManager(HostApi(url, token=admin.token), client)
    await run_sync(manager.register, Work)
    task_id = await submit(ada)
    task = await run_sync(manager.claim)
    tell = client.handlers["/"]["task_status_event"]
    tell({"id": task_id, "status": "cancelled", "attempt": 7})
    assert not task.cancelled, "another attempt was cancelled"
    tell({"id": task_id, "status": "cancelled", "attempt": 1})
    assert task.cancelled
    assert heard.is_set(), "the program's own handler is no longer called"
    await run_sync(manager.disconnect)
    manager.api.close()
    assert client.said == ["join_job_room", "leave_job_room"]


# --- task by task ---


async def test_a_program_claims_by_itself(make: MakeManager, ada: Any):
    manager = make()
    await run_sync(manager.register, Work)
    assert await run_sync(manager.claim) is None
    good, bad, gone, away = [await submit(ada, what) for what in ("g", "b", "x", "a")]
    unfit = await submit(ada, "unfit")
    stop = threading.Event()

    def work() -> None:
        for task in manager.listen(polling_interval=0.1, stop_event=stop):
            manager.start(task)
            match task.extension.what:
                case "g":
                    manager.complete(task, {"n": 1})
                case "b":
                    manager.fail(task, "why")
                case "x":
                    manager.cancel(task)
                case "a":
                    manager.fail_by_id(task.task_id, "by id")
                    with pytest.raises(ValueError, match="attempt 1"):
                        manager.complete(task)
                    assert task.cancelled
                    stop.set()

    await run_sync(work)
    assert (await ended(ada, good))["result"] == {"n": 1}
    assert (await ended(ada, bad))["error"] == "why"
    assert (await ended(ada, gone))["status"] == "cancelled"
    assert (await ended(ada, away))["error"] == "by id"
    # a task that can't be run is failed at the next look
    assert await run_sync(manager.claim) is None
    assert "SystemExit" in (await ended(ada, unfit))["error"]


async def test_a_heartbeat_tells_what_to_stop(
    make: MakeManager, ada: Any, admin: Any, meddler: Meddler
):
    manager = make()
    await run_sync(manager.register, Work)
    ids = [await submit(ada) for _ in range(3)]
    tasks = [await run_sync(manager.claim) for _ in ids]
    assert [task.task_id for task in tasks] == ids
    await ada.patch(f"/tasks/{ids[0]}", json={"status": "cancelled"})
    await admin.patch(f"/tasks/{ids[1]}", json={"status": "failed"})
    await run_sync(manager.heartbeat)
    assert [task.cancelled for task in tasks] == [True, True, False]
    with pytest.raises(TaskCancelled):
        tasks[0].raise_if_cancelled()


async def test_an_earlier_run_of_a_task_is_told_to_stop(make: MakeManager, ada: Any, admin: Any):
    """Its host has given the task out again, and this process took it."""
    manager = make()
    await run_sync(lambda: manager.register(Work, policy=JobPolicy(max_attempts=2)))
    task_id = await submit(ada)
    earlier = await run_sync(manager.claim)
    await admin.patch(f"/tasks/{task_id}", json={"status": "failed"})
    later = await run_sync(manager.claim)
    assert (earlier.task_id, earlier.attempt) == (later.task_id, later.attempt - 1)
    assert (earlier.cancelled, later.cancelled) == (True, False)
    await run_sync(manager.heartbeat)
    assert (later.cancelled, later.ended) == (False, False)


async def test_what_is_repeated_stops_when_told(make: MakeManager, meddler: Meddler):
    manager = make()
    await run_sync(manager.register, Work)
    stop, asked = threading.Event(), []

    def refuse(method: str, path: str) -> int | None:
        asked.append(path)
        if len(asked) == 3:
            stop.set()
        return 503

    meddler.refuse = refuse
    url = client_transport.path("limits")
    send = partial(manager._transport.send, "get", url, stop=stop)
    with anyio.fail_after(HANG), pytest.raises(ConnectionError):
        await run_sync(send)
    assert len(asked) == 3
    meddler.refuse = lambda *_: None


async def test_a_refusal_of_an_old_token_is_none_of_a_fresh_one(url: str, admin: Any):
    """Another thread has logged in since the request was sent."""
    name = AUTH_SETTINGS.default_admin_email
    api = HostApi(url, user=name, password=PASSWORD)
    fresh = await run_sync(api.token)
    ask = partial(api.http.get, f"{url}{PREFIX}/limits")
    old = {"Authorization": f"Bearer {fresh}x"}
    answer = await run_sync(lambda: ask(headers=old))
    assert answer.status_code == 401
    assert await run_sync(api.token) == fresh
    api.close()


async def test_submitting_and_waiting(make: MakeManager, ada: Any, url: str):
    def execute(task: ClaimedTask) -> Any:
        if task.extension.what == "broken":
            raise ValueError("as asked")
        return {"what": task.extension.what}

    worker = make(execute=execute)
    await run_sync(worker.register, Work)
    submitter = JobManager.connect(url, token=ada.token)

    def run() -> None:
        first = submitter.submit(Work(what="1"), ROOM, idempotency_key="k", priority=3)
        assert submitter.submit(Work(what="1"), ROOM, idempotency_key="k", priority=3) == first
        task = submitter.wait_for(first, HANG)
        assert (task.result, task.priority) == ({"what": "1"}, 3)
        late = submitter.submit(Work(), ROOM, delay_seconds=3600)
        with pytest.raises(TimeoutError, match="still pending"):
            submitter.wait_for(late, 0.2)
        broken = submitter.submit(Work(what="broken"), ROOM)
        with pytest.raises(TaskFailed, match="as asked") as failed:
            submitter.wait_for(broken)
        assert str(failed.value.task.id) == broken
        assert [t.status.value for t in submitter.wait_all([first, broken])] == [
            "completed",
            "failed",
        ]
        with pytest.raises(KeyError):
            submitter.submit(Work(), ROOM, job_room="elsewhere")
        with pytest.raises(PermissionError):
            submitter.register(Work)
        submitter.disconnect()

    await run_sync(run)


async def test_what_is_registered_can_be_looked_up(
    make: MakeManager, caplog: pytest.LogCaptureFixture
):
    manager = make()
    await run_sync(lambda: manager.register(Work, room="a", run_kwargs={"x": 1}))
    await run_sync(manager.register, Work)
    assert list(manager) == [f"a:analysis:{Work.__name__}", JOB]
    assert (manager[JOB], len(manager), "a:b:c" in manager) == (Work, 2, False)
    assert manager.get_run_kwargs(f"a:analysis:{Work.__name__}") == {"x": 1}
    with pytest.raises(KeyError):
        manager.get_run_kwargs("a:b:c")

    class Other(Work):
        category = "nowhere"

    with pytest.raises(ValueError, match="nowhere"):
        await run_sync(manager.register, Other)
    assert len(manager) == 2
    await run_sync(partial(manager.register_provider, Files, name="tree", handler=1))
    assert manager.handlers == {"@global:files:tree": 1}
    assert "tree is offered, but no request reaches it" in caplog.text


# --- providers ---


class Files(Provider):
    category: ClassVar[str] = "files"
    path: str = "/"
    depth: int = 1

    def read(self, handler: dict[str, Any]) -> Any:
        found = handler[self.path]
        return found(self) if callable(found) else found


class Images(Files):
    content_type: ClassVar[str] = "image/png"


@pytest.fixture
async def connected(url: str, admin: Any) -> AsyncIterator[JobManager]:
    """Yield a worker with Socket.IO."""
    manager = JobManager.connect(url, token=admin.token, execute=lambda task: "done")
    await run_sync(manager.register, Work)
    await until(lambda: manager.tsio.connected)
    yield manager
    await run_sync(manager.disconnect)


@pytest.fixture
def offer(connected: JobManager) -> Callable[..., Any]:
    """Return a function that registers a provider."""

    async def offer(cls: type[Provider], name: str, handler: Any) -> None:
        register = connected.register_provider
        await run_sync(lambda: register(cls, name=name, handler=handler))

    return offer


async def look(user: Any, name: str, **params: Any) -> Any:
    return await user.get(
        f"/rooms/{ROOM}/providers/@global:files:{name}",
        params=params,
        headers={"Prefer": f"wait={HANG}"},
    )


async def test_providers_answer_or_say_why_not(
    connected: JobManager, offer: Any, ada: Any, app: Any
):
    app.state.joblib_settings.provider_result_max_bytes = 1000

    def fail(request: Files) -> None:
        sys.exit(f"no {request.path} at depth {request.depth}")

    handler = {
        "/": {"files": ("a", "b"), "size": float("nan")},
        "json": '{"already": "json"}',
        "png": b"\x89PNG\x00",
        "large": "x" * 1001,
        "fails": fail,
    }
    await offer(Files, "tree", handler)
    await offer(Images, "images", handler)
    assert connected.handlers == {"@global:files:tree": handler, "@global:files:images": handler}
    listing = await look(ada, "tree")
    assert listing.json() == {"files": ["a", "b"], "size": None}
    assert (await look(ada, "tree", path="json")).text == handler["json"]
    image = await look(ada, "images", path="png")
    assert (image.content, image.headers["Content-Type"]) == (handler["png"], "image/png")
    wrong = {
        "nowhere": ("tree", "KeyError: 'nowhere'"),
        "fails": ("tree", "SystemExit: no fails at depth 2"),
        "large": ("tree", "the host refused the result: "),
        "/": ("images", "TypeError: Images.read() returned dict, but image/png needs"),
    }
    for path, (name, detail) in wrong.items():
        answer = await look(ada, name, path=path, depth="2")
        assert answer.status_code == 400
        assert answer.json()["type"] == "/v1/problems/provider-execution-failed"
        assert answer.json()["detail"].startswith(detail)
    unfit = await look(ada, "tree", depth="deep")
    assert "valid integer" in unfit.json()["detail"]


async def test_the_first_read_of_a_new_worker_is_heard(url: str, admin: Any, ada: Any):
    """Lost, it would hold back all readers of the same, until its mark expires."""
    manager = JobManager.connect(url, token=admin.token)
    try:
        register = manager.register_provider
        await run_sync(lambda: register(Files, name="tree", handler={"/": "there"}))
        assert (await look(ada, "tree")).text == "there"
    finally:
        await run_sync(manager.disconnect)


async def test_slow_reads_hold_up_neither_tasks_nor_each_other(offer: Any, ada: Any):
    together = threading.Barrier(3)

    def slow(request: Files) -> int:
        together.wait(HANG)
        return request.depth

    await offer(Files, "tree", {"/": slow})
    read: dict[int, Any] = {}

    async def reader(depth: int) -> None:
        read[depth] = (await look(ada, "tree", depth=depth)).json()

    async with anyio.create_task_group() as group:
        group.start_soon(reader, 1)
        group.start_soon(reader, 2)
        await until(lambda: together.n_waiting == 2)
        assert (await ended(ada, await submit(ada)))["status"] == "completed"
        await run_sync(together.wait, HANG)
    assert read == {1: 1, 2: 2}


async def test_providers_come_back_with_their_worker_and_go_with_it(
    connected: JobManager, offer: Any, ada: Any, admin: Any
):
    for name in ("tree", "other"):
        await offer(Files, name, {"/": name})
    first = connected.worker_id
    await admin.delete(f"/workers/{first}")
    await run_sync(connected.heartbeat)
    assert connected.worker_id != first
    assert (await look(ada, "tree", depth=7)).text == "tree"

    async def offered() -> list[str]:
        listing = await ada.get(f"/rooms/{ROOM}/providers")
        return sorted(provider["name"] for provider in listing.json()["items"])

    assert await offered() == ["other", "tree"]
    await run_sync(connected.unregister_provider, "@global:files:other")
    assert await offered() == ["tree"]
    with pytest.raises(KeyError):
        await run_sync(connected.unregister_provider, "@global:files:other")
    await run_sync(connected.disconnect)
    assert await offered() == []


# --- the end ---


async def test_a_draining_worker_gets_nothing_until_it_is_active(
    make: MakeManager, ada: Any, admin: Any, meddler: Meddler
):
    manager = make(execute=lambda task: None, heartbeat_interval=0.1, polling_interval=0.1)
    await run_sync(manager.register, Work)
    worker = f"/workers/{manager.worker_id}"
    await admin.patch(worker, json={"state": "draining"})
    await until(lambda: manager._heartbeat.draining)
    task = await submit(ada)
    await anyio.sleep(0.5)
    assert (await ada.get(f"/tasks/{task}")).json()["status"] == "pending"
    await admin.patch(worker, json={"state": "active"})
    assert (await ended(ada, task))["status"] == "completed"


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_what_was_claimed_and_not_begun_is_handed_back(
    make: MakeManager, ada: Any, admin: Any, meddler: Meddler, concurrency: int
):
    ran: list[str] = []
    manager = make(execute=lambda task: ran.append(task.task_id), concurrency=concurrency)
    claimed = anyio.Event()

    async def hold_back(body: bytes) -> None:
        claimed.set()
        # the answer travels while the worker begins to leave
        await until(lambda: {"state": "draining"} in meddler.bodies)

    meddler.lose = lambda method, path, body: (
        hold_back(body) if path == "/tasks/claim" and b'"tasks":[{' in body else None
    )
    await run_sync(manager.register, Work)
    task_id = await submit(ada)
    with anyio.fail_after(HANG):
        await claimed.wait()
    await run_sync(manager.disconnect)
    task = (await ada.get(f"/tasks/{task_id}")).json()
    assert (task["status"], task["errors"], ran) == ("pending", [], [])
    assert await workers(admin) == []


@pytest.mark.parametrize("concurrency", [1, 4])
async def test_what_was_claimed_and_not_heard_of_is_handed_back(
    make: MakeManager, ada: Any, admin: Any, meddler: Meddler, concurrency: int
):
    ran: list[str] = []
    lost: list[str] = []

    def lose(method: str, path: str, body: bytes) -> int | None:
        if path == "/tasks/claim" and b'"tasks":[{' in body and not lost:
            lost.append(path)
            return 502
        return None

    def refuse(method: str, path: str) -> int | None:
        # the repeated claim comes when the worker leaves, not before
        leaving = manager._life.stopping.is_set()
        if lost and path == "/tasks/claim" and not leaving:
            return 502
        # that it leaves can't be announced either
        return 502 if leaving and method == "PATCH" and "/workers/" in path else None

    meddler.lose, meddler.refuse = lose, refuse
    manager = make(execute=lambda task: ran.append(task.task_id), concurrency=concurrency)
    await run_sync(manager.register, Work)
    task_id = await submit(ada)
    await until(lambda: lost)
    await run_sync(manager.disconnect)
    task = (await ada.get(f"/tasks/{task_id}")).json()
    assert (task["status"], task["errors"], ran) == ("pending", [], [])
    assert await workers(admin) == []


async def test_disconnect_is_for_any_thread_and_any_number_of_times(
    make: MakeManager, ada: Any, admin: Any
):
    done: list[str] = []

    def execute(task: ClaimedTask) -> str:
        # it can't be done before this task is
        manager.disconnect()
        time.sleep(0.3)
        done.append("task")
        return "kept"

    before = set(threading.enumerate())
    manager = make(execute=execute, concurrency=2)
    await run_sync(manager.register, Work)
    task = await submit(ada)
    await run_sync(manager.wait)
    async with anyio.create_task_group() as group:
        for _ in range(3):
            group.start_soon(run_sync, manager.disconnect)
    assert done == ["task"]
    assert (await ended(ada, task))["result"] == "kept"
    assert await workers(admin) == []
    left = [t.name for t in set(threading.enumerate()) - before]
    assert not [name for name in left if name.startswith("zndraw")]
    assert (manager.worker_id, len(manager)) == (None, 0)
    with pytest.raises(RuntimeError):
        await run_sync(manager.register, Work)


PROGRAM = """
import multiprocessing, sys, time
from typing import ClassVar
from zndraw_joblib.client import Category, Extension, JobManager

class Work(Extension):
    category: ClassVar[Category] = Category.ANALYSIS
    what: str = ""
    cell: list[int] = []

    def run(self, vis, **kwargs): ...

def execute(task):
    print("running", flush=True)
    if task.extension.what == "fork":
        # its processes are ended with SIGTERM, which they must not take for ours
        with multiprocessing.get_context("fork").Pool(1) as pool:
            pool.apply_async(time.sleep, (60,))
            time.sleep(0.2)
    end = time.monotonic() + (60 if task.extension.what == "deaf" else 1)
    while time.monotonic() < end:
        time.sleep(0.01)
    return "done"

with JobManager.connect(sys.argv[1], token=sys.argv[2], execute=execute) as manager:
    manager.register(Work)
    manager.wait()
print("left", flush=True)
"""


@pytest.fixture
def program(url: str, admin: Any) -> Iterator[subprocess.Popen[str]]:
    """Yield a worker in a process of its own."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, url, admin.token], stdout=subprocess.PIPE, text=True
    )
    with process:
        yield process
        process.kill()


async def served(ada: Any) -> None:
    with anyio.fail_after(HANG):
        while not (await ada.get(f"/rooms/{ROOM}/jobs")).json()["items"]:
            await anyio.sleep(0.02)


async def heard(program: subprocess.Popen[str]) -> str:
    with anyio.fail_after(HANG):
        return (await run_sync(program.stdout.readline)).strip()


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
async def test_a_signal_lets_the_running_task_finish(
    program: Any, ada: Any, admin: Any, signum: int
):
    await served(ada)
    running, waiting = await submit(ada, "fork"), await submit(ada)
    assert await heard(program) == "running"
    await anyio.sleep(0.5)
    assert await workers(admin), "a fork of the worker's process ended the worker"
    program.send_signal(signum)
    assert await heard(program) == "left"
    assert await run_sync(program.wait, HANG) == 0
    assert (await ended(ada, running))["result"] == "done"
    assert (await ada.get(f"/tasks/{waiting}")).json()["status"] == "pending"
    assert await workers(admin) == []


async def test_a_second_signal_ends_at_once(program: Any, ada: Any, admin: Any):
    await served(ada)
    task = await submit(ada, "deaf")
    assert await heard(program) == "running"
    program.send_signal(signal.SIGTERM)
    await anyio.sleep(0.5)
    assert program.poll() is None
    program.send_signal(signal.SIGTERM)
    assert await heard(program) == "left"
    assert await run_sync(program.wait, HANG) == 0
    left = (await ada.get(f"/tasks/{task}")).json()
    assert (left["status"], left["interruptions"]) == ("pending", 1)
    assert await workers(admin) == []

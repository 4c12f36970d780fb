"""The doctrine under load: nothing that hangs or races outside the database harms it."""

from functools import partial
from typing import Any, ClassVar

import anyio
import httpx
import pytest
from steps import JOB, claim, move, offer, read, register, report, submit
from taskiq import InMemoryBroker

from zndraw_joblib import get_room_access, register_internal_jobs
from zndraw_joblib.settings import JobLibSettings
from zndraw_joblib.workers import RoomAccess

ROUNDS = 10
HANG = 30


class Failing:
    """A Socket.IO server whose manager hangs until it may fail."""

    def __init__(self) -> None:
        self.may_fail = anyio.Event()
        self.tried: list[str] = []

    async def emit(self, event: str, data: Any, *, room: str) -> None:
        self.tried.append(event)
        await self.may_fail.wait()
        raise ConnectionError("the manager is away")


async def test_a_hanging_manager_holds_up_nobody_else(app, ada, bob):
    bobs = (await bob.post("/workers")).json()["id"]
    app.state.tsio = hanging = Failing()
    app.state.joblib_settings = JobLibSettings(dispatch_timeout_seconds=3600)
    with anyio.fail_after(HANG):
        async with anyio.create_task_group() as group:
            group.start_soon(register, ada)
            while not hanging.tried:
                await anyio.sleep(0.01)
            # a session that were held would make these wait for the emit's end
            for _ in range(3):
                assert (await bob.patch(f"/workers/{bobs}")).status_code == 200
            hanging.may_fail.set()


async def test_who_does_not_read_an_answer_holds_up_nobody_else(app, ada, bob, events):
    bobs = (await bob.post("/workers")).json()["id"]
    await offer(ada)
    unread: list[str] = []

    async def stalled(scope: Any, receive: Any, send: Any) -> None:
        async def never(message: Any) -> None:
            unread.append(scope["method"])
            await anyio.sleep_forever()

        await app(scope, receive, never)

    large = {"payload": {"text": "x" * 100_000}}
    ada._transport = httpx.ASGITransport(stalled)
    events.clear()
    with anyio.fail_after(HANG):
        async with anyio.create_task_group() as group:
            group.start_soon(partial(ada.post, f"/rooms/lab/tasks/{JOB}", json=large))
            group.start_soon(ada.get, "/rooms/lab/tasks")
            while len(unread) < 2:
                await anyio.sleep(0.01)
            assert (await bob.patch(f"/workers/{bobs}")).status_code == 200
            assert [e.event for e in events] == ["task_status_event", "task_available"]
            group.cancel_scope.cancel()


async def test_a_failing_manager_fails_no_committed_request(app, ada):
    app.state.tsio = failing = Failing()
    failing.may_fail.set()
    worker = await offer(ada)
    for outcome in ("completed", "failed", "cancelled"):
        await move(ada, worker, await submit(ada), outcome)
    assert (await ada.delete(f"/workers/{worker}")).status_code == 204
    assert failing.tried.count("task_status_event") == 3 + 2 * 2 + 3


async def test_of_a_complete_and_a_cancel_one_wins(ada, admin):
    worker = await offer(ada)
    for _ in range(ROUNDS):
        task = await move(ada, worker, await submit(ada), "running")
        codes: dict[str, int] = {}

        async def end(user: Any, status: str, task: Any = task, codes: Any = codes):
            codes[status] = (await report(user, task, status)).status_code

        async with anyio.create_task_group() as group:
            group.start_soon(end, ada, "completed")
            group.start_soon(end, admin, "cancelled")
        assert sorted(codes.values()) == [200, 409]
        assert codes[(await read(ada, task))["status"]] == 200


async def test_eight_registrations_at_once_make_one_job(ada):
    worker = (await ada.post("/workers")).json()["id"]
    codes = []

    async def once() -> None:
        codes.append((await register(ada, worker_id=worker)).status_code)

    async with anyio.create_task_group() as group:
        for _ in range(8):
            group.start_soon(once)
    assert sorted(codes) == [200] * 7 + [201]
    assert (await ada.get("/rooms/lab/jobs")).json()["total"] == 1


async def test_a_worker_that_goes_while_it_claims_keeps_nothing(ada):
    await offer(ada)  # keeps the job
    for _ in range(ROUNDS):
        worker, task = await offer(ada), await submit(ada)
        async with anyio.create_task_group() as group:
            group.start_soon(
                lambda worker: ada.post("/tasks/claim", json={"worker_id": worker}), worker
            )
            group.start_soon(ada.delete, f"/workers/{worker}")
        left = await read(ada, task)
        # it went first, or it took the task and lost it: never is it still held
        assert (left["status"], left["error"]) in [
            ("pending", None),
            ("failed", "Worker disconnected"),
        ]
        await report(ada, task, "cancelled")


class Echo:
    category: ClassVar[str] = "modifiers"

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]:
        return {}


INTERNAL = "@internal:modifiers:Echo"


async def test_an_executor_may_start_before_the_answer(app, ada, admin, session_maker):
    seen: list[str] = []

    async def execute(extension: Any, payload: Any, room_id: str, task_id: str):
        # as a host's executor does, that reports every step by itself
        for status in ("running", "completed"):
            answer = await admin.patch(f"/tasks/{task_id}", json={"status": status})
            assert answer.status_code == 200, answer.text
        seen.append(task_id)

    # awaited in place: it runs before the submitting request has been answered
    broker = InMemoryBroker(await_inplace=True)
    await register_internal_jobs(app, broker, [Echo], executor=execute, session_maker=session_maker)
    task = await submit(ada, INTERNAL, payload={"a": 1})
    assert task["status"] == "claimed"
    assert (seen, (await read(ada, task))["status"]) == ([task["id"]], "completed")


@pytest.mark.parametrize("seconds", [0, 3600])
async def test_what_the_broker_does_not_take_fails_and_is_told(
    app, ada, session_maker, events, seconds
):
    class Broken(InMemoryBroker):
        async def kick(self, message: Any) -> None:
            await anyio.sleep(seconds)
            raise ConnectionError("the broker is away")

    async def execute(*args: Any) -> None:
        raise AssertionError("nothing was delivered")

    app.state.joblib_settings = JobLibSettings(dispatch_timeout_seconds=0.2)
    await register_internal_jobs(
        app, Broken(), [Echo], executor=execute, session_maker=session_maker
    )
    task = await submit(ada, INTERNAL)
    failed = await read(ada, task)
    assert (failed["status"], failed["error_type"]) == ("failed", "dispatch")
    told = [e.data["status"] for e in events if e.event == "task_status_event"]
    assert told == ["claimed", "failed"]


async def test_what_is_delivered_twice_runs_once(app, ada, session_maker):
    runs: list[str] = []

    async def execute(extension: Any, payload: Any, room_id: str, task_id: str):
        runs.append(task_id)

    class Twice(InMemoryBroker):
        async def kick(self, message: Any) -> None:
            await super().kick(message)
            await super().kick(message)

    await register_internal_jobs(
        app, Twice(await_inplace=True), [Echo], executor=execute, session_maker=session_maker
    )
    task = await submit(ada, INTERNAL)
    assert runs == [task["id"]]


async def test_nothing_runs_an_internal_job_without_an_executor(app, ada, session_maker):
    async def execute(*args: Any) -> None: ...

    await register_internal_jobs(
        app, InMemoryBroker(), [Echo], executor=execute, session_maker=session_maker
    )
    app.state.internal_registry = None
    answer = await ada.post(f"/rooms/lab/tasks/{INTERNAL}", json={})
    assert (answer.status_code, answer.json()["type"]) == (
        503,
        "/v1/problems/internal-job-not-configured",
    )
    assert (await ada.get("/rooms/lab/tasks")).json()["total"] == 0


async def test_a_private_room_is_closed_on_every_route(app, ada, bob):
    async def may_enter(session: Any, caller: Any, room_id: str) -> bool:
        return room_id != "lab" or caller.id == ada.id

    async def access() -> RoomAccess:
        return may_enter

    app.dependency_overrides[get_room_access] = access
    worker, task = await offer(ada), await submit(ada)
    (claimed,) = await claim(ada, worker)
    assert claimed["id"] == task["id"]
    for path in ("jobs", f"jobs/{JOB}", f"jobs/{JOB}/tasks", "tasks", "workers", "stats"):
        assert (await bob.get(f"/rooms/lab/{path}")).status_code == 403, path
    assert (await bob.post(f"/rooms/lab/tasks/{JOB}", json={})).status_code == 403
    assert (await register(bob)).status_code == 403
    # addressed by id, it isn't there
    assert (await bob.get(f"/tasks/{task['id']}")).status_code == 404
    assert (await report(bob, task, "completed", attempt=1)).status_code == 404
    assert (await bob.post(f"/tasks/{task['id']}/retry")).status_code == 404
    assert (await read(ada, task))["status"] == "claimed"

"""Batches: many tasks in one request, each of them treated as if it came alone."""

from datetime import datetime
from itertools import pairwise
from typing import Any
from uuid import uuid4

import anyio
import pytest
from sqlalchemy import event
from steps import JOB, at_once, claim, move, offer, problem, read, report, stored, submit
from taskiq import InMemoryBroker

from zndraw_joblib import get_room_access, register_internal_jobs
from zndraw_joblib.settings import JobLibSettings
from zndraw_joblib.submissions import ALWAYS_COUNTED

NUMBER = {"properties": {"n": {"type": "integer"}}}
BATCH = f"/rooms/lab/batches/{JOB}"


async def submit_many(user: Any, *tasks: Any, job: str = JOB, **options: Any) -> Any:
    answer = await user.post(f"/rooms/lab/batches/{job}", json={"tasks": list(tasks)}, **options)
    assert answer.status_code == 202, answer.text
    return answer.json()["ids"]


async def report_many(user: Any, *reports: Any) -> list[Any]:
    answer = await user.patch("/tasks", json={"reports": list(reports)})
    assert answer.status_code == 200, answer.text
    outcomes = answer.json()["outcomes"]
    assert [o["id"] for o in outcomes] == [r["id"] for r in reports]
    return outcomes


async def read_many(user: Any, ids: list[str]) -> list[Any]:
    answer = await user.post("/tasks/query", json={"ids": ids})
    assert (answer.status_code, answer.json()["missing"]) == (200, [])
    return answer.json()["tasks"]


# --- submissions ---


async def test_a_batch_is_many_submissions_told_once_to_workers(app, ada, events):
    app.state.joblib_settings.queue_position_max = 4
    worker = await offer(ada, schema=NUMBER, max_attempts=3)
    waiting = await submit(ada)
    events.clear()
    ids = await submit_many(
        ada,
        {"payload": {"n": 0}},
        {"payload": {"n": 1}, "priority": 1},
        {"payload": {"n": 2}, "delay_seconds": 3600},
        {},
        {"payload": {"n": 4}, "priority": 1},
    )
    told = [e.data for e in events if e.event == "task_status_event"]
    tasks = await read_many(ada, ids)
    assert [t["payload"] for t in tasks] == [{"n": 0}, {"n": 1}, {"n": 2}, {}, {"n": 4}]
    assert [t["queue_position"] for t in tasks] == [4, 1, 4, 4, 2]
    assert {t["max_attempts"] for t in tasks} == {3}
    assert {t["created_by_id"] for t in tasks} == {str(ada.id)}
    assert [t["available_at"] != t["created_at"] for t in tasks] == [0, 0, 1, 0, 0]
    for data, task in zip(told, tasks, strict=True):
        same = data.keys() & task.keys()
        assert {k: data[k] for k in same} == {k: task[k] for k in same}
    available = [e for e in events if e.event == "task_available"]
    assert [(e.room, e.data["task_id"]) for e in available] == [(f"jobs:{JOB}", ids[0])]
    page = (await ada.get("/rooms/lab/tasks")).json()["items"]
    assert [t["id"] for t in page] == [*reversed(ids), waiting["id"]], "newest first"
    claimed = await claim(ada, worker, max_tasks=32)
    assert [t["id"] for t in claimed] == [ids[1], ids[4], waiting["id"], ids[0], ids[3]]


async def test_a_batch_is_submitted_as_a_whole_or_not_at_all(ada, events, session_maker):
    await offer(ada, schema=NUMBER)
    events.clear()
    tasks: list[Any] = [{"payload": {"n": n}} for n in range(20)]
    tasks[17] = {"payload": {"n": "many"}}
    tasks[3] = {"payload": {"n": 0.5}}
    answer = await ada.post(BATCH, json={"tasks": tasks})
    errors = problem(answer, 422, "payload-mismatch")["errors"]
    assert [e["pointer"] for e in errors] == ["/body/tasks/3/payload/n", "/body/tasks/17/payload/n"]
    tasks = [{}, {"priority": 10**6}]
    answer = await ada.post(BATCH, json={"tasks": tasks})
    (error,) = problem(answer, 422, "invalid-request")["errors"]
    assert error["pointer"] == "/body/tasks/1/priority"
    for number in (0, 1001):
        answer = await ada.post(BATCH, json={"tasks": [{}] * number})
        problem(answer, 422, "invalid-request")
    answer = await ada.post(f"{BATCH}/else", json={"tasks": [{}]})
    problem(answer, 404, "job-not-found")
    assert ((await stored(session_maker))["task"], events) == (0, [])


async def test_a_key_holds_for_the_whole_batch(ada, bob, events, session_maker):
    await offer(ada)
    keyed = {"headers": {"Idempotency-Key": "k"}}
    batch = [{"payload": {"n": n}} for n in range(5)]
    events.clear()
    answers = await at_once(*(submit_many(ada, *batch, **keyed) for _ in range(4)))
    ids = answers[0]
    assert answers == [ids] * 4
    assert len(events) == 6, "each task is told once"
    for other in ([*batch, {}], batch[:4], [{}]):
        answer = await ada.post(BATCH, json={"tasks": other}, **keyed)
        problem(answer, 422, "idempotency-key-reused")
    single = await ada.post(f"/rooms/lab/tasks/{JOB}", json=batch[0], **keyed)
    problem(single, 422, "idempotency-key-reused")
    assert (await stored(session_maker))["task"] == 5
    assert await submit_many(bob, *batch, **keyed) != ids, "a key is one user's"
    assert await submit_many(ada, *batch) != ids


class Echo:
    category = "modifiers"

    @classmethod
    def model_json_schema(cls) -> dict[str, Any]:
        return {}


@pytest.mark.parametrize("hangs", [False, True])
async def test_a_batch_for_the_broker(app, ada, session_maker, events, hangs):
    job = "@internal:modifiers:Echo"
    taken: list[str] = []

    async def execute(extension: Any, payload: Any, room_id: str, task_id: str):
        taken.append(task_id)

    class Broker(InMemoryBroker):
        async def kick(self, message: Any) -> None:
            if hangs and taken:
                await anyio.sleep(3600)
            await super().kick(message)

    patience = 0.5 if hangs else 30
    app.state.joblib_settings = JobLibSettings(dispatch_timeout_seconds=patience)
    broker = Broker(await_inplace=True)
    await register_internal_jobs(app, broker, [Echo], executor=execute, session_maker=session_maker)
    answer = await ada.post(f"/rooms/lab/batches/{job}", json={"tasks": [{}, {"delay_seconds": 1}]})
    (error,) = problem(answer, 422, "invalid-request")["errors"]
    assert error["pointer"] == "/body/tasks/1/delay_seconds"
    with anyio.fail_after(30):
        # each message of a broker that hangs would wait for itself
        ids = await submit_many(ada, *[{}] * 100, job=job)
    tasks = await read_many(ada, ids)
    if hangs:
        assert taken == ids[:1]
        assert tasks[0]["status"] == "running"
        assert {(t["status"], t["error_type"]) for t in tasks[1:]} == {("failed", "dispatch")}
    else:
        assert taken == ids
        assert {(t["status"], t["attempt"]) for t in tasks} == {("running", 1)}
    app.state.internal_registry = None
    answer = await ada.post(f"/rooms/lab/batches/{job}", json={"tasks": [{}]})
    problem(answer, 503, "internal-job-not-configured")


# --- claims that start ---


async def test_a_claim_may_start_its_tasks(ada, events):
    worker = await offer(ada, timeout_seconds=3600, start_timeout_seconds=1)
    ids = await submit_many(ada, {}, {}, {})
    events.clear()
    body = {"worker_id": worker, "max_tasks": 2, "start": True}
    keyed = {"Idempotency-Key": "k"}
    answer = await ada.post("/tasks/claim", json=body, headers=keyed)
    started = answer.json()["tasks"]
    assert [t["id"] for t in started] == ids[:2]
    for task in started:
        assert (task["status"], task["attempt"]) == ("running", 1)
        assert task["started_at"] == task["claimed_at"]
        assert task == await read(ada, task)
    assert [(e.data["id"], e.data["status"]) for e in events] == [
        (id_, "running") for id_ in ids[:2]
    ]
    again = await ada.post("/tasks/claim", json=body, headers=keyed)
    assert again.json()["tasks"] == started
    assert (await report(ada, started[0], "completed")).status_code == 200


async def test_what_its_claim_started_can_be_handed_back(ada):
    worker = await offer(ada)
    (id_,) = await submit_many(ada, {})
    for attempt in (1, 2):
        (task,) = await claim(ada, worker, start=True)
        back = await report(ada, task, "pending", attempt=attempt)
        assert (back.status_code, back.json()["status"]) == (200, "pending")
        assert back.json()["started_at"] is None
    # a worker that said itself that it began has begun
    task = await move(ada, worker, {"id": id_}, "running")
    problem(await report(ada, task, "pending"), 409, "invalid-task-transition")
    problem_of = await report_many(ada, {"id": id_, "status": "pending"})
    assert [o["status"] for o in problem_of] == [409]
    assert (await report(ada, task, "completed", attempt=3)).status_code == 200


# --- reports ---


async def test_each_report_is_judged_as_if_it_came_alone(app, ada, bob, events):
    """The same reports one by one and in one request, of tasks in the same states."""

    async def may_enter(session: Any, caller: Any, room_id: str) -> bool:
        return room_id != "secret" or caller.id == bob.id

    async def access() -> Any:
        return may_enter

    app.dependency_overrides[get_room_access] = access
    worker = await offer(ada, max_attempts=2)
    others = await offer(bob, "Scale", "secret"), await offer(bob, "Scale")
    rooms = "secret", "lab"

    async def fleet() -> list[dict[str, Any]]:
        """Return reports of new tasks, each in the state that stands first."""
        reports = [
            ("running", {"status": "completed", "result": {"e": 1.5}}),
            ("running", {"status": "completed", "attempt": 1}),
            ("running", {"status": "completed", "result": [True], "attempt": 2}),
            ("completed", {"status": "completed"}),
            ("completed", {"status": "completed", "attempt": 0}),
            ("pending", {"status": "completed"}),
            ("running", {"status": "failed", "error": "one"}),
            ("running", {"status": "failed", "error": "two", "retryable": False}),
            ("claimed", {"status": "failed"}),
            ("cancelled", {"status": "failed", "error": "late", "attempt": 1}),
            ("claimed", {"status": "running"}),
            ("running", {"status": "running"}),
            ("claimed", {"status": "pending"}),
            ("running", {"status": "pending"}),
            ("pending", {"status": "cancelled", "error": "enough"}),
            ("running", {"status": "cancelled"}),
            ("running", {"status": "claimed"}),
        ]
        sent: list[Any] = [{"id": str(uuid4()), "status": "completed"}]
        for bobs, room in zip(others, rooms, strict=True):
            task = await submit(bob, f"{room}:modifiers:Scale", room)
            await claim(bob, bobs)
            sent.append({"id": task["id"], "status": "completed"})
        for state, body in reports:
            # a task that stays pending is not to be claimed in another's place
            delay = 3600 * (state == "pending")
            task = await submit(ada, delay_seconds=delay)
            task = await move(ada, worker, task, state)
            sent.append({"id": task["id"], **body})
        events.clear()
        return sent

    def told(sent: Any, status: int, body: Any) -> Any:
        """Return what of an outcome is the same for all tasks in the same state."""
        heard = [e.data["status"] for e in events if e.data.get("id") == sent["id"]]
        kept = ("status", "attempt", "result", "error", "error_type", "type")
        said = {key: body[key] for key in kept if key in body}
        if status == 200:
            said["worker"] = bool(body["worker_id"])
            said["errors"] = [(e["attempt"], e["error"]) for e in body["errors"]]
        return status, said, body.get("task_status"), heard

    alone = []
    for sent in await fleet():
        body = {key: value for key, value in sent.items() if key != "id"}
        answer = await ada.patch(f"/tasks/{sent['id']}", json=body)
        alone.append(told(sent, answer.status_code, answer.json()))
        await report(ada, sent, "cancelled")
    reports = await fleet()
    together = [
        told(sent, outcome["status"], outcome["task"] or outcome["problem"])
        for sent, outcome in zip(reports, await report_many(ada, *reports), strict=True)
    ]
    assert together == alone
    assert {status for status, *_ in alone} == {200, 403, 404, 409}
    # of several tasks that wait again, a job's workers hear once
    assert [e.event for e in events].count("task_available") == 1


async def test_a_task_is_reported_on_once_in_a_batch(ada):
    worker = await offer(ada)
    task = await move(ada, worker, await submit(ada), "running")
    twice = [{"id": task["id"], "status": s} for s in ("completed", "failed")]
    for reports in (twice, [], [{"id": str(uuid4()), "status": "failed"}] * 33):
        answer = await ada.patch("/tasks", json={"reports": reports})
        (error,) = problem(answer, 422, "invalid-request")["errors"]
        assert error["pointer"] == "/body/reports"
    assert (await read(ada, task)) == task


async def test_of_batches_that_contradict_each_other_one_wins_each_task(ada, admin):
    """They come at once and name the same tasks in opposite orders."""
    for _ in range(3):
        worker = await offer(ada)
        ids = await submit_many(ada, *[{}] * 16)
        await claim(ada, worker, max_tasks=16, start=True)
        completed = [{"id": id_, "status": "completed"} for id_ in ids]
        cancelled = [{"id": id_, "status": "cancelled"} for id_ in reversed(ids)]
        first, second, _ = await at_once(
            report_many(ada, *completed),
            report_many(admin, *cancelled),
            ada.patch(f"/workers/{worker}", json={}),
        )
        second.reverse()
        standing = await read_many(ada, ids)
        for a, b, task in zip(first, second, standing, strict=True):
            assert sorted([a["status"], b["status"]]) == [200, 409]
            assert task in (a["task"], b["task"])


async def test_a_worker_that_goes_while_it_reports(ada):
    for _ in range(3):
        await offer(ada)  # keeps the job
        worker = await offer(ada)
        ids = await submit_many(ada, *[{}] * 8)
        await claim(ada, worker, max_tasks=8, start=True)
        reports = [{"id": id_, "status": "completed"} for id_ in ids]
        outcomes, gone = await at_once(report_many(ada, *reports), ada.delete(f"/workers/{worker}"))
        assert gone.status_code == 204
        (code,) = {outcome["status"] for outcome in outcomes}
        left = {task["status"] for task in await read_many(ada, ids)}
        assert left == ({"completed"} if code == 200 else {"failed"})


# --- waiting for many ---


async def test_waiting_for_many(app, ada, bob):
    async def may_enter(session: Any, caller: Any, room_id: str) -> bool:
        return room_id == "lab" or caller.id == ada.id

    async def access() -> Any:
        return may_enter

    app.dependency_overrides[get_room_access] = access
    worker = await offer(ada)
    ids = await submit_many(ada, *[{}] * 6)
    await offer(ada, "Scale", "secret")
    secret = (await submit(ada, "secret:modifiers:Scale", "secret"))["id"]
    asked = {"ids": [ids[5], secret, *ids[:5], str(uuid4())]}
    at_once_ = (await ada.post("/tasks/query", json=asked)).json()
    assert [t["id"] for t in at_once_["tasks"]] == [ids[5], secret, *ids[:5]]
    assert at_once_["tasks"][2] == await read(ada, {"id": ids[0]})
    assert at_once_["missing"] == [asked["ids"][-1]]

    async def work() -> None:
        # the last of them ends first
        for n, task in enumerate(reversed(await claim(ada, worker, max_tasks=6, start=True))):
            await anyio.sleep(0.05)
            assert not answered, n
            await report(ada, task, "completed", result=n)

    answered: list[Any] = []
    async with anyio.create_task_group() as group:
        group.start_soon(work)
        with anyio.fail_after(20):
            answer = await bob.post("/tasks/query", json=asked, headers={"Prefer": "wait=60"})
            answered.append(answer)
    assert answer.headers["preference-applied"] == "wait=60"
    results = {t["id"]: t["result"] for t in answer.json()["tasks"]}
    assert results == dict(zip(ids, reversed(range(6)), strict=True))
    assert answer.json()["missing"] == sorted([secret, asked["ids"][-1]])
    late = await submit(ada)
    started = anyio.current_time()
    answer = await ada.post(
        "/tasks/query", json={"ids": [late["id"]]}, headers={"Prefer": "wait=1"}
    )
    assert 0.9 < anyio.current_time() - started < 10
    assert answer.json()["tasks"] == [await read(ada, late)]


# --- what it costs ---


async def test_statements_do_not_grow_with_the_batch(app, ada, engine):
    # no heartbeat gets due meanwhile, and each submission is counted
    app.state.joblib_settings = JobLibSettings(
        worker_timeout_seconds=3600, max_pending_tasks_per_user=ALWAYS_COUNTED
    )
    worker = await offer(ada, max_attempts=2)
    await submit(ada)
    await claim(ada, worker)
    ran: list[str] = []

    def note(connection, cursor, statement, parameters, context, executemany):
        ran.append(statement)

    async def counted(request: Any) -> tuple[list[str], Any]:
        ran.clear()
        answer = await request
        assert answer.status_code < 300, answer.text
        return list(ran), answer.json()

    event.listen(engine.sync_engine, "before_cursor_execute", note)
    statements = []
    for many in (2, 32):
        tasks = [{"payload": {"n": n}, "priority": n % 7} for n in range(many)]
        submitted, answer = await counted(ada.post(BATCH, json={"tasks": tasks}))
        body = {"worker_id": worker, "max_tasks": many, "start": True}
        claimed, _ = await counted(ada.post("/tasks/claim", json=body))
        asked, _ = await counted(ada.post("/tasks/query", json=answer))
        ends = ["completed", "failed"] * (many // 2)
        reports = [
            {"id": id_, "status": end, "result": n, "error": f"{n}"}
            for n, (id_, end) in enumerate(zip(answer["ids"], ends, strict=True))
        ]
        reported, _ = await counted(ada.patch("/tasks", json={"reports": reports}))
        statements.append((submitted, claimed, reported, asked))
        await claim(ada, worker, max_tasks=32)
    event.remove(engine.sync_engine, "before_cursor_execute", note)
    # each with the one that looks the user up
    counts = [tuple(map(len, of_batch)) for of_batch in statements]
    assert counts == [(1 + 5, 1 + 1, 1 + 4, 1 + 2)] * 2, statements


async def test_ids_of_a_batch_are_in_its_order_and_of_its_time(ada):
    await offer(ada)
    before, after = [await submit_many(ada, *[{}] * 40) for _ in range(2)]
    assert all(a < b for a, b in pairwise(before + after))
    assert {id_[14] for id_ in before} == {"7"}
    created = {task["created_at"] for task in await read_many(ada, before)}
    assert len(created) == 1
    assert datetime.fromisoformat(created.pop()).tzinfo

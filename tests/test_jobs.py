"""Jobs: who may register what, which room sees it, and how it comes and goes."""

import asyncio
from uuid import UUID, uuid4

import pytest
from sqlalchemy import select, update
from steps import (
    JOB,
    claim,
    execute,
    move,
    offer,
    problem,
    read,
    register,
    report,
    silence,
    stored,
    submit,
)

from zndraw_joblib.delivery import runtime_of
from zndraw_joblib.events import job_key
from zndraw_joblib.models import Job, WorkerJobLink

SCHEMA = {"type": "object", "properties": {"angle": {"type": "number"}}}


async def test_a_job_is_made_then_joined(ada, bob, events):
    made = await register(ada, schema=SCHEMA)
    assert made.status_code == 201
    job = made.json()
    assert job["full_name"] == JOB
    assert job["schema"] == SCHEMA
    assert job["workers"] == [job["worker_id"]]
    assert events == [("jobs_invalidate", {}, "room:lab")]

    # the order of keys is no part of a schema
    turned = dict(reversed(SCHEMA.items()))
    again = await register(ada, schema=turned, worker_id=job["worker_id"])
    assert (again.status_code, again.json()) == (200, job)
    assert len(events) == 1, "nothing changed"

    joined = await register(bob, schema=SCHEMA)
    assert joined.status_code == 200
    assert joined.json()["id"] == job["id"]
    assert set(joined.json()["workers"]) == {job["worker_id"], joined.json()["worker_id"]}
    assert len(events) == 2


async def test_refused_registrations_leave_nothing(ada, bob, admin, session_maker):
    await offer(ada, schema=SCHEMA)
    bobs = (await bob.post("/workers")).json()["id"]
    before = await stored(session_maker)
    for user, room, fields, status, kind in (
        (ada, "lab", {"schema": {}}, 409, "schema-conflict"),
        (ada, "lab", {"schema": {}, "max_attempts": 3}, 409, "schema-conflict"),
        (ada, "lab", {"category": "no such"}, 400, "invalid-category"),
        (ada, "lab", {"name": "New", "worker_id": bobs}, 404, "worker-not-found"),
        (ada, "lab", {"name": "New", "worker_id": str(uuid4())}, 404, "worker-not-found"),
        (ada, "@global", {}, 403, "forbidden"),
        (ada, "@internal", {}, 403, "forbidden"),
        (admin, "@other", {}, 400, "invalid-room-id"),
        (ada, "lab", {"schema": {"type": "no such"}}, 422, "invalid-schema"),
    ):
        problem(await register(user, room=room, **fields), status, kind)
        assert await stored(session_maker) == before, (room, fields)


async def test_another_schema_takes_the_place_of_ones_own(app, ada, bob, session_maker, events):
    """A worker that has the old class gets nothing of the new one, also if it waits."""
    app.state.joblib_settings.recheck_seconds = 1000
    new = {**SCHEMA, "title": "New"}
    old = await offer(ada, schema=SCHEMA, worker={"name": "old"})
    silent = await offer(bob, schema=SCHEMA)
    refused = problem(await register(ada, schema=new), 409, "schema-conflict")["detail"]
    assert "/title" in refused
    assert f"{silent} (not yours), old (yours)" in refused
    refused = problem(await register(ada, schema=new, replace=True), 409, "schema-conflict")
    assert "replace" not in refused["detail"]
    await silence(session_maker, silent)
    refused = problem(await register(ada, schema=new), 409, "schema-conflict")["detail"]
    assert "replace" in refused
    body, wait = {"worker_id": old}, {"Prefer": "wait=60"}
    waiting = asyncio.create_task(ada.post("/tasks/claim", json=body, headers=wait))
    while job_key(JOB) not in runtime_of(app).waiters.by_key:
        await asyncio.sleep(0.01)
    events.clear()
    replaced = await register(ada, schema=new, replace=True)
    assert (replaced.status_code, replaced.json()["schema"]) == (200, new)
    worker = replaced.json()["worker_id"]
    assert replaced.json()["workers"] == [worker]
    assert [e.event for e in events] == ["jobs_invalidate"]
    task = await submit(ada)
    for lost in (old, silent):
        user = ada if lost == old else bob
        assert (await user.patch(f"/workers/{lost}")).json()["jobs"] == 0
        assert await claim(user, lost) == []
        answer = await register(user, schema=SCHEMA, worker_id=lost)
        problem(answer, 409, "schema-conflict")
    await register(ada, "Other", worker_id=old)
    other = await submit(ada, "lab:modifiers:Other")
    # it was woken, and listens for what it serves now
    answer = await asyncio.wait_for(waiting, 30)
    assert answer.json()["task"]["id"] == other["id"]
    assert [t["id"] for t in await claim(ada, worker)] == [task["id"]]
    # with the new class it may
    assert (await register(ada, schema=new, worker_id=old)).status_code == 200


@pytest.mark.makers("postgres")
async def test_nobody_waits_for_a_worker_that_goes_and_for_its_job(ada, session_maker):
    """The links of a worker that goes are locked, and it will ask for the job's row."""
    old = await offer(ada)
    links = select(WorkerJobLink).where(WorkerJobLink.worker_id == UUID(old)).with_for_update()
    new = {"schema": SCHEMA, "replace": True}
    async with session_maker() as going:
        await going.execute(links)
        refused = problem(await register(ada, **new), 503, "service-unavailable")
        assert "about to go" in refused["detail"]
        await going.rollback()
    assert (await register(ada, **new)).json()["workers"] != [old]


async def test_registering_with_another_policy_updates_it(ada):
    first = (await register(ada, max_attempts=2, timeout_seconds=9.5)).json()
    policy = {
        "max_attempts": 2,
        "retry_delay_seconds": 0,
        "timeout_seconds": 9.5,
        "start_timeout_seconds": None,
    }
    assert policy.items() <= first.items()
    for said in ({"max_attempts": 5, "timeout_seconds": None}, {}):
        again = await register(ada, **said)
        policy |= said
        assert again.status_code == 200
        assert policy.items() <= again.json().items(), "what is not said stays"


@pytest.mark.parametrize("limit", ["timeout_seconds", "start_timeout_seconds"])
async def test_a_limit_that_nothing_could_keep_is_refused(ada, limit):
    for seconds in (0, -1, 0.001, "1", 1e300):
        refused = await register(ada, **{limit: seconds})
        (error,) = problem(refused, 422, "invalid-request")["errors"]
        assert error["pointer"] == f"/body/{limit}"


async def test_a_policy_is_set_by_those_who_serve_alone(ada, bob, admin, session_maker):
    hers = await offer(ada, timeout_seconds=60)

    async def ask(user, kept, seconds, **policy):
        answer = await register(user, **policy)
        assert answer.status_code == 200
        told = answer.json()
        assert (told["policy_kept"], told["timeout_seconds"]) == (kept, seconds)
        return told["worker_id"]

    # who joins another user's job may say what stands, and change nothing
    his = await ask(bob, True, 60, timeout_seconds=1, max_attempts=9)
    await ask(bob, False, 60, timeout_seconds=60, worker_id=his)
    await ask(bob, False, 60, worker_id=his)
    # nor may she, now that two serve it
    await ask(ada, True, 60, timeout_seconds=50, worker_id=hers)
    await ask(admin, False, 40, timeout_seconds=40)
    theirs = (await ada.get("/workers")).json()["items"]
    await silence(session_maker, *(w["id"] for w in theirs if w["id"] != his))
    await ask(bob, False, 30, timeout_seconds=30, worker_id=his)


async def test_what_a_room_does_not_see_is_not_there(ada, bob, admin):
    for user, name, room in (
        (ada, "Mine", "lab"),
        (bob, "Theirs", "attic"),
        (admin, "All", "@global"),
        (admin, "Own", "@internal"),
    ):
        await offer(user, name, room)
    names = {
        "lab:modifiers:Mine",
        "attic:modifiers:Theirs",
        "@global:modifiers:All",
        "@internal:modifiers:Own",
    }
    for room, sees in (
        ("lab", {"Mine", "All", "Own"}),
        ("attic", {"Theirs", "All", "Own"}),
        ("@global", {"All"}),
        ("@internal", {"Own"}),
    ):
        page = (await ada.get(f"/rooms/{room}/jobs")).json()
        assert {job["name"] for job in page["items"]} == sees
        assert page["total"] == len(sees)
        for name in names:
            visible = name.rpartition(":")[2] in sees
            job = await ada.get(f"/rooms/{room}/jobs/{name}")
            tasks = await ada.get(f"/rooms/{room}/jobs/{name}/tasks")
            if visible:
                assert (job.status_code, tasks.status_code) == (200, 200)
                assert job.json()["full_name"] == name
            else:
                problem(job, 404, "job-not-found")
                problem(tasks, 404, "job-not-found")
                submitted = await ada.post(f"/rooms/{room}/tasks/{name}", json={})
                problem(submitted, 404, "job-not-found")


@pytest.mark.parametrize(
    "name", ["", "Rotate", "modifiers:Rotate", "lab:modifiers", "lab::", "lab:modifiers:", ":::"]
)
async def test_a_malformed_name_is_no_jobs(ada, name):
    await offer(ada)
    if name:
        problem(await ada.get(f"/rooms/lab/jobs/{name}"), 404, "job-not-found")
        problem(await ada.get(f"/rooms/lab/jobs/{name}/tasks"), 404, "job-not-found")
    submitted = await ada.post(f"/rooms/lab/tasks/{name}", json={})
    assert submitted.status_code in (404, 405)


@pytest.mark.parametrize(
    ("name", "in_path"),
    [
        ("Rotate", "lab%3Amodifiers%3ARotate"),
        ("a/b c", "lab:modifiers:a/b%20c"),
        ("/data/", "lab:modifiers:/data/"),
        ("a//b", "lab:modifiers:a//b"),
        ("a\\b", "lab:modifiers:a%5Cb"),
        (".", "lab:modifiers:."),
        ("tasks", "lab:modifiers:tasks"),
        ("a/tasks/b", "lab:modifiers:a/tasks/b"),
        ("info", "lab:modifiers:info"),
        ("50%", "lab:modifiers:50%25"),
        ("%2Ftasks", "lab:modifiers:%252Ftasks"),
        ("旋转 🌀?#", "lab:modifiers:%E6%97%8B%E8%BD%AC%20%F0%9F%8C%80%3F%23"),
        ("👩\u200d🔬", "lab:modifiers:%F0%9F%91%A9%E2%80%8D%F0%9F%94%AC"),
        ("Caf\xe9", "lab:modifiers:Cafe%CC%81"),
        ("🧪" * 255, "lab:modifiers:" + "%F0%9F%A7%AA" * 255),
    ],
)
async def test_what_is_registered_is_reached(ada, name, in_path):
    worker = await offer(ada, name)
    job = await ada.get(f"/rooms/lab/jobs/{in_path}")
    assert job.json()["name"] == name
    task = await submit(ada, in_path)
    assert task["job_name"] == f"lab:modifiers:{name}"
    assert [t["id"] for t in await claim(ada, worker)] == [task["id"]]
    page = (await ada.get(f"/rooms/lab/jobs/{in_path}/tasks")).json()
    assert [t["id"] for t in page["items"]] == [task["id"]]


async def test_two_spellings_of_a_name_are_one(ada, bob):
    """Composed and decomposed: whichever comes first, the other one finds it."""
    composed, decomposed = "Caf\xe9", "Cafe\u0301"
    made = (await register(ada, decomposed)).json()
    again = await register(bob, composed)
    assert (again.status_code, again.json()["id"]) == (200, made["id"])
    assert made["full_name"] == f"lab:modifiers:{composed}"
    for spelling in (composed, decomposed):
        task = await submit(ada, f"lab:modifiers:{spelling}")
        assert task["job_name"] == made["full_name"]


async def test_what_could_not_be_reached_is_refused(ada, session_maker):
    """Or told apart from others by eye. Names by their kind; rooms for everybody."""
    long = "🧪" * 255
    before = await stored(session_maker)
    for kind, name in (
        *(("jobs", n) for n in ("x/tasks", "/tasks", "a/../b", "a/.", "..//..", "x/..")),
        *(("jobs", n) for n in ("a\u202eb", "a\u200bb", "\ufeffa", "a\u2028b", "\u2066a")),
        *(("providers", n) for n in ("a/info", "/info", "../..", "a/./b", "", "a:b")),
    ):
        body = {"category": "modifiers", "name": name, "schema": {}}
        refused = await ada.put(f"/rooms/lab/{kind}", json=body)
        (error,) = problem(refused, 422, "invalid-request")["errors"]
        assert error["pointer"] == "/body/name", (kind, name)
    body = {"category": long, "name": long, "schema": {}}
    refused = await ada.put(f"/rooms/{long}/providers", json=body)
    (error,) = problem(refused, 422, "invalid-request")["errors"]
    assert "2560 bytes" in error["detail"]
    for room in ("%2E", "%2E%2E", "a@b", "a:b", "%0A", "r" * 256):
        problem(await register(ada, room=room), 400, "invalid-room-id")
    assert await stored(session_maker) == before


async def test_a_job_comes_back_with_another_schema(ada):
    worker = await offer(ada, schema=SCHEMA, max_attempts=3)
    task = await submit(ada)
    await move(ada, worker, task, "completed")
    job = (await ada.get(f"/rooms/lab/jobs/{JOB}")).json()
    await ada.delete(f"/workers/{worker}")
    for gone in (
        await ada.get(f"/rooms/lab/jobs/{JOB}"),
        await ada.get(f"/rooms/lab/jobs/{JOB}/tasks"),
        await ada.post(f"/rooms/lab/tasks/{JOB}", json={}),
    ):
        problem(gone, 404, "job-not-found")
    # who asks for the task still hears what it was
    assert (await read(ada, task))["job_name"] == JOB

    back = await register(ada, schema={"type": "object"})
    assert back.status_code == 201
    assert back.json()["schema"] == {"type": "object"}
    assert back.json()["max_attempts"] == 1
    assert back.json()["id"] == job["id"]
    page = (await ada.get(f"/rooms/lab/jobs/{JOB}/tasks")).json()
    assert [t["id"] for t in page["items"]] == [task["id"]]


async def test_a_jobs_tasks_are_shown_to_the_room_that_submitted_them(ada, admin):
    job = "@global:modifiers:Rotate"
    worker = await offer(admin, room="@global")
    here, there = await submit(ada, job, "lab"), await submit(ada, job, "attic")
    for room, task in (("lab", here), ("attic", there)):
        for url in (f"/rooms/{room}/jobs/{job}/tasks", f"/rooms/{room}/tasks"):
            page = (await ada.get(url)).json()
            assert [t["id"] for t in page["items"]] == [task["id"]]
    await claim(admin, worker)
    for status, found in (("claimed", [here["id"]]), ("pending", [])):
        url = f"/rooms/lab/jobs/{job}/tasks?status={status}"
        assert [t["id"] for t in (await ada.get(url)).json()["items"]] == found


async def test_workers_alive_are_told_apart(ada, bob, session_maker):
    silent, _ = await offer(ada), await offer(bob)
    await silence(session_maker, silent)
    (listed,) = (await ada.get("/rooms/lab/jobs")).json()["items"]
    job = (await ada.get(f"/rooms/lab/jobs/{JOB}")).json()
    for shown in (listed, job):
        assert (len(shown["workers"]), shown["workers_alive"]) == (2, 1)


async def test_a_job_that_goes_while_a_task_comes_in_is_not_found(ada, session_maker):
    await offer(ada)
    await execute(session_maker, update(Job).values(deleted=True))
    problem(await ada.post(f"/rooms/lab/tasks/{JOB}", json={}), 404, "job-not-found")
    assert (await stored(session_maker))["task"] == 0


async def test_the_payload_fits_the_jobs_schema(ada, session_maker):
    await offer(ada, schema={**SCHEMA, "required": ["angle"]})
    refused = await ada.post(f"/rooms/lab/tasks/{JOB}", json={"payload": {"angle": "right"}})
    (error,) = problem(refused, 422, "payload-mismatch")["errors"]
    assert error["pointer"] == "/body/payload/angle"
    assert error["detail"]
    refused = await ada.post(f"/rooms/lab/tasks/{JOB}", json={})
    (error,) = problem(refused, 422, "payload-mismatch")["errors"]
    assert error["pointer"] == "/body/payload"
    assert (await stored(session_maker))["task"] == 0
    assert (await submit(ada, payload={"angle": 90}))["payload"] == {"angle": 90}


async def test_a_schema_can_make_the_server_call_nobody(ada, server, session_maker):
    """The host itself would answer, and be seen to be asked."""
    schema = {"$ref": f"{server}/openapi.json"}
    problem(await register(ada, schema=schema), 422, "invalid-schema")
    assert (await stored(session_maker))["job"] == 0


async def test_reports_after_a_job_is_gone(ada, bob):
    """Its last worker goes while another user's task is still held elsewhere."""
    first, second = await offer(ada), await offer(bob)
    await submit(ada)
    (task,) = await claim(bob, second)
    await ada.delete(f"/workers/{first}")
    for status in ("running", "completed"):
        assert (await report(bob, task, status)).status_code == 200

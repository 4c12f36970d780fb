"""What one user may take of a host, and how it is refused."""

import pytest
from steps import JOB, claim, offer, problem, read, register, report, silence, stored, submit

from zndraw_joblib import submissions


def refused(answer):
    problem(answer, 429, "quota-exceeded")
    assert int(answer.headers["retry-after"]) > 0


async def test_how_many_workers_a_user_may_have(app, ada, bob):
    app.state.joblib_settings.max_workers_per_user = 2
    worker = await offer(ada)
    await ada.post("/workers")
    refused(await ada.post("/workers"))
    refused(await register(ada, "Scale"))
    body = {"category": "files", "name": "data", "schema": {}}
    refused(await ada.put("/rooms/lab/providers", json=body))
    # with a worker that is there she may, and so may others
    assert (await register(ada, "Scale", worker_id=worker)).status_code == 201
    assert (await bob.post("/workers")).status_code == 201
    await ada.delete(f"/workers/{worker}")
    assert (await ada.post("/workers")).status_code == 201


async def test_how_many_jobs_and_providers_a_user_may_have(app, ada, bob, session_maker):
    settings = app.state.joblib_settings
    settings.max_jobs_per_user = settings.max_providers_per_user = 2
    worker = await offer(ada, "A")
    await offer(ada, "B", worker_id=worker)
    before = await stored(session_maker)
    refused(await register(ada, "C", worker_id=worker))
    assert await stored(session_maker) == before
    # what is there may be served by more of them, and others may offer it
    assert (await register(ada, "B")).status_code == 200
    assert (await register(bob, "C")).status_code == 201
    body = {"category": "files", "schema": {}, "worker_id": worker}
    answers = [
        await ada.put("/rooms/lab/providers", json={"name": name, **body})
        for name in ("a", "b", "b", "c")
    ]
    assert [answer.status_code for answer in answers] == [201, 201, 200, 429]
    refused(answers[-1])


async def test_a_host_may_take_no_tasks_for_nobody(app, ada, session_maker):
    """However they come: one, many, or again."""
    worker, tasks = await offer(ada), f"/rooms/lab/tasks/{JOB}"
    ended = await submit(ada)
    await ada.patch(f"/tasks/{ended['id']}", json={"status": "cancelled"})
    ways = (
        (tasks, {}),
        (f"/rooms/lab/batches/{JOB}", {"tasks": [{}, {}]}),
        (f"/tasks/{ended['id']}/retry", None),
    )
    app.state.joblib_settings.accept_without_workers = False
    await silence(session_maker, worker)
    before = await stored(session_maker)
    for way, body in ways:
        problem(await ada.post(way, json=body), 409, "no-workers-available")
    assert await stored(session_maker) == before
    await ada.patch(f"/workers/{worker}")
    for way, body in ways:
        assert (await ada.post(way, json=body)).status_code == 202


async def test_how_many_tasks_of_a_user_may_wait(app, ada, bob, admin):
    app.state.joblib_settings.max_pending_tasks_per_user = 20
    worker = await offer(ada)
    await offer(ada, "Scale")
    scale = JOB.replace("Rotate", "Scale")
    for n in range(19):
        # over all jobs and priorities
        await submit(ada, scale if n % 5 == 4 else JOB, priority=-(n % 2))
    keyed = {"headers": {"Idempotency-Key": '"mine"'}, "json": {}}
    last = await ada.post(f"/rooms/lab/tasks/{JOB}", **keyed)

    async def submit_one_more(job=JOB):
        return await ada.post(f"/rooms/lab/tasks/{job}", json={})

    refused(await submit_one_more())
    refused(await submit_one_more(scale))
    again = await ada.post(f"/rooms/lab/tasks/{JOB}", **keyed)
    assert (again.status_code, again.json()["id"]) == (202, last.json()["id"])
    held = await claim(ada, worker, max_tasks=5)
    await submit(bob)
    batch = {"tasks": [{}] * 6}
    refused(await ada.post(f"/rooms/lab/batches/{JOB}", json=batch))
    batch = {"tasks": [{}] * 5}
    assert (await ada.post(f"/rooms/lab/batches/{JOB}", json=batch)).status_code == 202
    # what ended and is set going again waits too, whoever does it
    await report(ada, held[0], "cancelled")
    for user in (ada, admin):
        refused(await user.post(f"/tasks/{held[0]['id']}/retry"))
    assert (await read(ada, held[0]))["status"] == "cancelled"
    await report(ada, last.json(), "cancelled")
    assert (await ada.post(f"/tasks/{held[0]['id']}/retry")).status_code == 202
    refused(await submit_one_more())
    assert (await ada.get("/rooms/lab/tasks?status=pending")).json()["total"] == 21


async def test_each_queue_is_entered_once_and_the_limit_holds(app, ada):
    most = app.state.joblib_settings.max_pending_tasks_per_user = 40
    await offer(ada)
    answers = [
        await ada.post(f"/rooms/lab/tasks/{JOB}", json={"priority": n}) for n in range(most + 8)
    ]
    assert [answer.status_code for answer in answers] == [202] * most + [429] * 8


@pytest.mark.makers("plain")
async def test_a_flood_is_counted_now_and_then_and_comes_to_its_end(app, ada, engine, monkeypatch):
    from sqlalchemy import event

    monkeypatch.setattr(submissions, "ALWAYS_COUNTED", 100)
    most = app.state.joblib_settings.max_pending_tasks_per_user = 200
    await offer(ada)
    counted = []

    def note(connection, cursor, statement, *args):
        if statement.startswith("SELECT count") and "created_by_id" in statement:
            counted.append(statement)

    event.listen(engine.sync_engine, "before_cursor_execute", note)
    batch = {"tasks": [{}] * 5}
    while len(counted) <= most:
        answer = await ada.post(f"/rooms/lab/batches/{JOB}", json=batch)
        if answer.status_code != 202:
            break
    refused(answer)
    # each twentieth is asked for
    assert 20 <= len(counted) <= 23
    waiting = (await ada.get("/rooms/lab/tasks?limit=0")).json()["total"]
    assert most <= waiting <= most + most // 20
    # and it is no door that opens at the next place
    refused(await ada.post(f"/rooms/lab/batches/{JOB}", json=batch))

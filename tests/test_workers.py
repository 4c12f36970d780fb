"""Workers: whose they are, what keeps them alive, and what goes when they go."""

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import insert, select, update
from steps import (
    JOB,
    at_once,
    claim,
    execute,
    move,
    offer,
    problem,
    read,
    register,
    report,
    silence,
    statuses,
    submit,
)

from zndraw_joblib.models import Job, Worker, WorkerJobLink, now
from zndraw_joblib.sweeper import cleanup_stale_workers


async def worker_row(session_maker, worker):
    async with session_maker() as session:
        rows = await session.execute(
            select(Worker.last_heartbeat, Worker.state).where(Worker.id == UUID(worker))
        )
        return rows.one()


async def was_heard_of(session_maker, worker) -> bool:
    row = await worker_row(session_maker, worker)
    return datetime.now(UTC) - row.last_heartbeat < timedelta(minutes=30)


async def test_a_worker_is_its_owners(ada, bob, admin):
    made = await ada.post("/workers")
    assert made.status_code == 201
    url = f"/workers/{made.json()['id']}"
    beat = await ada.patch(url)
    assert beat.status_code == 200
    moments = [datetime.fromisoformat(a.json()["last_heartbeat"]) for a in (made, beat)]
    assert moments[0] <= moments[1]
    assert all(m.utcoffset() == timedelta(0) for m in moments)

    problem(await bob.patch(url), 403, "forbidden")
    problem(await admin.patch(url), 403, "forbidden")
    problem(await bob.delete(url), 403, "forbidden")
    assert (await admin.delete(url)).status_code == 204
    for request in (ada.patch, ada.delete):
        problem(await request(url), 404, "worker-not-found")
        problem(await request(f"/workers/{uuid4()}"), 404, "worker-not-found")


async def test_heartbeats_claims_and_registrations_keep_a_worker_alive(ada, session_maker):
    worker = await offer(ada)
    task = await submit(ada)

    async def beat():
        await ada.patch(f"/workers/{worker}")

    async def claim_a_task():
        await claim(ada, worker)

    async def register_again():
        await register(ada, worker_id=worker)

    for act in (beat, claim_a_task, register_again):
        await silence(session_maker, worker)
        assert not await was_heard_of(session_maker, worker)
        await act()
        assert await was_heard_of(session_maker, worker), act.__name__
    # one process may report for another
    await silence(session_maker, worker)
    await report(ada, task, "running")
    assert not await was_heard_of(session_maker, worker)


async def test_what_others_do_keeps_no_worker_alive(ada, admin, session_maker):
    worker = await offer(ada)
    await submit(ada)
    (task,) = await claim(ada, worker)
    await silence(session_maker, worker)
    await report(admin, task, "running")
    await admin.patch(f"/workers/{worker}", json={"state": "draining"})
    await ada.get("/workers")
    assert not await was_heard_of(session_maker, worker)


async def test_what_a_worker_held_fails_with_it(ada, admin, events):
    worker = await offer(ada)
    tasks = [await submit(ada) for _ in range(3)]
    await move(ada, worker, tasks[0], "completed")
    await move(ada, worker, tasks[1], "running")
    await move(ada, worker, tasks[2], "claimed")
    events.clear()
    assert (await ada.delete(f"/workers/{worker}")).status_code == 204

    done, *lost = [await read(ada, task) for task in tasks]
    assert done["status"] == "completed"
    for task in lost:
        assert (task["status"], task["error"]) == ("failed", "Worker disconnected")
        assert task["error_type"] == "worker_lost"
        assert task["worker_id"] == worker
        assert task["completed_at"]
    told = {e.data["id"]: e.data for e in events if e.event == "task_status_event"}
    assert told.keys() == {task["id"] for task in lost}
    assert {data["status"] for data in told.values()} == {"failed"}
    assert ("jobs_invalidate", {}, "room:lab") in events
    # nobody serves it and nothing waits for it
    problem(await ada.get(f"/rooms/lab/jobs/{JOB}"), 404, "job-not-found")
    assert (await ada.get("/rooms/lab/jobs")).json()["total"] == 0


async def test_a_job_stays_while_it_is_served_or_waited_for(ada, bob):
    first, second = await offer(ada), await offer(bob)
    await ada.delete(f"/workers/{first}")
    job = (await ada.get(f"/rooms/lab/jobs/{JOB}")).json()
    assert job["workers"] == [second]
    for delay in (0, 3600):
        waiting = await submit(ada, delay_seconds=delay)
        await bob.delete(f"/workers/{second}")
        job = (await ada.get(f"/rooms/lab/jobs/{JOB}")).json()
        assert (job["workers"], job["workers_alive"]) == ([], 0)
        assert (await read(ada, waiting))["status"] == "pending"
        second = await offer(bob)
        await report(ada, waiting, "cancelled")
    await bob.delete(f"/workers/{second}")
    problem(await ada.get(f"/rooms/lab/jobs/{JOB}"), 404, "job-not-found")


async def test_of_two_who_delete_a_worker_one_does(ada, events):
    worker = await offer(ada)
    await submit(ada)
    await claim(ada, worker)
    events.clear()
    answers = await at_once(*(ada.delete(f"/workers/{worker}") for _ in range(4)))
    assert statuses(answers) == [204, 404, 404, 404]
    assert [e.event for e in events].count("task_status_event") == 1


async def test_listings_tell_what_workers_serve(ada, bob, admin):
    idle = (await ada.post("/workers")).json()["id"]
    here = await offer(ada)
    await register(ada, "Scale", worker_id=here)
    elsewhere = await offer(bob, room="attic")
    everywhere = await offer(admin, room="@global")

    page = (await bob.get("/workers")).json()
    jobs = {w["id"]: w["job_count"] for w in page["items"]}
    assert jobs == {idle: 0, here: 2, elsewhere: 1, everywhere: 1}
    for room, serving in (
        ("lab", {here, everywhere}),
        ("attic", {elsewhere, everywhere}),
        ("@global", {everywhere}),
        ("@internal", set()),
    ):
        page = (await bob.get(f"/rooms/{room}/workers")).json()
        assert {w["id"] for w in page["items"]} == serving, room
        assert page["total"] == len(serving)


async def test_workers_have_names_and_tell_what_they_run(ada, bob, admin):
    info = {"host": "node7", "pid": 7, "version": "0.2.0", "devices": ["cuda:0 A100"]}
    made = await ada.post("/workers", json={"name": "node7:7", "info": info})
    worker = made.json()["id"]
    await register(ada, worker_id=worker)
    # a registration makes one, or describes it anew
    attic = {"name": "attic", "info": {"host": "node8"}}
    other = await offer(bob, room="attic", worker=attic)
    await register(ada, "Scale", "attic", worker_id=worker, worker={"name": "renamed"})
    files = {"category": "files", "name": "files", "schema": {}, "worker": {"name": "files"}}
    assert (await bob.put("/rooms/attic/providers", json=files)).status_code == 201
    running, claimed = await submit(bob), await submit(bob, "attic:modifiers:Scale", "attic")
    assert len(await claim(ada, worker, max_tasks=2)) == 2
    await report(ada, running, "running")
    listed = (await bob.get("/rooms/lab/workers")).json()["items"]
    task = {"id": running["id"], "job_name": JOB}
    expected = {"name": "renamed", "info": info, "held": 2, "running": [task]}
    assert [{name: w[name] for name in expected} for w in listed] == [expected]
    # in another room, and to others, what it runs is not told
    for user, path, runs in (
        (bob, "/rooms/attic/workers", []),
        (bob, "/workers", []),
        (ada, "/workers", [task]),
        (admin, "/workers", [task]),
    ):
        found = {w["id"]: w for w in (await user.get(path)).json()["items"]}
        assert (found[worker]["held"], found[worker]["running"]) == (2, runs), path
        assert found[other]["name"] == "attic"
        assert found[other]["info"] == {**dict.fromkeys(info), "host": "node8", "devices": []}
    assert claimed["id"] not in str(listed)


async def test_how_long_silence_may_last_is_one_setting(ada, app, session_maker):
    """Listings, counts, submissions and sweeps agree on who is alive."""
    settings = app.state.joblib_settings
    settings.worker_timeout_seconds = 20_000
    settings.accept_without_workers = False
    silent, heard = await offer(ada), await offer(ada, "Scale")
    job = f"/rooms/lab/jobs/{JOB}"

    async def items(path: str, name: str, shown: str) -> dict[str, Any]:
        return {i[name]: i[shown] for i in (await ada.get(path)).json()["items"]}

    for seconds, alive in ((19_500, True), (20_500, False)):
        ago = update(Worker).values(last_heartbeat=now(-seconds))
        await execute(session_maker, ago.where(Worker.id == UUID(silent)))
        for path in ("/workers", "/rooms/lab/workers"):
            assert await items(path, "id", "alive") == {silent: alive, heard: True}
        listed = await items("/rooms/lab/jobs", "name", "workers_alive")
        counted = await items("/rooms/lab/stats", "job_name", "workers_alive")
        assert listed == {"Rotate": alive, "Scale": 1}
        assert counted[JOB] == alive
        assert (await ada.get(job)).json()["workers_alive"] == alive
        answer = await ada.post(f"/rooms/lab/tasks/{JOB}", json={})
        assert answer.status_code == (202 if alive else 409)
        assert await cleanup_stale_workers(session_maker, settings) == (not alive)
    assert set(await items("/workers", "id", "alive")) == {heard}


async def test_a_draining_worker_finishes_and_gets_nothing_new(ada, bob, admin):
    worker = await offer(ada)
    url = f"/workers/{worker}"
    await submit(ada)
    (held,) = await claim(ada, worker)
    waiting = await submit(ada)
    problem(await bob.patch(url, json={"state": "draining"}), 403, "forbidden")
    drained = await admin.patch(url, json={"state": "draining"})
    assert (drained.status_code, drained.json()["state"]) == (200, "draining")
    assert (await ada.patch(url)).json()["desired_state"] == "draining"
    assert await claim(ada, worker) == []
    for status in ("running", "completed"):
        assert (await report(ada, held, status)).status_code == 200
    assert (await ada.patch(url, json={"state": "active"})).json()["state"] == "active"
    assert [task["id"] for task in await claim(ada, worker)] == [waiting["id"]]


async def test_a_heartbeat_carries_progress_and_brings_what_to_stop(ada, bob, events):
    worker, other = await offer(ada), await offer(bob)
    tasks = [await submit(ada) for _ in range(5)]
    mine = await claim(ada, worker, max_tasks=4)
    (foreign,) = await claim(bob, other)
    going, gone, handed_back, quiet = mine
    await report(ada, gone, "cancelled")
    await report(ada, handed_back, "pending")
    events.clear()
    said = [
        {"id": going["id"], "attempt": 1, "progress": 0.4, "message": "four of ten"},
        {"id": gone["id"], "attempt": 1, "progress": 0.5},
        {"id": handed_back["id"], "attempt": 1, "progress": 0.6},
        {"id": quiet["id"], "attempt": 1},
        {"id": foreign["id"], "attempt": 1, "progress": 0.7, "message": "mine now"},
        {"id": str(uuid4()), "attempt": 1},
    ]
    beat = (await ada.patch(f"/workers/{worker}", json={"tasks": said})).json()
    assert beat["cancelled"] == [gone["id"]]
    still_mine = {going["id"], quiet["id"], gone["id"]}
    assert set(beat["lost"]) == {s["id"] for s in said} - still_mine
    shown = [await read(ada, task) for task in tasks]
    assert [task["progress"] for task in shown] == [0.4, None, None, None, None]
    assert shown[0]["progress_message"] == "four of ten"
    assert [(e.event, e.data["progress"]) for e in events] == [("task_status_event", 0.4)]
    # another attempt than the current one says nothing of it
    late = {"id": going["id"], "attempt": 7, "progress": 0.9}
    beat = (await ada.patch(f"/workers/{worker}", json={"tasks": [late]})).json()
    assert beat["lost"] == [going["id"]]
    # what a heartbeat does not tell, it does not take back
    for said, shown in (
        ({"message": "on"}, (0.4, "on")),
        ({"progress": 0.0}, (0.0, "on")),
        ({}, (0.0, "on")),
    ):
        said = {"id": going["id"], "attempt": 1, **said}
        await ada.patch(f"/workers/{worker}", json={"tasks": [said]})
        task = await read(ada, going)
        assert (task["progress"], task["progress_message"]) == shown


async def test_what_an_attempt_saved_goes_to_the_next_one(ada, events):
    worker = await offer(ada, max_attempts=2)
    other = await submit(ada)
    submitted = await submit(ada)
    held = {task["id"]: task for task in await claim(ada, worker, max_tasks=2)}
    assert all(task["checkpoint"] is None for task in held.values())
    task = held[submitted["id"]]

    async def save(checkpoint, attempt=1, **more):
        said = {"id": task["id"], "attempt": attempt, "checkpoint": checkpoint, **more}
        beats = {"tasks": [{"id": other["id"], "attempt": 1, "message": "busy"}, said]}
        answer = await ada.patch(f"/workers/{worker}", json=beats)
        return answer.status_code, (await read(ada, task))["checkpoint"]

    state = {"step": 2.0, "é": [1, None, True]}
    assert await save(state, progress=0.5) == (200, state)
    assert (await read(ada, task))["progress"] == 0.5
    assert (await read(ada, other))["checkpoint"] is None
    # what a heartbeat doesn't tell it doesn't take back, nor what another attempt says
    assert await save(None) == await save("late", attempt=7) == (200, state)
    full = "é" * (32 * 1024 - 1)
    assert await save(full + "a") == (422, state)
    assert await save(full) == (200, full)
    assert await save(0) == (200, 0)
    for listed in (
        (await ada.get("/rooms/lab/tasks")).json()["items"],
        (await ada.post("/tasks/query", json={"ids": [task["id"]]})).json()["tasks"],
    ):
        assert all(task["checkpoint"] is None for task in listed)
    assert "checkpoint" not in events[-1].data

    await report(ada, task, "failed", attempt=1)
    (again,) = await claim(ada, worker)
    assert (again["attempt"], again["checkpoint"]) == (2, 0)
    assert await save([1], attempt=2) == (200, [1])
    for status, kept in (("failed", [1]), ("completed", None)):
        ended = await report(ada, again, status, attempt=again["attempt"])
        assert (ended.json()["status"], ended.json()["checkpoint"]) == (status, [1])
        # what has come to its end begins anew
        assert (await ada.post(f"/tasks/{task['id']}/retry")).json()["checkpoint"] == kept
        (again,) = await claim(ada, worker, start=True)
        assert again["checkpoint"] == kept


@pytest.mark.parametrize("count", [1, 256])
async def test_a_heartbeat_of_any_permitted_size(ada, session_maker, count):
    worker = await offer(ada)
    said = [
        {"id": str(uuid4()), "attempt": n, "progress": 0.5, "message": "half"} for n in range(count)
    ]
    beat = await ada.patch(f"/workers/{worker}", json={"tasks": said})
    assert beat.status_code == 200, beat.text
    assert len(beat.json()["lost"]) == count


async def test_a_worker_may_serve_a_thousand_jobs(ada, session_maker):
    worker = await offer(ada)
    await submit(ada)
    jobs = [uuid4() for _ in range(999)]
    rows = [
        {"id": j, "room_id": f"room{n}", "category": "c", "name": "n", "schema_": {}}
        for n, j in enumerate(jobs)
    ]
    links = [{"worker_id": UUID(worker), "job_id": j} for j in jobs]
    await execute(session_maker, insert(Job).values(rows), insert(WorkerJobLink).values(links))
    assert [t["status"] for t in await claim(ada, worker)] == ["claimed"]
    assert (await ada.delete(f"/workers/{worker}")).status_code == 204

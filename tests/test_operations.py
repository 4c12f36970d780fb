"""Operations: what those who run a room do with its jobs, and with the tasks of others."""

import asyncio
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from fastapi import FastAPI
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
    submit,
)  # fmt: skip

from zndraw_joblib import expel, get_room_access
from zndraw_joblib.delivery import runtime_of
from zndraw_joblib.events import job_key
from zndraw_joblib.models import Job, Task, now
from zndraw_joblib.sweeper import cleanup_idle_jobs

pytestmark = pytest.mark.makers("plain", "postgres")

BULK = "/rooms/lab/tasks/bulk"


@pytest.fixture
def run_by(app: FastAPI):
    """Let somebody run the rooms."""

    def run_by(*operators: Any) -> None:
        ids = {user.id for user in operators}

        async def may(session: Any, caller: Any, room_id: str, action: Any) -> bool:
            return action.kind != "operate" or caller.is_superuser or caller.id in ids

        async def room_access():
            return may

        app.dependency_overrides[get_room_access] = room_access

    return run_by


async def pause(user: Any, paused: bool, job: str = JOB, room: str = "lab") -> Any:
    return await user.patch(f"/rooms/{room}/jobs/{job}", json={"paused": paused})


async def test_a_paused_job_gives_nothing_until_it_goes_on(app, ada, admin, events):
    app.state.joblib_settings.recheck_seconds = 1000
    worker = await offer(ada)
    other = await register(ada, "Scale", worker_id=worker)
    task = await submit(ada)
    events.clear()
    answer = await pause(admin, True)
    assert (answer.status_code, answer.json()["paused"]) == (200, True)
    assert [(e.event, e.room) for e in events] == [("jobs_invalidate", "room:lab")]
    assert (await pause(admin, True)).json()["paused"]
    assert len(events) == 1
    assert await claim(ada, worker) == []
    # what else the worker serves goes on, and registering again is no way around
    scaled = await submit(ada, other.json()["full_name"])
    assert (await register(ada, worker_id=worker)).json()["paused"]
    assert [t["id"] for t in await claim(ada, worker, max_tasks=9)] == [scaled["id"]]
    listed = (await ada.get("/rooms/lab/jobs")).json()["items"]
    assert {job["name"]: job["paused"] for job in listed} == {"Rotate": True, "Scale": False}
    body = {"worker_id": worker}
    wait = {"Prefer": "wait=60"}
    waiting = asyncio.create_task(ada.post("/tasks/claim", json=body, headers=wait))
    while job_key(JOB) not in runtime_of(app).waiters.by_key:
        await asyncio.sleep(0.01)
    events.clear()
    assert (await pause(admin, False)).json()["paused"] is False
    assert (await asyncio.wait_for(waiting, 30)).json()["task"]["id"] == task["id"]
    assert {(e.event, e.room) for e in events[:2]} == {
        ("jobs_invalidate", "room:lab"), ("task_available", f"jobs:{JOB}")
    }  # fmt: skip


async def test_what_is_due_of_a_paused_job_holds_nobody_up(ada, admin, session_maker):
    worker = await offer(ada)
    await register(ada, "Scale", worker_id=worker)
    delayed = await submit(ada, delay_seconds=900)
    await execute(session_maker, update(Task).values(available_at=now(-1)))
    await pause(admin, True)
    assert await claim(ada, worker) == []
    scaled = await submit(ada, "lab:modifiers:Scale")
    assert [t["id"] for t in await claim(ada, worker, max_tasks=9)] == [scaled["id"]]
    await pause(admin, False)
    assert [t["id"] for t in await claim(ada, worker)] == [delayed["id"]]


# who may is no question of the database
@pytest.mark.makers("plain")
async def test_the_rooms_owner_runs_it_and_no_other_room(app, ada, bob, admin, run_by):
    """With an override that knows no actions, and without one, superusers alone do."""
    worker = await offer(ada)
    task = await submit(ada)
    problem(await pause(bob, True), 403, "forbidden")
    problem(await bob.post(BULK, json={"action": "cancel", "job": JOB}), 403, "forbidden")
    problem(await report(bob, task, "cancelled"), 403, "forbidden")
    run_by(bob)
    assert (await pause(bob, True)).status_code == 200
    assert (await pause(bob, False)).status_code == 200
    cancelled = (await report(bob, task, "cancelled", reason="no use")).json()
    assert (cancelled["ended_by_id"], cancelled["reason"]) == (str(bob.id), "no use")
    assert (await bob.post(f"/tasks/{task['id']}/retry")).status_code == 202
    assert (await read(ada, task))["created_by_id"] == str(ada.id)
    problem(await report(bob, task, "failed"), 403, "forbidden")
    await report(ada, task, "cancelled")
    assert (await bob.delete(f"/tasks/{task['id']}")).status_code == 204
    # what is for all rooms is run by superusers
    await register(admin, "Shared", "@global")
    everywhere = "@global:modifiers:Shared"
    for room in ("lab", "@global"):
        problem(await pause(bob, True, everywhere, room), 403, "forbidden")
        assert (await pause(admin, True, everywhere, room)).status_code == 200
    body = {"action": "delete", "status": "failed"}
    problem(await bob.post("/rooms/@global/tasks/bulk", json=body), 403, "forbidden")
    for name in ("lab:modifiers:Gone", "attic:modifiers:Rotate", "lab"):
        problem(await pause(bob, True, name), 404, "job-not-found")
        problem(await bob.post(BULK, json={"action": "cancel", "job": name}), 404, "job-not-found")
    assert await claim(ada, worker) == []


@pytest.mark.makers("plain")
async def test_the_servers_own_jobs_are_not_paused(admin):
    await register(admin, "Own", "@internal")
    answer = await pause(admin, True, "@internal:modifiers:Own", "@internal")
    assert "can't be paused" in problem(answer, 403, "forbidden")["detail"]


@pytest.mark.makers("plain")
@pytest.mark.parametrize(
    ("body", "where"),
    [
        ({"action": "cancel"}, "/body"),
        ({"action": "cancel", "dry_run": True, "reason": "all of it"}, "/body"),
        ({"action": "purge", "job": JOB}, "/body/action"),
        ({"action": "cancel", "status": "done"}, "/body/status"),
        ({"action": "cancel", "before": "2026-01-01T00:00:00"}, "/body/before"),
        ({"action": "cancel", "before": "0001-01-01T00:00:00+14:00"}, "/body/before"),
        ({"action": "cancel", "job": JOB, "dry_run": "yes"}, "/body/dry_run"),
    ],
)
async def test_bad_bulk_requests(admin, body, where):
    errors = problem(await admin.post(BULK, json=body), 422, "invalid-request")["errors"]
    assert errors[0]["pointer"] == where


async def test_each_filter_and_each_action(ada, bob, admin, events, session_maker):
    worker = await offer(ada)
    await offer(ada, "Scale", worker_id=worker)
    ended = [await move(ada, worker, await submit(ada), s) for s in ("completed", "failed")]
    running = await move(ada, worker, await submit(bob), "running")
    waiting = [await submit(user) for user in (ada, ada, bob)]
    scaled = await submit(ada, "lab:modifiers:Scale")
    elsewhere = await submit(ada, room="attic", job=(await attic(ada)))

    async def change(action: str, **fields: Any) -> Any:
        answer = await admin.post(BULK, json={"action": action, **fields})
        assert answer.status_code == 200, answer.text
        assert answer.json()["more"] is False
        return answer.json()["count"]

    later = (datetime.now(UTC) + timedelta(minutes=1)).isoformat()
    counts = {
        ("cancel", "job"): (JOB, 4),
        ("cancel", "created_by"): (str(bob.id), 2),
        ("cancel", "status"): ("pending", 4),
        ("cancel", "before"): (later, 5),
        ("retry", "job"): (JOB, 2),
        ("retry", "status"): ("failed", 1),
        ("delete", "before"): (later, 2),
        ("delete", "status"): ("pending", 0),
        ("delete", "created_by"): (str(bob.id), 0),
    }
    for (action, name), (value, count) in counts.items():
        assert await change(action, **{name: value}, dry_run=True) == count, (action, name)
    assert await change("cancel", before=waiting[0]["created_at"], dry_run=True) == 1
    events.clear()
    assert await change("cancel", job=JOB, created_by=str(bob.id), reason="his") == 2
    assert {(e.data["id"], e.data["status"]) for e in events} == {
        (task["id"], "cancelled") for task in (running, waiting[2])
    }
    for task in (running, waiting[2]):
        cancelled = await read(ada, task)
        assert (cancelled["ended_by_id"], cancelled["reason"]) == (str(admin.id), "his")
    # the worker is told, and comes too late
    problem(await report(ada, running, "completed"), 409, "invalid-task-transition")
    assert await change("retry", status="cancelled") == 2
    again = await read(ada, waiting[2])
    assert (again["status"], again["ended_by_id"], again["reason"]) == ("pending", None, None)
    assert again["retried_by_id"] == str(admin.id)
    claimed = await claim(ada, worker, max_tasks=9)
    assert {t["id"] for t in claimed} == {t["id"] for t in (running, *waiting, scaled)}
    events.clear()
    assert await change("delete", status="failed") == 1
    assert [(e.event, e.room) for e in events] == [("tasks_invalidate", "room:lab")]
    problem(await ada.get(f"/tasks/{ended[1]['id']}"), 404, "task-not-found")
    assert (await read(ada, ended[0]))["status"] == "completed"
    assert (await read(ada, elsewhere))["status"] == "pending"


async def attic(user: Any) -> str:
    answer = await register(user, room="attic")
    name: str = answer.json()["full_name"]
    return name


async def test_a_thousand_at_once_and_the_oldest_first(ada, admin):
    worker = await offer(ada)
    for count in (1000, 2):
        await ada.post(f"/rooms/lab/batches/{JOB}", json={"tasks": [{}] * count})
    body = {"action": "cancel", "status": "pending"}
    for dry_run, count, more in ((True, 1000, True), (False, 1000, True), (False, 2, False)):
        answer = await admin.post(BULK, json=body | {"dry_run": dry_run})
        assert answer.json() == {"count": count, "more": more}
    # in their old order, and each behind the one before: another user's turn comes soon
    body = {"action": "retry", "job": JOB}
    assert (await admin.post(BULK, json=body)).json() == {"count": 1000, "more": True}
    his = await submit(admin)
    listed = (await ada.get("/rooms/lab/tasks?status=pending&limit=500")).json()["items"]
    assert his["id"] == listed[0]["id"]
    claimed = await claim(ada, worker, max_tasks=3)
    assert his["id"] in [t["id"] for t in claimed]


async def test_one_task_is_deleted_once_it_has_ended(ada, bob, admin, events, caplog):
    caplog.set_level("INFO", "zndraw_joblib.routes_tasks")
    worker = await offer(ada)
    for status in ("pending", "claimed", "running", "completed", "failed"):
        task = await move(ada, worker, await submit(bob), status)
        problem(await ada.delete(f"/tasks/{task['id']}"), 403, "forbidden")
        events.clear()
        answer = await bob.delete(f"/tasks/{task['id']}")
        if status in ("completed", "failed"):
            assert answer.status_code == 204
            assert [(e.event, e.room) for e in events] == [("tasks_invalidate", "room:lab")]
            problem(await bob.delete(f"/tasks/{task['id']}"), 404, "task-not-found")
            assert caplog.messages == [f"user {bob.id} deleted task {task['id']} of room lab"]
            caplog.clear()
        else:
            body = problem(answer, 409, "invalid-task-transition")
            assert body["task_status"] == status
            assert events == []
            await report(bob, task, "cancelled")
    assert caplog.messages == []
    assert (await admin.post(BULK, json={"action": "delete", "job": JOB})).json()["count"] == 3
    assert caplog.messages == [f"user {admin.id} deleted 3 tasks of room lab"]


async def test_a_cancel_tells_who_and_why_and_the_first_one_stays(ada, bob, admin):
    await offer(ada)
    task = await submit(bob)
    cancelled = (await report(bob, task, "cancelled", reason="wrong box")).json()
    assert (cancelled["ended_by_id"], cancelled["reason"]) == (str(bob.id), "wrong box")
    assert (await report(admin, task, "cancelled", reason="mine")).json() == cancelled
    listed = (await ada.get("/rooms/lab/tasks")).json()["items"]
    assert listed == [cancelled]


async def test_a_pending_task_tells_what_it_waits_for(app, ada, admin, session_maker):
    worker = await offer(ada)
    waiting, delayed = await submit(ada), await submit(ada, delay_seconds=900)

    async def shown() -> list[str | None]:
        """Return what the two tasks wait for, which each way to read them tells alike."""
        ids = [waiting["id"], delayed["id"]]
        pages = ("/rooms/lab/tasks", f"/rooms/lab/jobs/{JOB}/tasks")
        listed = [(await ada.get(page)).json()["items"] for page in pages]
        listed.append((await ada.post("/tasks/query", json={"ids": ids})).json()["tasks"])
        listed.append([await read(ada, task) for task in (waiting, delayed)])
        told = [{task["id"]: task["waiting_for"] for task in tasks} for tasks in listed]
        assert told == told[:1] * 4
        return [told[0][task_id] for task_id in ids]

    assert await shown() == ["behind", "delayed"]
    await pause(admin, True)
    assert await shown() == ["paused", "paused"]
    await ada.patch(f"/workers/{worker}", json={"state": "draining"})
    assert await shown() == ["no_worker", "no_worker"]
    await pause(admin, False)
    await ada.patch(f"/workers/{worker}", json={"state": "active"})
    await execute(
        session_maker, update(Task).where(Task.available_at > now()).values(available_at=now(-1))
    )
    assert await shown() == ["behind", "behind"]
    await silence(session_maker, worker)
    assert await shown() == ["no_worker", "no_worker"]
    await claim(ada, worker, max_tasks=2)
    assert await shown() == [None, None]


async def test_a_task_of_the_servers_own_waits_for_no_worker(admin, session_maker):
    await register(admin, "Own", "@internal")
    await offer(admin)
    task = await submit(admin)
    internal = select(Job.id).where(Job.room_id == "@internal").scalar_subquery()
    await execute(session_maker, update(Task).values(job_id=internal, available_at=now(900)))
    assert (await read(admin, task))["waiting_for"] == "delayed"


async def test_a_job_is_offline_while_its_tasks_have_not_ended(ada, bob, session_maker):
    """A worker that was expelled may finish what it runs."""
    worker = await offer(bob)
    task = await move(bob, worker, await submit(ada), "running")
    await expel(session_maker, bob.id, "lab")

    async def listed() -> list[Any]:
        jobs = (await ada.get("/rooms/lab/jobs")).json()["items"]
        return [(job["full_name"], job["workers"], job["workers_alive"]) for job in jobs]

    assert await listed() == [(JOB, [], 0)]
    assert await cleanup_idle_jobs(session_maker) == 0
    await report(bob, task, "completed")
    assert await cleanup_idle_jobs(session_maker) == 1
    assert await listed() == []

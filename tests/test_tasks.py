"""Tasks: how they are submitted, shown, and told of."""

from datetime import UTC, datetime, timedelta
from uuid import uuid4

from sqlalchemy import select, update
from steps import (
    at_once,
    claim,
    execute,
    offer,
    problem,
    read,
    register,
    report,
    statuses,
    stored,
    submit,
)

from zndraw_joblib.models import Task, now


async def test_a_task_goes_its_way(admin, ada, events):
    job = "@global:modifiers:Rotate"
    worker = await offer(admin, room="@global")
    submitted = await ada.post(f"/rooms/lab/tasks/{job}", json={"payload": {"angle": 3}})
    assert submitted.status_code == 202
    pending = submitted.json()
    assert submitted.headers["location"] == f"/v1/joblib/tasks/{pending['id']}"
    assert submitted.headers["retry-after"] == "1"
    (claimed,) = await claim(admin, worker)
    running = (await report(admin, pending, "running")).json()
    completed = (await report(admin, pending, "completed", result=[1, None])).json()

    shown = [pending, claimed, running, completed]
    assert [task["status"] for task in shown] == ["pending", "claimed", "running", "completed"]
    assert [task["queue_position"] for task in shown] == [1, None, None, None]
    assert [task["attempt"] for task in shown] == [0, 1, 1, 1]
    assert [task["worker_id"] for task in shown] == [None, worker, worker, worker]
    moments = ("created_at", "claimed_at", "started_at", "completed_at")
    for n, task in enumerate(shown):
        assert task["job_name"] == job
        assert task["room_id"] == "lab"
        assert task["payload"] == {"angle": 3}
        assert task["created_by_id"] == str(ada.id)
        passed = [datetime.fromisoformat(task[m]) for m in moments[: n + 1]]
        assert all(m.utcoffset() == timedelta(0) for m in passed)
        assert passed == sorted(passed)
        assert not any(task[m] for m in moments[n + 1 :])
    assert completed["result"] == [1, None]
    assert await read(ada, pending) == completed

    # each event says what the answer said, in the order of the changes
    told = [e for e in events if e.event == "task_status_event"]
    assert {e.room for e in told} == {"room:lab"}
    for event, task in zip(told, shown, strict=True):
        assert event.data["name"] == task["job_name"]
        same = event.data.keys() & task.keys()
        assert {"id", "status", "worker_id", "error", "queue_position"} < same
        assert {k: event.data[k] for k in same} == {k: task[k] for k in same}
    assert [(e.event, e.room) for e in events if e not in told] == [
        ("jobs_invalidate", "room:@global"),
        ("task_available", f"jobs:{job}"),
    ]
    available = events[[e.event for e in events].index("task_available")]
    assert available.data == {"job_name": job, "room_id": "lab", "task_id": pending["id"]}


async def test_an_unknown_task_is_not_found(ada):
    for answer in (
        await ada.get(f"/tasks/{uuid4()}"),
        await ada.patch(f"/tasks/{uuid4()}", json={"status": "running"}),
        await ada.patch(f"/tasks/{uuid4()}", json={"status": "running", "attempt": 1}),
        await ada.post(f"/tasks/{uuid4()}/retry"),
    ):
        problem(answer, 404, "task-not-found")


async def test_places_in_the_queue_are_counted_over_all_rooms(app, ada, admin):
    job = "@global:modifiers:Rotate"
    worker = await offer(admin, room="@global")
    await register(admin, "Scale", "@global", worker_id=worker)
    low = await submit(ada, job, "lab", priority=-5)
    first = await submit(ada, job, "lab")
    second = await submit(ada, job, "attic")
    urgent = await submit(ada, job, "attic", priority=1)
    await submit(ada, "@global:modifiers:Scale", "lab", priority=9)
    assert [t["queue_position"] for t in (low, first, second, urgent)] == [1, 1, 2, 1]

    async def places():
        return [(await read(ada, task))["queue_position"] for task in (urgent, first, second, low)]

    assert await places() == [1, 2, 3, 4]
    listed = (await ada.get("/rooms/attic/tasks")).json()["items"]
    assert [t["queue_position"] for t in listed] == [1, 3]
    await report(ada, first, "cancelled")
    assert await places() == [1, None, 2, 3]
    await claim(admin, worker, max_tasks=2)
    assert await places() == [None, None, 1, 2]
    app.state.joblib_settings.queue_position_max = 1
    assert await places() == [None, None, 1, 1], "no farther than that"


async def test_a_delayed_task_is_claimed_when_its_time_has_come(ada, session_maker):
    worker = await offer(ada)
    delayed = await submit(ada, delay_seconds=3600, priority=1)
    other = await submit(ada, delay_seconds=7200)
    waits = datetime.fromisoformat(delayed["available_at"]) - datetime.now(UTC)
    assert timedelta(minutes=55) < waits < timedelta(minutes=65)
    assert delayed["status"] == "pending"
    assert await claim(ada, worker) == []
    prompt = await submit(ada)
    an_hour_passed = update(Task).where(Task.available_at < now(5400)).values(available_at=now(-1))
    await execute(session_maker, an_hour_passed)
    claimed = await claim(ada, worker, max_tasks=3)
    assert [t["id"] for t in claimed] == [delayed["id"], prompt["id"]]
    assert (await read(ada, other))["status"] == "pending"
    assert (await report(ada, other, "cancelled")).status_code == 200


async def test_one_key_makes_one_task(ada, bob, admin, events, session_maker):
    for name in ("Rotate", "Scale"):
        await offer(ada, name)
    shared = "@global:modifiers:Rotate"
    await offer(admin, room="@global")
    events.clear()

    async def send(user=ada, room="lab", job="lab:modifiers:Rotate", **body):
        headers = {"Idempotency-Key": "k"}
        return await user.post(f"/rooms/{room}/tasks/{job}", json=body, headers=headers)

    answers = await at_once(*(send(payload={"angle": 1}) for _ in range(8)))
    assert statuses(answers) == [202] * 8
    assert len({a.json()["id"] for a in answers}) == 1
    assert len({a.headers["location"] for a in answers}) == 1
    assert [e.event for e in events] == ["task_status_event", "task_available"]
    task = answers[0].json()
    assert (await send(payload={"angle": 1})).json() == task

    for body in ({}, {"payload": {"angle": 1}, "priority": 1}):
        problem(await send(**body), 422, "idempotency-key-reused")
    for _ in range(2):
        others = [await send(bob), await send(job="lab:modifiers:Scale")]
        others += [await send(room=room, job=shared) for room in ("lab", "attic")]
        assert statuses(others) == [202] * 4
        assert len({a.json()["id"] for a in [*others, answers[0]]}) == 5
    assert (await stored(session_maker))["task"] == 5

    # it names the task for as long as there is the task
    await report(ada, task, "cancelled")
    again = await send(payload={"angle": 1})
    assert (again.status_code, again.json()["status"]) == (202, "cancelled")


async def test_a_database_that_keeps_no_zones_is_told_utc(ada, session_maker):
    await offer(ada)
    await submit(ada)
    async with session_maker() as session:
        created = await session.scalar(select(Task.created_at))
    assert abs(datetime.now(UTC) - created) < timedelta(minutes=5)

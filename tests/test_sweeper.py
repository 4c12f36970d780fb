"""The sweeper: it ends what is lost, everything that is lost, and that alone."""

import logging
import time
from contextlib import asynccontextmanager
from functools import partial
from itertools import pairwise
from uuid import UUID, uuid4

import anyio
import anyio.lowlevel
import pytest
import sqlalchemy as sa
from sqlalchemy import delete, func, insert, select, update
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
    submit,
)

from zndraw_joblib import sweeper
from zndraw_joblib.delivery import runtime_of
from zndraw_joblib.models import Job, Task, Worker, WorkerJobLink, now
from zndraw_joblib.settings import JobLibSettings, get_settings
from zndraw_joblib.sweeper import (
    TASKS_A_BATCH,
    WORKERS_A_BATCH,
    cleanup_overdue_attempts,
    cleanup_stale_workers,
    cleanup_worker,
    purge_jobs,
    purge_tasks,
    run_sweeper,
)


def told(events):
    return [(e.data["id"], e.data["status"]) for e in events if e.event == "task_status_event"]


async def pass_deadlines(session_maker):
    await execute(
        session_maker, update(Task).where(Task.deadline_at.is_not(None)).values(deadline_at=now(-1))
    )


@pytest.mark.parametrize(
    ("worker", "who"),
    [
        ({"name": "node7:42", "info": {"host": "node7", "pid": 42}}, "node7:42"),
        ({"name": 'the "one"', "info": {"host": "node7", "pid": 42}}, 'the "one", node7:42'),
        ({"name": "alone"}, "alone"),
    ],
)
async def test_what_a_lost_worker_held_tells_who_it_was(ada, bob, session_maker, worker, who):
    silent = (await ada.post("/workers", json=worker)).json()
    unnamed = await offer(bob)
    for user, worker_id in ((ada, silent["id"]), (bob, unnamed)):
        await register(user, worker_id=worker_id)
        await submit(ada)
        await claim(user, worker_id)
    await silence(session_maker, silent["id"], unnamed)
    async with session_maker() as session:
        heard = (await session.get(Worker, UUID(silent["id"]))).last_heartbeat
    assert await cleanup_stale_workers(session_maker) == 2
    tasks = (await ada.get("/rooms/lab/tasks")).json()["items"]
    shown = [await read(ada, task) for task in tasks]
    errors = {task["worker_id"]: (task["error"], task["errors"][0]["error"]) for task in shown}
    error = f"Worker disconnected: {who}, last heard at {heard.isoformat(timespec='seconds')}"
    assert errors == {silent["id"]: (error, error), unnamed: ("Worker disconnected",) * 2}


async def test_a_silent_worker_goes_with_what_it_held(ada, bob, session_maker, tsio, events):
    lost, alive = await offer(ada), await offer(bob)
    await register(ada, "Scale", worker_id=lost, max_attempts=2)
    once = await move(ada, lost, await submit(ada), "running")
    twice = await move(ada, lost, await submit(ada, "lab:modifiers:Scale"), "running")
    kept = await submit(ada)
    await claim(bob, alive)
    await silence(session_maker, lost)
    events.clear()
    assert await cleanup_stale_workers(session_maker, tsio=tsio) == 1
    assert await cleanup_stale_workers(session_maker, tsio=tsio) == 0

    once, twice, kept = [await read(ada, task) for task in (once, twice, kept)]
    assert (once["status"], once["error"]) == ("failed", "Worker disconnected")
    assert (once["error_type"], once["worker_id"]) == ("worker_lost", lost)
    assert (twice["status"], twice["error_type"]) == ("pending", "worker_lost")
    assert (twice["worker_id"], twice["queue_position"]) == (None, 1)
    assert (kept["status"], kept["worker_id"]) == ("claimed", alive)
    assert sorted(told(events)) == sorted([(once["id"], "failed"), (twice["id"], "pending")])
    assert ("jobs_invalidate", {}, "room:lab") in events
    problem(await ada.patch(f"/workers/{lost}"), 404, "worker-not-found")
    page = (await ada.get("/rooms/lab/jobs")).json()["items"]
    assert {job["full_name"]: job["workers"] for job in page} == {
        JOB: [alive],
        "lab:modifiers:Scale": [],
    }


# its session waits for a timer, which is what `strict` forbids
@pytest.mark.makers("plain", "locked", "postgres")
async def test_what_is_swept_leaves_before_anything_that_is_committed_later(
    ada, session_maker, tsio, events
):
    """A session takes its time to close, and whoever wants the task is not held up."""
    worker = await offer(ada)
    task = await move(ada, worker, await submit(ada), "running")
    await silence(session_maker, worker)
    left = []

    @asynccontextmanager
    async def slow_to_close():
        async with session_maker() as session:
            yield session
            await anyio.sleep(0.05)
            left.append(told(events))

    events.clear()
    await cleanup_stale_workers(slow_to_close, tsio=tsio)
    assert left[0] == [(task["id"], "failed")]


async def test_replicas_sweep_together(ada, session_maker, tsio, events):
    """More workers than a batch: each is retired, and told of, by one of them."""
    count = 2 * WORKERS_A_BATCH + 3
    first = await offer(ada)
    job = (await ada.get(f"/rooms/lab/jobs/{JOB}")).json()["id"]
    workers = [uuid4() for _ in range(count - 1)]
    await execute(
        session_maker,
        insert(Worker).values([{"id": w, "user_id": ada.id} for w in workers]),
        insert(WorkerJobLink).values([{"worker_id": w, "job_id": UUID(job)} for w in workers]),
    )
    tasks = [await submit(ada) for _ in range(6)]
    for worker in [first, *map(str, workers[:5])]:
        await claim(ada, worker)
    await silence(session_maker, first, *map(str, workers))
    events.clear()
    swept = await at_once(*(cleanup_stale_workers(session_maker, tsio=tsio) for _ in range(3)))
    assert sum(swept) == count
    assert sorted(told(events)) == sorted((t["id"], "failed") for t in tasks)
    assert (await ada.get("/workers")).json()["total"] == 0


async def test_a_heartbeat_and_a_sweep_agree(ada, bob, session_maker):
    """Whichever comes first: a worker that is there holds its task, one that isn't doesn't."""
    await offer(bob)  # keeps the job
    for _ in range(6):
        worker, task = await offer(ada), await submit(ada)
        await claim(ada, worker)
        await silence(session_maker, worker)
        beat, swept = await at_once(
            ada.patch(f"/workers/{worker}"), cleanup_stale_workers(session_maker)
        )
        status = (await read(ada, task))["status"]
        assert (beat.status_code, swept, status) in [(200, 0, "claimed"), (404, 1, "failed")]
        await ada.delete(f"/workers/{worker}")


async def test_a_claim_that_never_starts_costs_no_attempt(ada, session_maker, tsio, events):
    worker = await offer(ada, start_timeout_seconds=60)
    task = await submit(ada)
    for attempt in (1, 2):
        (claimed,) = await claim(ada, worker)
        assert claimed["attempt"] == attempt
        assert await cleanup_overdue_attempts(session_maker, tsio=tsio) == 0
        await pass_deadlines(session_maker)
        events.clear()
        swept = await at_once(
            *(cleanup_overdue_attempts(session_maker, tsio=tsio) for _ in range(3))
        )
        assert sum(swept) == 1
        assert [e.event for e in events] == ["task_status_event", "task_available"]
        assert (await read(ada, task))["status"] == "pending"
        late = await report(ada, task, "running", attempt=attempt)
        problem(late, 409, "lease-lost")
    # in time it runs as long as it likes
    await claim(ada, worker)
    await report(ada, task, "running")
    await pass_deadlines(session_maker)
    assert await cleanup_overdue_attempts(session_maker, tsio=tsio) == 0
    assert (await report(ada, task, "failed")).json()["status"] == "failed"


async def test_a_run_that_takes_too_long_is_ended(ada, session_maker, tsio, events):
    worker = await offer(ada, timeout_seconds=60, max_attempts=2)
    task = await submit(ada)
    for attempt, status in ((1, "pending"), (2, "failed")):
        await claim(ada, worker)
        await report(ada, task, "running")
        assert await cleanup_overdue_attempts(session_maker, tsio=tsio) == 0
        await pass_deadlines(session_maker)
        events.clear()
        assert await cleanup_overdue_attempts(session_maker, tsio=tsio) == 1
        ended = await read(ada, task)
        assert (ended["status"], ended["error_type"]) == (status, "timeout")
        assert told(events) == [(task["id"], status)]
        late = await report(ada, task, "completed", attempt=attempt)
        problem(late, 409, "lease-lost")
    assert (await ada.patch(f"/workers/{worker}")).status_code == 200


async def test_what_a_vanished_worker_held_is_found(ada, session_maker, tsio):
    """As when its user was deleted, and it along with the user."""
    await offer(ada)
    worker, task = await offer(ada), await submit(ada)
    await claim(ada, worker)
    await execute(
        session_maker,
        delete(WorkerJobLink).where(WorkerJobLink.worker_id == UUID(worker)),
        delete(Worker).where(Worker.id == UUID(worker)),
    )
    assert await cleanup_overdue_attempts(session_maker, tsio=tsio) == 1
    lost = await read(ada, task)
    assert (lost["status"], lost["error_type"]) == ("failed", "worker_lost")


def running(user, job, worker, order):
    """Return a row of a task that a worker should have ended by now."""
    return {
        "id": uuid4(),
        "job_id": UUID(job),
        "job_name": JOB,
        "room_id": "lab",
        "payload": {},
        "status": "RUNNING",
        "worker_id": UUID(worker),
        "holder_id": user.id,
        "attempt": 1,
        "deadline_at": now(-1),
        "started_at": now(-61),
        "claimed_at": now(-62),
        "queue_order": order,
    }


async def test_more_than_a_batch_is_ended_in_one_pass(ada, session_maker, tsio, events):
    worker = await offer(ada, timeout_seconds=60)
    count = TASKS_A_BATCH + 2
    job = (await ada.get(f"/rooms/lab/jobs/{JOB}")).json()["id"]
    overdue = [running(ada, job, worker, order=n) for n in range(count)]
    await execute(session_maker, insert(Task).values(overdue))
    events.clear()
    assert await cleanup_overdue_attempts(session_maker, tsio=tsio) == count
    assert len(set(told(events))) == len(told(events)) == count


async def test_who_waits_for_the_database_waits_for_one_batch(
    ada, bob, session_maker, tsio, events
):
    """However much a silent worker holds: each transaction ends so much of it."""
    lost, alive = await offer(ada), await offer(bob)
    count = 2 * TASKS_A_BATCH + 7
    job = (await ada.get(f"/rooms/lab/jobs/{JOB}")).json()["id"]
    held = [running(ada, job, lost, order=n) for n in range(count)]
    await execute(session_maker, insert(Task).values(held))
    await silence(session_maker, lost)
    left = [count]

    @asynccontextmanager
    async def counting():
        async with session_maker() as session:
            yield session
        async with session_maker() as session:
            holds = select(func.count()).where(Task.worker_id == UUID(lost))
            left.append(await session.scalar(holds.where(Task.completed_at.is_(None))))
        # whoever has waited comes now
        assert (await bob.patch(f"/workers/{alive}")).status_code == 200

    events.clear()
    assert await cleanup_stale_workers(counting, tsio=tsio) == 1
    assert left[-1] == 0
    assert max(before - after for before, after in pairwise(left)) <= TASKS_A_BATCH
    assert len(set(told(events))) == len(told(events)) == count
    problem(await ada.patch(f"/workers/{lost}"), 404, "worker-not-found")


async def test_one_worker_can_be_retired_by_name(ada, session_maker, tsio, events):
    worker, task = await offer(ada), await submit(ada)
    await claim(ada, worker)
    events.clear()
    assert await cleanup_worker(session_maker, UUID(worker), tsio=tsio)
    assert not await cleanup_worker(session_maker, UUID(worker), tsio=tsio)
    assert told(events) == [(task["id"], "failed")]


async def test_what_is_swept_leaves_as_what_is_asked_does(app, ada, session_maker, tsio, events):
    """Through the app's own queue: who waits is woken, though nobody looks."""
    app.state.joblib_settings = JobLibSettings(
        recheck_seconds=600, sweeper_interval_seconds=2, worker_timeout_seconds=30
    )
    worker, task = await offer(ada), await submit(ada)
    await claim(ada, worker)
    ended = []

    async def wait():
        prefer = {"Prefer": "wait=60"}
        ended.append((await ada.get(f"/tasks/{task['id']}", headers=prefer)).json())
        group.cancel_scope.cancel()

    settings = app.state.joblib_settings
    with anyio.fail_after(120):
        async with anyio.create_task_group() as group:
            group.start_soon(wait)
            while not len(runtime_of(app).waiters):
                await anyio.sleep(0.01)
            await silence(session_maker, worker)
            group.start_soon(partial(run_sweeper, session_maker, settings, tsio, app=app))
    assert [end["error_type"] for end in ended] == ["worker_lost"]
    assert told(events)[-1] == (task["id"], "failed")


async def test_the_sweeper_goes_on_whatever_happens(ada, session_maker, caplog):
    worker, task = await offer(ada), await submit(ada)
    await claim(ada, worker)
    await silence(session_maker, worker)
    turns = 0

    class Broken:
        async def emit(self, event, data, *, room):
            raise ConnectionError("the manager is away")

    def failing_at_first():
        nonlocal turns
        turns += 1
        if turns <= 3:
            raise ConnectionError("the database is away")
        return session_maker()

    settings = JobLibSettings(sweeper_interval_seconds=0.01)
    with anyio.fail_after(120):
        async with anyio.create_task_group() as group:
            group.start_soon(run_sweeper, failing_at_first, settings, Broken())
            while (await read(ada, task))["status"] != "failed":
                await anyio.sleep(0.01)
            seen = turns
            while turns < seen + 10:
                await anyio.sleep(0.01)
            group.cancel_scope.cancel()
    assert "the database is away" in caplog.text
    assert "the manager is away" in caplog.text
    seen = turns
    await anyio.sleep(0.1)
    assert turns == seen, "cancelled, it stops"


@pytest.fixture
async def note(engine):
    """Yield a table of the host's whose rows keep what they refer to."""
    tables = (Worker, Task, Job)
    columns = (
        sa.Column(t.__tablename__, t.__table__.c.id.type, sa.ForeignKey(t.__table__.c.id))
        for t in tables
    )
    note = sa.Table("host_note", sa.MetaData(), *columns)
    for column in note.columns:
        # as its foreign key would, if SQLite looked at it
        keeps = sa.DDL(
            f"CREATE TRIGGER keep_{column.name} BEFORE DELETE ON {column.name}"
            f" WHEN EXISTS (SELECT 1 FROM host_note WHERE {column.name} = OLD.id)"
            " BEGIN SELECT RAISE(ABORT, 'FOREIGN KEY constraint failed'); END"
        )
        sa.event.listen(note, "after_create", keeps.execute_if(dialect="sqlite"))
    async with engine.begin() as connection:
        await connection.run_sync(note.create)
    yield note
    async with engine.begin() as connection:
        await connection.run_sync(note.drop)


async def test_what_cannot_be_swept_costs_itself_alone(ada, session_maker, note, tsio, caplog):
    """In each pass the others go, and the log says once which stays, and why."""
    kept = await offer(ada, timeout_seconds=60)
    job = UUID((await ada.get(f"/rooms/lab/jobs/{JOB}")).json()["id"])
    others = [uuid4() for _ in range(2 * WORKERS_A_BATCH)]
    overdue = [running(ada, str(job), kept, order=n) for n in range(TASKS_A_BATCH + 2)]
    for task in overdue:
        task["errors"] = None
    # as written by hand: it can't be read, and need not be
    overdue[7]["errors"] = "no JSON"
    done = [uuid4() for _ in range(5)]
    jobs = [uuid4() for _ in range(5)]
    ended = {"job_id": job, "job_name": JOB, "room_id": "lab", "payload": {}}
    ended |= {"status": "COMPLETED", "completed_at": now(-600), "queue_order": 1}
    gone = {"room_id": "lab", "category": "modifiers", "schema": {}, "deleted": True}
    await execute(
        session_maker,
        insert(Worker).values([{"id": w, "user_id": ada.id} for w in others]),
        insert(Task).values(overdue),
        insert(Task).values([{"id": t, **ended} for t in done]),
        insert(Job.__table__).values([{"id": j, "name": str(j), **gone} for j in jobs]),
        update(Worker).values(last_heartbeat=now(-3600)),
        insert(note).values(worker=others[3], task=done[2], job=jobs[2]),
    )
    settings = JobLibSettings(task_retention_seconds={"completed": 60})
    assert await cleanup_overdue_attempts(session_maker, settings) == len(overdue)
    assert await purge_tasks(session_maker, settings) == len(done) - 1
    assert await purge_jobs(session_maker, settings) == len(jobs) - 1
    assert await cleanup_stale_workers(session_maker, settings) == len(others)
    left = (await ada.get("/workers")).json()["items"]
    assert [worker["id"] for worker in left] == [str(others[3])]
    # nobody serves it
    assert (await ada.get(f"/rooms/lab/jobs/{JOB}")).status_code == 404
    stayed = [r for r in caplog.records if "stays" in r.message]
    assert [r.row_id for r in stayed] == [str(row) for row in (done[2], jobs[2], others[3])]
    assert all("IntegrityError" in r.message for r in stayed)
    assert all(len(r.message) < 500 for r in stayed)


async def test_a_sweeper_logs_once_what_it_finds_again(ada, session_maker, note, caplog):
    workers = [(await ada.post("/workers")).json()["id"] for _ in range(3)]
    await execute(session_maker, insert(note).values(worker=UUID(workers[0])))
    await silence(session_maker, *workers)
    caplog.set_level(logging.INFO, "zndraw_joblib.sweeper")
    settings = JobLibSettings(sweeper_interval_seconds=0.01)
    turns = 0

    def counting():
        nonlocal turns
        turns += 1
        return session_maker()

    with anyio.fail_after(120):
        async with anyio.create_task_group() as group:
            group.start_soon(run_sweeper, counting, settings)
            while (await ada.get("/workers")).json()["total"] > 1 or turns < 60:
                await anyio.sleep(0.01)
            group.cancel_scope.cancel()
    assert caplog.text.count("can't be swept") == 1
    assert (caplog.text.count("sweeper began"), caplog.text.count("sweeper ended")) == (1, 1)


async def test_a_sweeper_that_cannot_begin_says_why(session_maker, monkeypatch, caplog):
    monkeypatch.setenv("ZNDRAW_JOBLIB_WORKER_TIMEOUT_SECONDS", "soon")
    get_settings.cache_clear()
    with pytest.raises(ValueError, match="worker_timeout_seconds"):
        await run_sweeper(session_maker)
    assert "sweeper ended" in caplog.text
    get_settings.cache_clear()


async def test_after_a_sleep_workers_may_speak_first(ada, session_maker, caplog):
    """Host and workers slept together, for longer than a worker may be silent."""
    worker = await offer(ada)
    settings = JobLibSettings(sweeper_interval_seconds=0.1, worker_timeout_seconds=1.6)
    began = anyio.Event()

    def opening():
        began.set()
        return session_maker()

    with anyio.fail_after(120):
        async with anyio.create_task_group() as group:
            group.start_soon(run_sweeper, opening, settings)
            await began.wait()
            await anyio.sleep(0.05)
            time.sleep(1.9)  # noqa: ASYNC251 - nothing of this process goes on
            # longer than a sweeper pauses
            await anyio.sleep(0.35)
            assert (await ada.patch(f"/workers/{worker}")).status_code == 200
            # who stays silent goes all the same
            while (await ada.get("/workers")).json()["total"]:
                await anyio.sleep(0.1)
            group.cancel_scope.cancel()
    assert "longer than it meant" in caplog.text


async def test_a_busy_machine_stops_no_sweeps(ada, session_maker):
    """What is late by less than a worker may be silent for is late, and no more."""
    await silence(session_maker, await offer(ada))
    settings = JobLibSettings(sweeper_interval_seconds=0.1, worker_timeout_seconds=600)
    began = anyio.Event()

    def opening():
        began.set()
        return session_maker()

    with anyio.fail_after(120):
        async with anyio.create_task_group() as group:
            group.start_soon(run_sweeper, opening, settings)
            await began.wait()
            await anyio.sleep(0.05)
            time.sleep(1.5)  # noqa: ASYNC251 - as if others had the machine
            while (await ada.get("/workers")).json()["total"]:
                await anyio.sleep(0.05)
            group.cancel_scope.cancel()


async def test_limits_survive_a_clock_that_is_set_back(ada, session_maker):
    """What was written an hour ahead lasts no longer than it was meant to."""
    worker = await offer(ada, timeout_seconds=60, max_attempts=3)
    await submit(ada)
    (task,) = await claim(ada, worker)
    await report(ada, task, "running")
    delayed = await submit(ada, delay_seconds=30)
    hour = 3600
    await execute(
        session_maker,
        update(Worker).values(last_heartbeat=now(hour)),
        update(Task)
        .where(Task.id == UUID(task["id"]))
        .values(
            created_at=now(hour - 5),
            claimed_at=now(hour),
            started_at=now(hour),
            deadline_at=now(hour + 60),
        ),
        update(Task)
        .where(Task.id == UUID(delayed["id"]))
        .values(created_at=now(hour), available_at=now(hour + 30)),
    )
    ahead = (select(Worker.last_heartbeat), select(Task.deadline_at), select(Task.available_at))

    async def seconds_ahead():
        found = []
        async with session_maker() as session:
            clock = (await session.scalars(select(now()))).one()
            for moments in ahead:
                found += [
                    (moment - clock).total_seconds()
                    for moment in await session.scalars(moments)
                    if moment is not None
                ]
        return found

    assert all(seconds > hour - 60 for seconds in await seconds_ahead())
    sweep = sweeper._sweep(session_maker, None)
    for _ in range(2):
        await sweep.run(sweeper._correct_moments)
        heartbeat, deadline, available = await seconds_ahead()
        assert -60 < heartbeat <= 0
        assert 0 < deadline <= 60
        assert available <= 30
    assert (await read(ada, task))["status"] == "running"
    assert await sweep.run(sweeper._correct_moments) == 0, "what is right stays"

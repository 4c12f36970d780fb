"""Many requests that wait at once: what they cost, who is woken, and how many may."""

import logging
from contextlib import asynccontextmanager
from datetime import datetime
from uuid import UUID

import anyio
import httpx
import pytest
import servers
from conftest import PREFIX
from redis.asyncio import Redis
from sqlalchemy import event, insert, select, update
from steps import at_once, claim, execute, offer, problem, report, submit
from test_waiting import NEVER, until_waited_for, wait_for, waiters

from zndraw_joblib import PgWakeups, RedisWakeups
from zndraw_joblib.delivery import runtime_of
from zndraw_joblib.events import job_key, provider_key, task_key
from zndraw_joblib.models import Job, Task, TaskStatus, Worker, WorkerJobLink, now
from zndraw_joblib.waiting import Waiters

__all__ = ["waiters"]

HANG = 60


async def until(condition):
    with anyio.fail_after(HANG):
        while not condition():
            await anyio.sleep(0.01)


@pytest.fixture(autouse=True)
async def looks_no_more(app):
    """When nobody waits any more, the task that looks for them ends."""
    yield
    runtime = runtime_of(app)
    polls = runtime.subscriptions
    await until(lambda: polls.poller.done())
    assert (polls.by_request, len(runtime.waiters)) == ({}, 0)


def wait_for_work(user, worker):
    return user.post("/tasks/claim", json={"worker_id": worker}, headers=wait_for(60))


def wait_for_end(user, task):
    return user.get(f"/tasks/{task['id']}", headers=wait_for(60))


class Answers(list):
    """What the requests sent side by side were answered so far."""

    async def take(self, request):
        self.append((await request).json())


@asynccontextmanager
async def waiting_side_by_side(*requests, at_a_time=1):
    """Send requests that wait; those that still do are given up at the end."""
    answers = Answers()
    with anyio.fail_after(HANG):
        async with anyio.create_task_group() as group:
            for n, request in enumerate(requests, start=1):
                group.start_soon(answers.take, request)
                # in this order, and no more at a time than a database bears
                if n % at_a_time == 0:
                    await until_waited_for(n, pause=0)
            await until_waited_for(len(requests), pause=0.2)
            yield answers
            group.cancel_scope.cancel()


async def submit_elsewhere(session_maker, count=1, **values):
    """Put tasks in the queue as another process does: nobody here is told."""
    async with session_maker() as session:
        job = (await session.execute(select(Job.id, Job.room_id))).one()
        rows = [
            {
                "job_id": job.id,
                "job_name": "lab:modifiers:Rotate",
                "room_id": job.room_id,
                "payload": {},
                "queue_order": place,
                **values,
            }
            for place in range(count)
        ]
        await session.execute(insert(Task), rows)
        await session.commit()


@pytest.mark.makers("plain", "postgres")
async def test_many_who_wait_cost_one_statement_a_look(app, ada, engine):
    """50 claims of 10 workers and 50 reads: one statement for all, each 0.2 s."""
    workers = [await offer(ada, "Rotate"), await offer(ada, "Scale")]
    workers += [(await ada.post("/workers")).json()["id"] for _ in range(8)]
    tasks = [await submit(ada, "lab:modifiers:Rotate") for _ in range(10)]
    await claim(ada, workers[0], max_tasks=10)
    app.state.joblib_settings.recheck_seconds = 0.2
    requests = [
        request
        for _ in range(5)
        for worker, task in zip(workers, tasks, strict=True)
        for request in (wait_for_work(ada, worker), wait_for_end(ada, task))
    ]
    statements = []
    async with waiting_side_by_side(*requests, at_a_time=10) as answers:
        await until(lambda: len(runtime_of(app).subscriptions.by_request) == 100)
        event.listen(
            engine.sync_engine, "before_cursor_execute", lambda *args: statements.append(args[2])
        )
        await anyio.sleep(1)
        looks = len(statements)
        assert (answers, len(runtime_of(app).subscriptions.by_request)) == ([], 100)
    assert 1 <= looks <= 6
    assert len(set(statements[:looks])) == 1
    assert not runtime_of(app).subscriptions.by_user


async def test_as_many_are_woken_as_there_is_work(app, ada, session_maker):
    app.state.joblib_settings.recheck_seconds = 0.1
    workers = [await offer(ada) for _ in range(5)]
    async with waiting_side_by_side(*(wait_for_work(ada, w) for w in workers)) as told:
        await submit_elsewhere(session_maker, 2)
        await until(lambda: len(told) == 2)
        # who came first
        assert {answer["task"]["worker_id"] for answer in told} == set(workers[:2])
        await submit_elsewhere(session_maker, 3)
        await until(lambda: len(told) == 5)


async def test_a_delayed_task_is_handed_out_when_it_is_due(app, ada):
    app.state.joblib_settings.recheck_seconds = 0.1
    worker = await offer(ada)
    async with waiting_side_by_side(wait_for_work(ada, worker)) as told:
        task = await submit(ada, delay_seconds=0.5)
        await until(lambda: told)
    assert told[0]["task"]["id"] == task["id"]
    claimed, due = told[0]["task"]["claimed_at"], task["available_at"]
    # a whole second is written without its fraction
    assert datetime.fromisoformat(claimed) >= datetime.fromisoformat(due)


async def test_what_becomes_of_a_worker_elsewhere_is_seen(app, ada, session_maker):
    app.state.joblib_settings.recheck_seconds = 0.1
    gone, drained, hired = [await offer(ada, name) for name in ("A", "B", "C")]
    await offer(ada)
    requests = (wait_for_work(ada, w) for w in (gone, drained, hired))
    async with waiting_side_by_side(*requests) as told:
        await execute(
            session_maker,
            WorkerJobLink.__table__.delete().where(WorkerJobLink.worker_id == UUID(gone)),
            Worker.__table__.delete().where(Worker.id == UUID(gone)),
        )
        await until(lambda: len(told) == 1)
        assert told[0]["type"] == "/v1/problems/worker-not-found"
        await execute(
            session_maker, update(Worker).where(Worker.id == UUID(drained)).values(state="draining")
        )
        await until(lambda: len(told) == 2)
        assert told[1]["task"] is None
        rotate = select(Job.id).where(Job.name == "Rotate").scalar_subquery()
        link = insert(WorkerJobLink).values(worker_id=UUID(hired), job_id=rotate)
        await execute(session_maker, link)
        await anyio.sleep(0.3)
        await submit(ada)
        await until(lambda: len(told) == 3)
        assert told[2]["task"]["job_name"] == "lab:modifiers:Rotate"


async def test_a_claim_that_waits_keeps_its_worker_alive(app, ada, session_maker):
    settings = app.state.joblib_settings
    settings.recheck_seconds, settings.worker_timeout_seconds = 0.1, 3
    workers = {UUID(await offer(ada)) for _ in range(2)}
    async with waiting_side_by_side(*(wait_for_work(ada, w) for w in map(str, workers))):
        await execute(session_maker, update(Worker).values(last_heartbeat=now(-3600)))
        began, silent = anyio.current_time(), workers
        while silent:
            await anyio.sleep(0.05)
            assert anyio.current_time() - began < 2, "well before they count as lost"
            async with session_maker() as session:
                last = select(Worker.id).where(Worker.last_heartbeat < now(-60))
                silent = workers & set((await session.scalars(last)).all())


async def test_a_turn_that_finds_other_work_is_passed_on(app, ada):
    """Woken for one job and served with another's task, it leaves the first to others."""
    app.state.joblib_settings.recheck_seconds = NEVER
    both = await offer(ada, "Rotate")
    await offer(ada, "Scale", worker_id=both)
    one = await offer(ada, "Scale")
    waiters = wait_for_work(ada, both), wait_for_work(ada, one)
    async with waiting_side_by_side(*waiters) as told:
        # together: the first who waits is woken once, and may look but once
        await at_once(submit(ada, "lab:modifiers:Scale"), submit(ada, "lab:modifiers:Scale"))
        await until(lambda: len(told) == 2)
    assert {answer["task"]["worker_id"] for answer in told} == {both, one}


@asynccontextmanager
async def browsers(user, server, count):
    """Yield clients with a connection of their own."""
    limits = httpx.Limits(max_connections=count)
    async with httpx.AsyncClient(
        base_url=f"{server}{PREFIX}", headers=user.headers, limits=limits, timeout=HANG
    ) as client:
        yield client


@pytest.mark.makers("plain")
async def test_who_hung_up_is_forgotten_at_once(app, ada, server):
    app.state.joblib_settings.recheck_seconds = NEVER
    worker = await offer(ada)
    task = await submit(ada)
    await claim(ada, worker)
    async with browsers(ada, server, 40) as web, anyio.create_task_group() as group:
        for _ in range(20):
            group.start_soon(wait_for_work, web, worker)
            group.start_soon(wait_for_end, web, task)
        await until_waited_for(40)
        await until(lambda: len(runtime_of(app).subscriptions.by_request) == 40)
        group.cancel_scope.cancel()
    await until(lambda: not len(runtime_of(app).waiters))
    assert not runtime_of(app).subscriptions.by_request


@pytest.mark.makers("plain")
async def test_a_server_that_stops_answers_who_waits(app, ada, caplog):
    """And does not write a traceback for each of them."""
    worker = await offer(ada)
    task = await submit(ada, priority=0)
    await claim(ada, worker)
    answers = Answers()
    async with anyio.create_task_group() as group, servers.serve(app) as url:
        web = httpx.AsyncClient(base_url=f"{url}{PREFIX}", headers=ada.headers, timeout=HANG)
        group.start_soon(answers.take, wait_for_work(web, worker))
        group.start_soon(answers.take, wait_for_end(web, task))
        await until_waited_for(2)
    await web.aclose()
    assert len(answers) == 2
    assert {"task": None, "tasks": []} in answers
    assert "claimed" in [answer.get("status") for answer in answers]
    assert not [r for r in caplog.records if r.exc_info and r.levelno >= logging.ERROR]


@pytest.mark.makers("plain")
async def test_how_many_may_wait(app, ada, bob):
    settings = app.state.joblib_settings
    settings.recheck_seconds = NEVER
    settings.max_waiting_per_user, settings.max_waiting = 2, 3
    worker, others = await offer(ada), await offer(bob)
    task = await submit(ada)
    await claim(ada, worker)
    holding = wait_for_work(ada, worker), wait_for_end(ada, task)
    async with waiting_side_by_side(*holding):
        await until(lambda: len(runtime_of(app).subscriptions.by_request) == 2)
        for refused in (wait_for_work(ada, worker), wait_for_end(ada, task)):
            answer = await refused
            problem(answer, 429, "quota-exceeded")
            assert int(answer.headers["retry-after"]) > 0
        # who need not wait is answered
        assert (await ada.get(f"/tasks/{task['id']}")).status_code == 200
        async with anyio.create_task_group() as group:
            group.start_soon(wait_for_work, bob, others)
            await until(lambda: len(runtime_of(app).subscriptions.by_request) == 3)
            answer = await wait_for_work(bob, others)
            problem(answer, 503, "server-busy")
            assert int(answer.headers["retry-after"]) > 0
            group.cancel_scope.cancel()
    assert not runtime_of(app).subscriptions.by_user


@pytest.fixture
async def elsewhere(app, maker, engine, redis_url):
    """Another process of the host, as far as Redis or PostgreSQL knows."""
    async with Redis.from_url(redis_url) as ours, Redis.from_url(redis_url) as theirs:
        over_redis = RedisWakeups(ours), RedisWakeups(theirs)
        over_postgres = maker == "postgres" and (PgWakeups(engine), PgWakeups(engine))
        app.state.wakeups, there = over_postgres or over_redis
        yield there
        runtime_of(app).subscriptions.miss()
        await until(lambda: runtime_of(app).subscriptions.poller.done())


@pytest.mark.makers("plain", "postgres")
async def test_other_processes_wake_over_redis_or_postgresql(app, ada, session_maker, elsewhere):
    app.state.joblib_settings.recheck_seconds = NEVER
    worker, other = await offer(ada), await offer(ada)
    task = await submit(ada)
    await claim(ada, worker)
    holding = (wait_for_work(ada, w) for w in (worker, other))
    async with waiting_side_by_side(wait_for_end(ada, task), *holding) as told:
        await until(lambda: not runtime_of(app).subscriptions.missed)
        ended = {"status": TaskStatus.CANCELLED, "completed_at": now()}
        by_id = Task.id == UUID(task["id"])
        await execute(session_maker, update(Task).where(by_id).values(ended))
        elsewhere.publish([task_key(task["id"])], [])
        await until(lambda: len(told) == 1)
        await submit_elsewhere(session_maker)
        elsewhere.publish([], [job_key("lab:modifiers:Rotate")])
        await until(lambda: len(told) == 2)
        # one of them, and which one is who came first
        assert told[1]["task"]["worker_id"] in (worker, other)
        # what this process does, it tells the others, and does not hear itself
        heard = []
        async with anyio.create_task_group() as group:
            theirs = Waiters()
            group.start_soon(elsewhere.listen, theirs, lambda: heard.append("listens"))
            await until(lambda: heard)
            with theirs.waiting_for([job_key("lab:modifiers:Scale")]) as waiter:
                # more than PostgreSQL takes in one message
                others = [provider_key("n" * 1000 + str(n)) for n in range(20)]
                app.state.wakeups.publish(others, [job_key("lab:modifiers:Scale")])
                assert await waiter.wait(HANG)
                assert waiter.turns
            group.cancel_scope.cancel()


@pytest.mark.makers("plain")
async def test_a_redis_that_is_away_costs_no_answer(app, ada, caplog, tmp_path):
    app.state.joblib_settings.recheck_seconds = 0.2
    async with Redis.from_url(f"unix://{tmp_path}/none.sock") as redis:
        app.state.wakeups = RedisWakeups(redis)
        worker = await offer(ada)
        async with waiting_side_by_side(wait_for_work(ada, worker)) as told:
            await submit(ada)
            await until(lambda: told)
        await report(ada, told[0]["task"], "cancelled")
        await until(lambda: runtime_of(app).subscriptions.poller.done())
        await until(lambda: app.state.wakeups._sender._task.done())
    assert "wake-ups are not received" in caplog.text
